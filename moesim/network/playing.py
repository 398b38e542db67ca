"""Transfers over a topology, solved: when each flow ends, and what each link carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TrafficError
from moesim.network.fluid import FluidNetwork, solve_flows
from moesim.network.topology import Routes, Topology
from moesim.network.transfers import SWITCH, Transfers
from moesim.work.ops import FloatArray

__all__ = ["Played", "pair_bound_s", "play"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Played:
    """Transfers with their times."""

    transfers: Transfers
    topology: Topology
    routes: Routes
    bytes_per_s: FloatArray
    """[n_links] rates that flows had; 0 = dead [bytes/s]."""
    finish_s: FloatArray
    """[n_flows] when the last byte is there [s]."""

    @property
    def makespan_s(self) -> float:
        """When the last flow ends; 0 without flows [s]."""
        return float(self.finish_s.max(initial=0.0))

    @cached_property
    def link_bytes(self) -> FloatArray:
        """[n_links] what crosses each link [bytes]."""
        links = self.routes.links
        held = links >= 0
        sizes = np.broadcast_to(self.transfers.flow_bytes[:, None], links.shape)
        carried = np.bincount(links[held], sizes[held], self.bytes_per_s.size)
        return np.asarray(carried, dtype=np.float64)

    @property
    def link_s(self) -> FloatArray:
        """[n_links] time that each link needs alone; 0 where it carries nothing [s]."""
        busy = self.link_bytes > 0
        return np.divide(self.link_bytes, self.bytes_per_s, out=np.zeros_like(self.bytes_per_s), where=busy)

    @property
    def bound_s(self) -> float:
        """Lower bound: what the busiest link needs, and the least latency on it [s]."""
        links = self.routes.links
        least_s = np.full(self.bytes_per_s.size, np.inf)
        np.minimum.at(
            least_s, links[links >= 0], np.broadcast_to(self._begin_s[:, None], links.shape)[links >= 0]
        )
        return float(np.where(self.link_bytes > 0, self.link_s + least_s, 0.0).max(initial=0.0))

    @property
    def _begin_s(self) -> FloatArray:
        return np.asarray(self.routes.latency_s + self.transfers.start_s)

    def rank_s(self, n_ranks: int, flows: NDArray[np.bool_] | None = None) -> FloatArray:
        """(n_ranks,) when each rank has sent and received the last byte, of some of the flows or of all [s]."""
        done_s = np.zeros(n_ranks)
        for end in (self.transfers.source, self.transfers.target):
            mine = end >= 0 if flows is None else (end >= 0) & flows
            np.maximum.at(done_s, end[mine], self.finish_s[mine])
        return done_s


def play(
    transfers: Transfers,
    topology: Topology,
    *,
    factor: Mapping[str, float] | None = None,
    with_latency: bool = True,
    tolerance: float = 0.0,
) -> Played:
    """Solve transfers over the links of a cluster.

    Parameters
    ----------
    transfers
        Between GPUs of the cluster, numbered node by node.
    topology
        Links.
    factor
        By kind of link: share of its rate that a library reaches, or how many there are in place of one; 1 where
        it is left out.
    with_latency
        Whether each flow pays its route's latency.
    tolerance
        As in `moesim.network.solve_flows`; steps that follow one another are solved exactly.

    Raises
    ------
    TrafficError
        If a rank is not of the cluster, a pair has no way, a factor is not positive or of no kind of link, or flows
        through a switch find none.
    """
    routes = _routes(transfers, topology)
    if not with_latency:
        routes = Routes(routes.links, np.zeros_like(routes.latency_s))
    rates = topology.bytes_per_s * _factors(topology, factor or {})
    capacity = np.where(rates > 0, rates, 1.0)  # a dead link is on no route
    n_steps = len(np.unique(transfers.step))
    if n_steps <= 1:
        finish_s = solve_flows(
            capacity,
            routes.links,
            transfers.flow_bytes,
            routes.latency_s,
            transfers.start_s,
            tolerance=tolerance,
        )
    else:
        finish_s = _in_steps(transfers, routes, capacity)
    return Played(transfers, topology, routes, rates, finish_s)


def _factors(topology: Topology, factor: Mapping[str, float]) -> FloatArray:
    for kind, value in factor.items():
        if not 0 < value < np.inf:
            raise TrafficError(f"a factor on links of kind {kind} is positive", value=value)
    return np.array([factor.get(kind, 1.0) for kind in topology.kinds], dtype=np.float64)


def _routes(transfers: Transfers, topology: Topology) -> Routes:
    """Routes of all flows; one to or from a switch holds its rank's port alone."""
    half = (transfers.source == SWITCH) | (transfers.target == SWITCH)
    if not half.any():
        return topology.routes(transfers.source, transfers.target)
    whole = topology.routes(transfers.source[~half], transfers.target[~half])
    links = np.full((len(transfers), whole.links.shape[1]), -1)
    latency_s = np.zeros(len(transfers))
    links[~half], latency_s[~half] = whole.links, whole.latency_s
    number = {name: at for at, name in enumerate(topology.names)}
    for flow in np.flatnonzero(half):
        out = transfers.target[flow] == SWITCH
        rank = int(transfers.source[flow] if out else transfers.target[flow])
        name = f"gpu{rank}.nvlink.{'out' if out else 'in'}"
        if topology.bytes_per_s[number[name]] == 0 if name in number else True:
            raise TrafficError(
                "no switch adds or copies here", value=name, fix="use a ring, or a cluster with NVLink"
            )
        links[flow, 0] = number[name]
    return Routes(links, latency_s)


def _in_steps(transfers: Transfers, routes: Routes, capacity: FloatArray) -> FloatArray:
    """Finish times where a rank begins a step once all that it sends and receives in earlier ones is there."""
    n_ranks = int(max(transfers.source.max(), transfers.target.max())) + 1
    levels, level = np.unique(transfers.step, return_inverse=True)
    ends = np.stack([transfers.source, transfers.target], axis=1)
    left = np.zeros((n_ranks + 1, levels.size), dtype=np.int64)  # the last row is the switch's
    for end in ends.T:
        np.add.at(left, (end, level), 1)
    network = FluidNetwork(capacity)
    flow_of: list[int] = []
    started = np.zeros(len(transfers), dtype=bool)
    finish_s = np.zeros(len(transfers))
    now_s = 0.0
    while not started.all() or np.isfinite(network.next_s):
        at = np.where(left.any(axis=1), (left > 0).argmax(axis=1), levels.size)
        ready = np.flatnonzero(~started & (level <= at[transfers.source]))
        if ready.size:
            begin_s = np.maximum(now_s, transfers.start_s[ready]) + routes.latency_s[ready]
            network.add(routes.links[ready], transfers.flow_bytes[ready], begin_s)
            flow_of += ready.tolist()
            started[ready] = True
        numbers = network.advance(network.next_s)
        ended = np.asarray(flow_of, dtype=np.int64)[numbers]
        if ended.size:
            finish_s[ended] = network.finish_s(numbers)
            now_s = max(now_s, float(finish_s[ended].max()))
            for end in ends[ended].T:
                np.subtract.at(left, (end, level[ended]), 1)
    return finish_s


def pair_bound_s(
    pair_bytes: FloatArray,
    *,
    ranks_per_domain: int,
    near_bytes_per_s: float,
    far_bytes_per_s: float,
    neighbours_nics: bool = False,
) -> float:
    """What the busiest port needs for an all-to-all: a bound from below, for pruning [s].

    Parameters
    ----------
    pair_bytes : (n_ranks, n_ranks)
        ``[source, target]`` [bytes].
    ranks_per_domain
        Ranks of one NVLink domain.
    near_bytes_per_s, far_bytes_per_s
        Rate of one rank's port inside a domain and of its NIC, per direction [bytes/s].
    neighbours_nics
        Whether bytes leave a domain by the NIC on their target's rail (PXN), not by their sender's own.

    Raises
    ------
    TrafficError
        If the matrix is not square, holds NaN, or a rate that is needed is not positive.

    Notes
    -----
    Leaves out latency, every link behind the ports, and neighbours' NVLink on the way to another rail.
    """
    sizes = np.asarray(pair_bytes, dtype=np.float64)
    if sizes.ndim != 2 or sizes.shape[0] != sizes.shape[1]:
        raise TrafficError("traffic is a square matrix, [source, target]", value=sizes.shape)
    if not sizes.size:
        return 0.0
    near, far = _busiest_ports(sizes, ranks_per_domain, neighbours_nics)
    if not np.isfinite(near + far) or sizes.min() < 0:
        raise TrafficError("bytes between ranks must be finite and not negative", value=float(sizes.min()))
    if (near > 0 and not near_bytes_per_s > 0) or (far > 0 and not far_bytes_per_s > 0):
        raise TrafficError(
            "a port needs a positive rate [bytes/s]", value=(near_bytes_per_s, far_bytes_per_s)
        )
    return max(near / near_bytes_per_s if near > 0 else 0.0, far / far_bytes_per_s if far > 0 else 0.0)


def _busiest_ports(sizes: FloatArray, size: int, neighbours_nics: bool) -> tuple[float, float]:
    """Bytes of the busiest port inside a domain, and of the busiest NIC."""
    n = len(sizes)
    own, ones = sizes.diagonal(), np.ones(n)
    near_out, near_in = np.empty(n), np.empty(n)
    for first in range(0, n, size):
        block = sizes[first : first + size, first : first + size]
        near_out[first : first + size], near_in[first : first + size] = block.sum(axis=1), block.sum(axis=0)
    near = max(float((near_out - own).max()), float((near_in - own).max()))
    if n <= size:
        return near, 0.0
    far_in = ones @ sizes - near_in
    if not neighbours_nics:
        return near, max(float((sizes @ ones - near_out).max()), float(far_in.max()))
    far_out = 0.0
    for first in range(0, n, size):
        by_target = ones[first : first + size] @ sizes[first : first + size]
        by_target[first : first + size] = 0.0
        on_rail = np.append(by_target, np.zeros(-n % size)).reshape(-1, size).sum(axis=0)
        far_out = max(far_out, float(on_rail.max()))
    return near, max(far_out, float(far_in.max()))
