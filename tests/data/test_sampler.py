from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flallm.data.sampler import GROUP_SIZE, BatchSampler, rank_batches
from flallm.utils import UserError


def lengths(clips: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random (frames, characters) of clips."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(1, 76, clips)
    return frames, np.maximum(1, (3 * frames * rng.lognormal(0, 0.3, clips)).astype(int))


def copy_of(sampler: BatchSampler) -> BatchSampler:
    """A new sampler with the same fields and nothing cached."""
    return BatchSampler(**{field.name: getattr(sampler, field.name) for field in fields(sampler)})


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
def test_every_clip_occurs_once_and_global_batches_are_the_same_on_any_number_of_ranks(
    clips, batch, batch_frames, micro_batches, ranks, seed, pool, start
):
    frames, texts = lengths(clips, seed)

    def make(world_size: int) -> BatchSampler:
        return BatchSampler(
            frames, texts, batch, micro_batches, world_size, seed, batch_frames, 0.05, pool=pool
        )

    try:
        sampler, one_rank = make(ranks), make(1)
        steps = [sampler.step(1, step) for step in range(sampler.steps(1))]
    except UserError:
        # Only where a rank would be left without a clip.
        per_epoch = clips // batch + (clips % batch > clips // batch)
        assert batch_frames or clips // per_epoch < ranks * micro_batches
        return
    seen = []
    for number, parts in enumerate(steps):
        assert len(parts) == micro_batches
        for part, expected in zip(parts, one_rank.step(1, number)):
            assert len(part) == ranks and all(len(ids) for ids in part)
            assert sorted(np.concatenate(part)) == sorted(expected[0])
        ids = np.concatenate([np.concatenate(part) for part in parts])
        assert len(ids) <= batch + 1
        assert not batch_frames or frames[ids].sum() <= batch_frames
        seen += ids.tolist()
    assert sorted(seen) == list(range(clips))
    # A rank that resumes at any step sees what a rank sees that never stopped.
    stop, rank = sampler.total(2.5), ranks - 1
    start = min(start, stop)
    uninterrupted = list(rank_batches(sampler, rank, 0, stop))
    resumed = list(rank_batches(copy_of(sampler), rank, start, stop))
    assert resumed == uninterrupted[micro_batches * start :]


def test_a_pool_makes_the_clips_of_a_step_alike_in_length():
    frames, texts = lengths(4096, 0)

    def spread(pool: int) -> float:
        sampler = BatchSampler(frames, texts, 16, 1, 1, 0, pool=pool)
        steps = range(sampler.steps(0))
        return np.mean([np.std(frames[sampler.step(0, step)[0][0]]) for step in steps])

    assert spread(pool=2) < 0.7 * spread(pool=1)


# Train of PHOENIX14T, one clip short, of CSL-Daily and of How2Sign.
@pytest.mark.parametrize("clips", [7096, 7095, 18401, 31165])
def test_no_rank_is_idle_where_a_step_has_as_many_clips_as_ranks(clips):
    sampler = BatchSampler(*lengths(clips, 0), 8, 1, 8, 0)
    assert sampler.steps(0) == clips // 8
    for step in range(0, sampler.steps(0), 40):
        (parts,) = sampler.step(0, step)
        assert all(map(len, parts)) and sum(map(len, parts)) in (8, 9)


@pytest.mark.parametrize("ranks", [8, 64, 2 * GROUP_SIZE, 3 * GROUP_SIZE + 5])
def test_work_is_balanced_over_ranks_and_the_texts_of_a_rank_are_alike(ranks):
    frames, texts = lengths(24 * ranks, 0)
    sampler = BatchSampler(frames, texts, 8 * ranks, 1, ranks, 0)
    balance, padded, padded_at_random = [], 0, 0
    rng = np.random.default_rng(0)
    for step in range(sampler.steps(0)):
        (parts,) = sampler.step(0, step)
        work = [frames[ids].sum() for ids in parts]
        balance.append(np.mean(work) / np.max(work))
        padded += sum(texts[ids].max() * len(ids) for ids in parts)
        shuffled = np.array_split(rng.permutation(np.concatenate(parts)), ranks)
        padded_at_random += sum(texts[ids].max() * len(ids) for ids in shuffled)
        assert np.array_equal(sampler.rank_step(0, step, ranks - 1)[0], parts[-1])
    assert np.mean(balance) > 0.97
    assert padded < 0.8 * padded_at_random


def test_ranks_with_statistics_of_their_own_get_clips_of_all_lengths():
    frames, texts = lengths(2000, 0)
    sampler = BatchSampler(frames, texts, 64, 1, 4, 0, bucket_by_text=False)
    for step in range(sampler.steps(0)):
        (parts,) = sampler.step(0, step)
        work = [frames[ids].sum() for ids in parts]
        means = [frames[ids].mean() for ids in parts]
        assert np.mean(work) / np.max(work) > 0.95
        assert np.max(means) < 1.5 * np.min(means)


def test_the_clips_of_a_step_are_a_random_sample_of_all_lengths():
    """The loss of a step says nothing of its lengths: their mean varies as that of random clips."""
    frames, texts = lengths(4096, 1)
    sampler = BatchSampler(frames, texts, 64, 1, 8, 0)
    means = []
    for epoch in range(4):
        for step in range(sampler.steps(epoch)):
            means.append(frames[np.concatenate(sampler.step(epoch, step)[0])].mean())
    assert 0.8 < np.std(means) / (frames.std() / 8) < 1.2


def test_epochs_and_seeds_differ():
    ones = np.ones(64, int)
    sampler = BatchSampler(ones, ones, 8, 1, 1, 0)
    other_seed = BatchSampler(ones, ones, 8, 1, 1, 1)
    first = sampler.step(0, 0)[0][0].tolist()
    assert first != sampler.step(1, 0)[0][0].tolist()
    assert first != other_seed.step(0, 0)[0][0].tolist()


def test_too_few_clips_or_frames_for_the_ranks_are_user_errors():
    frames = np.full(10, 50)
    with pytest.raises(UserError, match="too few for 8 ranks"):
        BatchSampler(frames, frames, 4, 1, 8, 0)
    message = r"train\.batch_frames: 199 is too small: 2 ranks .* are 200"
    with pytest.raises(UserError, match=message):
        BatchSampler(frames, frames, 4, 1, 2, 0, 199)
