"""plan + shards + video + text -> `Batch`es, decoded by worker processes ahead of the trainer.

A worker decodes a clip straight into the shared memory of its batch, so frames are copied no more once they are decoded, and
go through no pickle. How much is decoded ahead is bounded in bytes. A clip that crashes its worker or hangs it is left out
and named, and another worker takes the place; one that was killed from outside is decoded again.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from flallm.config import Data
from flallm.data import decoding as decoder
from flallm.data.reader import Shards
from flallm.data.tokenizer import TranslationTokenizer
from flallm.data.transforms import used_frames
from flallm.data.worker_pool import TaskFailed, WorkerPool
from flallm.utils import UserError

IGNORE_INDEX = -100  # a label that is no token
TIMEOUT = 60  # seconds a worker may take for one clip
MAX_PREFETCH = 64  # batches, each with an open file of which a process may have 1,024 on many machines

Group = list[tuple[int | None, int]]  # (epoch, clip number); without an epoch a clip is not augmented


@dataclass
class Batch:
    """Clips without any padding of frames.

    frames: (F, H, W, 3) uint8, or (F, C) features in their place, those of all clips one after another; lengths: (B,) frames of each clip.
    labels: (B, L) token ids, `IGNORE` after the end of a text. bad: samples left out, {"key", "cause"}. Where all of a batch are, a stand-in
    without a text and with "" for its key takes their place, so that this rank has something to do.
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
        return Batch(self.frames.to(device), self.lengths, self.labels.to(device), self.keys, self.texts, self.bad)

    @property
    def tokens(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


class ClipDataset:
    """The clips of a split as a model sees them."""

    def __init__(self, split: str, data: Data, seed: int):
        self.shards, self.data = Shards(data.shards, split, data.cache, data.cache_gib), data
        if data.fps not in (0, self.shards.fps):
            raise UserError(
                f"data.fps: {data.shards} has {self.shards.fps:g}, not {data.fps:g}: the frame rate is "
                f"chosen when shards are made, make_shards.py --fps={data.fps:g}"
            )
        self.used = used_frames(self.shards.index["frames"], data.stride, data.max_frames)  # frames of each clip
        self.features = self.shards.features  # what made them, where the shards hold features; {}: they hold videos
        self.shape, self.dtype = decoder.kind(self.shards, data.crop)
        self.frame_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self.options = (data.resize, data.crop, data.stride, data.max_frames, data.augment, seed)

    def batch(self, text: TranslationTokenizer, group: Group) -> Batch:
        """One batch, decoded here and now."""
        return next(batches(self, text, [group], 0))


def batches(clips: ClipDataset, text: TranslationTokenizer, groups: Iterable[Group], workers: int) -> Iterator[Batch]:
    """A batch for each group of clips, in order, decoded ahead by `workers` processes (0: here, when it is asked for)."""
    ahead, size, limit = deque(), 0, clips.data.prefetch_mib * 2**20
    arguments = (clips.shards.without_index(), clips.options)
    with WorkerPool(workers, "flallm.data.decoding", decoder.start, arguments) if workers else nullcontext() as pool:
        try:
            for group in groups:
                bytes_needed = int(clips.used[[n for _, n in group]].sum()) * clips.frame_bytes
                while ahead and (size + bytes_needed > limit or len(ahead) == MAX_PREFETCH):
                    size -= ahead[0].size
                    yield ahead.popleft().batch(text)
                ahead.append(PendingBatch(clips, group, pool))
                size += bytes_needed
            while ahead:
                yield ahead.popleft().batch(text)
        finally:
            for unwanted in ahead:
                os.close(unwanted.file)


class PendingBatch:
    """A batch under way: its memory, and the work on each of its clips."""

    def __init__(self, clips: ClipDataset, group: Group, workers: WorkerPool | None):
        self.clips, self.group = clips, group
        self.lengths = clips.used[[n for _, n in group]]
        self.firsts = np.cumsum(self.lengths) - self.lengths
        self.size = max(1, int(self.lengths.sum()) * clips.frame_bytes)
        self.file = os.memfd_create("flallm-batch")  # no name: it is gone with the last process that has it
        os.ftruncate(self.file, self.size)
        memory = f"/proc/{os.getpid()}/fd/{self.file}"
        self.results = [
            workers.start(decoder.run, number, clips.shards.row(number), epoch, memory, int(first), int(length), timeout=TIMEOUT)
            for (epoch, number), first, length in zip(group, self.firsts, self.lengths)
            if workers
        ]

    def _result(self, i: int, frames: np.ndarray) -> tuple[str, str, str]:
        """(key, text, cause why there is none) of the clip i."""
        epoch, number = self.group[i]
        if not self.results:
            return decoder.load(self.clips.shards, self.clips.options, number, self.clips.shards.row(number), epoch, frames)
        try:
            return self.results[i]()
        except TaskFailed as cause:
            return f"{self.clips.shards.split} sample {number}", "", f"cannot be decoded: {cause}"

    def batch(self, text: TranslationTokenizer) -> Batch:
        memory = mmap.mmap(self.file, self.size)  # lives as long as a tensor of it
        shape, dtype = self.clips.shape, self.clips.dtype
        frames = np.frombuffer(memory, dtype, int(self.lengths.sum()) * int(np.prod(shape))).reshape(-1, *shape)
        parts = np.split(frames, self.firsts[1:])
        good, keys, texts, labels, bad = [], [], [], [], []
        for i, part in enumerate(parts):
            key, said, cause = self._result(i, part)
            try:
                ids = [] if cause else text.encode(said)
            except ValueError as error:
                cause = str(error)
            if cause:
                bad.append({"key": key, "cause": cause})
                continue
            for values, value in zip((good, keys, texts, labels), (i, key, said, ids)):
                values.append(value)
        os.close(self.file)
        lengths = self.lengths[good]
        if not good:  # a rank must take part in the step all the same: two black frames, no label
            frames, keys, texts, labels, lengths = np.zeros((2, *shape), dtype), [""], [""], [[IGNORE_INDEX]], np.array([2])
        elif bad:
            frames = np.concatenate([parts[i] for i in good])
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in labels], True, IGNORE_INDEX)
        tensor = torch.from_numpy(frames)
        return Batch(tensor.view(torch.bfloat16) if dtype == np.uint16 else tensor, torch.from_numpy(lengths).long(), padded, keys, texts, bad)
