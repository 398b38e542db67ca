"""Exchanges and collectives priced on the links they share: a fluid solution in place of each rank's own ports.

Starts, work of SMs and protocol regimes are those of the fitted prices (`moesim.network.exchange`,
`moesim.network.collectives`). What they say of a link is the rate that a kernel reaches; here it holds for every
link of that kind, and flows of all ranks share them. docs/network.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import TrafficError
from moesim.hardware.cluster import Cluster, Fabric
from moesim.network.collectives import RING_CHUNK_BYTES, all_gather_s, all_reduce_s, reduce_scatter_s
from moesim.network.exchange import ExchangeTerms, exchange_terms, exchange_way
from moesim.network.params import NetworkParams
from moesim.network.playing import Played, play
from moesim.network.programs import collective_transfers
from moesim.network.topology import Topology
from moesim.network.traffic import checked_group
from moesim.network.transfers import exchange_transfers
from moesim.routing import ExchangeKind, Traffic, exchange_counts
from moesim.work.ops import Combine, Dispatch, Exchange, FloatArray

__all__ = ["CollectiveFluid", "ExchangeCall", "ExchangeFluid", "collective_fluid", "exchange_fluid"]

NEAR_KINDS, FAR_KINDS = ("nvlink",), ("nic", "rail", "pod")
Kind = Literal["low-latency", "normal", "nccl"]


@dataclass(frozen=True)
class ExchangeCall:
    """What a library is asked to exchange, apart from who sends what to whom."""

    kind: Kind
    combine: bool
    """The way back."""
    n_tokens: float
    """Tokens that each rank holds."""
    hidden: int
    top_k: int
    n_experts: int
    token_bytes: float
    """Bytes of one copy, scales included (`moesim.network.transfers.copy_bytes`)."""
    n_sms: int = 0
    """SMs that the kernel takes; 0 = the library's default."""

    def counted_as(self, cluster: Cluster, n_ranks: int, ranks_per_domain: int) -> ExchangeKind:
        """How its copies are counted: per (token, expert), per (token, rank), or over two levels."""
        way = exchange_way(
            self.kind, cluster=cluster, n_ranks=n_ranks, ranks_per_node_in_group=ranks_per_domain
        )
        if way == "one-sided":
            return "per_rank"
        if way != "deepep-normal":
            return "per_assignment"
        return "per_rank" if n_ranks % ranks_per_domain else "two_level"

    def operator(self, traffic: Traffic, cluster: Cluster, ranks_per_domain: int) -> Exchange:
        """The operator that the fitted prices take, (1, 1, n_ranks)."""
        n_ranks = traffic.copies_per_rank.shape[-1]
        counted = self.counted_as(cluster, n_ranks, ranks_per_domain)
        copies = exchange_counts(traffic, counted, ranks_per_domain=ranks_per_domain)
        out = [copies.sent_nvlink, copies.received_nvlink, copies.sent_nic, copies.received_nic]
        ways = [out[1], out[0], out[3], out[2]] if self.combine else out
        near_out, near_in, far_out, far_in = (way.reshape(1, 1, -1) for way in ways)
        kind: Kind = "normal" if counted == "per_rank" and self.kind == "low-latency" else self.kind
        return (Combine if self.combine else Dispatch)(
            np.full((1, 1, 1), float(self.n_tokens)), near_out, near_in, far_out, far_in,
            self.token_bytes,
            self.hidden, self.top_k, self.n_experts, kind, n_sms=self.n_sms,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ExchangeFluid:
    """An exchange with its links shared."""

    call: ExchangeCall
    traffic: Traffic
    topology: Topology
    """As the library routes over it."""
    params: NetworkParams
    ranks: NDArray[np.int64]
    """[n_ranks] GPU of each rank."""
    ports: ExchangeTerms
    """[n_ranks] by each rank's own ports alone."""
    terms: ExchangeTerms
    """[n_ranks] with links shared."""
    played: Played
    """Flows at the rates that the library reaches, without latency, which `terms` has."""
    rate_fraction: Mapping[str, float]
    """By kind of link: share of the datasheet rate that the library reaches."""

    @cached_property
    def rank_s(self) -> FloatArray:
        """[n_ranks] seconds of the exchange on each rank."""
        return np.asarray(self.terms.total_s())

    @property
    def total_s(self) -> float:
        """When the slowest rank is done [s]."""
        return float(self.rank_s.max(initial=0.0))

    @property
    def port_bound_s(self) -> float:
        """The same by ports alone: below it, unless GPUs share NICs or a neighbour's takes part (PXN) [s]."""
        return float(np.max(self.ports.total_s(), initial=0.0))

    def with_links(self, factor: Mapping[str, float]) -> ExchangeFluid:
        """The same exchange with links of some kinds that many times as fast."""
        return exchange_fluid(
            self.call,
            self.traffic,
            topology=self.topology,
            params=self.params,
            ranks=self.ranks,
            factor=factor,
        )


def exchange_fluid(
    call: ExchangeCall,
    traffic: Traffic,
    *,
    topology: Topology,
    params: NetworkParams,
    ranks: ArrayLike | None = None,
    factor: Mapping[str, float] | None = None,
    tolerance: float = 0.0,
) -> ExchangeFluid:
    """Time of one layer's dispatch or combine, rank by rank, with links shared max-min fairly.

    Parameters
    ----------
    call
        Library, sizes and format.
    traffic : (n_ranks, n_ranks)
        Copies of one layer, own rank included; `moesim.routing.count_batch`, or uniform.
    topology
        Links of the cluster.
    params
        What is known of the library.
    ranks : (n_ranks,), optional
        GPU of each rank of the group; the first ones where left out.
    factor
        By kind of link: how many times as fast it is.
    tolerance
        As in `moesim.network.solve_flows`.

    Returns
    -------
    ExchangeFluid
        Where no link but a rank's own ports binds, and traffic is uniform, the price of
        `moesim.network.dispatch_s` and `combine_s`.

    Raises
    ------
    TrafficError
        If the group does not fit the cluster, a pair has no way, or copies are negative or not finite.

    Notes
    -----
    A rank is done when all that it sends, receives or forwards is; that it waits for what others forward to it is
    left to the maximum over the group. Latency of routes is in the fitted starts.
    """
    cluster = topology.cluster
    gpus = _members(ranks, traffic.copies_per_rank.shape[-1], cluster)
    per_domain = _together(gpus, cluster)
    checked_group(gpus.size, per_domain, cluster)
    counted = call.counted_as(cluster, gpus.size, per_domain)
    straight = counted != "two_level" and call.kind != "nccl"
    wires = _written_straight(topology) if straight else topology
    op = call.operator(traffic, cluster, per_domain)
    bare = cluster.model_copy(update={"uplink_oversubscription": 1.0, "fabric": Fabric()})
    ports = _own_terms(op, bare, params, gpus.size, per_domain)
    reached = _rate_fractions(op, ports, bare)
    moved = exchange_transfers(
        traffic, counted, call.token_bytes, ranks_per_domain=per_domain, combine=call.combine
    )
    rates = {
        kind: reached.get(kind, 1.0) * (factor or {}).get(kind, 1.0) for kind in {*reached, *(factor or {})}
    }
    played = play(moved.on(gpus), wires, factor=rates, with_latency=False, tolerance=tolerance)
    terms = _shared_terms(op, ports, played, gpus, bare, params, factor or {})
    return ExchangeFluid(call, traffic, wires, params, gpus, ports, terms, played, reached)


def _members(ranks: ArrayLike | None, n_ranks: int, cluster: Cluster) -> NDArray[np.int64]:
    gpus = np.arange(n_ranks) if ranks is None else np.asarray(ranks, dtype=np.int64)
    if gpus.shape != (n_ranks,):
        raise TrafficError(f"a group of {n_ranks} ranks needs as many GPUs", value=gpus.size)
    if n_ranks > cluster.n_gpus:
        raise TrafficError(f"a group has 1 to {cluster.n_gpus} ranks on this cluster", value=n_ranks)
    return gpus


def _together(gpus: NDArray[np.int64], cluster: Cluster) -> int:
    """Ranks of the group that share a scale-up domain, or without NVLink a host."""
    return int(np.bincount(gpus // cluster.near_ranks).max())


def _written_straight(topology: Topology) -> Topology:
    """Kernels that write to the target's memory themselves take no neighbour's NVLink to another rail."""
    cluster = topology.cluster
    if cluster.fabric.network != "rail" or cluster.fabric.cross_rail != "pxn":
        return topology
    blocks = cluster.uplink_oversubscription > 1
    fabric = cluster.fabric.model_copy(update={"cross_rail": "spine" if blocks else "direct"})
    return Topology(cluster.model_copy(update={"fabric": fabric}))


def _own_terms(
    op: Exchange, cluster: Cluster, params: NetworkParams, n_ranks: int, per_domain: int
) -> ExchangeTerms:
    terms = exchange_terms(
        op, cluster=cluster, params=params, n_ranks=n_ranks, ranks_per_node_in_group=per_domain
    )
    parts = (terms.latency_s, terms.nvlink_s, terms.nic_s, terms.sm_s, terms.after_s)
    latency_s, nvlink_s, nic_s, sm_s, after_s = (
        np.broadcast_to(part, (1, 1, n_ranks)).reshape(-1).astype(np.float64) for part in parts
    )
    return ExchangeTerms(latency_s, nvlink_s, nic_s, sm_s, after_s, terms.sharpness)


def _loads(op: Exchange) -> tuple[FloatArray, FloatArray]:
    """[n_ranks] bytes of each rank's busier direction: inside its domain, and beyond."""
    near = np.maximum(op.sent_nvlink, op.received_nvlink) * op.token_bytes
    far = np.maximum(op.sent_nic, op.received_nic) * op.token_bytes
    return near.reshape(-1), far.reshape(-1)


def _rate_fractions(op: Exchange, ports: ExchangeTerms, cluster: Cluster) -> dict[str, float]:
    """Share of its datasheet rate that the library reaches on each kind of link."""
    near, far = _loads(op)
    gpu = cluster.gpu
    reached: dict[str, float] = {}
    if op.kind != "nccl" and near.max() > 0:
        own_rate = gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s
        kinds = NEAR_KINDS if gpu.nvlink_bytes_per_s else ("pcie", "host")
        at = int(near.argmax())
        reached |= dict.fromkeys(kinds, float(near[at] / own_rate / ports.nvlink_s[at]))
    if far.max() > 0 and cluster.nic_bytes_per_s > 0:
        at = int(far.argmax())
        reached |= dict.fromkeys(FAR_KINDS, float(far[at] / cluster.nic_bytes_per_s / ports.nic_s[at]))
    return reached


def _shared_terms(
    op: Exchange, ports: ExchangeTerms, played: Played, gpus: NDArray[np.int64], cluster: Cluster,
    params: NetworkParams, factor: Mapping[str, float],
) -> ExchangeTerms:  # fmt: skip
    n_gpus = cluster.n_gpus
    domain = [end // cluster.near_ranks for end in (played.transfers.source, played.transfers.target)]
    far = domain[0] != domain[1]
    near_s, far_s = (played.rank_s(n_gpus, flows)[gpus] for flows in (~far, far))
    if op.kind != "nccl":
        return replace(ports, nvlink_s=near_s, nic_s=far_s)
    return replace(ports, nvlink_s=_curve_s(op, ports, near_s, cluster, params, factor), nic_s=far_s)


def _curve_s(
    op: Exchange, ports: ExchangeTerms, near_s: FloatArray, cluster: Cluster, params: NetworkParams,
    factor: Mapping[str, float],
) -> FloatArray:  # fmt: skip
    """NCCL's curve over all that a rank's channels carry, stretched where links take longer for the near part."""
    times = factor.get("nvlink", 1.0)
    if times != 1.0:
        gpu = cluster.gpu.model_copy(update={"nvlink_bytes_per_s": times * cluster.gpu.nvlink_bytes_per_s})
        n_ranks = ports.nvlink_s.size
        domain = min(n_ranks, cluster.near_ranks)
        ports = _own_terms(op, cluster.model_copy(update={"gpu": gpu}), params, n_ranks, domain)
        cluster = cluster.model_copy(update={"gpu": gpu})
    carried = np.maximum(op.sent_nvlink + op.sent_nic, op.received_nvlink + op.received_nic) * op.token_bytes
    rate = cluster.gpu.nvlink_bytes_per_s or cluster.gpu.pcie_bytes_per_s
    alone_s = carried.reshape(-1) / rate
    stretch = np.divide(near_s, alone_s, out=np.ones_like(near_s), where=alone_s > 0)
    return np.asarray(ports.nvlink_s * np.maximum(stretch, 1.0))


@dataclass(frozen=True, eq=False)
class CollectiveFluid:
    """A collective with its links shared."""

    op: str
    payload_bytes: float
    algorithm: str | None
    topology: Topology
    params: NetworkParams
    ranks: NDArray[np.int64]
    port_bound_s: float
    """The fitted price, which knows ports and no fabric [s]."""
    start_s: float
    """What it costs without bytes [s]."""
    stretch: float
    """Time of the flows on these links, over that on links where nothing is shared."""
    played: Played

    @property
    def total_s(self) -> float:
        """Start, and the rest stretched [s]."""
        return self.start_s + (self.port_bound_s - self.start_s) * self.stretch

    def with_links(self, factor: Mapping[str, float]) -> CollectiveFluid:
        """The same with links of some kinds that many times as fast."""
        return collective_fluid(
            self.op, self.payload_bytes, topology=self.topology, params=self.params, ranks=self.ranks,
            algorithm=self.algorithm, factor=factor,
        )  # fmt: skip


_PRICES: Mapping[str, Callable[..., FloatArray]] = {
    "all_reduce": partial(all_reduce_s, backend="nccl"),
    "all_gather": all_gather_s,
    "reduce_scatter": reduce_scatter_s,
}


def collective_fluid(
    op: str,
    payload_bytes: float,
    *,
    topology: Topology,
    params: NetworkParams,
    ranks: ArrayLike,
    algorithm: str | None = None,
    factor: Mapping[str, float] | None = None,
) -> CollectiveFluid:
    """Time of an all-reduce, all-gather or reduce-scatter whose links are shared, slow or blocked.

    Parameters
    ----------
    op, payload_bytes, algorithm
        As `moesim.network.programs.collective_transfers`; the algorithm says which links are used.
    topology, params, factor
        As `exchange_fluid`.
    ranks : (n_ranks,)
        GPU of each rank of the group.

    Raises
    ------
    TrafficError
        If there is no such collective, or as `exchange_fluid`.

    Notes
    -----
    The fitted price, its bytes' part stretched by what the flows take on these links over what they take where
    switches block nothing; it is the fitted price there.
    """
    gpus = np.asarray(ranks, dtype=np.int64)
    cluster = topology.cluster
    if op not in _PRICES:
        raise TrafficError("is no collective with a price", value=op, fix=f"one of {', '.join(_PRICES)}")
    _members(gpus, gpus.size, cluster)
    per_domain = _together(gpus, cluster)
    bare = cluster.model_copy(update={"uplink_oversubscription": 1.0, "fabric": Fabric()})
    price = partial(
        _PRICES[op], n_ranks=gpus.size, ranks_per_node_in_group=per_domain, cluster=bare, params=params
    )
    least_bytes = float(RING_CHUNK_BYTES * gpus.size)  # with less a ring is empty in part, and starts sooner
    whole_s, start_s = float(price(payload_bytes)), float(price(min(payload_bytes, least_bytes)))
    flows = collective_transfers(
        op, payload_bytes, n_ranks=gpus.size, per_node=per_domain, algorithm=algorithm
    )
    flows = flows.on(gpus)
    played = play(flows, topology, factor=factor, with_latency=False)
    free_s = play(flows, Topology(bare), with_latency=False).makespan_s
    stretch = played.makespan_s / free_s if free_s > 0 else 1.0
    return CollectiveFluid(
        op, payload_bytes, algorithm, topology, params, gpus, whole_s, start_s, stretch, played
    )
