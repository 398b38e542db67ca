"""Collectives whose flows share a network inside the engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine import Flows, Network, Program, Task, evaluate, simulate
from moesim.errors import EngineError
from moesim.network import solve_flows

few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)
N_RANKS = 6
PORTS = np.full(2 * N_RANKS, 1e9)
"""Links 0 to 5 out of the ranks, 6 to 11 into them."""


def exchange(rng: np.random.Generator, ranks: np.ndarray) -> Flows:
    source, target = (side.ravel() for side in np.meshgrid(ranks, ranks))
    source, target = source[source != target], target[source != target]
    routes = np.stack([source, N_RANKS + target], axis=1)
    n_bytes = rng.integers(1, 9, source.size) * 1e6
    latency_s = rng.choice([0.0, 1e-6, 5e-6], source.size)
    return flows_of(source, target, routes, n_bytes, latency_s)


def flows_of(source, target, routes, n_bytes, latency_s) -> Flows:
    finish_s = solve_flows(PORTS, routes, n_bytes, latency_s)
    alone_s = np.zeros(N_RANKS)
    np.maximum.at(alone_s, source, finish_s)
    np.maximum.at(alone_s, target, finish_s)
    return Flows(source, target, routes, n_bytes, latency_s, alone_s)


def task(name: str, flows: Flows, stream: str, more_s: float, after: tuple[int, ...] = ()) -> Task:
    members = np.isin(np.arange(N_RANKS), np.concatenate([flows.source, flows.target]))
    group = np.where(members, 0, -1)
    return Task(name, stream, flows.alone_s + more_s, after, group, "dispatch", "nic", flows)


@few
@given(seed=seeds, more_s=st.sampled_from([0.0, 1e-5]))
def test_alone_an_exchange_takes_its_own_time_on_every_rank(seed: int, more_s: float) -> None:
    rng = np.random.default_rng(seed)
    compute = Task("compute", "compute", rng.uniform(0, 1e-3, (1, N_RANKS)))
    sent = task("dispatch", exchange(rng, np.arange(N_RANKS)), "comm", more_s, (0,))
    program = Program(N_RANKS, (compute, sent, compute), network=Network(PORTS))
    assert simulate(program).end_s == pytest.approx(evaluate(program).end_s[:, 0], rel=1e-9)


@few
@given(seed=seeds)
def test_overlapping_exchanges_end_as_all_their_flows_solved_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    late_s = float(rng.choice([0.0, 3e-3, 1.0]))
    first, second = (exchange(rng, np.arange(N_RANKS)) for _ in range(2))
    wait = Task("wait", "copy", np.full((1, N_RANKS), late_s))
    tasks = (task("a", first, "comm", 0.0), wait, task("b", second, "copy", 0.0))
    timeline = simulate(Program(N_RANKS, tasks, network=Network(PORTS)))
    together = [np.concatenate(pair) for pair in zip(parts(first), parts(second), strict=True)]
    start_s = np.repeat([0.0, late_s], first.n_bytes.size)
    finish_s = solve_flows(PORTS, together[2], together[3], together[4], start_s)
    is_second = np.arange(start_s.size) >= first.n_bytes.size
    for position, mine in ((0, ~is_second), (2, is_second)):
        ends_s = np.zeros(N_RANKS)
        np.maximum.at(ends_s, together[0][mine], finish_s[mine])
        np.maximum.at(ends_s, together[1][mine], finish_s[mine])
        assert timeline.end_s[position] == pytest.approx(ends_s, rel=1e-9)
    alone = simulate(Program(N_RANKS, tasks, network=Network(PORTS)), contention=False)
    assert timeline.end_s.max() >= alone.end_s.max() * (1 - 1e-9)


def parts(flows: Flows) -> tuple[np.ndarray, ...]:
    return flows.source, flows.target, flows.routes, flows.n_bytes, flows.latency_s


@few
@given(seed=seeds)
def test_disjoint_groups_do_not_see_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    halves = [exchange(rng, np.arange(3)), exchange(rng, np.arange(3, 6))]
    both = Program(
        N_RANKS,
        (task("left", halves[0], "comm", 0.0), task("right", halves[1], "comm", 0.0)),
        network=Network(PORTS),
    )
    ends_s = simulate(both).end_s
    assert ends_s[0, :3] == pytest.approx(halves[0].alone_s[:3], rel=1e-9)
    assert ends_s[1, 3:] == pytest.approx(halves[1].alone_s[3:], rel=1e-9)


@few
@given(seed=seeds, tolerance=st.sampled_from([1e-3, 1e-2]))
def test_tolerance_moves_ends_by_about_as_much(seed: int, tolerance: float) -> None:
    rng = np.random.default_rng(seed)
    flows = exchange(rng, np.arange(N_RANKS))
    program = Program(N_RANKS, (task("a", flows, "comm", 0.0),), network=Network(PORTS, tolerance))
    assert simulate(program).end_s.max() == pytest.approx(flows.alone_s.max(), rel=2 * tolerance)


@few
@given(seed=seeds)
def test_collectives_of_one_task_go_by_themselves(seed: int) -> None:
    """Each half starts when its own members are ready, with its own flows alone."""
    rng = np.random.default_rng(seed)
    halves = [exchange(rng, np.arange(3)), exchange(rng, np.arange(3, 6))]
    joint = [np.concatenate(pair) for pair in zip(*(parts(one) for one in halves), strict=True)]
    alone_s = halves[0].alone_s + halves[1].alone_s
    group = np.array([0, 0, 0, 1, 1, 1])
    late_s = np.array([[0.0, 0.0, 0.0, 2.0, 0.0, 0.0]])
    tasks = (
        Task("compute", "compute", late_s),
        Task("both", "comm", alone_s, (0,), group, "dispatch", "nic", Flows(*joint, alone_s)),
    )
    program = Program(N_RANKS, tasks, network=Network(PORTS))
    assert simulate(program).end_s[1] == pytest.approx(alone_s + np.where(group, 2.0, 0.0), rel=1e-9)


@few
@given(seed=seeds, n=st.integers(3, 5))
def test_a_chain_of_overlapping_collectives_ends_as_solved_at_once(seed: int, n: int) -> None:
    """Each starts while the one before is in flight, all on ranks of their own behind shared links."""
    rng = np.random.default_rng(seed)
    ports = np.concatenate([np.full(4 * n, 1e9), [1e9]])
    tasks, starts_s, routes, sizes = [], [], [], []
    for one in range(n):
        source, target = np.array([2 * one]), np.array([2 * one + 1])
        route, n_bytes = np.array([[source[0], 4 * n]]), np.array([float(rng.integers(2, 9)) * 1e6])
        alone_s = np.zeros(2 * n)
        alone_s[2 * one : 2 * one + 2] = n_bytes[0] / 1e9
        group = np.full(2 * n, -1)
        group[2 * one : 2 * one + 2] = 0
        start_s = one * 1e-3
        tasks.append(Task(f"wait {one}", "compute", np.array(start_s), (), group))
        flows = Flows(source, target, route, n_bytes, np.zeros(1), alone_s)
        tasks.append(Task(f"send {one}", "comm", alone_s, (2 * one,), group, "x", "nic", flows))
        starts_s.append(start_s)
        routes.append(route)
        sizes.append(n_bytes)
    ends_s = simulate(Program(2 * n, tuple(tasks), network=Network(ports))).end_s
    wanted_s = solve_flows(
        ports, np.concatenate(routes), np.concatenate(sizes), np.zeros(n), np.array(starts_s)
    )
    assert [ends_s[2 * one + 1, 2 * one] for one in range(n)] == pytest.approx(wanted_s.tolist(), rel=1e-9)


def test_flows_and_a_task_without_share_their_class_of_link() -> None:
    """The exchange's bytes have the network to themselves; a sum on another stream takes half of its NICs."""
    flows = flows_of(*(np.array(x) for x in ([0], [1], [[0, 7]], [1e6], [0.0])))
    group = np.array([0, 0, -1, -1, -1, -1])
    sent = Task("dispatch", "comm", flows.alone_s, (), group, "dispatch", "nic", flows)
    summed = Task("sum", "compute", np.full(N_RANKS, 1e-3), (), group, "all_reduce", "nic")
    both = simulate(Program(N_RANKS, (sent, summed), network=Network(PORTS)))
    assert both.end_s[:, 0] == pytest.approx([2e-3, 2e-3])
    elsewhere = Task("sum", "compute", np.full(N_RANKS, 1e-3), (), group, "all_reduce", "nvlink")
    apart = simulate(Program(N_RANKS, (sent, elsewhere), network=Network(PORTS)))
    assert apart.end_s[:, 0] == pytest.approx([1e-3, 1e-3])


def test_work_beside_the_bytes_hides_their_delay() -> None:
    flows = flows_of(*(np.array(x) for x in ([0], [1], [[0, 7]], [1e6], [0.0])))
    kept = replace(flows, beside_s=np.full(N_RANKS, 10e-3), sharpness=6.0)
    assert flows.late_s(0, 3e-3) == pytest.approx(2e-3)
    assert kept.late_s(0, 1e-3) == 0
    assert 0 < kept.late_s(0, 3e-3) < 1e-5
    # far beyond the work beside, bytes are all there is
    assert kept.late_s(0, 1.0) == pytest.approx(1.0 - 10e-3, rel=1e-5)


def test_a_flow_leaves_no_collective() -> None:
    flows = flows_of(*(np.array(x) for x in ([0], [3], [[0, 9]], [1e6], [0.0])))
    group = np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(EngineError, match="a flow stays in its collective"):
        Program(N_RANKS, (Task("a", "comm", flows.alone_s, (), group, flows=flows),), network=Network(PORTS))


def test_a_rank_without_flows_is_done_at_once() -> None:
    flows = flows_of(*(np.array(x) for x in ([0], [1], [[0, 7]], [1e6], [0.0])))
    group = np.zeros(N_RANKS, dtype=int)
    program = Program(
        N_RANKS, (Task("a", "comm", flows.alone_s, (), group, flows=flows),), network=Network(PORTS)
    )
    assert simulate(program).end_s[0] == pytest.approx([1e-3, 1e-3, 0, 0, 0, 0])


def test_flows_without_a_network_are_refused() -> None:
    flows = exchange(np.random.default_rng(0), np.arange(N_RANKS))
    with pytest.raises(EngineError, match="a: flows need a collective, a network"):
        Program(N_RANKS, (task("a", flows, "comm", 0.0),))
    with pytest.raises(EngineError, match="program of one point"):
        Program(N_RANKS, (task("a", flows, "comm", 0.0),), 2, network=Network(PORTS))
