"""Draws: distinct experts, the right share each, locality, and the same from the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.routing import (
    RoutingShape,
    RoutingTrace,
    SyntheticRouting,
    contiguous,
    default_routing,
    draw_batch,
    eplb,
    inclusion,
    load_points,
    popularity,
)
from moesim.routing.banks import prefill_bank
from moesim.routing.sampling import inclusion_probabilities, systematic_draw


def distinct(ids):
    ordered = np.sort(ids.astype(int), axis=-1)
    return (np.diff(ordered, axis=-1) > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.data())
def test_inclusion_adds_up_and_keeps_the_order(seed, n_items, data):
    n_drawn = data.draw(st.integers(1, n_items))
    weights = np.random.default_rng(seed).lognormal(0, 2, (3, n_items))
    p = inclusion_probabilities(weights, n_drawn)
    assert p.sum(-1) == pytest.approx(n_drawn, rel=1e-5)
    assert (p > 0).all()
    assert (p <= 1).all()
    by_weight = np.take_along_axis(p, np.argsort(weights, axis=-1), -1)
    assert (np.diff(by_weight, axis=-1) >= -1e-9).all()


def test_inclusion_is_proportional_where_nothing_is_capped():
    assert inclusion_probabilities(np.array([1, 2, 3, 4]), 2) == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_inclusion_of_no_counts_is_uniform_and_too_many_are_refused():
    assert inclusion_probabilities(np.zeros(4), 2) == pytest.approx([0.5] * 4)
    with pytest.raises(TraceError, match="5: top_k is at most n_experts; fix: top_k <= 4"):
        inclusion_probabilities(np.ones(4), 5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 30), st.data())
def test_systematic_draws_are_distinct_even_with_certain_experts(seed, n_items, data):
    n_drawn = data.draw(st.integers(1, n_items))
    rng = np.random.default_rng(seed)
    p = inclusion_probabilities(rng.lognormal(0, 4, (5, n_items)), n_drawn)
    ids = systematic_draw(p, rng.random((5, 20)), n_drawn, rng)
    assert distinct(ids)
    assert ids.max() < n_items


def test_systematic_marginals_are_the_inclusions():
    rng = np.random.default_rng(0)
    p = inclusion_probabilities(rng.lognormal(0, 1.0, (1, 32)), 4)
    n_rows, n_tokens = 500, 40
    ids = systematic_draw(np.repeat(p, n_rows, 0), rng.random((n_rows, n_tokens)), 4, rng)
    found = np.bincount(ids.ravel(), minlength=32) / (n_rows * n_tokens)
    error = (found - p[0]) / np.sqrt(p[0] * (1 - p[0]) / (n_rows * n_tokens))
    assert np.abs(error).max() < 4.5


GROUPED = RoutingShape(3, 64, 6, n_groups=8, n_top_groups=3)


@pytest.mark.parametrize("shape", [RoutingShape(3, 64, 6), GROUPED])
@pytest.mark.parametrize(
    "source", [default_routing(), SyntheticRouting.uniform(), SyntheticRouting.zipf(0.8)]
)
def test_batches_of_a_generator_have_its_popularity(source, shape):
    ids = draw_batch(source, shape, n_ranks=64, n_tokens=256, phase="decode", rng=np.random.default_rng(1))
    assert ids.shape == (3, 64, 256, 6)
    assert distinct(ids)
    p = popularity(source, shape)
    found = np.stack([np.bincount(layer.ravel(), minlength=64) for layer in ids]) / (64 * 256)
    # Chunks of tokens that share their groups, and an expert nearly as busy as its group, cost a little.
    assert np.abs(found - p).sum(-1).max() / 6 < (0.06 if shape is GROUPED else 0.04)


@pytest.mark.parametrize(("shape", "noise"), [(RoutingShape(3, 64, 6), 0.01), (GROUPED, 0.10)])
def test_requests_of_a_bank_have_the_popularity_together(shape, noise):
    source = default_routing()
    p, rng = popularity(source, shape), np.random.default_rng(1)
    bank = prefill_bank(p, shape, source, rng, n_sequences=64, sequence_length=64)
    assert bank.shape == (6, 3, 4096)
    assert distinct(np.moveaxis(bank, 0, -1))
    found = np.stack([np.bincount(bank[:, layer].ravel(), minlength=64) for layer in range(3)]) / 4096
    assert np.abs(found - p).sum(-1).max() / 6 < noise


def test_requests_without_preferences_are_balanced_in_prefill_too():
    load = points(SyntheticRouting.uniform(), phase="prefill", tokens_per_rank=[128])
    assert (load.tokens_per_rank.max(-1) / load.tokens_per_rank.mean(-1)).max() < 1.15


def test_group_limited_tokens_stay_in_their_groups():
    rng = np.random.default_rng(0)
    ids = draw_batch(default_routing(), GROUPED, n_ranks=4, n_tokens=200, phase="decode", rng=rng)
    groups = np.sort(ids // 8, axis=-1)
    assert ((np.diff(groups, axis=-1) > 0).sum(-1) + 1).max() == 3


def shared(a, b):
    return (a[..., :, None] == b[..., None, :]).any(-1).mean()


def test_prefill_keeps_experts_from_token_to_token_and_decode_does_not():
    shape = RoutingShape(6, 32, 4)
    source = default_routing()
    rng = np.random.default_rng(0)
    prefill = draw_batch(source, shape, n_ranks=20, n_tokens=64, phase="prefill", rng=rng)
    decode = draw_batch(source, shape, n_ranks=20, n_tokens=64, phase="decode", rng=rng)
    next_token = shared(prefill[:, :, :-1], prefill[:, :, 1:])
    same_request = shared(prefill[:, :, :-32], prefill[:, :, 32:])
    apart = shared(decode[:, :, :-1], decode[:, :, 1:])
    assert next_token > same_request + 0.05
    assert same_request > apart + 0.05


def token_trace():
    """Two requests that never share an expert: ids 0..3 and 4..7."""
    rng = np.random.default_rng(0)
    first = np.argsort(rng.random((30, 2, 4)), axis=-1)[..., :2]
    second = np.argsort(rng.random((60, 2, 4)), axis=-1)[..., :2] + 4
    ids = np.concatenate([first, second]).astype(np.uint8)
    return RoutingTrace("toy", 8, 2, (0, 1), expert_ids=ids, sequence_offsets=np.array([0, 30, 90]))


def test_decode_takes_different_requests_while_there_are_any():
    rng = np.random.default_rng(0)
    ids = draw_batch(token_trace(), RoutingShape(2, 8, 2), n_ranks=50, n_tokens=2, phase="decode", rng=rng)
    from_second = (ids[0, :, :, 0] >= 4).sum(-1)
    assert (from_second == 1).all()


def test_longer_requests_are_met_more_often():
    rng = np.random.default_rng(0)
    ids = draw_batch(token_trace(), RoutingShape(2, 8, 2), n_ranks=3000, n_tokens=1, phase="decode", rng=rng)
    assert (ids[0, :, 0, 0] >= 4).mean() == pytest.approx(2 / 3, abs=0.04)


def test_prefill_takes_whole_requests_in_order():
    trace = token_trace()
    rng = np.random.default_rng(0)
    ids = draw_batch(trace, RoutingShape(2, 8, 2), n_ranks=6, n_tokens=200, phase="prefill", rng=rng)
    real = np.asarray(trace.expert_ids)
    for rank in range(6):
        mine = ids[:, rank].transpose(1, 0, 2)
        start = 0 if mine[0, 0, 0] < 4 else 30
        length = 30 if start == 0 else 60
        assert np.array_equal(mine[:length], real[start : start + length])


@pytest.mark.parametrize(("n_layers", "wanted"), [(1, [0]), (2, [0, 1]), (5, [0, 1, 0, 1, 0])])
def test_trace_of_another_depth_is_cut_or_cycled(n_layers, wanted):
    trace = token_trace()
    p = inclusion(trace, RoutingShape(n_layers, 8, 2))
    assert p == pytest.approx((trace.counts / trace.n_tokens)[wanted])
    ids = draw_batch(
        trace,
        RoutingShape(n_layers, 8, 2),
        n_ranks=1,
        n_tokens=4,
        phase="prefill",
        rng=np.random.default_rng(0),
    )
    assert ids.shape[0] == n_layers
    assert np.array_equal(ids[0], ids[-1]) is (n_layers == 5 or n_layers == 1)


def test_counts_only_trace_is_drawn_with_its_own_popularity():
    counts = np.random.default_rng(0).integers(10, 5000, (1, 2, 32))
    trace = RoutingTrace("toy", 32, None, (3, 4), expert_counts=counts)
    shape = RoutingShape(2, 32, 4)
    ids = draw_batch(trace, shape, n_ranks=64, n_tokens=256, phase="decode", rng=np.random.default_rng(0))
    found = np.stack([np.bincount(layer.ravel(), minlength=32) for layer in ids]) / (64 * 256)
    assert np.abs(found - inclusion(trace, shape)).sum(-1).max() / 4 < 0.04


def test_trace_of_another_model_is_refused_with_a_way_out():
    rng = np.random.default_rng(0)
    for shape, said in (
        (
            RoutingShape(2, 16, 2),
            "8: the trace of toy has the model's 16 experts per layer; fix: use routing `default`",
        ),
        (RoutingShape(2, 8, 4), "2: the trace of toy has the model's top_k 4"),
    ):
        with pytest.raises(TraceError, match=said):
            draw_batch(token_trace(), shape, n_ranks=1, n_tokens=1, phase="decode", rng=rng)
    with pytest.raises(TraceError, match="at least one rank and one token"):
        draw_batch(token_trace(), RoutingShape(2, 8, 2), n_ranks=1, n_tokens=0, phase="decode", rng=rng)


@pytest.mark.parametrize("figures", [(0, 8, 2), (1, 8, 9), (1, 8, 2, 3, 1), (1, 8, 2, 4, 5), (1, 8, 6, 4, 2)])
def test_impossible_shapes_are_refused(figures):
    with pytest.raises(TraceError):
        RoutingShape(*figures)


def points(source=None, **changes):
    arguments = {
        "tokens_per_rank": [4, 1, 600, 32],
        "placement": contiguous(32, 8),
        "phase": "decode",
        "ranks_per_domain": 4,
        "max_tokens": 1024,
        **changes,
    }
    return load_points(source or default_routing(), RoutingShape(3, 32, 4), **arguments)


def test_same_seed_same_loads_other_seed_others():
    one, again, other = points(seed=5), points(seed=5), points(seed=6)
    assert np.array_equal(one.tokens_per_slot, again.tokens_per_slot)
    assert not np.array_equal(one.tokens_per_slot, other.tokens_per_slot)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_points_conserve_tokens_below_and_above_the_size_drawn(phase):
    load = points(phase=phase)
    assert load.n_drawn == 128
    wanted = np.array([4, 1, 600, 32]) * 8 * 4
    assert load.tokens_per_slot.sum((-2, -1)) == pytest.approx(np.repeat(wanted[:, None], 3, 1))
    assert np.array_equal(load.tokens_per_slot[0], np.round(load.tokens_per_slot[0]))
    for x in load.exchanges.values():
        assert x.sent_nvlink.sum(-1) == pytest.approx(x.received_nvlink.sum(-1))
        assert x.sent_nic.sum(-1) == pytest.approx(x.received_nic.sum(-1))
    direct = load.exchanges["per_assignment"]
    moved = (direct.sent_nvlink + direct.sent_nic).sum(-1)
    assert (moved <= wanted[:, None]).all()
    assert moved[2] == pytest.approx(wanted[2] * 7 / 8, rel=0.06)
    assert (load.active_experts <= 4).all()
    assert (np.diff(load.active_experts[[1, 0, 3, 2]].sum((-1, -2))) >= 0).all()


def test_large_batches_come_closer_to_the_mean_load():
    load = points(tokens_per_rank=[128, 12800], placement=contiguous(32, 8))
    p = contiguous(32, 8).rank_load(inclusion(default_routing(), RoutingShape(3, 32, 4)))
    share = load.tokens_per_rank / load.tokens_per_rank.sum(-1, keepdims=True)
    error = np.abs(share - p / p.sum(-1, keepdims=True)).sum((-1, -2))
    assert error[1] == pytest.approx(error[0] / 10, rel=0.05)


def test_matrix_and_marginal_ways_give_the_same_points(monkeypatch):
    one = points()
    monkeypatch.setattr("moesim.routing.marginals._LARGEST_MATRIX", 1)
    other = points()
    for kind, x in one.exchanges.items():
        y = other.exchanges[kind]
        for name in ("sent_nvlink", "received_nvlink", "sent_nic", "received_nic"):
            assert getattr(x, name) == pytest.approx(getattr(y, name))


def test_partly_filled_domains_have_no_two_level_exchange():
    assert set(points(ranks_per_domain=3).exchanges) == {"per_rank", "per_assignment"}
    assert points(ranks_per_domain=None).exchanges["two_level"].sent_nic.sum() == 0


@pytest.mark.parametrize("bad", [[], [0], [4, -1]])
def test_empty_batches_are_refused(bad):
    with pytest.raises(TraceError, match="batch sizes are at least 1"):
        points(tokens_per_rank=bad)


def test_balanced_placement_lowers_the_busiest_rank():
    source, shape = default_routing(), RoutingShape(3, 32, 4)
    spread = eplb(inclusion(source, shape), n_slots=40, n_ranks=8)
    plain = points(tokens_per_rank=[100]).tokens_per_rank.max(-1).mean()
    better = points(tokens_per_rank=[100], placement=spread).tokens_per_rank.max(-1).mean()
    assert better < 0.85 * plain


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)])
def test_linked_layers_tell_of_each_other(groups):
    def dependence(layer_link):
        source = SyntheticRouting("linked", layer_link=layer_link)
        shape = RoutingShape(2, 32, 4, *groups)
        ids = draw_batch(source, shape, n_ranks=8, n_tokens=512, phase="decode", rng=np.random.default_rng(0))
        chosen = np.zeros((2, 4096, 32))
        np.put_along_axis(chosen, ids.reshape(2, 4096, 4).astype(int), 1.0, -1)
        given = chosen[0].T @ chosen[1] / chosen[0].sum(0)[:, None]
        return np.abs(given - chosen[1].mean(0)).sum(-1).mean() / 8

    assert dependence(1.0) > 2 * dependence(0.0)


def test_a_link_above_one_is_refused():
    with pytest.raises(TraceError, match=r"routing.layer_link: 1.5: is a share, at most 1"):
        SyntheticRouting("x", layer_link=1.5)
