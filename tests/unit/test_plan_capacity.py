"""Capacities and placements in a run: what they do to time, memory and what is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import ScenarioError, TraceError
from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.plan import run, run_answer
from moesim.plan.context import Choice, Context
from moesim.plan.space import choices_of
from moesim.routing import (
    CapacityPolicy,
    RoutingTrace,
    balanced,
    inclusion,
    moved_experts,
    read_trace,
    write_trace,
)
from moesim.scenario import parse_scenario
from moesim.scenario.choices import Choices
from moesim.scenario.schema import Policy
from moesim.work.case import Layout
from moesim.work.memory import TrainingState, inference_memory, training_memory

TEXT = """
model: olmoe-1b-7b
cluster: {{gpu: h200-sxm, nodes: 2, gpus_per_node: 8}}
layout: {layout}
workload: {{kind: prefill, tokens_per_rank: 512, prompt: 512}}
routing: {routing}
policy: {policy}
"""


def told(policy: str = "{}", *, layout: str = "{}", routing: str = "zipf") -> dict[str, Any]:
    scenario = parse_scenario(TEXT.format(policy=policy, layout=layout, routing=routing)).scenario
    return run_answer(run(scenario), scenario)[0]


FIGURES = (
    "dropped_fraction", "dropped_weight_fraction", "tokens_without_expert_fraction", "rerouted_fraction",
    "padding_fraction", "imbalance_before_capacity",
)  # fmt: skip


def test_without_a_capacity_nothing_is_lost() -> None:
    row = told()
    assert [row[name] for name in FIGURES[:-1]] == [0.0] * 5
    assert row["imbalance_before_capacity"] == row["imbalance"] > 1
    assert row["choice"]["capacity_factor"] is row["choice"]["overflow"] is None


def test_a_dense_model_has_no_such_figures() -> None:
    text = "{model: llama-3.1-70b, cluster: {gpu: h200-sxm, nodes: 1}, layout: {tp: 8},"
    scenario = parse_scenario(text + "workload: {kind: decode, batch_per_rank: 8, context: 1000}}").scenario
    row = run(scenario).row
    assert all(row[name] is None for name in FIGURES)
    assert row["rebalance"] is None


def test_drops_even_out_the_ranks_and_save_time() -> None:
    free, tight = told(), told("{capacity_factor: 1.0}")
    assert 0.1 < tight["dropped_fraction"] < 0.6
    assert tight["dropped_weight_fraction"] is None  # a generator has no weights
    assert tight["imbalance"] < tight["imbalance_before_capacity"]
    assert tight["imbalance_before_capacity"] == pytest.approx(free["imbalance"], rel=0.03)
    assert tight["step_s"] < free["step_s"]
    assert tight["memory_bytes"]["activations"] < free["memory_bytes"]["activations"]
    assert tight["choice"]["overflow"] == "drop-position"


def test_rerouted_copies_are_not_dropped_and_still_travel() -> None:
    drop, move = told("{capacity_factor: 1.25}"), told("{capacity_factor: 1.25, overflow: reroute}")
    assert move["dropped_fraction"] < 0.01
    assert move["rerouted_fraction"] == pytest.approx(drop["dropped_fraction"], abs=0.02)
    assert move["kernel_s"]["dispatch"] > drop["kernel_s"]["dispatch"]
    assert any("drawn by popularity" in one for one in move["warnings"])


@pytest.mark.parametrize("dispatch", ["nccl", "normal"])
def test_padding_is_computed_and_carried_by_a_plain_all_to_all_only(dispatch: str) -> None:
    bare, padded = (
        told(f"{{capacity_factor: 1.5, dispatch: {dispatch}, padding: {one}}}")
        for one in ("none", "capacity")
    )
    assert padded["padding_fraction"] > 0.1
    assert bare["padding_fraction"] == 0
    assert padded["imbalance"] == pytest.approx(1)
    assert padded["dropped_fraction"] == bare["dropped_fraction"]
    assert padded["kernel_s"]["expert_ffn"] > 1.05 * bare["kernel_s"]["expert_ffn"]
    carried = padded["kernel_s"]["dispatch"] / bare["kernel_s"]["dispatch"]
    assert (carried > 1.1) if dispatch == "nccl" else (carried == pytest.approx(1))
    assert abs(padded["engine"]["difference"]) < 0.25


def test_experts_that_choose_are_even_and_leave_tokens_out() -> None:
    row = told("{capacity_factor: 1.0, router: expert-choice}")
    assert row["imbalance"] == pytest.approx(1)
    assert row["padding_fraction"] == pytest.approx(0)
    assert 0 < row["tokens_without_expert_fraction"] < 0.2
    assert any("assumed: experts take" in one for one in row["warnings"])


def test_choices_are_made_of_every_capacity_asked_for() -> None:
    asked = Policy(capacity_factor=Choices((None, 1.0)), overflow=Choices(("drop-position", "reroute")))
    found = [one.capacity for one in choices_of(asked, plan=False, exchanges=True)]
    assert found == [None, CapacityPolicy(1.0), CapacityPolicy(1.0, overflow="reroute")]


@pytest.mark.parametrize(
    "policy", ["{router: expert-choice}", "{padding: capacity, capacity_factor: [none, 1]}"]
)
def test_padding_and_expert_choice_need_a_factor(policy: str) -> None:
    with pytest.raises(ScenarioError, match=r"needs a capacity_factor; fix: write capacity_factor: 1\.25"):
        told(policy)


def test_memory_follows_the_rows_that_a_capacity_leaves() -> None:
    scenario = parse_scenario(TEXT.format(policy="{}", layout="{}", routing="zipf")).scenario
    context, ones = Context.of(scenario), np.ones(1)
    cluster = load_cluster("dgx-h200", nodes=2)
    layout = Layout(dp=16, ep=16)

    def activations(capacity: CapacityPolicy | None) -> tuple[float, float]:
        case = context.case(cluster, layout, Choice(capacity=capacity), "prefill")
        serving = inference_memory(case, ones, 512 * ones, 512 * ones, context.busiest(case))["activations"]
        training = training_memory(case, TrainingState(), 1, 512, 1)["activations"]
        return float(serving[0]), training

    free = activations(None)
    kept = activations(CapacityPolicy(1.0))
    rerouted = activations(CapacityPolicy(1.0, overflow="reroute"))
    padded = activations(CapacityPolicy(2.0, padding="capacity"))
    assert kept[0] < free[0]
    assert kept[0] <= rerouted[0] < free[0]
    assert kept[1] == free[1] < padded[1]
    assert activations(CapacityPolicy(1e6)) == free


def shifted(trace: RoutingTrace, by: int) -> RoutingTrace:
    """The same routing with experts renamed: another traffic."""
    ids = (np.asarray(trace.expert_ids).astype(int) + by) % trace.n_experts
    return replace(trace, expert_ids=ids.astype(np.uint8))


@pytest.fixture
def traces(tmp_path: Path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    spec = load_model("olmoe-1b-7b")
    score = rng.gumbel(size=(600, 16, 64)) + 1.0 * rng.standard_normal((16, 64))
    ids = np.argsort(-score, axis=-1)[..., : spec.moe.top_k].astype(np.uint8)
    weights = -np.sort(-rng.random(ids.shape), axis=-1).astype(np.float16)
    one = RoutingTrace("olmoe", 64, 8, tuple(range(16)), expert_ids=ids, expert_weights=weights)
    for name, trace in (("now", one), ("before", shifted(one, 5))):
        write_trace(trace, tmp_path / f"{name}.safetensors")
    return tmp_path / "now.safetensors", tmp_path / "before.safetensors"


def test_weights_of_a_trace_say_what_a_drop_costs(traces: tuple[Path, Path]) -> None:
    rows = {
        one: told(f"{{capacity_factor: 1.0, overflow: {one}}}", routing=str(traces[0]))
        for one in ("drop-position", "drop-weight")
    }
    assert rows["drop-weight"]["dropped_fraction"] == pytest.approx(rows["drop-position"]["dropped_fraction"])
    lost = [rows[one]["dropped_weight_fraction"] for one in ("drop-weight", "drop-position")]
    assert lost[0] < 0.8 * lost[1]
    assert lost[1] == pytest.approx(rows["drop-position"]["dropped_fraction"], rel=0.1)


@pytest.mark.parametrize("placement", ["eplb", "balanced", "coactivation"])
def test_a_stale_placement_is_worse_and_moving_costs_little(
    traces: tuple[Path, Path], placement: str
) -> None:
    now, before = traces
    layout = f"{{placement: {placement}, redundant_experts: 16, placement_trace: {{}}, rebalance_every: 100}}"
    rows = [told(routing=str(now), layout=layout.replace("{}", str(one))) for one in (now, before)]
    assert rows[0]["imbalance"] < rows[1]["imbalance"]
    assert rows[0]["step_s"] < rows[1]["step_s"]
    assert rows[0]["rebalance"]["moved_fraction"] == 0
    assert rows[0]["rebalance"]["transfer_s"] == 0
    moving = rows[1]["rebalance"]
    assert 0.2 < moving["moved_fraction"] <= 1
    assert moving["step_share"] == pytest.approx(moving["transfer_s"] / (100 * rows[1]["step_s"]))
    # no quicker than the busiest rank's bytes over all its links
    assert moving["transfer_s"] > moving["busiest_rank_bytes"] / 500e9
    assert moving["transfer_s"] < moving["busiest_rank_bytes"] / 10e9


def test_pipeline_stages_move_their_own_layers_at_once(traces: tuple[Path, Path]) -> None:
    now, before = traces
    kept = f"ep: 8, placement: eplb, redundant_experts: 8, placement_trace: {before}, rebalance_every: 7"
    rows = [told(routing=str(now), layout=f"{{pp: {pp}, {kept}}}") for pp in (1, 2)]
    one, two = (row["rebalance"] for row in rows)
    assert 0.5 <= two["busiest_rank_bytes"] / one["busiest_rank_bytes"] < 0.7
    assert two["transfer_s"] < 0.7 * one["transfer_s"]
    assert two["moved_fraction"] == one["moved_fraction"]
    assert two["busiest_rank_bytes"] <= rows[1]["memory_bytes"]["weights_experts"]


def test_the_bytes_that_move_are_whole_experts(traces: tuple[Path, Path]) -> None:
    now, before = traces
    layout = f"{{placement: eplb, redundant_experts: 16, placement_trace: {before}, rebalance_every: 7}}"
    scenario = parse_scenario(TEXT.format(policy="{}", layout=layout, routing=now)).scenario
    found = run(scenario)
    maker = found.context.traffic
    old = maker.placement(found.layout, 8)
    new = maker.placement(found.layout, 8, maker.source)
    moved = moved_experts(old, new, ranks_per_domain=8)
    most = int((moved.received_near + moved.received_far).max())
    assert found.row["rebalance"]["busiest_rank_bytes"] == pytest.approx(most * 3 * 2048 * 1024 * 2.0)
    assert found.row["rebalance"]["moved_fraction"] == pytest.approx(moved.fraction)
    assert np.allclose(balanced(inclusion(maker.placed_by, maker.shape), 16).n_replicas, 1)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("{rebalance_every: 5}", "rebalance_every needs a placement to come from"),
        ("{placement_trace: no-such}", "neither a routing in the catalog nor a file"),
        ("{placement_trace: absent.npz}", "there is no such placement_trace file"),
    ],
)
def test_bad_placement_traces_are_refused(layout: str, said: str) -> None:
    with pytest.raises((ScenarioError, TraceError), match=said):
        told(layout=layout)


def test_a_placement_trace_of_another_model_is_refused(traces: tuple[Path, Path], tmp_path: Path) -> None:
    other = read_trace(traces[0])
    ids = np.asarray(other.expert_ids)[..., :4]
    write_trace(RoutingTrace("other", 64, 4, other.layer_ids, expert_ids=ids), tmp_path / "o.safetensors")
    with pytest.raises(
        TraceError, match=r"layout\.placement_trace: 4: the trace of other has the model's top_k 8"
    ):
        told(layout=f"{{placement_trace: {tmp_path / 'o.safetensors'}}}")
