"""What the engine made of one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from moesim.engine import Timeline

__all__ = ["Play", "Played"]


@dataclass(frozen=True, eq=False)
class Played:
    """One size, event by event."""

    step_s: float
    """Time of a step, links shared."""
    breakdown_s: dict[str, float]
    """Where it goes, on the critical rank; the parts add up."""
    timelines: tuple[Timeline, ...]
    """One micro-batch in each pipeline stage; of training, the pipeline itself."""
    links: Literal["fluid", "ports"] = "ports"
    """Whether token exchanges were played as flows on the cluster's links, or took their price by ports."""


class Play(Protocol):
    """Runs one size of an outcome."""

    def __call__(self, point: int, *, events: bool = True) -> Played:
        """Event by event, or by the recurrence, which shares no links."""
