"""All that is to be done on a machine with one GPU, step by step, each with a time limit; what it took is told."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from calibrate.run.lost import lost_points
from moesim.hardware import gpu_names

__all__ = ["Result", "Step", "run_steps", "steps"]

REPOSITORY = Path(__file__).resolve().parents[2]
PROFILE = "profile.yaml"
PAGE = "validation.html"
TILES = "tiles.txt"
NO_STEP = "not done"
_OUTSIDE_S = 60.0
"""What measuring takes besides its budget: imports, the plan, a compiler, the sentinel, ten seconds to end."""
_WORTH_S = 20.0
"""A step is not begun, or begun again, for less."""
_GRACE_S = 10.0
"""Between the signal that asks a step to end and the one that ends it; at most a fifth of the step's limit."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    make: Callable[[], list[str] | str]
    """The command line; or why there is nothing to do. Asked when its turn comes."""
    limit_s: float
    """Time after which it is ended [s]; 0 for what those before it left of theirs."""
    again: Callable[[float], list[str] | None] = lambda spent_s: None
    """Command to go on with where the first one ended badly after so many seconds; None to leave it."""
    out: Path | None = None
    """File for what it prints; the terminal without one."""


@dataclass(frozen=True)
class Result:
    """How a step ended."""

    name: str
    outcome: str
    """``done``, ``failed (code 1)``, ``ended after 90 s, its limit``, or why it was not done."""
    seconds: float
    ok: bool


def steps(out: Path, *, device: str, budget_s: float, base: str | None) -> list[Step]:
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
        Profile to start the fit from; None for the catalog's of the GPU that was measured.
    """
    program = [sys.executable, "-m", "calibrate"]
    profile = out / PROFILE

    def tests(*how: str) -> list[str] | str:
        folder = REPOSITORY / "tests" / "gpu"
        if find_spec("pytest") is None or not folder.is_dir():
            return f"{NO_STEP}: needs pytest and a checkout"
        quiet = ["-q", "-p", "no:cacheprovider", "-W", "default"]  # a library's warning is no reason to stop
        return [sys.executable, "-m", "pytest", *quiet, *how, str(folder)]

    def measure(budget_s: float) -> list[str]:
        return [*program, "run", "all", "--device", device, "--budget", f"{budget_s:.0f}s", "-o", str(out)]

    n_lost = len(lost_points(out))

    def measure_again(spent_s: float) -> list[str] | None:
        """Go on after a kernel that took the process with it: each time another one, so this ends."""
        nonlocal n_lost
        before, n_lost = n_lost, len(lost_points(out))
        return measure(budget_s - spent_s) if n_lost > before and budget_s - spent_s > _WORTH_S else None

    def sockets() -> list[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        launch += ["--local-addr", "127.0.0.1"]  # else the host's full name, which need not resolve
        file = out / "sockets" / "collective.csv"
        wanted = ["run", "collectives", "--one-gpu-sockets", "--budget", "15s", "--sizes", "1KiB..1MiB"]
        return [*launch, "-m", "calibrate", *wanted, "-o", str(file)]

    def fit() -> list[str] | str:
        name, files = device_of(out), tables(out)
        if name not in gpu_names():
            return f"{NO_STEP}: {name or 'no GPU'} is not in the GPU catalog; docs/hardware.md says how to add one"
        return [*program, "fit", *files, "--device", name, "--base", base or name, "-o", str(profile)]

    def validate() -> list[str] | str:
        if not profile.is_file():
            return f"{NO_STEP}: there is no profile"
        page = ["--html", str(out / PAGE)]
        return [*program, "validate", *tables(out), "--profile", str(profile), "--held-out", *page]

    return [
        Step("GPU tests", lambda: tests("-m", "gpu and not slow"), 180.0),
        Step(
            "measure kernels and transfers", lambda: measure(budget_s), budget_s + _OUTSIDE_S, measure_again
        ),
        Step("NCCL's code path over sockets on one GPU", sockets, 45.0),
        Step("fit", fit, 30.0),
        Step("validate on held-out shapes", validate, 15.0),
        Step("tiles, timed", lambda: tests("-m", "gpu and slow", "-s"), 0.0, out=out / TILES),
    ]


def run_steps(wanted: Sequence[Step], say: Callable[[str], None]) -> Iterator[Result]:
    """Run one after the other, each whatever became of those before it."""
    end_s = time.monotonic() + sum(step.limit_s for step in wanted)
    for step in wanted:
        start_s = time.monotonic()
        limit_s = step.limit_s or end_s - start_s
        command = step.make() if step.limit_s or limit_s > _WORTH_S else f"{NO_STEP}: no time is left"
        if isinstance(command, str):
            yield Result(step.name, command, 0.0, ok=True)
            continue
        outcome = _run_and_go_on(step, command, limit_s, say)
        ok = outcome == "done" or (not step.limit_s and outcome.startswith("ended"))
        yield Result(step.name, outcome, time.monotonic() - start_s, ok=ok)


def _run_and_go_on(step: Step, command: list[str], limit_s: float, say: Callable[[str], None]) -> str:
    """Run a step, and again where it says so, within its limit."""
    start_s, outcome, following = time.monotonic(), "", list(command)
    while True:
        left_s = limit_s - (time.monotonic() - start_s)
        say(f"== {step.name}: {' '.join(following)}")
        outcome = _run(following, left_s, limit_s, step.out)
        more = None if outcome == "done" else step.again(time.monotonic() - start_s)
        if more is None:
            return outcome
        say(f"{step.name}: {outcome}; once more, without what ended it")
        following = more


def _run(command: list[str], left_s: float, limit_s: float, out: Path | None = None) -> str:
    """Run in a process group of its own, so that what it started ends with it; what it prints into a file if asked."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if out is None else out.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, start_new_session=True, stdout=stream, stderr=stream
        )
        return _waited(process, left_s, limit_s)


def _waited(process: subprocess.Popen[bytes], left_s: float, limit_s: float) -> str:
    """Wait; near the limit ask it to end, which makes pytest and a run say how far they got, then make it."""
    grace_s = min(_GRACE_S, limit_s / 5)
    try:
        code = process.wait(max(left_s - grace_s, 0.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"killed after {limit_s:.3g} s"
        return f"ended after {limit_s - grace_s:.3g} s, its limit"
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
