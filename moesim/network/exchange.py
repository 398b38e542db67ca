"""Seconds of a token exchange: DeepEP's two kernel families, one-sided in a large NVLink domain, NCCL.

Every rank's time comes from its own copies, so the rank that most tokens reach is the slow one. Links and SMs
work at the same time (smooth maximum); what precedes and follows them is added. Equations, conventions and
errors: docs/fits/collectives.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TrafficError
from moesim.hardware.cluster import Cluster
from moesim.network.collectives import nccl_curve_s
from moesim.network.params import NetworkParams, Values
from moesim.network.traffic import checked_bytes, checked_group, hit_fraction, smooth_max
from moesim.work.ops import Combine, Dispatch, Exchange, FloatArray

__all__ = [
    "ExchangeTerms", "LinkName", "bounding_link", "combine_s", "dispatch_s", "exchange_families", "exchange_terms",
    "exchange_way", "low_latency_terms", "normal_terms",
]  # fmt: skip

LinkName = Literal["nvlink", "nic", "latency"]
_LOW_LATENCY_SHARPNESS = 1.5
_ONE_SIDED_SHARPNESS = 3.0
_NORMAL_SHARPNESS = 6.0
"""Exponents of the smooth maximum over links and SMs: those of 1 to 12 that err least on unseen shapes."""
_RDMA_CHUNK_TOKENS = {"dispatch": (20, 8), "combine": (12, 8)}
"""Tokens of one write to a NIC, on two nodes and on three to eight: what DeepEP recommends (deep_ep/buffer.py)."""


@dataclass(frozen=True, eq=False)
class ExchangeTerms:
    """What one exchange's time is made of; all [P, L, R] seconds."""

    latency_s: FloatArray
    """Start, and what waits on nobody's bytes."""
    nvlink_s: FloatArray
    """Bytes over the scale-up link (PCIe where there is none)."""
    nic_s: FloatArray
    """Bytes over the NIC."""
    sm_s: FloatArray
    """Work of the kernel's own SMs, in parallel with the links."""
    after_s: FloatArray
    """Work of the kernel once its bytes are there."""
    sharpness: float = _LOW_LATENCY_SHARPNESS
    """Exponent of the smooth maximum over what runs in parallel."""

    def total_s(self) -> FloatArray:
        """Seconds of the exchange."""
        moving_s = smooth_max([self.nvlink_s, self.nic_s, self.sm_s], self.sharpness)
        return np.asarray(self.latency_s + moving_s + self.after_s)


def dispatch_s(
    op: Dispatch,
    *,
    cluster: Cluster,
    params: NetworkParams,
    n_ranks: int | None = None,
    ranks_per_node_in_group: int | None = None,
) -> FloatArray:
    """Time of a dispatch, rank by rank.

    Parameters
    ----------
    op
        Copies that each rank sends and receives, its own not counted, as `moesim.work.ops.Exchange` counts
        them for the operator's kind.
    cluster, params
        Links, and what is known of their use.
    n_ranks
        Ranks of the exchange; by default the last axis of the operator's arrays.
    ranks_per_node_in_group
        How many of them share a scale-up domain, or without NVLink a host; by default as many as fit, ranks
        being neighbours.

    Returns
    -------
    FloatArray
        [P, L, R] seconds; 0 where the group is one rank.

    Raises
    ------
    TrafficError
        If copies are negative or not finite, the group does not fit the cluster, or copies are sent over a
        NIC that the cluster lacks.

    Notes
    -----
    Leaves out that a rank waits for the senders of what it receives: the caller takes the maximum over the
    group where the program waits for everybody.
    """
    return exchange_terms(
        op, cluster=cluster, params=params, n_ranks=n_ranks, ranks_per_node_in_group=ranks_per_node_in_group
    ).total_s()


def combine_s(
    op: Combine,
    *,
    cluster: Cluster,
    params: NetworkParams,
    n_ranks: int | None = None,
    ranks_per_node_in_group: int | None = None,
) -> FloatArray:
    """Time of a combine, rank by rank; arguments, errors and notes as `dispatch_s`."""
    return exchange_terms(
        op, cluster=cluster, params=params, n_ranks=n_ranks, ranks_per_node_in_group=ranks_per_node_in_group
    ).total_s()


def bounding_link(
    op: Exchange,
    *,
    cluster: Cluster,
    params: NetworkParams,
    n_ranks: int | None = None,
    ranks_per_node_in_group: int | None = None,
) -> LinkName:
    """Class of link that bounds the slowest rank of an exchange; arguments and errors as `dispatch_s`.

    ``latency`` where the start of the call or the kernel's own SMs take longer than either link.
    """
    terms = exchange_terms(
        op, cluster=cluster, params=params, n_ranks=n_ranks, ranks_per_node_in_group=ranks_per_node_in_group
    )
    total_s = terms.total_s()
    slowest = int(np.argmax(total_s))
    nvlink_s, nic_s, start_s, sm_s = (
        float(np.broadcast_to(part, total_s.shape).flat[slowest])
        for part in (terms.nvlink_s, terms.nic_s, terms.latency_s + terms.after_s, terms.sm_s)
    )
    if max(start_s, sm_s) >= max(nvlink_s, nic_s):
        return "latency"
    return "nvlink" if nvlink_s >= nic_s else "nic"


def exchange_terms(
    op: Exchange,
    *,
    cluster: Cluster,
    params: NetworkParams,
    n_ranks: int | None = None,
    ranks_per_node_in_group: int | None = None,
) -> ExchangeTerms:
    """Parts of an exchange's time; arguments and errors as `dispatch_s`."""
    copies = _checked_copies(op, cluster)
    ranks = _ranks_of(op, n_ranks)
    per_domain = min(ranks, ranks_per_node_in_group or cluster.near_ranks)
    checked_group(ranks, per_domain, cluster)
    if ranks == 1:
        zero = np.zeros(np.broadcast_shapes(*(part.shape for part in copies)))
        return ExchangeTerms(zero, zero, zero, zero, zero)
    way = exchange_way(op.kind, cluster=cluster, n_ranks=ranks, ranks_per_node_in_group=per_domain)
    if way == "nccl":
        return _nccl_terms(op, cluster, params, ranks, per_domain)
    values = (params.combine if isinstance(op, Combine) else params.dispatch)[way]
    if way == "deepep-normal":
        return normal_terms(op, values, cluster, ranks, per_domain)
    one_sided = way == "one-sided"
    return low_latency_terms(op, values, cluster, ranks, per_domain, copies_per_rank=one_sided)


def exchange_way(
    kind: str, *, cluster: Cluster, n_ranks: int, ranks_per_node_in_group: int
) -> Literal["nccl", "one-sided", "deepep-normal", "deepep-low-latency"]:
    """Library that serves an exchange: one-sided kernels where one scale-up domain spans hosts and holds it."""
    if kind == "nccl":
        return "nccl"
    if cluster.scale_up_ranks > cluster.gpus_per_node and ranks_per_node_in_group >= n_ranks:
        return "one-sided"
    return "deepep-normal" if kind == "normal" else "deepep-low-latency"


def exchange_families(
    op: Exchange, *, cluster: Cluster, n_ranks: int, ranks_per_node_in_group: int
) -> tuple[tuple[str, str], ...]:
    """(operator, implementation) of the profile's families that price an exchange; arguments as `dispatch_s`."""
    shape = {"n_ranks": n_ranks, "ranks_per_node_in_group": ranks_per_node_in_group}
    way = exchange_way(op.kind, cluster=cluster, **shape)
    if way == "nccl":
        levels = _nccl_levels(cluster, n_ranks, min(n_ranks, ranks_per_node_in_group))
        return tuple((level, "nccl") for level in levels)
    return (("ep_combine" if isinstance(op, Combine) else "ep_dispatch", way),)


def _checked_copies(op: Exchange, cluster: Cluster) -> list[FloatArray]:
    named = {
        "tokens": op.n_tokens,
        "copies sent over NVLink": op.sent_nvlink,
        "copies received over NVLink": op.received_nvlink,
        "copies sent over the NIC": op.sent_nic,
        "copies received over the NIC": op.received_nic,
    }
    checked = [checked_bytes(value, what) for what, value in named.items()]
    if cluster.nodes > 1 and cluster.nic_bytes_per_s == 0 and np.any(checked[3]):
        raise TrafficError(
            "this cluster has no NIC to carry copies between its nodes", fix="set its NIC rate"
        )
    return checked


def _ranks_of(op: Exchange, n_ranks: int | None) -> int:
    if n_ranks is not None:
        return n_ranks
    shape = np.broadcast_shapes(
        *(np.shape(part) for part in (op.n_tokens, op.sent_nvlink, op.received_nvlink))
    )
    return int(shape[-1]) if shape else 1


def _link_rate(cluster: Cluster, values: Values) -> float:
    """Rate of the link inside a host [bytes/s]."""
    if cluster.gpu.nvlink_bytes_per_s > 0:
        return values["nvlink_rate_fraction"] * cluster.gpu.nvlink_bytes_per_s
    return values["pcie_rate_fraction"] * cluster.gpu.pcie_bytes_per_s


def _nic_rate(cluster: Cluster, values: Values, n_ranks: int, per_domain: int) -> float:
    """Rate of one rank's NIC; a box without NVLink reaches its own GPUs over PCIe [bytes/s]."""
    host_rate = values["pcie_rate_fraction"] * cluster.gpu.pcie_bytes_per_s
    if _through_host(cluster, n_ranks, per_domain):
        return host_rate
    n_domains = ceil(n_ranks / per_domain)
    shared = 1 + values["nic_contention"] * max(n_domains - 2, 0)
    rate = values["nic_rate_fraction"] * cluster.nic_bytes_per_s / cluster.uplink_oversubscription / shared
    return min(rate, host_rate)


def _through_host(cluster: Cluster, n_ranks: int, per_domain: int) -> bool:
    """Whether what leaves a scale-up domain stays in a host, or has no NIC to leave by."""
    in_one_box = cluster.gpu.nvlink_bytes_per_s == 0 and per_domain >= n_ranks
    return in_one_box or cluster.nic_bytes_per_s == 0


def low_latency_terms(
    op: Exchange,
    values: Values,
    cluster: Cluster,
    n_ranks: int,
    per_domain: int,
    copies_per_rank: bool = False,
) -> ExchangeTerms:
    """Messages written straight to their rank; every SM helps, none is kept.

    SMs in use are E / ceil(E / n_sms), as the kernel maps groups of warps to experts. DeepEP sends one
    message per (token, expert), the one-sided kernels (`copies_per_rank`) one per (token, rank). A byte over
    NVLink costs the link's time, and `gpu_byte_s` that a wider link does not save.
    """
    tokens = np.asarray(op.n_tokens, dtype=np.float64)
    experts = op.n_experts
    hit = hit_fraction(n_ranks, experts, op.top_k)
    per_expert = op.top_k / n_ranks
    # A low-latency operator counts one copy per (token, expert), as DeepEP sends it: fewer where one serves a rank.
    each = hit / per_expert if copies_per_rank and op.kind == "low-latency" else 1.0
    nvlink = np.maximum(op.sent_nvlink, op.received_nvlink) * each
    own = tokens * (hit if copies_per_rank else per_expert)
    nic = np.maximum(op.sent_nic, op.received_nic)
    used_sms = ceil(experts / ceil(experts / cluster.gpu.n_sms))
    messages = nvlink + nic + own
    per_token = (
        values["token_s"] + (values["token_byte_s"] + values["copy_byte_s"] * op.top_k) * op.token_bytes
    )
    # One hop, and a handshake with every rank behind a NIC.
    far_start_s = (
        cluster.nic_latency_s + values["far_start_s"] + values["far_peer_s"] * (n_ranks - per_domain)
    )
    per_message = values["message_s"] + values["message_byte_s"] * op.token_bytes
    per_byte = 1 / _link_rate(cluster, values) + values.get("gpu_byte_s", 0.0)
    return ExchangeTerms(
        latency_s=values["start_s"] + values["expert_s"] * experts + _if_far(op, far_start_s),
        nvlink_s=nvlink * op.token_bytes * per_byte,
        nic_s=nic * op.token_bytes / _nic_rate(cluster, values, n_ranks, per_domain),
        sm_s=np.ceil(tokens / used_sms) * per_token,
        after_s=messages / experts * per_message,
        sharpness=_ONE_SIDED_SHARPNESS if copies_per_rank else _LOW_LATENCY_SHARPNESS,
    )


def normal_terms(
    op: Exchange, values: Values, cluster: Cluster, n_ranks: int, per_domain: int
) -> ExchangeTerms:
    """One copy per (token, rank) over NVLink and per (token, domain) over NICs; `n_sms` SMs move them.

    The SMs look at every token, write every copy, and (on the way back) read a token's copies one by one. Across
    domains they also write, or add up, a copy per (token, domain), its own included; two SMs are a channel, and
    the first chunk of a channel passes before its next stage starts.
    """
    tokens = np.asarray(op.n_tokens, dtype=np.float64)
    n_sms = op.n_sms or int(values["n_sms"])
    hit = hit_fraction(n_ranks, op.n_experts, op.top_k)
    nvlink = np.maximum(op.sent_nvlink, op.received_nvlink)
    nic = np.maximum(op.sent_nic, op.received_nic)
    per_token = values["token_s"] + values["token_byte_s"] * op.token_bytes
    per_copy = values["copy_s"] + values["copy_byte_s"] * op.token_bytes
    first_token_s = (values["start_byte_s"] + values["start_copy_byte_s"] * n_ranks * hit) * op.token_bytes
    latency_s = np.asarray(values["start_s"] + first_token_s)
    written, sm_scale, filling = nvlink + tokens * hit, 1.0, np.zeros(())
    n_domains = ceil(n_ranks / per_domain)
    if n_domains > 1:
        written = written + nic + tokens * hit_fraction(n_domains, op.n_experts, op.top_k)
        sm_scale = values["far_sm_scale"]
        filling = _chunk_share(tokens / (n_sms / 2), op, n_domains)
        # NVSHMEM's barriers go out in rounds, each twice as far as the one before.
        rounds_s = ceil(log2(n_domains)) * (cluster.nic_latency_s + values["far_round_s"])
        latency_s = latency_s + _if_far(op, rounds_s)
    sm_s = sm_scale * (tokens * per_token + written * per_copy) / n_sms
    return ExchangeTerms(
        latency_s=latency_s,
        nvlink_s=nvlink * op.token_bytes / _link_rate(cluster, values),
        nic_s=nic * op.token_bytes / _nic_rate(cluster, values, n_ranks, per_domain),
        sm_s=sm_s,
        after_s=values["ramp_s"] * tokens / (tokens + values["ramp_tokens"]) + sm_s * filling,
        sharpness=_NORMAL_SHARPNESS,
    )


def _chunk_share(channel_tokens: FloatArray, op: Exchange, n_domains: int) -> FloatArray:
    """Share of a channel's tokens that are its first chunk: all of few, a chunk of many."""
    chunk = _RDMA_CHUNK_TOKENS["combine" if isinstance(op, Combine) else "dispatch"][min(n_domains, 3) - 2]
    return np.asarray(chunk / (channel_tokens + chunk))


def _if_far(op: Exchange, start_s: float) -> FloatArray:
    """Start-up of an exchange that takes NICs; none of one that does not."""
    return np.asarray(start_s if np.any(op.sent_nic) or np.any(op.received_nic) else 0.0)


def _nccl_terms(
    op: Exchange, cluster: Cluster, params: NetworkParams, n_ranks: int, per_domain: int
) -> ExchangeTerms:
    """Sends and receives between all pairs, paced by each rank's busiest port.

    The kernel's channels carry every copy at the pace of the local curve, those for NICs into buffers that the
    NIC reads meanwhile; NICs carry the far ones at their own pace. So a copy that leaves the domain is never
    cheaper than one that stays. A far start and a post to each far peer come on top.
    """
    near = np.maximum(op.sent_nvlink, op.received_nvlink) * op.token_bytes
    far = np.maximum(op.sent_nic, op.received_nic) * op.token_bytes
    sent = np.asarray(op.sent_nvlink, dtype=np.float64) + op.sent_nic
    received = np.asarray(op.received_nvlink, dtype=np.float64) + op.received_nic
    carried = np.maximum(sent, received) * op.token_bytes
    start_s, local_s = _nccl_local_s(carried, cluster, params, n_ranks, per_domain)
    nic_s = np.zeros_like(far)
    if "inter_node" in _nccl_levels(cluster, n_ranks, per_domain):
        values = params.nccl["inter_node"]
        rate = values["nic_rate_fraction"] * cluster.nic_bytes_per_s / cluster.uplink_oversubscription
        nic_s = far / rate
        hops = ceil(log2(ceil(n_ranks / per_domain)))
        far_start_s = values["start_s"] + hops * (cluster.nic_latency_s + values["hop_s"])
        far_start_s += values["peer_s"] * (n_ranks - per_domain)
        start_s = start_s + np.where(_somewhere(far), far_start_s, 0.0)
    start_s = np.where(_somewhere(near + far), start_s, 0.0)
    zero = np.zeros_like(local_s)
    return ExchangeTerms(start_s, local_s, nic_s, zero, zero, _NORMAL_SHARPNESS)


def _nccl_levels(cluster: Cluster, n_ranks: int, per_domain: int) -> tuple[str, ...]:
    """Families behind an all-to-all of unequal pairs: its kernel's, and between nodes the NIC's."""
    if _through_host(cluster, n_ranks, per_domain):
        return ("pcie",)
    local = "all_to_all" if cluster.gpu.nvlink_bytes_per_s > 0 else "pcie"
    return (local,) if per_domain >= n_ranks else (local, "inter_node")


def _nccl_local_s(
    carried: FloatArray, cluster: Cluster, params: NetworkParams, n_ranks: int, per_domain: int
) -> tuple[FloatArray, FloatArray]:
    """Start of the kernel, and the time that its bytes add to it [s]."""
    # a rank alone in its node has channels all the same, as fast as those between two
    peers = min(n_ranks, max(per_domain, 2))
    if _nccl_levels(cluster, n_ranks, per_domain)[0] == "pcie":
        values = params.nccl["pcie"]
        start_s = np.asarray(values["start_s"] + (peers - 1) * values["step_s"])
        return start_s, carried / (values["rate_fraction"] * cluster.gpu.pcie_bytes_per_s)
    link, values = cluster.gpu.nvlink_bytes_per_s, params.nccl["all_to_all"]
    payload = carried * peers / (peers - 1)
    start_s, time_s = (
        nccl_curve_s("all_to_all", each, n_ranks=peers, link_bytes_per_s=link, values=values)
        for each in (np.zeros(()), payload)
    )
    return start_s, np.maximum(time_s - start_s, carried / link)


def _somewhere(copies: FloatArray) -> NDArray[np.bool_]:
    """[P, L, 1] whether any rank moves something: each point and layer by itself."""
    return np.asarray(np.any(np.atleast_1d(copies) > 0, axis=-1, keepdims=True))
