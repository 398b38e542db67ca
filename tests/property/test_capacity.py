"""Capacities against plain loops, and what holds for every batch and policy."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import LayoutError
from moesim.routing import (
    CapacityPolicy,
    Placement,
    RoutingShape,
    SyntheticRouting,
    apply_capacity,
    contiguous,
    count_batch,
    default_routing,
    eplb,
    load_points,
    load_traffic,
)
from moesim.routing.load import encode_slots, exchange_counts, slots_of
from moesim.routing.marginals import marginal_exchanges

CONVENTIONS = ("megatron", "tutel", "megablocks")
OVERFLOWS = ("drop-position", "drop-weight", "reroute")
EXAMPLES = settings(max_examples=80, deadline=None)

cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "n_layers": st.integers(1, 3),
        "n_ranks": st.integers(1, 4),
        "n_tokens": st.integers(1, 12),
        "slots_per_rank": st.integers(1, 4),
        "n_redundant": st.integers(0, 3),
        "top_k": st.integers(1, 4),
        "factor": st.sampled_from([0.3, 0.7, 1.0, 1.25, 2.0]),
        "convention": st.sampled_from(CONVENTIONS),
        "overflow": st.sampled_from(OVERFLOWS),
    }
)


def made(s):
    """Ids (skewed), weights that fall along a token's choices, what comes after, placement, policy."""
    rng = np.random.default_rng(s["seed"])
    n_slots = s["n_ranks"] * s["slots_per_rank"]
    n_experts = max(1, n_slots - s["n_redundant"])
    top_k = min(s["top_k"], n_experts)
    size = (s["n_layers"], s["n_ranks"], s["n_tokens"], n_experts)
    order = np.argsort(rng.gumbel(size=size) + 2.0 * rng.standard_normal(n_experts), axis=-1)[..., ::-1]
    weights = -np.sort(-rng.random((*size[:3], top_k)), axis=-1).astype(np.float16)
    placement = eplb(rng.random((s["n_layers"], n_experts)), n_slots=n_slots, n_ranks=s["n_ranks"])
    policy = CapacityPolicy(s["factor"], s["convention"], s["overflow"])
    ids, more = order[..., :top_k].astype(np.uint16), order[..., top_k:].astype(np.uint16)
    return ids, weights, more, placement, policy


def by_hand(ids, weights, more, placement, policy):
    """Slots and fates of every copy, {(layer, rank, token, choice): slot or None}, one copy at a time."""
    n_layers, n_ranks, n_tokens, top_k = ids.shape
    n_slots = placement.n_slots
    first = np.moveaxis(slots_of(np.ascontiguousarray(np.moveaxis(ids, -1, 0)), placement), 0, -1)
    most = policy.rows_per_slot(n_tokens, n_ranks, n_slots, top_k)
    where = {}
    for layer in range(n_layers):
        sources = [[r] for r in range(n_ranks)] if policy.per_source else [list(range(n_ranks))]
        for ranks in sources:
            copies = [(r, t, k) for r in ranks for t in range(n_tokens) for k in range(top_k)]

            def turn(copy, layer=layer):
                rank, token, choice = copy
                weight = -float(weights[layer, rank, token, choice])
                if policy.convention == "tutel":
                    heaviest = -float(weights[layer, rank, token].max())
                    by = (choice, heaviest) if policy.overflow == "drop-weight" else (choice,)
                    return (*by, rank, token)
                return (weight, rank, token) if policy.overflow == "drop-weight" else (rank, token)

            used = Counter()
            waiting = []
            for copy in sorted(copies, key=turn):
                slot = int(first[layer][copy])
                if used[slot] < most:
                    used[slot] += 1
                    where[layer, *copy] = slot
                else:
                    where[layer, *copy] = None
                    waiting.append(copy)
            if policy.overflow == "reroute":
                reroute_by_hand(layer, waiting, where, used, most, ids, more, placement)
    return where


def reroute_by_hand(layer, waiting, where, used, most, ids, more, placement):
    held = {}
    asked = Counter()
    for rank, token, _ in waiting:
        held.setdefault((rank, token), set(ids[layer, rank, token].tolist()))
    table = placement.replica_table[layer]
    for _ in range(more.shape[-1]):
        for choice in range(ids.shape[-1]):
            for copy in sorted(one for one in waiting if one[2] == choice):
                rank, token, _ = copy
                if where[layer, *copy] is not None or asked[rank, token] >= more.shape[-1]:
                    continue
                expert = int(more[layer, rank, token, asked[rank, token]])
                asked[rank, token] += 1
                slot = int(table[expert, (rank + token) % table.shape[-1]])
                if expert not in held[rank, token] and used[slot] < most:
                    used[slot] += 1
                    held[rank, token].add(expert)
                    where[layer, *copy] = slot


@EXAMPLES
@given(cases)
def test_every_policy_agrees_with_a_loop(s):
    ids, weights, more, placement, policy = made(s)
    found = apply_capacity(ids, placement, policy, weights=weights, next_ids=more)
    expected = by_hand(ids, weights, more, placement, policy)
    first = slots_of(np.ascontiguousarray(np.moveaxis(ids, -1, 0)), placement)
    for (layer, rank, token, choice), slot in expected.items():
        at = (choice, layer, rank, token)
        assert found.slots[at] == (placement.n_slots if slot is None else slot), at
        assert found.dropped[at] == (slot is None)
        assert found.rerouted[at] == (slot is not None and slot != first[at])


def per_row(slots, placement, policy):
    """Copies of each row and slot."""
    n_slots = placement.n_slots
    hot = (slots[..., None] == np.arange(n_slots)).sum(axis=0)
    return hot.sum(axis=2) if policy.per_source else hot.sum(axis=(1, 2))[:, None]


@EXAMPLES
@given(cases, st.booleans())
def test_copies_are_conserved_and_no_expert_takes_more_than_its_capacity(s, known):
    ids, weights, more, placement, policy = made(s)
    found = apply_capacity(ids, placement, policy, weights=weights, next_ids=more if known else None)
    n_layers, n_ranks, n_tokens, top_k = ids.shape
    kept = (found.slots == found.asked) & ~found.rerouted & ~found.dropped
    assert np.all(kept.astype(int) + found.dropped + found.rerouted == 1)
    most = policy.rows_per_slot(n_tokens, n_ranks, placement.n_slots, top_k)
    assert per_row(found.slots, placement, policy).max() <= most
    if policy.overflow != "reroute":
        wanted = per_row(found.asked, placement, policy)
        assert np.array_equal(per_row(found.slots, placement, policy), np.minimum(wanted, most))
    # a token's experts stay distinct
    table = np.broadcast_to(placement.slot_to_expert, (n_layers, placement.n_slots))
    for layer, rank, token in np.ndindex(n_layers, n_ranks, n_tokens):
        own = [x for x in found.slots[:, layer, rank, token].tolist() if x < placement.n_slots]
        assert len({int(table[layer, x]) for x in own}) == len(own)


@EXAMPLES
@given(cases)
def test_a_wide_capacity_changes_nothing(s):
    ids, weights, _, placement, policy = made(s)
    wide = CapacityPolicy(float(placement.n_slots), policy.convention, policy.overflow)
    found = apply_capacity(ids, placement, wide, weights=weights)
    assert not found.dropped.any()
    assert not found.rerouted.any()
    assert np.array_equal(found.slots, found.asked)
    coded = encode_slots(found.slots, placement, ranks_per_domain=2, has_gaps=True)
    plain = count_batch(ids, placement, ranks_per_domain=2)
    assert np.array_equal(coded.tokens_per_slot()[0], plain.tokens_per_slot)
    for name in ("copies_per_rank", "copies_per_node", "assignments"):
        assert np.array_equal(getattr(coded.traffic(), name)[0], getattr(plain.traffic, name))


@EXAMPLES
@given(cases)
def test_traffic_is_of_the_copies_that_are_left(s):
    ids, weights, _, placement, policy = made(s)
    slots = apply_capacity(ids, placement, policy, weights=weights).slots
    traffic = encode_slots(slots, placement, ranks_per_domain=2, has_gaps=True).traffic()
    n_layers, n_ranks, n_tokens, _ = ids.shape
    expected = np.zeros((3, n_layers, n_ranks, n_ranks), dtype=int)
    for layer, rank, token in np.ndindex(n_layers, n_ranks, n_tokens):
        own = slots[:, layer, rank, token]
        to = (own[own < placement.n_slots] // placement.slots_per_rank).tolist()
        for one in to:
            expected[0, layer, rank, one] += 1
        for one in set(to):
            expected[1, layer, rank, one] += 1
        for one in {t // 2 for t in to}:
            expected[2, layer, rank, one] += 1
    assert np.array_equal(traffic.assignments[0], expected[0])
    assert np.array_equal(traffic.copies_per_rank[0], expected[1])
    assert np.array_equal(traffic.copies_per_node[0], expected[2][..., : traffic.copies_per_node.shape[-1]])


@EXAMPLES
@given(cases)
def test_sums_by_class_leave_out_dropped_copies_too(s):
    ids, weights, _, placement, policy = made(s)
    slots = apply_capacity(ids, placement, policy, weights=weights).slots
    coded = encode_slots(slots, placement, ranks_per_domain=2, has_gaps=True)
    for kind, found in marginal_exchanges(coded, ranks_per_domain=2).items():
        expected = exchange_counts(coded.traffic(), kind, ranks_per_domain=2)
        for name in ("sent_nvlink", "received_nvlink", "sent_nic", "received_nic"):
            assert np.array_equal(getattr(found, name), getattr(expected, name)), (kind, name)


@EXAMPLES
@given(cases, st.booleans())
def test_experts_that_choose_take_exactly_their_capacity(s, weighed):
    ids, weights, _, placement, policy = made(s)
    policy = CapacityPolicy(policy.factor, policy.convention, router="expert-choice")
    found = apply_capacity(ids, placement, policy, weights=weights if weighed else None)
    _, n_ranks, n_tokens, top_k = ids.shape
    most = policy.rows_per_slot(n_tokens, n_ranks, placement.n_slots, top_k)
    row = n_tokens * (1 if policy.per_source else n_ranks)
    assert np.all(per_row(found.slots, placement, policy) == min(most, row))
    # a slot takes a token once, and one that chose it before one that did not
    for layer, rank, token in np.ndindex(*ids.shape[:3]):
        own = [x for x in found.slots[:, layer, rank, token].tolist() if x < placement.n_slots]
        assert len(set(own)) == len(own)
        for choice in range(top_k):
            taken = int(found.asked[choice, layer, rank, token]) in own
            assert taken != found.dropped[choice, layer, rank, token]
    wanted = per_row(found.asked, placement, policy)
    kept = np.where(found.dropped, placement.n_slots, found.asked)
    assert np.array_equal(per_row(kept, placement, policy), np.minimum(wanted, most))


SHAPE = RoutingShape(3, 16, 4)
SOURCE = SyntheticRouting.zipf(0.8)


def points(capacity, sizes=(16, 64), placement=None, **more):
    placement = placement or contiguous(16, 4)
    return load_points(
        SOURCE, SHAPE, tokens_per_rank=sizes, placement=placement, phase="decode", ranks_per_domain=2,
        capacity=capacity, **more,
    )  # fmt: skip


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_large_factor_prices_as_none(convention, overflow):
    plain = points(None, (16, 64, 5000), max_tokens=1024)
    wide = points(CapacityPolicy(16.0, convention, overflow), (16, 64, 5000), max_tokens=1024)
    assert np.allclose(wide.tokens_per_slot, plain.tokens_per_slot, rtol=0.02, atol=0.5)
    assert np.array_equal(wide.tokens_per_slot[:2], plain.tokens_per_slot[:2])
    for kind, one in plain.exchanges.items():
        assert np.allclose(wide.exchanges[kind].sent_nic, one.sent_nic)
    assert np.all(wide.loss.dropped_fraction < 1e-9)
    assert np.all(wide.loss.rerouted_fraction == 0)


@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_larger_batches_are_extrapolated_to_what_a_whole_draw_gives(convention, overflow):
    policy = CapacityPolicy(1.1, convention, overflow)
    few = points(policy, (1024,), max_tokens=1024, seed=1)
    all_ = points(policy, (1024,), max_tokens=4096, seed=1)
    assert few.n_drawn == 256
    assert all_.n_drawn == 1024
    assert few.loss.dropped_fraction[0] == pytest.approx(all_.loss.dropped_fraction[0], abs=0.015)
    assert few.loss.rerouted_fraction[0] == pytest.approx(all_.loss.rerouted_fraction[0], abs=0.02)
    assert few.tokens_per_rank.sum() == pytest.approx(all_.tokens_per_rank.sum(), rel=0.015)
    busiest = [one.tokens_per_rank[0].max(-1).mean() for one in (few, all_)]
    assert busiest[0] == pytest.approx(busiest[1], rel=0.03)
    sent = [one.exchanges["per_assignment"].sent_nic.sum() for one in (few, all_)]
    assert sent[0] == pytest.approx(sent[1], rel=0.02)


def test_rows_and_copies_are_of_one_draw():
    """What arrives from other ranks, and stays on its own, is what the slots compute."""
    policy = CapacityPolicy(1.0)
    load = points(policy)
    for point, n in enumerate((16, 64)):
        traffic = load_traffic(
            SOURCE, SHAPE, n_tokens=n, placement=contiguous(16, 4), phase="decode", ranks_per_domain=2,
            capacity=policy,
        )  # fmt: skip
        assert np.array_equal(traffic.assignments.sum(axis=1), load.tokens_per_rank[point])
        whole = SHAPE.n_layers * 4 * n * SHAPE.top_k
        assert traffic.assignments.sum() == pytest.approx(whole * (1 - load.loss.dropped_fraction[point]))


def test_padded_experts_compute_their_capacity_and_buffers_travel_whole():
    policy = CapacityPolicy(1.25, padding="capacity")
    load = points(policy, (64,))
    most = policy.rows_per_slot(64, 4, 16, 4)
    assert np.all(load.tokens_per_slot == 4 * most)
    kept = 1 - load.loss.dropped_fraction[0]
    assert load.loss.padding_fraction[0] == pytest.approx(1 - kept * 64 * 4 * 4 / (4 * 16 * most))
    # one peer in the domain and two outside, four slots on each
    assert np.all(load.padded.sent_nvlink == 4 * most)
    assert np.all(load.padded.received_nic == 2 * 4 * most)
    bare = points(CapacityPolicy(1.25), (64,))
    assert bare.padded is None
    for kind, one in bare.exchanges.items():
        assert np.array_equal(load.exchanges[kind].sent_nvlink, one.sent_nvlink)


def test_megablocks_drops_after_the_exchange_and_megatron_before():
    plain = points(None, (64,))
    after, before = points(CapacityPolicy(1.0, "megablocks"), (64,)), points(CapacityPolicy(1.0), (64,))
    assert after.loss.dropped_fraction[0] > 0.1
    for kind, one in plain.exchanges.items():
        assert np.array_equal(after.exchanges[kind].received_nic, one.received_nic)
        assert before.exchanges[kind].received_nic.sum() < one.received_nic.sum()


def test_a_capacity_per_rank_drops_more_than_one_for_all():
    """Ranks cannot lend one another the room that their own tokens leave."""
    own = points(CapacityPolicy(1.25, "megatron"), (64,)).loss.dropped_fraction[0]
    shared = points(CapacityPolicy(1.25, "megablocks"), (64,)).loss.dropped_fraction[0]
    assert own > shared


def test_a_capacity_that_rounds_to_nothing():
    """MegaBlocks takes 0 rows for no limit; Tutel drops everything."""
    assert CapacityPolicy(0.5, "megablocks").rows_per_slot(1, 4, 16, 2) == 4
    few, plain = points(CapacityPolicy(0.5, "megablocks", padding="capacity"), (1,)), points(None, (1,))
    busiest = plain.tokens_per_slot.max(axis=(2, 3), keepdims=True)
    assert np.array_equal(few.tokens_per_slot, np.broadcast_to(busiest, plain.tokens_per_slot.shape))
    assert few.loss.dropped_fraction[0] == 0
    assert CapacityPolicy(0.5, "tutel").rows_per_slot(8, 4, 16, 2) == 0
    ids = np.zeros((1, 2, 2, 1), dtype=np.uint16)
    found = apply_capacity(ids, Placement(2, 2, np.array([[0, 1]])), CapacityPolicy(0.5, "tutel"))
    assert found.dropped.all()
    chosen = apply_capacity(
        ids, Placement(2, 2, np.array([[0, 1]])), CapacityPolicy(0.5, "tutel", router="expert-choice")
    )
    assert np.all(chosen.slots == 2)
    for router in ("top-k", "expert-choice"):
        none = points(
            CapacityPolicy(0.01, "tutel", padding="capacity", router=router), (16, 600), max_tokens=256
        )
        assert not none.tokens_per_slot.any()
        assert np.all(none.loss.tokens_without_expert_fraction == 1)
        assert np.all(none.loss.padding_fraction == 0)
        assert not none.exchanges["per_rank"].sent_nic.any()


def test_a_draw_too_large_to_sort_is_refused():
    ids = np.zeros((1, 1, 2**16 + 1, 1), dtype=np.uint16)
    with pytest.raises(LayoutError, match="at most 65536"):
        apply_capacity(ids, Placement(1, 1, np.array([[0]])), CapacityPolicy(1.0))


@pytest.mark.parametrize("convention", ["megatron", "tutel", "megablocks"])
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_rerouting_beyond_the_size_drawn_makes_no_rows_of_nothing(convention, factor):
    shape, n_tokens, ep = RoutingShape(2, 64, 8, 8, 4), 512, 16
    load = load_points(
        default_routing(),
        shape,
        tokens_per_rank=[n_tokens],
        placement=contiguous(64, ep),
        phase="prefill",
        ranks_per_domain=8,
        max_tokens=1024,
        capacity=CapacityPolicy(factor, convention, "reroute"),
    )
    asked = n_tokens * ep * shape.top_k * shape.n_layers
    rows, loss = float(load.tokens_per_slot.sum()), load.loss
    assert loss is not None
    assert rows <= asked * (1 + 1e-9)
    assert rows >= 0.95 * asked
    assert rows / asked == pytest.approx(1 - float(loss.dropped_fraction[0]), abs=1e-9)
