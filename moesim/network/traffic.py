"""Checks and bounds that every collective shares, and the copies that uniform routing makes."""

from __future__ import annotations

from math import lgamma

import numpy as np
from numpy.typing import ArrayLike

from moesim.errors import TrafficError
from moesim.hardware.cluster import Cluster
from moesim.work.ops import FloatArray

__all__ = ["checked_bytes", "checked_group", "hit_fraction", "port_bound_s", "smooth_max", "smooth_min"]


def checked_bytes(value: ArrayLike, what: str) -> FloatArray:
    """`value` as floats.

    Raises
    ------
    TrafficError
        If any of it is negative, infinite or NaN.
    """
    array = np.asarray(value, dtype=np.float64)
    if not np.all(np.isfinite(array)) or np.any(array < 0):
        worst = array[~(np.isfinite(array) & (array >= 0))].flat[0]
        raise TrafficError(f"{what} must be finite and not negative", value=float(worst))
    return array


def checked_group(n_ranks: int, ranks_per_node_in_group: int, cluster: Cluster) -> None:
    """Check that a group fits.

    Raises
    ------
    TrafficError
        If the group is empty, larger than the cluster, or has more ranks on a node than there are.
    """
    if not 1 <= n_ranks <= cluster.n_gpus:
        raise TrafficError(f"a group has 1 to {cluster.n_gpus} ranks on this cluster", value=n_ranks)
    most = max(cluster.gpus_per_node, cluster.scale_up_ranks)
    if not 1 <= ranks_per_node_in_group <= most:
        raise TrafficError(
            f"a group has 1 to {most} ranks on one node of this cluster", value=ranks_per_node_in_group
        )


def port_bound_s(
    sent_bytes: ArrayLike, received_bytes: ArrayLike, bytes_per_s: float, latency_s: float = 0.0
) -> FloatArray:
    """Lower bound on one all-to-all: what the busiest port needs.

    Parameters
    ----------
    sent_bytes, received_bytes : (..., n_ranks)
        Bytes that each rank's port sends and receives; what stays on a rank is not counted [bytes].
    bytes_per_s
        Rate of one port, per direction [bytes/s].
    latency_s
        Fixed cost of a call [s].

    Returns
    -------
    FloatArray
        (...) seconds.

    Raises
    ------
    TrafficError
        If bytes are negative or not finite, or the rate is not positive.

    Notes
    -----
    Full duplex; leaves out incast, cost per message and every link behind the ports.
    """
    sent = checked_bytes(sent_bytes, "bytes sent")
    received = checked_bytes(received_bytes, "bytes received")
    if not bytes_per_s > 0:
        raise TrafficError("a port needs a positive rate [bytes/s]", value=bytes_per_s)
    busiest = np.max(np.maximum(sent, received), axis=-1)
    return np.asarray(latency_s + busiest / bytes_per_s)


def smooth_max(terms: list[FloatArray], sharpness: float) -> FloatArray:
    """Smooth maximum (p-norm) of non-negative terms: never below the largest of them."""
    top = np.maximum.reduce(np.broadcast_arrays(*terms))
    safe = np.where(top > 0, top, 1.0)
    return np.asarray(top * sum((term / safe) ** sharpness for term in terms) ** (1 / sharpness))


def smooth_min(terms: list[FloatArray], sharpness: float) -> FloatArray:
    """Smooth minimum of positive terms: never above the smallest of them."""
    low = np.minimum.reduce(np.broadcast_arrays(*terms))
    return np.asarray(low * sum((low / term) ** sharpness for term in terms) ** (-1 / sharpness))


def hit_fraction(n_groups: int, n_experts: int, top_k: int) -> float:
    """Chance that a token of uniform routing has an expert in one given group of experts.

    Parameters
    ----------
    n_groups
        Equal groups that the experts are cut into: ranks, or nodes.
    n_experts, top_k
        Experts of the layer and different ones that a token picks.

    Notes
    -----
    1 - C(E - E/G, k) / C(E, k); times G it is the expected number of different groups of a token: 7.27 ranks
    at E = 256, k = 8, G = 32. Stands for copies before de-duplication over copies after it.
    """
    outside = n_experts - n_experts / n_groups
    if outside < top_k:
        return 1.0
    log_missed = sum(
        sign * lgamma(value + 1.0)
        for sign, value in ((1, outside), (-1, outside - top_k), (-1, n_experts), (1, n_experts - top_k))
    )
    return float(1.0 - np.exp(log_missed))
