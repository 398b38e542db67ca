"""How fast plans are: CPU seconds and points priced per CPU second; figures, no limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.plan import plan
from moesim.scenario import read_scenario

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"

PEER_CPU_S = {
    "deepseek-v3-h200-32": 45.0,
    "qwen3-235b-h200-8": 36.0,
    "qwen3-235b-h200-32": 63.0,
    "mixtral-8x7b-h200-8": 72.0,
}
"""AIConfigurator 0.12 on the same question for one backend, CPU seconds on two cores, as measured for this project."""


@pytest.mark.parametrize("name", sorted(PEER_CPU_S))
def test_plan(benchmark, name):
    scenario = read_scenario(SCENARIOS / f"{name}.yaml")
    found = benchmark.pedantic(plan, args=(scenario,), rounds=1, iterations=1)
    benchmark.extra_info |= {
        "cpu_s": found.cpu_s,
        "points": found.n_evaluated,
        "points_per_cpu_s": found.n_evaluated / found.cpu_s,
        "peer_cpu_s_over_ours": PEER_CPU_S[name] / found.cpu_s,
    }
    assert found.n_layouts > 20
    assert found.ranked
