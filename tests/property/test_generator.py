"""Generators: fitted curves, any size of model, whole traces, and what they keep."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.routing import (
    LoadCurve,
    RoutingShape,
    RoutingTrace,
    SyntheticRouting,
    default_routing,
    fit_generator,
    generate_trace,
    open_trace,
    popularity,
    write_generator,
)
from moesim.routing.describe import gini
from moesim.routing.fit_locality import layer_dependence, measure_locality
from moesim.routing.load_curves import KNOTS, block_peaks

LOCAL = SyntheticRouting("local", layer_link=0.5)


def count_trace(counts, top_k=4):
    counts = np.asarray(counts, dtype=np.int64)[None]
    layers = tuple(range(counts.shape[1]))
    return RoutingTrace("toy", counts.shape[2], top_k, layers, expert_counts=counts)


def lognormal_counts(n_layers=20, n_experts=128, seed=0, sigma=0.7):
    rng = np.random.default_rng(seed)
    return 1e5 * rng.lognormal(0.0, sigma, (n_layers, n_experts))


def busiest(p):
    return p.max(-1) / p.mean(-1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(4, 70), st.floats(0.0, 2.0))
def test_any_counts_give_a_generator_for_any_model(seed, n_layers, n_experts, sigma):
    counts = np.random.default_rng(seed).lognormal(3.0, sigma, (n_layers, n_experts))
    counts[:, 0] = 0.0
    generator = fit_generator(count_trace(counts, top_k=2), per_layer=bool(seed % 2))
    for shape in (RoutingShape(n_layers, n_experts, 2), RoutingShape(7, 48, 6, 8, 4)):
        p = popularity(generator, shape)
        assert p.sum(-1) == pytest.approx(shape.top_k, rel=1e-5)
        assert (p > 0).all()
        assert (p <= 1).all()


def test_a_curve_for_each_layer_keeps_each_layers_busiest_expert_and_gini():
    counts = lognormal_counts(sigma=0.9)
    generator = fit_generator(count_trace(counts), per_layer=True)
    p = popularity(generator, RoutingShape(20, 128, 4))
    assert busiest(p) == pytest.approx(busiest(counts), rel=0.10)
    assert gini(p) == pytest.approx(gini(counts), abs=0.01)


def test_few_curves_keep_the_range_of_layers():
    spread = np.linspace(0.3, 1.1, 40)[:, None]
    counts = 1e5 * np.exp(spread * np.random.default_rng(0).standard_normal((40, 128)))
    generator = fit_generator(count_trace(counts))
    assert len(generator.curves) < 13
    made = np.sort(busiest(popularity(generator, RoutingShape(40, 128, 4))))
    assert made == pytest.approx(np.sort(busiest(counts)), rel=0.12)


@pytest.mark.parametrize("n_experts", [32, 64, 256])
def test_curves_say_the_skew_of_another_number_of_experts(n_experts):
    """Of a law whose draws are known at any size: the rule is the law's own quantiles."""
    generator = fit_generator(count_trace(lognormal_counts(n_layers=60)))
    made = popularity(generator, RoutingShape(60, n_experts, 4))
    wanted = lognormal_counts(n_layers=400, n_experts=n_experts, seed=9)
    assert gini(made).mean() == pytest.approx(gini(wanted).mean(), rel=0.04)
    assert busiest(made).mean() == pytest.approx(busiest(wanted).mean(), rel=0.10)


def test_fewer_and_more_layers_have_the_same_range():
    generator = fit_generator(count_trace(lognormal_counts(n_layers=60)))
    few, many = (busiest(popularity(generator, RoutingShape(n, 128, 4))) for n in (15, 240))
    assert few.mean() == pytest.approx(many.mean(), rel=0.03)


def test_load_that_falls_with_the_index_is_kept_and_can_be_left_out():
    falls = np.exp(-0.4 * np.log(np.arange(1, 129)))
    counts = lognormal_counts(sigma=0.4) * falls
    generator = fit_generator(count_trace(counts), per_layer=True)
    assert min(curve.index_trend for curve in generator.curves) > 0.3
    shape = RoutingShape(20, 128, 4)
    placed = block_peaks(popularity(generator, shape)).mean(0)
    assert placed == pytest.approx(block_peaks(counts).mean(0), rel=0.03)
    renamed = popularity(replace(generator, keep_index=False), shape)
    shuffled = np.random.default_rng(0).permuted(counts, axis=-1)
    assert block_peaks(renamed).mean(0) == pytest.approx(block_peaks(shuffled).mean(0), rel=0.06)
    assert busiest(renamed) == pytest.approx(busiest(popularity(generator, shape)), rel=0.01)


def test_noise_of_a_short_trace_is_not_taken_for_skew():
    rng = np.random.default_rng(0)
    counts = np.stack([rng.multinomial(64 * 6, np.full(64, 1 / 64)) for _ in range(12)])
    p = popularity(fit_generator(count_trace(counts), per_layer=True), RoutingShape(12, 64, 4))
    assert gini(p).mean() < 0.3 * gini(counts).mean()


GROUPED = RoutingShape(3, 64, 6, n_groups=8, n_top_groups=3)


@pytest.mark.parametrize("shape", [RoutingShape(3, 64, 6), GROUPED])
def test_traces_are_valid_and_have_the_popularity(shape):
    trace = generate_trace(LOCAL, shape, n_sequences=90, sequence_length=77, phase="prefill", seed=4)
    trace.check()
    assert (trace.n_tokens, trace.offsets.size, trace.phase) == (90 * 77, 91, "prefill")
    off = np.abs(trace.counts / trace.n_tokens - popularity(LOCAL, shape)).sum(-1) / 6
    assert off.max() < (0.12 if shape is GROUPED else 0.05)
    if shape is GROUPED:
        groups = np.sort(np.asarray(trace.expert_ids) // 8, axis=-1)
        assert ((np.diff(groups, axis=-1) > 0).sum(-1) + 1).max() == 3


def test_same_seed_same_trace_other_seed_another():
    shape = RoutingShape(2, 16, 2)
    one, again, other = (
        generate_trace(LOCAL, shape, n_sequences=5, sequence_length=9, seed=s) for s in (1, 1, 2)
    )
    assert np.array_equal(one.expert_ids, again.expert_ids)
    assert not np.array_equal(one.expert_ids, other.expert_ids)
    with pytest.raises(TraceError, match="at least one sequence"):
        generate_trace(LOCAL, shape, n_sequences=0, sequence_length=4)


def test_more_than_256_experts_fit_in_the_ids():
    trace = generate_trace(LOCAL, RoutingShape(2, 512, 10), n_sequences=8, sequence_length=16)
    trace.check()
    assert int(np.asarray(trace.expert_ids).max()) > 255


def test_a_fit_finds_the_locality_that_a_trace_was_made_with():
    made_with = replace(LOCAL, request_spread=0.12, request_stray=0.1, token_keep=0.5, token_step=0.4)
    shape = RoutingShape(6, 32, 4)
    trace = generate_trace(made_with, shape, n_sequences=300, sequence_length=200)
    found = fit_generator(trace)
    assert found.token_keep == pytest.approx(0.5, abs=0.08)
    assert found.layer_link == pytest.approx(0.5, abs=0.08)
    assert found.drift_share == 0.0
    again = generate_trace(found, shape, n_sequences=300, sequence_length=200)
    was, now = (measure_locality(np.asarray(t.expert_ids), t.offsets) for t in (trace, again))
    assert vars(now) == pytest.approx(vars(was), rel=0.05)
    depends = [layer_dependence(np.asarray(t.expert_ids), 32) for t in (trace, again)]
    assert depends[1] == pytest.approx(depends[0], rel=0.1)


def test_one_long_sequence_keeps_what_tokens_in_a_row_share():
    source = replace(LOCAL, token_keep=0.6, token_step=0.2, request_spread=float("inf"))
    shape = RoutingShape(4, 32, 4)
    trace = generate_trace(source, shape, n_sequences=1, sequence_length=5000)
    found = fit_generator(trace)
    assert np.isinf(found.request_spread)
    assert found.token_keep == pytest.approx(0.6, abs=0.08)
    assert not found.is_independent


def test_a_fit_to_independent_tokens_finds_no_requests():
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((6000, 3, 16)), axis=-1)[..., :2].astype(np.uint8)
    trace = RoutingTrace("toy", 16, 2, (0, 1, 2), expert_ids=ids, sequence_offsets=np.arange(0, 6001, 60))
    found = fit_generator(trace)
    assert found.token_keep == 0.0
    assert found.request_spread > 0.25
    assert found.layer_link < 0.05


def alike(trace, distance):
    """Covariance of what sequences a distance apart prefer."""
    ids = np.asarray(trace.expert_ids)
    runs = np.split(ids, trace.offsets[1:-1])
    load = np.stack([np.bincount(run[:, 0].ravel(), minlength=trace.n_experts) / len(run) for run in runs])
    left = load - load.mean(0)
    return float((left[distance:] * left[:-distance]).sum(-1).mean())


def test_without_drift_sequences_are_stationary_and_with_it_neighbours_are_alike():
    shape = RoutingShape(2, 32, 4)
    still = generate_trace(replace(LOCAL, layer_link=1.0), shape, n_sequences=300, sequence_length=48)
    moving = replace(LOCAL, layer_link=1.0, drift_share=0.95, drift_sequences=20.0)
    drifts = generate_trace(moving, shape, n_sequences=300, sequence_length=48)
    near, far = alike(drifts, 1), alike(drifts, 100)
    assert near > 5 * abs(alike(still, 1))
    assert near > 4 * abs(far)
    assert drifts.counts / drifts.n_tokens == pytest.approx(popularity(moving, shape), rel=0.25, abs=0.01)
    found = fit_generator(drifts)
    assert found.drift_share > 0.7
    assert 5 < found.drift_sequences < 60


def test_a_written_generator_is_read_as_it_was(tmp_path):
    generator = fit_generator(count_trace(lognormal_counts()), per_layer=True)
    file = write_generator(generator, tmp_path / "mine.yaml", quality={"busiest": 1.0})
    assert open_trace(file) == generator
    zipf = SyntheticRouting.zipf(0.7)
    assert open_trace(write_generator(zipf, file)) == zipf
    assert [one.name for one in tmp_path.iterdir()] == ["mine.yaml"]


def test_default_stands_for_models_of_any_size_and_is_no_worse_placed_than_chance():
    p = popularity(default_routing(), RoutingShape(58, 256, 8))
    renamed = np.random.default_rng(0).permuted(p, axis=-1)
    assert block_peaks(p).mean(0) == pytest.approx(block_peaks(renamed).mean(0), rel=0.06)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("curves: {log_load: [[1, 2]]}", "a load curve is 13 finite numbers"),
        (f"curves: {{log_load: [{[0] * 13}], index_trend: [2]}}", "lies within -1..1"),
        (f"curves: {{log_load: [{[0] * 13}], block_peaks: [[0.5]]}}", "1 or more"),
        (f"curves: {{log_load: [{[0] * 13}], order: random}}", "unknown order of curves"),
        ("curves: {log_loda: []}", "is not a routing description"),
        (f"curves: {{log_load: [{[0] * 13}], index_trend: []}}", "is not a routing description"),
        (
            f"curves: {{log_load: [{[0] * 13}, {[0] * 13}], block_peaks: [[1], []]}}",
            "all curves give as many",
        ),
        ("parameters: {token_keep: 1.5}", "routing.token_keep: 1.5: is a share, at most 1"),
        ("parameters: {drift_share: -1}", "routing.drift_share: -1: is a finite number"),
    ],
)
def test_bad_curves_and_shares_are_refused(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(TraceError, match=said):
        open_trace(file)


def test_a_curve_goes_on_straight_for_more_experts_than_it_saw():
    flat = SyntheticRouting("flat", curves=(LoadCurve((0.0,) * KNOTS.size),))
    assert popularity(flat, RoutingShape(2, 1000, 4)) == pytest.approx(0.004)
