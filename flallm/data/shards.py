"""`Clip` -> WebDataset tars with an index beside them."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from flallm.data.clips import Clip, SkippedClip
from flallm.data.encode import EncodeOptions, encode_all
from flallm.data.reader import COLUMNS, checksum, read_rows
from flallm.data.rows import checked, no_clip_left
from flallm.utils import UserError, atomic_write, ensure_dir, progress, usable_cpus

FORMAT = 3


def make_shards(
    clips: Iterable[Clip | SkippedClip], out: str | Path, options: EncodeOptions, corpus: dict, processes: int | None = None, part: tuple[int, int] = (0, 1)
) -> dict:
    """Writes the shards of `clips` into `out` and returns what `dataset.json` says. `corpus` names the data set and its arguments.
    With `part` (i, n) only every n-th shard from the i-th on is made, and {} comes back."""
    out = Path(out)
    splits, left_out = checked(clips)
    rows = hashlib.sha256(json.dumps([[_row(clip) for members in splits.values() for clip in members], left_out]).encode())
    made_from = {"format": FORMAT, "corpus": corpus, "options": asdict(options), "source_sha256": rows.hexdigest()}
    if made := begin_dataset(out, made_from):
        return made

    shards = [
        (out / f"{split}-{number:06d}.tar", members[first : first + options.per_shard])
        for split, members in splits.items()
        for number, first in enumerate(range(0, len(members), options.per_shard))
    ]
    mine = shards[part[0] :: part[1]]
    missing = [(path, members) for path, members in mine if not path.exists()]
    with progress(sum(len(members) for _, members in mine), "clip", "shards") as bar:
        bar.update(bar.total - sum(len(members) for _, members in missing))
        encoded = encode_all((clip for _, members in missing for clip in members), options, processes or usable_cpus())
        for path, members in missing:
            write_tar(path, _samples(members, encoded, bar), "mp4")
    return {} if part != (0, 1) else join_indexes(out, [(path, members[0].split) for path, members in shards], {**made_from, "left_out": left_out})


def begin_dataset(out: Path, made_from: dict) -> dict:
    """What `dataset.json` says if all is made already, else {}, and then the folder notes what it is made from."""
    begun = out / "dataset.json.part"
    for file in (out / "dataset.json", begun):
        if file.exists():
            made = _read_made(file)
            if {k: made.get(k) for k in made_from} != made_from:
                raise UserError(f"{out} holds shards made of other clips or with other options: remove it or name another folder")
            if file != begun:
                return made
    ensure_dir(out)
    atomic_write(begun, json.dumps(made_from))
    return {}


def _read_made(file: Path) -> dict:
    """`dataset.json` or the beginnings of one."""
    try:
        made = json.loads(file.read_bytes())
        if not isinstance(made, dict):
            raise ValueError("it is no JSON object")
        return made
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}): remove it or name another folder") from None


def _row(clip: Clip) -> list:
    return [clip.key, clip.split, clip.text, clip.gloss, clip.signer, clip.media.source]


def join_indexes(out: Path, shards: list[tuple[Path, str]], dataset: dict, made_by: str = "") -> dict:
    """The indexes of all shards, (path, split) each, as one for each split, and `dataset.json`."""
    kept, columns, dataset["splits"] = hashlib.sha256(), {}, {}
    for path, split in shards:
        rows, notes = read_rows(path.with_suffix(".rows"))
        if notes.get("made_by", "") != made_by:
            raise UserError(f"{path} was made by another encoder or with other options than the rest: remove it and its .rows, and make them again")
        try:
            kept.update(notes["kept_sha256"].encode())
            dataset["left_out"] += json.loads(notes["left_out"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path.with_suffix('.rows')} is altered ({error!r}): remove it and {path}, and make them again") from None
        columns.setdefault(split, []).append(rows)
    refuse_empty(shards, columns, dataset["left_out"])
    for split, parts in columns.items():
        index = {name: np.concatenate([rows[name] for rows in parts]) for name in COLUMNS}
        index["shard"] = np.repeat(np.arange(len(parts), dtype=np.int32), [len(rows["frames"]) for rows in parts])
        _save(index, out / f"{split}.index.safetensors")
        sizes = [path.stat().st_size for path, of in shards if of == split]
        dataset["splits"][split] = {"clips": len(index["frames"]), "frames": int(index["frames"].sum()), "shard_bytes": sizes}
    dataset["rows_sha256"] = kept.hexdigest()
    atomic_write(out / "dataset.json", json.dumps(dataset, indent=1, ensure_ascii=False))
    for left in (out / "dataset.json.part", *out.glob("*-*.*.part")):  # of tries that were killed
        left.unlink(missing_ok=True)
    for path, _ in shards:
        path.with_suffix(".rows").unlink(missing_ok=True)
    return dataset


def refuse_empty(shards: list[tuple[Path, str]], columns: dict[str, list[dict[str, np.ndarray]]], left_out: list[dict]) -> None:
    """Raises UserError where no clip of a split is left. Its shards go, so that the same command makes them again once the files are mended."""
    empty = [split for split, parts in columns.items() if not sum(len(rows["frames"]) for rows in parts)]
    for path, split in shards:
        if split in empty:
            path.unlink()
            path.with_suffix(".rows").unlink()
    if empty:
        raise UserError("; ".join(no_clip_left(split, left_out) for split in empty))


def _samples(clips: list[Clip], encoded: Iterator[tuple[bytes, dict] | str], bar) -> Iterator[tuple[str, bytes, dict, list] | dict]:
    for clip in clips:
        result = next(encoded)
        bar.update()
        yield (
            asdict(SkippedClip(clip.key, clip.split, clip.media.source, result)) if isinstance(result, str) else (clip.key, *result, _row(clip)[:-1])
        )  # wherever the corpus lies


def write_tar(path: Path, samples: Iterable[tuple[str, bytes, dict, list] | dict], extension: str, made_by: str = "") -> None:
    """The shard of samples (key, bytes, JSON, row to hash; or a dict that tells of one left out), and beside it `.rows`: its part of
    the index, what was left out and a hash of what was kept."""
    import webdataset

    left_out, kept, metas, part = [], hashlib.sha256(), [], path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as file:
        tar = webdataset.TarWriter(file, mtime=0, user="flallm", group="flallm")  # equal bytes on any day, for any user
        for sample in samples:
            if isinstance(sample, dict):
                left_out.append(sample)
            else:
                key, content, meta, row = sample
                text = json.dumps(meta, ensure_ascii=False).encode()
                tar.write({"__key__": key, extension: content, "json": text})
                kept.update(json.dumps(row).encode())
                metas.append((meta["num_frames"], len(meta["text"]), checksum(content, text)))
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    with tarfile.open(part) as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
        names = [name.removesuffix(".json") for name in places if name.endswith(".json")]
    values = [(0, *places[f"{name}.{extension}"], *places[f"{name}.json"], *meta) for name, meta in zip(names, metas)]
    rows = {name: np.array([v[c] for v in values], dtype) for c, (name, dtype) in enumerate(COLUMNS.items())}
    _save(rows, path.with_suffix(".rows"), {"left_out": json.dumps(left_out), "kept_sha256": kept.hexdigest(), "made_by": made_by})
    part.rename(path)


def _save(columns: dict[str, np.ndarray], path: Path, notes: dict[str, str] | None = None) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(columns, part, notes)
    part.chmod(0o644)  # safetensors writes for the owner alone
    part.rename(path)
