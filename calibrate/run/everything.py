"""All that is to be done on a machine with one GPU, step by step, each with a time limit; what it took is told."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moesim.hardware import gpu_names

__all__ = ["Result", "Step", "run_steps", "steps"]

REPOSITORY = Path(__file__).resolve().parents[2]
PROFILE = "profile.yaml"
PAGE = "validation.html"
NO_STEP = "not done"


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    make: Callable[[], list[str] | str]
    """The command line; or why there is nothing to do. Asked when its turn comes."""
    limit_s: float
    """Time after which it is ended [s]."""


@dataclass(frozen=True)
class Result:
    """How a step ended."""

    name: str
    outcome: str
    """``done``, ``failed (code 1)``, ``ended after 90 s``, or why it was not done."""
    seconds: float
    ok: bool


def steps(out: Path, *, device: str, budget_s: float, base: str) -> list[Step]:
    """Everything, in order: what is measured does not wait for what is only checked to be mended.

    Parameters
    ----------
    out
        Folder of the files.
    device
        ``cuda`` or ``cuda:N``.
    budget_s
        Time for measuring kernels and transfers [s].
    base
        Profile to start the fit from.
    """
    program = [sys.executable, "-m", "calibrate"]
    profile = out / PROFILE

    def tests() -> list[str] | str:
        if find_spec("pytest") is None or not (REPOSITORY / "tests" / "gpu").is_dir():
            return f"{NO_STEP}: needs pytest and a checkout"
        return [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(REPOSITORY / "tests" / "gpu"),
        ]

    def sockets() -> list[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        file = out / "sockets" / "collective.csv"
        wanted = ["run", "collectives", "--one-gpu-sockets", "--budget", "15s", "--sizes", "1KiB..1MiB"]
        return [*launch, "-m", "calibrate", *wanted, "-o", str(file)]

    def fit() -> list[str] | str:
        name, files = device_of(out), tables(out)
        if name not in gpu_names():
            return f"{NO_STEP}: {name or 'no GPU'} is not in the GPU catalog; docs/hardware.md says how to add one"
        return [*program, "fit", *files, "--device", name, "--base", base, "-o", str(profile)]

    def validate() -> list[str] | str:
        if not profile.is_file():
            return f"{NO_STEP}: there is no profile"
        page = ["--html", str(out / PAGE)]
        return [*program, "validate", *tables(out), "--profile", str(profile), "--held-out", *page]

    measure = [*program, "run", "all", "--device", device, "--budget", f"{budget_s:g}s", "-o", str(out)]
    return [
        Step("GPU tests", tests, 90.0),
        Step("measure kernels and transfers", lambda: measure, budget_s + 30.0),
        Step("NCCL's code path over sockets on one GPU", sockets, 30.0),
        Step("fit", fit, 60.0),
        Step("validate on held-out shapes", validate, 30.0),
    ]


def run_steps(wanted: Sequence[Step], say: Callable[[str], None]) -> Iterator[Result]:
    """Run one after the other, each whatever became of those before it."""
    for step in wanted:
        start_s = time.monotonic()
        command = step.make()
        if isinstance(command, str):
            yield Result(step.name, command, 0.0, ok=True)
            continue
        say(f"== {step.name}: {' '.join(command)}")
        outcome = _run(command, step.limit_s)
        yield Result(step.name, outcome, time.monotonic() - start_s, ok=outcome == "done")


def _run(command: list[str], limit_s: float) -> str:
    """Run in a process group of its own, so that what it started ends with it."""
    process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True)
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"ended after {limit_s:g} s"
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise
    return "done" if code == 0 else f"failed (code {code})"


def tables(out: Path) -> list[str]:
    """Measured tables of a folder."""
    return [str(path) for path in sorted(out.glob("*.csv"))]


def device_of(out: Path) -> str:
    """Device that the tables of a folder were measured on; empty where there are none."""
    for path in tables(out):
        with Path(path).open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                return str(row["device"])
    return ""
