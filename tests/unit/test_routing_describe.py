"""Figures of `describe` against values known by other means."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesim.routing import RoutingShape, RoutingTrace, SyntheticRouting, default_routing, describe, open_trace
from moesim.routing.describe import entropy, gini


def test_gini_and_entropy_at_the_extremes():
    assert gini([1, 1, 1, 1]) == pytest.approx(0)
    assert gini([0, 0, 0, 1]) == pytest.approx(0.75)
    assert entropy([1, 1, 1, 1]) == pytest.approx(1)
    assert entropy([0, 0, 0, 1]) == pytest.approx(0)
    assert entropy([[5.0]]) == pytest.approx(1)


def test_uniform_routing_is_perfectly_balanced():
    found = describe(SyntheticRouting.uniform(), RoutingShape(4, 64, 8))
    assert found["busiest_over_mean"]["max"] == pytest.approx(1)
    assert found["balancedness"]["ep8"]["as_is"] == pytest.approx(1)
    assert found["active_experts"]["1"] == pytest.approx(8 / 64)
    assert found["active_experts"]["512"] > 0.99
    assert found["locality"]["shared_with_next_token"] == pytest.approx(8 / 64, abs=0.01)  # drawn from it


def test_default_shape_of_a_generator_and_json():
    found = describe(default_routing())
    assert found["synthetic"] is True
    assert len(found["layers"]) == 58
    json.dumps(found)


def test_counts_with_falling_ids_look_worse_as_they_are_than_permuted():
    counts = np.tile(np.arange(64, 0, -1) ** 2, (10, 1))[None]
    trace = RoutingTrace("toy", 64, 4, tuple(range(10)), expert_counts=counts)
    found = describe(trace)
    ep8 = found["balancedness"]["ep8"]
    assert ep8["as_is"] == pytest.approx(counts[0, 0].mean() / counts[0, 0, :8].mean())
    assert ep8["permuted"] > ep8["as_is"] + 0.2
    assert found["n_tokens"] == counts[0, 0].sum() // 4


def test_locality_of_a_trace_that_repeats_itself():
    ids = np.repeat(np.argsort(np.random.default_rng(0).random((50, 2, 16)), axis=-1)[..., :2], 20, axis=0)
    trace = RoutingTrace("toy", 16, 2, (0, 1), expert_ids=ids, sequence_offsets=np.arange(0, 1001, 20))
    found = describe(trace)["locality"]
    assert found["shared_with_next_token"] == 1
    assert found["shared_with_any_token"] == pytest.approx(2 / 16, abs=0.05)


def test_single_token_traces_have_no_locality_to_show():
    trace = RoutingTrace("toy", 16, 2, (0,), expert_ids=np.array([[[1, 2]]]))
    assert describe(trace)["locality"] == {}


def test_gpt_oss_shares_what_was_measured(shared_data):
    found = describe(open_trace(shared_data / "routing/gpt_oss_20b/tokens.npz", n_experts=32))
    assert found["locality"]["shared_with_next_token"] == pytest.approx(0.44, abs=0.015)
    assert found["locality"]["shared_with_any_token"] == pytest.approx(0.19, abs=0.015)


def test_deepseek_balance_as_measured(shared_data):
    trace = open_trace(shared_data / "routing/deepseek_v3_sglang/decode_in1000out1000.json")
    balance = describe(trace)["balancedness"]
    assert balance["ep8"]["as_is"] == pytest.approx(0.5355, abs=1e-3)  # shared STATS.json
    assert balance["ep32"]["as_is"] == pytest.approx(0.4043, abs=1e-3)
