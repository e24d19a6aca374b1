"""Reads every sample of shards back and checks that they hold what the index says and no more.

It checks checksums, keys, every frame or feature, and the members of the tars.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator

import numpy as np

from flallm.data.decoding import DTYPES, features
from flallm.data.encode import TIMEOUT
from flallm.data.reader import BadSample, Shards
from flallm.data.transforms import used_frames
from flallm.data.video import DECODE_ERRORS, open_video, video_stream
from flallm.data.worker_pool import TaskFailed, WorkerPool
from flallm.utils import progress


def verify(folder: str, splits: list[str], processes: int) -> Iterator[str]:
    """A line for each problem of these splits.

    Raises UserError for a split that cannot be opened, before any is read.
    """
    opened = [Shards(folder, split) for split in splits]
    for shards in opened:
        yield from _verify_split(folder, shards, processes)


def _verify_split(folder: str, shards: Shards, processes: int) -> Iterator[str]:
    split = shards.split
    key_counts: Counter[str] = Counter()
    shard_of_sample = shards.index["shard"]
    samples = [np.flatnonzero(shard_of_sample == n) for n in range(len(shards.shard_bytes))]
    with (
        WorkerPool(processes, "flallm.data.verify") as workers,
        progress(len(shards), "clip", split) as bar,
    ):
        results = []
        for n, numbers in enumerate(samples):
            arguments = (folder, split, n, numbers.tolist())
            timeout = TIMEOUT + len(numbers)
            results.append(workers.submit(_verify_shard, *arguments, timeout=timeout))
        for n, result in enumerate(results):
            try:
                keys, problems = result()
                key_counts.update(keys)
                yield from problems
            except TaskFailed as cause:
                yield f"{split}-{n:06d}.tar: cannot be read back: {cause}"
            bar.update(len(samples[n]))
    for key, count in key_counts.items():
        if count > 1:
            yield f"{split}: {count} samples have the key {key!r}"


def _verify_shard(
    folder: str, split: str, number: int, samples: list[int]
) -> tuple[list[str], list[str]]:
    """(keys, problems) of one shard. samples: the numbers of its samples in the split."""
    shards, name = Shards(folder, split), f"{split}-{number:06d}.tar"
    keys, problems = [], []
    for i in samples:
        try:
            content, meta = shards.read(i)
            keys.append(meta["key"])
            problem = _verify_content(shards, content, meta)
            if problem:
                problems.append(f"{name}: {problem}")
        except (BadSample, *DECODE_ERRORS) as error:
            problems.append(f"{name}: sample {i}: {error}")
    try:
        with shards.store.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = [(member.name, member.isreg()) for member in tar]
    except (tarfile.TarError, OSError, ValueError) as error:
        return keys, [*problems, f"{name}: no readable tar: {error}"]
    if len(keys) < len(samples):  # without all keys, the names of the members are unknown
        return keys, problems
    expected = []
    for key in keys:
        expected += [(f"{key}.json", True), (f"{key}.{'npy' if shards.features else 'mp4'}", True)]
    if members != expected:
        number = _first_difference(members, expected)
        problems.append(
            f"{name}: member {number} is not the file the index says: the tar was changed"
        )
    return keys, problems


def _verify_content(shards: Shards, content: bytes, meta: dict) -> str:
    """The problem of a sample's content, or "". Raises errors of decoding, too."""
    if shards.features:
        made_by = shards.features
        num_frames = np.array([meta["num_frames"]])
        used = int(used_frames(num_frames, made_by["stride"], made_by["max_frames"])[0])
        shape = (used, made_by["channels"])
        features(content, shape, DTYPES[made_by["dtype"]], made_by["copies"])
        return ""
    with open_video(content) as container:
        frames = sum(1 for _ in container.decode(video_stream(container)))
    if frames != meta["num_frames"]:
        return f"{meta['key']} has {frames} frames, {meta['num_frames']} by its JSON"
    return ""


def _first_difference(members: list, expected: list) -> int:
    for number, pair in enumerate(zip(members, expected)):
        if pair[0] != pair[1]:
            return number
    return min(len(members), len(expected))
