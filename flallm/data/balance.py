"""Shares the clips of a micro-batch out to ranks: nearly equal work, little padding.

Packing by longest processing time balances work but ignores texts: ranks get texts of all lengths
and pad them to the longest. This search keeps the texts of a rank alike.
"""

from __future__ import annotations

import numpy as np

TOLERANCE = 0.0195  # a rank exchanges clips when its work exceeds the mean by this share
EXCHANGE_ROUNDS = 48
PADDING_WEIGHT, PADDING_DECAY = 0.25, 0.9  # frames that a character of padding is worth
NO_CLIP = -1


def balance(costs: np.ndarray, texts: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Shares clips out to ranks with nearly equal cost and texts of about one length in each.

    costs, texts: (clips,) cost and text length of each clip, at least one clip for each rank.
    Returns the clips of each rank, none empty.

    First the clips, in the order of their texts, are cut into ranges of equal cost. That leaves
    ranks about half a clip apart. Then overloaded ranks exchange a clip for a cheaper one of a rank
    with little work, or give one away. Partners are near in the order of texts, and each exchange
    is the one that best evens out the work and adds the least padding.
    """
    order = np.argsort(texts, kind="stable")
    cumulative = np.cumsum(costs[order])
    shares = _cut_into_ranges(order, costs, cumulative, num_ranks)
    limit = cumulative[-1] / num_ranks * (1 + TOLERANCE)
    costs, texts = np.append(costs, 0.0), np.append(texts, 0.0)  # NO_CLIP costs nothing
    for attempt in range(EXCHANGE_ROUNDS):
        loads = costs[shares].sum(1)
        heavy, light = _exchange_partners(loads, limit, attempt)
        if not len(heavy):
            break
        surplus = (loads[heavy] - loads[light]) / 2
        weight = PADDING_WEIGHT * PADDING_DECAY**attempt
        _exchange(shares, heavy, light, surplus, costs, texts, weight)
    return [row[row != NO_CLIP] for row in shares]


def _cut_into_ranges(
    order: np.ndarray, costs: np.ndarray, cumulative: np.ndarray, num_ranks: int
) -> np.ndarray:
    """Cuts clips into consecutive ranges of about equal cost, with at least one clip in each.

    order: (clips,) clip numbers. costs: (clips,) by clip number. cumulative: (clips,) cost up to
    and including each clip of `order`.
    Returns (ranks, places): the clips of a rank in its first places, NO_CLIP in the others.
    """
    num_clips, cuts = len(order), np.arange(num_ranks + 1)
    middles = cumulative - costs[order] / 2
    bounds = np.searchsorted(middles, cumulative[-1] * cuts / num_ranks)
    bounds = np.clip(np.maximum.accumulate(bounds - cuts), 0, num_clips - num_ranks) + cuts
    bounds[0], bounds[-1] = 0, num_clips
    counts = np.diff(bounds)
    shares = np.full((num_ranks, counts.max() + 1), NO_CLIP)
    ranks = np.repeat(np.arange(num_ranks), counts)  # (clips,) the rank of each clip of `order`
    shares[ranks, np.arange(num_clips) - bounds[ranks]] = order
    return shares


def _exchange_partners(
    loads: np.ndarray, limit: float, attempt: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs overloaded ranks with ranks of little work.

    loads: (ranks,). Returns (heavy, light): the ranks of each pair, (pairs,) both.
    """
    half = len(loads) // 2
    by_load = np.argsort(loads, kind="stable")
    num_overloaded = int((loads > limit).sum())
    heavy = by_load[::-1][: min(half, num_overloaded)]
    if attempt % 4 == 3:  # any light rank, and another one each time
        return heavy, np.roll(by_load[:half], -attempt)[: len(heavy)]
    # Ranks are in the order of texts, so partners of one place in this order have like texts.
    stride = 1 + attempt % 4  # of the lightest ranks, every one, every second or every third
    lightest = by_load[: min(half, len(heavy) * stride)]
    light = np.sort(lightest)[::stride][: len(heavy)]
    return np.sort(heavy)[: len(light)], light


def _exchange(
    shares: np.ndarray,
    heavy: np.ndarray,
    light: np.ndarray,
    surplus: np.ndarray,
    costs: np.ndarray,
    texts: np.ndarray,
    padding_weight: float,
) -> None:
    """Makes the best exchange of two places for each pair of ranks, in place.

    shares: (ranks, places) clip numbers or NO_CLIP. heavy, light: (pairs,) ranks. surplus: (pairs,)
    the cost that the heavy rank should give to the light one. costs, texts: (clips + 1,), the last
    for NO_CLIP.

    The best exchange minimises |surplus left| + padding_weight * padded length. A pair exchanges
    nothing where the surplus would hardly shrink or a rank would be left without a clip.
    """
    counts = (shares[np.concatenate([heavy, light])] != NO_CLIP).sum(1)
    width = min(shares.shape[1], int(counts.max()) + 1)  # one empty place: a clip may be given away
    light_clips = _clips_first(shares[light])[:, :width]  # (pairs, width)
    heavy_clips = _clips_first(shares[heavy])[:, :width]

    # Entry [p, i, j] of what follows: pair p exchanges place i of light and place j of heavy.
    surplus = surplus[:, None, None]
    surplus_left = np.abs(surplus - costs[heavy_clips][:, None, :] + costs[light_clips][:, :, None])
    light_count, light_padded = _after_exchange(light_clips, heavy_clips, texts)
    heavy_count, heavy_padded = _after_exchange(heavy_clips, light_clips, texts)
    heavy_count, heavy_padded = heavy_count.swapaxes(1, 2), heavy_padded.swapaxes(1, 2)
    objective = surplus_left + padding_weight * (light_padded + heavy_padded)
    objective[(light_count < 1) | (heavy_count < 1)] = np.inf
    objective[surplus_left >= 0.9 * np.abs(surplus)] = np.inf

    objective = objective.reshape(len(heavy), width * width)
    best = objective.argmin(1)
    pairs = np.flatnonzero(np.isfinite(objective.min(1)))
    i, j = np.divmod(best[pairs], width)
    from_light, from_heavy = light_clips[pairs, i], heavy_clips[pairs, j]
    light_clips[pairs, i], heavy_clips[pairs, j] = from_heavy, from_light
    for ranks, clips in ((light, light_clips), (heavy, heavy_clips)):
        shares[ranks, :width] = clips
        shares[ranks, width:] = NO_CLIP


def _clips_first(shares: np.ndarray) -> np.ndarray:
    """(pairs, places) -> (pairs, places): clips in the first places, in their order."""
    return np.take_along_axis(shares, np.argsort(shares == NO_CLIP, 1, kind="stable"), 1)


def _after_exchange(
    own: np.ndarray, incoming: np.ndarray, texts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What a rank has after place i of `own` goes and place j of `incoming` comes.

    own, incoming: (pairs, width) clip numbers or NO_CLIP.
    Returns (number of clips, text length with padding), (pairs, width, width) each.
    """
    has_own, has_incoming = own != NO_CLIP, incoming != NO_CLIP
    count_without = has_own.sum(1, keepdims=True) - has_own
    count = count_without[:, :, None] + has_incoming[:, None, :]
    longest_without = _longest_other(texts[own])
    longest = np.maximum(longest_without[:, :, None], texts[incoming][:, None, :])
    return count, longest * count


def _longest_other(texts: np.ndarray) -> np.ndarray:
    """(pairs, width) -> (pairs, width): the longest of each row without the text at that place."""
    longest_two = np.sort(texts, 1)[:, -2:]
    second, longest = longest_two[:, :1], longest_two[:, 1:]
    return np.where(texts == longest, second, longest)
