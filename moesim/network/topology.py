"""The cluster as a graph of directed links, and the routes of transfers over it.

Ranks are GPUs, numbered node by node. A link is one direction of a cable, a switch port or a bus; what a switch
does not block is not a link. Names, for rank 3 of node 0: ``gpu3.nvlink.out``, ``gpu3.pcie.in``,
``node0.pcie0.out`` (a switch), ``node0.socket1.in``, ``node0.nic3.out``, ``pod0.rail3.out``, ``pod0.in``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import TrafficError
from moesim.hardware.cluster import Cluster
from moesim.work.ops import FloatArray

__all__ = ["LINK_KINDS", "NEAR_LATENCY_S", "Routes", "Topology"]

IntArray = NDArray[np.int64]
NEAR_LATENCY_S = 1e-6
"""Assumed: one way over NVLink or PCIe inside a host, as in the reference cases of SimGrid [s]."""
LINK_KINDS = ("nvlink", "pcie", "host", "nic", "rail", "pod")
"""Scale-up port, GPU's bus, uplink of a PCIe switch or CPU socket, NIC, uplink behind the NICs, uplink of a pod."""
N_HOPS = 20
"""Most links that a route holds at once."""
ABSENT = -2
"""Number of a link that the cluster does not have: the route is not one."""


@dataclass(frozen=True, eq=False)
class Routes:
    """Links that transfers hold, and what each pays before its bytes flow."""

    links: IntArray
    """[n, n_hops] link numbers, -1 = none."""
    latency_s: FloatArray
    """[n] [s]."""


class Topology:
    """Links of a cluster.

    Parameters
    ----------
    cluster
        GPUs, nodes and wiring (`moesim.hardware.cluster.Fabric`).

    Raises
    ------
    TrafficError
        If a degraded link is not one of the cluster's.

    Notes
    -----
    Full duplex. A switch inside a node, and a network of oversubscription 1, block nothing and have no links.
    Leaves out adaptive routing and packet spraying beyond what makes a fabric non-blocking.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._wires = _Wires(cluster)
        self.bytes_per_s = np.array(self._wires.rates, dtype=np.float64)
        """[n_links] capacities [bytes/s]; 0 = dead."""
        for pattern, share in cluster.fabric.degraded.items():
            hit = [number for number, name in enumerate(self.names) if fnmatchcase(name, pattern)]
            if not hit:
                near = get_close_matches(pattern, self.names, n=1, cutoff=0.0)
                raise TrafficError(
                    "no link of this cluster has that name", value=pattern, fix=f"as {near[0]}"
                )
            self.bytes_per_s[hit] *= share

    @property
    def names(self) -> tuple[str, ...]:
        """[n_links] name of every link."""
        return tuple(self._wires.names)

    @property
    def kinds(self) -> tuple[str, ...]:
        """[n_links] class of every link, of those that are bought together: `LINK_KINDS`."""
        return tuple(self._wires.kinds)

    def routes(self, sources: ArrayLike, targets: ArrayLike) -> Routes:
        """Route of a transfer from each source to its target.

        Parameters
        ----------
        sources, targets : (n,)
            Ranks; a transfer to its own rank has no links and no latency.

        Raises
        ------
        TrafficError
            If a rank is not of the cluster, or dead links leave a pair without a way.
        """
        source, target = (self._checked(ranks) for ranks in (sources, targets))
        found = Routes(np.full((source.size, N_HOPS), -1), np.zeros(source.size))
        open_ = np.flatnonzero(source != target)
        for way in self._wires.ways():
            if not open_.size:
                break
            links, latency_s = way(source[open_], target[open_])
            leads = np.append(self.bytes_per_s > 0, True)[links].all(axis=1) & (links != ABSENT).all(axis=1)
            found.links[open_[leads], : links.shape[1]] = links[leads]
            found.latency_s[open_[leads]] = latency_s[leads]
            open_ = open_[~leads]
        if open_.size:
            raise TrafficError(
                f"no way from rank {source[open_[0]]} to rank {target[open_[0]]}: every route crosses a dead link, "
                "or there is no NIC",
                fix="mend a link of cluster.fabric.degraded, or give the cluster NICs",
            )
        used = (found.links >= 0).any(axis=0)
        return Routes(found.links[:, used] if used.any() else found.links[:, :1], found.latency_s)

    def _checked(self, ranks: ArrayLike) -> IntArray:
        ranks = np.atleast_1d(np.asarray(ranks, dtype=np.int64))
        outside = (ranks < 0) | (ranks >= self.cluster.n_gpus)
        if outside.any():
            raise TrafficError(
                f"ranks of this cluster are 0 to {self.cluster.n_gpus - 1}", value=int(ranks[outside][0])
            )
        return ranks


Way = tuple[IntArray, FloatArray]
"""[n, at most N_HOPS] links and [n] latencies of one kind of route; `ABSENT` where the cluster has no such link."""


class _Wires:
    """Numbers of a cluster's links by where they are, and the kinds of routes over them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.fabric = cluster, cluster.fabric
        self.names: list[str] = []
        self.kinds: list[str] = []
        self.rates: list[float] = []
        gpu, size = cluster.gpu, cluster.gpus_per_node
        nvlink, nic = gpu.nvlink_bytes_per_s, cluster.nic_bytes_per_s * self.fabric.gpus_per_nic
        meshed = self.fabric.scale_up == "mesh"
        n_switches = -(-size // (self.fabric.gpus_per_pcie_switch or size))
        self.n_rails = -(-size // self.fabric.gpus_per_nic)
        self.pod_size = self.fabric.nodes_per_pod or cluster.nodes
        n_pods = -(-cluster.nodes // self.pod_size)
        node_rate = cluster.nic_bytes_per_s * size
        add, ends = self._add, ("out", "in")
        self.nvlink = [
            add("nvlink", 0 if meshed else nvlink, f"gpu{{}}.nvlink.{end}", cluster.n_gpus) for end in ends
        ]
        peer_rate = nvlink / max(cluster.scale_up_ranks - 1, 1) if meshed else 0
        self.mesh = add("nvlink", peer_rate, "gpu{}.nvlink.to{}", cluster.n_gpus, cluster.scale_up_ranks)
        self.pcie = [add("pcie", gpu.pcie_bytes_per_s, f"gpu{{}}.pcie.{end}", cluster.n_gpus) for end in ends]
        host_rate = gpu.pcie_bytes_per_s if n_switches > 1 else 0
        self.host = [
            add("host", host_rate, f"node{{}}.pcie{{}}.{end}", cluster.nodes, n_switches) for end in ends
        ]
        n_sockets = -(-size // (self.fabric.gpus_per_socket or size))
        lanes = (self.fabric.gpus_per_socket or size) * gpu.pcie_bytes_per_s
        socket_rate = lanes / self.fabric.socket_oversubscription if n_sockets > 1 else 0
        self.socket = [
            add("host", socket_rate, f"node{{}}.socket{{}}.{end}", cluster.nodes, n_sockets) for end in ends
        ]
        self.nic = [add("nic", nic, f"node{{}}.nic{{}}.{end}", cluster.nodes, self.n_rails) for end in ends]
        blocks = cluster.uplink_oversubscription > 1 and self.fabric.network == "fat-tree"
        leaf_rate = node_rate / cluster.uplink_oversubscription if blocks else 0
        self.leaf = [add("rail", leaf_rate, f"node{{}}.leaf.{end}", cluster.nodes) for end in ends]
        crosses = self.fabric.network == "rail" and self.fabric.cross_rail == "spine"
        rail_rate = self.pod_size * nic / cluster.uplink_oversubscription if crosses else 0
        self.rail = [add("rail", rail_rate, f"pod{{}}.rail{{}}.{end}", n_pods, self.n_rails) for end in ends]
        pod_rate = self.pod_size * node_rate / self.fabric.pod_oversubscription if n_pods > 1 else 0
        self.pod = [add("pod", pod_rate, f"pod{{}}.{end}", n_pods) for end in ends]

    def _add(self, kind: str, bytes_per_s: float, name: str, *shape: int) -> IntArray:
        """Number one link for each position of `shape`; `ABSENT` where the rate is 0."""
        if bytes_per_s == 0:
            return np.full(shape, ABSENT, dtype=np.int64)
        numbers = np.arange(np.prod(shape), dtype=np.int64) + len(self.names)
        self.names += [name.format(*position) for position in np.ndindex(shape)]
        self.kinds += [kind] * numbers.size
        self.rates += [bytes_per_s] * numbers.size
        return numbers.reshape(shape)

    def ways(self) -> Iterator[Callable[[IntArray, IntArray], Way]]:
        """Kinds of routes in order of preference; each gives all pairs' links at once."""
        yield self._scale_up
        yield self._through_host
        if self.fabric.network == "rail" and self.fabric.cross_rail == "pxn":
            yield self._on_the_rail_of_the_target
        yield self._straight
        for local in range(self.cluster.gpus_per_node):
            yield partial(self._over_siblings, local)

    def _straight(self, source: IntArray, target: IntArray) -> Way:
        return self._over(source, source, target, target)

    def _over_siblings(self, local: int, source: IntArray, target: IntArray) -> Way:
        """Around dead NICs: over those of the neighbours at one position of both nodes."""
        return self._over(source, self._sibling(source, local), self._sibling(target, local), target)

    def _scale_up(self, source: IntArray, target: IntArray) -> Way:
        domain = self.cluster.scale_up_ranks
        together = source // domain == target // domain
        if self.fabric.scale_up == "mesh":
            hops = [self.mesh[source, target % domain]]
        else:
            hops = [self.nvlink[0][source], self.nvlink[1][target]]
        return _way([np.where(together, hop, ABSENT) for hop in hops], NEAR_LATENCY_S)

    def _through_host(self, source: IntArray, target: IntArray) -> Way:
        size = self.cluster.gpus_per_node
        together = source // size == target // size
        hops = [
            np.where(together, self.pcie[0][source], ABSENT),
            np.where(together, self.pcie[1][target], ABSENT),
        ]
        per_switch, per_socket = self.fabric.gpus_per_pcie_switch, self.fabric.gpus_per_socket
        for each, (out, back) in ((per_switch, self.host), (per_socket, self.socket)):
            if each:
                a, b = (rank % size // each for rank in (source, target))
                hops += [
                    np.where(a == b, -1, out[source // size, a]),
                    np.where(a == b, -1, back[target // size, b]),
                ]
        return _way(hops, NEAR_LATENCY_S)

    def _on_the_rail_of_the_target(self, source: IntArray, target: IntArray) -> Way:
        """PXN: over NVLink to the neighbour whose NIC is on the target's rail, then along the rail."""
        shared = self.fabric.gpus_per_nic
        local = self._local(target) // shared * shared + self._local(source) % shared
        return self._over(source, self._sibling(source, local), target, target)

    def _over(self, source: IntArray, out: IntArray, back: IntArray, target: IntArray) -> Way:
        """To GPU `out` of the source's node, over the network to GPU `back` of the target's, to the target."""
        size, shared = self.cluster.gpus_per_node, self.fabric.gpus_per_nic
        nodes = [out // size, back // size]
        rails = [rank % size // shared for rank in (out, back)]
        hops = [self.nic[0][nodes[0], rails[0]], self.nic[1][nodes[1], rails[1]]]
        hops = [np.where(nodes[0] == nodes[1], ABSENT, hop) for hop in hops]
        latency_s = np.full(source.size, self.cluster.nic_latency_s)
        for a, b in ((source, out), (back, target)):
            near = self._scale_up if self.cluster.scale_up_ranks > 1 else self._through_host
            links, near_s = near(a, b)
            hops += [
                np.where(a == b, -1, column) for column in links.T if (column >= -1).any() or (a != b).any()
            ]
            latency_s += np.where(a == b, 0.0, near_s)
        if self._buses_bind():
            hops += [self.pcie[0][out], self.pcie[1][back]]
        if self.fabric.network == "fat-tree" and self.leaf[0][0] != ABSENT:
            hops += [self.leaf[0][nodes[0]], self.leaf[1][nodes[1]]]
        pods = [node // self.pod_size for node in nodes]
        if self.fabric.network == "rail" and self.fabric.cross_rail == "spine":
            same = rails[0] == rails[1]
            hops += [np.where(same, -1, self.rail[end][pods[end], rails[end]]) for end in (0, 1)]
            latency_s += np.where(same, 0.0, NEAR_LATENCY_S)
        hops += [np.where(pods[0] == pods[1], -1, self.pod[end][pods[end]]) for end in (0, 1)]
        return _way(hops, latency_s)

    def _buses_bind(self) -> bool:
        """Whether a GPU's own bus can be slower than the NIC behind it, or carries its neighbours' bytes too."""
        nic = self.cluster.nic_bytes_per_s * self.fabric.gpus_per_nic
        return self.cluster.scale_up_ranks == 1 or nic > self.cluster.gpu.pcie_bytes_per_s

    def _local(self, rank: IntArray) -> IntArray:
        return rank % self.cluster.gpus_per_node

    def _sibling(self, rank: IntArray, local: IntArray | int) -> IntArray:
        """GPU of the same node at a local position."""
        size = self.cluster.gpus_per_node
        return np.asarray(rank // size * size + np.minimum(local, size - 1))


def _way(hops: Sequence[IntArray], latency_s: FloatArray | float) -> Way:
    """Columns packed to the left."""
    columns = np.stack(np.broadcast_arrays(*hops), axis=1)
    links = np.take_along_axis(columns, np.argsort(columns == -1, axis=1, kind="stable"), axis=1)
    return links, np.broadcast_to(np.asarray(latency_s, dtype=np.float64), len(columns))
