"""Laws of max-min fair sharing, at every instant and for both solvers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.network import FluidNetwork, solve_flows
from moesim.network.fluid import max_min_rates
from tests.fluid_cases import SOLVERS, Case, random_case, solver

seeds = st.integers(0, 2**32 - 1)
solvers = st.sampled_from(sorted(SOLVERS))
sizes = st.integers(1, 40)
few = settings(max_examples=60, deadline=None)


def on_links(case: Case, per_flow: np.ndarray) -> np.ndarray:
    """Sum of a quantity of the flows over each link's flows."""
    used = case.routes >= 0
    spread = np.broadcast_to(per_flow[:, None], used.shape)[used]
    return np.bincount(case.routes[used], spread, case.link_bytes_per_s.size)


def certify(case: Case, rates: np.ndarray) -> None:
    """No link above its capacity, and every flow crosses a saturated link on which none is faster."""
    load = on_links(case, rates)
    assert np.all(load <= case.link_bytes_per_s * (1 + 1e-9))
    full = np.append(load >= case.link_bytes_per_s * (1 - 1e-9), False)
    fastest = np.zeros(case.link_bytes_per_s.size + 1)
    np.maximum.at(fastest, case.routes, np.broadcast_to(rates[:, None], case.routes.shape))
    flying = rates > 0
    bounded = full[case.routes] & (rates[:, None] >= fastest[case.routes] * (1 - 1e-9)) & (case.routes >= 0)
    assert bounded[flying].any(axis=1).all()


@few
@given(seed=seeds, name=solvers, n_flows=sizes)
def test_rates_are_max_min_fair_at_every_instant_and_bytes_are_conserved(
    seed: int, name: str, n_flows: int
) -> None:
    case = random_case(seed, n_flows=n_flows)
    moved, last_s = np.zeros(n_flows), 0.0
    with solver(name):
        network = FluidNetwork(case.link_bytes_per_s)
        flows = network.add(case.routes, case.flow_bytes, case.flow_latency_s)
        rates = np.zeros(n_flows)
        while network.next_s < np.inf:
            now_s = network.next_s
            ended = network.advance(now_s)
            moved += rates * (now_s - last_s)
            assert moved[ended] == pytest.approx(case.flow_bytes[ended], rel=1e-6)
            rates, last_s = network.rates(flows), now_s
            certify(case, rates)
            begun = case.flow_latency_s <= now_s
            assert np.array_equal(rates > 0, begun & np.isnan(network.finish_s(flows)))
    assert moved == pytest.approx(case.flow_bytes, rel=1e-6)


@few
@given(seed=seeds, name=solvers, tolerance=st.sampled_from([1e-3, 3e-2, 0.3]))
def test_rates_are_fair_after_every_group_and_arrivals_inside_one_get_theirs(
    seed: int, name: str, tolerance: float
) -> None:
    case = random_case(seed)
    rng = np.random.default_rng(seed)
    begin_s = np.where(rng.random(len(case.routes)) < 0.5, 0.0, rng.uniform(0, 0.05, len(case.routes)))
    with solver(name):
        network = FluidNetwork(case.link_bytes_per_s, tolerance=tolerance)
        flows = network.add(case.routes, case.flow_bytes, begin_s)
        while network.next_s < np.inf:
            network.advance(network.next_s)
            rates = network.rates(flows)
            certify(case, rates)
            flying = (begin_s <= network.now_s) & np.isnan(network.finish_s(flows))
            assert np.array_equal(rates > 0, flying)
        assert np.isfinite(network.finish_s(flows)).all()


@few
@given(seed=seeds, n_flows=sizes)
def test_static_rates_are_certified(seed: int, n_flows: int) -> None:
    case = random_case(seed, n_flows=n_flows)
    rates = max_min_rates(case.link_bytes_per_s, case.routes)
    assert np.all(rates > 0)
    certify(case, rates)


@few
@given(seed=seeds, n_flows=sizes, tolerance=st.sampled_from([0.0, 1e-3, 3e-2]))
def test_both_solvers_give_the_same_times(seed: int, n_flows: int, tolerance: float) -> None:
    case = random_case(seed, n_flows=n_flows)
    with solver("numpy"):
        plain = case.solve(tolerance=tolerance)
    with solver("compiled"):
        assert case.solve(tolerance=tolerance) == pytest.approx(plain, rel=1e-9)


@few
@given(seed=seeds, name=solvers)
def test_no_link_ends_before_its_load_over_its_capacity(seed: int, name: str) -> None:
    case = random_case(seed)
    with solver(name):
        finish_s = case.solve()
    need_s = on_links(case, case.flow_bytes) / case.link_bytes_per_s
    assert finish_s.max() >= need_s.max() * (1 - 1e-12)
    alone_s = case.flow_bytes / np.append(case.link_bytes_per_s, np.inf)[case.routes].min(axis=1)
    assert np.all(finish_s >= (case.flow_latency_s + alone_s) * (1 - 1e-12))


@few
@given(seed=seeds, name=solvers)
def test_order_of_flows_and_names_of_links_do_not_matter(seed: int, name: str) -> None:
    case = random_case(seed)
    rng = np.random.default_rng(seed)
    flows, links = rng.permutation(len(case.routes)), rng.permutation(case.link_bytes_per_s.size)
    renamed = np.append(np.argsort(links), -1)[case.routes]
    other = Case(
        case.link_bytes_per_s[links], renamed[flows], case.flow_bytes[flows], case.flow_latency_s[flows]
    )
    with solver(name):
        assert other.solve() == pytest.approx(case.solve()[flows], rel=1e-9)


@few
@given(seed=seeds, name=solvers, scale=st.sampled_from([1e-3, 3.0, 1e4]))
def test_bytes_and_capacities_scaled_together_change_nothing(seed: int, name: str, scale: float) -> None:
    case = random_case(seed)
    scaled = case._replace(link_bytes_per_s=case.link_bytes_per_s * scale, flow_bytes=case.flow_bytes * scale)
    with solver(name):
        assert scaled.solve() == pytest.approx(case.solve(), rel=1e-9)


@few
@given(seed=seeds, name=solvers)
def test_disjoint_traffic_is_not_seen(seed: int, name: str) -> None:
    a, b = random_case(seed), random_case(seed + 1)
    both = Case(
        np.concatenate([a.link_bytes_per_s, b.link_bytes_per_s]),
        np.concatenate([a.routes, np.where(b.routes < 0, -1, b.routes + a.link_bytes_per_s.size)]),
        np.concatenate([a.flow_bytes, b.flow_bytes]),
        np.concatenate([a.flow_latency_s, b.flow_latency_s]),
    )
    with solver(name):
        assert both.solve() == pytest.approx(np.concatenate([a.solve(), b.solve()]), rel=1e-9)


@few
@given(seed=seeds, name=solvers)
def test_flows_added_as_they_come_end_as_if_known_before(seed: int, name: str) -> None:
    case = random_case(seed)
    begin_s = np.round(np.random.default_rng(seed).uniform(0, 0.05, len(case.routes)), 2)
    with solver(name):
        at_once = solve_flows(*case[:3], np.zeros(len(begin_s)), begin_s)
        network = FluidNetwork(case.link_bytes_per_s)
        numbers = np.empty(len(begin_s), dtype=np.int64)
        for instant_s in np.unique(begin_s):
            network.advance(instant_s)
            now = begin_s == instant_s
            numbers[now] = network.add(case.routes[now], case.flow_bytes[now], begin_s[now])
        network.advance()
        assert network.finish_s(numbers) == pytest.approx(at_once, rel=1e-9)


@few
@given(seed=seeds, name=solvers, until_s=st.floats(0, 0.05))
def test_looking_ahead_plays_nothing(seed: int, name: str, until_s: float) -> None:
    case = random_case(seed)
    with solver(name):
        network = FluidNetwork(case.link_bytes_per_s)
        numbers = network.add(*case[1:3], np.zeros(len(case.routes)))
        network.advance(until_s)
        left, wanted_s = network.ahead()
        assert np.array_equal(np.sort(left), numbers[np.isnan(network.finish_s(numbers))])
        assert network.now_s <= until_s
        network.advance()
        assert network.finish_s(left) == pytest.approx(wanted_s, rel=1e-9)


@few
@given(seed=seeds, name=solvers, tolerance=st.floats(1e-4, 0.2))
def test_tolerance_bounds_the_error_and_saves_events(seed: int, name: str, tolerance: float) -> None:
    case = random_case(seed)
    case = case._replace(flow_latency_s=np.zeros(len(case.routes)))
    with solver(name):
        exact, rough = case.solve(), case.solve(tolerance=tolerance)
        events = []
        for used in (0.0, tolerance):
            network = FluidNetwork(case.link_bytes_per_s, tolerance=used)
            network.add(case.routes, case.flow_bytes, case.flow_latency_s)
            network.advance()
            events.append(network.n_events)
    assert rough.max() == pytest.approx(exact.max(), rel=tolerance)
    assert events[1] <= events[0]


@few
@given(seed=seeds, name=solvers)
def test_same_input_same_bits(seed: int, name: str) -> None:
    case = random_case(seed)
    with solver(name):
        assert np.array_equal(case.solve(), case.solve())
