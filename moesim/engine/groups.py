"""Who meets whom: membership of a collective, made ready for vectorised rendezvous."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moesim.engine.program import FloatArray, IntArray

__all__ = ["Rendezvous", "rendezvous_of"]


@dataclass(frozen=True, eq=False)
class Rendezvous:
    """How the ready times of ranks become the start times of the collectives they join."""

    member: NDArray[np.bool_] | None
    """(n_ranks,) ranks that take part; None = all."""
    meets: bool
    """False where no rank meets another: every collective has one member."""
    order: IntArray | None
    """Ranks that take part, sorted by group; None = already in that order, or nothing to sort."""
    first: IntArray
    """Where each group begins in `order`."""
    group_of: IntArray
    """(n_ranks,) position of each rank's group; 0 for those that take no part."""

    def start_s(self, ready_s: FloatArray) -> FloatArray:
        """Start of each rank's collective: when its last member is ready.

        Parameters
        ----------
        ready_s : (n_points, n_ranks)
            When each rank's stream is free and its dependencies have ended [s].

        Returns
        -------
        (n_points, n_ranks)
            Start [s]; meaningless where a rank takes no part.
        """
        if not self.meets:
            return ready_s
        if self.order is not None:
            ready_s = ready_s.take(self.order, axis=1)
        # reduceat beats a reshape and a maximum over one axis 2x at (20, 32), and takes any grouping
        return np.maximum.reduceat(ready_s, self.first, axis=1).take(self.group_of, axis=1)


def rendezvous_of(group: IntArray) -> Rendezvous:
    """Prepare one membership array; equal arrays are prepared once per process.

    Parameters
    ----------
    group : (n_ranks,)
        Collective of each rank, -1 = takes no part.
    """
    return _prepare(np.asarray(group, dtype=np.int64).tobytes())


@lru_cache(maxsize=1024)
def _prepare(group_bytes: bytes) -> Rendezvous:
    group = np.frombuffer(group_bytes, dtype=np.int64)
    takes_part = group >= 0
    order = np.argsort(group, kind="stable")[np.count_nonzero(~takes_part) :]
    _, first, inverse, sizes = np.unique(
        group[order], return_index=True, return_inverse=True, return_counts=True
    )
    group_of = np.zeros(group.size, dtype=np.int64)
    group_of[order] = inverse
    return Rendezvous(
        member=None if takes_part.all() else takes_part,
        meets=bool(np.any(sizes > 1)),
        order=None if np.array_equal(order, np.arange(group.size)) else order,
        first=first.astype(np.int64),
        group_of=group_of,
    )
