"""Counting, traffic and exchanges against plain loops, and what must hold for any batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import LayoutError
from moesim.routing import (
    EXCHANGE_KINDS,
    Placement,
    RoutingShape,
    SyntheticRouting,
    contiguous,
    count_batch,
    eplb,
    exchange_counts,
    load_points,
    load_traffic,
    round_robin,
)
from moesim.routing.load import encode_batch
from moesim.routing.marginals import marginal_exchanges


def batch(seed, n_layers, n_ranks, n_tokens, top_k, n_experts):
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((n_layers, n_ranks, n_tokens, n_experts)), axis=-1)
    return order[..., :top_k].astype(np.uint16)


sizes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "n_layers": st.integers(1, 3),
        "n_tokens": st.integers(1, 6),
        "n_domains": st.integers(1, 3),
        "per_domain": st.integers(1, 3),
        "slots_per_rank": st.integers(1, 3),
        "top_k": st.integers(1, 4),
        "n_redundant": st.integers(0, 3),
    }
)


def case(s):
    n_ranks = s["n_domains"] * s["per_domain"]
    n_slots = n_ranks * s["slots_per_rank"]
    n_experts = max(1, n_slots - s["n_redundant"])
    top_k = min(s["top_k"], n_experts)
    rng = np.random.default_rng(s["seed"])
    placement = eplb(rng.random((s["n_layers"], n_experts)), n_slots=n_slots, n_ranks=n_ranks)
    ids = batch(s["seed"], s["n_layers"], n_ranks, s["n_tokens"], top_k, n_experts)
    return ids, placement, s["per_domain"]


def exchange_by_hand(ids, destinations, per_domain, kind):
    """Walk every token: sent_nvlink, received_nvlink, sent_nic, received_nic, each (n_layers, n_ranks)."""
    n_layers, n_ranks, n_tokens, _ = ids.shape
    out = np.zeros((4, n_layers, n_ranks))

    def move(layer, a, b):
        if a != b:
            level = 0 if a // per_domain == b // per_domain else 2
            out[level, layer, a] += 1
            out[level + 1, layer, b] += 1

    for layer, source, token in np.ndindex(n_layers, n_ranks, n_tokens):
        to = destinations[layer, source, token].tolist()
        if kind == "per_assignment":
            for rank in to:
                move(layer, source, rank)
        elif kind == "per_rank":
            for rank in set(to):
                move(layer, source, rank)
        else:
            for domain in {rank // per_domain for rank in to}:
                entry = domain * per_domain + source % per_domain
                move(layer, source, entry) if domain != source // per_domain else None
                for rank in {r for r in to if r // per_domain == domain}:
                    move(layer, entry, rank)
    return out


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_exchanges_agree_with_walking_every_token(s):
    ids, placement, per_domain = case(s)
    coded = encode_batch(ids, placement, ranks_per_domain=per_domain)
    destinations = np.moveaxis(coded.slots, 0, -1) // placement.slots_per_rank
    slots = np.moveaxis(coded.slots, 0, -1)
    for layer in range(ids.shape[0]):
        assert np.array_equal(placement.slot_to_expert[layer][slots[layer]], ids[layer])
    count = count_batch(ids, placement, ranks_per_domain=per_domain)
    quick = marginal_exchanges(coded, ranks_per_domain=per_domain)
    for kind in EXCHANGE_KINDS:
        expected = exchange_by_hand(ids, destinations, per_domain, kind)
        for found in (exchange_counts(count.traffic, kind, ranks_per_domain=per_domain), quick[kind]):
            got = [found.sent_nvlink, found.received_nvlink, found.sent_nic, found.received_nic]
            for mine, theirs in zip(got, expected, strict=True):
                assert np.array_equal(np.reshape(mine, theirs.shape), theirs)


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_every_token_is_processed_top_k_times_and_every_copy_arrives(s):
    ids, placement, per_domain = case(s)
    n_layers, n_ranks, n_tokens, top_k = ids.shape
    count = count_batch(ids, placement, ranks_per_domain=per_domain)
    assert (count.tokens_per_slot.sum((-2, -1)) == n_ranks * n_tokens * top_k).all()
    assert (count.traffic.assignments.sum(-1) == n_tokens * top_k).all()
    assert np.array_equal(count.traffic.assignments.sum(-2), count.tokens_per_rank)
    assert (count.traffic.copies_per_rank <= count.traffic.assignments).all()
    assert (count.traffic.copies_per_rank <= n_tokens).all()
    assert (count.traffic.copies_per_node.sum(-1) <= count.traffic.copies_per_rank.sum(-1)).all()
    assert (count.active_experts <= placement.slots_per_rank).all()
    for kind in EXCHANGE_KINDS:
        x = exchange_counts(count.traffic, kind, ranks_per_domain=per_domain)
        assert x.sent_nvlink.sum() == x.received_nvlink.sum()
        assert x.sent_nic.sum() == x.received_nic.sum()
        assert x.sent_nic.shape == (n_layers, n_ranks)


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_renaming_ranks_renames_the_load(s):
    ids, placement, _ = case(s)
    n_ranks = ids.shape[1]
    order = np.random.default_rng(s["seed"]).permutation(n_ranks)
    if placement.n_redundant:  # replicas take turns by rank, so only their sums are the same
        return
    before = count_batch(ids, placement)
    by_rank = placement.slot_to_expert.reshape(-1, n_ranks, placement.slots_per_rank)
    moved = Placement(n_ranks, placement.n_experts, by_rank[:, order].reshape(by_rank.shape[0], -1))
    after = count_batch(ids[:, order], moved)
    assert np.array_equal(after.tokens_per_slot, before.tokens_per_slot[:, order])
    wanted = before.traffic.copies_per_rank[:, order][:, :, order]
    assert np.array_equal(after.traffic.copies_per_rank, wanted)


@settings(max_examples=30, deadline=None)
@given(sizes, st.data())
def test_nested_batches_are_counted_as_if_alone(s, data):
    ids, placement, per_domain = case(s)
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, ids.shape[2]), min_size=1))))
    nested = count_batch(ids, placement, ranks_per_domain=per_domain, n_tokens=cuts)
    for i, n in enumerate(cuts):
        alone = count_batch(ids[:, :, :n], placement, ranks_per_domain=per_domain)
        assert np.array_equal(nested.tokens_per_slot[i], alone.tokens_per_slot)
        assert np.array_equal(nested.traffic.copies_per_node[i], alone.traffic.copies_per_node)
        assert np.array_equal(nested.traffic.copies_per_rank[i], alone.traffic.copies_per_rank)


@pytest.mark.parametrize(("n_ranks", "expected"), [(16, 6.52), (32, 7.27), (64, 7.68), (128, 7.89)])
def test_ranks_reached_by_uniform_routing(n_ranks, expected):
    """F-DISTINCT: R (1 - C(E - E/R, k) / C(E, k)) distinct ranks for E = 256, k = 8."""
    ids = batch(1, 1, n_ranks, 6000 // n_ranks, 8, 256)
    traffic = count_batch(ids, contiguous(256, n_ranks)).traffic
    n_tokens = n_ranks * ids.shape[2]
    assert traffic.copies_per_rank.sum() / n_tokens == pytest.approx(expected, abs=0.05)
    assert traffic.copies_per_node.sum() == n_tokens


def test_replicas_share_their_expert_evenly():
    placement = eplb([[100.0, 1, 1, 1]], n_slots=8, n_ranks=8)
    assert placement.n_replicas[0].tolist() == [5, 1, 1, 1]
    ids = np.zeros((1, 8, 50, 1), dtype=np.uint16)
    load = count_batch(ids, placement).tokens_per_slot[0].sum(-1)
    assert sorted(load.tolist()) == [0, 0, 0, 80, 80, 80, 80, 80]


def test_last_domain_may_be_partly_filled_but_not_for_two_level():
    ids = batch(0, 1, 6, 4, 2, 12)
    count = count_batch(ids, contiguous(12, 6), ranks_per_domain=4)
    assert count.traffic.copies_per_node.shape == (1, 6, 2)
    assert exchange_counts(count.traffic, "per_rank", ranks_per_domain=4).sent_nic.sum() > 0
    with pytest.raises(LayoutError, match="6: two-level exchange has whole domains of 4 ranks"):
        exchange_counts(count.traffic, "two_level", ranks_per_domain=4)
    coded = encode_batch(ids, contiguous(12, 6), ranks_per_domain=4)
    assert set(marginal_exchanges(coded, ranks_per_domain=4)) == {"per_rank", "per_assignment"}


def test_batches_that_do_not_fit_are_refused():
    ids = batch(0, 2, 4, 3, 2, 8)
    with pytest.raises(LayoutError, match="8 ranks are those that hold tokens"):
        count_batch(ids, contiguous(8, 8))
    with pytest.raises(LayoutError, match="one for each of the 2 MoE layers"):
        count_batch(ids, Placement(4, 8, np.tile(np.arange(8), (3, 1))))
    with pytest.raises(LayoutError, match="nested batches ascend"):
        count_batch(ids, contiguous(8, 4), n_tokens=(2, 2))
    with pytest.raises(LayoutError, match="nested batches ascend"):
        count_batch(ids, contiguous(8, 4), n_tokens=(4,))
    with pytest.raises(LayoutError, match=r"experts of a batch lie in 0..3"):
        count_batch(ids, contiguous(4, 4))
    with pytest.raises(LayoutError, match="'multicast': unknown kind of exchange; fix: one of two_level"):
        exchange_counts(count_batch(ids, round_robin(8, 4)).traffic, "multicast")


@pytest.mark.parametrize("n_ranks", [8, 72])
@pytest.mark.parametrize("n_tokens", [1, 3, 16, 100])
def test_traffic_of_a_size_has_the_sums_that_its_load_has(n_ranks, n_tokens):
    """Of 16 tokens drawn a rank: fewer are its first, more are it scaled; above 64 ranks sums are counted apart."""
    shape = RoutingShape(2, 144, 4)
    asked = {"placement": contiguous(144, n_ranks), "phase": "decode", "ranks_per_domain": 8, "seed": 3}
    drawn = {"source": SyntheticRouting.zipf(1.0), "shape": shape, **asked, "max_tokens": 16 * n_ranks}
    traffic = load_traffic(n_tokens=n_tokens, **drawn)
    wanted = load_points(tokens_per_rank=[n_tokens], **drawn)
    for kind in EXCHANGE_KINDS:
        found = exchange_counts(traffic, kind, ranks_per_domain=8)
        for name in ("sent_nvlink", "received_nvlink", "sent_nic", "received_nic"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted.exchanges[kind], name)[0])
