import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flallm.data.sampler import ISLAND, BatchSampler, rank_batches
from flallm.utils import UserError


def lengths(clips: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    frames = rng.integers(1, 76, clips)
    return frames, np.maximum(1, (3 * frames * rng.lognormal(0, 0.3, clips)).astype(int))


@settings(max_examples=300, deadline=None)
@given(
    clips=st.integers(1, 300),
    batch=st.integers(1, 80),
    batch_frames=st.sampled_from([0, 200, 900, 2000]),
    micro_batches=st.integers(1, 3),
    ranks=st.sampled_from([1, 2, 3, 8, 64]),
    seed=st.integers(0, 99),
    pool=st.integers(1, 3),
    start=st.integers(0, 40),
)
def test_every_clip_once_and_the_same_global_batches_on_any_number_of_ranks(clips, batch, batch_frames, micro_batches, ranks, seed, pool, start):
    frames, texts = lengths(clips, seed)
    try:
        plan = BatchSampler(frames, texts, batch, micro_batches, ranks, seed, batch_frames, 0.05, pool=pool)
        alone = BatchSampler(frames, texts, batch, micro_batches, 1, seed, batch_frames, 0.05, pool=pool)
        steps = [plan.step(1, s) for s in range(plan.steps(1))]
    except UserError:
        per_epoch = clips // batch + (clips % batch > clips // batch)
        assert batch_frames or clips // per_epoch < ranks * micro_batches  # only where a rank would be left without a clip
        return
    seen = []
    for number, parts in enumerate(steps):
        assert len(parts) == micro_batches and all(len(part) == ranks and all(len(ids) for ids in part) for part in parts)
        for part, whole in zip(parts, alone.step(1, number)):
            assert sorted(np.concatenate(part)) == sorted(whole[0])
        ids = np.concatenate([np.concatenate(part) for part in parts])
        assert len(ids) <= batch + 1 and (not batch_frames or frames[ids].sum() <= batch_frames)
        seen += ids.tolist()
    assert sorted(seen) == list(range(clips))
    # A rank that begins at any step sees what it would have seen had it never stopped.
    stop, rank = plan.total(2.5), ranks - 1
    start = min(start, stop)
    whole, resumed = (list(rank_batches(p, rank, first, stop)) for p, first in ((plan, 0), (BatchSampler(**vars_of(plan)), start)))
    assert resumed == whole[micro_batches * start :]


def vars_of(plan: BatchSampler) -> dict:
    return {
        name: getattr(plan, name) for name in ("frames", "texts", "batch", "micro_batches", "world_size", "seed", "batch_frames", "text_cost", "alike", "pool")
    }


def test_a_pool_makes_the_clips_of_a_step_alike_in_length():
    frames, texts = lengths(4096, 0)
    plans = [BatchSampler(frames, texts, 16, 1, 1, 0, pool=pool) for pool in (1, 2)]
    alone, together = (np.mean([np.std(frames[plan.step(0, s)[0][0]]) for s in range(plan.steps(0))]) for plan in plans)
    assert together < 0.7 * alone


@pytest.mark.parametrize("clips", [7096, 7095, 18401, 31165])  # train of PHOENIX14T, one clip short, of CSL-Daily and of How2Sign
def test_as_many_ranks_as_clips_a_step_have_all_something_to_do(clips):
    plan = BatchSampler(*lengths(clips, 0), 8, 1, 8, 0)
    assert plan.steps(0) == clips // 8
    for step in range(0, plan.steps(0), 40):
        (parts,) = plan.step(0, step)
        assert all(map(len, parts)) and sum(map(len, parts)) in (8, 9)


@pytest.mark.parametrize("ranks", [8, 64, 2 * ISLAND, 3 * ISLAND + 5])
def test_work_is_balanced_over_ranks_and_texts_of_a_rank_are_alike(ranks):
    frames, texts = lengths(24 * ranks, 0)
    plan = BatchSampler(frames, texts, 8 * ranks, 1, ranks, 0)
    balance, padded, random, rng = [], 0, 0, np.random.default_rng(0)
    for step in range(plan.steps(0)):
        (parts,) = plan.step(0, step)
        work = [frames[ids].sum() for ids in parts]
        balance.append(np.mean(work) / np.max(work))
        padded += sum(texts[ids].max() * len(ids) for ids in parts)
        dealt = rng.permutation(np.concatenate(parts))
        random += sum(texts[ids].max() * len(ids) for ids in np.array_split(dealt, ranks))
        assert np.array_equal(plan.rank_step(0, step, ranks - 1)[0], parts[-1])
    assert np.mean(balance) > 0.97
    assert padded < 0.8 * random


def test_ranks_with_statistics_of_their_own_get_clips_of_all_lengths():
    frames, texts = lengths(2000, 0)
    plan = BatchSampler(frames, texts, 64, 1, 4, 0, alike=False)
    for step in range(plan.steps(0)):
        (parts,) = plan.step(0, step)
        work, means = [frames[ids].sum() for ids in parts], [frames[ids].mean() for ids in parts]
        assert np.mean(work) / np.max(work) > 0.95 and np.max(means) < 1.5 * np.min(means)


def test_the_clips_of_a_step_are_a_random_sample_of_all_lengths():
    """So that the loss of a step says nothing of its lengths: their mean strays no more than that of random clips does."""
    frames, texts = lengths(4096, 1)
    plan = BatchSampler(frames, texts, 64, 1, 8, 0)
    means = [frames[np.concatenate(plan.step(e, s)[0])].mean() for e in range(4) for s in range(plan.steps(e))]
    assert 0.8 < np.std(means) / (frames.std() / 8) < 1.2


def test_epochs_and_seeds_differ():
    one = np.ones(64, int)
    plan, other = BatchSampler(one, one, 8, 1, 1, 0), BatchSampler(one, one, 8, 1, 1, 1)
    assert plan.step(0, 0)[0][0].tolist() != plan.step(1, 0)[0][0].tolist()
    assert plan.step(0, 0)[0][0].tolist() != other.step(0, 0)[0][0].tolist()


def test_what_cannot_be_planned_is_the_users_mistake():
    ten = np.full(10, 50)
    with pytest.raises(UserError, match="too few for 8 ranks"):
        BatchSampler(ten, ten, 4, 1, 8, 0)
    with pytest.raises(UserError, match=r"train\.batch_frames: 199 is too small: 2 ranks .* are 200"):
        BatchSampler(ten, ten, 4, 1, 2, 0, 199)
