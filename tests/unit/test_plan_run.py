"""One layout run, explained, and put in plain values."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moesim.errors import LayoutError, ScenarioError
from moesim.plan import explain, plan, plan_answer, price_one, run, run_answer
from moesim.plan.context import Choice, Context
from moesim.plan.explain import families_used
from moesim.plan.workloads import serve_outcome
from moesim.report.tables import run_table
from moesim.scenario import Scenario, load_scenario, parse_scenario
from moesim.work.case import Layout

BASE = """
model: {model}
cluster: {{gpu: h200-sxm, nodes: 1, gpus_per_node: {gpus}}}
layout: {layout}
workload: {workload}
{more}
"""
DECODE = "{kind: decode, batch_per_rank: 16, context: 1000}"
SERVE = "{kind: serve, input: 1000, output: 100, batch_per_rank: 16}"


def asked(
    model: str = "olmoe-1b-7b",
    *,
    gpus: int = 8,
    layout: str = "{}",
    workload: str = DECODE,
    more: str = "",
) -> Scenario:
    text = BASE.format(model=model, gpus=gpus, layout=layout, workload=workload, more=more)
    return parse_scenario(text).scenario


@pytest.mark.parametrize(
    ("layout", "found"),
    [
        ("{}", {"tp": 1, "dp": 8, "ep": 8, "etp": 1, "pp": 1, "redundant_experts": 0}),
        ("{tp: 8}", {"tp": 8, "dp": 1, "ep": 8, "etp": 1}),
        ("{tp: 8, ep: 2}", {"ep": 2, "etp": 4}),  # experts are cut where a replica has ranks to spare
        ("{tp: 2, ep: 8}", {"dp": 4, "ep": 8, "etp": 1}),
        ("{redundant_experts: 8}", {"redundant_experts": 8, "placement": "eplb"}),
        ("{pp: 2}", {"pp": 2, "dp": 4, "ep": 4}),
    ],
)
def test_what_a_run_fills_in(layout: str, found: dict[str, Any]) -> None:
    row = run(asked(layout=layout)).row
    assert {name: row["layout"][name] for name in found} == found


def test_a_dense_model_needs_no_expert_sizes() -> None:
    row = run(asked("llama-3.1-8b", layout="{tp: 8}")).row
    assert (row["layout"]["ep"], row["layout"]["etp"]) == (1, 1)
    assert row["imbalance"] is None
    assert row["choice"]["dispatch"] is None


def test_a_run_has_a_timeline_for_every_stage() -> None:
    found = run(asked(layout="{pp: 4}"))
    assert len(found.timelines) == 4
    assert all(timeline.makespan_s > 0 for timeline in found.timelines)


@pytest.mark.parametrize("pp", [1, 2])
def test_breakdown_adds_up_to_what_was_played(pp: int) -> None:
    row = run(asked(layout=f"{{pp: {pp}}}", workload=SERVE)).row
    assert sum(row["breakdown_s"].values()) == pytest.approx(row["engine"]["step_s"], rel=1e-6)


def test_two_batches_in_turn_hide_an_exchange_at_a_large_batch() -> None:
    layout, work = "{ep: 8}", "{kind: prefill, tokens_per_rank: 16384, prompt: 4096}"
    serial, turns = (
        run(asked("deepseek-v2-lite", layout=layout, workload=work, more=f"policy: {{overlap: {one}}}")).row
        for one in ("none", "two-batch")
    )
    exposed = [
        sum(
            seconds for name, seconds in row["breakdown_s"].items() if "dispatch" in name or "combine" in name
        )
        for row in (serial, turns)
    ]
    assert exposed[1] < exposed[0]
    assert turns["choice"]["overlap"] == "two-batch"


def test_capacity_drops_tokens_of_a_skewed_router() -> None:
    more = "routing: {{kind: zipf, exponent: 1}}\npolicy: {{capacity_factor: {}}}"
    work = "{kind: prefill, tokens_per_rank: 2048, prompt: 1024}"
    tight, wide, free = (
        run(asked(workload=work, more=more.format(factor))).row["dropped_fraction"]
        for factor in ("1.0", "2.0", "none")
    )
    assert tight > wide > free == 0
    assert tight < 1


def test_what_does_not_fit_has_no_figures_but_its_memory() -> None:
    found = run(asked("deepseek-v3", gpus=4))
    assert found.outcome is None
    assert found.timelines == ()
    assert found.row["feasible"] is False
    assert found.row["step_s"] is None
    assert found.row["memory_bytes"]["total"] > found.row["memory_bytes"]["capacity"]
    with pytest.raises(LayoutError, match="more GPUs"):
        price_one(asked("deepseek-v3", gpus=4))


def test_training_that_does_not_fit_is_told_in_the_same_way() -> None:
    found = run(asked("mixtral-8x22b", workload="{kind: train, global_batch: 8, sequence: 1024}"))
    assert found.outcome is None
    assert found.row["why_not"].startswith("needs ")
    assert found.row["tokens_per_s"] is None


def test_several_values_are_for_a_plan() -> None:
    with pytest.raises(ScenarioError, match=r"layout.tp has 2 values and a run takes one"):
        run(asked(layout="{tp: [1, 2]}"))


def test_terms_add_up_to_the_kernel_time_of_the_step() -> None:
    outcome = price_one(asked())
    told = explain(outcome)
    (step,) = told["passes"]
    seconds = sum(term["seconds"] for term in step["terms"])
    assert seconds == pytest.approx(sum(float(one[0]) for one in outcome.category_s.values()))
    assert step["step_s"] >= 0.99 * seconds  # waiting for the busiest rank comes on top
    for term in step["terms"]:
        assert term["seconds_busiest_rank"] >= term["seconds"] * (1 - 1e-9)
    assert "decode" in told["summary"] or "step" in told["summary"]


def test_terms_run_once_a_layer() -> None:
    told = explain(price_one(asked()))
    times = {term["name"]: term["times"] for term in told["passes"][0]["terms"]}
    assert 16 in times.values()  # OLMoE has 16 layers
    assert any(name.startswith("head") for name in times)


def test_families_behind_a_result_are_those_of_its_terms() -> None:
    outcome = price_one(asked(workload=SERVE))
    told = explain(outcome)
    assert {row["what"] for row in families_used(outcome)} == set(told["families"])
    assert all(row["kind"] and row["data"] and row["held_out"] for row in families_used(outcome))


def test_a_run_as_plain_values_and_maps() -> None:
    scenario = asked(more="routing: uniform")
    found = run(scenario)
    told, maps = run_answer(found, scenario)
    json.dumps(told)
    assert told["scenario"]["model"] == "olmoe-1b-7b"
    assert "batch_per_rank 16" in told["scenario"]["workload"]
    assert maps.expert_load is not None
    assert maps.expert_load.shape == (16, 64)
    np.testing.assert_allclose(maps.expert_load.mean(axis=1), 1)
    assert maps.rank_load is not None
    assert maps.rank_load.shape == (16, 8)
    assert float(np.mean(np.max(maps.rank_load, axis=1))) == pytest.approx(told["imbalance"])
    assert maps.traffic is not None
    assert maps.traffic.shape == (8, 8)
    assert np.all(np.diag(maps.traffic) == 0)
    # a token's copies leave for at most min(top_k, ranks - 1) other ranks, one FP16 row of 2,048 each
    sent = maps.traffic.sum(axis=1)
    assert np.all(sent <= 16 * 7 * 2048 * 2)
    assert np.all(sent > 16 * 3 * 2048 * 2)


def test_maps_of_a_dense_model_are_empty() -> None:
    scenario = asked("llama-3.1-8b", layout="{tp: 8}")
    _, maps = run_answer(run(scenario), scenario)
    assert maps.expert_load is None
    assert maps.traffic is None
    assert maps.timeline is not None


def test_maps_of_what_does_not_fit_are_empty() -> None:
    scenario = asked("deepseek-v3", gpus=4)
    told, maps = run_answer(run(scenario), scenario)
    assert told["provenance"] == []
    assert maps.timeline is None


def test_a_plan_as_plain_values() -> None:
    open_ = "{kind: decode, batch_per_rank: [4, 8, 16, 64], context: 1000}"
    scenario = asked(gpus=2, workload=open_, more="subject_to: {tpot: <= 50 ms}")
    told: list[float] = []
    answer = plan_answer(plan(scenario), n_engine=2, n_maps=1, progress=told.append)
    json.dumps(answer.plan)
    assert answer.plan["targets"] == {"tpot": "<= 50 ms"}
    assert answer.plan["objective"] == "usd_per_mtok"
    assert "batch_per_rank 4..64" in answer.plan["scenario"]["workload"]
    played = [row["engine"] is not None for row in answer.plan["layouts"]]
    assert played == [True, True] + [False] * (len(played) - 2)
    assert len(answer.maps) == 1
    assert told == [0.5, 1.0]
    assert answer.plan["provenance"]


def test_a_plan_with_nothing_to_rank() -> None:
    answer = plan_answer(plan(asked("deepseek-v3", gpus=1)))
    assert answer.plan["layouts"] == []
    assert answer.plan["provenance"] == []
    assert answer.maps == ()


def test_an_outcome_that_kept_no_steps_cannot_be_explained() -> None:
    bare = replace(price_one(asked()), passes={})
    with pytest.raises(ScenarioError, match="no terms to explain"):
        explain(bare)


def test_a_size_is_explained_by_the_prompts_it_runs() -> None:
    """Sizes that share a prefill step share its row: the second and third here run the first's and the second's."""
    sizes = {
        "input": np.array([2000.0, 2000.0, 500.0]),
        "output": np.full(3, 1000.0),
        "batch_per_rank": np.array([4.0, 8.0, 8.0]),
    }
    context = Context.of(asked())
    layout = Layout(dp=8, ep=8)
    (cluster,) = asked().cluster.clusters()

    def prompts_s(points: list[int], point: int) -> float:
        chosen = {name: axis[points] for name, axis in sizes.items()}
        told = explain(serve_outcome(context, cluster, layout, Choice(), chosen), point)
        return next(one["step_s"] for one in told["passes"] if one["name"] == "prefill")

    for point in range(3):
        assert prompts_s([0, 1, 2], point) == pytest.approx(prompts_s([point], 0), rel=1e-6)
    assert prompts_s([0, 1, 2], 2) < 0.6 * prompts_s([0, 1, 2], 1)
    with pytest.raises(ScenarioError, match="no such size"):
        prompts_s([0, 1], 2)


TRAIN = "{kind: train, global_batch: 64, sequence: 1024"


def test_a_training_run_takes_days_and_dollars() -> None:
    scenario = asked(workload=TRAIN + ", tokens: 1000000000000}")
    told, _ = run_answer(run(scenario), scenario)
    assert told["days"] == pytest.approx(1e12 / told["tokens_per_s"] / 86400)
    # paid by the hour, whatever was made in it
    assert told["usd"] == pytest.approx(told["days"] * 24 * 8 * told["cluster"]["usd_per_gpu_hour"])
    table = Console(width=100, record=True, file=StringIO())
    table.print(run_table(told))
    text = table.export_text()
    assert "days of the whole run" in text
    assert "cost of the whole run" in text
    best = plan_answer(plan(scenario), n_engine=0).plan["layouts"][0]
    assert best["usd"] == pytest.approx(best["usd_per_mtok"] * 1e6)


def test_days_need_the_tokens_of_the_run() -> None:
    scenario = asked(workload=TRAIN + "}")
    told, _ = run_answer(run(scenario), scenario)
    assert (told["days"], told["usd"]) == (None, None)
    assert "days" not in run_answer(run(asked()), asked())[0]


def test_redundant_experts_cannot_be_trained() -> None:
    with pytest.raises(LayoutError, match=r"set redundant_experts=0"):
        run(asked(layout="{ep: 8, redundant_experts: 8}", workload=TRAIN + "}"))


def test_a_model_with_an_encoder_has_no_pipeline() -> None:
    with pytest.raises(LayoutError, match=r"pp=2.*encoder.*try pp=1"):
        run(asked("switch-base-8", layout="{pp: 2}"))
    found = plan(asked("switch-base-8", layout="{tp: 1, pp: [1, 2]}"))
    assert {one.outcome.case.layout.pp for one in found.ranked} == {1}
    assert any("encoder" in one.reason for one in found.refused if one.layout["pp"] == 2)


def test_the_shipped_training_scenario_is_explained_in_full() -> None:
    outcome = price_one(load_scenario("scenarios/mixtral-train-128.yaml").single())
    told = explain(outcome)
    terms = {one["name"]: sum(term["seconds"] for term in one["terms"]) for one in told["passes"]}
    assert sum(terms.values()) == pytest.approx(float(outcome.step_s[0]), rel=0.02)
    named = {term["name"] for term in told["passes"][-1]["terms"]}
    assert {"grad_reduce_scatter.dense", "weight_all_gather.expert", "optimizer", "wait"} <= named
    # 8 micro-batches of a replica
    assert terms["forward"] > 7 * 0.1
    json.dumps(told)
