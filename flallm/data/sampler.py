"""Which clips each rank gets in each step.

The result is a pure function of lengths, seed, epoch, step, batch and world size:

- Every clip occurs exactly once in an epoch.
- The clips of a step are a random sample of the epoch, whatever their lengths, unless `pool` is
  over 1. So the loss of a step does not depend on how lengths are bucketed.
- A step and its micro-batches hold the same clips for any world size. Ranks only share them out,
  so a run resumes on another number of ranks in mid-epoch with the same losses.
- Clips are bucketed by length inside a step: ranks get nearly equal work, and each rank gets texts
  of about one length.
- The steps of an epoch differ by at most one clip in size, so no rank is without work in a last,
  smaller step.

Memory is 8 bytes a clip, for the order of one epoch. The position in a run is the number of steps
done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flallm.config import Config
from flallm.data.balance import balance
from flallm.utils import UserError

# The cost of one character of text in the language model, in frames through the encoder. ResNet18
# at 224 pixels takes 3.6 GFLOP a frame and three times that in training; Light-T's decoder takes
# 0.08 GFLOP a token of 4 characters, and mBART-large's 1.2.
TEXT_COST = {"stage1": 0.002, "stage2": 0.07, "joint": 0.03}
GROUP_SIZE = 128  # ranks that exchange clips; a rank computes the shares of its group only


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch. Batch b holds the clips order[bounds[b] : bounds[b + 1]]."""

    order: np.ndarray  # (clips,) clip numbers
    bounds: np.ndarray  # (steps + 1,)
    batches: np.ndarray  # (steps,) the batch of each step


@dataclass(eq=False)
class BatchSampler:
    """The batches of a split.

    batch: clips in a step, over all ranks and micro-batches. The remainder of an epoch goes to its
        steps, one clip each. A remainder larger than the number of steps makes one more step, and
        then steps are smaller than `batch`.
    batch_frames: the most frames in a step, 0 for no limit. It bounds memory: a micro-batch of a
        rank has about batch_frames / (world_size * micro_batches) frames.
    text_cost: the cost of a character in frames.
    bucket_by_text: whether a rank gets texts of about one length. It is off where each rank has
        BatchNorm statistics of its own: they would be those of short or of long sentences only.
    pool: this many steps are sorted by length together. 1 keeps steps random; 2 makes steps of
        short clips and steps of long clips.

    Raises UserError where a rank could be left without a clip.
    """

    frames: np.ndarray  # (clips,) used frames of each clip
    texts: np.ndarray  # (clips,) characters of each text
    batch: int
    micro_batches: int
    world_size: int
    seed: int
    batch_frames: int = 0
    text_cost: float = 0.0
    bucket_by_text: bool = True
    pool: int = 1

    def __post_init__(self):
        self._epoch: int | None = None
        self._num_groups = -(-self.world_size // GROUP_SIZE)
        ranks = np.arange(self.world_size)
        self._group_of_rank = ranks * self._num_groups // self.world_size
        # Clips are dealt to groups in turns, forth and back, so that no group is ahead.
        turns = np.argsort(ranks * self._num_groups % self.world_size, kind="stable")
        turn = self._group_of_rank[turns]
        self._deal = np.concatenate([turn, turn[::-1]])

        full_steps, remainder = divmod(len(self.frames), self.batch)
        self._steps = full_steps  # of an epoch, without batch_frames
        if remainder > full_steps:
            self._steps += 1
        self._check_every_rank_has_clips()

    def _check_every_rank_has_clips(self) -> None:
        num_parts = self.world_size * self.micro_batches
        # With twice the longest clip for each part, any step has enough clips.
        least = 2 * num_parts * int(self.frames.max(initial=0))
        if self.batch_frames and self.batch_frames < least:
            raise UserError(
                f"train.batch_frames: {self.batch_frames} is too small: {self.world_size} ranks "
                f"x {self.micro_batches} micro-batches x twice the longest clip are {least}"
            )
        smallest = len(self.frames) // max(1, self._steps)
        if smallest < num_parts:
            raise UserError(
                f"train.batch: a step has as few as {smallest} of the {len(self.frames)} clips, "
                f"too few for {self.world_size} ranks x {self.micro_batches} micro-batches"
            )

    def steps(self, epoch: int) -> int:
        """The number of steps of an epoch. Epochs differ only where `batch_frames` is set."""
        return len(self._epoch_order(epoch).batches) if self.batch_frames else self._steps

    def total(self, epochs: float) -> int:
        """The number of steps of so many epochs. A part of an epoch is rounded up."""
        full_epochs = int(epochs)
        steps = sum(self.steps(epoch) for epoch in range(full_epochs))
        return steps + int(np.ceil((epochs - full_epochs) * self.steps(full_epochs)))

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, step in the epoch) of a step of the run, which counts from 0."""
        epoch = 0
        while step >= self.steps(epoch):
            step -= self.steps(epoch)
            epoch += 1
        return epoch, step

    def step(self, epoch: int, step: int) -> list[list[np.ndarray]]:
        """The clips of a step as [micro-batch][rank], each a non-empty array of clip numbers."""
        micro_batches = []
        for clips in self._micro_batches(epoch, step):
            shares: list[np.ndarray] = []
            for group in range(self._num_groups):
                shares += self._shares(clips, group)
            micro_batches.append(shares)
        return micro_batches

    def rank_step(self, epoch: int, step: int, rank: int) -> list[np.ndarray]:
        """The clips of one rank in a step, an array for each micro-batch."""
        group = int(self._group_of_rank[rank])
        place = rank - int(np.searchsorted(self._group_of_rank, group))
        return [self._shares(clips, group)[place] for clips in self._micro_batches(epoch, step)]

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if self._epoch != epoch:
            self._epoch, self._cached = epoch, self._draw_epoch(epoch)
        return self._cached

    def _draw_epoch(self, epoch: int) -> EpochOrder:
        """Draws the order of an epoch, in as many steps as `batch_frames` asks for."""
        rng = np.random.default_rng([self.seed, epoch])
        num_clips, steps = len(self.frames), self._steps
        order = rng.permutation(num_clips)
        while True:
            bounds = np.arange(steps + 1) * num_clips // max(1, steps)
            if self.pool > 1:
                self._sort_pools(order, bounds)
            frames_before = np.cumsum(self.frames[order], dtype=np.int64)
            frames_before = np.concatenate([[0], frames_before])
            largest = int(np.diff(frames_before[bounds]).max(initial=0))  # frames of a batch
            if not self.batch_frames or largest <= self.batch_frames:
                return EpochOrder(order, bounds, rng.permutation(steps))
            steps = max(steps + 1, steps * largest // self.batch_frames)

    def _sort_pools(self, order: np.ndarray, bounds: np.ndarray) -> None:
        """Sorts the clips of every `pool` batches by length, in place."""
        steps = len(bounds) - 1
        for first in range(0, steps, self.pool):
            pool = slice(bounds[first], bounds[min(steps, first + self.pool)])
            by_length = np.argsort(self.frames[order[pool]], kind="stable")
            order[pool] = order[pool][by_length]

    def _micro_batches(self, epoch: int, step: int) -> list[np.ndarray]:
        """The clips of each micro-batch, longest first.

        Micro-batches have equally many clips with a like distribution of lengths, so BatchNorm
        sees the same in each, on any number of ranks.
        """
        epoch_order = self._epoch_order(epoch)
        batch = epoch_order.batches[step]
        clips = epoch_order.order[epoch_order.bounds[batch] : epoch_order.bounds[batch + 1]]
        clips = clips[np.argsort(-self.frames[clips], kind="stable")]
        return [clips[first :: self.micro_batches] for first in range(self.micro_batches)]

    def _shares(self, longest_first: np.ndarray, group: int) -> list[np.ndarray]:
        """The clips of a micro-batch for each rank of a group.

        Groups take turns at the clips, so that all have the same distribution of lengths.
        """
        clips = longest_first[np.resize(self._deal, len(longest_first)) == group]
        num_ranks = int((self._group_of_rank == group).sum())
        texts = self.texts[clips].astype(np.float64)
        costs = self.frames[clips] + self.text_cost * texts
        sort_by = texts
        if not self.bucket_by_text:  # ranks take turns at the clips, forth and back
            turns = np.arange(len(clips)) % (2 * num_ranks)
            sort_by = np.abs(turns - num_ranks + 0.5)
        return [clips[share] for share in balance(costs, sort_by, num_ranks)]


def make_sampler(
    config: Config, frames: np.ndarray, texts: np.ndarray, world_size: int
) -> BatchSampler:
    """The sampler of a recipe for clips of these used frames and characters, (clips,) each."""
    train = config.train
    return BatchSampler(
        frames,
        texts,
        train.batch,
        train.micro_batches,
        world_size,
        config.seed,
        train.batch_frames,
        TEXT_COST[config.stage],
        bucket_by_text=config.encoder.global_batch_norm or config.frozen == "encoder",
        pool=train.pool,
    )


def rank_batches(
    sampler: BatchSampler, rank: int, start: int, stop: int
) -> Iterator[list[tuple[int, int]]]:
    """The (epoch, clip)s of this rank, a list for each micro-batch of the steps start to stop.

    Steps before `start` cost nothing.
    """
    epoch, step = sampler.position(start)
    for _ in range(start, stop):
        for clips in sampler.rank_step(epoch, step, rank):
            yield [(epoch, int(clip)) for clip in clips]
        step += 1
        if step == sampler.steps(epoch):
            epoch, step = epoch + 1, 0
