"""``calibrate run`` as people type it: lists, refusals, a whole run on a processor, an interrupted one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from calibrate.app import app
from calibrate.run import command
from calibrate.run.command import parse_budget
from calibrate.run.session import Outcome
from moesim.errors import MeasurementError, UnitError

REPOSITORY = Path(__file__).resolve().parents[2]


def calibrate(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "calibrate", "run", *args]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, **options)


def run_here(*args: str) -> int:
    return int(app(["run", *args], standalone_mode=False) or 0)


def test_list_needs_no_gpu_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("all", "--list", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert 550 <= told["n_points"] == len(told["points"]) <= 620
    assert told["seconds"] == pytest.approx(sum(one["seconds"] for one in told["points"]))
    assert told["seconds"] < 6 * 60
    assert told["n_held_out"] == pytest.approx(0.2 * told["n_points"], rel=0.05)
    assert sum(row["points"] for row in told["families"].values()) == told["n_points"]


def test_list_with_a_budget_shows_what_fits_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("transfers", "--list", "--budget", "10s") == 0
    lines = capsys.readouterr().out.splitlines()
    points = [line for line in lines if "torch" in line]
    assert lines[-1].startswith(f"{len(points)} points")
    assert 5 <= len(points) <= 30
    assert sum(float(line.split()[0]) for line in points) <= 10.2


def test_a_smaller_gpu_gets_smaller_points(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("kernels", "--list", "--json", "--gpu", "a100-80g-sxm") == 0
    told = json.loads(capsys.readouterr().out)
    assert not any(one["dtype"] in ("fp8", "fp8_block") for one in told["points"])


def test_listing_loads_no_torch() -> None:
    script = (
        "import sys; from calibrate.app import app;"
        "app(['run', 'transfers', '--list', '--json'], standalone_mode=False);"
        "sys.exit(len({'torch', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, timeout=120)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["all"], "-o: say where the files go"),
        (["all", "-o", "{folder}", "--budget", "0s"], "must be above 0"),
        (["all", "-o", "{folder}", "--budget", "6"], "needs a unit"),
        (["kernels", "--list", "--gpu", "h2000"], "h2000"),
        (["all", "-o", "{folder}", "--device", "tpu"], "use cuda, cuda:N or cpu"),
    ],
)
def test_what_is_refused_is_told_in_one_line(args: list[str], said: str, tmp_path: Path) -> None:
    done = calibrate(*(arg.format(folder=tmp_path) for arg in args))
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_absent_gpu_is_told_in_one_line(tmp_path: Path) -> None:
    done = calibrate("all", "-o", str(tmp_path / "x"), env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "there is no such CUDA device" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("6m", 360), ("90s", 90), ("1.5h", 5400), ("6 min", 360), ("2 m", 120), ("500 ms", 0.5)],
)
def test_budgets_are_written_as_people_do(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["soon", "6", "", "-1m", "6 GB"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises((UnitError, MeasurementError)):
        parse_budget(text)


def test_a_wrong_kernel_ends_in_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import typer

    outcome = Outcome(n_points=2, n_measured=1, wrong=["gemm m=1: differs"], skipped=["gemm m=2: too large"])
    outcome.sentinel_s = [1.0, 1.0, 1.1]
    with pytest.raises(typer.Exit) as stopped:
        command.tell(outcome, tmp_path, json=False)
    assert stopped.value.exit_code == 1
    out, err = capsys.readouterr()
    assert "1 points skipped" in out and "too large" in out
    assert "drifted by 10.0%" in out
    assert "wrong result, not timed: gemm m=1" in err


def test_nothing_measured_and_all_skipped_is_an_error(tmp_path: Path) -> None:
    import typer

    with pytest.raises(typer.Exit):
        command.tell(Outcome(n_points=1, skipped=["gemm: no"]), tmp_path, json=True)
    command.tell(Outcome(n_points=1, n_before=1), tmp_path, json=True)
