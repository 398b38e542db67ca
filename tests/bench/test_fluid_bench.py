"""Fluid all-to-alls by size and tolerance; compare rows of one run only. SimGrid stands beside where installed.

SimGrid (``pip install simgrid``, built from source) solves the same flows with its raw network model; beyond 64
ranks it takes minutes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.network import FluidNetwork, solve_flows
from tests.fluid_cases import all_to_all, solver


@pytest.mark.parametrize(
    ("n_ranks", "tolerance"),
    [(8, 0.0), (64, 0.0), (64, 1e-3), (256, 0.0), (256, 1e-3), (256, 1e-2), (512, 1e-2), (1024, 3e-2)],
)
def test_all_to_all(benchmark: Any, n_ranks: int, tolerance: float) -> None:
    case = all_to_all(n_ranks)
    benchmark.group = f"all-to-all of {n_ranks} ranks"
    benchmark.extra_info["n_flows"] = len(case.routes)
    finish_s = benchmark.pedantic(case.solve, kwargs={"tolerance": tolerance}, rounds=1, warmup_rounds=0)
    assert np.isfinite(finish_s).all()


@pytest.mark.parametrize("name", ["compiled", "numpy"])
def test_solver(benchmark: Any, name: str) -> None:
    case = all_to_all(64)
    benchmark.group = "all-to-all of 64 ranks, tolerance 1%"
    with solver(name):
        benchmark.pedantic(case.solve, kwargs={"tolerance": 1e-2}, rounds=2, warmup_rounds=1)


def test_two_overlapping_all_to_alls(benchmark: Any) -> None:
    first, second = all_to_all(256, seed=1), all_to_all(256, seed=2)
    benchmark.group = "two all-to-alls of 256 ranks that overlap, tolerance 1%"

    def play() -> float:
        network = FluidNetwork(first.link_bytes_per_s, tolerance=1e-2)
        network.add(first.routes, first.flow_bytes, first.flow_latency_s)
        half_s = 0.5 * alone_s
        network.advance(half_s)
        network.add(second.routes, second.flow_bytes, half_s + second.flow_latency_s)
        network.advance()
        return network.n_events

    alone_s = first.solve(tolerance=1e-2).max()
    assert benchmark.pedantic(play, rounds=2, warmup_rounds=1) > 0


@pytest.mark.parametrize("engine", ["moesim", "simgrid"])
def test_beside_simgrid(benchmark: Any, engine: str) -> None:
    case = all_to_all(32)
    benchmark.group = "exact all-to-all of 32 ranks"
    if engine == "simgrid":
        pytest.importorskip("simgrid", reason="SimGrid is not installed: pip install simgrid")
        from tests.simgrid_reference import solve_with_simgrid

        benchmark.pedantic(solve_with_simgrid, args=tuple(case), rounds=1)
    else:
        benchmark.pedantic(solve_flows, args=tuple(case), rounds=2, warmup_rounds=1)
