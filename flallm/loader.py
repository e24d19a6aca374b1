"""plan + shards + video + text -> `Batch`es, decoded by worker processes ahead of the trainer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from zlib import crc32

import av
import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from flallm import video
from flallm.config import Data
from flallm.plan import Plan
from flallm.shards import BadSample, Shards
from flallm.text import Text

IGNORE = -100  # a label that is no token


@dataclass
class Batch:
    """Clips without any padding of frames.

    frames: (F, H, W, 3) uint8, those of all clips one after another; lengths: (B,) frames of each clip.
    labels: (B, L) token ids, `IGNORE` after the end of a text. bad: samples left out, {"key", "cause"}.
    """

    frames: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    keys: list[str]
    texts: list[str]
    bad: list[dict]

    def to(self, device: torch.device) -> Batch:
        frames, labels = (t.to(device, non_blocking=True) for t in (self.frames, self.labels))
        return Batch(frames, self.lengths, labels, self.keys, self.texts, self.bad)

    def pin_memory(self) -> Batch:
        return Batch(self.frames.pin_memory(), self.lengths, self.labels.pin_memory(), self.keys, self.texts, self.bad)

    @property
    def tokens(self) -> int:
        return int((self.labels != IGNORE).sum())


class Clips(Dataset):
    """Clip (epoch, number) -> its frames and labels; epoch None is for evaluation, without augmentation."""

    def __init__(self, shards: Shards, data: Data, text: Text, seed: int):
        self.shards, self.data, self.text, self.seed = shards, data, text, seed

    def __getitem__(self, where: tuple[int | None, int]) -> dict:
        epoch, number = where
        key = f"{self.shards.split} sample {number}"
        try:
            source, meta = self.shards.read(number)
            key = meta["key"]
            frames = video.decode(source, self.data.resize, self.data.stride, self.data.max_frames, meta["num_frames"])
        except (BadSample, ValueError, OSError, av.FFmpegError) as error:
            return {"key": key, "cause": str(error)}
        if epoch is None:
            frames = video.centre_crop(frames, self.data.crop)
        else:  # one draw a clip, the same whichever rank or worker has it
            rng = np.random.default_rng([self.seed, epoch, crc32(key.encode())])
            frames = video.random_crop(frames, self.data.crop, self.data.augment, rng)
        return {"key": key, "frames": frames, "text": meta["text"], "labels": self.text.encode(meta["text"])}

    def collate(self, samples: list[dict]) -> Batch:
        good = [s for s in samples if "frames" in s]
        bad = [s for s in samples if "frames" not in s]
        if not good:  # a rank must take part in the step all the same: two black frames, no label
            blank = np.zeros((2, self.data.crop, self.data.crop, 3), np.uint8)
            good = [{"key": "", "frames": blank, "text": "", "labels": [IGNORE]}]
        frames = torch.from_numpy(np.concatenate([s["frames"] for s in good]))
        lengths = torch.tensor([len(s["frames"]) for s in good])
        labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(s["labels"]) for s in good], True, IGNORE)
        return Batch(frames, lengths, labels, [s["key"] for s in good], [s["text"] for s in good], bad)


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # meant for the trainer, which still needs batches to end a step; a worker ends with it
    os.nice(10)  # decoding fills the gaps that training leaves, and does not make ranks wait for each other
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def batches(clips: Clips, groups: Iterable[list[tuple[int | None, int]]], workers: int) -> Iterator[Batch]:
    """A batch for each group of clips, in order, decoded ahead by `workers` processes (0: here)."""
    yield from DataLoader(
        clips,
        batch_sampler=groups,
        num_workers=workers,
        collate_fn=clips.collate,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else it draws from the one that dropout draws from
    )


def training_groups(plan: Plan, rank: int, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
    """This rank's clips of every micro-batch from global step `start` to `stop`."""
    for number in range(start, stop):
        epoch, step = divmod(number, plan.steps_per_epoch)
        for micro_batch in plan.step(epoch, step):
            yield [(epoch, int(clip)) for clip in micro_batch[rank]]
