"""Which rank holds which expert, replicas included.

Contiguous, round-robin, EPLB (see :mod:`moesim.routing.eplb`), balanced by swaps on top of it
(:mod:`moesim.routing.swaps`), by what is chosen together (:mod:`moesim.routing.coactivation`), or from a file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moesim.errors import LayoutError
from moesim.routing.coactivation import chosen_together, place_by_affinity, smoothed
from moesim.routing.eplb import rebalance_experts
from moesim.routing.swaps import evened_by_swaps

__all__ = [
    "Placement",
    "balanced",
    "coactivation",
    "contiguous",
    "eplb",
    "load_of",
    "read_placement",
    "round_robin",
]

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts in the slots of an expert-parallel group.

    Parameters
    ----------
    n_ranks
        Ranks of the group; each has the same number of slots.
    n_experts
        Logical experts per layer.
    slot_to_expert : (n_layers, n_slots)
        Logical expert in each slot; rank r holds slots r * slots_per_rank and on. One row serves all
        layers. Every expert stands in at least one slot.
    name
        How it was made.

    Raises
    ------
    LayoutError
        If slots do not divide over ranks, an id is out of range, or an expert has no slot.
    """

    n_ranks: int
    n_experts: int
    slot_to_expert: IndexArray
    name: str = "given"

    def __post_init__(self) -> None:
        table = np.asarray(self.slot_to_expert, dtype=np.int64)
        if table.ndim != 2 or table.size == 0:
            raise LayoutError("slot_to_expert is (n_layers, n_slots)", value=table.shape)
        object.__setattr__(self, "slot_to_expert", table)
        check_slots(self.n_experts, table.shape[1], self.n_ranks)
        if table.min() < 0 or table.max() >= self.n_experts:
            bad = int(table[(table < 0) | (table >= self.n_experts)][0])
            raise LayoutError(f"experts in a placement lie in 0..{self.n_experts - 1}", value=bad)
        absent = np.argwhere(self.n_replicas == 0)
        if absent.size:
            layer, expert = (int(v) for v in absent[0])
            rule = f"every expert has a slot in every layer (layer {layer} lacks it)"
            raise LayoutError(rule, value=expert, fix="give it one")

    @property
    def n_slots(self) -> int:
        """Expert slots of the whole group."""
        return int(self.slot_to_expert.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Expert slots on each rank."""
        return self.n_slots // self.n_ranks

    @property
    def n_redundant(self) -> int:
        """Slots beyond one per expert."""
        return self.n_slots - self.n_experts

    @cached_property
    def n_replicas(self) -> IndexArray:
        """Slots that hold each expert: (n_layers, n_experts)."""
        n_layers = self.slot_to_expert.shape[0]
        flat = (np.arange(n_layers)[:, None] * self.n_experts + self.slot_to_expert).ravel()
        return np.bincount(flat, minlength=n_layers * self.n_experts).reshape(n_layers, -1)

    @cached_property
    def replica_table(self) -> NDArray[np.uint16]:
        """Slot of an expert for the i-th token: (n_layers, n_experts, n_turns), taken at i % n_turns.

        Replicas take turns; n_turns is 1 without replicas, else their counts' least common multiple (up
        to 120, above which the split is even to a few percent).
        """
        counts = self.n_replicas
        n_turns = min(int(np.lcm.reduce(np.unique(counts))), 120)
        order = np.argsort(self.slot_to_expert, axis=-1, kind="stable")
        first = np.cumsum(counts, axis=-1) - counts
        turn = np.arange(n_turns)[None, None, :] % counts[:, :, None]
        at = (first[:, :, None] + turn).reshape(counts.shape[0], -1)
        return np.take_along_axis(order, at, -1).reshape(*counts.shape, n_turns).astype(np.uint16)

    def expand(self, per_expert: ArrayLike) -> NDArray[np.float64]:
        """Split a load per expert evenly over its replicas.

        Parameters
        ----------
        per_expert : (n_layers, n_experts)
            Any additive load.

        Returns
        -------
        (n_layers, n_ranks, slots_per_rank)
            Load of each slot.
        """
        load = np.asarray(per_expert, dtype=np.float64) / self.n_replicas
        table = np.broadcast_to(self.slot_to_expert, (load.shape[0], self.n_slots))
        return np.take_along_axis(load, table, -1).reshape(load.shape[0], self.n_ranks, -1)

    def rank_load(self, per_expert: ArrayLike) -> NDArray[np.float64]:
        """Load of each rank, (n_layers, n_ranks), from a load per expert (n_layers, n_experts)."""
        return np.asarray(self.expand(per_expert).sum(-1))


def check_slots(n_experts: int, n_slots: int, n_ranks: int) -> None:
    """Refuse slots that do not divide over ranks or cannot hold every expert.

    Raises
    ------
    LayoutError
        Naming the number of redundant experts that would do.
    """
    if n_ranks < 1:
        raise LayoutError("an expert-parallel group has at least one rank", value=n_ranks)
    if n_slots < n_experts:
        raise LayoutError(f"slots hold every one of the {n_experts} experts", value=n_slots)
    if n_slots % n_ranks:
        fix = f"n_redundant={n_slots - n_experts + -n_slots % n_ranks}"
        raise LayoutError(f"expert slots divide over ep={n_ranks}", value=n_slots, fix=fix)


def contiguous(n_experts: int, n_ranks: int, n_redundant: int = 0) -> Placement:
    """Experts in order, the first ones on rank 0; spare slots repeat the experts from 0 on.

    Parameters
    ----------
    n_experts, n_ranks
        Logical experts per layer; ranks of the group.
    n_redundant
        Spare slots.

    Raises
    ------
    LayoutError
        If slots do not divide over ranks.
    """
    n_slots = n_experts + n_redundant
    check_slots(n_experts, n_slots, n_ranks)
    return Placement(n_ranks, n_experts, (np.arange(n_slots) % n_experts)[None, :], "contiguous")


def round_robin(n_experts: int, n_ranks: int, n_redundant: int = 0) -> Placement:
    """Experts dealt out one by one: expert e on rank e % n_ranks.

    Parameters and errors as for :func:`contiguous`.
    """
    n_slots = n_experts + n_redundant
    check_slots(n_experts, n_slots, n_ranks)
    dealt = np.arange(n_slots).reshape(-1, n_ranks).T.ravel() % n_experts
    return Placement(n_ranks, n_experts, dealt[None, :], "round_robin")


def balanced(counts: ArrayLike, n_ranks: int, n_redundant: int = 0) -> Placement:
    """Even rank loads as far as slots allow: EPLB's replicas and greedy packing, then swaps.

    Parameters
    ----------
    counts : (n_layers, n_experts)
        Load of each expert.
    n_ranks
        Ranks of the group.
    n_redundant
        Spare slots, which hold further replicas of the busiest experts.

    Raises
    ------
    LayoutError
        If slots do not divide over ranks.

    Notes
    -----
    The busiest rank of a layer is never busier than with :func:`eplb` and its global policy. Nodes and expert
    groups are not looked at.
    """
    load = load_of(counts)
    check_slots(load.shape[1], load.shape[1] + n_redundant, n_ranks)
    begun = rebalance_experts(load, load.shape[1] + n_redundant, 1, 1, n_ranks)
    per_slot = load / Placement(n_ranks, load.shape[1], begun).n_replicas
    return Placement(n_ranks, load.shape[1], evened_by_swaps(begun, per_slot, n_ranks), "balanced")


def coactivation(
    ids: NDArray[Any],
    counts: ArrayLike,
    *,
    n_slots: int,
    n_ranks: int,
    n_nodes: int,
    n_groups: int = 1,
    most_load: float = 1.05,
) -> Placement:
    """Experts that tokens choose together on one node, so that fewer copies leave it; loads kept even.

    Parameters
    ----------
    ids : (n_tokens, n_layers, top_k)
        Experts of tokens: who is chosen together.
    counts : (n_layers, n_experts)
        Load of each expert.
    n_slots, n_ranks, n_nodes
        Slots of the group, its ranks and nodes.
    n_groups
        Groups of consecutive experts that the router looks at; they need not divide over nodes.
    most_load
        Load that a node may have over the mean: more of it buys less traffic.

    Raises
    ------
    LayoutError
        If slots do not divide over ranks or ranks over nodes, or the tokens have other layers than the counts.

    Notes
    -----
    Looks at pairs of experts, and at nodes, not at ranks inside a node. Some seconds for 58 layers of 256 experts.
    """
    load = load_of(counts)
    n_experts = load.shape[1]
    check_slots(n_experts, n_slots, n_ranks)
    if n_nodes < 1 or n_ranks % n_nodes:
        raise LayoutError(f"ranks divide over nodes={n_nodes}", value=n_ranks, fix="a divisor of ep")
    if ids.ndim != 3 or ids.shape[1] != len(load):
        raise LayoutError(f"tokens are (n_tokens, {len(load)} layers, top_k)", value=ids.shape)
    table = place_by_affinity(
        smoothed(chosen_together(ids, n_experts), n_groups),
        load,
        n_slots=n_slots,
        n_ranks=n_ranks,
        n_nodes=n_nodes,
        most_load=most_load,
    )
    return Placement(n_ranks, n_experts, table, "coactivation")


def eplb(counts: ArrayLike, *, n_slots: int, n_ranks: int, n_groups: int = 1, n_nodes: int = 1) -> Placement:
    """DeepSeek's expert-parallel load balancer: replicate the busiest experts, pack them evenly.

    Parameters
    ----------
    counts : (n_layers, n_experts)
        Load of each expert.
    n_slots
        Expert slots of the whole group, replicas included.
    n_ranks
        Ranks of the group.
    n_groups, n_nodes
        Expert groups and nodes; where groups divide over nodes a group stays on one node, else the
        global policy is used.

    Raises
    ------
    LayoutError
        If slots do not divide over ranks, ranks over nodes, or experts over groups.

    References
    ----------
    DeepSeek-AI, EPLB, https://github.com/deepseek-ai/EPLB.
    """
    load = load_of(counts)
    n_experts = load.shape[1]
    check_slots(n_experts, n_slots, n_ranks)
    if n_groups < 1 or n_nodes < 1 or n_ranks % n_nodes:
        raise LayoutError(f"ranks divide over nodes={n_nodes}", value=n_ranks, fix="a divisor of ep")
    if n_experts % n_groups:
        raise LayoutError(f"experts divide over n_groups={n_groups}", value=n_experts)
    table = rebalance_experts(load, n_slots, n_groups, n_nodes, n_ranks)
    return Placement(n_ranks, n_experts, table, "eplb")


def load_of(counts: ArrayLike) -> NDArray[np.float64]:
    """Loads (n_layers, n_experts), refused where they are none."""
    load = np.asarray(counts, dtype=np.float64)
    if load.ndim != 2 or load.size == 0:
        raise LayoutError("load is (n_layers, n_experts)", value=load.shape)
    if not np.isfinite(load).all() or load.min() < 0:
        raise LayoutError("load is finite and not negative")
    return load


def read_placement(path: str | Path, *, n_experts: int, n_ranks: int) -> Placement:
    """Read ``physical_to_logical_map`` from a YAML or JSON file, as SGLang's --init-expert-location has it.

    Parameters
    ----------
    path
        File; the map is (n_slots) for all layers or (n_layers, n_slots).
    n_experts, n_ranks
        Logical experts per layer; ranks of the group.

    Raises
    ------
    LayoutError
        If the file is absent, is no such map, or the map does not fit the group.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        data: Any = json.loads(text) if file.suffix == ".json" else YAML(typ="safe", pure=True).load(text)
        table = np.asarray(data["physical_to_logical_map"])
    except OSError:
        raise LayoutError("no such placement file", fix="check the path", place=str(file)) from None
    except (ValueError, KeyError, TypeError, YAMLError):
        rule = "states physical_to_logical_map: a list of expert ids, or one list per layer"
        raise LayoutError(rule, place=str(file)) from None
    if table.dtype.kind not in "ui" or table.ndim not in (1, 2):
        raise LayoutError("physical_to_logical_map is whole numbers, (n_layers, n_slots)", place=str(file))
    try:
        return Placement(n_ranks, n_experts, np.atleast_2d(table), "given")
    except LayoutError as error:
        raise error.at(str(file)) from None
