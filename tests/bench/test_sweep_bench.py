"""How fast sweeps are: points priced per CPU second; figures, no limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.plan import price_one, read_grid, sweep
from moesim.scenario import read_scenario

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"

SWEEPS = {
    "capacity of Mixtral training": ("mixtral-train-128", ("policy.capacity_factor=1.0:2.0:0.025",)),
    "nic and batch of DeepSeek-V3 decode": (
        "deepseek-v3-layouts-h200-64",
        ("workload.batch_per_rank=8,16,32,64,128", "cluster.nic=100:800:100 Gb/s", "layout.ep=32,64"),
    ),
    "layouts and imbalance of DeepSeek-V3 decode": (
        "deepseek-v3-layouts-h200-64",
        (
            "layout.ep=32,64",
            "layout.redundant_experts=0,64",
            "routing.trace=imbalance-none,imbalance-collapsed",
        ),
    ),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_points(benchmark, name):
    scenario, sets = SWEEPS[name]
    file = SCENARIOS / f"{scenario}.yaml"
    price_one(read_scenario(file))  # what is loaded once
    told = benchmark.pedantic(lambda: sweep(read_grid(file, sets)), rounds=1, iterations=1)
    benchmark.extra_info |= {key: told[key] for key in ("n_points", "cpu_s", "points_per_cpu_s")}
    assert told["n_points"] > told["n_refused"]
