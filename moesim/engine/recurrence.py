"""A program's times as a recurrence: every point and rank at once, no clock, no contention.

In order over the program's tasks, for each rank r (see docs/engine.md):

    ready[t, r] = max(end of r's previous task on the stream, end[d, r] for d in after[t])
    start[t, r] = max of ready[t, q] over the ranks q in r's collective (r alone without one)
    end[t, r]   = start[t, r] + duration[t, r]

which is exact because streams are in order and a task waits only for earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moesim.engine.groups import Rendezvous, rendezvous_of
from moesim.engine.program import STREAMS, FloatArray, Program
from moesim.engine.timeline import Timeline
from moesim.errors import EngineError

__all__ = ["Schedule", "evaluate", "makespan"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Times of every task at every point on every rank; the arrays are built when asked for."""

    program: Program
    """What ran."""
    makespan_s: FloatArray
    """(n_points,) end of the last task [s]."""
    per_task: tuple[tuple[FloatArray, FloatArray, FloatArray], ...]
    """Ready, start and end of each task, (n_points, n_ranks) [s]; meaningless where a rank skips."""

    @cached_property
    def ready_s(self) -> FloatArray:
        """(n_tasks, n_points, n_ranks) stream free and dependencies ended, NaN where a rank skips [s]."""
        return self._stack(0)

    @cached_property
    def start_s(self) -> FloatArray:
        """(n_tasks, n_points, n_ranks) start, NaN where a rank skips [s]."""
        return self._stack(1)

    @cached_property
    def end_s(self) -> FloatArray:
        """(n_tasks, n_points, n_ranks) end, NaN where a rank skips [s]."""
        return self._stack(2)

    def timeline(self, point: int = 0) -> Timeline:
        """One point as a `Timeline`, as `simulate` without contention gives it."""
        return Timeline(
            self.program, point, self.ready_s[:, point], self.start_s[:, point], self.end_s[:, point]
        )

    def _stack(self, which: int) -> FloatArray:
        stacked = np.empty((len(self.program.tasks), self.program.n_points, self.program.n_ranks))
        for position, (task, times) in enumerate(zip(self.program.tasks, self.per_task, strict=True)):
            stacked[position] = times[which]
            if task.group is not None:
                stacked[position, :, task.group < 0] = np.nan
        return stacked


def evaluate(program: Program) -> Schedule:
    """Compute the times of every task, without contention.

    Parameters
    ----------
    program
        Tasks over ranks, for one or many points.

    Returns
    -------
    Schedule
        With ready, start and end of each task, for breakdowns and timelines.

    Raises
    ------
    EngineError
        Where a duration is negative or not finite.

    Notes
    -----
    Tasks that overlap do not slow one another here; `simulate` shares links between them.
    """
    program.check_durations()
    history: list[tuple[FloatArray, FloatArray, FloatArray]] = []
    makespan_s = _recur(program, history)
    return Schedule(program, makespan_s, tuple(history))


def makespan(program: Program) -> FloatArray:
    """(n_points,) end of the last task [s], as `evaluate` but with no history kept.

    Memory is that of the ends still waited for, so large programs over many ranks stay in cache.

    Raises
    ------
    EngineError
        Where the result is not finite. Negative durations are not looked for.
    """
    return _recur(program, None)


def _recur(program: Program, history: list[tuple[FloatArray, FloatArray, FloatArray]] | None) -> FloatArray:
    zeros = np.zeros((program.n_points, program.n_ranks))
    free_s: dict[str, FloatArray] = dict.fromkeys(STREAMS, zeros)
    end_s: dict[int, FloatArray] = {}
    last_use = _last_use(program)
    prepared: dict[int, Rendezvous] = {}  # by identity: the program keeps its arrays alive
    for position, task in enumerate(program.tasks):
        ready_s = free_s[task.stream]
        for earlier in task.after:
            # a dependency absent here is on this very stream, whose order already keeps it
            earlier_s = end_s.get(earlier)
            if earlier_s is not None:
                ready_s = np.maximum(ready_s, earlier_s)
                if last_use[earlier] == position:
                    del end_s[earlier]
        start_s, member = ready_s, None
        if task.group is not None:
            meet = prepared.get(id(task.group))
            if meet is None:
                meet = prepared[id(task.group)] = rendezvous_of(task.group)
            start_s, member = meet.start_s(ready_s), meet.member
        done_s = start_s + task.duration_s
        if history is not None:
            history.append((ready_s, start_s, done_s))
        free_s[task.stream] = done_s if member is None else np.where(member, done_s, free_s[task.stream])
        if position in last_use:
            end_s[position] = done_s if member is None else np.where(member, done_s, 0.0)
    makespan_s: FloatArray = np.max([free.max(axis=1) for free in free_s.values()], axis=0)
    if not np.isfinite(makespan_s).all():
        raise EngineError("durations are finite", value=makespan_s, fix="look for NaN or inf among them")
    return makespan_s


def _last_use(program: Program) -> dict[int, int]:
    """Task that other streams wait for -> last task that does."""
    streams = [task.stream for task in program.tasks]
    return {
        earlier: position
        for position, task in enumerate(program.tasks)
        for earlier in task.after
        if streams[earlier] != task.stream
    }
