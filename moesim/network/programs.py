"""Flows of all-reduce, all-gather, reduce-scatter and broadcast.

Payloads are counted as nccl-tests does (docs/fits/collectives.md). A ring or a tree of a group that spans nodes has
one channel for each GPU of a node, so that every NIC is used; its chunks are streamed, so that all hops of a channel
move at once.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TrafficError
from moesim.network.transfers import SWITCH, Transfers, joined

__all__ = [
    "PROGRAMS",
    "broadcast",
    "collective_transfers",
    "direct_gather",
    "in_switch",
    "one_shot",
    "ring",
    "tree",
]

IntArray = NDArray[np.int64]

_RING_ROUNDS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


def ring(op: str, payload_bytes: float, n_ranks: int, per_node: int) -> Transfers:
    """Every rank streams to its neighbour: (n - 1)/n of the payload, all-reduce twice that.

    Channel c enters each node at its c-th GPU, so that nodes meet at every NIC.

    Parameters
    ----------
    op
        ``all_reduce``, ``all_gather`` or ``reduce_scatter``.
    payload_bytes
        The buffer; the whole output; the whole input [bytes].
    n_ranks, per_node
        Ranks of the group, and how many share a node.
    """
    moved = _RING_ROUNDS[op] * payload_bytes * (n_ranks - 1) / n_ranks
    channels = _channels(n_ranks, per_node)
    return joined(
        [Transfers.of("ring", order, np.roll(order, -1), moved / len(channels)) for order in channels]
    )


def _channels(n_ranks: int, per_node: int) -> list[IntArray]:
    """Order of the ranks in each channel."""
    ranks = np.arange(n_ranks)
    if per_node >= n_ranks or n_ranks % per_node:
        return [ranks]
    nodes = ranks.reshape(-1, per_node)
    return [np.roll(nodes, -first, axis=1).ravel() for first in range(per_node)]


def tree(payload_bytes: float, n_ranks: int, per_node: int) -> Transfers:
    """All-reduce up and down a double binary tree of nodes, a chain inside each.

    Two trees carry half each; a node is inside one and a leaf of the other (Sanders, Speck and Träff, 2009), so that
    it sends at most twice the payload.
    """
    channels = _channels(n_ranks, per_node)
    parts = []
    for order in channels:
        chains = order.reshape(-1, min(per_node, n_ranks)) if n_ranks % per_node == 0 else order[:, None]
        share = payload_bytes / len(channels)
        for hop in range(chains.shape[1] - 1):
            parts += _both_ways("chain", chains[:, hop + 1], chains[:, hop], share)
        for shift in (0, 1):
            child, parent = _tree_edges(len(chains), shift)
            parts += _both_ways("tree", chains[child, 0], chains[parent, 0], share / 2)
    return joined(parts)


def _both_ways(leg: str, child: IntArray, parent: IntArray, n_bytes: float) -> list[Transfers]:
    return [Transfers.of(leg, child, parent, n_bytes), Transfers.of(leg, parent, child, n_bytes)]


def _tree_edges(n: int, shift: int) -> tuple[IntArray, IntArray]:
    """Children and parents of a binary tree whose leaves are the even places; shifted by one for its twin."""
    place = np.arange(1, n)
    low = place & -place
    above = (place ^ low) | low << 1
    up = np.where(above < n, above, place ^ low)
    return (place + shift) % n, (up + shift) % n


def one_shot(payload_bytes: float, n_ranks: int) -> Transfers:
    """All-reduce in which every rank reads every other's whole buffer."""
    ranks = np.arange(n_ranks)
    return Transfers.of("read", ranks[:, None], ranks[None, :], payload_bytes)


def direct_gather(op: str, payload_bytes: float, n_ranks: int) -> Transfers:
    """Every rank's share straight to every other; all-reduce is two-shot: scattered sums, then a gather."""
    ranks = np.arange(n_ranks)
    rounds = 2 if op == "all_reduce" else 1
    share = payload_bytes / n_ranks
    return joined(
        [Transfers.of("read", ranks[:, None], ranks[None, :], share, step=step) for step in range(rounds)]
    )


def in_switch(payload_bytes: float, n_ranks: int) -> Transfers:
    """All-reduce in the switch (NVLS): it reads every buffer, adds, and each rank has its share sent to all.

    A rank sends its buffer and its share of the sum, and receives as much: (1 + 1/n) of the payload.
    """
    ranks = np.arange(n_ranks)
    moved = payload_bytes * (1 + 1 / n_ranks)
    return joined(
        [Transfers.of("switch", ranks, SWITCH, moved), Transfers.of("switch", SWITCH, ranks, moved)]
    )


def broadcast(payload_bytes: float, n_ranks: int, per_node: int, root: int = 0) -> Transfers:
    """From one rank along a chain through all, streamed; every channel carries its part."""
    channels = _channels(n_ranks, per_node)
    parts = []
    for order in channels:
        line = np.roll(order, -int(np.flatnonzero(order == root)[0]))
        parts.append(Transfers.of("chain", line[:-1], line[1:], payload_bytes / len(channels)))
    return joined(parts)


Program = Callable[[str, float, int, int], Transfers]
PROGRAMS: dict[str, Program] = {
    "ring": ring,
    "tree": lambda op, payload, n, per_node: tree(payload, n, per_node),
    "one-shot": lambda op, payload, n, per_node: one_shot(payload, n),
    "two-shot": lambda op, payload, n, per_node: direct_gather(op, payload, n),
    "in-switch": lambda op, payload, n, per_node: in_switch(payload, n),
    "chain": lambda op, payload, n, per_node: broadcast(payload, n, per_node),
}
"""Algorithms by name."""
_OF = {
    "all_reduce": ("ring", "tree", "one-shot", "two-shot", "in-switch"),
    "all_gather": ("ring", "two-shot"),
    "reduce_scatter": ("ring", "two-shot"),
    "broadcast": ("chain",),
}


def collective_transfers(
    op: str, payload_bytes: float, *, n_ranks: int, per_node: int, algorithm: str | None = None
) -> Transfers:
    """Flows of one collective.

    Parameters
    ----------
    op
        ``all_reduce``, ``all_gather``, ``reduce_scatter`` or ``broadcast``.
    payload_bytes
        As nccl-tests counts [bytes].
    n_ranks, per_node
        Ranks of the group, and how many share a node.
    algorithm
        One of `PROGRAMS` that does `op`; by default a ring, a chain for a broadcast.

    Raises
    ------
    TrafficError
        If there is no such collective or algorithm for it, or bytes are negative or not finite.
    """
    if op not in _OF:
        raise TrafficError("is no collective with a program", value=op, fix=f"one of {', '.join(_OF)}")
    name = algorithm or _OF[op][0]
    if name not in _OF[op]:
        raise TrafficError(f"is no algorithm of {op}", value=name, fix=f"one of {', '.join(_OF[op])}")
    if per_node < 1 or n_ranks < 1:
        raise TrafficError("a group has a rank, and a node too", value=(n_ranks, per_node))
    return PROGRAMS[name](op, payload_bytes, n_ranks, min(per_node, n_ranks))
