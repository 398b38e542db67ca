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
from calibrate.run.options import check_file, check_folder, parse_budget
from calibrate.run.session import Outcome
from moesim.errors import MeasurementError, UnitError
from moesim.hardware import load_gpu

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
    assert told["seconds"] < 9 * 60
    assert told["n_held_out"] == pytest.approx(0.2 * told["n_points"], rel=0.05)
    assert sum(row["points"] for row in told["families"].values()) == told["n_points"]


def test_list_with_a_budget_shows_what_fits_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("transfers", "--list", "--budget", "10s") == 0
    lines = capsys.readouterr().out.splitlines()
    points = [line for line in lines if "torch" in line]
    assert lines[-1].startswith(f"{len(points)} points")
    assert 5 <= len(points) <= 30
    assert sum(float(line.split()[0]) for line in points) <= 10.2


def test_list_counts_kernels_and_the_processes_that_compile_them(capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for jobs in ("1", "15"):
        assert run_here("all", "--list", "--json", "--budget", "150s", "--jobs", jobs) == 0
        told.append(json.loads(capsys.readouterr().out))
    alone, shared = told
    assert alone["compiling_s"] == alone["n_kernels"] and shared["jobs"] == 15
    assert shared["compiling_s"] == pytest.approx(10 + shared["n_kernels"] / 15)
    assert shared["n_points"] > 1.7 * alone["n_points"]
    assert max(one["seconds"] for one in told) <= 150


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
        (
            ["all", "-o", "{folder}", "--budget", "0s"],
            "--budget: '0s': must be above 0; fix: write a number and",
        ),
        (
            ["all", "-o", "{folder}", "--budget", "-3s"],
            "--budget: '-3s': must be above 0; fix: write a number and",
        ),
        (
            ["all", "-o", "{folder}", "--budget", "6"],
            "--budget: '6': a time needs a unit; fix: write a number and",
        ),
        (
            ["all", "-o", "{folder}", "--budget", "abc"],
            "--budget: 'abc': is not a time; fix: write a number and",
        ),
        (["kernels", "--list", "--gpu", "h2000"], "--gpu: 'h2000': unknown GPU; fix: did you mean h200?"),
        (
            ["all", "-o", __file__, "--device", "cpu"],
            f"-o: {__file__!r}: is a file, and a folder is due; fix: name",
        ),
        (
            ["all", "-o", f"{__file__}/x", "--device", "cpu"],
            f"cannot be made: {__file__} is a file; fix: name",
        ),
        (["everything", "-o", __file__], "is a file, and a folder is due"),
        (["all", "--list", "--device", "tpu"], "--device: 'tpu': is no device"),
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
    assert "warning: the sentinel drifted by 10.0%" in out
    assert "wrong result, not timed: gemm m=1" in err


def test_a_point_that_ended_an_earlier_run_is_named_and_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import typer

    with pytest.raises(typer.Exit):
        command.tell(Outcome(n_points=2, n_measured=1, lost=["gemm m=3"]), tmp_path, json=False)
    assert "1 points left out, since an earlier run ended in them" in (said := capsys.readouterr().out)
    assert said.rstrip().endswith("gemm m=3")


def test_an_interrupt_while_the_sentinel_is_made_is_no_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer

    from calibrate.run import cases

    def interrupted(machine: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cases, "sentinel", interrupted)
    with pytest.raises(typer.Exit) as stopped:
        command._measured(None, tmp_path, [], load_gpu("h200-sxm"), 1.0, 0, 1)
    assert stopped.value.exit_code == 130
    assert "interrupted: 0 of 0 points" in capsys.readouterr().err


def test_nothing_measured_and_all_skipped_is_an_error(tmp_path: Path) -> None:
    import typer

    with pytest.raises(typer.Exit):
        command.tell(Outcome(n_points=1, skipped=["gemm: no"]), tmp_path, json=True)
    command.tell(Outcome(n_points=1, n_before=1), tmp_path, json=True)


def test_a_processor_that_drifts_is_no_warning(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    outcome = Outcome(n_points=1, n_measured=1, sentinel_s=[1.0, 1.0, 1.02])
    command.tell(outcome, tmp_path, json=False)
    assert "drifted" not in capsys.readouterr().out, "2% are within the limit"
    outcome.sentinel_s = [1.0, 1.0, 1.3]
    command.tell(outcome, tmp_path, json=False, steady=False)
    out = capsys.readouterr().out
    assert "the sentinel drifted by 30.0%: a processor's clock wanders" in out and "warning" not in out


def test_where_files_go_is_looked_at_before_anything_is_measured(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "a" / "links.csv")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "links.csv").touch()
    for path, said in [
        (tmp_path, "-o: .*is a folder; fix: add the name of a CSV file"),
        (tmp_path / "links.txt", r"must end in \.csv; fix: -o .*links\.csv"),
        (tmp_path / "links.csv" / "x.csv", "is a file"),
    ]:
        with pytest.raises(MeasurementError, match=said):
            check_file(path)


def test_folders_without_permission_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    (tmp_path / "links.csv").touch()
    with pytest.raises(MeasurementError, match=f"no permission in {tmp_path}; fix: name another folder"):
        check_folder(tmp_path / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: path == tmp_path)
    with pytest.raises(MeasurementError, match="no permission; fix: name another file"):
        check_file(tmp_path / "links.csv")


def test_a_folder_that_the_system_does_not_make_is_told_in_one_line() -> None:
    done = calibrate("transfers", "-o", "/proc/moesim", "--device", "cpu")
    assert done.returncode == 2
    assert "-o: '/proc/moesim': cannot be" in done.stderr and len(done.stderr.splitlines()) == 1
