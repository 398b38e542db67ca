"""Seconds of NCCL's collectives and of the serving engines' own all-reduce.

A collective on one node is the cheapest of a few protocols, each a straight line in the bytes that a rank
puts on its link::

    line = latency_s + step_s * (n - 1) + (wire_bytes - free_bytes) / (rate_fraction * (1 - rate_loss / n) * link)
    time = smooth minimum of the lines, never below wire_bytes / link

Bytes follow nccl-tests; equations, parameters and errors: docs/fits/collectives.md.
"""

from __future__ import annotations

from math import ceil, log2

import numpy as np
from numpy.typing import ArrayLike

from moesim.errors import TrafficError
from moesim.hardware.cluster import Cluster
from moesim.network.params import CUSTOM_ALL_REDUCE, NetworkParams, Values
from moesim.network.traffic import checked_bytes, checked_group, smooth_min
from moesim.work.ops import FloatArray

__all__ = [
    "RING_CHUNK_BYTES", "all_gather_s", "all_reduce_families", "all_reduce_s", "all_to_all_s", "collective_levels",
    "custom_all_reduce_s", "nccl_curve_s", "nccl_one_node_s", "reduce_scatter_s", "send_level", "send_recv_s",
    "wire_bytes",
]  # fmt: skip

NCCL_LINES = ("ll", "ll128", "simple")
_SWITCHED = "nvls"
_SHARPNESS = 8.0
"""Exponent of the smooth minimum over protocols."""
RING_CHUNK_BYTES = 16
"""Least bytes of a rank's share of an all-reduce: NCCL rounds it up to this (src/device/all_reduce.h, runRing)."""


def wire_bytes(op: str, payload_bytes: ArrayLike, n_ranks: int) -> FloatArray:
    """Bytes that each rank sends, and receives, in a ring (or directly) [bytes].

    Parameters
    ----------
    op
        ``all_reduce``, ``all_gather``, ``reduce_scatter`` or ``all_to_all``.
    payload_bytes
        As nccl-tests counts: all_reduce: the buffer; all_gather: the whole output; reduce_scatter: the whole
        input; all_to_all: one rank's whole send buffer, its own share included [bytes].
    n_ranks
        Ranks in the group.
    """
    rounds = 2.0 if op == "all_reduce" else 1.0
    return np.asarray(rounds * (n_ranks - 1) / n_ranks * np.asarray(payload_bytes, dtype=np.float64))


def nccl_one_node_s(
    op: str, payload_bytes: ArrayLike, *, n_ranks: int, link_bytes_per_s: float, values: Values
) -> FloatArray:
    """One NCCL collective inside a node; `values` of a family ``(op, nccl)``, bytes as in `wire_bytes`."""
    payload = np.asarray(payload_bytes, dtype=np.float64)
    if n_ranks == 1:
        return np.zeros_like(payload)
    time_s = nccl_curve_s(op, payload, n_ranks=n_ranks, link_bytes_per_s=link_bytes_per_s, values=values)
    return np.where(payload > 0, time_s, 0.0)


def nccl_curve_s(
    op: str, payload: FloatArray, *, n_ranks: int, link_bytes_per_s: float, values: Values
) -> FloatArray:
    """The same of 2 ranks and more, no bytes included, which cost a start."""
    wire = wire_bytes(op, payload, n_ranks)
    lines = [_line_s(name, wire, n_ranks, link_bytes_per_s, values) for name in NCCL_LINES]
    if op == "all_reduce":
        lines[0] = lines[0] - _empty_ring_s(payload, n_ranks, values)
    floor_s = wire / link_bytes_per_s
    if n_ranks >= values.get("nvls_min_ranks", np.inf):
        # The switch adds: each rank moves the buffer once, and its share (1/n) once more.
        switched = payload * (1 + 1 / n_ranks)
        lines.append(_line_s(_SWITCHED, switched, n_ranks, link_bytes_per_s, values))
        floor_s = np.minimum(floor_s, switched / link_bytes_per_s)
    return np.maximum(smooth_min(lines, _SHARPNESS), floor_s)


def _line_s(name: str, wire: FloatArray, n_ranks: int, link_bytes_per_s: float, values: Values) -> FloatArray:
    latency_s = values[f"{name}_latency_s"] + values[f"{name}_step_s"] * (n_ranks - 1)
    fraction = values[f"{name}_rate_fraction"] * (1 - values[f"{name}_rate_loss"] / n_ranks)
    paid = np.maximum(wire - values.get(f"{name}_free_bytes", 0.0), 0.0)
    return np.asarray(latency_s + paid / (fraction * link_bytes_per_s))


def _empty_ring_s(payload: FloatArray, n_ranks: int, values: Values) -> FloatArray:
    """What an LL all-reduce saves where there are fewer chunks than ranks.

    Each rank takes one chunk after another, two hops of the ring for every other rank. Where all are full a hop waits
    for the chunk before; where the others are empty the rank waits for it, and it costs the hop alone.
    """
    step_s = values["ll_step_s"]
    saved_s = max(step_s - values.get("ll_lone_step_s", step_s), 0.0)
    n_chunks = np.clip(np.ceil(payload / RING_CHUNK_BYTES), 1, n_ranks)
    return np.asarray(saved_s * (n_ranks - n_chunks))


def custom_all_reduce_s(
    payload_bytes: ArrayLike, *, n_ranks: int, link_bytes_per_s: float, values: Values
) -> FloatArray:
    """One-shot or two-shot all-reduce of a serving engine, launched in a CUDA graph.

    One-shot: every rank reads every other's buffer, (n - 1) x payload over its link. Two-shot: a
    reduce-scatter and an all-gather by direct reads, 2 (n - 1) / n x payload.

    Parameters
    ----------
    payload_bytes
        The buffer [bytes].
    n_ranks
        Ranks of the group, all on one scale-up domain.
    link_bytes_per_s
        Datasheet rate per direction [bytes/s].
    values
        Values of a family ``(all_reduce, <engine>)``.
    """
    payload = np.asarray(payload_bytes, dtype=np.float64)
    if n_ranks == 1:
        return np.zeros_like(payload)
    one_shot = _line_s("one_shot", (n_ranks - 1) * payload, n_ranks, link_bytes_per_s, values)
    two_wire = wire_bytes("all_reduce", payload, n_ranks)
    two_shot = _line_s("two_shot", two_wire, n_ranks, link_bytes_per_s, values)
    time_s = np.maximum(smooth_min([one_shot, two_shot], _SHARPNESS), two_wire / link_bytes_per_s)
    return np.where(payload > 0, time_s, 0.0)


def all_reduce_s(
    payload_bytes: ArrayLike,
    *,
    n_ranks: int,
    ranks_per_node_in_group: int,
    cluster: Cluster,
    params: NetworkParams,
    backend: str = "vllm-custom",
) -> FloatArray:
    """Sum over a group, as serving engines run it.

    Parameters
    ----------
    payload_bytes : broadcastable to (n_points, n_layers, n_ranks)
        The buffer [bytes].
    n_ranks
        Ranks in the group.
    ranks_per_node_in_group
        How many of them share a scale-up domain, or without NVLink a host.
    cluster, params
        Links, and what is known of their use.
    backend
        ``nccl``, or an engine's own kernel (one of `CUSTOM_ALL_REDUCE`) where the group is inside one NVLink
        domain and the buffer is within the kernel's limit, NCCL elsewhere and where it is quicker.

    Returns
    -------
    FloatArray
        Seconds, shape of `payload_bytes`; 0 for one rank or no bytes.

    Raises
    ------
    TrafficError
        If bytes are negative or not finite, or the group does not fit the cluster.
    """
    if backend != "nccl" and backend not in CUSTOM_ALL_REDUCE:
        raise TrafficError("is no all-reduce", value=backend, fix=f"use nccl or one of {CUSTOM_ALL_REDUCE}")
    arguments = (n_ranks, ranks_per_node_in_group, cluster, params)
    library_s = _collective_s("all_reduce", payload_bytes, *arguments)
    return np.minimum(_engine_kernel_s(payload_bytes, *arguments, backend), library_s)


def _engine_kernel_s(
    payload_bytes: ArrayLike,
    n_ranks: int,
    per_node: int,
    cluster: Cluster,
    params: NetworkParams,
    backend: str,
) -> FloatArray:
    """Time of the engine's own kernel; infinite where it does not run."""
    payload = np.asarray(payload_bytes, dtype=np.float64)
    link = cluster.gpu.nvlink_bytes_per_s
    if backend == "nccl" or per_node < n_ranks or link == 0:
        return np.full_like(payload, np.inf)
    values = params.custom[backend]
    own_s = custom_all_reduce_s(payload, n_ranks=n_ranks, link_bytes_per_s=link, values=values)
    return np.where(payload <= values["max_bytes"], own_s, np.inf)


def all_reduce_families(
    payload_bytes: ArrayLike,
    *,
    n_ranks: int,
    ranks_per_node_in_group: int,
    cluster: Cluster,
    params: NetworkParams,
    backend: str = "vllm-custom",
) -> tuple[tuple[str, str], ...]:
    """(operator, implementation) of the families that price an all-reduce, that of most sizes first.

    Arguments and errors as `all_reduce_s`.
    """
    arguments = (n_ranks, ranks_per_node_in_group, cluster, params)
    levels = collective_levels("all_reduce", n_ranks, ranks_per_node_in_group, cluster)
    library = tuple((level, "nccl") for level in levels)
    library_s = _collective_s("all_reduce", payload_bytes, *arguments)
    own = float(np.mean(_engine_kernel_s(payload_bytes, *arguments, backend) <= library_s))
    if n_ranks == 1 or own == 0:
        return library
    kernel = (("all_reduce", backend),)
    if own == 1:
        return kernel
    return (*kernel, *library) if own >= 0.5 else (*library, *kernel)


def all_gather_s(
    payload_bytes: ArrayLike,
    *,
    n_ranks: int,
    ranks_per_node_in_group: int,
    cluster: Cluster,
    params: NetworkParams,
) -> FloatArray:
    """All-gather by NCCL; `payload_bytes` is the whole output. Arguments and errors as `all_reduce_s`."""
    return _collective_s("all_gather", payload_bytes, n_ranks, ranks_per_node_in_group, cluster, params)


def reduce_scatter_s(
    payload_bytes: ArrayLike,
    *,
    n_ranks: int,
    ranks_per_node_in_group: int,
    cluster: Cluster,
    params: NetworkParams,
) -> FloatArray:
    """Reduce-scatter by NCCL; `payload_bytes` is the whole input. Arguments and errors as `all_reduce_s`."""
    return _collective_s("reduce_scatter", payload_bytes, n_ranks, ranks_per_node_in_group, cluster, params)


def all_to_all_s(
    payload_bytes: ArrayLike,
    *,
    n_ranks: int,
    ranks_per_node_in_group: int,
    cluster: Cluster,
    params: NetworkParams,
) -> FloatArray:
    """All-to-all by NCCL's sends and receives; `payload_bytes` is one rank's whole send buffer, own share included.

    Arguments and errors as `all_reduce_s`. Unequal pairs: give the busiest port's bytes times n / (n - 1).
    """
    return _collective_s("all_to_all", payload_bytes, n_ranks, ranks_per_node_in_group, cluster, params)


def collective_levels(op: str, n_ranks: int, per_node: int, cluster: Cluster) -> tuple[str, ...]:
    """NCCL's families that price a collective: its own or ``pcie`` in a node, ``inter_node`` between nodes.

    Parameters
    ----------
    op
        As in `wire_bytes`.
    n_ranks, per_node
        Ranks of the group, and how many of them share a scale-up domain, or without NVLink a host.
    cluster
        Links.
    """
    crosses = per_node < n_ranks
    if crosses and cluster.nic_bytes_per_s == 0:
        return ("pcie",)
    local = op if cluster.gpu.nvlink_bytes_per_s > 0 else "pcie"
    if not crosses:
        return (local,)
    return ("inter_node",) if per_node == 1 else (local, "inter_node")


def _collective_s(
    op: str, payload_bytes: ArrayLike, n_ranks: int, per_node: int, cluster: Cluster, params: NetworkParams
) -> FloatArray:
    payload = checked_bytes(payload_bytes, "payload")
    checked_group(n_ranks, per_node, cluster)
    per_node = min(per_node, n_ranks)
    n_nodes = ceil(n_ranks / per_node)
    levels = collective_levels(op, n_ranks, per_node, cluster)
    if levels == ("pcie",):
        return _through_host_s(op, payload, n_ranks, cluster, params)
    near = _local_payload(op, payload, per_node, n_ranks)
    local_s = _local_s(op, levels[0], near, per_node, cluster, params)
    if "inter_node" not in levels:
        return local_s
    values = params.nccl["inter_node"]
    rate = values["nic_rate_fraction"] * cluster.nic_bytes_per_s / cluster.uplink_oversubscription
    remote_s = _remote_wire(op, payload, n_nodes, per_node, n_ranks) / rate
    # Trees for reductions and gathers, so the hops grow as the logarithm; an all-to-all posts to every peer.
    rounds = 2 if op == "all_reduce" else 1
    hops = rounds * ceil(log2(n_nodes))
    latency_s = values["start_s"] + hops * (cluster.nic_latency_s + values["hop_s"])
    if op == "all_to_all":
        latency_s += values["peer_s"] * (n_ranks - per_node)
    # The two levels run as one pipeline: the slower sets the pace, and both latencies are paid.
    time_s = np.maximum(local_s, remote_s) + latency_s
    return np.where(payload > 0, time_s, 0.0)


def _local_payload(op: str, payload: FloatArray, per_node: int, n_ranks: int) -> FloatArray:
    """What the node's own level carries: everything, or only the peers at hand."""
    return payload * (per_node / n_ranks) if op == "all_to_all" else payload


def _remote_wire(op: str, payload: FloatArray, n_nodes: int, per_node: int, n_ranks: int) -> FloatArray:
    """Bytes that each rank's own NIC sends."""
    if op == "all_to_all":
        return payload * (n_ranks - per_node) / n_ranks
    return wire_bytes(op, payload, n_nodes) / per_node


def _local_s(
    op: str, level: str, payload: FloatArray, n_ranks: int, cluster: Cluster, params: NetworkParams
) -> FloatArray:
    if n_ranks == 1:
        return np.zeros_like(payload)
    if level == "pcie":
        return _through_host_s(op, payload, n_ranks, cluster, params)
    link = cluster.gpu.nvlink_bytes_per_s
    return nccl_one_node_s(op, payload, n_ranks=n_ranks, link_bytes_per_s=link, values=params.nccl[op])


def _through_host_s(
    op: str, payload: FloatArray, n_ranks: int, cluster: Cluster, params: NetworkParams
) -> FloatArray:
    """Ring over PCIe, where there is no NVLink (or no NIC): each rank's own port carries its wire bytes."""
    if n_ranks == 1:
        return np.zeros_like(payload)
    values = params.nccl["pcie"]
    rounds = 2 if op == "all_reduce" else 1
    latency_s = values["start_s"] + rounds * (n_ranks - 1) * values["step_s"]
    rate = values["rate_fraction"] * cluster.gpu.pcie_bytes_per_s
    return np.where(payload > 0, latency_s + wire_bytes(op, payload, n_ranks) / rate, 0.0)


def send_level(same_domain: bool, cluster: Cluster) -> str:
    """NCCL's family that prices a send: ``send_recv`` over NVLink, ``pcie`` or ``inter_node``."""
    if same_domain and cluster.gpu.nvlink_bytes_per_s > 0:
        return "send_recv"
    return "pcie" if same_domain or cluster.nic_bytes_per_s == 0 else "inter_node"


def send_recv_s(
    payload_bytes: ArrayLike, *, same_domain: bool, cluster: Cluster, params: NetworkParams
) -> FloatArray:
    """One NCCL send to one rank: a pipeline stage to the next.

    Parameters
    ----------
    payload_bytes : broadcastable to (n_points, n_layers, n_ranks)
        Sent by each rank [bytes].
    same_domain
        Both ranks in one scale-up domain, or without NVLink in one host.
    cluster, params
        Links, and what is known of their use.

    Returns
    -------
    FloatArray
        Seconds, shape of `payload_bytes`.

    Raises
    ------
    TrafficError
        If bytes are negative or not finite.
    """
    payload = checked_bytes(payload_bytes, "payload")
    level, gpu = send_level(same_domain, cluster), cluster.gpu
    values = params.nccl[level]
    if level == "send_recv":
        time_s = values["nvlink_start_s"] + payload / (
            values["nvlink_rate_fraction"] * gpu.nvlink_bytes_per_s
        )
    elif level == "pcie":
        time_s = values["start_s"] + payload / (values["rate_fraction"] * gpu.pcie_bytes_per_s)
    else:
        rate = values["nic_rate_fraction"] * cluster.nic_bytes_per_s / cluster.uplink_oversubscription
        time_s = values["start_s"] + cluster.nic_latency_s + values["hop_s"] + payload / rate
    return np.where(payload > 0, time_s, 0.0)
