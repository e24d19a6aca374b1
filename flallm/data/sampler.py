"""Which clips go to which rank in which step: a pure function of (lengths, seed, epoch, step, batch, world size).

Every clip occurs exactly once an epoch. The clips of a step are a random sample of the epoch's, whatever their lengths (unless `pool` says
otherwise), and they and their micro-batches are the same for any world size; ranks only share them out. So a run can go on with another
number of ranks in mid-epoch, its losses stay the same, and no length can be seen in them. Lengths are bucketed inside the
step instead: each rank gets clips of nearly equal work in all and with texts of about the same length. The steps of an epoch
differ by at most one clip in size, so there is no small last step in which some ranks would have nothing to do. Only the
order of an epoch is kept (8 bytes a clip), and the position in a run is the number of steps done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flallm.config import Config
from flallm.utils import UserError

# What a character of text costs the language model, in frames through the encoder: ResNet18 at 224 pixels takes 3.6 GFLOP
# a frame, three times that when it trains; Light-T's decoder 0.08 GFLOP a token of 4 characters, mBART-large's 1.2.
TEXT_COST = {"stage1": 0.002, "stage2": 0.07, "joint": 0.03}
TOLERANCE = 0.0195  # by how much a rank's work may be over the mean before clips are exchanged
ISLAND = 128  # ranks that exchange clips among each other; a rank works out what its island gets and no more


@dataclass(eq=False)
class BatchSampler:
    """The steps of a split."""

    frames: np.ndarray  # (clips,) used frames of each clip
    texts: np.ndarray  # (clips,) characters of its text
    # Clips a step, over all ranks and micro-batches. What an epoch has over goes to its steps, one more each, so that `batch` ranks never lack a clip; where it
    # is more than there are steps (fewer than batch² clips), there is a step more and each has some less.
    batch: int
    micro_batches: int
    world_size: int
    seed: int
    batch_frames: int = 0  # the most frames a step, 0: no limit. It bounds memory: a rank's micro-batch has about batch_frames / (world_size * micro_batches)
    text_cost: float = 0.0  # what a character costs in frames
    # Whether a rank gets texts of about one length, which is not to be where BatchNorm's statistics are each rank's own: one would know short sentences only,
    # another long ones.
    alike: bool = True
    pool: int = 1  # steps whose clips are sorted by length together; 1 leaves them random, 2 makes steps of short clips and steps of long ones

    def __post_init__(self):
        frames, batch, micro_batches, world_size = self.frames, self.batch, self.micro_batches, self.world_size
        self._islands = -(-world_size // ISLAND)
        self._island = np.arange(world_size) * self._islands // world_size  # of each rank
        place = np.arange(world_size) * self._islands % world_size  # islands take turns, forth and back, so that none is ahead
        self._deal = np.concatenate([turn := self._island[np.argsort(place, kind="stable")], turn[::-1]])
        self._epoch: int | None = None
        least = 2 * world_size * micro_batches * int(frames.max(initial=0))  # then every step has clips for all, however lengths fall
        if self.batch_frames and self.batch_frames < least:
            raise UserError(
                f"train.batch_frames: {self.batch_frames} is too small: {world_size} ranks x {micro_batches} micro-batches x twice the longest clip are {least}"
            )
        whole, over = divmod(len(frames), batch)
        self._steps = whole if over <= whole else whole + 1  # without batch_frames
        smallest = len(frames) // max(1, self._steps)
        if smallest < world_size * micro_batches:
            raise UserError(
                f"train.batch: a step has as few as {smallest} of the {len(frames)} clips, too few for {world_size} ranks x {micro_batches} micro-batches"
            )

    def steps(self, epoch: int) -> int:
        """Steps of an epoch; the same for all epochs unless `batch_frames` says otherwise."""
        return len(self._order(epoch)[2]) if self.batch_frames else self._steps

    def total(self, epochs: float) -> int:
        """Steps of so many epochs, a part of one rounded up."""
        whole = int(epochs)
        return sum(self.steps(e) for e in range(whole)) + int(np.ceil((epochs - whole) * self.steps(whole)))

    def position(self, number: int) -> tuple[int, int]:
        """(epoch, step in it) of the run's step `number`, counted from 0."""
        epoch = 0
        while number >= self.steps(epoch):
            number -= self.steps(epoch)
            epoch += 1
        return epoch, number

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(the epoch's clips in order, where each batch of it begins, and the end, the batch of each step)."""
        if self._epoch != epoch:
            rng, clips = np.random.default_rng([self.seed, epoch]), len(self.frames)
            order, steps = rng.permutation(clips), self._steps
            while True:
                bounds = np.arange(steps + 1) * clips // max(1, steps)
                for first in range(0, steps if self.pool > 1 else 0, self.pool):
                    part = slice(bounds[first], bounds[min(steps, first + self.pool)])
                    order[part] = order[part][np.argsort(self.frames[order[part]], kind="stable")]
                ahead = np.concatenate([[0], np.cumsum(self.frames[order], dtype=np.int64)])
                most = int(np.diff(ahead[bounds]).max(initial=0))
                if not self.batch_frames or most <= self.batch_frames:
                    break
                steps = max(steps + 1, steps * most // self.batch_frames)
            self._epoch, self._cached = epoch, (order, bounds, rng.permutation(steps))
        return self._cached

    def step(self, epoch: int, step: int) -> list[list[np.ndarray]]:
        """The clips of a step as [micro-batch][rank], each an array of clip numbers, none empty."""
        return [[clips for island in range(self._islands) for clips in self._share(m, island)] for m in self._micro_batches(epoch, step)]

    def rank_step(self, epoch: int, step: int, rank: int) -> list[np.ndarray]:
        """One rank's view of a step: its clips of every micro-batch."""
        island = int(self._island[rank])
        place = rank - int(np.searchsorted(self._island, island))
        return [self._share(m, island)[place] for m in self._micro_batches(epoch, step)]

    def _micro_batches(self, epoch: int, step: int) -> list[np.ndarray]:
        order, bounds, batches = self._order(epoch)
        clips = order[bounds[batches[step]] : bounds[batches[step] + 1]]
        longest_first = clips[np.argsort(-self.frames[clips], kind="stable")]
        # Micro-batches of equally many clips and alike in lengths: BatchNorm sees the same in each, on any number of ranks.
        return [longest_first[m :: self.micro_batches] for m in range(self.micro_batches)]

    def _share(self, longest_first: np.ndarray, island: int) -> list[np.ndarray]:
        """What each rank of an island gets of a micro-batch; dealt out to islands in turns, so that they have the same lengths."""
        clips = longest_first[np.resize(self._deal, len(longest_first)) == island]
        texts = self.texts[clips].astype(np.float64)
        ranks = int((self._island == island).sum())
        costs = self.frames[clips] + self.text_cost * texts
        if not self.alike:  # ranks take turns instead, forth and back
            texts = np.abs(np.arange(len(clips)) % (2 * ranks) - ranks + 0.5)
        return [clips[group] for group in balance(costs, texts, ranks)]


def make_sampler(config: Config, frames: np.ndarray, texts: np.ndarray, world_size: int) -> BatchSampler:
    """A recipe's plan for clips of so many used frames and characters of text."""
    train = config.train
    return BatchSampler(
        frames, texts, train.batch, train.micro_batches, world_size, config.seed, train.batch_frames, TEXT_COST[config.stage],
        alike=config.encoder.global_batch_norm or config.frozen == "encoder",
        pool=train.pool,
    )  # fmt: skip


def balance(costs: np.ndarray, texts: np.ndarray, groups: int) -> list[np.ndarray]:
    """Shares items out to groups of nearly equal cost with texts of about equal length in each; no group is empty.

    In the order of texts, the items are cut into groups of equal cost, which leaves them about half an item apart. Then groups
    with too much exchange an item for a cheaper one (or give one away), with groups that have little and are near in the
    order, so that costs come closer and padding to the longest text of each group grows least.
    """
    order, cuts = np.argsort(texts, kind="stable"), np.arange(groups + 1)
    ahead = np.cumsum(costs[order])
    cuts_at = np.searchsorted(ahead - costs[order] / 2, ahead[-1] * cuts / groups)
    cuts_at = np.clip(np.maximum.accumulate(cuts_at - cuts), 0, len(costs) - groups) + cuts  # at least one item in each
    cuts_at[[0, -1]] = 0, len(costs)
    counts = np.diff(cuts_at)
    # One row a group, its items in the first places; -1 is a place without an item.
    items = np.full((groups, counts.max() + 1), -1)
    group = np.repeat(np.arange(groups), counts)
    items[group, np.arange(len(costs)) - cuts_at[group]] = order
    costs, texts = np.append(costs, 0.0), np.append(texts, 0.0)  # of no item
    most = ahead[-1] / groups * (1 + TOLERANCE)
    for attempt in range(48):
        loads = costs[items].sum(1)
        by_load = np.argsort(loads, kind="stable")
        heavy = by_load[::-1][: min(groups // 2, int((loads > most).sum()))]
        if not len(heavy):
            break
        light = np.roll(by_load[: groups // 2], -attempt)[: len(heavy)]  # another partner each time
        if attempt % 4 < 3:  # neighbours in the order of texts
            few = by_load[: min(groups // 2, len(heavy) * (1 + attempt % 4))]
            heavy, light = np.sort(heavy), np.sort(np.sort(few)[:: 1 + attempt % 4][: len(heavy)])
            heavy = heavy[: len(light)]
        _exchange(items, heavy, light, costs, texts, loads, 0.25 * 0.9**attempt)
    return [row[row >= 0] for row in items]


def _exchange(items, heavy, light, costs, texts, loads, weight: float) -> None:
    """For each pair of groups the exchange of two places that brings their loads together and adds least padding."""
    width = min(items.shape[1], int((items[np.concatenate([heavy, light])] >= 0).sum(1).max()) + 1)
    a, b = items[light], items[heavy]
    a, b = (np.take_along_axis(x, np.argsort(x < 0, 1, kind="stable"), 1)[:, :width] for x in (a, b))  # items first
    too_much = (loads[heavy] - loads[light])[:, None, None] / 2  # what ought to change hands
    left_over = np.abs(too_much - costs[b][:, None, :] + costs[a][:, :, None])  # (P, width, width), as all below
    has_a, has_b = (a >= 0)[:, :, None], (b >= 0)[:, None, :]
    count_a, count_b = has_a.sum(1, keepdims=True) - has_a + has_b, has_b.sum(2, keepdims=True) - has_b + has_a  # afterwards
    longest_a = np.maximum(_longest_other(texts[a])[:, :, None], texts[b][:, None, :])
    longest_b = np.maximum(_longest_other(texts[b])[:, None, :], texts[a][:, :, None])
    padded = longest_a * count_a + longest_b * count_b
    objective = left_over + weight * padded
    objective[(count_a < 1) | (count_b < 1) | (left_over >= 0.9 * np.abs(too_much))] = np.inf
    objective = objective.reshape(len(heavy), -1)
    best = objective.argmin(1)
    done = np.flatnonzero(np.isfinite(objective[np.arange(len(heavy)), best]))
    i, j = np.divmod(best[done], width)
    a[done, i], b[done, j] = b[done, j], a[done, i].copy()
    items[light, :width], items[heavy, :width] = a, b
    items[light, width:], items[heavy, width:] = -1, -1


def _longest_other(texts: np.ndarray) -> np.ndarray:
    """(P, n) -> (P, n): the longest of each row without the item at that place."""
    two = np.sort(texts, 1)[:, -2:]
    return np.where(texts == two[:, 1:], two[:, :1], two[:, 1:])


def rank_batches(plan: BatchSampler, rank: int, start: int, stop: int) -> Iterator[list[tuple[int, int]]]:
    """This rank's (epoch, clip)s of every micro-batch from the run's step `start` to `stop`; nothing before it is looked at."""
    epoch, step = plan.position(start)
    for _ in range(start, stop):
        for clips in plan.rank_step(epoch, step, rank):
            yield [(epoch, int(clip)) for clip in clips]
        step += 1
        if step == plan.steps(epoch):
            epoch, step = epoch + 1, 0
