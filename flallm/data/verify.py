"""Reads every sample of a folder of shards back: checksums, every frame or feature, keys, and that the tars hold what the index says and no more."""

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
    """A line for everything that is wrong in these splits. Raises UserError for a split that cannot be opened, before any is read."""
    opened = {split: Shards(folder, split) for split in splits}
    for split, shards in opened.items():
        keys: Counter[str] = Counter()
        numbers = [np.flatnonzero(shards.index["shard"] == n) for n in range(len(shards.shard_bytes))]
        with WorkerPool(processes, "flallm.data.verify") as workers, progress(len(shards), "clip", split) as bar:
            results = [workers.submit(_verify_shard, folder, split, n, rows.tolist(), timeout=TIMEOUT + len(rows)) for n, rows in enumerate(numbers)]
            for n, (result, rows) in enumerate(zip(results, numbers)):
                try:
                    found, problems = result()
                    keys.update(found)
                    yield from problems
                except TaskFailed as cause:
                    yield f"{split}-{n:06d}.tar: cannot be read back: {cause}"
                bar.update(len(rows))
        yield from (f"{split}: {count} samples have the key {key!r}" for key, count in keys.items() if count > 1)


def _verify_shard(folder: str, split: str, number: int, rows: list[int]) -> tuple[list[str], list[str]]:
    """(keys, problems) of one shard."""
    shards, name = Shards(folder, split), f"{split}-{number:06d}.tar"
    keys, problems = [], []
    for i in rows:
        try:
            content, meta = shards.read(i)
            keys.append(meta["key"])
            if shards.features:
                made = shards.features
                used = int(used_frames(np.array([meta["num_frames"]]), made["stride"], made["max_frames"])[0])
                features(content, (used, made["channels"]), DTYPES[made["dtype"]], made["copies"])
                continue
            with open_video(content) as container:
                frames = sum(1 for _ in container.decode(video_stream(container)))
            if frames != meta["num_frames"]:
                problems.append(f"{name}: {meta['key']} has {frames} frames, {meta['num_frames']} by its JSON")
        except (BadSample, *DECODE_ERRORS) as error:
            problems.append(f"{name}: sample {i}: {error}")
    wanted = [f"{key}.{extension}" for key in keys for extension in ("json", "npy" if shards.features else "mp4")]
    try:
        with shards.store.open(name) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            members = [(member.name, member.isreg()) for member in tar]
    except (tarfile.TarError, OSError, ValueError) as error:
        return keys, [*problems, f"{name}: no readable tar: {error}"]
    if len(keys) == len(rows) and members != [(file, True) for file in wanted]:
        strange = next((m for m, (file, regular) in enumerate(members) if m >= len(wanted) or file != wanted[m] or not regular), len(members))
        problems.append(f"{name}: member {strange} is not the file the index says: the tar was changed")
    return keys, problems
