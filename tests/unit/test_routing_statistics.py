"""Figures of routing against constructed cases whose answer is known, and against small plain references."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import LayoutError
from moesim.routing import (
    PLACEMENTS,
    RoutingShape,
    RoutingTrace,
    SyntheticRouting,
    catalog_routing,
    describe,
    generate_trace,
    known_models,
    open_trace,
)
from moesim.routing.balance import balance, batch_figures, evenness, named_placement
from moesim.routing.drift import domain_specialisation, drift, jensen_shannon, total_variation
from moesim.routing.locality import locality, shared_experts
from moesim.routing.prediction import layer_prediction
from moesim.routing.runs import token_runs


def choices(n_tokens, n_layers, n_experts, top_k, seed=0, weights=None):
    """Distinct experts, in proportion to weights (Gumbel top-k): (n_tokens, n_layers, top_k)."""
    rng = np.random.default_rng(seed)
    keys = rng.gumbel(size=(n_tokens, n_layers, n_experts))
    if weights is not None:
        keys = keys + np.log(weights)
    return np.argsort(-keys, axis=-1)[..., :top_k].astype(np.uint16)


def made(ids, n_experts, sequence=100, **more):
    offsets = np.arange(0, len(ids) + 1, sequence)
    return RoutingTrace(
        "toy", n_experts, ids.shape[2], tuple(range(ids.shape[1])), expert_ids=ids, sequence_offsets=offsets, **more
    )  # fmt: skip


# ---------------------------------------------------------------- runs


def test_all_of_a_short_trace_is_held():
    trace = made(choices(1000, 3, 16, 2), 16)
    runs = token_runs(trace)
    assert runs.is_whole
    assert np.array_equal(runs.bounds, trace.offsets)
    assert np.array_equal(runs.ids, trace.expert_ids)


@pytest.mark.parametrize("sequence", [40, 700, 20_000])
def test_runs_of_a_long_trace_lie_in_its_sequences_and_all_over_it(sequence):
    ids = choices(20_000, 2, 16, 2)
    trace = made(ids[: 20_000 // sequence * sequence], 16, sequence)
    runs = token_runs(trace, largest_ids=20_000)
    assert not runs.is_whole
    assert 10_000 / 4 <= runs.ids.size <= 20_000 * 1.3
    at = {row.tobytes(): i for i, row in enumerate(ids.reshape(len(ids), -1)[:, :4])}
    for i in (0, runs.n_runs // 2, runs.n_runs - 1):
        run = runs.ids[runs.bounds[i] : runs.bounds[i + 1]]
        begin, end = trace.offsets[runs.sequences[i]], trace.offsets[runs.sequences[i] + 1]
        inside = [s for s in range(begin, end - len(run) + 1) if np.array_equal(ids[s : s + len(run)], run)]
        assert inside, "a run is consecutive tokens of its sequence"
    assert runs.sequences[-1] >= 0.8 * (trace.offsets.size - 2)
    assert at


# ---------------------------------------------------------------- locality


def test_shared_experts_is_the_size_of_the_intersection():
    a, b = choices(50, 3, 8, 3, 1), choices(50, 3, 8, 3, 2)
    for layer, found in enumerate(shared_experts(a, b)):
        sets = [len({*x} & {*y}) / 3 for x, y in zip(a[:, layer], b[:, layer], strict=True)]
        assert found == pytest.approx(np.mean(sets))


def test_tokens_that_change_every_eighth_share_all_then_less():
    ids = np.repeat(choices(2000, 4, 64, 2), 8, axis=0)
    found = locality(token_runs(made(ids, 64, 800)), np.full((4, 64), 2 / 64))
    by_lag = {int(lag): value for lag, value in found["by_lag"].items()}
    for lag in (1, 2, 4, 8, 32):
        kept = max(0, 8 - lag) / 8  # pairs that lie in one group of eight
        assert by_lag[lag] == pytest.approx(kept + (1 - kept) * 2 / 64, abs=0.02)
    assert found["chance"] == pytest.approx(2 / 64)
    assert found["shared_with_any_token"] == pytest.approx(2 / 64, abs=0.01)


def test_chance_is_what_independent_tokens_share():
    weights = 1.0 / np.arange(1, 17)
    ids = choices(8000, 3, 16, 3, weights=weights)
    trace = made(ids, 16)
    load = trace.counts / len(ids)
    found = locality(token_runs(trace), load)
    assert found["chance"] > 1.5 * 3 / 16
    assert found["shared_with_next_token"] == pytest.approx(found["chance"], abs=0.015)
    assert found["shared_in_request"] == pytest.approx(found["chance"], abs=0.015)


def test_a_request_with_experts_of_its_own_shares_them_at_any_distance():
    own = choices(100, 2, 64, 4)
    ids = np.repeat(own, 100, axis=0)
    found = locality(token_runs(made(ids, 64, 100)), np.full((2, 64), 4 / 64))
    assert found["shared_in_request"] == 1
    assert set(found["by_lag"]) == {"1", "2", "4", "8", "16", "32", "64"}
    assert min(found["by_lag"].values()) == 1


# ---------------------------------------------------------------- layers


def test_a_fixed_map_from_layer_to_layer_is_predicted_wholly():
    first = choices(6000, 1, 32, 4, weights=1.0 / np.arange(1, 33))
    rng = np.random.default_rng(5)
    layers = [first[:, 0]]
    for _ in range(3):
        layers.append(rng.permutation(32).astype(np.uint8)[layers[-1]])
    found = layer_prediction(token_runs(made(np.stack(layers, axis=1), 32)))
    assert found["hit_rate"] == pytest.approx(1, abs=0.001)
    assert found["popularity_hit_rate"] < 0.5
    assert len(found["by_layer"]["hit_rate"]) == 3


@pytest.mark.parametrize("skewed", [False, True])
def test_layers_that_know_nothing_of_each_other_predict_as_popularity_does(skewed):
    weights = 1.0 / np.arange(1, 33) if skewed else None
    found = layer_prediction(token_runs(made(choices(8000, 4, 32, 4, weights=weights), 32)))
    assert found["hit_rate"] == pytest.approx(found["popularity_hit_rate"], abs=0.01)
    assert found["total_variation"] == pytest.approx(found["total_variation_noise"], abs=0.004)


def test_tokens_that_resemble_each_other_do_not_pass_for_a_link():
    # sixteen tokens in a row choose alike, in each layer for itself: the same pairs come again and again
    weights = 1.0 / np.sqrt(np.arange(1, 33))
    trace = made(np.repeat(choices(320, 4, 32, 4, weights=weights), 16, axis=0), 32, 128)
    found = layer_prediction(token_runs(trace))
    assert found["hit_rate"] == pytest.approx(found["popularity_hit_rate"], abs=0.02)


def test_total_variation_of_a_link_is_the_plain_sum():
    rng = np.random.default_rng(0)
    now = rng.integers(0, 3, 40_000)
    after = np.where(rng.random(now.size) < 0.5, now, rng.integers(0, 3, now.size))
    found = layer_prediction(token_runs(made(np.stack([now, after], 1)[:, :, None].astype(np.uint8), 3)))
    # p(b | a) is 2/3 at b = a and 1/6 elsewhere; p(b) is 1/3
    assert found["total_variation"] == pytest.approx(1 / 3, abs=0.02)
    assert found["total_variation_noise"] < 0.03
    assert found["hit_rate"] == pytest.approx(2 / 3, abs=0.02)


def test_one_layer_or_one_token_tells_of_no_next():
    assert layer_prediction(token_runs(made(choices(500, 1, 8, 2), 8))) is None
    assert layer_prediction(token_runs(made(choices(1, 4, 8, 2), 8, 1))) is None


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_names_of_experts_do_not_matter(seed):
    source = catalog_routing("gpt-oss-20b-decode")
    trace = generate_trace(source, RoutingShape(3, 16, 2), n_sequences=40, sequence_length=64)
    renamed = trace.permuted(seed)
    here, there = token_runs(trace), token_runs(renamed)
    shares = [locality(runs, one.counts / one.n_tokens) for runs, one in ((here, trace), (there, renamed))]
    for key in ("shared_with_next_token", "shared_in_request", "chance"):
        assert shares[0][key] == pytest.approx(shares[1][key])
    told = [layer_prediction(runs) for runs in (here, there)]
    for key in ("hit_rate", "total_variation", "total_variation_noise"):
        assert told[0][key] == pytest.approx(told[1][key], abs=0.02 if key == "hit_rate" else 1e-9)
    moved = [drift(one, runs) for runs, one in ((here, trace), (there, renamed))]
    assert moved[0]["total_variation"] == pytest.approx(moved[1]["total_variation"])


# ---------------------------------------------------------------- distances, drift, domains


def test_distances_at_their_ends_and_against_scipy():
    from scipy.spatial.distance import jensenshannon

    p, q = np.array([[0.5, 0.5, 0.0]]), np.array([[0.0, 0.25, 0.75]])
    assert total_variation(p, q)[0] == pytest.approx(0.75)
    assert jensen_shannon(p, q)[0] == pytest.approx(jensenshannon(p[0], q[0], base=2))
    assert total_variation(p, p)[0] == jensen_shannon(p, p)[0] == 0
    apart = np.eye(3)
    assert jensen_shannon(apart[:1], apart[1:2])[0] == pytest.approx(1)


def test_steady_routing_drifts_no_more_than_its_shuffles():
    trace = made(choices(24_000, 2, 16, 2), 16)
    found = drift(trace, token_runs(trace))
    assert (found["n_windows"], found["unit"]) == (24, "sequence")
    for key in ("total_variation", "jensen_shannon"):
        assert np.mean(list(found[key].values())[:12]) == pytest.approx(found["noise"][key], rel=0.1)


def test_popularity_that_turns_round_is_seen_at_the_lag_where_it_does():
    first, last = (choices(12_000, 2, 16, 2, i, weights=w) for i, w in enumerate(np.eye(16)[[0, 8]] * 15 + 1))
    trace = made(np.concatenate([first, last]), 16)
    found = drift(trace, token_runs(trace))
    by_lag = [found["total_variation"][str(lag)] for lag in range(1, 24)]
    assert by_lag[0] < by_lag[5] < by_lag[12]
    assert by_lag[-1] == pytest.approx(max(by_lag), abs=0.02)
    assert found["noise"]["total_variation"] < max(by_lag) / 2
    p = [np.bincount(ids[:, 0].ravel(), minlength=16) / ids[:, 0].size for ids in (first, last)]
    assert by_lag[-1] == pytest.approx(0.5 * np.abs(p[0] - p[1]).sum(), abs=0.03)


def test_drift_of_counts_step_by_step():
    rng = np.random.default_rng(0)
    share = np.linspace(0, 1, 64)[:, None, None]
    p = (1 - share) * np.array([0.7, 0.1, 0.1, 0.1]) + share * np.array([0.1, 0.1, 0.1, 0.7])
    counts = rng.multinomial(4000, np.broadcast_to(p, (64, 3, 4)))
    trace = RoutingTrace("toy", 4, 1, (0, 1, 2), expert_counts=counts)
    found = drift(trace, None)
    assert found["unit"] == "step"
    by_lag = [found["total_variation"][str(lag)] for lag in range(1, found["n_windows"])]
    assert all(a < b for a, b in itertools.pairwise(by_lag))
    # windows centre on 1/32 and 31/32 of the way
    assert by_lag[-1] == pytest.approx(0.6 * (1 - 1 / found["n_windows"]), abs=0.03)
    assert drift(RoutingTrace("toy", 4, 1, (0, 1, 2), expert_counts=counts[:3]), None) is None


def test_domains_with_experts_of_their_own_are_told_apart():
    low = choices(5000, 2, 16, 2, 1, weights=np.r_[np.ones(8), np.full(8, 1e-9)])
    high = choices(5000, 2, 16, 2, 2, weights=np.r_[np.full(8, 1e-9), np.ones(8)])
    trace = made(np.concatenate([low, high]), 16)
    found = domain_specialisation(token_runs(trace), np.repeat([0, 1], 50), ("low", "high"))
    assert found["total_variation"][0][1] == pytest.approx(1, abs=1e-6)
    assert found["total_variation"][0][0] < 0.05
    assert found["mutual_information_bits"] == pytest.approx(1, abs=1e-3)  # one bit: the domain itself
    assert found["mutual_information_noise_bits"] < 0.05
    assert [one["expert"] < 8 for one in found["specialists"]] == [True, False]
    assert found["n_tokens"] == [5000, 5000]


def test_domains_that_are_alike_show_their_noise_only():
    trace = made(choices(12_000, 2, 16, 2), 16)
    found = domain_specialisation(token_runs(trace), np.arange(120) % 3, ("a", "b", "c"))
    table = np.array(found["total_variation"])
    assert table[~np.eye(3, dtype=bool)].mean() == pytest.approx(np.diag(table).mean(), rel=0.25)
    assert found["mutual_information_bits"] == pytest.approx(found["mutual_information_noise_bits"], rel=0.5)


def test_a_domain_of_one_sequence_is_left_out():
    trace = made(choices(1000, 2, 16, 2), 16)
    runs = token_runs(trace)
    assert domain_specialisation(runs, np.r_[0, np.ones(9)].astype(int), ("one", "rest")) is None
    found = domain_specialisation(runs, np.r_[0, 1, 1, 1, 2, 2, 2, 2, 2, 2], ("one", "two", "three"))
    assert found["names"] == ["two", "three"]


# ---------------------------------------------------------------- balance and batches


def test_balance_of_a_load_by_hand():
    found = evenness(np.array([[3.0, 1.0], [1.0, 1.0]]))
    assert found["balancedness"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["imbalance"] == pytest.approx((3 / 2 + 1) / 2 - 1)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_placements_by_name_hold_every_expert(name):
    load = np.random.default_rng(0).random((3, 16))
    placement = named_placement(name, load, 4)
    assert placement.n_slots == 16
    assert (np.sort(placement.slot_to_expert, axis=-1) == np.arange(16)).all()


def test_eplb_is_the_most_even_and_batches_are_less_even_than_their_sum():
    rows = balance(
        catalog_routing("default"), RoutingShape(6, 64, 4), ep_sizes=[8], placements=["contiguous", "eplb"],
        n_redundant=16,
    )  # fmt: skip
    plain, best = rows
    assert best["balancedness"] > max(0.95, plain["balancedness"] + 0.05)
    for row in rows:
        assert row["n_redundant"] == 16
        by_size = [row["batches"][n]["balancedness"] for n in ("8", "32", "128")]
        assert by_size[0] < by_size[1] < by_size[2] < row["balancedness"] + 0.02


def test_a_placement_from_a_file_is_judged(tmp_path):
    table = np.arange(16).reshape(4, 4).T.ravel()
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical_map": table.tolist()}))
    trace = made(choices(2000, 2, 16, 2, weights=1.0 / np.arange(1, 17)), 16)
    shape = RoutingShape(2, 16, 2)
    given_, dealt = balance(
        trace, shape, ep_sizes=[4], placements=[str(tmp_path / "map.json"), "round-robin"]
    )
    assert given_["balancedness"] == pytest.approx(dealt["balancedness"])
    with pytest.raises(LayoutError, match="no such placement"):
        balance(trace, shape, ep_sizes=[4], placements=["contigous"])


def test_even_batches_use_as_many_experts_as_the_formula_says():
    rows = batch_figures(SyntheticRouting.uniform(), RoutingShape(8, 64, 4))
    for row in rows:
        assert row["active"] == pytest.approx(row["even_active"], abs=0.03)
    assert rows[0]["busiest_over_mean"] == pytest.approx(64 / 4)


def test_tokens_in_a_row_that_are_alike_use_one_tokens_experts():
    ids = np.repeat(choices(100, 2, 32, 4), 128, axis=0)
    trace = made(ids, 32, 128)
    rows = batch_figures(trace, RoutingShape(2, 32, 4), token_runs(trace))
    assert all(row["active_in_a_row"] == pytest.approx(4 / 32) for row in rows if row["n_tokens"] <= 128)
    assert "active_in_a_row" not in rows[-1]
    assert rows[7]["active"] > 0.9


# ---------------------------------------------------------------- all of it


def test_description_of_a_trace_is_json_and_complete():
    found = describe(made(choices(3000, 3, 16, 2, weights=1.0 / np.arange(1, 17)), 16))
    json.dumps(found)
    assert found["layers"][0]["busiest_expert"] == 0
    assert np.mean(found["layers"][0]["load"]) == pytest.approx(1, abs=1e-3)
    assert max(found["layers"][1]["load"]) == pytest.approx(found["layers"][1]["busiest_over_mean"], rel=1e-3)
    assert found["looked_at"] == {"tokens": 3000, "of": 3000, "runs": 30}
    assert found["even"]["gini"] < 0.05 < found["gini"]["median"]
    assert {row["ep"] for row in found["balance"]} == {8, 16}
    assert found["domains"] is None


@pytest.mark.parametrize(
    ("n_experts", "sizes"), [(60, [15, 20, 30, 60]), (256, [8, 16, 32, 64]), (7, [7]), (127, [])]
)
def test_groups_are_of_sizes_that_divide_the_experts(n_experts, sizes):
    counts = np.full((1, 2, n_experts), 10)
    found = describe(RoutingTrace("toy", n_experts, 2, (0, 1), expert_counts=counts), placements=["eplb"])
    assert [row["ep"] for row in found["balance"]] == sizes


@pytest.mark.parametrize("size", [(1, 1, 4, 2), (1, 3, 1, 1), (2, 2, 8, 8), (7, 4, 8, 2), (40, 2, 300, 2)])
def test_the_smallest_traces_are_described(size):
    found = describe(made(choices(*size).astype(np.uint16), size[2], 1))
    json.dumps(found)
    assert found["n_tokens"] == size[0]


def test_counts_alone_show_no_single_tokens():
    counts = np.random.default_rng(0).integers(1, 99, (1, 3, 16))
    found = describe(RoutingTrace("toy", 16, 2, (0, 1, 2), expert_counts=counts))
    assert "locality" not in found
    assert "looked_at" not in found
    assert found["drift"] is None


def test_known_models_are_those_of_the_statistics(shared_data):
    stats = json.loads((shared_data / "routing/STATS.json").read_text())
    for one in known_models():
        entry = stats[one["entry"]]
        assert one["n_experts"] == entry["experts"]
        assert one["n_layers"] == entry["layers"]
        assert one["busiest_over_mean"] == pytest.approx(entry["maxmean_med"])
        assert one["gini"] == pytest.approx(entry["gini_med"])
        for ep in (8, 16, 32):
            if f"balancedness_ep{ep}" in one:
                assert one[f"balancedness_ep{ep}"] == pytest.approx(entry[f"ep{ep}_balancedness_mean"])
                assert one[f"imbalance_ep{ep}"] == pytest.approx(entry[f"ep{ep}_imb_ratio_mean"])


def test_gpt_oss_is_as_the_statistics_say_and_nearest_to_itself(shared_data):
    stats = json.loads((shared_data / "routing/STATS.json").read_text())["gptoss20b_tok"]
    found = describe(open_trace(shared_data / "routing/gpt_oss_20b/tokens.npz", n_experts=32))
    assert found["known"]["nearest"] == "gpt-oss-20b benchmarks"
    # theirs are of twice as many tokens of the same recordings, hence a little room
    assert found["busiest_over_mean"]["median"] == pytest.approx(stats["maxmean_med"], rel=0.01)
    assert found["gini"]["median"] == pytest.approx(stats["gini_med"], abs=0.01)
    own = found["known"]["own"]
    for ep in (8, 16, 32):
        assert own[f"balancedness_ep{ep}"] == pytest.approx(stats[f"ep{ep}_balancedness_mean"], abs=0.01)
    shared = found["locality"]
    assert shared["shared_with_next_token"] == pytest.approx(stats["next_token_overlap_mean"], abs=0.01)
    assert shared["chance"] == pytest.approx(stats["indep_overlap_baseline_mean"], abs=0.005)
    assert shared["by_lag"]["256"] == pytest.approx(stats["same_seq_far_overlap"], abs=0.02)
    by_batch = {row["n_tokens"]: row for row in found["by_batch"]}
    for n in (8, 32, 64, 128, 256):
        assert by_batch[n]["active"] == pytest.approx(stats[f"B{n}"]["active_frac_mixed"], abs=0.02)
        if n <= 64:  # beyond, their rows of tokens run over into the next request
            in_a_row = stats[f"B{n}"]["active_frac_contig"]
            assert by_batch[n]["active_in_a_row"] == pytest.approx(in_a_row, abs=0.04)
        assert by_batch[n]["busiest_over_mean"] == pytest.approx(
            stats[f"B{n}"]["maxmean_real_mixed"], rel=0.08
        )
    assert found["layer_prediction"]["hit_rate"] > 2 * found["layer_prediction"]["popularity_hit_rate"]
