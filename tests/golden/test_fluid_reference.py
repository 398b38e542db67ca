"""All-to-alls solved by SimGrid 4.1 (../shared/data/network): each flow's finish."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moesim.network import solve_flows

CASES = [f"o{number:02d}" for number in range(1, 11)]


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "network"


@pytest.mark.parametrize("case", CASES)
def test_every_flow_ends_when_simgrid_says(folder: Path, case: str) -> None:
    with np.load(folder / f"{case}.npz", allow_pickle=False) as file:
        known = (file["caps"], file["route"], file["flow_bytes"], file["flow_latency"])
        finish_s, makespan_s = file["flow_finish"], float(file["makespan"])
    assert solve_flows(*known) == pytest.approx(finish_s, rel=1e-6)
    rough_s = solve_flows(*known, tolerance=1e-3)
    assert np.abs(rough_s - finish_s).max() <= 1e-3 * makespan_s


def test_the_cases_are_those_of_the_summary(folder: Path) -> None:
    lines = (folder / "summary.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["case"] for line in lines] == CASES
