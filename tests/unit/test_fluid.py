"""The fluid solver by hand: shares that can be worked out, edges, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesim.errors import TrafficError
from moesim.network import FluidNetwork, _fluid_compiled, fluid, solve_flows
from tests.fluid_cases import SOLVERS, all_to_all, random_case, solver


@pytest.fixture(params=sorted(SOLVERS))
def either(request: pytest.FixtureRequest):
    with solver(request.param):
        yield


def test_three_flows_on_a_line(either: None) -> None:
    # Bertsekas and Gallager's example: one long flow over two links, one short flow on each; 10 and 4 B/s.
    finish_s = solve_flows([10.0, 4.0], [[0, 1], [0, -1], [1, -1]], [8.0, 8.0, 8.0], np.zeros(3))
    # the link of 4 halves: 2 B/s each for 4 s; the other short flow has 10 - 2 = 8 B/s, 1 s
    assert finish_s == pytest.approx([4.0, 1.0, 4.0])


def test_what_an_ended_flow_leaves_goes_to_the_others(either: None) -> None:
    finish_s = solve_flows([1.0], [[0], [0]], [1.0, 3.0], [0.0, 0.0])
    assert finish_s == pytest.approx([2.0, 4.0])


def test_a_later_flow_takes_its_share(either: None) -> None:
    finish_s = solve_flows([1.0], [[0], [0]], [2.0, 1.0], [0.0, 0.5], [0.0, 0.5])
    assert finish_s == pytest.approx([3.0, 3.0])


def test_nothing_to_move_and_no_link_cost_the_latency_alone(either: None) -> None:
    finish_s = solve_flows([1.0], [[0], [-1]], [0.0, 5.0], [0.25, 0.5], [1.0, 0.0])
    assert finish_s == pytest.approx([1.25, 0.5])
    assert solve_flows([1.0], np.zeros((0, 2), dtype=int), [], []).size == 0


def test_nearly_tied_levels_lose_no_flow(either: None) -> None:
    nudged = 1.0 + 1e-13
    finish_s = solve_flows([1.0, nudged, 1.0], [[0, 1], [1, 2], [2, 0]], [1.0, 1.0, nudged], np.zeros(3))
    assert finish_s == pytest.approx([2.0] * 3)


def test_a_link_crossed_twice_is_shared_twice(either: None) -> None:
    # the flow that crosses twice takes two of three shares
    finish_s = solve_flows([3.0], [[0, 0], [0, -1]], [1.0, 1.0], [0.0, 0.0])
    assert finish_s == pytest.approx([1.0, 1.0])
    finish_s = solve_flows([3.0], [[0, 0]], [3.0], [0.0])
    assert finish_s == pytest.approx([2.0])


def test_a_remainder_too_small_for_the_clock_still_ends(either: None) -> None:
    network = FluidNetwork([1e9])
    flows = network.add([[0]], [1e-9], [1e6])  # 1e-18 s after 1e6 s is 1e6 s
    assert network.advance().tolist() == [0]
    assert network.finish_s(flows) == pytest.approx([1e6])


def test_time_is_told_and_asked_in_steps(either: None) -> None:
    network = FluidNetwork([1.0])
    assert math.isinf(network.next_s)
    flows = network.add([[0], [0]], [1.0, 3.0], [1.0, 1.0])
    assert network.next_s == pytest.approx(1.0)
    assert network.advance(2.5).size == 0
    assert network.rates(flows) == pytest.approx([0.5, 0.5])
    assert network.next_s == pytest.approx(3.0)
    assert network.advance(3.0).tolist() == [0]
    assert np.isnan(network.finish_s(flows)).tolist() == [False, True]
    late = network.add([[0]], [1.0], [4.0])
    network.advance()
    assert network.finish_s(np.concatenate([flows, late])) == pytest.approx([3.0, 6.0, 6.0])


def test_flows_cannot_begin_in_the_past(either: None) -> None:
    network = FluidNetwork([1.0])
    network.add([[0]], [1.0], [0.0])
    network.advance()
    with pytest.raises(TrafficError, match=r"0\.5: time has been played up to 1 s"):
        network.add([[0]], [1.0], [0.5])


def test_the_compiled_core_means_what_it_says_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(7, n_flows=25)
    with solver("compiled"):
        compiled = case.solve(tolerance=1e-2)
        for name in ("_sift", "_end", "_leave", "_join", "_release", "_fill", "_fix", "run"):
            monkeypatch.setattr(_fluid_compiled, name, getattr(_fluid_compiled, name).py_func)
        assert case.solve(tolerance=1e-2) == pytest.approx(compiled, rel=1e-12)


def test_numpy_stands_in_where_numba_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    fluid._solver_type.cache_clear()
    monkeypatch.setattr(fluid, "find_spec", lambda name: None)
    try:
        assert fluid._solver_type() is SOLVERS["numpy"]
    finally:
        fluid._solver_type.cache_clear()


def test_tolerance_saves_most_events_of_an_all_to_all() -> None:
    case = all_to_all(32)
    counts = []
    for tolerance in (0.0, 5e-2):
        network = FluidNetwork(case.link_bytes_per_s, tolerance=tolerance)
        network.add(case.routes, case.flow_bytes, case.flow_latency_s)
        network.advance()
        counts.append(network.n_events)
    assert counts[1] < counts[0] / 3


BAD = {
    "zero capacity": ({"link_bytes_per_s": [1.0, 0.0]}, r"0\.0: link 1 needs a positive, finite capacity"),
    "negative capacity": ({"link_bytes_per_s": [-2.0, 1.0]}, r"-2\.0: link 0 needs a positive"),
    "no number": ({"link_bytes_per_s": [math.nan, 1.0]}, "link 0 needs a positive"),
    "absent link": ({"routes": [[0, 2]]}, "2: flow 0 goes over a link that is not there: links are 0 to 1"),
    "below none": ({"routes": [[0, -2]]}, "-2: flow 0 goes over"),
    "fractions": ({"routes": [[0.5, 1.0]]}, "routes are link numbers"),
    "one route short": ({"routes": [[0, 1], [0, 1]]}, r"1 flows need routes of shape \(1, n_hops\)"),
    "bytes not a number": ({"flow_bytes": [math.nan]}, "nan: flow bytes must be finite"),
    "negative bytes": ({"flow_bytes": [-1.0]}, r"-1\.0: flow bytes must be finite and not negative"),
    "negative latency": ({"flow_latency_s": [-1.0]}, "latencies"),
    "start not a number": ({"flow_start_s": [math.inf]}, "starts"),
    "two latencies": ({"flow_latency_s": [0.0, 0.0]}, "1 flows need as many begins"),
    "tolerance of 1": ({"tolerance": 1.0}, "a tolerance is a share"),
    "negative tolerance": ({"tolerance": -0.1}, "a tolerance is a share"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_input_is_refused(name: str) -> None:
    good = {"link_bytes_per_s": [1.0, 1.0], "routes": [[0, 1]], "flow_bytes": [1.0], "flow_latency_s": [0.0]}
    changes, message = BAD[name]
    with pytest.raises(TrafficError, match=message):
        solve_flows(**(good | changes))
