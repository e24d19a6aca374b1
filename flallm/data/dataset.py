"""`Batch`es of clips, decoded by worker processes ahead of the trainer.

A worker decodes a clip straight into the shared memory of its batch, so decoded frames are neither
copied nor pickled. The bytes decoded ahead are bounded. A clip that crashes or hangs its worker is
left out and named. A clip whose worker was killed from outside is decoded again.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from flallm.config import Data
from flallm.data import decoding
from flallm.data.decoding import DecodeOptions, LoadedClip
from flallm.data.reader import Shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.data.transforms import used_frames
from flallm.data.worker_pool import TaskFailed, WorkerPool
from flallm.utils import UserError

IGNORE_INDEX = -100  # a label that is no token
TIMEOUT = 60  # seconds a worker may take for one clip
MAX_PREFETCH = 64  # batches. Each is an open file, and many machines allow 1,024 a process.

Group = list[tuple[int | None, int]]  # (epoch, clip number); without an epoch, no augmentation


@dataclass
class Batch:
    """Clips one after another, with no padding of frames.

    frames: (F, H, W, 3) uint8, or (F, C) features; F is the sum of `lengths`.
    lengths: (B,) frames of each clip.
    labels: (B, L) token ids, IGNORE_INDEX after the end of a text.
    keys, texts: B of each.
    bad: the clips left out, {"key", "cause"} each.

    Where no clip of a batch can be read, it holds a placeholder without a text and with the key "",
    so that this rank takes part in the step.
    """

    frames: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    texts: list[str]
    bad: list[dict]

    @property
    def is_placeholder(self) -> bool:
        """Whether no clip of it could be read."""
        return self.keys == [""]

    def to(self, device: torch.device) -> Batch:
        return replace(self, frames=self.frames.to(device), labels=self.labels.to(device))

    @property
    def tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


class ClipDataset:
    """The clips of a split as a model sees them.

    used: (clips,) used frames of each clip.
    features: the model that made them, where the shards hold features; {} where they hold videos.
    shape, dtype: of one used frame.
    """

    def __init__(self, split: str, data: Data, seed: int):
        self.data = data
        self.shards = Shards(data.shards, split, data.cache, data.cache_gib)
        if data.fps not in (0, self.shards.fps):
            raise UserError(
                f"data.fps: {data.shards} has {self.shards.fps:g}, not {data.fps:g}: the frame "
                f"rate is chosen when shards are made, make_shards.py --fps={data.fps:g}"
            )
        self.used = used_frames(self.shards.index["frames"], data.stride, data.max_frames)
        self.features = self.shards.features
        self.shape, self.dtype = decoding.frame_format(self.shards, data.crop)
        self.frame_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.options = DecodeOptions(
            data.resize, data.crop, data.stride, data.max_frames, data.augment, seed
        )

    def batch(self, tokenizer: TranslationTokenizer, group: Group) -> Batch:
        """One batch, decoded in this process."""
        return next(batches(self, tokenizer, [group], 0))


def batches(
    clips: ClipDataset, tokenizer: TranslationTokenizer, groups: Iterable[Group], workers: int
) -> Iterator[Batch]:
    """A batch for each group of clips, in order.

    `workers` processes decode ahead. With 0, a batch is decoded in this process when it is due.
    """
    pool_context = nullcontext()
    if workers:
        arguments = (clips.shards.without_index(), clips.options)
        pool_context = WorkerPool(workers, "flallm.data.decoding", decoding.init_worker, arguments)
    pending: deque[PendingBatch] = deque()
    pending_bytes, limit = 0, clips.data.prefetch_mib * 2**20
    with pool_context as pool:
        try:
            for group in groups:
                num_bytes = int(clips.used[[n for _, n in group]].sum()) * clips.frame_bytes
                while pending and (
                    pending_bytes + num_bytes > limit or len(pending) == MAX_PREFETCH
                ):
                    pending_bytes -= pending[0].num_bytes
                    yield pending.popleft().batch(tokenizer)
                pending.append(PendingBatch(clips, group, pool))
                pending_bytes += num_bytes
            while pending:
                yield pending.popleft().batch(tokenizer)
        finally:
            for unwanted in pending:
                os.close(unwanted.file)


class PendingBatch:
    """A batch under way: its shared memory and the tasks of its clips."""

    def __init__(self, clips: ClipDataset, group: Group, pool: WorkerPool | None):
        self.clips, self.group = clips, group
        self.lengths = clips.used[[n for _, n in group]]
        self.firsts = np.cumsum(self.lengths) - self.lengths  # where each clip begins, in frames
        self.num_bytes = int(self.lengths.sum()) * clips.frame_bytes
        # A file without a name: it ends with the last process that has it open.
        self.file = os.memfd_create("flallm-batch")
        os.ftruncate(self.file, self.num_bytes)
        self.results: list[Callable[[], LoadedClip]] = []  # empty without a pool
        if pool:
            self.results = [self._submit(pool, i) for i in range(len(group))]

    def _submit(self, pool: WorkerPool, i: int) -> Callable[[], LoadedClip]:
        epoch, number = self.group[i]
        return pool.submit(
            decoding.load_shared,
            number,
            self.clips.shards.row(number),
            epoch,
            f"/proc/{os.getpid()}/fd/{self.file}",
            int(self.firsts[i]),
            int(self.lengths[i]),
            timeout=TIMEOUT,
        )

    def _load(self, i: int, frames: np.ndarray) -> LoadedClip:
        """Clip i of the group. frames: (used frames, ...) its part of the shared memory."""
        epoch, number = self.group[i]
        shards = self.clips.shards
        if not self.results:
            return decoding.load(
                shards, self.clips.options, number, shards.row(number), epoch, frames
            )
        try:
            return self.results[i]()
        except TaskFailed as cause:
            key = f"{shards.split} sample {number}"
            return LoadedClip(key, "", f"cannot be decoded: {cause}")

    def batch(self, tokenizer: TranslationTokenizer) -> Batch:
        """Waits for the clips and collects those that can be read."""
        memory = mmap.mmap(self.file, self.num_bytes)  # lives as long as a tensor of it
        frames = np.frombuffer(memory, self.clips.dtype).reshape(-1, *self.clips.shape)
        clip_frames = np.split(frames, self.firsts[1:])
        good, keys, texts, labels, bad = [], [], [], [], []
        for i in range(len(self.group)):
            clip = self._load(i, clip_frames[i])
            cause = clip.cause
            if not cause:
                try:
                    ids = tokenizer.encode(clip.text)
                except ValueError as error:
                    cause = str(error)
            if cause:
                bad.append({"key": clip.key, "cause": cause})
                continue
            good.append(i)
            keys.append(clip.key)
            texts.append(clip.text)
            labels.append(torch.tensor(ids))
        os.close(self.file)
        if not good:
            return self._placeholder(bad)
        if bad:
            frames = np.concatenate([clip_frames[i] for i in good])
        return Batch(
            _as_tensor(frames),
            torch.from_numpy(self.lengths[good]).long(),
            pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            keys,
            texts,
            bad,
        )

    def _placeholder(self, bad: list[dict]) -> Batch:
        """Two black frames without a label, for a batch of which no clip can be read."""
        frames = np.zeros((2, *self.clips.shape), self.clips.dtype)
        labels = torch.tensor([[IGNORE_INDEX]])
        return Batch(_as_tensor(frames), torch.tensor([2]), labels, [""], [""], bad)


def _as_tensor(frames: np.ndarray) -> torch.Tensor:
    """The frames as a tensor that shares their memory. uint16 holds the bits of bf16."""
    tensor = torch.from_numpy(frames)
    return tensor.view(torch.bfloat16) if frames.dtype == np.uint16 else tensor
