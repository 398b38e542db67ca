"""From stamps of single ranks to the time of a collective: common clock, latest start, latest end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calibrate.collectives.world import World

__all__ = ["CommonClock", "Stamps", "collective_times_s", "exchange_stamps"]

FloatArray = NDArray[np.float64]

RESYNC_S = 5.0
"""Age of the offsets from which they are estimated anew: quartz clocks drift by some 20 us in a second."""
_ROUNDS = 5
"""Round trips behind one offset; the quickest counts."""


@dataclass(frozen=True)
class Stamps:
    """Samples of one point, by the ranks that took part, on each rank's own clock."""

    start_s: FloatArray
    """[n_ranks, n_samples] before the call."""
    end_s: FloatArray
    """[n_ranks, n_samples] after it."""
    device_s: FloatArray
    """[n_ranks, n_samples] time of one call on the device's own clock; NaN where the host's counts."""


def collective_times_s(stamps: Stamps, offset_s: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Time of each sample and how far apart the ranks started.

    Parameters
    ----------
    stamps
        Of the ranks of one group.
    offset_s : (n_ranks,)
        What each rank's clock shows more than the first's [s].

    Returns
    -------
    time_s, skew_s : (n_samples,)
        On the device's clock: the slowest rank's time. On the host's: from the last rank's start to the last rank's
        end, so that waiting for a late rank is in the skew and not in the time; a simulator adds waiting itself.

    Notes
    -----
    Whatever the error of the offsets, the host's time lies between what the last rank to start spent in the call and
    the longest that any rank spent there.
    """
    start = stamps.start_s - offset_s[:, None]
    end = stamps.end_s - offset_s[:, None]
    skew = start.max(0) - start.min(0)
    if not np.isnan(stamps.device_s).any():
        return stamps.device_s.max(0), skew
    own = stamps.end_s - stamps.start_s
    latest = np.take_along_axis(own, start.argmax(0)[None], axis=0)[0]
    return np.clip(end.max(0) - start.max(0), latest, own.max(0)), skew


@dataclass
class CommonClock:
    """Offsets of all ranks' clocks to rank 0's, with their drift."""

    estimates: list[tuple[float, FloatArray]] = field(default_factory=list)
    """(time of rank 0's clock [s], (n_ranks,) offsets [s]), in order."""

    def is_due(self, now_s: float) -> bool:
        """Whether the offsets are too old."""
        return not self.estimates or now_s - self.estimates[-1][0] > RESYNC_S

    def add(self, now_s: float, offset_s: FloatArray) -> None:
        """Take a new estimate."""
        self.estimates.append((now_s, offset_s))

    def offsets_s(self, now_s: float) -> FloatArray:
        """(n_ranks,) offsets at a time: the last estimate, moved on by the drift since the one before."""
        last_s, last = self.estimates[-1]
        if len(self.estimates) < 2:
            return last
        first_s, first = self.estimates[-2]
        return np.asarray(last + (last - first) / (last_s - first_s) * (now_s - last_s))


def exchange_stamps(world: World, clock: Callable[[], float]) -> FloatArray:
    """Estimate every clock's offset to rank 0's from round trips, halved; all ranks call this together.

    Parameters
    ----------
    world
        The ranks.
    clock
        Gives this rank's time [s].

    Returns
    -------
    (n_ranks,)
        Offsets on rank 0, zeros elsewhere [s].
    """
    offsets, dist = np.zeros(world.me.n_ranks), world.dist
    cell = world.torch.zeros(1, dtype=world.torch.float64)
    if world.me.rank != 0:
        for _ in range(_ROUNDS):
            dist.recv(cell, src=0)
            cell[0] = clock()
            dist.send(cell, dst=0)
        return offsets
    for other in range(1, world.me.n_ranks):
        trips = []
        for _ in range(_ROUNDS):
            sent_s = clock()
            dist.send(cell, dst=other)
            dist.recv(cell, src=other)
            back_s = clock()
            trips.append((back_s - sent_s, float(cell[0]) - 0.5 * (sent_s + back_s)))
        offsets[other] = min(trips)[1]
    return offsets
