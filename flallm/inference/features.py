"""The frozen encoder's sign-wise features as shards, which stage 2 and evaluation take in place of video shards.

Each shard of video becomes one of the same name with `<key>.json` and `<key>.npy`: (1 + copies, N, C), first the clip as it is, then
augmented copies; copy e is what training on video sees in epoch e. bf16, which npy does not know, is kept as the 16 bits of a number.
Clips go through the encoder one by one, so what comes out depends neither on other clips nor on the number of ranks.
`dataset.json` says under "features" which encoder and which preprocessing made them.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from flallm.config import Data
from flallm.data.dataset import ClipDataset, batches
from flallm.data.reader import splits_of
from flallm.data.shards import begin_dataset, join_indexes, write_tar
from flallm.distributed.context import DistContext, computes_in_bf16, precision
from flallm.evaluation.decode import load_run
from flallm.model.translator import Translator
from flallm.utils import UserError, progress

TIMEOUT = 24 * 3600  # seconds: who is done waits for who has the last shard
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def features(run: Path, out: Path, ranks: DistContext, dtype: str, copies: int, shards: str = "") -> None:
    """Writes the features of all splits of the run's shards; the same command goes on where it was stopped."""
    model, config = load_run(run, ranks.device, shards)
    splits = {split: ClipDataset(split, config.data, config.seed) for split in splits_of(config.data.shards)}
    if any(clips.features for clips in splits.values()):
        raise UserError(f"data.shards of {run} is {config.data.shards}: these are features already")
    made_by = about(model, config.data, dtype, copies, config.seed) | {"precision": "bf16" if computes_in_bf16(config.train, ranks.device.type) else "fp32"}
    sums = {split: hashlib.sha256(np.ascontiguousarray(clips.shards.index["checksum"])).hexdigest() for split, clips in splits.items()}
    source = next(iter(splits.values())).shards
    if ranks.is_main and (warning := source.color_warning()):
        print(f"warning: {warning}", file=sys.stderr)
    made_from = {"format": source.format, "features": made_by, "source_sha256": sums}
    parts = {out / f"{split}-{n:06d}.tar": (split, n) for split, clips in splits.items() for n in range(len(clips.shards.shard_bytes))}
    done = begin_dataset(out, made_from) if ranks.is_main else None
    done, missing = ranks.gather((done, [path for path in parts if not path.exists()]))[0]
    if done:
        return
    with precision(config.train, ranks.device), torch.no_grad():
        mine = missing[ranks.rank :: ranks.world_size]
        with progress(len(mine), "shard", "features", ranks.is_main) as bar:
            for path in mine:
                split, n = parts[path]
                write_tar(path, _samples(model, splits[split], n, dtype, copies if split == "train" else 0, ranks.device), "npy", json.dumps(made_from))
                bar.update()
    ranks.gather(None)  # all shards are there
    if ranks.is_main:
        dataset = {**made_from, "corpus": source.corpus, "options": {"fps": source.fps or None}, "left_out": []}
        join_indexes(out, [(path, split) for path, (split, _) in parts.items()], dataset, json.dumps(made_from))
    ranks.gather(None)


def _samples(
    model: Translator, clips: ClipDataset, shard: int, dtype: str, copies: int, device: torch.device
) -> Iterator[tuple[str, bytes, dict, list] | dict]:
    """(key, npy, JSON, row) of each clip of a shard, or what `dataset.json` says of one that cannot be decoded."""
    numbers = np.flatnonzero(clips.shards.index["shard"] == shard).tolist()
    views = [None, *range(copies)]  # epochs; None: not augmented
    found = batches(clips, model.text, [[(epoch, n)] for n in numbers for epoch in views], clips.data.workers)
    for n in numbers:
        made = [next(found) for _ in views]
        if bad := [b for batch in made for b in batch.bad]:
            yield {"key": bad[0]["key"], "split": clips.shards.split, "source": f"sample {n}", "cause": bad[0]["cause"]}
            continue
        signs = [model.encoder(batch.frames.to(device), batch.lengths) for batch in made]  # sign-wise, whatever this run's own language model reads
        stacked = torch.stack(signs).to(DTYPES[dtype]).cpu()  # (1 + copies, N, C)
        file = io.BytesIO()
        np.save(file, (stacked.view(torch.uint16) if dtype == "bf16" else stacked).numpy())
        meta = clips.shards.read(n)[1]
        yield meta["key"], file.getvalue(), meta, [meta["key"], clips.shards.split, meta["text"]]


def about(model: Translator, data: Data, dtype: str, copies: int, seed: int) -> dict:
    """What features depend on besides the clip."""
    made = {"encoder_sha256": model.encoder.sha256(), "channels": model.encoder.norm.num_features, "dtype": dtype, "copies": copies}
    made |= {field: getattr(data, field) for field in ("resize", "crop", "stride", "max_frames")}
    return made | ({"augment": asdict(data.augment), "seed": seed} if copies else {})
