"""Sweeps: one scenario at every combination of some keys' values."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from moesim.errors import LayoutError, MoesimError, ScenarioError
from moesim.hardware.cluster import Cluster
from moesim.plan.answer import whole_run
from moesim.plan.context import Context
from moesim.plan.grid import Grid, inputs
from moesim.plan.point_log import PointLog
from moesim.plan.run import priced_in, result_row
from moesim.plan.space import Refused
from moesim.plan.tradeoff import tradeoff
from moesim.scenario import Scenario

__all__ = ["Told", "identity", "sweep"]

CHUNKS_PER_JOB = 4
"""Pieces that each process is given where points share a context, so that none waits long for the others."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C stops, as shells have it."""
Told = dict[str, Any]
"""``{"result": row}``, as `moesim run --json` has it, or ``{"refused": reason}``."""


Numbered = tuple[int, Scenario]
"""A point's place in the grid, and its scenario."""


def sweep(
    grid: Grid,
    *,
    engine: bool = False,
    jobs: int = 1,
    log: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Price every point of a grid.

    Parameters
    ----------
    grid
        Points.
    engine
        Play each event by event too, as `moesim run` does.
    jobs
        Processes.
    log
        File that every point is appended to when it is priced; those that it has already are taken from it.
    progress
        Called with the fraction done.

    Returns
    -------
    dict
        As ``moesim sweep --json`` prints it: ``points`` in the order of the grid.

    Raises
    ------
    ScenarioError
        If `log` is a file of something else.
    """
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    known = PointLog(log) if log is not None else None
    names = [identity(point.scenario, engine) if known and point.scenario else "" for point in grid.points]
    told: dict[int, Told] = {}
    todo: list[Numbered] = []
    for number, point in enumerate(grid.points):
        if point.scenario is None:
            told[number] = {"refused": point.refused}
        elif known and names[number] in known.told:
            told[number] = known.told[names[number]]
        else:
            todo.append((number, point.scenario))
    n_resumed = sum(point.scenario is not None for point in grid.points) - len(todo)
    other_cpu_s = 0.0
    for number, one, cpu_s in _priced_anyhow(sorted(todo, key=lambda one: inputs(one[1])), engine, jobs):
        told[number] = one
        other_cpu_s += cpu_s
        if known:
            known.append(names[number], one)
        if progress is not None:
            progress(len(told) / len(grid.points))
    cpu_s = time.process_time() - begin_cpu_s + other_cpu_s
    return {
        **_answer(grid, [told[number] for number in range(len(grid.points))]),
        "n_resumed": n_resumed,
        "elapsed_s": time.perf_counter() - begin_s,
        "cpu_s": cpu_s,
        "points_per_cpu_s": len(todo) / cpu_s if todo else None,
    }


def _answer(grid: Grid, told: Sequence[Told]) -> dict[str, Any]:
    keys = [key.key for key in grid.keys]
    points = [{"set": point.set, **one} for point, one in zip(grid.points, told, strict=True)]
    return {
        "scenario": grid.scenario,
        "swept": keys,
        "points": points,
        "tradeoff": tradeoff(keys, points),
        "warnings": list(grid.warnings),
        "n_points": len(points),
        "n_refused": sum("refused" in one for one in points),
    }


def identity(scenario: Scenario, engine: bool) -> str:
    """What a point's result hangs on, as a short text: its scenario, the files it names, moesim's own."""
    said = scenario.model_dump_json()
    named = [Path(text) for text in _texts(json.loads(said)) if _is_file(text)]
    text = f"{_code()} {engine} {said} {_stamps(named)}"
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value: one of them may be a file's name."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


@lru_cache(maxsize=4096)
def _is_file(text: str) -> bool:
    return Path(text).is_file()


@lru_cache(maxsize=1)
def _code() -> str:
    """Modules and catalog, by size and time of change: another moesim may say something else."""
    root = Path(__file__).resolve().parents[1]
    catalog = (one for one in (root / "catalog").rglob("*") if one.is_file() and one.suffix != ".pyc")
    return _stamps(sorted({*root.rglob("*.py"), *catalog}))


def _stamps(files: Sequence[Path]) -> str:
    stats = [(file, file.stat()) for file in files]
    text = repr([(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def _priced_anyhow(todo: Sequence[Numbered], engine: bool, jobs: int) -> Iterator[tuple[int, Told, float]]:
    """Number, result and other processes' CPU seconds of each point, in any order."""
    if jobs == 1 or len(todo) < 2:
        for number, told in _priced(todo, engine):
            yield number, told, 0.0
        return
    chunks = _chunks(todo, jobs)
    # forked copies of a process that has started threads may hang
    with ProcessPoolExecutor(
        jobs, mp_context=get_context("spawn"), initializer=_leave_when_interrupted
    ) as pool:
        try:
            with _bare_main():
                futures = [pool.submit(_priced_chunk, chunk, engine) for chunk in chunks]
            for done in as_completed(futures):
                found, cpu_s = done.result()
                for number, told in found:
                    yield number, told, cpu_s / len(found)
        except BrokenProcessPool:
            rule = "a process of the sweep was ended from outside, perhaps for want of memory"
            raise ScenarioError(rule, value=jobs, place="--jobs", fix="use fewer, or --jobs 1") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _chunks(todo: Sequence[Numbered], jobs: int) -> list[list[Numbered]]:
    """Pieces for the processes: points of one context together, as what is drawn for one serves the others."""
    groups = [list(group) for _, group in groupby(todo, key=lambda one: inputs(one[1]))]
    parts = 1 if len(groups) >= 2 * jobs else -(-CHUNKS_PER_JOB * jobs // len(groups))
    cut = [(group, -(-len(group) // parts)) for group in groups]
    return [group[at : at + size] for group, size in cut for at in range(0, len(group), size)]


@contextmanager
def _bare_main() -> Iterator[None]:
    """Start processes that do not run the caller's script: a script without a guard would sweep again in each."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _leave_when_interrupted() -> None:
    """Ctrl-C reaches every process of the terminal; the first one tells of it."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))


def _priced_chunk(todo: Sequence[Numbered], engine: bool) -> tuple[list[tuple[int, Told]], float]:
    begin_s = time.process_time()
    found = list(_priced(todo, engine))
    return found, time.process_time() - begin_s


def _priced(todo: Sequence[Numbered], engine: bool) -> Iterator[tuple[int, Told]]:
    """Price points whose scenarios stand sorted by their inputs: one context is held at a time."""
    held: tuple[str, Context] | None = None
    clusters: dict[str, Cluster] = {}
    for number, scenario in todo:
        try:
            if held is None or held[0] != inputs(scenario):
                held = (inputs(scenario), Context.of(scenario))
            key = scenario.cluster.model_dump_json()
            if key not in clusters:  # prices are remembered by cluster
                (clusters[key],) = scenario.cluster.clusters()
            yield number, _told(held[1], clusters[key], scenario, engine)
        except MoesimError as error:
            yield number, {"refused": str(error.at(""))}


def _told(context: Context, cluster: Cluster, scenario: Scenario, engine: bool) -> Told:
    outcome = priced_in(context, cluster, scenario).outcome
    if isinstance(outcome, Refused):
        raise LayoutError(outcome.reason)
    row, _ = result_row(context, outcome, engine=engine)
    return {"result": {**row, **whole_run(row, scenario)}}
