"""A program on a SimPy clock: streams as processes, collectives as meetings, links shared."""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np
import simpy

from moesim.engine.fluid_links import FluidLinks
from moesim.engine.folding import fold
from moesim.engine.gpus import SharedGpus, Work
from moesim.engine.links import Flow, SharedLinks
from moesim.engine.program import STREAMS, FloatArray, Program
from moesim.engine.timeline import Timeline
from moesim.errors import EngineError

__all__ = ["simulate"]

NAN = float("nan")
Steps = Generator[simpy.Event, None, None]


def simulate(program: Program, point: int = 0, *, contention: bool = True, folding: bool = True) -> Timeline:
    """Run one point of a program on a clock.

    Parameters
    ----------
    program
        Tasks over ranks.
    point
        Which of its workload sizes.
    contention
        Tasks that overlap share links: those with `flows` max-min fairly over the program's network, others with
        the same `link` equally on each rank; and where the program says how, tasks with a `draw` share their GPU.
        False = as if alone.
    folding
        Ranks that are exact copies are simulated once; changes the time it takes, not the result. Without effect
        where tasks have flows.

    Returns
    -------
    Timeline
        Ready, start and end of every task on every rank.

    Raises
    ------
    EngineError
        Where the program has no such point, or a duration is negative or not finite.

    Notes
    -----
    Deterministic: SimPy breaks ties in time by the order in which events were made. It cannot deadlock:
    of the tasks not yet ended, the first in program order is first on the stream of each of its ranks,
    and waits only for tasks that have ended.
    """
    if not 0 <= point < program.n_points:
        raise EngineError(f"the program has points 0 to {program.n_points - 1}", value=point)
    program.check_durations()
    class_of = np.arange(program.n_ranks)
    small, small_point = program, point
    if folding and program.network is None:
        folded = fold(program, point)
        small, small_point, class_of = folded.program, 0, folded.class_of
    run = _Run(small, small_point, contention)
    run.env.run()
    ready_s, start_s, end_s = (times.by_task()[:, class_of] for times in (run.ready, run.start, run.end))
    return Timeline(program, point, ready_s, start_s, end_s)


class _Times:
    """One time for each task and rank, NaN until it is known."""

    def __init__(self, n_tasks: int, n_ranks: int) -> None:
        self.n_ranks = n_ranks
        self.rows = [[NAN] * n_ranks for _ in range(n_tasks)]

    def by_task(self) -> FloatArray:
        return np.array(self.rows, dtype=np.float64).reshape(-1, self.n_ranks)


class _Meeting:
    """One collective: who is in it, who is still awaited."""

    def __init__(self, env: simpy.Environment, ranks: list[int]) -> None:
        self.ranks = ranks
        self.n_awaited = len(ranks)
        self.begins = env.event()
        self.flow: Flow | None = None
        self.arrived: dict[int, simpy.Event] = {}


class _Run:
    """One simulation: a process for each rank and stream that has something to do."""

    def __init__(self, program: Program, point: int, contention: bool) -> None:
        self.env = simpy.Environment()
        self.tasks = program.tasks
        self.durations_s = [program.duration_at_s(task, point).tolist() for task in program.tasks]
        self.ready, self.start, self.end = (_Times(len(self.tasks), program.n_ranks) for _ in range(3))
        self.waited_for: dict[tuple[int, int], simpy.Event] = {}
        self.links = SharedLinks(self.env)
        net = program.network if contention else None
        self.fluid = FluidLinks(self.env, net.link_bytes_per_s, net.tolerance) if net else None
        self.gpus = SharedGpus(self.env, program.sharing) if program.sharing and contention else None
        self.memory = [program.memory_at(task, point).tolist() for task in program.tasks] if self.gpus else []
        self.contended = _links_of_several_streams(program) if contention else frozenset()
        self.meetings = self._meetings()
        for stream in STREAMS:
            positions = [position for position, task in enumerate(self.tasks) if task.stream == stream]
            for rank in range(program.n_ranks if positions else 0):
                self.env.process(self._run_stream(rank, positions))

    def _meetings(self) -> list[list[_Meeting | None] | None]:
        """For each task, each rank's collective; None = each by itself, None for a rank = no part."""
        members: dict[int, dict[int, list[int]]] = {}
        meetings: list[list[_Meeting | None] | None] = []
        for task in self.tasks:
            if task.group is None:
                meetings.append(None)
                continue
            if id(task.group) not in members:
                ranks_of = members[id(task.group)] = {}
                for rank, one in enumerate(task.group.tolist()):
                    ranks_of.setdefault(one, []).append(rank)
            made = {
                one: _Meeting(self.env, ranks) if one >= 0 else None
                for one, ranks in members[id(task.group)].items()
            }
            meetings.append([made[one] for one in task.group.tolist()])
        return meetings

    def _run_stream(self, rank: int, positions: list[int]) -> Steps:
        """Take the tasks of one stream of one rank in order."""
        for position in positions:
            meetings = self.meetings[position]
            meeting = None
            if meetings is not None:
                meeting = meetings[rank]
                if meeting is None:
                    continue
            for earlier in self.tasks[position].after:
                if not self._over(earlier, rank):
                    yield self.waited_for.setdefault((earlier, rank), self.env.event())
            self.ready.rows[position][rank] = self.env.now
            if meeting is None:
                self.start.rows[position][rank] = self.env.now
                yield from self._work(position, rank)
            else:
                yield from self._meet(position, rank, meeting)
            self.end.rows[position][rank] = self.env.now
            waiter = self.waited_for.pop((position, rank), None)
            if waiter is not None:
                waiter.succeed()

    def _over(self, position: int, rank: int) -> bool:
        """Whether a task has ended on a rank, or has no part there."""
        meetings = self.meetings[position]
        ended = not math.isnan(self.end.rows[position][rank])
        return ended or (meetings is not None and meetings[rank] is None)

    def _enter(self, position: int, rank: int) -> Work | None:
        """Begin a task on its GPU; None where it takes nothing that others miss."""
        draw = self.tasks[position].draw
        if draw is None or self.gpus is None:
            return None
        return self.gpus.enter(rank, self.memory[position][rank], draw.by_sms)

    def _until(self, rank: int, work: Work | None, start_s: float, total_s: float) -> Steps:
        """Wait until a task that began at `start_s` has done what takes `total_s` alone on its GPU."""
        if work is not None and self.gpus is not None:
            yield self.gpus.finish(rank, work, total_s)
        else:
            yield self.env.timeout(max(total_s - (self.env.now - start_s), 0.0))

    def _work(self, position: int, rank: int) -> Steps:
        """A task that one rank does by itself."""
        duration_s, start_s = self.durations_s[position][rank], self.env.now
        link, work = self.tasks[position].link, self._enter(position, rank)
        if link is not None and link in self.contended:
            yield self.links.start(link, [rank], [duration_s]).done[rank]
            duration_s = self.env.now - start_s
        yield from self._until(rank, work, start_s, duration_s)

    def _meet(self, position: int, rank: int, meeting: _Meeting) -> Steps:
        """Wait for the last member, then hold the stream for this rank's own time."""
        link, flows = self.tasks[position].link, self.tasks[position].flows
        durations_s = self.durations_s[position]
        meeting.n_awaited -= 1
        if meeting.n_awaited:
            yield meeting.begins
        else:
            if flows is not None and self.fluid is not None:
                meeting.arrived = self.fluid.start(flows, meeting.ranks)
            if link is not None and link in self.contended:
                works_s = [durations_s[one] for one in meeting.ranks]
                meeting.flow = self.links.start(link, meeting.ranks, works_s)
            meeting.begins.succeed()
        start_s = self.start.rows[position][rank] = self.env.now
        work, total_s = self._enter(position, rank), durations_s[rank]
        if flows is not None and meeting.arrived:
            yield meeting.arrived[rank]
            # the rest is what the task takes beside its bytes
            total_s += flows.late_s(rank, self.env.now - start_s)
        if meeting.flow is not None:  # shared with tasks without flows too: the later end counts
            yield meeting.flow.done[rank]
            total_s = max(total_s, self.env.now - start_s)
        yield from self._until(rank, work, start_s, total_s)


def _links_of_several_streams(program: Program) -> frozenset[str]:
    """Links that tasks of one rank can want at once: a stream never overlaps with itself, flows share by themselves."""
    users: dict[str, set[str]] = {}
    for task in program.tasks:
        if task.link is not None:
            users.setdefault(task.link, set()).add(task.stream)
    plain = {task.link for task in program.tasks if task.flows is None}
    return frozenset(link for link, streams in users.items() if len(streams) > 1 and link in plain)
