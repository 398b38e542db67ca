"""Token exchanges of a pass as flows on the links of its cluster, for the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from moesim.engine import Flows, Network
from moesim.hardware.cluster import Cluster
from moesim.network import NetworkParams, Topology
from moesim.network.exchange import ExchangeTerms
from moesim.network.shared_links import ExchangeCall, ExchangeFluid, exchange_fluid
from moesim.network.transfers import evened
from moesim.plan.loads import TrafficMaker, scaled_traffic
from moesim.routing import Traffic
from moesim.work.case import Case
from moesim.work.ops import Combine, Exchange, FloatArray

__all__ = ["LinkedExchanges", "one_layer"]

IntArray = NDArray[np.int64]

MOST_FLOWS = 2_000_000 if find_spec("numba") else 4_000
"""Flows of a step above which exchanges keep their price per port: 4 to 11 s of CPU."""
EXACT_FLOWS = 150_000 if find_spec("numba") else 4_000
"""Flows of a step up to which links are solved exactly; beyond, to `TOLERANCE`."""
TOLERANCE = 1e-2


def _beside_s(terms: ExchangeTerms, alone_s: FloatArray) -> FloatArray:
    """[n_ranks] what a library does while the bytes of its slower level flow, as its smooth maximum has it [s]."""
    moving_s = terms.total_s() - terms.latency_s - terms.after_s
    share = np.divide(alone_s, moving_s, out=np.ones_like(alone_s), where=moving_s > 0)
    return np.asarray(moving_s * np.maximum(1.0 - share**terms.sharpness, 0.0) ** (1.0 / terms.sharpness))


def _overlap(first: int, size: int, other_first: int, other_size: int) -> int:
    """Ranks in both of two runs."""
    return max(min(first + size, other_first + other_size) - max(first, other_first), 0)


def one_layer(traffic: Traffic, row: int, share: float = 1.0) -> Traffic:
    """One layer's copies, scaled."""
    parts = (traffic.copies_per_rank, traffic.copies_per_node, traffic.assignments)
    return scaled_traffic(Traffic(*(one[row] for one in parts)), share)


@dataclass(frozen=True, eq=False)
class LinkedExchanges:
    """Exchanges of one pass: what prices them, and who sends to whom."""

    case: Case
    maker: TrafficMaker
    params: NetworkParams
    phase: str
    replica_tokens: FloatArray
    """(n_points,) tokens of one attention replica in one exchange."""
    max_flows: float = float("inf")
    """Flows above which none are played, where that is fewer than `MOST_FLOWS`."""

    @property
    def n_flows(self) -> int:
        """Most flows of one micro-batch's dispatches and combines, over all layers and simulated groups."""
        layout, per_domain = self.case.layout, self.ranks_per_domain
        peers = layout.ep - 1
        if self.case.dispatch == "normal" and layout.ep % per_domain == 0:  # over two levels
            peers = layout.ep // per_domain - 1 + per_domain - 1
        return 2 * len(self.case.model.moe_layers) * peers * layout.group_ranks

    @property
    def on_links(self) -> bool:
        """Whether a step's exchanges are few enough to be played as flows, and are exchanges."""
        exchanged = self.case.dispatch in ("low-latency", "normal", "nccl") and self.case.layout.ep > 1
        return exchanged and self.n_flows <= min(MOST_FLOWS, self.max_flows)

    @property
    def ranks_per_domain(self) -> int:
        """Ranks of an expert group that share a scale-up domain."""
        layout = self.case.layout
        return min(max(1, self.case.cluster.near_ranks // layout.etp), layout.ep)

    @property
    def sets_differ(self) -> bool:
        """Whether some of the stage's sets of ranks have other links than the first."""
        fabric = self.case.cluster.fabric
        return self.case.layout.n_groups > 1 and (bool(fabric.degraded) or fabric.nodes_per_pod is not None)

    @cached_property
    def topology(self) -> Topology:
        """Links of the cluster."""
        return Topology(self.case.cluster)

    def at(self, point: int, first_gpu: int) -> StageExchanges:
        """Those of one size, in the pipeline stage whose first rank is GPU `first_gpu`."""
        copies = self.maker.copies(self.case, self.phase, float(self.replica_tokens[point]))
        return StageExchanges(self, point, first_gpu, copies)


@dataclass(eq=False)
class StageExchanges:
    """Exchanges of one size on the GPUs of one pipeline stage.

    A flow's bytes are those that its library would move at one rate for all its calls: where dispatch and combine
    reach different shares of a link's rate, links have those of the call met first, and the other's flows grow by
    the ratio, for the kind of link that binds them (NICs and what is behind where a flow leaves its domain, the
    scale-up link or the host's buses where it stays).
    """

    of: LinkedExchanges
    point: int
    first_gpu: int
    copies: Traffic
    """(n_layers, ep, ep)"""
    _told: dict[tuple[int, bool, float], tuple[FloatArray, Flows]] = field(default_factory=dict)
    _reached: dict[str, float] = field(default_factory=dict)
    _wires: Topology | None = None
    """As the library routes, with what these ranks have of it."""

    @property
    def tolerance(self) -> float:
        """As in `moesim.network.solve_flows`."""
        return 0.0 if self.of.n_flows <= EXACT_FLOWS else TOLERANCE

    def flows(self, op: Exchange, layer: int, repeat: int, group: IntArray) -> tuple[FloatArray, Flows]:
        """(n_ranks,) time with the links shared inside each group [s], and the flows of all groups.

        Micro-batches in turn hold the same tokens, as they are priced: what was told of a layer is told again.
        """
        key = (layer, isinstance(op, Combine), op.token_bytes)
        if key not in self._told:
            self._told[key] = self._solved(op, self._of_layer(layer), group)
        return self._told[key]

    def network(self) -> Network:
        """Links at the rates that the library reaches."""
        wires = self._wires or self.of.topology
        rates = wires.bytes_per_s * np.array([self._reached.get(kind, 1.0) for kind in wires.kinds])
        return Network(np.where(rates > 0, rates, 1.0), self.tolerance)  # a dead link is on no route

    def even_s(self, op: Exchange, layer: int, group: IntArray) -> float:
        """Time of an exchange whose copies are spread evenly: what these GPUs' links make of it [s]."""
        traffic = evened(self._of_layer(layer), ranks_per_domain=self.of.ranks_per_domain)
        return float(self._solved(op, traffic, group)[0].max())

    def _solved(self, op: Exchange, traffic: Traffic, group: IntArray) -> tuple[FloatArray, Flows]:
        call = self._call(op)
        rank_s, alone_s, beside_s = (np.zeros(group.size) for _ in range(3))
        sharpness = 1.0
        parts: list[tuple[IntArray, IntArray, IntArray, FloatArray]] = []
        for one in np.unique(group):
            members = np.flatnonzero(group == one)
            fluid = self._fluid(call, traffic, members + self.first_gpu)
            rank_s[members], sharpness = fluid.rank_s, fluid.terms.sharpness
            alone_s[members] = fluid.played.rank_s(self.of.case.cluster.n_gpus)[members + self.first_gpu]
            beside_s[members] = _beside_s(fluid.terms, alone_s[members])
            moved = fluid.played.transfers
            own = (moved.source - self.first_gpu, moved.target - self.first_gpu)
            parts.append((*own, fluid.played.routes.links, self._bytes(fluid)))
        width = max(links.shape[1] for _, _, links, _ in parts)
        links = [
            np.pad(one, ((0, 0), (0, width - one.shape[1])), constant_values=-1) for _, _, one, _ in parts
        ]
        n_bytes = np.concatenate([one[3] for one in parts])
        source, target = (np.concatenate([one[end] for one in parts]) for end in (0, 1))
        # the latency of routes is in the time that the library takes beside its bytes
        none_s = np.zeros(n_bytes.size)
        routes = np.concatenate(links)
        return rank_s, Flows(source, target, routes, n_bytes, none_s, alone_s, beside_s, sharpness)

    def _fluid(self, call: ExchangeCall, traffic: Traffic, gpus: IntArray) -> ExchangeFluid:
        def solved(topology: Topology) -> ExchangeFluid:
            return exchange_fluid(
                call, traffic, topology=topology, params=self.of.params, ranks=gpus, tolerance=self.tolerance
            )

        if self._wires is None:  # the first solution says over which links the library goes
            self._wires = self._shared(solved(self.of.topology).topology.cluster)
        return solved(self._wires)

    def _shared(self, cluster: Cluster) -> Topology:
        """Links of a cluster, of those behind the NICs what the simulated ranks have.

        The layout's other ranks run the same at the same time, so each has as much of a link as the next.
        """
        wires, layout = Topology(cluster), self.of.case.layout
        per_pod = (cluster.fabric.nodes_per_pod or cluster.nodes) * cluster.gpus_per_node
        for link in [at for at, kind in enumerate(wires.kinds) if kind in ("rail", "pod")]:
            where = wires.names[link].split(".")[0]
            size = per_pod if where.startswith("pod") else cluster.gpus_per_node
            first = int(where.removeprefix("pod").removeprefix("node")) * size
            own = _overlap(first, size, self.first_gpu, layout.group_ranks)
            wires.bytes_per_s[link] *= own / max(_overlap(first, size, 0, layout.n_ranks), 1) if own else 1.0
        return wires

    def _bytes(self, fluid: ExchangeFluid) -> FloatArray:
        """[n_flows] bytes on links whose rates are those of the first call."""
        for kind, fraction in fluid.rate_fraction.items():
            self._reached.setdefault(kind, fraction)
        moved, cluster = fluid.played.transfers, self.of.case.cluster
        near_kind = "nvlink" if cluster.gpu.nvlink_bytes_per_s else "pcie"
        near, far = (self._reached.get(k, 1.0) / fluid.rate_fraction.get(k, 1.0) for k in (near_kind, "nic"))
        leaves = moved.source // cluster.near_ranks != moved.target // cluster.near_ranks
        return np.asarray(moved.flow_bytes * np.where(leaves, far, near))

    def _call(self, op: Exchange) -> ExchangeCall:
        n_tokens = np.broadcast_to(op.n_tokens, (len(self.of.replica_tokens), 1, 1))[self.point, 0, 0]
        sizes = (op.hidden, op.top_k, op.n_experts, op.token_bytes, op.n_sms)
        return ExchangeCall(op.kind, isinstance(op, Combine), float(n_tokens), *sizes)

    def _of_layer(self, layer: int) -> Traffic:
        """One shard's copies of a layer."""
        row = self.of.case.model.moe_layers.index(layer)
        return one_layer(self.copies, row, 1.0 / self.of.case.layout.etp)
