"""Which clips go to which rank in which step: a pure function of (lengths, seed, epoch, step, batch, world size).

Every clip occurs exactly once an epoch. The global batch of a step, and its micro-batches, are the same for any world size;
ranks only share them out. So a run can go on with another number of ranks, and its losses stay the same. The steps of an
epoch differ by at most one clip in size, so there is no small last step in which some ranks would have nothing to do.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from flallm import UserError

POOL = 2  # batches that are sorted by length together; of more, the loss of a step says more of its length than of the model


class Plan:
    """The steps of a split.

    costs: (clips,) the work of each clip, such as its frames; what is balanced over ranks.
    batch: clips a step over all ranks and micro-batches (the largest number).
    """

    def __init__(self, costs: np.ndarray, batch: int, micro_batches: int, world_size: int, seed: int):
        self.costs, self.micro_batches, self.world_size, self.seed = costs, micro_batches, world_size, seed
        self.steps_per_epoch = -(-len(costs) // batch)
        smallest = len(costs) // max(1, self.steps_per_epoch)
        if smallest < world_size * micro_batches:
            raise UserError(
                f"train.batch: a step has as few as {smallest} of the {len(costs)} clips, too few for {world_size} ranks x {micro_batches} micro-batches"
            )
        self._epoch: int | None = None

    @cached_property
    def _bounds(self) -> np.ndarray:
        return np.arange(self.steps_per_epoch + 1) * len(self.costs) // self.steps_per_epoch

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(clips in the order of batches, the batch of each step)."""
        if self._epoch != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.costs))
            for a, b in zip(self._bounds[:-1:POOL], [*self._bounds[POOL::POOL], len(order)]):
                pool = order[a:b]
                order[a:b] = pool[np.argsort(self.costs[pool], kind="stable")]
            self._epoch, self._cached = epoch, (order, rng.permutation(self.steps_per_epoch))
        return self._cached

    def step(self, epoch: int, step: int) -> list[list[np.ndarray]]:
        """The clips of a step as [micro-batch][rank], each an array of clip numbers, none empty."""
        order, batches = self._order(epoch)
        a, b = self._bounds[batches[step]], self._bounds[batches[step] + 1]
        longest_first = order[a:b][np.argsort(-self.costs[order[a:b]], kind="stable")]
        # Micro-batches of equally many clips: each has one for every rank.
        return [self._share(longest_first[m :: self.micro_batches]) for m in range(self.micro_batches)]

    def _share(self, longest_first: np.ndarray) -> list[np.ndarray]:
        """The clips of each rank, of nearly equal cost: each clip goes where least is."""
        groups, load = [[] for _ in range(self.world_size)], np.zeros(self.world_size)
        for clip in longest_first:
            least = int(load.argmin())
            groups[least].append(clip)
            load[least] += self.costs[clip]
        return [np.array(group) for group in groups]
