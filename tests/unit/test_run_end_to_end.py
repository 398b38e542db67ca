"""A whole run on a processor, and one that is interrupted and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from calibrate.app import app
from calibrate.run import command
from calibrate.run.design import Candidate
from calibrate.run.plan import plan_points
from calibrate.run.points import Scope
from calibrate.tables import read_table
from moesim.hardware import Gpu

REPOSITORY = Path(__file__).resolve().parents[2]


def few(groups: Sequence[str], scope: Scope, chip: Gpu) -> list[Candidate]:
    """Two points a family, whatever they take."""
    planned = plan_points(groups, scope, chip, None)
    names = dict.fromkeys(one.point.family for one in planned)
    return [one for name in names for one in [each for each in planned if each.point.family == name][:2]]


def test_a_whole_run_on_a_processor_leaves_tables_that_are_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_planned", few)  # no budget: a busy machine measures the same points
    wanted = ["run", "all", "--device", "cpu", "-o", str(tmp_path), "--json"]
    assert not app(wanted, standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["n_measured"] == told["n_points"] >= 10 and told["skipped"] == [] and told["wrong"] == []
    tables = {path.stem: read_table(path).frame for path in tmp_path.glob("*.csv")}
    assert set(tables) == {"attention", "gemm", "launch", "memory", "moe_ffn"}
    for kind, frame in tables.items():
        assert set(frame.device) == {"cpu"}
        assert (frame.latency_s > 0).all() and (frame.n_samples == 30).all()
        assert (frame.latency_low_s <= frame.latency_s).all() and (
            frame.latency_s <= frame.latency_high_s
        ).all()
        if kind not in ("launch",):
            assert set(frame.cache) == {"cold", "warm"}
    product = tables["gemm"][tables["gemm"].cache == "warm"]
    rate = 2.0 * product.m * product.n * product.k / product.latency_s
    assert (rate < 1e13).all(), "no processor multiplies faster: something is not timed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "scheduler"])
def test_an_interrupt_says_how_to_go_on_and_nothing_is_lost(number: signal.Signals, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "calibrate", "run", "transfers", "--device", "cpu", "-o", str(tmp_path)]
    process = subprocess.Popen(
        line, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    table = tmp_path / "memory.csv"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (table.exists() and table.read_text().count("\n") > 3):
        time.sleep(0.02)
    for _ in range(3):  # an impatient hand: the second and third change nothing
        process.send_signal(number)
        time.sleep(0.02)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    n_before = len(read_table(table).frame)
    again = subprocess.run([*line, "--json"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    told = json.loads(again.stdout)
    assert told["n_before"] > 0 and told["n_before"] + told["n_measured"] == told["n_points"]
    frame = read_table(table).frame
    assert len(frame) > n_before
    assert not frame.duplicated(["op", "n_bytes", "cache", "repeat"]).any()
