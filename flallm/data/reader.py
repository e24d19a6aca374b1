"""Reads samples of shards, in any order and from any process."""

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

# Earlier formats took full-range and BT.709 sources for limited range and BT.601.
RIGHT_COLORS_SINCE = 3
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
MAX_REQUESTS = 32  # at a time
MAX_SAMPLE_BYTES = 2**30  # an index with a larger sample is altered
REMAKE = "make the shards again with tools/make_shards.py"


class NoShards(UserError):
    """A folder without finished shards."""


class BadSample(Exception):
    """A sample that cannot be used; the message is the cause."""


def checksum(video: bytes, meta: bytes) -> int:
    """The checksum of a sample: 64 bits of BLAKE2b over its two files."""
    digest = hashlib.blake2b(video, digest_size=8)
    digest.update(meta)
    return int.from_bytes(digest.digest(), "little")


def read_rows(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(columns, notes) of an index. Raises UserError for a file that is none."""
    remake = "make them again with tools/make_shards.py"
    try:
        with safe_open(path, "np") as file:
            rows = {name: file.get_tensor(name) for name in COLUMNS}
            notes = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no index of shards ({error}): {remake}") from None
    shape = rows["shard"].shape
    for name, dtype in COLUMNS.items():
        if rows[name].dtype != dtype or rows[name].shape != shape or len(shape) != 1:
            raise UserError(f"{path} is no index of shards: its columns do not fit: {remake}")
    return rows, notes


def splits_of(folder: str | Path) -> list[str]:
    """The splits that a folder of shards has."""
    return list(read_dataset_json(Storage(str(folder)), str(folder))["splits"])


def read_dataset_json(store: Storage, folder: str) -> dict:
    """The content of `dataset.json`. These fields are checked, and filled in where they may lack:

    format: int, 1 in the oldest shards.
    splits: {split: {"clips", "frames", "shard_bytes"}}, at least one.
    features: what made them, {} where the shards hold videos.
    corpus: the name of the data set and its arguments.
    left_out: [{"split", "cause", ...}].

    Raises NoShards without a `dataset.json`, and UserError for one that is altered.
    """
    try:
        dataset = json.loads(store.read("dataset.json"))
        _check_dataset(dataset)
        return dataset
    except FileNotFoundError:
        raise NoShards(
            f"{folder} holds no finished shards (no dataset.json): make them with "
            "tools/make_shards.py"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}/dataset.json cannot be read ({error}): {REMAKE}") from None


def _check_dataset(dataset: dict) -> None:
    """Raises one of the errors of altered JSON, whose message is the cause."""
    splits = dataset["splits"]
    features = dataset.setdefault("features", {})
    if not isinstance(dataset.setdefault("corpus", {}), dict):
        raise ValueError("its corpus is no JSON object")
    if not isinstance(dataset.setdefault("format", 1), int):
        raise ValueError("its format is no number")
    if features:
        for name, least in {"channels": 1, "copies": 0, "stride": 1, "max_frames": 1}.items():
            if not isinstance(features[name], int) or features[name] < least:
                raise ValueError("its features are none")
        if features["dtype"] not in ("bf16", "fp16", "fp32"):
            raise ValueError("its features are none")
    for split in splits.values():
        for count in (split["clips"], *split["shard_bytes"]):
            if not isinstance(count, int):
                raise ValueError("a count is no number")
    for row in dataset.setdefault("left_out", []):
        if not isinstance(row["split"], str) or not isinstance(row["cause"], str):
            raise ValueError("a row that is left out has no cause")
    if not splits:
        raise ValueError("it has no split")


def _frame_rate(dataset: dict) -> float:
    """The frame rate that all clips were brought to; 0 where each has its own."""
    options = dataset.get("options")
    fps = options.get("fps") if isinstance(options, dict) else None
    return float(fps) if isinstance(fps, int | float) and 0 < fps < 1000 else 0.0


class Shards:
    """The samples of one split, readable in any order and from any process.

    folder: a directory, or an address such as s3://bucket/shards. `cache` and `cache_gib` are for
    an address, see `Storage`.

    Raises UserError for shards that are missing or altered.
    """

    def __init__(self, folder: str | Path, split: str, cache: str = "", cache_gib: float = 100.0):
        self.folder, self.split = str(folder), split
        self.store = Storage(self.folder, cache, cache_gib)
        dataset = read_dataset_json(self.store, self.folder)
        splits = dataset["splits"]
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}: it has {', '.join(splits)}")
        num_clips = splits[split]["clips"]
        if not num_clips:
            cause = no_clip_left(split, dataset["left_out"])
            raise UserError(f"{folder}: {cause}: {REMAKE}")
        self.format, self.corpus = dataset["format"], dataset["corpus"]
        self.features = dataset["features"]
        self.fps = _frame_rate(dataset)
        self.shard_bytes = splits[split]["shard_bytes"]
        self.index = self._read_index()
        if len(self) != num_clips:
            raise UserError(
                f"{folder}/{split}.index.safetensors has {len(self)} samples, dataset.json says "
                f"{num_clips}: make the shards again"
            )
        self._check_index()
        if self.store.local:
            self._check_files()

    def _check_index(self) -> None:
        shards = self.index["shard"]
        is_good = (shards >= 0) & (shards < len(self.shard_bytes))
        is_good &= (self.index["frames"] > 0) & (self.index["text_length"] >= 0)
        if not is_good.all():
            raise UserError(
                f"{self.folder}/{self.split}.index.safetensors says the impossible: it is altered: "
                f"{REMAKE}"
            )

    def _check_files(self) -> None:
        for number, size in enumerate(self.shard_bytes):
            path = Path(self.store.root, self._shard(number))
            remake = "make it again with tools/make_shards.py"
            if not path.is_file():
                raise UserError(f"{path} is missing: {remake}")
            if path.stat().st_size != size:
                raise UserError(f"{path} is cut short or altered: {remake}")

    def color_warning(self) -> str:
        """A warning where an earlier version made these shards with wrong colours, else ""."""
        # The synthetic corpus is RGB without tags, which was always converted right.
        if self.format >= RIGHT_COLORS_SINCE or self.corpus.get("name") == "synthetic":
            return ""
        remedy = "tools/make_shards.py"
        if self.features:
            remedy = "flallm features, from a run on new shards"
        return (
            f"{self.folder} was made by an earlier version that changed colours and contrast: "
            f"make it again with {remedy}, and train anew"
        )

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
        """A copy for a worker, which gets the rows to read one by one.

        The index of ten million clips takes 440 MB.
        """
        other = copy(self)
        other.index = {}
        return other

    def row(self, i: int) -> dict[str, int]:
        """The row of the index for sample i."""
        return {name: int(column[i]) for name, column in self.index.items()}

    def read(self, i: int, row: dict[str, int] | None = None) -> tuple[bytes, dict]:
        """(content, JSON) of sample i; content is mp4, or npy where the shards hold features.

        row: its row of the index, needed `without_index`. Raises BadSample where the shard is
        missing, cut short or altered.
        """
        row = row or self.row(i)
        shard = f"{self.folder}/{self._shard(row['shard'])}"
        start, stop = row["json_offset"], row["video_offset"] + row["video_size"]
        json_end = start + row["json_size"]
        is_possible = 0 <= start <= json_end <= row["video_offset"] <= stop
        if not is_possible or stop > start + MAX_SAMPLE_BYTES:
            raise BadSample(f"{shard}: the index says the impossible of sample {i}: it is altered")
        content, meta_json = self._read_checked(i, row, start, stop)
        try:
            meta = json.loads(meta_json)
            for field, kind in (("key", str), ("text", str), ("num_frames", int)):
                if not isinstance(meta[field], kind):
                    raise ValueError("a field has a wrong type")
            (meta["key"] + meta["text"]).encode()  # raises for half a character
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            cause = f"the JSON of sample {i} is invalid: {error}"
            raise BadSample(f"{shard}: {cause}") from None
        if meta["num_frames"] != row["frames"]:
            raise BadSample(
                f"{shard}: sample {i} has {meta['num_frames']} frames by its JSON, {row['frames']} "
                "by the index"
            )
        return content, meta

    def _read_checked(
        self, i: int, row: dict[str, int], start: int, stop: int
    ) -> tuple[bytes, bytes]:
        """(content, JSON) of sample i as bytes that fit the checksum. start, stop: its range."""
        name = self._shard(row["shard"])
        # A second try, because the cache may be altered where the shard is not.
        for attempt in (1, 2):
            try:
                both = self.store.read(name, start, stop)
            except OSError as error:
                cause = error.strerror or error
                raise BadSample(f"{self.folder}/{name}: {cause}") from None
            meta_json, content = both[: row["json_size"]], both[row["video_offset"] - start :]
            if checksum(content, meta_json) == row["checksum"]:
                return content, meta_json
            was_cached = self.store.evict(name, start, stop)
            if not was_cached or attempt == 2:
                break
        raise BadSample(
            f"{self.folder}/{name}: sample {i} is not what the index says: the shard is cut short "
            "or altered"
        )

    def meta(self, i: int) -> dict:
        """The JSON of sample i, unchecked, or {} where it cannot be read. Reads no video."""
        start = int(self.index["json_offset"][i])
        stop = start + int(self.index["json_size"][i])
        try:
            meta = json.loads(
                self.store.read(self._shard(int(self.index["shard"][i])), start, stop)
            )
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(meta, dict):
            return {}
        has_texts = isinstance(meta.get("key"), str) and isinstance(meta.get("text"), str)
        return meta if has_texts else {}

    def metas(self, numbers: Iterable[int] | None = None) -> Iterator[dict]:
        """`meta` of these samples (default: all), in order. An address is asked in parallel."""
        numbers = range(len(self)) if numbers is None else numbers
        if self.store.local:
            yield from map(self.meta, numbers)
            return
        with ThreadPoolExecutor(MAX_REQUESTS) as threads:
            yield from threads.map(self.meta, numbers)
