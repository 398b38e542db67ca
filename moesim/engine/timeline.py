"""What ran when: the spans of one simulated step on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moesim.engine.program import FloatArray, Program

__all__ = ["Span", "Timeline"]


@dataclass(frozen=True, slots=True)
class Span:
    """One task on one rank."""

    task: int
    """Position in the program."""
    name: str
    """The task's name."""
    rank: int
    """Where it ran."""
    stream: str
    """Stream it held."""
    category: str
    """Kind of work."""
    ready_s: float
    """Stream free and dependencies ended [s]; from here to `start_s` it waits for its peers."""
    start_s: float
    """When it, or the collective it is part of, began [s]."""
    end_s: float
    """When it left its stream [s]."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """Ready, start and end of every task on every rank, for one point.

    Columns rather than span objects: 512 ranks x 1200 tasks are 15 MB so, and 100 MB as objects.
    """

    program: Program
    """What ran."""
    point: int
    """Which of the program's workload sizes."""
    ready_s: FloatArray
    """(n_tasks, n_ranks) stream free and dependencies ended, NaN where a rank takes no part [s]."""
    start_s: FloatArray
    """(n_tasks, n_ranks) start, NaN where a rank takes no part [s]."""
    end_s: FloatArray
    """(n_tasks, n_ranks) end, NaN where a rank takes no part [s]."""

    @property
    def makespan_s(self) -> float:
        """End of the last task [s]; 0 for an empty program."""
        return float(np.max(self.end_s, initial=0.0, where=~np.isnan(self.end_s)))

    def spans(self, rank: int | None = None) -> Iterator[Span]:
        """Spans in order of rank, then of the program.

        Parameters
        ----------
        rank
            Only this rank's; None = all.
        """
        for one in range(self.program.n_ranks) if rank is None else (rank,):
            columns = (self.ready_s[:, one], self.start_s[:, one], self.end_s[:, one])
            times = zip(*(column.tolist() for column in columns), strict=True)
            for position, (task, (ready_s, start_s, end_s)) in enumerate(
                zip(self.program.tasks, times, strict=True)
            ):
                if end_s == end_s:  # NaN: this rank took no part
                    yield Span(position, task.name, one, task.stream, task.category, ready_s, start_s, end_s)
