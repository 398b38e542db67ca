"""Every experiment of the documentation runs, at small size."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the calibrate extra is not installed")

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "experiments"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "common")


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("name", SCRIPTS)
def test_experiment_runs_and_its_committed_results_have_its_columns(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [name, "--small", "--seeds", "1", "-o", str(tmp_path)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    rows = rows_of(tmp_path / f"{name}.csv")
    committed = rows_of(FOLDER / "results" / f"{name}.csv")
    assert len(committed) >= len(rows) >= 2
    assert list(committed[0]) == list(rows[0])
    assert (tmp_path / f"{name}.html").stat().st_size > 10_000
