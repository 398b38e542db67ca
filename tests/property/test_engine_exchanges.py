"""Token exchanges of real steps as flows in the engine: against the recurrence, slow links, and groups in flight."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest

import moesim.plan.exchanges
from moesim.engine import evaluate, simulate
from moesim.network import solve_flows
from moesim.plan import plan, plan_answer, price_one, run, run_answer
from moesim.plan.outcome import Outcome
from moesim.plan.steps import Pass
from moesim.scenario import Scenario, parse_scenario
from moesim.work.ops import Dispatch, Exchange

LAYOUTS = {
    "ep 16 over 2 nodes": "{dp: 16, ep: 16}",
    "2 stages": "{dp: 16, ep: 16, pp: 2}",
    "tp 2": "{tp: 2, dp: 8, ep: 16}",
    "etp 2": "{dp: 16, ep: 8, etp: 2}",
    "2 sets": "{dp: 32, ep: 16}",
    "one node": "{dp: 8, ep: 8}",
}
KINDS = ("low-latency", "normal", "nccl")


def asked(
    layout: str, *, kind: str = "normal", fabric: str = "{}", more: str = "", cluster: str = ""
) -> Scenario:
    nodes = {"2 stages": 4, "2 sets": 4, "one node": 1}.get(layout, 2)
    layout = LAYOUTS.get(layout, layout)
    return parse_scenario(
        f"""
model: olmoe-1b-7b
cluster: {{gpu: h200-sxm, nodes: {nodes}, gpus_per_node: 8, fabric: {fabric}{cluster}}}
layout: {layout}
workload: {{kind: prefill, tokens_per_rank: 4096, prompt: 1024}}
policy: {{dispatch: {kind}{more}}}
routing: uniform
"""
    ).scenario


@cache
def priced(
    layout: str, kind: str = "normal", fabric: str = "{}", more: str = "", cluster: str = ""
) -> Outcome:
    return price_one(asked(layout, kind=kind, fabric=fabric, more=more, cluster=cluster))


def prefill(outcome: Outcome) -> Pass:
    return outcome.passes["prefill"]


def slowed(layout: str, *, kind: str = "normal", **changed: str) -> float:
    """Played step over that of the free fabric."""
    whole = priced(layout, kind).play(0)
    worse = priced(layout, kind, **changed).play(0)
    assert whole.links == worse.links == "fluid"
    return worse.step_s / whole.step_s


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_even_routing_on_a_free_fabric_takes_what_the_recurrence_says(layout: str, kind: str) -> None:
    outcome = priced(layout, kind)
    played = outcome.play(0)
    assert played.links == "fluid"
    assert played.step_s == pytest.approx(float(outcome.step_s[0]), rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["ep 16 over 2 nodes", "etp 2", "2 sets"])
def test_a_slow_nic_slows_the_step_and_not_its_price(layout: str, kind: str) -> None:
    # of the second node, where the first set of ranks does not reach with two sets of one stage
    fabric = '{degraded: {"node1.nic3.*": 0.25}}'
    assert slowed(layout, kind=kind, fabric=fabric) > 1.01
    assert float(priced(layout, kind, fabric).step_s[0]) == float(priced(layout, kind).step_s[0])


def test_the_slower_of_two_sets_is_the_one_played() -> None:
    far = '{degraded: {"node3.nic3.*": 0.25}}'
    near = '{degraded: {"node0.nic3.*": 0.25}}'
    assert slowed("2 sets", fabric=far) == pytest.approx(slowed("2 sets", fabric=near), rel=0.02)
    assert slowed("2 sets", fabric=far) > 1.01


def test_a_slow_nic_slows_its_own_stage() -> None:
    whole, slow = (priced("2 stages", fabric=one) for one in ("{}", '{degraded: {"node2.nic0.*": 0.25}}'))
    first, second = zip(
        *([t.makespan_s for t in prefill(one).timelines(0)] for one in (whole, slow)), strict=True
    )
    assert first[1] == pytest.approx(first[0], rel=1e-9)
    assert second[1] > 1.01 * second[0]


def test_a_slow_nic_of_a_node_without_far_traffic_is_not_felt() -> None:
    assert slowed("one node", fabric='{degraded: {"node0.nic3.*": 0.25}}') == 1.0


def test_a_blocked_spine_slows_what_crosses_rails_only() -> None:
    spine = {"fabric": "{cross_rail: spine}", "cluster": ", oversubscription: 4"}
    assert slowed("ep 16 over 2 nodes", kind="low-latency", **spine) > 1.2
    # the two levels of DeepEP's normal kernels stay on a rail between nodes
    assert slowed("ep 16 over 2 nodes", kind="normal", **spine) == pytest.approx(1.0, abs=1e-3)


def test_sets_of_a_layout_share_the_spine() -> None:
    """A set of 16 ranks alone on four nodes' spine would have twice what it has beside another: as on its own two."""
    spine = {"fabric": "{cross_rail: spine}", "cluster": ", oversubscription: 4"}
    own = slowed("ep 16 over 2 nodes", kind="low-latency", **spine)
    assert slowed("2 sets", kind="low-latency", **spine) == pytest.approx(own, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_groups_in_flight_together_share_their_nics(kind: str) -> None:
    """Each shard's group alone has a NIC of twice the rate, both together one each."""
    own = priced("etp 2", kind, fabric="{gpus_per_nic: 2}")
    program = prefill(own).linked_program(0, 0)
    alone_s, shared_s = (simulate(program, contention=one).makespan_s for one in (False, True))
    assert alone_s == pytest.approx(float(evaluate(program).makespan_s[0]), rel=1e-9)
    assert shared_s > 1.001 * alone_s
    assert shared_s == pytest.approx(priced("etp 2", kind).play(0).step_s, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_flows_alone_on_the_programs_links_end_when_the_library_says(layout: str, kind: str) -> None:
    """Dispatch and combine reach different shares of a link: the program has one set of links for both."""
    own = prefill(priced(layout, kind))
    program = own.linked_program(0, 0)
    tasks = [task for task in program.tasks if task.flows is not None]
    names = {task.category for task in tasks}
    assert names == {"dispatch", "combine"}
    for task in tasks[:4]:
        for one in np.unique(task.group):
            flows = task.flows.among(np.flatnonzero(task.group == one).tolist())
            ends_s = np.zeros(program.n_ranks)
            finish_s = solve_flows(
                program.network.link_bytes_per_s, flows.routes, flows.n_bytes, flows.latency_s
            )
            for end in (flows.source, flows.target):
                np.maximum.at(ends_s, end, finish_s)
            members = task.group == one
            np.testing.assert_allclose(ends_s[members], flows.alone_s[members], rtol=1e-6)
            assert np.all(task.duration_s[members] >= flows.alone_s[members] * (1 - 1e-9))


@pytest.mark.parametrize("layout", ["ep 16 over 2 nodes", "tp 2", "etp 2"])
@pytest.mark.parametrize(
    ("dispatch", "more"),
    [
        ("low-latency", ""),
        ("low-latency", ", capacity_factor: 1.0"),
        ("low-latency", ", capacity_factor: 1.0, overflow: reroute"),
        ("low-latency", ", capacity_factor: 1.0, capacity_convention: megablocks"),
        ("nccl", ", capacity_factor: 1.0, padding: capacity"),
        ("nccl", ", capacity_factor: 1.0, router: expert-choice"),
    ],
)
def test_a_rank_receives_the_copies_that_it_is_priced_for(layout: str, more: str, dispatch: str) -> None:
    own = prefill(priced(layout, dispatch, more=more))
    program = own.linked_program(0, 0)
    (block,) = [one for one in own.timed.step.blocks if one.name == "moe"]
    (op,) = [node.op for node in block.nodes if isinstance(node.op, Dispatch)]
    dispatches = [task for task in program.tasks if task.category == "dispatch" and task.flows is not None]
    assert len(dispatches) == len(block.layers)
    for row, task in enumerate(dispatches):
        flows = task.flows
        here = flows.source // 8 == flows.target // 8
        for mine, copies in ((here, op.received_nvlink), (~here, op.received_nic)):
            arrived = np.bincount(flows.target[mine], flows.n_bytes[mine], program.n_ranks)
            np.testing.assert_allclose(arrived, copies[0, row] * op.token_bytes, rtol=1e-9)


def test_micro_batches_in_turn_share_their_flows() -> None:
    program = prefill(priced("ep 16 over 2 nodes", more=", overlap: two-batch")).linked_program(0, 0)
    named = {task.name: task for task in program.tasks if task.flows is not None}
    pairs = [(named[name], named[name[:-1] + "1"]) for name in named if name.endswith("dispatch.0")]
    assert pairs
    assert all(first.flows is second.flows for first, second in pairs)


def test_same_seed_same_timeline() -> None:
    first, second = (run(asked("etp 2", fabric="{gpus_per_nic: 2}")) for _ in range(2))
    assert json.dumps(first.row) == json.dumps(second.row)
    np.testing.assert_array_equal(first.timelines[0].end_s, second.timelines[0].end_s)


def test_too_many_flows_keep_their_price_by_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moesim.plan.exchanges, "MOST_FLOWS", 1000)
    outcome = price_one(asked("ep 16 over 2 nodes", fabric='{degraded: {"node1.nic3.*": 0.25}}'))
    played = outcome.play(0)
    assert played.links == "ports"
    assert played.step_s == pytest.approx(float(outcome.step_s[0]), rel=1e-9)
    scenario = asked("ep 16 over 2 nodes")
    told, _ = run_answer(run(scenario), scenario)
    assert told["engine"]["links"] == "ports"
    assert (
        "token exchanges have too many flows to share links: each rank's own ports price them"
        in told["warnings"]
    )


def test_what_is_played_on_the_links_gives_no_warning() -> None:
    for layout, kind, links in (
        ("ep 16 over 2 nodes", "normal", "fluid"),
        ("ep 16 over 2 nodes", "allgather", "ports"),
    ):
        scenario = asked(layout, kind=kind)
        told, _ = run_answer(run(scenario), scenario)
        assert told["engine"]["links"] == links
        assert not any("flows" in line for line in told["warnings"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_flows_are_no_more_than_those_counted_before(layout: str, kind: str) -> None:
    own = prefill(priced(layout, kind))
    n_flows = [
        t.flows.source.size
        for s in range(len(own.stage_s))
        for t in own.linked_program(s, 0).tasks
        if t.flows
    ]
    # of many tokens every pair has some; a rank that is in the rail of another needs no forward
    assert 0.8 * own.exchanges.n_flows <= sum(n_flows) <= own.exchanges.n_flows


def test_many_flows_are_solved_to_a_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_s = priced("etp 2").play(0).step_s
    monkeypatch.setattr(moesim.plan.exchanges, "EXACT_FLOWS", 0)
    outcome = price_one(asked("etp 2"))
    assert prefill(outcome).linked_program(0, 0).network.tolerance == 1e-2
    assert outcome.play(0).step_s == pytest.approx(exact_s, rel=0.01)


def test_gathers_and_dense_models_have_no_flows() -> None:
    played = price_one(asked("{dp: 16, ep: 16}", kind="allgather")).play(0)
    assert played.links == "ports"


def test_a_training_step_feels_a_slow_nic() -> None:
    text = """
model: olmoe-1b-7b
cluster: {{gpu: h200-sxm, nodes: 4, gpus_per_node: 8, fabric: {fabric}}}
layout: {{dp: 16, ep: 16, pp: 2}}
workload: {{kind: train, global_batch: 64, sequence: 1024}}
routing: uniform
"""
    slow = '{degraded: {"node2.nic3.*": 0.25}}'
    whole, slowed_ = (run(parse_scenario(text.format(fabric=one)).scenario).row for one in ("{}", slow))
    assert whole["engine"]["links"] == slowed_["engine"]["links"] == "fluid"
    assert abs(whole["engine"]["difference"]) < 0.01
    assert slowed_["step_s"] == whole["step_s"]
    assert slowed_["engine"]["step_s"] > 1.01 * whole["engine"]["step_s"]


def test_a_plan_confirms_its_best_layouts_on_the_links() -> None:
    scenario = asked("{tp: 1, ep: 16}", kind="low-latency", fabric='{degraded: {"node1.nic3.*": 0.25}}')
    answer = plan_answer(plan(scenario), n_engine=1, n_maps=0)
    engine = answer.plan["layouts"][0]["engine"]
    assert engine["links"] == "fluid"
    assert engine["difference"] > 0.01


def test_exchanges_of_one_pass_are_all_flows() -> None:
    own = prefill(priced("2 stages"))
    n_exchanges = sum(
        isinstance(node.op, Exchange)
        for block in own.timed.step.blocks
        for node in block.nodes * len(block.layers)
    )
    programs = [own.linked_program(stage, 0) for stage in range(2)]
    assert sum(task.flows is not None for one in programs for task in one.tasks) == n_exchanges
