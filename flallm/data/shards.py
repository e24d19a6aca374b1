"""Writes clips as WebDataset tars with an index beside them."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from flallm.data.clips import Clip, SkippedClip
from flallm.data.encode import EncodeOptions, encode_all
from flallm.data.reader import COLUMNS, checksum, read_rows
from flallm.data.rows import checked, no_clip_left
from flallm.utils import UserError, atomic_write, ensure_dir, progress, usable_cpus

FORMAT = 3


@dataclass(frozen=True)
class Shard:
    """A tar to write and its clips, all of one split."""

    path: Path
    split: str
    clips: list[Clip]


class Sample(NamedTuple):
    """A sample to write. `row` is what `rows_sha256` of `dataset.json` is a hash of."""

    key: str
    content: bytes
    meta: dict
    row: list


def make_shards(
    clips: Iterable[Clip | SkippedClip],
    out: str | Path,
    options: EncodeOptions,
    corpus: dict,
    processes: int | None = None,
    part: tuple[int, int] = (0, 1),
) -> dict:
    """Writes the shards of `clips` into `out` and returns the content of `dataset.json`.

    corpus: the name of the data set and its arguments. part: (i, n) writes every n-th shard from
    the i-th on and returns {}. Shards that exist are not written again.
    """
    out = Path(out)
    splits, left_out = checked(clips)
    rows = [_row(clip) for clip in chain.from_iterable(splits.values())]
    provenance = {
        "format": FORMAT,
        "corpus": corpus,
        "options": asdict(options),
        "source_sha256": hashlib.sha256(json.dumps([rows, left_out]).encode()).hexdigest(),
    }
    finished = begin_dataset(out, provenance)
    if finished:
        return finished

    shards: list[Shard] = []
    for split, members in splits.items():
        for number, first in enumerate(range(0, len(members), options.per_shard)):
            path = out / f"{split}-{number:06d}.tar"
            shards.append(Shard(path, split, members[first : first + options.per_shard]))
    _write_shards(shards[part[0] :: part[1]], options, processes or usable_cpus())
    if part != (0, 1):
        return {}
    paths = [(shard.path, shard.split) for shard in shards]
    return join_indexes(out, paths, {**provenance, "left_out": left_out})


def _write_shards(shards: list[Shard], options: EncodeOptions, processes: int) -> None:
    """Writes the shards that do not exist yet."""
    missing = [shard for shard in shards if not shard.path.exists()]
    with progress(sum(len(shard.clips) for shard in shards), "clip", "shards") as bar:
        bar.update(bar.total - sum(len(shard.clips) for shard in missing))
        clips = chain.from_iterable(shard.clips for shard in missing)
        encoded = encode_all(clips, options, processes)
        for shard in missing:
            write_tar(shard.path, _samples(shard.clips, encoded, bar), "mp4")


def begin_dataset(out: Path, provenance: dict) -> dict:
    """Returns the content of `dataset.json` if the shards are finished.

    Otherwise notes in the folder what its shards are made from and returns {}. Raises UserError
    where the folder holds shards of another provenance.
    """
    finished, begun = out / "dataset.json", out / "dataset.json.part"
    for file in (finished, begun):
        if not file.exists():
            continue
        dataset = _read_json(file)
        if any(dataset.get(name) != value for name, value in provenance.items()):
            raise UserError(
                f"{out} holds shards made of other clips or with other options: remove it or name "
                "another folder"
            )
        if file == finished:
            return dataset
    ensure_dir(out)
    atomic_write(begun, json.dumps(provenance))
    return {}


def _read_json(file: Path) -> dict:
    """The JSON object of a file. Raises UserError for anything else."""
    try:
        dataset = json.loads(file.read_bytes())
        if not isinstance(dataset, dict):
            raise ValueError("it is no JSON object")
        return dataset
    except (OSError, ValueError, RecursionError) as error:
        message = f"{file} cannot be read ({error}): remove it or name another folder"
        raise UserError(message) from None


def _row(clip: Clip) -> list:
    return [clip.key, clip.split, clip.text, clip.gloss, clip.signer, clip.media.source]


def join_indexes(
    out: Path, shards: list[tuple[Path, str]], dataset: dict, made_by: str = ""
) -> dict:
    """Joins the indexes of all shards into one for each split and writes `dataset.json`.

    shards: (path, split) of each. dataset: the fields that are known, "left_out" among them.
    made_by: the note that every shard must carry. Returns the content of `dataset.json`.
    """
    rows_hash = hashlib.sha256()
    indexes: dict[str, list[dict[str, np.ndarray]]] = {}  # of the shards of each split
    for path, split in shards:
        rows, notes = read_rows(path.with_suffix(".rows"))
        if notes.get("made_by", "") != made_by:
            raise UserError(
                f"{path} was made by another encoder or with other options than the rest: remove "
                "it and its .rows, and make them again"
            )
        try:
            rows_hash.update(notes["kept_sha256"].encode())
            dataset["left_out"] += json.loads(notes["left_out"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{path.with_suffix('.rows')} is altered ({error!r}): remove it and {path}, and "
                "make them again"
            ) from None
        indexes.setdefault(split, []).append(rows)
    _refuse_empty(shards, indexes, dataset["left_out"])
    dataset["splits"] = {}
    for split, parts in indexes.items():
        index = {name: np.concatenate([rows[name] for rows in parts]) for name in COLUMNS}
        clips_per_shard = [len(rows["frames"]) for rows in parts]
        index["shard"] = np.repeat(np.arange(len(parts), dtype=np.int32), clips_per_shard)
        _save(index, out / f"{split}.index.safetensors")
        paths = [path for path, split_of_path in shards if split_of_path == split]
        dataset["splits"][split] = {
            "clips": len(index["frames"]),
            "frames": int(index["frames"].sum()),
            "shard_bytes": [path.stat().st_size for path in paths],
        }
    dataset["rows_sha256"] = rows_hash.hexdigest()
    atomic_write(out / "dataset.json", json.dumps(dataset, indent=1, ensure_ascii=False))
    # Killed runs leave *.part files.
    for leftover in (out / "dataset.json.part", *out.glob("*-*.*.part")):
        leftover.unlink(missing_ok=True)
    for path, _ in shards:
        path.with_suffix(".rows").unlink(missing_ok=True)
    return dataset


def _refuse_empty(
    shards: list[tuple[Path, str]],
    indexes: dict[str, list[dict[str, np.ndarray]]],
    left_out: list[dict],
) -> None:
    """Raises UserError where no clip of a split is left.

    The shards of such a split are removed, so the same command makes them again once the videos are
    mended.
    """
    empty = []
    for split, parts in indexes.items():
        if not any(len(rows["frames"]) for rows in parts):
            empty.append(split)
    for path, split in shards:
        if split in empty:
            path.unlink()
            path.with_suffix(".rows").unlink()
    if empty:
        raise UserError("; ".join(no_clip_left(split, left_out) for split in empty))


def _samples(
    clips: list[Clip], encoded: Iterator[tuple[bytes, dict] | str], bar
) -> Iterator[Sample | dict]:
    """The samples of clips, or the row of `left_out` for a clip that cannot be encoded."""
    for clip in clips:
        result = next(encoded)
        bar.update()
        if isinstance(result, str):
            yield asdict(SkippedClip(clip.key, clip.split, clip.media.source, result))
        else:
            video, meta = result
            row = _row(clip)[:-1]  # without the source: the hash is the same wherever it lies
            yield Sample(clip.key, video, meta, row)


def write_tar(
    path: Path, samples: Iterable[Sample | dict], extension: str, made_by: str = ""
) -> None:
    """Writes a shard, and beside it `.rows`: its part of the index, with notes.

    samples: a dict is the row of `left_out` for a clip that is left out. extension: of the content
    of a sample. made_by: a note that `join_indexes` compares.
    """
    import webdataset

    left_out, rows_hash = [], hashlib.sha256()
    keys, values = [], []  # values: (frames, characters, checksum) of each sample
    part = path.with_suffix(f".{os.getpid()}.part")
    with open(part, "wb") as file:
        # The bytes are equal on any day and for any user.
        tar = webdataset.TarWriter(file, mtime=0, user="flallm", group="flallm")
        for sample in samples:
            if isinstance(sample, dict):
                left_out.append(sample)
                continue
            key, content, meta, row = sample
            meta_json = json.dumps(meta, ensure_ascii=False).encode()
            tar.write({"__key__": key, extension: content, "json": meta_json})
            rows_hash.update(json.dumps(row).encode())
            keys.append(key)
            values.append((meta["num_frames"], len(meta["text"]), checksum(content, meta_json)))
        tar.close()
        file.flush()
        os.fsync(file.fileno())
    with tarfile.open(part) as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    rows = []  # in the order of COLUMNS; join_indexes numbers the shards
    for key, value in zip(keys, values):
        rows.append((0, *places[f"{key}.{extension}"], *places[f"{key}.json"], *value))
    columns = {}
    for number, (name, dtype) in enumerate(COLUMNS.items()):
        columns[name] = np.array([row[number] for row in rows], dtype)
    notes = {
        "left_out": json.dumps(left_out),
        "kept_sha256": rows_hash.hexdigest(),
        "made_by": made_by,
    }
    _save(columns, path.with_suffix(".rows"), notes)
    part.rename(path)


def _save(columns: dict[str, np.ndarray], path: Path, notes: dict[str, str] | None = None) -> None:
    """Writes an index under a temporary name and renames it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(columns, part, notes)
    part.chmod(0o644)  # safetensors writes for the owner alone
    part.rename(path)
