"""Rank 0's book: which points are on file, what is left of the time, and the rows as they are written."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.collectives.job import MIN_SAMPLES, Outcome, Plan, Wanted
from calibrate.collectives.points import DTYPE_BYTES, Point
from calibrate.recorder import Recorder
from calibrate.run.device import Clocks
from calibrate.run.protocol import summarise

__all__ = ["Book"]

FloatArray = NDArray[np.float64]


@dataclass
class Book:
    """Rank 0's: what is on file, what it took, and how much time is left."""

    wanted: Wanted
    plan: Plan
    common: dict[str, Any]
    """Columns that every row shares."""
    recorder: Recorder
    outcome: Outcome = field(default_factory=Outcome)
    began_s: float = field(default_factory=time.monotonic)
    costs: dict[tuple[str, int], dict[int, float]] = field(default_factory=dict)
    """By operator and group: longest time [s] of each message size so far [elements]."""

    def key(self, point: Point) -> dict[str, Any]:
        """Columns that tell a point from all others."""
        group = self.plan.group(point)
        return {
            **self.common,
            "op": point.op,
            "n_ranks": group.size,
            "message_elements": point.message_elements,
            "message_bytes": point.message_elements * DTYPE_BYTES[self.wanted.dtype],
            "n_nodes": group.n_nodes,
            "split": point.split,
        }

    def left_s(self) -> float:
        """Time left [s]."""
        budget_s = math.inf if self.wanted.budget_s is None else self.wanted.budget_s
        return self.began_s + budget_s - time.monotonic()

    def expected_s(self, point: Point) -> float:
        """About what one call takes, along the line through the two largest messages before it [s].

        Before there are two, a collective is taken for as many messages between two ranks as it has rounds.
        """
        own = self.costs.get((point.op, point.group), {})
        if len(own) > 1 or point.op == "send_recv":
            return _extended_s(own, point.elements)
        pairs = [known for (op, _), known in self.costs.items() if op == "send_recv"]
        rounds = 2 * math.ceil(math.log2(self.plan.group(point).size))
        return rounds * max((_extended_s(known, point.elements) for known in pairs), default=0.0)

    def remaining(self) -> Iterator[int]:
        """Points to measure now, by index, as long as there is time."""
        for index, point in enumerate(self.plan.points):
            if self.recorder.seen(self.key(point)):
                self.outcome.n_before += 1
            elif self._fits(self.expected_s(point)):
                yield index
            else:
                self.outcome.n_left += 1

    def _fits(self, expected_s: float) -> bool:
        """Whether the samples fit the time that is left, and one call the time-out by far."""
        whole_s = expected_s * (MIN_SAMPLES + 3)
        return 0 < self.left_s() > whole_s and 3 * expected_s < self.wanted.timeout_s

    def write(self, point: Point, time_s: FloatArray, skew_s: FloatArray) -> None:
        """Put a point on file: times and start skews of its samples, (n_samples,) [s]."""
        found = summarise(time_s, cache=None, graph=False, clocks=Clocks(), seed=self.wanted.seed).columns()
        self.costs.setdefault((point.op, point.group), {})[point.elements] = float(np.max(time_s))
        skew = None if point.op == "send_recv" else float(np.median(skew_s))
        row = {
            **self.key(point),
            **found,
            "start_skew_s": skew,
            "held_out": int(point.held_out),
            "seed": self.wanted.seed,
            "date": date.today().isoformat(),
            "host": platform.node(),
        }
        self.recorder.append(row)
        self.outcome.n_written += 1


def _extended_s(known: Mapping[int, float], elements: int) -> float:
    """Time of a message from those of others, by size; 0 where none is known [s]."""
    largest = sorted(known.items())[-2:]
    if not largest:
        return 0.0
    (size, time_s), (small, small_s) = largest[-1], largest[0]
    slope = max(0.0, time_s - small_s) / (size - small) if size > small else 0.0
    return time_s + slope * max(0, elements - size)
