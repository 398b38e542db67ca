"""What a plan promises: order, targets, memory, and a reason for all that is out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import MoesimError
from moesim.plan import plan, planner
from moesim.plan.outcome import layout_row
from moesim.plan.planner import Plan
from moesim.plan.space import enumerate_layouts
from moesim.scenario import parse_scenario

BASE = """
model: {model}
cluster: {{gpu: {gpu}, nodes: {nodes}, gpus_per_node: {gpus}}}
workload: {workload}
{more}
"""
SERVE = "{kind: serve, input: 1000, output: 200, batch_per_rank: [4, 32, 128]}"
TRAIN = "{kind: train, global_batch: 32, sequence: 1024}"


@cache
def planned(
    model: str = "qwen3-30b-a3b",
    *,
    gpu: str = "h200-sxm",
    nodes: str = "1",
    gpus: int = 4,
    workload: str = SERVE,
    more: str = "",
    override: tuple[str, ...] = (),
) -> Plan:
    text = BASE.format(model=model, gpu=gpu, nodes=nodes, gpus=gpus, workload=workload, more=more)
    return plan(parse_scenario(text, override).scenario)


def value(found: Plan, metric: str) -> list[float]:
    return [float(one.outcome.metric(metric)[one.point]) for one in found.ranked]  # type: ignore[index]


def layouts(found: Plan) -> list[dict[str, Any]]:
    return [layout_row(one.outcome.case.layout) for one in found.ranked]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.values())


@pytest.mark.parametrize(
    ("more", "metric", "sign"),
    [
        ("", "usd_per_mtok", 1),
        ("minimise: tpot", "tpot", 1),
        ("minimise: ttft", "ttft", 1),
        ("maximise: tokens_per_s", "tokens_per_s", -1),
        ("maximise: tokens_per_s_per_gpu", "tokens_per_s_per_gpu", -1),
        ("maximise: mfu", "mfu", -1),
    ],
)
def test_ranking_follows_the_objective(more: str, metric: str, sign: int) -> None:
    found = planned(more=more)
    scores = [sign * score for score in value(found, metric)]
    assert len(scores) > 5
    assert scores == sorted(scores)
    for one in found.ranked:  # and each layout stands at its best size
        assert one.score == pytest.approx(np.min((sign * one.outcome.metric(metric))[one.outcome.fits]))


def test_targets_are_met_and_what_misses_them_says_by_how_much() -> None:
    found = planned(more="subject_to: {tpot: <= 8 ms, ttft: <= 260 ms}")
    assert 0 < len(found.ranked) < len(planned().ranked)
    assert max(value(found, "tpot")) <= 8e-3
    assert max(value(found, "ttft")) <= 0.26
    missed = [one for one in found.refused if one.kind == "target"]
    assert missed
    for one in missed:
        assert "not <= 8 ms" in one.reason or "not <= 260 ms" in one.reason
        assert one.batch_per_rank in (4, 32, 128)
        assert one.cluster is not None


def test_a_bound_from_below() -> None:
    free = value(planned(), "tokens_per_s")
    bound = float(np.median(free))
    found = planned(more=f'subject_to: {{tokens_per_s: ">= {bound:.0f} tokens/s"}}')
    assert 0 < len(found.ranked) < len(free)
    assert min(value(found, "tokens_per_s")) >= bound - 1
    assert any("tokens_per_s is" in one.reason for one in found.refused)


def test_a_target_can_make_a_smaller_batch_the_best() -> None:
    free, bound = planned(), planned(more="subject_to: {tpot: <= 8 ms}")

    def batch(one: Any) -> float:
        return float(one.outcome.workload["batch_per_rank"][one.point])

    assert max(batch(one) for one in bound.ranked) < max(batch(one) for one in free.ranked)


@pytest.mark.parametrize("workload", [SERVE, TRAIN])
def test_every_layout_is_ranked_or_out_for_a_reason(workload: str) -> None:
    found = planned(workload=workload, more="subject_to: {step: <= 100 ms}")
    (cluster,) = found.scenario.cluster.clusters()
    train = workload is TRAIN
    tried = enumerate_layouts(found.context.model, cluster, found.scenario.layout, train=train)
    told = {key(row) for row in layouts(found)} | {key(one.layout) for one in found.refused}
    assert {key(layout_row(layout)) for layout in tried.layouts} <= told
    assert all(one.reason and one.kind for one in found.refused)
    assert {one.kind for one in found.refused} <= {"divisibility", "memory", "target", "dominated"}


def test_memory_is_kept_and_what_exceeds_it_says_by_how_much() -> None:
    found = planned("mixtral-8x7b", gpu="h100-sxm")
    assert all(one.outcome.fits[one.point] for one in found.ranked)
    out = [one for one in found.refused if one.kind == "memory"]
    assert out  # 93 GB of weights on one GPU of 80 GB
    for one in out:
        need = float(one.reason.split("needs ")[1].split(" GB")[0])
        have = float(one.reason.split("GPU has ")[1].split(" GB")[0])
        assert need > have == 80.0
        assert one.memory_bytes is not None
        assert one.memory_bytes["total"] == pytest.approx(need * 1e9, rel=1e-3)


def test_more_memory_rules_nothing_more_out(tmp_path: Path) -> None:
    source = Path(planner.__file__).parents[1] / "catalog" / "gpus" / "h100-sxm.yaml"
    text = source.read_text().replace("name: h100-sxm", "name: h100-large").split("aliases")[0]
    rest = source.read_text().partition("memory: 80 GB\n")[2]
    large = tmp_path / "h100-large.yaml"
    large.write_text(f"{text}memory: 160 GB\n{rest}")

    def out(gpu: str) -> set[tuple[Any, ...]]:
        found = planned("mixtral-8x7b", gpu=gpu)
        return {key(one.layout) for one in found.refused if one.kind == "memory"}

    assert out(str(large)) < out("h100-sxm")


def test_a_larger_cluster_of_nodes_is_chosen_by_the_target() -> None:
    found = planned("mixtral-8x7b", nodes="1..4", gpus=2, gpu="h100-sxm")
    nodes = {one.outcome.case.cluster.nodes for one in found.ranked}
    assert nodes >= {2, 4}
    for one in found.ranked:
        assert one.outcome.case.layout.n_ranks == 2 * one.outcome.case.cluster.nodes


def test_gpus_are_compared_by_price() -> None:
    found = planned(gpu="[h100-sxm, h200-sxm]", more="minimise: usd_per_mtok")
    assert {one.outcome.case.cluster.gpu.name for one in found.ranked} == {"h100-sxm", "h200-sxm"}
    dear = planned(
        gpu="[h100-sxm, h200-sxm]", more="minimise: usd_per_mtok", override=("cluster.price=9 USD/gpu-hour",)
    )
    assert min(value(dear, "usd_per_mtok")) > min(value(found, "usd_per_mtok"))


def test_overrides_of_the_layout() -> None:
    found = planned(override=("layout.ep=2,4", "layout.pp=1"))
    assert {row["ep"] for row in layouts(found)} == {2, 4}
    assert {row["pp"] for row in layouts(found)} == {1}


def test_a_dispatch_that_a_layout_cannot_have_rules_it_out() -> None:
    found = planned(override=("policy.dispatch=low-latency", "layout.pp=1"))
    assert found.ranked
    assert {one.outcome.case.dispatch for one in found.ranked} == {"low-latency"}
    assert any(
        "hold every token already" in one.reason and one.kind == "divisibility" for one in found.refused
    )


def test_an_unknown_placement_is_refused_where_it_stands() -> None:
    with pytest.raises(MoesimError, match=r"--set layout\.placement=spread: 'spread': is unknown"):
        planned(override=("layout.placement=spread",))


def test_a_dense_model() -> None:
    found = planned("llama-3.1-8b")
    assert {(row["ep"], row["etp"]) for row in layouts(found)} == {(1, 1)}
    assert {row["tp"] for row in layouts(found)} >= {1, 2, 4}
    assert all(one.outcome.imbalance is None for one in found.ranked)
    assert all(one.outcome.case.overlap == "none" for one in found.ranked)


def test_an_objective_that_the_workload_lacks() -> None:
    found = planned(workload="{kind: prefill, tokens_per_rank: 4096, prompt: 1024}", more="minimise: tpot")
    assert found.ranked == ()
    assert any(one.reason == "tpot is no figure of a prefill workload" for one in found.refused)


def test_a_target_that_the_workload_lacks() -> None:
    found = planned(
        workload="{kind: prefill, tokens_per_rank: 4096, prompt: 1024}", more="subject_to: {tpot: <= 1 s}"
    )
    assert found.ranked == ()
    assert any(one.reason == "tpot is no figure of a prefill workload" for one in found.refused)


def test_a_batch_that_does_not_divide_is_no_end_of_a_training_plan() -> None:
    found = planned("olmoe-1b-7b", workload="{kind: train, global_batch: 2, sequence: 1024}")
    assert found.ranked
    assert all(one.outcome.case.layout.dp <= 2 for one in found.ranked)
    out = [one for one in found.refused if "global batch" in one.reason]
    assert out
    assert {one.kind for one in out} == {"divisibility"}
    assert {one.layout["dp"] for one in out} == {4}


def test_concurrency_is_shared_among_replicas() -> None:
    found = planned(workload="{kind: serve, input: 1000, output: 200, concurrency: 64}")
    for one in found.ranked:
        (batch,) = one.outcome.workload["batch_per_rank"]
        assert batch == 64 / one.outcome.case.layout.dp


def ten_best(found: Plan) -> list[tuple[Any, ...]]:
    return [
        (*key(layout_row(one.outcome.case.layout)), one.outcome.case.overlap, one.point, one.score)
        for one in found.ranked[:10]
    ]


@pytest.mark.parametrize("more", ["", "minimise: tpot", "maximise: mfu", "subject_to: {tpot: <= 20 ms}"])
def test_pruning_by_a_bound_leaves_the_ten_best_alone(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = planned(gpus=8, more=more)
    monkeypatch.setattr(planner, "KEPT", 10**9)
    whole = planned.__wrapped__(gpus=8, more=more)
    assert not any(one.kind == "dominated" for one in whole.refused)
    assert any(one.kind == "dominated" for one in pruned.refused)
    assert ten_best(pruned) == ten_best(whole)


def test_the_bound_looks_at_its_own_capacity_factor() -> None:
    found = planned(gpus=8, more="policy: {capacity_factor: [1.0, none]}")
    factors = {one.outcome.case.capacity and one.outcome.case.capacity.factor for one in found.ranked}
    assert factors == {1.0, None}


def test_points_are_counted() -> None:
    found = planned()
    assert found.n_layouts >= len(found.ranked)
    assert found.n_evaluated == found.n_layouts * 3
    assert len(found.cloud) == found.n_evaluated
    assert found.cpu_s > 0
    assert found.elapsed_s > 0


def test_the_cloud_says_which_points_meet_the_targets() -> None:
    found = planned(more="subject_to: {tpot: <= 8 ms, ttft: <= 260 ms}")
    meeting = [one for one in found.cloud if one["feasible"]]
    assert {key(one["layout"]) for one in meeting} == {key(row) for row in layouts(found)}
    assert all(one["tpot_s"] <= 8e-3 and one["ttft_s"] <= 0.26 for one in meeting)
    missing = [one for one in found.cloud if not one["feasible"]]
    assert all(one["tpot_s"] > 8e-3 or one["ttft_s"] > 0.12 for one in missing)


def test_progress_is_told() -> None:
    told: list[float] = []
    text = BASE.format(
        model="olmoe-1b-7b", gpu="h200-sxm", nodes="1", gpus=2, workload=SERVE, more="layout: {pp: 1}"
    )
    plan(parse_scenario(text).scenario, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
