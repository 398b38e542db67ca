"""Fluid all-to-alls by size and tolerance; compare rows of one run only. SimGrid stands beside where installed.

SimGrid (``pip install 'moesim[bench]'``, built from source) solves the same flows with its raw network model; at 256
ranks it takes minutes. `tests/simgrid_reference.py` runs it.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.engine import Flows, Network, Program, Task, simulate
from moesim.network import solve_flows
from tests.fluid_cases import all_to_all, solver
from tests.simgrid_reference import solve_with_simgrid


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
    """Two micro-batches' exchanges inside the SimPy engine; the second starts halfway through the first."""
    cases = [all_to_all(256, seed=seed) for seed in (1, 2)]
    finish_s = [case.solve(tolerance=1e-2) for case in cases]
    alone_s = finish_s[0].max()
    everyone = np.zeros(256, dtype=np.int64)
    tasks = [Task("wait", "compute", np.full((1, 256), alone_s / 2))]
    for name, stream, case, ends_s, after in zip(
        "ab", ("comm", "copy"), cases, finish_s, ((), (0,)), strict=True
    ):
        own_s = np.zeros(256)
        np.maximum.at(own_s, case.source, ends_s)
        np.maximum.at(own_s, case.target, ends_s)
        flows = Flows(case.source, case.target, case.routes, case.flow_bytes, case.flow_latency_s, own_s)
        tasks.append(Task(name, stream, own_s, after, everyone, flows=flows))
    program = Program(256, tuple(tasks), network=Network(cases[0].link_bytes_per_s, tolerance=1e-2))
    benchmark.group = "two all-to-alls of 256 ranks that overlap, in the engine, tolerance 1%"
    timeline = benchmark.pedantic(simulate, args=(program,), rounds=2, warmup_rounds=1)
    assert timeline.end_s.max() > 1.5 * alone_s


@pytest.mark.parametrize("n_ranks", [32, 64])
def test_beside_simgrid(benchmark: Any, n_ranks: int) -> None:
    beside_simgrid(benchmark, all_to_all(n_ranks)[:4])


@pytest.mark.slow
def test_reference_case_of_256_ranks_beside_simgrid(benchmark: Any, shared_data: Path) -> None:
    """Six minutes and more."""
    with np.load(shared_data / "network" / "o10.npz", allow_pickle=False) as file:
        beside_simgrid(
            benchmark, tuple(file[name] for name in ("caps", "route", "flow_bytes", "flow_latency"))
        )


def beside_simgrid(benchmark: Any, case: tuple[np.ndarray, ...]) -> None:
    """Time ours; SimGrid's CPU seconds, in a process of its own, and the ratio of both go to extra_info."""
    if find_spec("simgrid") is None:
        pytest.skip("SimGrid is not installed: pip install 'moesim[bench]'")
    benchmark.group = f"exact all-to-all of {len(case[1])} flows"
    finish_s = benchmark.pedantic(solve_flows, args=case, rounds=2, warmup_rounds=1)
    ours_s = []
    for _ in range(3):
        began_s = time.process_time()
        solve_flows(*case)
        ours_s.append(time.process_time() - began_s)
    theirs, theirs_s = solve_with_simgrid(*case)
    benchmark.extra_info |= {
        "cpu_s": min(ours_s),
        "simgrid_cpu_s": theirs_s,
        "simgrid_cpu_s_over_ours": theirs_s / min(ours_s),
        "greatest_difference": float(np.abs(finish_s / theirs - 1).max()),
    }
    assert finish_s == pytest.approx(theirs, rel=1e-6)
