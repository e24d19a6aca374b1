import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flallm import UserError
from flallm.plan import Plan


@settings(max_examples=200, deadline=None)
@given(
    clips=st.integers(1, 300),
    batch=st.integers(1, 40),
    micro_batches=st.integers(1, 3),
    ranks=st.integers(1, 8),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
)
def test_every_clip_exactly_once_and_the_same_global_batches_on_any_number_of_ranks(clips, batch, micro_batches, ranks, seed, epoch):
    costs = np.random.default_rng(seed).integers(1, 50, clips)
    try:
        plan = Plan(costs, batch, micro_batches, ranks, seed)
    except UserError:
        assert clips // -(-clips // batch) < ranks * micro_batches  # refused only where some rank would be left without a clip
        return
    alone = Plan(costs, batch, micro_batches, 1, seed)
    seen = []
    for step in range(plan.steps_per_epoch):
        parts = plan.step(epoch, step)
        assert len(parts) == micro_batches and all(len(part) == ranks and all(len(ids) for ids in part) for part in parts)
        for part, whole in zip(parts, alone.step(epoch, step)):
            assert sorted(np.concatenate(part)) == sorted(whole[0])
        ids = np.concatenate([np.concatenate(part) for part in parts])
        assert len(ids) <= batch
        seen += ids.tolist()
    assert sorted(seen) == list(range(clips))


def test_work_is_balanced_over_ranks():
    costs = np.random.default_rng(0).integers(40, 260, 2000)
    plan = Plan(costs, 64, 1, 8, 0)
    shares = [[costs[ids].sum() for ids in plan.step(0, s)[0]] for s in range(plan.steps_per_epoch)]
    assert np.mean([np.mean(share) / np.max(share) for share in shares]) > 0.97


def test_epochs_and_seeds_differ():
    plan, other = Plan(np.ones(64), 8, 1, 1, 0), Plan(np.ones(64), 8, 1, 1, 1)
    assert plan.step(0, 0)[0][0].tolist() != plan.step(1, 0)[0][0].tolist()
    assert plan.step(0, 0)[0][0].tolist() != other.step(0, 0)[0][0].tolist()


def test_too_many_ranks_for_the_batch_is_the_users_mistake():
    with pytest.raises(UserError, match="too few for 8 ranks"):
        Plan(np.ones(10), 4, 1, 8, 0)
