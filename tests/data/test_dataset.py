import gc
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import hostile_decoder
import numpy as np
import pytest
import torch

from flallm.config import Data
from flallm.data import dataset as loader
from flallm.data import worker_pool as workers
from flallm.data.corpora import synthetic
from flallm.data.dataset import Batch, ClipDataset
from flallm.data.encode import EncodeOptions
from flallm.data.sampler import BatchSampler, rank_batches
from flallm.data.shards import make_shards


class Letters:
    """A tokenizer that needs no time to load."""

    def encode(self, text: str) -> list[int]:
        return [*map(ord, text), 0]


@pytest.fixture
def clips(shards):
    def make(split: str = "train", **data) -> ClipDataset:
        return ClipDataset(
            split, Data(**{"shards": str(shards), "resize": 36, "crop": 32, **data}), 0
        )

    return make


def batches(clips: ClipDataset, groups: Iterable, workers: int) -> Iterator[Batch]:
    return loader.batches(clips, Letters(), groups, workers)


def groups(clips: ClipDataset, size: int = 4, epoch: int | None = 0) -> list:
    return [
        [(epoch, n) for n in range(first, min(first + size, len(clips.used)))]
        for first in range(0, len(clips.used), size)
    ]


def assert_equal(some, others):
    some, others = list(some), list(others)
    assert [b.keys for b in some] == [b.keys for b in others] and [b.texts for b in some] == [
        b.texts for b in others
    ]
    for a, b in zip(some, others):
        assert (
            torch.equal(a.frames, b.frames)
            and torch.equal(a.lengths, b.lengths)
            and torch.equal(a.labels, b.labels)
            and a.bad == b.bad
        )


def children() -> dict[int, tuple[int, str]]:
    """pid -> (parent, state) of every process."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        found[int(stat.parent.name)] = int(parent), state
    return found


def below(pid: int) -> set[int]:
    """The living processes that descend from a process."""
    found, every = {pid}, children()
    while (
        more := {p for p, (parent, state) in every.items() if parent in found and state != "Z"}
        - found
    ):
        found |= more
    return found - {pid}


def workers_of(pid: int) -> set[int]:
    """Its pool's processes: the children of its fork server."""
    return {p for p, (parent, _) in children().items() if parent in below(pid) and p in below(pid)}


def test_the_same_frames_for_any_number_of_workers_and_any_batch(clips):
    train = clips()
    alone, other = list(batches(train, groups(train), 0)), clips()
    for number in (1, 2):
        assert_equal(batches(other, groups(other), number), alone)
    whole = np.concatenate([b.frames for b in alone])
    backwards = list(batches(train, [[(0, n)] for n in reversed(range(len(train.used)))], 0))
    assert np.array_equal(whole, np.concatenate([b.frames for b in reversed(backwards)]))
    assert not np.array_equal(
        whole, np.concatenate([b.frames for b in batches(train, groups(train, epoch=1), 0)])
    )


def test_workers_read_clips_and_nothing_else(clips, shards, tmp_path):
    """No worker of a node holds the index, which takes 440 MB for ten million clips."""
    copied = clips(shards=str(shutil.copytree(shards, tmp_path / "shards")))
    for file in (
        tmp_path / "shards/dataset.json",
        *(tmp_path / "shards").glob("*.index.safetensors"),
    ):
        file.unlink()
    assert_equal(batches(copied, groups(copied), 2), batches(clips(), groups(clips()), 0))


def test_killed_workers_lose_nothing(clips):
    """Busy ones, idle ones and such as just begin: every clip still comes, in order and as ever."""
    train = clips(prefetch_mib=1)
    epochs = [group for epoch in range(6) for group in groups(train, 3, epoch)]
    came, rng, killed = [], random.Random(0), 0
    for number, batch in enumerate(batches(train, epochs, 2)):
        came.append(batch)
        if number % 3 == 0 and (alive := sorted(workers_of(os.getpid()))):
            time.sleep(rng.choice((0, 0.01, 0.3)))
            for pid in rng.sample(alive, rng.randint(1, len(alive))):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    assert killed > 5
    assert_equal(came, batches(train, epochs, 0))


def test_a_clip_that_crashes_or_hangs_its_worker_is_left_out_and_named(clips, monkeypatch):
    dev = clips("dev")
    whole = list(batches(dev, groups(dev, 1), 0))
    monkeypatch.setattr(loader, "decoding", hostile_decoder)
    monkeypatch.setattr(loader, "TIMEOUT", 1)
    came = list(batches(dev, groups(dev, 1), 2))
    bad = [(n, row) for n, batch in enumerate(came) for row in batch.bad]
    assert bad == [
        (
            hostile_decoder.CRASHES,
            {
                "key": "dev sample 1",
                "cause": "cannot be decoded: its worker process died (exit code -11)",
            },
        ),
        (
            hostile_decoder.HANGS,
            {"key": "dev sample 4", "cause": "cannot be decoded: not done after 1 s"},
        ),
    ]
    good = [
        n for n in range(len(whole)) if n not in (hostile_decoder.CRASHES, hostile_decoder.HANGS)
    ]
    assert_equal([came[n] for n in good], [whole[n] for n in good])


def memory_ahead() -> int:
    """Bytes of batches that this process holds files of."""
    total = 0
    for file in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(file).startswith("/memfd:flallm-batch"):
                total += file.stat().st_size
        except OSError:
            continue
    return total


def test_what_is_decoded_ahead_is_bounded_and_given_back(clips):
    train = clips(prefetch_mib=1, resize=256, crop=224)
    sizes = [
        int(train.used[[n for _, n in group]].sum()) * train.frame_bytes for group in groups(train)
    ]
    assert sum(sizes) > 10 * 2**20
    gc.collect()
    held, before, came = [], memory_ahead(), []
    for batch in batches(train, groups(train), 1):
        held.append(memory_ahead() - before)
        came += batch.keys
    assert came == [train.shards.read(n)[1]["key"] for n in range(len(train.used))]
    assert max(held) <= max(2**20, max(sizes))
    del batch
    assert memory_ahead() == before
    roomy = clips(prefetch_mib=64)  # at this size all batches fit, but each is an open file
    iterator = batches(roomy, groups(roomy) * 50, 0)
    files = len(os.listdir("/proc/self/fd"))
    next(iterator)
    assert (
        memory_ahead() > before and len(os.listdir("/proc/self/fd")) <= files + loader.MAX_PREFETCH
    )
    iterator.close()
    assert memory_ahead() == before


def test_as_much_is_decoded_ahead_later_on_as_at_the_beginning(clips):
    train, before = clips(prefetch_mib=1), memory_ahead()  # at this size several batches fit
    held = [memory_ahead() - before for _ in batches(train, groups(train) * 4, 0)]
    assert 2**19 < min(held[:12]) <= max(held) <= 2**20


def rank_keys(rank: int, clips: ClipDataset, plan: BatchSampler, out) -> None:
    steps = plan.steps(0)
    found = batches(clips, rank_batches(plan, rank, steps, 2 * steps), 1)  # of the second epoch
    out.put((rank, [batch.keys for batch in found]))


def test_four_ranks_see_disjoint_clips_and_together_all(clips):
    train, context = clips(), multiprocessing.get_context("spawn")
    plan = BatchSampler(train.used, train.shards.index["text_length"], 10, 1, 4, 0)
    out = context.Queue()
    ranks = [context.Process(target=rank_keys, args=(rank, train, plan, out)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    seen = dict(out.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    assert {len(keys) for keys in seen.values()} == {plan.steps(1)} and all(
        batch for keys in seen.values() for batch in keys
    )
    every = [key for keys in seen.values() for batch in keys for key in batch]
    assert sorted(every) == sorted(train.shards.read(n)[1]["key"] for n in range(len(train.used)))


def endless_loader(clips: ClipDataset, out) -> None:
    loader.decoding, loader.TIMEOUT = hostile_decoder, 5
    for _ in batches(
        clips, ([(epoch, n)] for epoch in range(10**6) for n in (0, 2, 3, hostile_decoder.HANGS)), 2
    ):
        out.put(True)


def test_no_process_outlives_the_loader(clips):
    dev = clips("dev")
    before = workers_of(os.getpid())
    iterator = batches(dev, groups(dev, 1), 2)
    next(iterator)
    assert workers_of(os.getpid()) - before
    iterator.close()
    assert not workers_of(os.getpid()) - before


def test_no_process_outlives_a_killed_trainer(clips):
    """Not even one that hangs in a codec."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    run = context.Process(target=endless_loader, args=(clips("dev", prefetch_mib=1), out))
    run.start()
    for _ in range(3):
        assert out.get(timeout=120)
    processes = below(run.pid)
    assert len(workers_of(run.pid)) == 2
    run.kill()
    run.join()
    deadline = time.monotonic() + 60
    while left := {p for p in processes if p in (now := children()) and now[p][1] != "Z"}:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.1)


def test_every_clip_epoch_and_seed_has_an_augmentation_of_its_own(tmp_path):
    (clip,) = synthetic.clips(train=1, dev=0, test=0, size=36)
    make_shards(
        [replace(clip, key=key) for key in "abcd"],
        tmp_path,
        EncodeOptions(),
        {"name": "the same clip"},
        1,
    )
    seen = set()
    for seed in (0, 1):
        same = ClipDataset("train", Data(shards=str(tmp_path), resize=36, crop=32), seed)
        seen |= {
            batch.frames.numpy().tobytes()
            for epoch in (0, 1)
            for batch in batches(same, groups(same, 1, epoch), 0)
        }
    assert len(seen) == 4 * 2 * 2


def test_workers_that_die_as_soon_as_they_are_started_are_an_error_and_no_end_of_lost_clips(
    monkeypatch,
):
    monkeypatch.setattr(workers, "MAX_RESTARTS", 4)
    with (
        workers.WorkerPool(1, "flallm.data.decoding", os._exit, (1,)) as pool,
        pytest.raises(RuntimeError, match="die as soon as they are started"),
    ):
        for _ in range(4):
            with suppress(workers.TaskFailed):
                pool.submit(int, timeout=9)()
