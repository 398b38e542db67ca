"""``calibrate run``: kernels, transfers, both, or collectives."""

from __future__ import annotations

import json as json_text
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from calibrate.run.options import check_folder, parse_budget
from moesim.errors import HardwareError, MeasurementError

if TYPE_CHECKING:
    from calibrate.run.design import Candidate
    from calibrate.run.points import Scope
    from calibrate.run.session import Outcome
    from moesim.hardware import Gpu

__all__ = ["app", "tell"]

app = typer.Typer(
    help="Measure this machine. An interrupted run goes on where it was when the same command is given again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DEFAULT_GPU = "h200-sxm"
"""Datasheet and base profile behind estimates where no GPU is there to ask."""
DEFAULT_BUDGET = "150s"
"""Of measuring within everything: with it the limits of all steps add up to eight minutes."""
INTERRUPTED = 130

Budget = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="Time to spend, as 6m: the most informative points first; all without it."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", metavar="FOLDER", help="One CSV file a kind of measurement, and the log."),
]
DeviceName = Annotated[str, typer.Option(metavar="DEVICE", help="cuda, cuda:N or cpu.")]
GpuName = Annotated[
    str | None,
    typer.Option("--gpu", metavar="NAME", help="GPU of the catalog behind the estimates; the device's own."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of data, routing and order.")]
List = Annotated[bool, typer.Option("--list", help="Show points and estimated times; measure nothing.")]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Processes that compile kernels first; this machine's cores less one."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.command("all")
def all_(
    out: Out = None, budget: Budget = None, device: DeviceName = "cuda", gpu: GpuName = None, seed: Seed = 0,
    jobs: Jobs = None, list_: List = False, json: Json = False,
) -> None:  # fmt: skip
    """Measure kernels and transfers. Collectives need several ranks: see `collectives`."""
    _measure(("kernels", "transfers"), out, budget, device, gpu, seed, jobs, list_=list_, json=json)


@app.command()
def kernels(
    out: Out = None, budget: Budget = None, device: DeviceName = "cuda", gpu: GpuName = None, seed: Seed = 0,
    jobs: Jobs = None, list_: List = False, json: Json = False,
) -> None:  # fmt: skip
    """Measure expert feed-forwards, their steps, router, dense products and attention."""
    _measure(("kernels",), out, budget, device, gpu, seed, jobs, list_=list_, json=json)


@app.command()
def transfers(
    out: Out = None, budget: Budget = None, device: DeviceName = "cuda", gpu: GpuName = None, seed: Seed = 0,
    jobs: Jobs = None, list_: List = False, json: Json = False,
) -> None:  # fmt: skip
    """Measure copies to and from the host, device memory and launches."""
    _measure(("transfers",), out, budget, device, gpu, seed, jobs, list_=list_, json=json)


@app.command()
def everything(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="Where all files go.")],
    budget: Annotated[
        str, typer.Option(metavar="TIME", help="Time for kernels and transfers.")
    ] = DEFAULT_BUDGET,
    base: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="Profile that the fit starts from; the catalog's of this GPU."),
    ] = None,
    device: DeviceName = "cuda",
) -> None:
    """Do all that one GPU is needed for: GPU tests, measuring, NCCL's code path, fit, validation, tiles."""
    from calibrate.run.device import check_device
    from calibrate.run.everything import run_steps, steps
    from moesim.cli import show

    budget_s = parse_budget(budget)
    check_folder(out)
    check_device(device)  # refuse an absent GPU before any step
    out = out.resolve()
    done = list(run_steps(steps(out, device=device, budget_s=budget_s, base=base), print))
    rows = [{"step": one.name, "outcome": one.outcome, "took": f"{one.seconds:.0f} s"} for one in done]
    show.rows(f"{sum(one.seconds for one in done):.0f} s in all; files in {out}", rows)
    if not all(one.ok for one in done):
        raise typer.Exit(1)


# Named in a string: the collectives use this package's protocol, so it must not import theirs.
app.command()(import_module("calibrate.collectives.command").collectives)


def _measure(
    groups: Sequence[str], out: Path | None, budget: str | None, device: str, gpu: str | None, seed: int,
    jobs: int | None, *, list_: bool, json: bool,
) -> None:  # fmt: skip
    from calibrate.run.device import check_device_name
    from calibrate.run.options import jobs_here

    budget_s = None if budget is None else parse_budget(budget)
    check_device_name(device)
    if list_:
        scope, chip = _asked(device, gpu)
        _show_list(_planned(groups, scope, chip), chip, budget_s, jobs or jobs_here(), json=json)
        return
    if out is None:
        raise MeasurementError("say where the files go", place="-o", fix="add -o calibrate/measured/NAME")
    check_folder(out)
    from calibrate.run.device import open_device

    machine = open_device(device)
    scope, chip = _asked(device, gpu, machine.name)
    scope = replace(scope, memory_bytes=min(scope.memory_bytes, machine.free_bytes()))
    planned = _planned(groups, scope, chip)
    outcome = _measured(machine, out, planned, chip, budget_s, seed, jobs or jobs_here())
    tell(outcome, out, json=json, steady=device != "cpu")


def _asked(device: str, gpu: str | None, found: str = "") -> tuple[Scope, Gpu]:
    """What the machine can be asked, and the datasheet behind the estimates: the one wanted, else the one found."""
    from calibrate.run.points import Scope
    from moesim.hardware import gpu_names, load_gpu

    try:
        chip = load_gpu(gpu or (found if found in gpu_names() else DEFAULT_GPU))
    except HardwareError as error:
        raise HardwareError(
            error.rule, value=error.value, fix=error.fix, place=error.place or "--gpu"
        ) from None
    return Scope(chip.memory_bytes, "fp8" in chip.flops_per_s, cpu=device == "cpu"), chip


def _planned(groups: Sequence[str], scope: Scope, chip: Gpu) -> list[Candidate]:
    from calibrate.run.plan import plan_points
    from moesim.hardware.profile import profile_for

    return plan_points(groups, scope, chip, profile_for(chip.name))


def _measured(
    machine: Any, out: Path, planned: Sequence[Candidate], chip: Gpu, budget_s: float | None, seed: int,
    jobs: int,
) -> Outcome:  # fmt: skip
    from calibrate.run.ahead import prepared
    from calibrate.run.cases import build_case, sentinel
    from calibrate.run.session import HANG_S, Session

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file system that makes no folders
        rule = f"cannot be made: {error.strerror}"
        raise MeasurementError(rule, value=str(out), place="-o", fix="name another folder") from None
    session: Session | None = None
    try:
        with _first_interrupt_only():
            session = Session(machine, out, build_case, sentinel(machine), seed=seed, hang_s=HANG_S)
            ready, left_s = prepared(session, planned, chip, budget_s=budget_s, jobs=jobs)
            with _bar(len(ready)) as progress:
                return session.run(ready, budget_s=left_s, progress=progress)
    except KeyboardInterrupt:
        n_done = 0 if session is None else session.outcome.n_measured + session.outcome.n_before
        print(
            f"interrupted: {n_done} of {len(planned)} points are in {out}; "
            "the same command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _first_interrupt_only() -> Iterator[None]:
    """Let one Ctrl-C, or a scheduler's SIGTERM, end what runs within; further ones must not end the ending of it."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.getsignal(number) for number in usual}
    if before != usual or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        for each in usual:
            signal.signal(each, signal.SIG_IGN)  # for good: the program ends
        raise KeyboardInterrupt

    for each in usual:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each, handler in before.items():
            if signal.getsignal(each) is stop:
                signal.signal(each, handler)


@contextmanager
def _bar(n_points: int) -> Iterator[Callable[[int, str], None]]:
    """Progress on standard error: a bar where somebody watches, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines(n_points)
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[what]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=n_points, what="")
        yield lambda done, what: bar.update(task, completed=done, what=what[:60])


class _Lines:
    """A line every twentieth point."""

    def __init__(self, n_points: int) -> None:
        self._n_points = n_points
        self._next = 0

    def __call__(self, done: int, what: str) -> None:
        if done >= self._next:
            print(f"{done}/{self._n_points} {what}", file=sys.stderr)
            self._next = done + 20


# ---------------------------------------------------------------- output


def _show_list(
    planned: Sequence[Candidate], chip: Gpu, budget_s: float | None, jobs: int, *, json: bool
) -> None:
    from calibrate.run.compiled import all_kernels, compiling_s, with_compiling
    from calibrate.run.plan import within_budget
    from calibrate.run.session import totals
    from moesim.cli import show

    within = within_budget(with_compiling(planned, chip, jobs=jobs), budget_s)
    n_kernels = len(all_kernels(within, chip))
    found = totals(within)
    told: dict[str, Any] = {
        "n_points": len(within),
        "n_held_out": sum(one.point.held_out for one in within),
        "seconds": sum(one.seconds for one in within),
        "n_kernels": n_kernels,
        "compiling_s": compiling_s(n_kernels, jobs),
        "jobs": jobs,
        "families": found,
    }
    if json:
        points = [
            {**one.point.columns, "held_out": one.point.held_out, "seconds": one.seconds} for one in within
        ]
        print(json_text.dumps(told | {"points": points}))
        return
    for one in within:
        print(f"{one.seconds:6.2f} s  {'held out' if one.point.held_out else '        '}  {one.point}")
    show.rows("Points, and their estimated time", [_family_row(name, row) for name, row in found.items()])
    print(
        f"{told['n_points']} points, {told['n_held_out']} of them held out; estimated {told['seconds']:.0f} s, "
        f"{told['compiling_s']:.0f} s of it to compile {n_kernels} kernels on {jobs} processes"
    )


def _family_row(name: str, row: Mapping[str, float]) -> dict[str, str]:
    return {
        "family": name, "points": f"{row['points']:.0f}", "held out": f"{row['held_out']:.0f}",
        "estimated": f"{row['seconds']:.0f} s",
    }  # fmt: skip


def tell(outcome: Outcome, out: Path, *, json: bool, steady: bool = True) -> None:
    """Say what came of a run; a kernel that computes something else, or ends the process, is an error.

    Parameters
    ----------
    outcome, out
        The run and its folder.
    json
        One JSON object.
    steady
        Whether the device's clock is steady enough for its drift to be a reason for doubt: not a processor's.
    """
    from calibrate.run.lost import LOG
    from calibrate.run.session import DRIFT_LIMIT

    if json:
        print(json_text.dumps(vars(outcome) | {"folder": str(out), "drift": outcome.drift}))
    else:
        before = f", {outcome.n_before} were there" if outcome.n_before else ""
        print(f"{out}: {outcome.n_measured} of {outcome.n_points} points measured{before}")
        if outcome.n_left:
            print(
                f"{outcome.n_left} points left for want of time: the same command with a new --budget goes on"
            )
        if outcome.skipped:
            print(
                f"{len(outcome.skipped)} points skipped, reasons in {out / LOG}; first: {outcome.skipped[0]}"
            )
        if outcome.lost:
            print(
                f"{len(outcome.lost)} points left out, since an earlier run ended in them (take them out of "
                f"{out / LOG} to try again): {'; '.join(outcome.lost)}"
            )
        if outcome.drift > DRIFT_LIMIT:
            told = f"the sentinel drifted by {outcome.drift:.1%}"
            where = f"its times are in {out / LOG}"
            print(f"warning: {told}: {where}" if steady else f"{told}: a processor's clock wanders; {where}")
    for line in outcome.wrong:
        print(f"wrong result, not timed: {line}", file=sys.stderr)
    if outcome.wrong or outcome.lost or (outcome.skipped and not outcome.n_measured):
        raise typer.Exit(1)
