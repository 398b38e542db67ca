"""How fast a step runs through the recurrence and the simulation; compare rows of one run only.

Rows are grouped by the number of ranks; a saved run's extra_info holds the number of tasks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.engine import Program, Task, evaluate, makespan, simulate

N_LAYERS = 10
N_POINTS = 20
EXECUTORS = {
    "makespan": makespan,
    "evaluate": evaluate,
    "simulate": simulate,
    "simulate-alone": lambda program: simulate(program, contention=False),
    "simulate-unfolded": lambda program: simulate(program, folding=False),
}
"""The first two do all points at once, the others one."""


def moe_step(n_ranks: int, n_kinds: int) -> Program:
    """Two micro-batches of attention, dispatch, experts, combine; ranks of `n_kinds` different loads."""
    rng = np.random.default_rng(0)
    everyone, nodes = np.zeros(n_ranks, dtype=np.int64), np.arange(n_ranks) // 8
    kind = np.arange(n_ranks) % n_kinds

    def times_s() -> np.ndarray:
        return rng.uniform(1e-5, 3e-5, (N_POINTS, n_kinds))[:, kind]

    steps = (
        ("norm", "compute", None, None),
        ("attention", "compute", None, None),
        ("reduce", "comm", nodes, "nvlink"),
        ("dispatch", "comm", everyone, "nic"),
        ("experts", "compute", None, None),
        ("combine", "copy", everyone, "nic"),  # a stream of its own, so that it meets dispatches
    )
    tasks: list[Task] = []
    for layer in range(N_LAYERS):
        for name, stream, group, link in steps:
            for half in "ab":
                after = (len(tasks) - 2,) if len(tasks) > 1 else ()  # the same half's last step
                tasks.append(Task(f"{layer}.{half}.{name}", stream, times_s(), after, group, link=link))
    return Program(n_ranks, tuple(tasks), N_POINTS)


@pytest.mark.parametrize(("n_ranks", "n_kinds"), [(8, 8), (32, 32), (128, 128), (512, 512), (512, 8)])
@pytest.mark.parametrize("executor", EXECUTORS)
def test_executor(benchmark: Any, executor: str, n_ranks: int, n_kinds: int) -> None:
    program = moe_step(n_ranks, n_kinds)
    benchmark.group = f"{n_ranks} ranks of {n_kinds} loads"
    benchmark.extra_info["n_tasks"] = len(program.tasks)
    result = benchmark.pedantic(EXECUTORS[executor], (program,), rounds=3, warmup_rounds=1)
    makespan_s = np.atleast_1d(getattr(result, "makespan_s", result))[0]
    assert makespan_s >= makespan(program)[0] * (1 - 1e-9)
