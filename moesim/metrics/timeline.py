"""Where the time of a step goes: breakdown, utilisation, waiting, imbalance."""

from __future__ import annotations

import numpy as np

from moesim.engine.program import STREAMS, FloatArray, IntArray, Program
from moesim.engine.timeline import Timeline
from moesim.errors import EngineError

__all__ = [
    "WAIT",
    "breakdown_s",
    "busy_s",
    "check_timeline",
    "critical_rank",
    "exposed_communication_s",
    "idle_s",
    "imbalance",
    "lower_bound_s",
    "utilisation",
    "waiting_s",
]

WAIT = "wait"
"""Part of a breakdown in which no stream of the rank runs anything."""

EXPOSED = "exposed "
"""Prefix of a category that runs beside no computation."""


def critical_rank(timeline: Timeline) -> int:
    """Rank that ends last, the first of them on a tie."""
    return int(np.argmax(np.nan_to_num(timeline.end_s).max(axis=0, initial=0.0)))


def breakdown_s(timeline: Timeline, rank: int | None = None) -> dict[str, float]:
    """Parts of the step's time on one rank; they add up to the makespan.

    Parameters
    ----------
    timeline
        One simulated step.
    rank
        Whose time; None = the critical rank's.

    Returns
    -------
    dict
        Seconds by part: compute, then comm, then copy, each in program order, and `WAIT` last. Each
        instant from 0 to the makespan goes to one part: the category on the compute stream; where that
        is idle, ``exposed <category>`` of the comm stream, then of the copy stream; where all are idle
        `WAIT`.

    Notes
    -----
    `WAIT` holds stragglers (a collective's last member), dependencies between streams, and what is
    left after the rank's own last task. An uncategorised task counts under its stream's name.
    """
    rank = critical_rank(timeline) if rank is None else rank
    cuts_s = np.unique(np.concatenate([_times(timeline, rank), [0.0, timeline.makespan_s]]))
    lengths_s = np.diff(cuts_s)
    unclaimed = np.ones(lengths_s.size, dtype=bool)
    parts_s: dict[str, float] = {}
    for stream in STREAMS:
        running = _running(timeline, stream, rank, cuts_s[:-1])
        mine = unclaimed & (running >= 0)
        unclaimed &= running < 0
        per_task_s = np.bincount(running[mine], lengths_s[mine], len(timeline.program.tasks))
        for position in np.flatnonzero(per_task_s).tolist():
            task = timeline.program.tasks[position]
            part = ("" if stream == "compute" else EXPOSED) + (task.category or stream)
            parts_s[part] = parts_s.get(part, 0.0) + float(per_task_s[position])
    parts_s[WAIT] = float(lengths_s[unclaimed].sum())
    return parts_s


def busy_s(timeline: Timeline) -> dict[str, FloatArray]:
    """(n_ranks,) time that each stream is held, by stream [s]."""
    held_s = np.nan_to_num(timeline.end_s - timeline.start_s)
    streams = np.array([task.stream for task in timeline.program.tasks], dtype=object)
    return {stream: held_s[streams == stream].sum(axis=0) for stream in STREAMS}


def utilisation(timeline: Timeline) -> dict[str, FloatArray]:
    """(n_ranks,) fraction of the step that each stream is held, by stream; 0 for an empty step."""
    makespan_s = timeline.makespan_s
    return {
        stream: held_s / makespan_s if makespan_s > 0 else np.zeros_like(held_s)
        for stream, held_s in busy_s(timeline).items()
    }


def exposed_communication_s(timeline: Timeline) -> FloatArray:
    """(n_ranks,) time in which a rank communicates or copies, and computes nothing [s]."""
    return np.array(
        [
            sum(part_s for part, part_s in breakdown_s(timeline, rank).items() if part.startswith(EXPOSED))
            for rank in range(timeline.program.n_ranks)
        ]
    )


def idle_s(timeline: Timeline) -> FloatArray:
    """(n_ranks,) time in which no stream of a rank runs anything, up to the makespan [s]."""
    return np.array([breakdown_s(timeline, rank)[WAIT] for rank in range(timeline.program.n_ranks)])


def waiting_s(timeline: Timeline) -> FloatArray:
    """(n_ranks,) time between a rank being ready for its collectives and their last member [s].

    Per stream and summed over tasks: another stream of the rank may well compute meanwhile.
    """
    waited_s: FloatArray = np.nan_to_num(timeline.start_s - timeline.ready_s).sum(axis=0)
    return waited_s


def imbalance(timeline: Timeline, category: str | None = None) -> float:
    """Largest over mean time held on the compute stream, over ranks; 1 = balanced.

    Parameters
    ----------
    timeline
        One simulated step.
    category
        Only these tasks, on any stream; None = all of the compute stream.
    """
    chosen = np.array(
        [
            task.stream == "compute" if category is None else task.category == category
            for task in timeline.program.tasks
        ],
        dtype=bool,
    )
    held_s = np.nan_to_num(timeline.end_s - timeline.start_s)[chosen].sum(axis=0)
    mean_s = float(held_s.mean())
    return float(held_s.max()) / mean_s if mean_s > 0 else 1.0


def lower_bound_s(program: Program, point: int = 0) -> float:
    """Largest sum of durations over the streams of all ranks [s]; no order of tasks can beat it."""
    sums_s = {stream: np.zeros(program.n_ranks) for stream in STREAMS}
    for task in program.tasks:
        duration_s = program.duration_at_s(task, point)
        sums_s[task.stream] += (
            duration_s if task.group is None else np.where(task.group >= 0, duration_s, 0.0)
        )
    return float(max(sum_s.max() for sum_s in sums_s.values()))


def check_timeline(timeline: Timeline, rtol: float = 1e-9) -> None:
    """Check a timeline against the rules of its program, task by task.

    Parameters
    ----------
    timeline
        From `simulate` or from a `Schedule`.
    rtol
        Slack, as a fraction of the makespan.

    Raises
    ------
    EngineError
        At the first task that ends too early for its duration, overlaps the one before on its stream,
        starts before a dependency has ended or before it is ready, or apart from its collective.
    """
    program, slack_s = timeline.program, rtol * timeline.makespan_s
    free_s = {stream: np.zeros(program.n_ranks) for stream in STREAMS}
    over_s = np.nan_to_num(timeline.end_s)
    for position, task in enumerate(program.tasks):
        takes_part = np.ones(program.n_ranks, bool) if task.group is None else task.group >= 0
        ready_s, start_s, end_s = (
            times[position] for times in (timeline.ready_s, timeline.start_s, timeline.end_s)
        )
        if not np.array_equal(np.isnan(end_s), ~takes_part):
            raise EngineError("runs on other ranks than its group names", place=task.name)
        after_s = np.max([free_s[task.stream], *(over_s[earlier] for earlier in task.after)], axis=0)
        _refuse(task.name, "is ready before its stream or a dependency", after_s - ready_s, slack_s)
        _refuse(task.name, "starts before it is ready", ready_s - start_s, slack_s)
        duration_s = program.duration_at_s(task, timeline.point)
        _refuse(task.name, "takes less than its duration", duration_s - (end_s - start_s), slack_s)
        if task.group is not None:
            for one in np.unique(task.group[takes_part]):
                spread_s = np.ptp(start_s[task.group == one])
                _refuse(task.name, "starts apart from its collective", np.array([spread_s]), slack_s)
        free_s[task.stream] = np.where(takes_part, end_s, free_s[task.stream])


def _refuse(name: str, what: str, excess_s: FloatArray, slack_s: float) -> None:
    worst_s = float(np.max(excess_s, initial=0.0, where=~np.isnan(excess_s)))
    if worst_s > slack_s:
        raise EngineError(what, value=f"{worst_s:.3e} s", place=name)


def _times(timeline: Timeline, rank: int) -> FloatArray:
    """Starts and ends of one rank's tasks, in no order [s]."""
    times_s = np.concatenate([timeline.start_s[:, rank], timeline.end_s[:, rank]])
    known_s: FloatArray = times_s[~np.isnan(times_s)]
    return known_s


def _running(timeline: Timeline, stream: str, rank: int, at_s: FloatArray) -> IntArray:
    """For each instant the task that runs on a stream just after it, -1 = none."""
    on_stream = np.array([task.stream == stream for task in timeline.program.tasks], dtype=bool)
    positions = np.flatnonzero(on_stream & ~np.isnan(timeline.end_s[:, rank]))
    if not positions.size:
        return np.full(at_s.shape, -1, dtype=np.int64)
    # in order and without overlap, so starts are sorted; of equal starts the last is the one that lasts
    last = np.searchsorted(timeline.start_s[positions, rank], at_s, side="right") - 1
    runs = (last >= 0) & (timeline.end_s[positions[last], rank] > at_s)
    running: IntArray = np.where(runs, positions[last], -1)
    return running
