"""Concurrent transfers over shared links: fluid, max-min fair, exact or within a tolerance.

A flow's rate is bounded by its most contended link; no flow can go faster without slowing one that is no faster
(Bertsekas and Gallager, *Data Networks*, 1992, section 6.5.2). The model is that of flow-level network simulators
(SimGrid: Casanova et al., JPDC 2014). docs/adr/0009 says why it is solved here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import TrafficError
from moesim.network.traffic import checked_bytes
from moesim.work.ops import FloatArray

__all__ = ["FluidNetwork", "max_min_rates", "solve_flows"]

IntArray = NDArray[np.int64]

CLOSE = 1e-12
"""Relative difference under which two shares, or two instants, are one."""


def solve_flows(
    link_bytes_per_s: ArrayLike,
    routes: ArrayLike,
    flow_bytes: ArrayLike,
    flow_latency_s: ArrayLike,
    flow_start_s: ArrayLike | None = None,
    *,
    tolerance: float = 0.0,
) -> FloatArray:
    """Finish time of every flow when links are shared max-min fairly.

    Parameters
    ----------
    link_bytes_per_s : (n_links,)
        Capacities; a full-duplex link is two [bytes/s].
    routes : (n_flows, n_hops), integers
        Links that each flow holds all at once, in any order; -1 = none. A flow without links is only late.
    flow_bytes : (n_flows,)
        [bytes].
    flow_latency_s : (n_flows,)
        Paid once, before the bytes flow [s].
    flow_start_s : (n_flows,), optional
        When each flow is started; all at 0 by default [s].
    tolerance
        0 = exact. Otherwise ends within this share of the time since the latest flow began are one event, so
        that a finish time may be off by about it (relative, and half of it for the makespan in practice).

    Returns
    -------
    FloatArray
        (n_flows,) finish times [s].

    Raises
    ------
    TrafficError
        If a capacity is not positive, a route names an absent link, a time or size is negative or not finite,
        or the tolerance is not in [0, 1).

    Notes
    -----
    Leaves out transport protocols, packets, and buffers. Compiled where numba is installed
    (``pip install 'moesim[fast]'``), NumPy otherwise, with the same result.
    """
    start_s = (
        np.zeros(np.shape(flow_bytes)) if flow_start_s is None else checked_bytes(flow_start_s, "starts [s]")
    )
    begin_s = start_s + checked_bytes(flow_latency_s, "latencies [s]")
    network = FluidNetwork(link_bytes_per_s, tolerance=tolerance)
    flows = network.add(routes, flow_bytes, begin_s)
    network.advance()
    return network.finish_s(flows)


class FluidNetwork:
    """Links in use: flows are added as they come, time moves on from event to event.

    Parameters
    ----------
    link_bytes_per_s, tolerance
        As in `solve_flows`.

    Raises
    ------
    TrafficError
        As `solve_flows`.
    """

    def __init__(self, link_bytes_per_s: ArrayLike, *, tolerance: float = 0.0) -> None:
        if not 0.0 <= tolerance < 1.0:
            raise TrafficError(
                "a tolerance is a share of elapsed time, from 0 to less than 1", value=tolerance
            )
        self._capacity = _checked_links(link_bytes_per_s)
        self._quantum = tolerance / 2  # what a group's flows leave unused is lost to both its ends
        self._solver: _Solver = _solver_type()(self._capacity)
        self._numbers = np.zeros(0, dtype=np.int64)
        self._finish_s = np.zeros(0)
        self.n_events = 0
        """Events played so far."""

    def add(self, routes: ArrayLike, flow_bytes: ArrayLike, begin_s: ArrayLike) -> IntArray:
        """Add flows; returns their numbers, which count on from the last flow added.

        Parameters
        ----------
        routes, flow_bytes
            As in `solve_flows`.
        begin_s : (n_flows,)
            When bytes begin to flow, not before what has been played [s].

        Raises
        ------
        TrafficError
            As `solve_flows`, or if a flow begins in what has been played.
        """
        sizes = checked_bytes(flow_bytes, "flow bytes")
        starts_s = checked_bytes(begin_s, "begins [s]")
        hops = _checked_routes(routes, sizes.size, self._capacity.size)
        if starts_s.shape != sizes.shape:
            raise TrafficError(f"{sizes.size} flows need as many begins", value=starts_s.shape)
        if sizes.size and starts_s.min() < self._solver.now_s:
            raise TrafficError(
                f"time has been played up to {self._solver.now_s:.9g} s", value=float(starts_s.min())
            )
        numbers = np.arange(self._finish_s.size, self._finish_s.size + sizes.size)
        moves = (sizes > 0) & (hops >= 0).any(axis=1)
        self._finish_s = np.concatenate([self._finish_s, np.where(moves, np.nan, starts_s)])
        kept, old = self._solver.survivors()
        width = max(hops.shape[1], old.routes.shape[1])
        self._numbers = np.concatenate([self._numbers[kept], numbers[moves]])
        self._solver.load(
            _Transfers(
                np.concatenate([_widened(old.routes, width), _widened(hops[moves], width)]),
                np.concatenate([old.left_bytes, sizes[moves]]),
                np.concatenate([old.begin_s, starts_s[moves]]),
            )
        )
        return numbers

    @property
    def now_s(self) -> float:
        """Instant of the last event played [s]."""
        return self._solver.now_s

    @property
    def next_s(self) -> float:
        """When `advance` next has something to tell; inf where nothing is in flight or to come [s]."""
        return self._solver.next_s(self._quantum)

    def advance(self, until_s: float = float("inf")) -> IntArray:
        """Play every event up to `until_s`; returns the numbers of the flows that ended."""
        ended, finish_s, n_events = self._solver.play(until_s, self._quantum)
        numbers = self._numbers[ended]
        self._finish_s[numbers] = finish_s
        self.n_events += n_events
        return numbers

    def ahead(self) -> tuple[IntArray, FloatArray]:
        """Flows that have not ended, and when each will if nothing is added [s]; nothing is played."""
        kept, left = self._solver.survivors()
        future: _Solver = _solver_type()(self._capacity)
        future.load(left)
        ended, finish_s, _ = future.play(float("inf"), self._quantum)
        return self._numbers[kept[ended]], finish_s

    def rates(self, numbers: IntArray) -> FloatArray:
        """Rates of flows at the last event played, 0 where one is not in flight [bytes/s]."""
        rates = np.zeros(self._finish_s.size)
        rates[self._numbers] = self._solver.rates()
        return rates[numbers]

    def finish_s(self, numbers: IntArray) -> FloatArray:
        """Finish times of flows, NaN where one has not ended [s]."""
        return self._finish_s[numbers]


def max_min_rates(link_bytes_per_s: FloatArray, routes: IntArray) -> FloatArray:
    """Max-min fair rates of flows that are all in flight.

    Parameters
    ----------
    link_bytes_per_s : (n_links,)
        [bytes/s].
    routes : (n_flows, n_hops)
        Links of each flow, -1 = none; at least one each.

    Returns
    -------
    FloatArray
        (n_flows,) rates [bytes/s].

    Notes
    -----
    Progressive filling with every locally least link at once: a link saturates when none of its flows crosses
    a link of smaller share.
    """
    n_links = link_bytes_per_s.size
    rates = np.zeros(len(routes))
    left = np.append(link_bytes_per_s, np.inf)  # -1 reads the last entry: an endless link
    hops = np.where(routes < 0, n_links, routes)
    active = np.arange(len(routes))
    while active.size:
        here = hops[active]
        counts = np.bincount(here.ravel(), minlength=n_links + 1)
        share = np.maximum(left, 0.0) / np.maximum(counts, 1)
        lowest = share[here].min(axis=1)
        # a link that carries a flow with a smaller share elsewhere has to wait for it
        held_back = np.zeros(n_links + 1, dtype=bool)
        above = share[here] > lowest[:, None] * (1 + CLOSE)
        held_back[here[above]] = True
        fixed = (~held_back[here] & ~above).any(axis=1)
        rates[active[fixed]] = lowest[fixed]
        np.subtract.at(left, here[fixed].ravel(), np.repeat(lowest[fixed], here.shape[1]))
        active = active[~fixed]
    return rates


@dataclass(frozen=True, eq=False)
class _Transfers:
    """Flows that have not ended."""

    routes: IntArray
    left_bytes: FloatArray
    begin_s: FloatArray


class _Solver(Protocol):
    """Flows between two additions."""

    @property
    def now_s(self) -> float: ...

    def load(self, transfers: _Transfers) -> None: ...

    def survivors(self) -> tuple[IntArray, _Transfers]: ...

    def rates(self) -> FloatArray: ...

    def next_s(self, quantum: float) -> float: ...

    def play(self, until_s: float, quantum: float) -> tuple[IntArray, FloatArray, int]: ...


class _NumpySolver:
    """All rates again at every event."""

    def __init__(self, capacity: FloatArray) -> None:
        self.now_s = self._origin_s = 0.0
        self._capacity = capacity
        self.load(_Transfers(np.zeros((0, 1), dtype=np.int64), np.zeros(0), np.zeros(0)))

    def load(self, transfers: _Transfers) -> None:
        self._routes, self._begin_s = transfers.routes, transfers.begin_s
        self._left_bytes = transfers.left_bytes.copy()
        self._over = np.zeros(self._begin_s.size, dtype=bool)
        self._begun = np.zeros(self._begin_s.size, dtype=bool)
        self._rates = np.zeros(self._begin_s.size)

    def survivors(self) -> tuple[IntArray, _Transfers]:
        kept = np.flatnonzero(~self._over)
        begin_s = np.maximum(self._begin_s[kept], np.where(self._begun[kept], self.now_s, 0.0))
        return kept, _Transfers(self._routes[kept], self._left_bytes[kept], begin_s)

    def rates(self) -> FloatArray:
        return self._rates

    def _due_s(self) -> FloatArray:
        flying = self._begun & ~self._over
        due_s = np.full(flying.size, np.inf)
        due_s[flying] = self.now_s + np.maximum(self._left_bytes[flying], 0.0) / self._rates[flying]
        return due_s

    def _first_s(self, due_s: FloatArray) -> float:
        waiting_s = self._begin_s[~self._begun]
        return float(max(due_s.min(initial=np.inf).clip(max=waiting_s.min(initial=np.inf)), self.now_s))

    def next_s(self, quantum: float) -> float:
        return _group_end_s(self._first_s(self._due_s()), self._origin_s, quantum)

    def play(self, until_s: float, quantum: float) -> tuple[IntArray, FloatArray, int]:
        finish_s = np.full(self._over.size, np.nan)
        n_events = 0
        while True:
            due_s = self._due_s()
            first_s = self._first_s(due_s)
            if first_s > until_s or first_s == np.inf:
                ended = np.flatnonzero(~np.isnan(finish_s))
                return ended, finish_s[ended], n_events
            span_s = max(quantum * (first_s - self._origin_s), CLOSE * 1e-3 * first_s)
            ends = due_s <= min(first_s + span_s, max(until_s, first_s))
            now_s = float(max(first_s, due_s[ends].max(initial=0.0)))
            self._left_bytes -= self._rates * (now_s - self.now_s)
            self.now_s = now_s
            finish_s[ends] = due_s[ends]
            self._over |= ends
            begins = ~self._begun & (self._begin_s <= now_s)
            if begins.any():
                self._begun |= begins
                self._origin_s = now_s
            flying = np.flatnonzero(self._begun & ~self._over)
            self._rates[:] = 0.0
            self._rates[flying] = max_min_rates(self._capacity, self._routes[flying])
            n_events += 1


class _CompiledSolver:
    """Only the rates that an event can change: `moesim.network._fluid_compiled`.

    Flows that meet at the same crowded link lie side by side in it, since they are filled together; `_of` has where
    each stood when they were loaded.
    """

    def __init__(self, capacity: FloatArray) -> None:
        self._clock = np.zeros(2)
        self._capacity = capacity
        self.load(_Transfers(np.zeros((0, 1), dtype=np.int64), np.zeros(0), np.zeros(0)))

    @property
    def now_s(self) -> float:
        return float(self._clock[0])

    def load(self, transfers: _Transfers) -> None:
        core = _compiled()
        n_flows, n_links = transfers.begin_s.size, self._capacity.size
        on_links = np.bincount(transfers.routes[transfers.routes >= 0], minlength=n_links)
        n_places = int(on_links.sum())
        share = np.append(self._capacity / np.maximum(on_links, 1), np.inf)
        crowded = share[transfers.routes].argmin(axis=1)
        self._of = np.argsort(transfers.routes[np.arange(n_flows), crowded], kind="stable")
        routes = transfers.routes[self._of]
        begin_s = transfers.begin_s[self._of]
        self._links = core.Links(
            first=np.concatenate([[0], np.cumsum(on_links)]).astype(np.uint32),
            members=np.zeros(n_places, dtype=np.uint32),
            hops=np.zeros(n_places, dtype=np.int8),
            capacity=self._capacity,
            n_members=np.zeros(n_links, dtype=np.uint32),
            load=np.zeros((n_links, 2)),
            key=np.zeros(n_links + 1),
            item=np.zeros(n_links + 1, dtype=np.uint32),
        )
        self._flows = core.Flows(
            routes=np.sort(np.where(routes < 0, n_links, routes).astype(np.uint32), axis=1),
            place=np.zeros(routes.shape, dtype=np.uint32),
            begin_s=begin_s,
            order=np.argsort(begin_s, kind="stable").astype(np.uint32),
            work=np.stack([transfers.left_bytes[self._of], np.full(n_flows, np.inf)], axis=1),
            state=np.full(n_flows, core.PENDING, dtype=np.int8),
            finish_s=np.full(n_flows, np.nan),
        )
        self._levels = core.Levels(
            share=np.zeros(n_links + 1),
            since_s=np.zeros(n_links + 1),
            first=np.zeros(n_links + 2, dtype=np.uint32),
            earliest_s=np.full(n_links + 1, np.inf),
            flows=np.zeros(n_flows + 1, dtype=np.uint32),
        )
        self._counts = np.zeros(2, dtype=np.int64)
        self._told = np.zeros(n_flows, dtype=bool)

    def _now(self) -> tuple[FloatArray, FloatArray]:
        """(n_flows,) rates, 0 where a flow is not in flight, and bytes left."""
        flows, levels, n_levels = self._flows, self._levels, int(self._counts[1])
        first = levels.first[: n_levels + 1].astype(np.int64)
        held = levels.flows[: first[-1]]
        flying = flows.state[held] == _compiled().FIXED
        level = np.repeat(np.arange(n_levels), np.diff(first))[flying]
        rates, left_bytes = np.zeros(flows.begin_s.size), flows.work[:, 0].copy()
        rates[held[flying]] = levels.share[level]
        left_bytes[held[flying]] -= levels.share[level] * (self.now_s - levels.since_s[level])
        return rates, left_bytes

    def survivors(self) -> tuple[IntArray, _Transfers]:
        flows, core = self._flows, _compiled()
        kept = np.flatnonzero(flows.state != core.ENDED)
        begin_s = np.where(flows.state[kept] == core.PENDING, flows.begin_s[kept], self.now_s)
        routes = flows.routes[kept].astype(np.int64)
        routes[routes == self._capacity.size] = -1
        return self._of[kept], _Transfers(routes, self._now()[1][kept], begin_s)

    def rates(self) -> FloatArray:
        rates = np.zeros(self._of.size)
        rates[self._of] = self._now()[0]
        return rates

    def next_s(self, quantum: float) -> float:
        flows, (n_begun, n_levels) = self._flows, self._counts
        begin_s = flows.begin_s[flows.order[n_begun]] if n_begun < flows.order.size else np.inf
        due_s = self._levels.earliest_s[:n_levels].min(initial=np.inf)
        return _group_end_s(max(min(due_s, begin_s), self.now_s), float(self._clock[1]), quantum)

    def play(self, until_s: float, quantum: float) -> tuple[IntArray, FloatArray, int]:
        n_events = _compiled().run(
            self._links, self._flows, self._levels, self._clock, self._counts, until_s, quantum
        )
        ended = np.flatnonzero(~np.isnan(self._flows.finish_s) & ~self._told)
        self._told[ended] = True
        return self._of[ended], self._flows.finish_s[ended], n_events


def _group_end_s(first_s: float, origin_s: float, quantum: float) -> float:
    """When the event that begins at `first_s` is over."""
    return first_s + quantum * max(first_s - origin_s, 0.0) if first_s < np.inf else float(first_s)


@cache
def _compiled() -> ModuleType:
    from moesim.network import _fluid_compiled

    return _fluid_compiled


@cache
def _solver_type() -> Callable[[FloatArray], _Solver]:
    """Compiled where numba is installed."""
    if find_spec("numba"):
        return _CompiledSolver
    return _NumpySolver


def _checked_links(link_bytes_per_s: ArrayLike) -> FloatArray:
    capacity = np.atleast_1d(np.asarray(link_bytes_per_s, dtype=np.float64))
    bad = np.flatnonzero(~(np.isfinite(capacity) & (capacity > 0)))
    if bad.size:
        raise TrafficError(
            f"link {bad[0]} needs a positive, finite capacity [bytes/s]", value=float(capacity[bad[0]])
        )
    return capacity


def _checked_routes(routes: ArrayLike, n_flows: int, n_links: int) -> IntArray:
    hops = np.asarray(routes)
    if hops.size and not np.issubdtype(hops.dtype, np.integer):
        raise TrafficError("routes are link numbers: integers", value=str(hops.dtype))
    if hops.ndim != 2 or len(hops) != n_flows:
        raise TrafficError(f"{n_flows} flows need routes of shape ({n_flows}, n_hops)", value=hops.shape)
    absent = (hops < -1) | (hops >= n_links)
    if absent.any():
        flow = int(np.argwhere(absent)[0, 0])
        raise TrafficError(
            f"flow {flow} goes over a link that is not there: links are 0 to {n_links - 1}, -1 = none",
            value=int(hops[absent][0]),
        )
    return hops.astype(np.int64)


def _widened(routes: IntArray, width: int) -> IntArray:
    return np.pad(routes, ((0, 0), (0, width - routes.shape[1])), constant_values=-1)
