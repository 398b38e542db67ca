"""The fluid solver's inner loop, compiled: max-min fair rates kept up to date from event to event.

Between two events every flow moves at a constant rate. Rates are those of progressive filling: the link with the
least share saturates first, its flows are fixed at that share, and so on up: *levels* in ascending order, each a
link and the flows that it bounds. When flows end or begin, levels below the lowest rate concerned keep every
flow and every rate, so only those above are filled again; their flows' bytes are brought up to date then, and
only then.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["ENDED", "PENDING", "Flows", "Levels", "Links", "run"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

FIXED, UNFIXED, ENDED, PENDING = 0, 1, 2, 3
"""State of a flow: has a rate; is being filled; is over; has not begun."""
CLOSE = 1e-12
"""Relative difference under which two levels are one; a thousandth of it for two instants."""


class Links(NamedTuple):
    """The links; arrays of n_links but for the first three."""

    first: IntArray
    """[n_links + 1] where each link's flows stand in `members`."""
    members: IntArray
    """Flows on each link, those in flight first."""
    hops: NDArray[np.int8]
    """Which hop of the member the link is."""
    capacity: FloatArray
    """[bytes/s]."""
    n_members: IntArray
    """Flows in flight on it."""
    used: FloatArray
    """Sum of its fixed flows' rates [bytes/s]."""
    n_unfixed: IntArray
    """Its flows that are being filled."""
    key: FloatArray
    """Heap of shares."""
    item: IntArray
    """Links of the heap."""


class Flows(NamedTuple):
    """The flows; arrays of n_flows."""

    routes: IntArray
    """[n_flows, n_hops] links, -1 = none."""
    place: IntArray
    """[n_flows, n_hops] where the flow stands in `Links.members`."""
    begin_s: FloatArray
    order: IntArray
    """Flows by `begin_s`."""
    left_bytes: FloatArray
    """Bytes left at `since_s`."""
    since_s: FloatArray
    rate: FloatArray
    """[bytes/s]."""
    due_s: FloatArray
    """End, if no rate changes."""
    state: NDArray[np.int8]
    finish_s: FloatArray


class Levels(NamedTuple):
    """Saturated links in ascending order of their share; arrays of n_links + 1."""

    share: FloatArray
    """Rate of the flows that the link bounds [bytes/s]."""
    first: IntArray
    """Where those flows begin in `flows`; the next level's entry ends them."""
    earliest_s: FloatArray
    """When the first of them ends."""
    flows: IntArray
    """[n_flows] fixed flows, level after level; an ended one stays until its level is filled again."""


@njit(cache=True)  # type: ignore[untyped-decorator,unused-ignore]
def _sift(key: FloatArray, item: IntArray, size: int, at: int) -> None:
    """Restore a binary min-heap below `at`."""
    while True:
        child = 2 * at + 1
        if child >= size:
            return
        if child + 1 < size and key[child + 1] < key[child]:
            child += 1
        if key[at] <= key[child]:
            return
        key[at], key[child] = key[child], key[at]
        item[at], item[child] = item[child], item[at]
        at = child


@njit(cache=True)  # type: ignore[untyped-decorator,unused-ignore]
def _end(
    links: Links, flows: Flows, levels: Levels, n_levels: int, horizon_s: float, now_s: float
) -> tuple[float, float]:
    """End every flow due by `horizon_s`; returns the lowest of their rates and the last end."""
    lowest = np.inf
    for level in range(n_levels):
        if levels.earliest_s[level] > horizon_s:
            continue
        lowest = min(lowest, levels.share[level])
        for at in range(levels.first[level], levels.first[level + 1]):
            flow = levels.flows[at]
            if flows.state[flow] == FIXED and flows.due_s[flow] <= horizon_s:
                flows.finish_s[flow] = flows.due_s[flow]
                now_s = max(now_s, flows.due_s[flow])
                _leave(links, flows, flow)
    return lowest, now_s


@njit(cache=True)  # type: ignore[untyped-decorator,unused-ignore]
def _leave(links: Links, flows: Flows, flow: int) -> None:
    """Take a flow off its links; the last member of each takes its place."""
    flows.state[flow] = ENDED
    for hop in range(flows.routes.shape[1]):
        link = flows.routes[flow, hop]
        if link < 0:
            continue
        here = flows.place[flow, hop]
        last = links.first[link] + links.n_members[link] - 1
        other, its_hop = links.members[last], links.hops[last]
        links.members[here], links.hops[here] = other, its_hop
        flows.place[other, its_hop] = here
        links.n_members[link] -= 1
        # no rounding is left behind
        links.used[link] = links.used[link] - flows.rate[flow] if links.n_members[link] else 0.0


@njit(cache=True)  # type: ignore[untyped-decorator,unused-ignore]
def _join(links: Links, flows: Flows, flow: int) -> float:
    """Put a flow on its links; returns a rate that it is sure to get."""
    lowest = np.inf
    flows.state[flow] = UNFIXED
    for hop in range(flows.routes.shape[1]):
        link = flows.routes[flow, hop]
        if link < 0:
            continue
        here = links.first[link] + links.n_members[link]
        links.members[here], links.hops[here] = flow, hop
        flows.place[flow, hop] = here
        links.n_members[link] += 1
        links.n_unfixed[link] += 1
        lowest = min(lowest, links.capacity[link] / links.n_members[link])
    return lowest


@njit(cache=True)  # type: ignore[untyped-decorator,unused-ignore]
def _release(links: Links, flows: Flows, levels: Levels, n_levels: int, lowest: float, now_s: float) -> int:
    """Unfix the flows of every level from `lowest` up; returns how many levels stay."""
    kept = int(np.searchsorted(levels.share[:n_levels], lowest * (1.0 - CLOSE)))
    if kept < n_levels:
        for at in range(levels.first[kept], levels.first[n_levels]):
            flow = levels.flows[at]
            if flows.state[flow] != FIXED:
                continue
            rate = flows.rate[flow]
            flows.left_bytes[flow] -= rate * (now_s - flows.since_s[flow])
            flows.state[flow] = UNFIXED
            for hop in range(flows.routes.shape[1]):
                link = flows.routes[flow, hop]
                if link >= 0:
                    links.used[link] -= rate
                    links.n_unfixed[link] += 1
    return kept


@njit(cache=True)  # type: ignore[untyped-decorator,unused-ignore]
def _fill(links: Links, flows: Flows, levels: Levels, n_levels: int, now_s: float) -> int:
    """Fill the unfixed flows up, least share first; returns how many levels there are then."""
    size = 0
    for link in range(links.capacity.size):
        if links.n_unfixed[link]:
            links.key[size] = max(links.capacity[link] - links.used[link], 0.0) / links.n_unfixed[link]
            links.item[size] = link
            size += 1
    for at in range(size // 2 - 1, -1, -1):
        _sift(links.key, links.item, size, at)
    while size > 0:
        link = links.item[0]
        share = links.key[0]
        unfixed = links.n_unfixed[link]
        if unfixed:
            # fixing lower flows only raises the shares of others: a key that is out of date is too low
            fresh = max(links.capacity[link] - links.used[link], 0.0) / unfixed
            if fresh > share:
                links.key[0] = fresh
                _sift(links.key, links.item, size, 0)
                continue
        size -= 1
        links.key[0], links.item[0] = links.key[size], links.item[size]
        _sift(links.key, links.item, size, 0)
        if unfixed:
            _fix(links, flows, levels, n_levels, link, share, now_s)
            n_levels += 1
    return n_levels


@njit(cache=True)  # type: ignore[untyped-decorator,unused-ignore]
def _fix(
    links: Links, flows: Flows, levels: Levels, level: int, link: int, share: float, now_s: float
) -> None:
    """Saturate a link: its unfixed flows get `share` and make a new level."""
    if level:
        share = max(share, levels.share[level - 1])  # rounding must not put levels out of order
    end = levels.first[level]
    earliest_s = np.inf
    at = links.first[link]
    while links.n_unfixed[link]:
        flow = links.members[at]
        at += 1
        if flows.state[flow] != UNFIXED:
            continue
        flows.state[flow] = FIXED
        flows.rate[flow] = share
        flows.since_s[flow] = now_s
        flows.due_s[flow] = now_s + max(flows.left_bytes[flow], 0.0) / share
        earliest_s = min(earliest_s, flows.due_s[flow])
        levels.flows[end] = flow
        end += 1
        for hop in range(flows.routes.shape[1]):
            other = flows.routes[flow, hop]
            if other >= 0:
                links.used[other] += share
                links.n_unfixed[other] -= 1
    levels.share[level] = share
    levels.earliest_s[level] = earliest_s
    levels.first[level + 1] = end


@njit(cache=True)  # type: ignore[untyped-decorator,unused-ignore]
def run(
    links: Links,
    flows: Flows,
    levels: Levels,
    clock: FloatArray,
    counts: IntArray,
    until_s: float,
    quantum: float,
) -> int:
    """Play events up to `until_s`; returns how many.

    `clock` is [now, latest begin]: ends within ``quantum * (now - latest begin)`` of the first are one event.
    `counts` is [flows begun so far in `Flows.order`, levels].
    """
    n_flows = flows.begin_s.size
    n_events = 0
    while True:
        begun, n_levels = counts
        due_s = np.inf
        for level in range(n_levels):
            due_s = min(due_s, levels.earliest_s[level])
        begin_s = flows.begin_s[flows.order[begun]] if begun < n_flows else np.inf
        first_s = max(min(due_s, begin_s), clock[0])
        if first_s > until_s or first_s == np.inf:
            return n_events
        span_s = max(quantum * (first_s - clock[1]), CLOSE * 1e-3 * abs(first_s))
        horizon_s = min(first_s + span_s, max(until_s, first_s))
        lowest, now_s = _end(links, flows, levels, n_levels, horizon_s, first_s)
        while begun < n_flows and flows.begin_s[flows.order[begun]] <= now_s:
            lowest = min(lowest, _join(links, flows, flows.order[begun]))
            begun += 1
            clock[1] = now_s
        clock[0] = now_s
        counts[0] = begun
        kept = _release(links, flows, levels, n_levels, lowest, now_s)
        counts[1] = _fill(links, flows, levels, kept, now_s)
        n_events += 1
