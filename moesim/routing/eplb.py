"""DeepSeek's expert-parallel load balancer, for all layers at once.

Three greedy steps: pack expert groups to nodes, give spare slots on each node to whichever expert has the
most load per replica, pack the replicas to ranks. The policy and its ties follow the published one, so
that its worked example comes out exactly.

References
----------
DeepSeek-AI, EPLB, https://github.com/deepseek-ai/EPLB (MIT).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["balanced_packing", "rebalance_experts", "replicate_experts"]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]


def balanced_packing(load: FloatArray, n_packs: int) -> tuple[IndexArray, IndexArray]:
    """Put items into packs of equal number, the heaviest first into the lightest pack with room.

    Parameters
    ----------
    load : (n_rows, n_items)
        Load of each item; rows are independent.
    n_packs
        Packs; divides n_items.

    Returns
    -------
    pack, place : (n_rows, n_items)
        Pack of each item, and its place there. Ties go to the lower index.
    """
    n_rows, n_items = load.shape
    room = n_items // n_packs
    if room == 1:
        pack = np.broadcast_to(np.arange(n_items), load.shape).copy()
        return pack, np.zeros_like(pack)
    order = np.argsort(-load, axis=-1, kind="stable")
    sorted_load = np.take_along_axis(load, order, -1)
    rows = np.arange(n_rows)
    pack_load = np.zeros((n_rows, n_packs))
    n_in_pack = np.zeros((n_rows, n_packs), dtype=np.int64)
    pack = np.empty((n_rows, n_items), dtype=np.int64)
    place = np.empty_like(pack)
    for i in range(n_items):
        lightest = np.argmin(pack_load, axis=-1)
        pack[rows, order[:, i]] = lightest
        turn = n_in_pack[rows, lightest]
        place[rows, order[:, i]] = turn
        n_in_pack[rows, lightest] = turn + 1
        # A full pack weighs infinitely much from here on.
        pack_load[rows, lightest] += np.where(turn + 1 == room, np.inf, sorted_load[:, i])
    return pack, place


def replicate_experts(load: FloatArray, n_slots: int) -> tuple[IndexArray, IndexArray]:
    """Give each spare slot to the expert with the most load per replica.

    Parameters
    ----------
    load : (n_rows, n_experts)
        Load of each expert.
    n_slots
        Slots, at least n_experts.

    Returns
    -------
    expert : (n_rows, n_slots)
        Expert of each slot: all once, then the extra replicas in the order given out.
    n_replicas : (n_rows, n_experts)
        Slots of each expert.
    """
    n_rows, n_experts = load.shape
    expert = np.tile(np.arange(n_slots), (n_rows, 1))
    n_replicas = np.ones((n_rows, n_experts), dtype=np.int64)
    per_replica = load.copy()
    rows = np.arange(n_rows)
    for slot in range(n_experts, n_slots):
        busiest = np.argmax(per_replica, axis=-1)
        expert[:, slot] = busiest
        n_replicas[rows, busiest] += 1
        per_replica[rows, busiest] = load[rows, busiest] / n_replicas[rows, busiest]
    return expert, n_replicas


def rebalance_experts(
    load: FloatArray, n_slots: int, n_groups: int, n_nodes: int, n_ranks: int
) -> IndexArray:
    """Experts for all slots of a group: hierarchical where groups divide over nodes, else global.

    Parameters
    ----------
    load : (n_layers, n_experts)
        Load of each expert.
    n_slots, n_groups, n_nodes, n_ranks
        Slots (a multiple of ranks), expert groups, nodes, and ranks (a multiple of nodes).

    Returns
    -------
    (n_layers, n_slots)
        Expert in each slot, rank after rank.
    """
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    n_layers, n_experts = load.shape
    group_size = n_experts // n_groups
    on_node = n_experts // n_nodes
    by_group = load.reshape(n_layers, n_groups, group_size).sum(-1)
    node, place = balanced_packing(by_group, n_nodes)
    first = (node * (n_groups // n_nodes) + place) * group_size
    moved_to = (first[:, :, None] + np.arange(group_size)).reshape(n_layers, n_experts)
    moved_from = np.argsort(moved_to, axis=-1)
    # From here on every (layer, node) is a row of its own, with its experts renumbered from 0.
    load_on_node = np.take_along_axis(load, moved_from, -1).reshape(-1, on_node)
    expert, n_replicas = replicate_experts(load_on_node, n_slots // n_nodes)
    load_of_slot = np.take_along_axis(load_on_node / n_replicas, expert, -1)
    n_packs = n_ranks // n_nodes
    pack, place = balanced_packing(load_of_slot, n_packs)
    to_slot = pack * (n_slots // n_ranks) + place
    expert = np.take_along_axis(expert, np.argsort(to_slot, axis=-1), -1)
    expert = expert.reshape(n_layers, n_nodes, -1) + (np.arange(n_nodes) * on_node)[None, :, None]
    return np.take_along_axis(moved_from, expert.reshape(n_layers, n_slots), -1)
