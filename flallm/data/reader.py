"""Shards -> a sample's bytes, in any order and from any process."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from flallm.data.rows import no_clip_left
from flallm.data.storage import Storage
from flallm.utils import UserError

RIGHT_COLORS_SINCE = 3  # before, full-range and BT.709 sources were taken for limited range and BT.601
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


def checksum(video: bytes, meta: bytes) -> int:
    digest = hashlib.blake2b(video, digest_size=8)
    digest.update(meta)
    return int.from_bytes(digest.digest(), "little")


def read_rows(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
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
    return list(read_dataset_json(Storage(str(folder)), str(folder))["splits"])


def read_dataset_json(store: Storage, folder: str) -> dict:
    """`dataset.json`; of it are sure "splits": {split: {"clips", "frames", "shard_bytes"}}, "features": what made them, {} where they are videos, "corpus",
    and "left_out": [{"split", "cause"}]."""
    try:
        dataset = json.loads(store.read("dataset.json"))
        splits, features, corpus = dataset["splits"], dataset.setdefault("features", {}), dataset.setdefault("corpus", {})
        if not isinstance(corpus, dict):
            raise ValueError("its corpus is none")
        if not isinstance(dataset.setdefault("format", 1), int):
            raise ValueError("its format is no number")
        least = {"channels": 1, "copies": 0, "stride": 1, "max_frames": 1}
        if features and not (
            all(isinstance(features[name], int) and features[name] >= at for name, at in least.items()) and features["dtype"] in ("bf16", "fp16", "fp32")
        ):
            raise ValueError("its features are none")
        if not all(isinstance(s["clips"], int) and all(isinstance(b, int) for b in s["shard_bytes"]) for s in splits.values()):
            raise ValueError("a count is none")
        if not all(isinstance(row["split"], str) and isinstance(row["cause"], str) for row in dataset.setdefault("left_out", [])):
            raise ValueError("a row that is left out has no cause")
        if not splits:
            raise ValueError("it has no split")
        return dataset
    except FileNotFoundError:
        raise NoShards(f"{folder} holds no finished shards (no dataset.json): make them with tools/make_shards.py") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}/dataset.json cannot be read ({error}): make the shards again with tools/make_shards.py") from None


def _frame_rate(dataset: dict) -> float:
    options = dataset.get("options")
    fps = options.get("fps") if isinstance(options, dict) else None
    return float(fps) if isinstance(fps, int | float) and 0 < fps < 1000 else 0.0


class NoShards(UserError):
    """A folder without finished shards."""


class BadSample(Exception):
    """A sample that cannot be used; the message is the cause."""


class Shards:
    """The samples of one split, readable in any order and from any process.

    folder: a directory, or an address such as s3://bucket/shards; `cache` and `cache_gib` are for the latter, see `Store`.
    """

    def __init__(self, folder: str | Path, split: str, cache: str = "", cache_gib: float = 100.0):
        self.folder, self.split = str(folder), split
        self.store = Storage(self.folder, cache, cache_gib)
        dataset = read_dataset_json(self.store, self.folder)
        splits, self.features, self.corpus = (dataset[name] for name in ("splits", "features", "corpus"))
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}: it has {', '.join(splits)}")
        self.format = dataset["format"]
        if not splits[split]["clips"]:
            raise UserError(f"{folder}: {no_clip_left(split, dataset['left_out'])}: make the shards again with tools/make_shards.py")
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

    def color_warning(self) -> str:
        """One line for people where these shards were made with wrong colours, else ""."""
        is_drawn = self.corpus.get("name") == "synthetic"  # RGB without tags, which was always converted right
        if self.format >= RIGHT_COLORS_SINCE or is_drawn:
            return ""
        remedy = "flallm features, from a run on new shards" if self.features else "tools/make_shards.py"
        return f"{self.folder} was made by an earlier version that changed colours and contrast: make it again with {remedy}, and train anew"

    def _read_index(self) -> dict[str, np.ndarray]:
        name = f"{self.split}.index.safetensors"
        if self.store.local:
            return read_rows(Path(self.store.root, name))[0]
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            try:
                file.write(self.store.read(name))
            except OSError as error:
                raise UserError(f"{self.folder}/{name} cannot be read: {error}") from None
            file.flush()
            return read_rows(Path(file.name))[0]

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
            if not (self.store.evict(name, start, stop) and again):
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
