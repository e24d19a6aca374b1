"""The frozen encoder's sign-wise features as shards, which stage 2 and evaluation read as video.

Each shard of video becomes a shard of the same name with `<key>.json` and `<key>.npy`:
(1 + copies, N, C). First comes the clip as it is, then augmented copies; copy e is what training
on video sees in epoch e. npy has no bf16: its 16 bits are stored as uint16. The encoder reads
clips one by one, so features depend neither on other clips nor on the number of ranks.
`dataset.json` says under "features" which encoder and which preprocessing made them.
"""

from __future__ import annotations

import hashlib
import io
import json
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
from flallm.evaluation.decode import load_run, warn_about_colors
from flallm.model.translator import Translator
from flallm.utils import UserError, progress

TIMEOUT = 24 * 3600  # seconds: ranks that are done wait for the one with the last shard
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def features(
    run: Path, out: Path, ranks: DistContext, dtype: str, copies: int, shards: str = ""
) -> None:
    """Writes the features of all splits of the run's shards. A rerun resumes.

    dtype: a key of DTYPES. copies: augmented copies of each training clip. shards: where the
    run's shards are now, if not where its config says.
    """
    model, config = load_run(run, ranks.device, shards)
    folder = config.data.shards
    splits = {name: ClipDataset(name, config.data, config.seed) for name in splits_of(folder)}
    if any(clips.features for clips in splits.values()):
        raise UserError(f"data.shards of {run} is {folder}: these are features already")
    source = next(iter(splits.values())).shards
    if ranks.is_main:
        warn_about_colors(source)
    in_bf16 = computes_in_bf16(config.train, ranks.device.type)
    made_by = about(model, config.data, dtype, copies, config.seed)
    made_by["precision"] = "bf16" if in_bf16 else "fp32"
    made_from = {
        "format": source.format,
        "features": made_by,
        "source_sha256": {name: _index_sha256(clips) for name, clips in splits.items()},
    }
    paths = _shard_paths(out, splits)
    finished = begin_dataset(out, made_from) if ranks.is_main else None
    missing = [path for path in paths if not path.exists()]
    finished, missing = ranks.gather((finished, missing))[0]  # as rank 0 sees the folder
    if finished:
        return
    own = missing[ranks.rank :: ranks.world_size]
    with (
        precision(config.train, ranks.device),
        torch.no_grad(),
        progress(len(own), "shard", "features", ranks.is_main) as bar,
    ):
        for path in own:
            split, shard = paths[path]
            split_copies = copies if split == "train" else 0
            samples = _samples(model, splits[split], shard, dtype, split_copies, ranks.device)
            write_tar(path, samples, "npy", json.dumps(made_from))
            bar.update()
    ranks.gather(None)  # waits until all shards are written
    if ranks.is_main:
        options = {"fps": source.fps or None}
        dataset = {**made_from, "corpus": source.corpus, "options": options, "left_out": []}
        parts = [(path, split) for path, (split, _) in paths.items()]
        join_indexes(out, parts, dataset, json.dumps(made_from))
    ranks.gather(None)  # waits until dataset.json is written


def _index_sha256(clips: ClipDataset) -> str:
    checksums = np.ascontiguousarray(clips.shards.index["checksum"])
    return hashlib.sha256(checksums).hexdigest()


def _shard_paths(out: Path, splits: dict[str, ClipDataset]) -> dict[Path, tuple[str, int]]:
    """{path of a shard to write: (split, number of the shard)}."""
    paths = {}
    for split, clips in splits.items():
        for shard in range(len(clips.shards.shard_bytes)):
            paths[out / f"{split}-{shard:06d}.tar"] = (split, shard)
    return paths


def _samples(
    model: Translator,
    clips: ClipDataset,
    shard: int,
    dtype: str,
    copies: int,
    device: torch.device,
) -> Iterator[tuple[str, bytes, dict, list] | dict]:
    """Yields (key, npy, JSON, row to hash) of each clip of a shard.

    A clip that cannot be decoded yields what `dataset.json` says of it.
    """
    indices = np.flatnonzero(clips.shards.index["shard"] == shard).tolist()
    epochs = [None, *range(copies)]  # None: not augmented
    groups = [[(epoch, index)] for index in indices for epoch in epochs]
    decoded = batches(clips, model.text, groups, clips.data.workers)
    for index in indices:
        versions = [next(decoded) for _ in epochs]
        bad = [sample for batch in versions for sample in batch.bad]
        if bad:
            yield {
                "key": bad[0]["key"],
                "split": clips.shards.split,
                "source": f"sample {index}",
                "cause": bad[0]["cause"],
            }
            continue
        # Sign-wise features, whatever llm.input of this run is.
        signs = [model.encoder(batch.frames.to(device), batch.lengths) for batch in versions]
        meta = clips.shards.read(index)[1]
        row = [meta["key"], clips.shards.split, meta["text"]]
        yield meta["key"], _npy(torch.stack(signs), dtype), meta, row


def _npy(signs: torch.Tensor, dtype: str) -> bytes:
    """signs: (1 + copies, N, C)."""
    signs = signs.to(DTYPES[dtype]).cpu()
    if dtype == "bf16":
        signs = signs.view(torch.uint16)
    file = io.BytesIO()
    np.save(file, signs.numpy())
    return file.getvalue()


def about(model: Translator, data: Data, dtype: str, copies: int, seed: int) -> dict:
    """What features depend on besides the clip."""
    made = {
        "encoder_sha256": model.encoder.sha256(),
        "channels": model.encoder.norm.num_features,
        "dtype": dtype,
        "copies": copies,
    }
    for field in ("resize", "crop", "stride", "max_frames"):
        made[field] = getattr(data, field)
    if copies:
        made |= {"augment": asdict(data.augment), "seed": seed}
    return made
