"""The one command of a GPU machine: its steps, their limits, and that one that fails stops no other."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from calibrate.app import app
from calibrate.run.command import DEFAULT_BUDGET
from calibrate.run.everything import Step, device_of, run_steps, steps, tables
from calibrate.run.options import parse_budget
from moesim.errors import HardwareError

HEADER = "op,device,implementation\n"
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"


def command(name: str, out: Path) -> list[str] | str:
    return next(
        s for s in steps(out, device="cuda", budget_s=240, base="h200-sxm") if s.name.startswith(name)
    ).make()


def test_all_of_it_ends_within_eight_minutes(tmp_path: Path) -> None:
    wanted = steps(tmp_path, device="cuda", budget_s=parse_budget(DEFAULT_BUDGET), base="h200-sxm")
    assert sum(step.limit_s for step in wanted) <= 8 * 60
    assert [step.name.split()[0] for step in wanted] == [
        "GPU", "measure", "NCCL's", "fit", "validate", "tiles,",
    ]  # fmt: skip
    limits = {step.name.split()[0]: step.limit_s for step in wanted}
    assert limits["measure"] >= parse_budget(DEFAULT_BUDGET) + 60
    assert limits["tiles,"] == 0, "it takes what is left"


def test_limits_in_the_documentation_are_those_of_the_steps(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "gpu.md").read_text()
    wanted = steps(tmp_path, device="cuda", budget_s=parse_budget(DEFAULT_BUDGET), base="h200-sxm")
    told = [float(s) for s in re.findall(r"^\| `.* \| (\d+) s \|", text, re.M)]
    assert told == [step.limit_s for step in wanted if step.limit_s]
    assert f"`calibrate run all --budget {DEFAULT_BUDGET}`" in text


def test_slow_timings_are_not_among_the_tests_and_go_into_a_file(tmp_path: Path) -> None:
    tests, tiles = command("GPU", tmp_path), command("tiles", tmp_path)
    assert "gpu and not slow" in tests
    assert {"gpu and slow", "-s"} <= set(tiles)
    assert tests[tests.index("-W") + 1] == "default"


def test_the_sockets_find_each_other_by_address(tmp_path: Path) -> None:
    sockets = command("NCCL", tmp_path)
    assert sockets[sockets.index("--local-addr") + 1] == "127.0.0.1"


def test_steps_are_commands_that_exist(tmp_path: Path) -> None:
    (tmp_path / "gemm.csv").write_text(HEADER + "gemm,h200-sxm,torch\n")
    assert command("measure", tmp_path)[2:] == [
        "calibrate", "run", "all", "--device", "cuda", "--budget", "240s", "-o", str(tmp_path),
    ]  # fmt: skip
    fit = command("fit", tmp_path)
    assert isinstance(fit, list)
    assert fit[3:] == [
        "fit", str(tmp_path / "gemm.csv"), "--device", "h200-sxm", "--base", "h200-sxm",
        "-o", str(tmp_path / "profile.yaml"),
    ]  # fmt: skip
    sockets = command("NCCL", tmp_path)
    assert isinstance(sockets, list)
    written = Path(sockets[sockets.index("-o") + 1])
    assert written.parent != tmp_path, "what proves a code path only must not be fitted"


def test_the_fit_starts_from_the_profile_of_the_gpu_that_was_measured(tmp_path: Path) -> None:
    (tmp_path / "gemm.csv").write_text(HEADER + "gemm,h100-sxm,torch\n")
    fit = next(s for s in steps(tmp_path, device="cuda", budget_s=240, base=None) if s.name == "fit").make()
    assert fit[fit.index("--base") + 1] == "h100-sxm"


def test_a_gpu_that_the_catalog_lacks_is_measured_and_not_fitted(tmp_path: Path) -> None:
    (tmp_path / "gemm.csv").write_text(HEADER + "gemm,h100-pcie,torch\n")
    assert device_of(tmp_path) == "h100-pcie"
    assert "h100-pcie is not in the GPU catalog" in command("fit", tmp_path)
    assert "there is no profile" in command("validate", tmp_path)
    (tmp_path / "profile.yaml").write_text("")
    assert command("validate", tmp_path)[3:5] == ["validate", str(tmp_path / "gemm.csv")]


def test_a_folder_without_tables_has_no_device(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text(HEADER)
    assert device_of(tmp_path) == ""
    assert tables(tmp_path) == [str(tmp_path / "empty.csv")]


def test_a_step_that_fails_or_hangs_stops_no_other() -> None:
    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    wanted = [
        Step("fails", lambda: python("raise SystemExit(3)"), 30.0),
        Step("hangs", lambda: python("import time; time.sleep(60)"), 0.5),
        Step("deaf", lambda: python(DEAF), 5.0),
        Step("absent", lambda: "not done: why", 1.0),
        Step("works", lambda: python(""), 30.0),
    ]
    said: list[str] = []
    done = list(run_steps(wanted, said.append))
    assert [(one.outcome, one.ok) for one in done] == [
        ("failed (code 3)", False), ("ended after 0.4 s, its limit", False), ("killed after 5 s", False),
        ("not done: why", True), ("done", True),
    ]  # fmt: skip
    assert len(said) == 4


def test_a_step_told_to_end_says_how_far_it_got(tmp_path: Path) -> None:
    code = """
import time
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("so far", flush=True)
"""
    page = tmp_path / "new" / "tiles.txt"
    wanted = [Step("early", lambda: [sys.executable, "-c", "pass"], 30.0),
              Step("extra", lambda: [sys.executable, "-c", code], 5.0, out=page)]  # fmt: skip
    (_, extra) = run_steps(wanted, lambda text: None)
    assert extra.outcome == "ended after 4 s, its limit"
    assert page.read_text().split("\n")[:2] == ["begun", "so far"]


def test_a_step_without_a_limit_takes_what_is_left_or_is_not_begun() -> None:
    def quick() -> list[str]:
        return [sys.executable, "-c", ""]

    for limit_s, outcome in ((60.0, "done"), (5.0, "not done: no time is left")):
        wanted = [Step("first", quick, limit_s), Step("extra", quick, 0.0)]
        (_, extra) = run_steps(wanted, lambda text: None)
        assert (extra.outcome, extra.ok) == (outcome, True)


def test_measuring_goes_on_without_a_point_that_took_the_process(tmp_path: Path) -> None:
    """Each process dies in another point: the log says so; then one ends well."""
    measuring = next(
        step
        for step in steps(tmp_path, device="cuda", budget_s=200, base="h200-sxm")
        if step.name.startswith("measure")
    )
    dies = """
import json, pathlib, sys
log = pathlib.Path(sys.argv[1]) / "log.jsonl"
n = log.read_text().count("begin") if log.exists() else 0
with log.open("a") as stream:
    for line in ({"event": "start"}, {"event": "begin", "point": {"m": n}}, *[{"event": "end"}] * (n == 2)):
        stream.write(json.dumps(line) + chr(10))
sys.exit(0 if n == 2 else -11)
"""
    line = [sys.executable, "-c", dies, str(tmp_path)]
    budgets: list[str] = []

    def again(spent_s: float) -> list[str] | None:
        real = measuring.again(spent_s)
        if real is None:
            return None
        budgets.append(real[real.index("--budget") + 1])
        return line

    said: list[str] = []
    (done,) = run_steps([Step("measure", lambda: line, 60.0, again)], said.append)
    assert (done.outcome, len(budgets)) == ("done", 2)
    assert all(150 < float(text[:-1]) <= 200 for text in budgets)
    assert measuring.again(1.0) is None, "nothing new was lost"


def test_no_time_left_is_no_reason_to_measure_again(tmp_path: Path) -> None:
    measuring = steps(tmp_path, device="cuda", budget_s=200, base="h200-sxm")[1]
    (tmp_path / "log.jsonl").write_text('{"event": "begin", "point": {"m": 1}}\n')
    assert measuring.again(199.0) is None


def test_an_absent_gpu_is_refused_before_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardwareError, match="there is no such CUDA device"):
        app(["run", "everything", "-o", str(tmp_path / "x")], standalone_mode=False)
    assert not (tmp_path / "x").exists()
