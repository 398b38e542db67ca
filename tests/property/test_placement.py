"""Placements of any load: every expert stands somewhere, loads add up, and swaps and moves only help."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import LayoutError
from moesim.routing import (
    Placement,
    aligned,
    balanced,
    coactivation,
    contiguous,
    eplb,
    moved_experts,
    rebalanced,
)
from moesim.routing.coactivation import chosen_together, smoothed

EXAMPLES = settings(max_examples=60, deadline=None)

loads = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "n_layers": st.integers(1, 3),
        "n_nodes": st.integers(1, 3),
        "ranks_per_node": st.integers(1, 4),
        "slots_per_rank": st.integers(1, 6),
        "n_redundant": st.integers(0, 6),
        "spread": st.floats(0, 2),
    }
)


def made(s):
    """Load (n_layers, n_experts), ranks, slots, and nodes."""
    n_ranks = s["n_nodes"] * s["ranks_per_node"]
    n_slots = n_ranks * s["slots_per_rank"]
    n_experts = max(1, n_slots - s["n_redundant"])
    rng = np.random.default_rng(s["seed"])
    return rng.lognormal(0, s["spread"], (s["n_layers"], n_experts)), n_ranks, n_slots, s["n_nodes"]


def tokens(seed, n_layers, n_experts):
    """Tokens that like experts of the same remainder by 3."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, (200, n_layers, 1))
    score = rng.gumbel(size=(200, n_layers, n_experts)) + 3.0 * (np.arange(n_experts) % 3 == kind)
    return np.argsort(-score, axis=-1)[..., : min(2, n_experts)]


def made_by(policy, load, n_ranks, n_slots, n_nodes, seed):
    n_experts = load.shape[1]
    if policy == "balanced":
        return balanced(load, n_ranks, n_slots - n_experts)
    if policy == "coactivation":
        ids = tokens(seed, len(load), n_experts)
        return coactivation(ids, load, n_slots=n_slots, n_ranks=n_ranks, n_nodes=n_nodes)
    if policy == "rebalanced":
        return rebalanced(contiguous(n_experts, n_ranks, n_slots - n_experts), load)
    return eplb(load, n_slots=n_slots, n_ranks=n_ranks)


@pytest.mark.parametrize("policy", ["balanced", "coactivation", "rebalanced", "eplb"])
@EXAMPLES
@given(s=loads)
def test_every_expert_has_a_slot_and_loads_add_up(policy, s):
    load, n_ranks, n_slots, n_nodes = made(s)
    placement = made_by(policy, load, n_ranks, n_slots, n_nodes, s["seed"])
    assert placement.slot_to_expert.shape == (len(load), n_slots)
    assert np.all(placement.n_replicas >= 1)
    by_rank = placement.rank_load(load)
    assert by_rank.sum(axis=-1) == pytest.approx(load.sum(axis=-1))
    # no rank can be below the mean of all, nor below one replica of the busiest expert
    least = np.maximum(by_rank.mean(axis=-1), (load / placement.n_replicas).max(axis=-1))
    assert np.all(by_rank.max(axis=-1) >= least * (1 - 1e-9))


@EXAMPLES
@given(s=loads)
def test_balanced_is_never_behind_eplb(s):
    load, n_ranks, n_slots, _ = made(s)
    theirs = eplb(load, n_slots=n_slots, n_ranks=n_ranks).rank_load(load).max(axis=-1)
    ours = balanced(load, n_ranks, n_slots - load.shape[1]).rank_load(load).max(axis=-1)
    assert np.all(ours <= theirs * (1 + 1e-9))


@EXAMPLES
@given(s=loads, seed=st.integers(0, 100))
def test_moves_agree_with_a_walk_over_ranks(s, seed):
    load, n_ranks, n_slots, n_nodes = made(s)
    old = eplb(load, n_slots=n_slots, n_ranks=n_ranks)
    new = eplb(np.random.default_rng(seed).permuted(load, axis=-1), n_slots=n_slots, n_ranks=n_ranks)
    per = n_ranks // n_nodes
    found = moved_experts(old, new, ranks_per_domain=per)
    near = far = 0
    for before, after in zip(old.slot_to_expert, new.slot_to_expert, strict=True):
        had = [set(one.tolist()) for one in before.reshape(n_ranks, -1)]
        for rank, one in enumerate(after.reshape(n_ranks, -1)):
            for expert in set(one.tolist()) - had[rank]:
                own = range(rank // per * per, rank // per * per + per)
                if any(expert in had[other] for other in own):
                    near += 1
                else:
                    far += 1
    assert (found.received_near.sum(), found.received_far.sum()) == (near, far)
    assert (found.sent_near.sum(), found.sent_far.sum()) == (near, far)
    assert found.n_moved == near + far
    assert found.fraction == pytest.approx((near + far) / old.slot_to_expert.size)


@EXAMPLES
@given(s=loads)
def test_ranks_that_only_changed_names_keep_their_experts(s):
    load, n_ranks, n_slots, n_nodes = made(s)
    rng = np.random.default_rng(s["seed"])
    old = balanced(load, n_ranks, n_slots - load.shape[1])
    nodes = old.slot_to_expert.reshape(len(load), n_nodes, n_ranks // n_nodes, -1)
    shuffled = nodes[:, rng.permutation(n_nodes)][:, :, rng.permutation(n_ranks // n_nodes)]
    new = Placement(n_ranks, load.shape[1], shuffled.reshape(len(load), -1))
    back = aligned(old, new, ranks_per_domain=n_ranks // n_nodes)
    assert np.sort(back.rank_load(load)) == pytest.approx(np.sort(new.rank_load(load)))
    if not s["n_redundant"]:  # with replicas, two ranks may tie
        assert moved_experts(old, back).n_moved == 0


def test_following_a_small_change_moves_few_experts():
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 0.6, (8, 64))
    later = load * rng.lognormal(0, 0.1, load.shape)
    old = balanced(load, 8, 8)
    new = rebalanced(old, later)
    fresh = eplb(later, n_slots=72, n_ranks=8)

    def uneven(placement):
        by_rank = placement.rank_load(later)
        return float((by_rank.max(axis=-1) / by_rank.mean(axis=-1)).mean())

    assert uneven(new) < uneven(fresh) < uneven(old)
    assert moved_experts(old, new).fraction < 0.5 * moved_experts(old, fresh).fraction
    assert moved_experts(old, aligned(old, fresh)).fraction < moved_experts(old, fresh).fraction
    assert moved_experts(new, rebalanced(new, later)).n_moved == 0


def test_experts_chosen_together_come_to_one_node():
    ids = tokens(0, 2, 12)
    together = chosen_together(ids, 12)
    assert np.all(np.diagonal(together, axis1=1, axis2=2).sum(axis=-1) == ids.shape[0] * 2)
    assert np.array_equal(together, together.transpose(0, 2, 1))
    load = np.ones((2, 12))
    placement = coactivation(ids, load, n_slots=12, n_ranks=6, n_nodes=3)
    for row in placement.slot_to_expert:
        kinds = {frozenset(int(e) % 3 for e in node) for node in row.reshape(3, 4)}
        assert kinds == {frozenset([0]), frozenset([1]), frozenset([2])}


def test_placements_of_two_groups_are_not_compared():
    with pytest.raises(LayoutError, match="same ranks, experts and slots"):
        moved_experts(contiguous(8, 2), contiguous(8, 4))
    two, three = (Placement(1, 2, np.tile([0, 1], (n, 1))) for n in (2, 3))
    with pytest.raises(LayoutError, match="same layers"):
        moved_experts(two, three)
    with pytest.raises(LayoutError, match="placement's 8 experts"):
        rebalanced(contiguous(8, 2), np.ones((1, 4)))
    with pytest.raises(LayoutError, match="divide over nodes"):
        coactivation(np.zeros((1, 1, 1), int), np.ones((1, 8)), n_slots=8, n_ranks=4, n_nodes=3)
    with pytest.raises(LayoutError, match="1 layers"):
        coactivation(np.zeros((1, 2, 1), int), np.ones((1, 8)), n_slots=8, n_ranks=4, n_nodes=2)


def test_few_tokens_tell_the_groups_of_a_router_and_no_more():
    """64 experts in 4 groups, of which a token uses one: what is told of pairs holds for other tokens."""
    rng = np.random.default_rng(0)

    def drawn(n):
        group = rng.integers(0, 4, (n, 1, 1))
        score = rng.gumbel(size=(n, 1, 64)) + 20.0 * (np.arange(64) // 16 == group)
        return np.argsort(-score, axis=-1)[..., :4]

    few, truth = chosen_together(drawn(200), 64), chosen_together(drawn(20000), 64) / 100.0
    apart = ~np.eye(64, dtype=bool)
    errors = [np.abs((one - truth)[0][apart]).mean() for one in (few, smoothed(few, 4), smoothed(few, 1))]
    assert errors[1] < 0.8 * errors[0]
    assert errors[1] < 0.5 * errors[2]
    many = chosen_together(drawn(20000), 64)
    assert smoothed(many, 4)[0][apart] == pytest.approx(many[0][apart], rel=0.3, abs=2)
