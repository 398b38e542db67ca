"""The fluid solver's inner loop, compiled: max-min fair rates kept up to date from event to event.

Between two events every flow moves at a constant rate. Rates are those of progressive filling: the link with the
least share saturates first, its flows are fixed at that share, and so on up: *levels* in ascending order, each a
link and the flows that it bounds. When flows end or begin, levels below the lowest rate concerned keep every
flow and every rate, so only those above are filled again; their flows' bytes are brought up to date then, and
only then.

Nearly all of the time goes to touching flows above that level, so what a flow has of its own is little and lies
together: its links, its bytes and its end. Its rate is its level's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["ENDED", "PENDING", "Flows", "Levels", "Links", "run"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.uint32]
"""Without sign: an index that cannot be negative is one comparison less."""

FIXED, UNFIXED, ENDED, PENDING = 0, 1, 2, 3
"""State of a flow: has a rate; is being filled; is over; has not begun."""
CLOSE = 1e-12
"""Relative difference under which two levels are one; a thousandth of it for two instants."""
USED, N_UNFIXED = 0, 1
"""Columns of `Links.load`."""
LEFT_BYTES, DUE_S = 0, 1
"""Columns of `Flows.work`."""


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
    load: FloatArray
    """[n_links, 2] sum of its fixed flows' rates [bytes/s], and how many of its flows are being filled."""
    key: FloatArray
    """Heap of shares."""
    item: IntArray
    """Links of the heap."""


class Flows(NamedTuple):
    """The flows; arrays of n_flows."""

    routes: IntArray
    """[n_flows, n_hops] links; n_links = none, after all others."""
    place: IntArray
    """[n_flows, n_hops] where the flow stands in `Links.members`."""
    begin_s: FloatArray
    order: IntArray
    """Flows by `begin_s`."""
    work: FloatArray
    """[n_flows, 2] bytes left when its level was filled, and its end if no rate changes [s]."""
    state: NDArray[np.int8]
    finish_s: FloatArray


class Levels(NamedTuple):
    """Saturated links in ascending order of their share; arrays of n_links + 1."""

    share: FloatArray
    """Rate of the flows that the link bounds [bytes/s]."""
    since_s: FloatArray
    """When it was filled."""
    first: IntArray
    """Where those flows begin in `flows`; the next level's entry ends them."""
    earliest_s: FloatArray
    """When the first of them ends."""
    flows: IntArray
    """[n_flows + 1] fixed flows, level after level; an ended one stays until its level is filled again."""


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator,unused-ignore]
def _sift(key: FloatArray, item: IntArray, size: int, at: int) -> None:
    """Restore a binary min-heap below `at`."""
    moved_key, moved_item = key[at], item[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and key[child + 1] < key[child]:
            child += 1
        if moved_key <= key[child]:
            break
        key[at], item[at] = key[child], item[child]
        at = child
    key[at], item[at] = moved_key, moved_item


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator,unused-ignore]
def _end(
    links: Links, flows: Flows, levels: Levels, n_levels: int, horizon_s: float, now_s: float
) -> tuple[float, float]:
    """End every flow due by `horizon_s`; returns the lowest of their rates and the last end."""
    lowest = np.inf
    for level in range(n_levels):
        if levels.earliest_s[level] > horizon_s:
            continue
        share = levels.share[level]
        lowest = min(lowest, share)
        for at in range(levels.first[level], levels.first[level + 1]):
            flow = levels.flows[at]
            due_s = flows.work[flow, DUE_S]
            if flows.state[flow] == FIXED and due_s <= horizon_s:
                flows.finish_s[flow] = due_s
                now_s = max(now_s, due_s)
                _leave(links, flows, flow, share)
    return lowest, now_s


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator,unused-ignore]
def _leave(links: Links, flows: Flows, flow: int, rate: float) -> None:
    """Take a flow off its links; the last member of each takes its place."""
    flows.state[flow] = ENDED
    for hop in range(flows.routes.shape[1]):
        link = flows.routes[flow, hop]
        if link == links.capacity.size:
            break
        here = flows.place[flow, hop]
        last = links.first[link] + links.n_members[link] - 1
        other, its_hop = links.members[last], links.hops[last]
        links.members[here], links.hops[here] = other, its_hop
        flows.place[other, its_hop] = here
        links.n_members[link] -= 1
        # no rounding is left behind
        links.load[link, USED] = links.load[link, USED] - rate if links.n_members[link] else 0.0


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator,unused-ignore]
def _join(links: Links, flows: Flows, flow: int) -> float:
    """Put a flow on its links; returns a rate that it is sure to get."""
    lowest = np.inf
    flows.state[flow] = UNFIXED
    for hop in range(flows.routes.shape[1]):
        link = flows.routes[flow, hop]
        if link == links.capacity.size:
            break
        here = links.first[link] + links.n_members[link]
        links.members[here], links.hops[here] = flow, hop
        flows.place[flow, hop] = here
        links.n_members[link] += 1
        links.load[link, N_UNFIXED] += 1.0
        lowest = min(lowest, links.capacity[link] / links.n_members[link])
    return lowest


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator,unused-ignore]
def _release(links: Links, flows: Flows, levels: Levels, kept: int, n_levels: int, now_s: float) -> int:
    """Unfix the flows of every level from `kept` up; returns how many they are."""
    n_released = 0
    for level in range(kept, n_levels):
        share = levels.share[level]
        moved = share * (now_s - levels.since_s[level])
        for at in range(levels.first[level], levels.first[level + 1]):
            flow = levels.flows[at]
            if flows.state[flow] != FIXED:
                continue
            flows.work[flow, LEFT_BYTES] -= moved
            flows.state[flow] = UNFIXED
            n_released += 1
            for hop in range(flows.routes.shape[1]):
                link = flows.routes[flow, hop]
                if link == links.capacity.size:
                    break
                links.load[link, USED] -= share
                links.load[link, N_UNFIXED] += 1.0
    return n_released


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator,unused-ignore]
def _fill(links: Links, flows: Flows, levels: Levels, n_levels: int, n_unfixed: int, now_s: float) -> int:
    """Fill the unfixed flows up, least share first; returns how many levels there are then."""
    size = 0
    for link in range(links.capacity.size):
        waiting = links.load[link, N_UNFIXED]
        if waiting > 0.0:
            links.key[size] = max(links.capacity[link] - links.load[link, USED], 0.0) / waiting
            links.item[size] = link
            size += 1
    for at in range(size // 2 - 1, -1, -1):
        _sift(links.key, links.item, size, at)
    while n_unfixed > 0:
        link = links.item[0]
        share = links.key[0]
        waiting = links.load[link, N_UNFIXED]
        if waiting > 0.0:
            # fixing lower flows only raises the shares of others: a key that is out of date is too low
            fresh = max(links.capacity[link] - links.load[link, USED], 0.0) / waiting
            if fresh > share:
                links.key[0] = fresh
                _sift(links.key, links.item, size, 0)
                continue
        size -= 1
        links.key[0], links.item[0] = links.key[size], links.item[size]
        _sift(links.key, links.item, size, 0)
        if waiting > 0.0:
            n_unfixed -= _fix(links, flows, levels, n_levels, link, share, now_s)
            n_levels += 1
    return n_levels


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator,unused-ignore]
def _fix(
    links: Links, flows: Flows, levels: Levels, level: int, link: int, share: float, now_s: float
) -> int:
    """Saturate a link: its unfixed flows get `share` and make a new level; returns how many they are."""
    if level:
        share = max(share, levels.share[level - 1])  # rounding must not put levels out of order
    first = end = int(levels.first[level])
    at = int(links.first[link])
    stop = at + int(links.n_members[link])
    waiting = int(links.load[link, N_UNFIXED])
    while waiting > 0 and at < stop:  # without a branch on the state, which cannot be foretold
        flow = links.members[at]
        at += 1
        levels.flows[end] = flow
        unfixed = int(flows.state[flow] == UNFIXED)
        flows.state[flow] = FIXED
        end += unfixed
        waiting -= unfixed
    earliest_s = np.inf
    s_per_byte = 1.0 / share
    for place in range(first, end):
        flow = levels.flows[place]
        due_s = now_s + max(flows.work[flow, LEFT_BYTES], 0.0) * s_per_byte
        flows.work[flow, DUE_S] = due_s
        earliest_s = min(earliest_s, due_s)
        for hop in range(flows.routes.shape[1]):
            other = flows.routes[flow, hop]
            if other == links.capacity.size:
                break
            links.load[other, USED] += share
            links.load[other, N_UNFIXED] -= 1.0
    levels.share[level], levels.since_s[level] = share, now_s
    levels.earliest_s[level] = earliest_s
    levels.first[level + 1] = end
    return end - first


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator,unused-ignore]
def run(
    links: Links,
    flows: Flows,
    levels: Levels,
    clock: FloatArray,
    counts: NDArray[np.int64],
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
        n_before = begun
        while begun < n_flows and flows.begin_s[flows.order[begun]] <= now_s:
            lowest = min(lowest, _join(links, flows, flows.order[begun]))
            begun += 1
            clock[1] = now_s
        clock[0] = now_s
        counts[0] = begun
        kept = int(np.searchsorted(levels.share[:n_levels], lowest * (1.0 - CLOSE)))
        n_unfixed = begun - n_before + _release(links, flows, levels, kept, n_levels, now_s)
        counts[1] = _fill(links, flows, levels, kept, n_unfixed, now_s)
        n_events += 1
