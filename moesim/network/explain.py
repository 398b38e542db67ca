"""What bounds a collective, and what faster links would buy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moesim.network.exchange import exchange_way
from moesim.network.playing import Played
from moesim.network.shared_links import CollectiveFluid, ExchangeFluid
from moesim.network.topology import LINK_KINDS

__all__ = ["Busiest", "Explanation", "busiest_links", "critical_link", "explain"]


@dataclass(frozen=True)
class Busiest:
    """The busiest link of a kind."""

    name: str
    kind: str
    load_bytes: float
    """What crosses it [bytes]."""
    alone_s: float
    """Time that it needs for that at the rate that the library reaches [s]."""
    utilisation: float
    """`alone_s` over the time of the flows, 1 = never idle."""


@dataclass(frozen=True)
class Explanation:
    """What a collective's time is made of."""

    total_s: float
    """Time of the slowest rank, links shared [s]."""
    port_bound_s: float
    """The same by each rank's own ports [s]."""
    bound: str
    """What takes longest on the slowest rank: a kind of link, ``sm`` or ``latency``."""
    link: Busiest | None
    """Busiest link on the way of the flow that ends last; None without flows."""
    by_kind: Mapping[str, Busiest]
    """Busiest link of each kind in use, the one nearest to binding first."""
    parts_s: Mapping[str, float]
    """On the slowest rank: ``nvlink``, ``nic`` and ``sm`` at the same time, after ``latency`` and before ``after``."""
    doubled_s: Mapping[str, float]
    """By kind of link: the time if each of them had twice its rate [s]."""
    n_sms: int
    """SMs that the kernel keeps from compute while it runs."""
    beside_s: float
    """The same while compute runs on the same GPUs all the time, memory not short [s]."""
    compute_stretch: float
    """Time of that compute, over that alone on as many SMs as are left."""

    @property
    def gap(self) -> float:
        """What the port bound leaves out: time with links shared over it, minus 1."""
        return self.total_s / self.port_bound_s - 1 if self.port_bound_s > 0 else 0.0

    @property
    def margin(self) -> float | None:
        """How much longer the bounding link is busy than the busiest of another kind, as a ratio; None if alone."""
        if self.link is None:
            return None
        others = [
            one.alone_s for kind, one in self.by_kind.items() if kind != self.link.kind and one.alone_s > 0
        ]
        return self.link.alone_s / max(others) if others else None

    def gain(self, kind: str) -> float:
        """Share of the time that twice the rate on a kind of link takes away."""
        return 1 - self.doubled_s[kind] / self.total_s if self.total_s > 0 else 0.0


def busiest_links(played: Played) -> dict[str, Busiest]:
    """The busiest link of each kind that carries something, the busiest kind first."""
    kinds = np.array(played.topology.kinds)
    found = []
    for kind in LINK_KINDS:
        here = np.flatnonzero((kinds == kind) & (played.link_bytes > 0))
        if here.size:
            found.append(_busy(played, int(here[played.link_s[here].argmax()])))
    return {one.kind: one for one in sorted(found, key=lambda one: -one.alone_s)}


def critical_link(played: Played) -> Busiest | None:
    """Busiest link on the way of the flow that ends last; None where nothing flows."""
    if not len(played.transfers):
        return None
    last = played.routes.links[int(played.finish_s.argmax())]
    on_way = last[last >= 0]
    return _busy(played, int(on_way[played.link_s[on_way].argmax()])) if on_way.size else None


def _busy(played: Played, link: int) -> Busiest:
    alone_s = float(played.link_s[link])
    whole_s = played.makespan_s
    return Busiest(
        played.topology.names[link], played.topology.kinds[link], float(played.link_bytes[link]), alone_s,
        alone_s / whole_s if whole_s > 0 else 0.0,
    )  # fmt: skip


def explain(fluid: ExchangeFluid | CollectiveFluid) -> Explanation:
    """Tell what bounds a collective, and solve it again with each kind of link twice as fast.

    Notes
    -----
    A doubled NIC comes with the bus lanes that it needs. Under max-min sharing a faster link can make a collective
    slower by a percent or so: a gain may be slightly negative.
    """
    by_kind = busiest_links(fluid.played)
    parts = _parts(fluid)
    doubled = {kind: fluid.with_links({kind: 2.0}).total_s for kind in by_kind}
    link = critical_link(fluid.played)
    n_sms = _sms_taken(fluid)
    stretches = (fluid.params.exchange_stretch, fluid.params.compute_stretch) if n_sms else (1.0, 1.0)
    return Explanation(
        fluid.total_s, fluid.port_bound_s, _bound(parts, link, fluid), link, by_kind, parts, doubled,
        n_sms, fluid.total_s * stretches[0], stretches[1],
    )  # fmt: skip


def _sms_taken(fluid: ExchangeFluid | CollectiveFluid) -> int:
    if isinstance(fluid, CollectiveFluid):
        return fluid.params.sms_taken("nccl")
    way = exchange_way(
        fluid.call.kind, cluster=fluid.topology.cluster, n_ranks=fluid.ranks.size,
        ranks_per_node_in_group=min(fluid.ranks.size, fluid.topology.cluster.near_ranks),
    )  # fmt: skip
    return fluid.call.n_sms or fluid.params.sms_taken(way)


def _parts(fluid: ExchangeFluid | CollectiveFluid) -> dict[str, float]:
    if isinstance(fluid, CollectiveFluid):
        return {"latency": fluid.start_s, "link": fluid.total_s - fluid.start_s}
    at, terms = int(fluid.rank_s.argmax()), fluid.terms
    parts = {"latency": terms.latency_s, "nvlink": terms.nvlink_s, "nic": terms.nic_s, "sm": terms.sm_s,
             "after": terms.after_s}  # fmt: skip
    return {name: float(values[at]) for name, values in parts.items()}


def _bound(parts: Mapping[str, float], link: Busiest | None, fluid: ExchangeFluid | CollectiveFluid) -> str:
    """Kind of link where links take longest on the slowest rank, else what does."""
    links_s = max(parts.get(name, 0.0) for name in ("nvlink", "nic", "link"))
    fixed_s = parts["latency"] + parts.get("after", 0.0)
    if max(fixed_s, parts.get("sm", 0.0)) > links_s or link is None:
        return "sm" if parts.get("sm", 0.0) > fixed_s else "latency"
    if isinstance(fluid, CollectiveFluid):
        return link.kind
    near = parts["nvlink"] >= parts["nic"]
    return _kind_of(fluid, near) or link.kind


def _kind_of(fluid: ExchangeFluid, near: bool) -> str | None:
    """Kind of the busiest link among flows inside a domain, or among those that leave it, at the slowest rank."""
    played, rank = fluid.played, int(fluid.ranks[int(fluid.rank_s.argmax())])
    size = fluid.topology.cluster.near_ranks
    source, target = played.transfers.source, played.transfers.target
    mine = ((source == rank) | (target == rank)) & ((source // size == target // size) == near)
    if not mine.any():
        return None
    last = played.routes.links[mine][int(played.finish_s[mine].argmax())]
    on_way = last[last >= 0]
    return played.topology.kinds[int(on_way[played.link_s[on_way].argmax()])]
