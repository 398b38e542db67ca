"""Compile kernels ahead of measuring, on all cores: what Triton has on disk it loads in milliseconds.

Every process follows the same points up to their launches, on tensors that have shapes and no memory, with a driver
that names the GPU and starts nothing. So all of them see the same kernels in the same order, and process i of n
compiles every n-th one: nothing is compiled twice, and they need not talk. A launch on a GPU differs in nothing that
Triton keys a kernel by: types, constants, alignment, divisibility of integers.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from calibrate.run.compiled import all_kernels, compiling_s, kernels_of, with_compiling
from calibrate.run.design import Candidate
from calibrate.run.device import Clocks, Run
from calibrate.run.plan import within_budget
from calibrate.run.points import Point
from calibrate.run.session import Session
from moesim.hardware.gpu import Gpu

__all__ = ["Ahead", "Blueprint", "Chip", "compile_ahead", "follow", "prepared"]

_MEMORY_BYTES = 2**50
"""Of tensors without memory any number fits."""
_LATE = 3.0
"""Compiling ahead is ended when it takes this many times its estimate."""


@dataclass(frozen=True)
class Chip:
    """What a kernel is compiled for."""

    capability: int
    """90 for sm_90."""
    n_sms: int
    """Multiprocessors, by which tiles are chosen."""


@dataclass(frozen=True)
class Ahead:
    """What came of compiling ahead."""

    n_kernels: int
    """Compiled, or on disk already."""
    seconds: float
    n_ended: int
    """Processes that got to the end in time."""


def prepared(
    session: Session, planned: Sequence[Candidate], gpu: Gpu, *, budget_s: float | None, jobs: int
) -> tuple[list[Candidate], float | None]:
    """Compile ahead what the budget will reach.

    Parameters
    ----------
    session
        What measures: it knows the device, and the points that are done.
    planned, gpu
        Points without compiling, most informative first, and the datasheet behind their estimates.
    budget_s
        Time for compiling and measuring [s].
    jobs
        Processes; with one, and where Triton compiles nothing, kernels are compiled as points meet them.

    Returns
    -------
    Points with what they still take, and the time left for them.
    """
    chip = (
        None if session.device.capability is None else Chip(session.device.capability, session.device.n_sms)
    )
    reached = within_budget(with_compiling(session.to_do(planned), gpu, jobs=jobs), budget_s)
    kernels = all_kernels(reached, gpu)
    if chip is None or jobs < 2 or not kernels:
        return with_compiling(planned, gpu), budget_s
    estimated_s = compiling_s(len(kernels), jobs)
    limit_s = min(_LATE * estimated_s, np.inf if budget_s is None else budget_s / 2)
    needing = [one.point for one in reached if kernels_of(one.point, gpu)]
    done = compile_ahead(needing, chip, jobs=jobs, limit_s=limit_s)
    session.log("compiled", **vars(done), jobs=jobs, estimated_s=round(estimated_s, 3))
    left_s = None if budget_s is None else max(budget_s - done.seconds, 0.0)
    return with_compiling(planned, gpu, compiled=kernels), left_s


def compile_ahead(points: Sequence[Point], chip: Chip, *, jobs: int, limit_s: float) -> Ahead:
    """Compile the kernels of points into Triton's cache on disk.

    Parameters
    ----------
    points
        In the order of their measurement; what they cannot do is told when they are measured.
    chip
        What they are compiled for; no GPU is touched.
    jobs
        Processes.
    limit_s
        Time after which processes are ended [s]; kernels that they finished are on disk.
    """
    start_s = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    parts, found = [], []
    try:
        for part in range(jobs):
            here, there = spawn.Pipe(duplex=False)
            arguments = (there, list(points), chip, part, jobs)
            process = spawn.Process(target=_compile_part, args=arguments, daemon=True)
            process.start()
            there.close()
            parts.append((process, here))
        for _, here in parts:
            left_s = limit_s - (time.monotonic() - start_s)
            with suppress(EOFError):  # a process that ended without a word
                if here.poll(max(left_s, 0.0)):
                    found.append(int(here.recv()))
    finally:
        for process, _ in parts:
            process.kill()
            process.join()
    return Ahead(sum(found), time.monotonic() - start_s, len(found))


class Blueprint:
    """A device of which only the shape is known: tensors on it have no memory, launches compile and stop there."""

    name = "blueprint"
    torch_name = "meta"
    software = ""
    cache_bytes = 0
    capability: int | None = None
    has_graphs = False

    def __init__(self, n_sms: int) -> None:
        self.n_sms = n_sms

    def free_bytes(self) -> int:
        """Any amount."""
        return _MEMORY_BYTES

    def release(self) -> None:
        """Nothing is kept."""

    def synchronize(self) -> None:
        """Nothing runs."""

    def flush_cache(self) -> None:
        """There is none."""

    def elapsed_s(self, run: Run) -> float:
        """Nothing is timed."""
        return 0.0

    def capture(self, run: Run) -> Run:
        """Nothing is recorded."""
        return run

    def clocks(self) -> Clocks:
        """It has none."""
        return Clocks()

    def facts(self) -> dict[str, str | int]:
        """Nothing to note."""
        return {}


# ---------------------------------------------------------------- in a process of its own


def _compile_part(answer: Connection, points: Sequence[Point], chip: Chip, part: int, parts: int) -> None:
    """Compile kernels part, part + parts, ... of those that the points need, and say how many."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    answer.send(follow(points, chip, lambda index: index % parts == part))


def follow(points: Sequence[Point], chip: Chip, mine: Callable[[int], bool]) -> int:
    """Follow points to their launches, compile those kernels that are `mine`, and give their number.

    For a process that does nothing else: launches on a GPU are not possible in it afterwards.
    """
    import torch

    from calibrate.run.cases import build_case

    torch.set_num_threads(1)
    n_mine = _compile_at_launch(chip, mine)
    for point in points:
        with suppress(Exception):  # it will be met, and told, when the point is measured
            build_case(point, Blueprint(chip.n_sms)).call(0)
    return n_mine()


def _compile_at_launch(chip: Chip, mine: Callable[[int], bool]) -> Callable[[], int]:
    """Have launches of this process compile and stop; the value tells how many were mine."""
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(_Driver(chip.capability))
    launch = JITFunction.run
    seen: dict[Any, bool] = {}

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *arguments, grid=grid, warmup=True, **options)

    def skip(*, fn: Any, compile: dict[str, Any], **rest: Any) -> bool:
        key = (fn.name, compile["key"])
        if key not in seen:
            seen[key] = mine(len(seen))
        return not seen[key]

    JITFunction.run = run
    knobs.runtime.jit_cache_hook = skip
    return lambda: sum(seen.values())


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0
