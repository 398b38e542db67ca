"""The one command of a GPU machine: its steps, their limits, and that one that fails stops no other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from calibrate.app import app
from calibrate.run.everything import Step, device_of, run_steps, steps, tables
from moesim.errors import HardwareError

HEADER = "op,device,implementation\n"


def command(name: str, out: Path) -> list[str] | str:
    return next(
        s for s in steps(out, device="cuda", budget_s=240, base="h200-sxm") if s.name.startswith(name)
    ).make()


def test_all_of_it_ends_within_eight_minutes(tmp_path: Path) -> None:
    wanted = steps(tmp_path, device="cuda", budget_s=240.0, base="h200-sxm")
    assert sum(step.limit_s for step in wanted) <= 8 * 60
    assert [step.name.split()[0] for step in wanted] == ["GPU", "measure", "NCCL's", "fit", "validate"]


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
        Step("absent", lambda: "not done: why", 1.0),
        Step("works", lambda: python(""), 30.0),
    ]
    said: list[str] = []
    done = list(run_steps(wanted, said.append))
    assert [(one.outcome, one.ok) for one in done] == [
        ("failed (code 3)", False), ("ended after 0.5 s", False), ("not done: why", True), ("done", True),
    ]  # fmt: skip
    assert len(said) == 3


def test_an_absent_gpu_is_refused_before_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HardwareError, match="there is no such CUDA device"):
        app(["run", "everything", "-o", str(tmp_path / "x")], standalone_mode=False)
    assert not (tmp_path / "x").exists()
