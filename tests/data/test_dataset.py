import gc
import itertools
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
from flallm.data import worker_pool
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
    """All clips of one epoch in batches of `size`."""
    numbers = range(len(clips.used))
    return [
        [(epoch, number) for number in numbers[first : first + size]] for first in numbers[::size]
    ]


def keys_of(clips: ClipDataset) -> list[str]:
    return [clips.shards.read(n)[1]["key"] for n in range(len(clips.used))]


def assert_equal(batches: Iterable[Batch], expected: Iterable[Batch]):
    batches, expected = list(batches), list(expected)
    assert [batch.keys for batch in batches] == [batch.keys for batch in expected]
    assert [batch.texts for batch in batches] == [batch.texts for batch in expected]
    for a, b in zip(batches, expected):
        assert torch.equal(a.frames, b.frames)
        assert torch.equal(a.lengths, b.lengths)
        assert torch.equal(a.labels, b.labels)
        assert a.bad == b.bad


def frames_of(batches: Iterable[Batch]) -> np.ndarray:
    return np.concatenate([batch.frames for batch in batches])


def parents() -> dict[int, int]:
    """{pid: the pid of its parent} of every living process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(stat.parent.name)] = int(parent)
    return parents


def descendants(pid: int) -> set[int]:
    """The living processes that descend from a process."""
    parent_of = parents()
    tree, size = {pid}, 0
    while len(tree) > size:
        size = len(tree)
        tree |= {child for child, parent in parent_of.items() if parent in tree}
    return tree - {pid}


def workers_of(pid: int) -> set[int]:
    """The processes of its pool: the children of its fork server."""
    tree, parent_of = descendants(pid), parents()
    return {child for child in tree if parent_of.get(child) in tree}


def test_frames_are_the_same_for_any_number_of_workers_and_any_batch(clips):
    train = clips()
    expected = list(batches(train, groups(train), 0))
    reopened = clips()
    for workers in (1, 2):
        assert_equal(batches(reopened, groups(reopened), workers), expected)
    backwards = [[(0, number)] for number in reversed(range(len(train.used)))]
    reversed_batches = list(batches(train, backwards, 0))
    assert np.array_equal(frames_of(expected), frames_of(reversed(reversed_batches)))
    next_epoch = batches(train, groups(train, epoch=1), 0)
    assert not np.array_equal(frames_of(expected), frames_of(next_epoch))


def test_workers_read_clips_and_nothing_else(clips, shards, tmp_path):
    """No worker of a node holds the index, which takes 440 MB for ten million clips."""
    copied = clips(shards=str(shutil.copytree(shards, tmp_path / "shards")))
    (tmp_path / "shards/dataset.json").unlink()
    for file in (tmp_path / "shards").glob("*.index.safetensors"):
        file.unlink()
    assert_equal(batches(copied, groups(copied), 2), batches(clips(), groups(clips()), 0))


def test_killed_workers_lose_nothing(clips):
    """Busy, idle and starting workers are killed, and every clip still comes in order."""
    train = clips(prefetch_mib=1)
    epochs = []
    for epoch in range(6):
        epochs += groups(train, 3, epoch)
    decoded, rng, killed = [], random.Random(0), 0
    for number, batch in enumerate(batches(train, epochs, 2)):
        decoded.append(batch)
        workers = sorted(workers_of(os.getpid()))
        if number % 3 or not workers:
            continue
        time.sleep(rng.choice((0, 0.01, 0.3)))
        for pid in rng.sample(workers, rng.randint(1, len(workers))):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    assert killed > 5
    assert_equal(decoded, batches(train, epochs, 0))


def test_a_clip_that_crashes_or_hangs_its_worker_is_left_out_and_named(clips, monkeypatch):
    dev = clips("dev")
    expected = list(batches(dev, groups(dev, 1), 0))
    monkeypatch.setattr(loader, "decoding", hostile_decoder)
    monkeypatch.setattr(loader, "TIMEOUT", 1)
    decoded = list(batches(dev, groups(dev, 1), 2))
    hostile = (hostile_decoder.CRASHES, hostile_decoder.HANGS)
    assert decoded[hostile_decoder.CRASHES].bad == [
        {
            "key": "dev sample 1",
            "cause": "cannot be decoded: its worker process died (exit code -11)",
        }
    ]
    assert decoded[hostile_decoder.HANGS].bad == [
        {"key": "dev sample 4", "cause": "cannot be decoded: not done after 1 s"}
    ]
    good = [number for number in range(len(expected)) if number not in hostile]
    assert not any(decoded[number].bad for number in good)
    assert_equal([decoded[number] for number in good], [expected[number] for number in good])


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
    sizes = []
    for group in groups(train):
        num_frames = int(train.used[[number for _, number in group]].sum())
        sizes.append(num_frames * train.frame_bytes)
    assert sum(sizes) > 10 * 2**20
    gc.collect()
    held, before, keys = [], memory_ahead(), []
    for batch in batches(train, groups(train), 1):
        held.append(memory_ahead() - before)
        keys += batch.keys
    assert keys == keys_of(train)
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


def rank_keys(rank: int, clips: ClipDataset, sampler: BatchSampler, out) -> None:
    """Puts the keys of every batch of a rank in the second epoch."""
    steps = sampler.steps(0)
    decoded = batches(clips, rank_batches(sampler, rank, steps, 2 * steps), 1)
    out.put((rank, [batch.keys for batch in decoded]))


def test_four_ranks_see_disjoint_clips_and_together_all(clips):
    train, context = clips(), multiprocessing.get_context("spawn")
    sampler = BatchSampler(train.used, train.shards.index["text_length"], 10, 1, 4, 0)
    out = context.Queue()
    arguments = [(rank, train, sampler, out) for rank in range(4)]
    ranks = [context.Process(target=rank_keys, args=args) for args in arguments]
    for rank in ranks:
        rank.start()
    batches_of_rank = dict(out.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join()
    all_keys = []
    for keys_of_batches in batches_of_rank.values():
        assert len(keys_of_batches) == sampler.steps(1)
        for keys in keys_of_batches:
            assert keys
            all_keys += keys
    assert sorted(all_keys) == sorted(keys_of(train))


def endless_loader(clips: ClipDataset, out) -> None:
    loader.decoding, loader.TIMEOUT = hostile_decoder, 5
    numbers = itertools.cycle((0, 2, 3, hostile_decoder.HANGS))
    for _ in batches(clips, ([(0, number)] for number in numbers), 2):
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
    processes = descendants(run.pid)
    assert len(workers_of(run.pid)) == 2
    run.kill()
    run.join()
    deadline = time.monotonic() + 60
    while processes & parents().keys():
        assert time.monotonic() < deadline, f"{processes & parents().keys()} are alive"
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
        for epoch in (0, 1):
            decoded = batches(same, groups(same, 1, epoch), 0)
            seen |= {batch.frames.numpy().tobytes() for batch in decoded}
    assert len(seen) == 4 * 2 * 2


def test_workers_that_die_at_their_start_are_an_error(
    monkeypatch,
):
    monkeypatch.setattr(worker_pool, "MAX_RESTARTS", 4)
    with (
        worker_pool.WorkerPool(1, "flallm.data.decoding", os._exit, (1,)) as pool,
        pytest.raises(RuntimeError, match="die as soon as they are started"),
    ):
        for _ in range(4):
            with suppress(worker_pool.TaskFailed):
                pool.submit(int, timeout=9)()
