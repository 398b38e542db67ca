"""Placement that keeps experts which tokens choose together on one node, loads kept even.

A token is sent once to every node that holds an expert of its, so what counts is how many nodes its experts
stand on. Fewer of them by local search: two slots of different nodes are swapped while that puts more pairs of
experts that are chosen together on one node, and no node's load leaves its bound.

References
----------
B. W. Kernighan and S. Lin, "An efficient heuristic procedure for partitioning graphs", Bell System Technical
Journal 49 (1970): the gain of a swap.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.eplb import balanced_packing, replicate_experts
from moesim.routing.swaps import evened_by_swaps

__all__ = ["chosen_together", "nodes_by_affinity", "place_by_affinity", "smoothed"]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

PRIOR_PAIRS = 100.0
"""Pairs that a layer's mean counts for: a bank of 4096 tokens has 4 of two of 256 experts, gpt-oss-20b's trace 500.
Of 10, 30, 100 and 1000 the last two cut the copies of held-out generated tokens most, and alike."""
MOST_TOKENS = 32768
"""Tokens that are looked at, evenly spaced; more change nothing that the load's own noise does not hide."""


def chosen_together(ids: NDArray[Any], n_experts: int) -> NDArray[np.float32]:
    """How many tokens chose both of two experts.

    Parameters
    ----------
    ids : (n_tokens, n_layers, top_k)
        Experts of each token.
    n_experts
        Experts of a layer.

    Returns
    -------
    (n_layers, n_experts, n_experts)
        Symmetric, tokens of an expert on the diagonal.
    """
    step = -(-len(ids) // MOST_TOKENS)
    some = np.asarray(ids[::step])
    token = np.arange(len(some))[:, None]
    found = np.empty((some.shape[1], n_experts, n_experts), dtype=np.float32)
    for layer in range(some.shape[1]):
        chosen = np.zeros((len(some), n_experts), dtype=np.float32)
        chosen[token, some[:, layer].astype(np.intp)] = 1.0
        found[layer] = chosen.T @ chosen
    return found


def smoothed(together: NDArray[np.float32], n_groups: int) -> NDArray[np.float32]:
    """Pairs as they would be in other tokens of the same router: few tokens tell little of one pair.

    Parameters
    ----------
    together : (n_layers, n_experts, n_experts)
        As `chosen_together` gives it.
    n_groups
        Groups of consecutive experts that the router looks at; 1 where there are none.

    Notes
    -----
    How much more often than by chance two experts are chosen together is drawn to the mean of its layer, one for
    pairs of one group and one for others, with the weight of `PRIOR_PAIRS` pairs.
    """
    own = np.diagonal(together, axis1=1, axis2=2).astype(np.float64)
    n_experts = own.shape[1]
    group = np.arange(n_experts) * n_groups // n_experts
    same = group[:, None] == group[None, :]
    pairs = np.array(together, dtype=np.float64)
    pairs[:, np.arange(n_experts), np.arange(n_experts)] = 0.0
    # by chance, up to a factor of the layer that the means take up
    chance = own[:, :, None] * own[:, None, :]
    chance[:, np.arange(n_experts), np.arange(n_experts)] = 0.0
    chance *= (pairs.sum((1, 2)) / np.maximum(chance.sum((1, 2)), 1e-300))[:, None, None]
    lift = np.zeros_like(pairs)
    for one in (same, ~same):
        mean = (pairs * one).sum((1, 2)) / np.maximum((chance * one).sum((1, 2)), 1e-300)
        lift += one * mean[:, None, None]
    return np.asarray(chance * (pairs + PRIOR_PAIRS * lift) / (chance + PRIOR_PAIRS), dtype=np.float32)


def place_by_affinity(
    together: NDArray[np.float32],
    load: FloatArray,
    *,
    n_slots: int,
    n_ranks: int,
    n_nodes: int,
    most_load: float = 1.05,
) -> IndexArray:
    """Experts for all slots of a group.

    Parameters
    ----------
    together : (n_layers, n_experts, n_experts)
        As `chosen_together` gives it.
    load : (n_layers, n_experts)
        Load of each expert.
    n_slots, n_ranks, n_nodes
        Slots (a multiple of ranks), ranks (a multiple of nodes) and nodes.
    most_load
        Load that a node may have over the mean; where it has more to begin with, it does not get fuller.

    Returns
    -------
    (n_layers, n_slots)
        Expert in each slot, rank after rank.
    """
    n_layers = len(load)
    expert, n_replicas = replicate_experts(load, n_slots)
    per_slot = np.asarray(load / n_replicas, dtype=np.float64)
    node, _ = balanced_packing(np.take_along_axis(per_slot, expert, -1), n_nodes)
    for layer in range(n_layers):
        item = expert[layer]
        copies = n_replicas[layer, item].astype(np.float32)
        affinity = together[layer][np.ix_(item, item)] / np.outer(copies, copies)
        affinity[item[:, None] == item[None, :]] = 0.0
        node[layer] = nodes_by_affinity(node[layer], affinity, per_slot[layer, item], n_nodes, most_load)
    order = np.argsort(node, axis=-1, kind="stable")
    by_node = np.take_along_axis(expert, order, -1).reshape(n_layers * n_nodes, -1)
    own_load = np.repeat(per_slot, n_nodes, axis=0)
    n_packs = n_ranks // n_nodes
    pack, place = balanced_packing(np.take_along_axis(own_load, by_node, -1), n_packs)
    to_slot = pack * (by_node.shape[1] // n_packs) + place
    packed = np.take_along_axis(by_node, np.argsort(to_slot, axis=-1), -1)
    return evened_by_swaps(packed, own_load, n_packs).reshape(n_layers, n_slots)


def nodes_by_affinity(
    node: IndexArray, affinity: NDArray[np.float32], load: FloatArray, n_nodes: int, most_load: float
) -> IndexArray:
    """Swap slots between nodes while that puts more affinity inside nodes: the node of each slot, (n_slots,).

    Parameters
    ----------
    node : (n_slots,)
        Nodes to begin with, equally many slots on each.
    affinity : (n_slots, n_slots)
        Symmetric, with a diagonal of zeros.
    load : (n_slots,)
        Load of each slot.
    n_nodes, most_load
        As in `place_by_affinity`.
    """
    node = node.copy()
    n_slots = node.size
    limit = most_load * load.sum() / n_nodes
    slots = np.arange(n_slots)
    inside = np.stack([affinity[:, node == one].sum(axis=1) for one in range(n_nodes)], axis=1)
    more = (load[None, :] - load[:, None]).astype(np.float32)
    least = 1e-4 * float(affinity.sum()) / n_slots
    for _ in range(2 * n_slots):
        own = inside[slots, node]
        across = inside[:, node]
        gain = across + across.T - own[:, None] - own[None, :] - 2.0 * affinity
        total = np.bincount(node, load, minlength=n_nodes)
        room = np.maximum(limit - total, 0.0).astype(np.float32)[node]
        # slot i's node takes j for i: it gains their difference, and the other loses it
        fits = (more <= room[:, None]) & (-more <= room[None, :]) & (node[:, None] != node[None, :])
        gain = np.where(fits, gain, -1.0)
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, j] <= least:
            break
        change = affinity[:, i] - affinity[:, j]
        inside[:, node[i]] -= change
        inside[:, node[j]] += change
        node[i], node[j] = node[j], node[i]
    return node
