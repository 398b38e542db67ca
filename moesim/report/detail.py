"""What a report shows of one layout besides its figures in the ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from moesim.engine.timeline import Timeline

__all__ = ["LayoutDetail"]


@dataclass(frozen=True, eq=False)
class LayoutDetail:
    """Maps and timeline of one layout; what is None is left out of the page."""

    title: str
    """Name of the layout, as a heading."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Its row of the ranking."""
    expert_load: NDArray[Any] | None = None
    """(n_layers, n_experts) or (n_layers, n_slots) tokens over the layer's mean."""
    rank_load: NDArray[Any] | None = None
    """(n_layers, n_ranks) tokens over the layer's mean, of the ranks of one expert group."""
    traffic: NDArray[Any] | None = None
    """(n_ranks, n_ranks) bytes from rank to rank in one layer's dispatch; the diagonal stays where it is."""
    timeline: Timeline | None = None
    """One simulated step."""
    notes: Sequence[str] = ()
    """Lines under the heading: what was simulated, with which routing, and what is left out."""
    layers: Sequence[int] | None = None
    """(n_layers,) layer number of each row of the loads; None = numbered from 0."""
    expert_axis: str = "expert"
    """What a column of `expert_load` is: ``expert`` or ``expert slot``."""
