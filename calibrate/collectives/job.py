"""What a job is asked for, what its ranks hold in common, and what it tells at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calibrate.collectives.groups import Group
from calibrate.collectives.points import OPS, Point

__all__ = ["MIN_SAMPLES", "Outcome", "Plan", "Wanted"]

MIN_SAMPLES = 5
"""Samples of a point, however long one takes."""


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for."""

    out: Path
    backend: str
    sizes: list[int]
    """Message sizes [bytes]."""
    ops: tuple[str, ...] = OPS
    dtype: str = "bfloat16"
    budget_s: float | None = None
    timeout_s: float = 120.0
    trace: str | None = None
    """Routing of uneven splits: a catalog name or a file; the catalog's default where None."""
    device: str | None = None
    """Name for the tables; the GPU's own where None, ``cpu`` where there is none."""
    one_gpu: bool = False
    seed: int = 0


@dataclass
class Outcome:
    """What rank 0 has to tell."""

    n_written: int = 0
    n_before: int = 0
    """Points that the file held already."""
    n_left: int = 0
    """Points that the budget, or for one message the time-out, did not suffice for."""


@dataclass(frozen=True)
class Plan:
    """All that ranks must hold in common."""

    points: list[Point]
    groups: list[Group]
    pairs: list[Group]

    def group(self, point: Point) -> Group:
        """Ranks that run a point."""
        return (self.pairs if point.op == "send_recv" else self.groups)[point.group]
