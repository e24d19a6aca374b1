"""`Clip` -> WebDataset tars with an index beside them, and a sample's bytes back from (shard, offset).

A folder of shards holds, for every split,
    <split>-000000.tar …       ordinary WebDataset: `<key>.json`, then `<key>.mp4` (H.264 at training size)
    <split>.index.safetensors  one value a sample in each of the columns `COLUMNS`
and `dataset.json`: format, counts, options, a hash of the rows kept, sizes of the shards, and which rows were left out and why.
A shard is written under another name and renamed when it is whole, so a killed run leaves none that is half; the same
command goes on where it stopped and ends with the same bytes. Several runs can each make a part of the shards; a last one
without a part makes what is missing and joins the indexes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flallm import UserError, make_folder, progress, usable_cpus, write_whole
from flallm.corpora import Clip, LeftOut
from flallm.encode import Options, encode_all
from flallm.store import Store

FORMAT = 2
COLUMNS = {
    "shard": np.int32,
    "video_offset": np.int64,
    "video_size": np.int32,
    "json_offset": np.int64,
    "json_size": np.int32,
    "frames": np.int32,
    "text_length": np.int32,  # characters
    "checksum": np.uint64,  # of the video's and the JSON's bytes
}
READERS = 32  # requests at a time
LARGEST = 2**30  # bytes of a sample; an index that says more is altered


def make_shards(
    clips: Iterable[Clip | LeftOut], out: str | Path, options: Options, corpus: dict, processes: int | None = None, part: tuple[int, int] = (0, 1)
) -> dict:
    """Writes the shards of `clips` into `out` and returns what `dataset.json` says. `corpus` names the data set and its arguments.
    With `part` (i, n) only every n-th shard from the i-th on is made, and {} comes back."""
    out, splits, left_out = Path(out), {}, []
    for clip in clips:
        if isinstance(clip, LeftOut):
            left_out.append(asdict(clip))
        else:
            splits.setdefault(clip.split, []).append(clip)
    if not splits:
        raise UserError("the corpus holds no clip: nothing to make shards of")
    for split, members in splits.items():
        key, count = Counter(clip.key for clip in members).most_common(1)[0]
        if count > 1:
            raise UserError(f"two clips of {split} have the key {key!r}: keys must be unique")
    rows = hashlib.sha256(json.dumps([[_row(clip) for members in splits.values() for clip in members], left_out]).encode())
    made_from = {"format": FORMAT, "corpus": corpus, "options": asdict(options), "source_sha256": rows.hexdigest()}
    if made := begin(out, made_from):
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
    return {} if part != (0, 1) else join(out, [(path, members[0].split) for path, members in shards], {**made_from, "left_out": left_out})


def begin(out: Path, made_from: dict) -> dict:
    """What `dataset.json` says if all is made already, else {}, and then the folder notes what it is made from."""
    begun = out / "dataset.json.part"
    for file in (out / "dataset.json", begun):
        if file.exists():
            made = _read_made(file)
            if {k: made.get(k) for k in made_from} != made_from:
                raise UserError(f"{out} holds shards made of other clips or with other options: remove it or name another folder")
            if file != begun:
                return made
    make_folder(out)
    write_whole(begun, json.dumps(made_from))
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


def join(out: Path, shards: list[tuple[Path, str]], dataset: dict, made_by: str = "") -> dict:
    """The indexes of all shards, (path, split) each, as one for each split, and `dataset.json`."""
    kept, columns, dataset["splits"] = hashlib.sha256(), {}, {}
    for path, split in shards:
        rows, notes = _read_rows(path.with_suffix(".rows"))
        if notes.get("made_by", "") != made_by:
            raise UserError(f"{path} was made by another encoder or with other options than the rest: remove it and its .rows, and make them again")
        try:
            kept.update(notes["kept_sha256"].encode())
            dataset["left_out"] += json.loads(notes["left_out"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path.with_suffix('.rows')} is altered ({error!r}): remove it and {path}, and make them again") from None
        columns.setdefault(split, []).append(rows)
    for split, parts in columns.items():
        index = {name: np.concatenate([rows[name] for rows in parts]) for name in COLUMNS}
        index["shard"] = np.repeat(np.arange(len(parts), dtype=np.int32), [len(rows["frames"]) for rows in parts])
        _save(index, out / f"{split}.index.safetensors")
        sizes = [path.stat().st_size for path, of in shards if of == split]
        dataset["splits"][split] = {"clips": len(index["frames"]), "frames": int(index["frames"].sum()), "shard_bytes": sizes}
    dataset["rows_sha256"] = kept.hexdigest()
    write_whole(out / "dataset.json", json.dumps(dataset, indent=1, ensure_ascii=False))
    for left in (out / "dataset.json.part", *out.glob("*-*.*.part")):  # of tries that were killed
        left.unlink(missing_ok=True)
    for path, _ in shards:
        path.with_suffix(".rows").unlink(missing_ok=True)
    return dataset


def _samples(clips: list[Clip], encoded: Iterator[tuple[bytes, dict] | str], bar) -> Iterator[tuple[str, bytes, dict, list] | dict]:
    for clip in clips:
        result = next(encoded)
        bar.update()
        yield (
            asdict(LeftOut(clip.key, clip.split, clip.media.source, result)) if isinstance(result, str) else (clip.key, *result, _row(clip)[:-1])
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


def checksum(video: bytes, meta: bytes) -> int:
    digest = hashlib.blake2b(video, digest_size=8)
    digest.update(meta)
    return int.from_bytes(digest.digest(), "little")


def _read_rows(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(columns, notes) of an index. Raises UserError for a file that is none."""
    try:
        with safe_open(path, "np") as file:
            rows, notes = {name: file.get_tensor(name) for name in COLUMNS}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no index of shards ({error}): make them again with tools/make_shards.py") from None
    if any(rows[name].dtype != dtype or rows[name].shape != rows["shard"].shape or rows["shard"].ndim != 1 for name, dtype in COLUMNS.items()):
        raise UserError(f"{path} is no index of shards: its columns do not fit: make them again with tools/make_shards.py")
    return rows, notes


def splits_of(folder: str | Path) -> list[str]:
    """The splits that a folder of shards has."""
    return list(_read_dataset(Store(str(folder)), str(folder))["splits"])


def frame_rate_of(folder: str | Path) -> float:
    """Frames a second of all clips of a folder of shards; 0: each clip has its own."""
    return _frame_rate(_read_dataset(Store(str(folder)), str(folder)))


def _read_dataset(store: Store, folder: str) -> dict:
    """`dataset.json`; of it are sure "splits": {split: {"clips", "frames", "shard_bytes"}}, "features": what made them, {} where they are videos, and "corpus"."""
    try:
        dataset = json.loads(store.read("dataset.json"))
        splits, features, corpus = dataset["splits"], dataset.setdefault("features", {}), dataset.setdefault("corpus", {})
        if not isinstance(corpus, dict):
            raise ValueError("its corpus is none")
        least = {"channels": 1, "copies": 0, "stride": 1, "max_frames": 1}
        if features and not (
            all(isinstance(features[name], int) and features[name] >= at for name, at in least.items()) and features["dtype"] in ("bf16", "fp16", "fp32")
        ):
            raise ValueError("its features are none")
        if not all(isinstance(s["clips"], int) and all(isinstance(b, int) for b in s["shard_bytes"]) for s in splits.values()):
            raise ValueError("a count is none")
        return dataset
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished shards (no dataset.json): make them with tools/make_shards.py") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}/dataset.json cannot be read ({error}): make the shards again with tools/make_shards.py") from None


def _frame_rate(dataset: dict) -> float:
    options = dataset.get("options")
    fps = options.get("fps") if isinstance(options, dict) else None
    return float(fps) if isinstance(fps, int | float) and 0 < fps < 1000 else 0.0


class BadSample(Exception):
    """A sample that cannot be used; the message is the cause."""


class Shards:
    """The samples of one split, readable in any order and from any process.

    folder: a directory, or an address such as s3://bucket/shards; `cache` and `cache_gib` are for the latter, see `Store`.
    """

    def __init__(self, folder: str | Path, split: str, cache: str = "", cache_gib: float = 100.0):
        self.folder, self.split = str(folder), split
        self.store = Store(self.folder, cache, cache_gib)
        dataset = _read_dataset(self.store, self.folder)
        splits, self.features, self.corpus = (dataset[name] for name in ("splits", "features", "corpus"))
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}: it has {', '.join(splits)}")
        self.fps = _frame_rate(dataset)  # that all clips were brought to; 0: each has its own
        self.shard_bytes, self.index = splits[split]["shard_bytes"], self._read_index()
        if len(self) != splits[split]["clips"]:
            raise UserError(f"{folder}/{split}.index.safetensors has {len(self)} samples, dataset.json says {splits[split]['clips']}: make the shards again")
        shards, frames, texts = (self.index[column] for column in ("shard", "frames", "text_length"))
        if not np.all((shards >= 0) & (shards < len(self.shard_bytes)) & (frames > 0) & (texts >= 0)):
            raise UserError(f"{folder}/{split}.index.safetensors says the impossible: it is altered: make the shards again with tools/make_shards.py")
        if self.store.local:
            for number, size in enumerate(self.shard_bytes):
                path = Path(self.store.root, self._shard(number))
                if not path.is_file() or path.stat().st_size != size:
                    raise UserError(f"{path} is {'cut short or altered' if path.is_file() else 'missing'}: make it again with tools/make_shards.py")

    def _read_index(self) -> dict[str, np.ndarray]:
        name = f"{self.split}.index.safetensors"
        if self.store.local:
            return _read_rows(Path(self.store.root, name))[0]
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            try:
                file.write(self.store.read(name))
            except OSError as error:
                raise UserError(f"{self.folder}/{name} cannot be read: {error}") from None
            file.flush()
            return _read_rows(Path(file.name))[0]

    def _shard(self, number: int) -> str:
        return f"{self.split}-{number:06d}.tar"

    def __len__(self) -> int:
        return len(self.index["frames"])

    def without_index(self) -> Shards:
        """For another process, which is given the rows that it has to read: of ten million clips the index takes 440 MB."""
        other = copy(self)
        other.index = {}
        return other

    def row(self, i: int) -> dict[str, int]:
        """What the index says of sample i."""
        return {name: int(column[i]) for name, column in self.index.items()}

    def read(self, i: int, row: dict[str, int] | None = None) -> tuple[bytes, dict]:
        """(mp4 bytes, the sample's JSON) of sample i. Raises `BadSample` when the shard is missing, short or altered. row: needed `without_index`."""
        row = row or self.row(i)
        name, start, stop = self._shard(row["shard"]), row["json_offset"], row["video_offset"] + row["video_size"]
        if not 0 <= start <= start + row["json_size"] <= row["video_offset"] <= stop <= start + LARGEST:
            raise BadSample(f"{self.folder}/{name}: the index says the impossible of sample {i}: it is altered")
        for again in (True, False):  # what a cache holds may be altered where the shard is not
            try:
                content = self.store.read(name, start, stop)  # both files of the sample, and the header between them
            except OSError as error:
                raise BadSample(f"{self.folder}/{name}: {error.strerror or error}") from None
            meta, video = content[: row["json_size"]], content[row["video_offset"] - start :]
            if checksum(video, meta) == row["checksum"]:
                break
            if not (self.store.forget(name, start, stop) and again):
                raise BadSample(f"{self.folder}/{name}: sample {i} is not what the index says: the shard is cut short or altered")
        try:
            said = json.loads(meta)
            if not all(isinstance(said[field], kind) for field, kind in (("key", str), ("text", str), ("num_frames", int))):
                raise ValueError("a field has a wrong type")
            (said["key"] + said["text"]).encode()  # half a character can be neither printed nor translated
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadSample(f"{self.folder}/{name}: the JSON of sample {i} is none of ours: {error}") from None
        if said["num_frames"] != row["frames"]:
            raise BadSample(f"{self.folder}/{name}: sample {i} has {said['num_frames']} frames by its JSON, {row['frames']} by the index")
        return video, said

    def meta(self, i: int) -> dict:
        """The JSON of sample i without its video, and so unchecked: for looking at texts. {} where it cannot be read."""
        name, start = self._shard(int(self.index["shard"][i])), int(self.index["json_offset"][i])
        try:
            said = json.loads(self.store.read(name, start, start + int(self.index["json_size"][i])))
            return said if isinstance(said, dict) and isinstance(said.get("key"), str) and isinstance(said.get("text"), str) else {}
        except (OSError, ValueError, RecursionError):
            return {}

    def metas(self, numbers: Iterable[int] | None = None) -> Iterator[dict]:
        """`meta` of these samples, of all where none are named, in order; many at a time where an address has to be asked."""
        numbers = range(len(self)) if numbers is None else numbers
        if self.store.local:
            yield from map(self.meta, numbers)
            return
        with ThreadPoolExecutor(READERS) as asking:
            yield from asking.map(self.meta, numbers)
