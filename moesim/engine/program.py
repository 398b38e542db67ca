"""A timed program: what every rank does, in which order, on which stream.

One form serves both executors: the SimPy engine (`moesim.engine.simulate`) and the vectorised
recurrence (`moesim.engine.evaluate`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moesim.errors import EngineError

__all__ = ["STREAMS", "Draw", "FloatArray", "Flows", "IntArray", "Network", "Program", "Sharing", "Task"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

STREAMS = ("compute", "comm", "copy")
"""In-order queues that each rank has, as CUDA streams are."""


@dataclass(frozen=True, eq=False)
class Flows:
    """What a task's collectives move over the links of a program's `Network`; flows without bytes are left out."""

    source: IntArray
    """(n_flows,) rank that sends."""
    target: IntArray
    """(n_flows,) rank that receives."""
    routes: IntArray
    """(n_flows, n_hops) links that a flow holds all at once, -1 = none."""
    n_bytes: FloatArray
    """(n_flows,) [bytes]."""
    latency_s: FloatArray
    """(n_flows,) paid before the bytes flow [s]."""
    alone_s: FloatArray
    """(n_ranks,) when a rank's last flow ends with nothing else on the links, from the start [s]."""
    beside_s: FloatArray | None = None
    """(n_ranks,) work done while bytes flow, which hides a part of their delay; None = none [s]."""
    sharpness: float = 1.0
    """Exponent p of the smooth maximum that joins the two: ``(bytes ** p + beside ** p) ** (1 / p)``."""

    def late_s(self, rank: int, finish_s: float) -> float:
        """How much longer a task takes on a rank whose last flow ends `finish_s` after the start [s]."""
        alone_s = float(self.alone_s[rank])
        beside_s = 0.0 if self.beside_s is None else float(self.beside_s[rank])
        if beside_s == 0 or finish_s == alone_s:
            return finish_s - alone_s
        p, whole_s = self.sharpness, max(finish_s, alone_s, beside_s)
        with_delay, without = (
            ((one / whole_s) ** p + (beside_s / whole_s) ** p) ** (1 / p) for one in (finish_s, alone_s)
        )
        return float(whole_s * (with_delay - without))

    def among(self, ranks: list[int]) -> Flows:
        """Those between some of the ranks: of a task that is several collectives, one's."""
        member = np.zeros(self.alone_s.size, dtype=bool)
        member[ranks] = True
        kept = member[self.source]
        if kept.all():
            return self
        return replace(
            self,
            source=self.source[kept],
            target=self.target[kept],
            routes=self.routes[kept],
            n_bytes=self.n_bytes[kept],
            latency_s=self.latency_s[kept],
        )


@dataclass(frozen=True, eq=False)
class Network:
    """Links that the flows of a program share."""

    link_bytes_per_s: FloatArray
    """(n_links,) [bytes/s]."""
    tolerance: float = 0.0
    """As in `moesim.network.solve_flows`."""


@dataclass(frozen=True, eq=False)
class Draw:
    """What a task takes of its GPU, so that tasks beside it on other streams slow it and are slowed."""

    memory: FloatArray
    """Share of the memory's rate that it needs alone, from 0 to 1; broadcastable to (n_points, n_ranks)."""
    by_sms: bool = False
    """Whether it is an exchange that SMs copy; others compute."""


@dataclass(frozen=True)
class Sharing:
    """How an exchange that SMs copy and compute slow one another on one GPU, beyond the memory that they share."""

    exchange_stretch: float = 1.0
    """Time of the exchange beside compute, over that alone."""
    compute_stretch: float = 1.0
    """Time of compute beside the exchange, over that alone."""

    def __post_init__(self) -> None:
        for name, value in (("exchange", self.exchange_stretch), ("compute", self.compute_stretch)):
            if not 1.0 <= value < np.inf:
                raise EngineError(f"{name} beside the other takes at least as long as alone", value=value)


@dataclass(frozen=True, eq=False)
class Task:
    """One operator on a set of ranks.

    A rank starts a task when its stream is free and the tasks in `after` have ended *on that rank*;
    a collective starts on every member when the last member is ready. Ranks outside `group` skip it.
    """

    name: str
    """Operator, with its layer: ``moe.17.dispatch``."""
    stream: str
    """One of `STREAMS`; tasks of one stream run in the order of the program."""
    duration_s: FloatArray
    """Time alone on its stream, broadcastable to (n_points, n_ranks) [s]."""
    after: tuple[int, ...] = ()
    """Positions, in the program, of tasks that must end first; each is earlier than this one."""
    group: IntArray | None = None
    """(n_ranks,) collective that each rank joins, -1 = takes no part; None = each rank by itself."""
    category: str = ""
    """Kind of work, for the breakdown of a step's time: ``attention``, ``expert_ffn``, ``dispatch``..."""
    link: str | None = None
    """Class of link that the task fills (``nvlink``, ``nic``, ``pcie``); None where it fills none."""
    flows: Flows | None = None
    """What its collectives move over the program's network: other flows on the same links make it longer."""
    draw: Draw | None = None
    """What it takes of its GPU; None = nothing that others miss."""


@dataclass(frozen=True, eq=False)
class Program:
    """Tasks in issue order over `n_ranks` ranks, for `n_points` workload sizes at once."""

    n_ranks: int
    tasks: tuple[Task, ...]
    n_points: int = 1
    labels: tuple[str, ...] = field(default=())
    """Names of the ranks for the timeline; empty = numbered."""
    network: Network | None = None
    """Links of the flows of its tasks; a program with flows has one point."""
    sharing: Sharing | None = None
    """How tasks that overlap on one GPU slow one another; None = not at all."""

    @classmethod
    def trusted(
        cls, n_ranks: int, tasks: tuple[Task, ...], n_points: int = 1, network: Network | None = None,
        sharing: Sharing | None = None,
    ) -> Program:  # fmt: skip
        """Make a program without checking it: for tasks unrolled from a step, whose form holds by construction."""
        program = object.__new__(cls)
        object.__setattr__(program, "labels", ())
        values = {
            "n_ranks": n_ranks, "tasks": tasks, "n_points": n_points, "network": network, "sharing": sharing,
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(program, name, value)
        return program

    def __post_init__(self) -> None:
        if self.n_ranks < 1 or self.n_points < 1:
            raise EngineError("n_ranks and n_points are at least 1", value=(self.n_ranks, self.n_points))
        if self.labels and len(self.labels) != self.n_ranks:
            raise EngineError(f"labels name all {self.n_ranks} ranks or none", value=self.labels)
        checked: set[int] = set()  # planners share one group array among hundreds of tasks
        for position, task in enumerate(self.tasks):
            self._check(position, task)
            if task.group is not None and id(task.group) not in checked:
                checked.add(id(task.group))
                self._check_group(task.name, task.group)

    def _check(self, position: int, task: Task) -> None:
        if task.stream not in STREAMS:
            raise EngineError(f"a stream is one of {STREAMS}", value=task.stream, place=task.name)
        if task.flows is not None and (self.network is None or self.n_points > 1 or task.group is None):
            raise EngineError(
                "flows need a collective, a network, and a program of one point", place=task.name
            )
        if task.flows is not None and task.group is not None:
            ends = task.group[task.flows.source], task.group[task.flows.target]
            if np.any(ends[0] != ends[1]) or np.any(ends[0] < 0):
                raise EngineError("a flow stays in its collective", place=task.name)
        for earlier in task.after:
            if not 0 <= earlier < position:
                raise EngineError("a task waits only for earlier ones", value=task.after, place=task.name)
        if task.draw is not None and not np.all((task.draw.memory >= 0) & (task.draw.memory <= 1)):
            raise EngineError("a task needs from none to all of the memory's rate", place=task.name)
        # by hand: np.broadcast_to would cost more than the evaluation of the task
        shape = np.shape(task.duration_s)
        wanted = (self.n_points, self.n_ranks)[2 - len(shape) :] if len(shape) <= 2 else None
        if shape != wanted and (
            wanted is None or any(n not in (1, full) for n, full in zip(shape, wanted, strict=True))
        ):
            raise EngineError(
                f"duration does not broadcast to {(self.n_points, self.n_ranks)}",
                value=shape,
                place=task.name,
            )

    def _check_group(self, place: str, group: IntArray) -> None:
        if np.shape(group) != (self.n_ranks,):
            raise EngineError(
                f"group needs one entry per rank ({self.n_ranks})", value=np.shape(group), place=place
            )
        if group.dtype.kind not in "iu" or int(group.min()) < -1:
            raise EngineError(
                "a group id is an integer >= 0, or -1 to take no part", value=group, place=place
            )

    def duration_at_s(self, task: Task, point: int) -> FloatArray:
        """(n_ranks,) duration of one of its tasks at one point [s]."""
        duration_s = np.asarray(task.duration_s, dtype=np.float64)
        if duration_s.ndim == 2:
            duration_s = duration_s[point if len(duration_s) > 1 else 0]
        return np.broadcast_to(duration_s, (self.n_ranks,))

    def memory_at(self, task: Task, point: int) -> FloatArray:
        """(n_ranks,) share of the memory's rate that one of its tasks needs at one point; 0 without a draw."""
        if task.draw is None:
            return np.zeros(self.n_ranks)
        memory = np.asarray(task.draw.memory, dtype=np.float64)
        if memory.ndim == 2:
            memory = memory[point if len(memory) > 1 else 0]
        return np.broadcast_to(memory, (self.n_ranks,))

    def check_durations(self) -> None:
        """Raise an EngineError where a duration is negative, infinite or not a number.

        Apart from construction because it reads every element: `evaluate` and `simulate` call it,
        `makespan` does not.
        """
        for task in self.tasks:
            lowest_s = np.minimum.reduce(task.duration_s, axis=None)
            highest_s = np.maximum.reduce(task.duration_s, axis=None)
            if not (lowest_s >= 0 and highest_s < np.inf):  # so written that NaN fails too
                bad_s = highest_s if lowest_s >= 0 else lowest_s
                raise EngineError("a duration is finite and >= 0 s", value=float(bad_s), place=task.name)
