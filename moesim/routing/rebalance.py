"""Placements that follow the load: what changes from one to the next, and the weights that have to move."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import LayoutError
from moesim.routing.eplb import replicate_experts
from moesim.routing.placement import Placement, check_slots, load_of
from moesim.routing.swaps import evened_by_swaps

__all__ = ["Moved", "aligned", "moved_experts", "rebalanced"]

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Moved:
    """Experts that ranks send and receive between two placements, over all layers: (n_ranks,) each."""

    received_near: IndexArray
    """From ranks of the own domain."""
    sent_near: IndexArray
    received_far: IndexArray
    """From other domains."""
    sent_far: IndexArray
    n_slots: int
    """Slots of the group, over all layers."""

    @property
    def n_moved(self) -> int:
        """Experts that come to a rank which had them not."""
        return int(self.received_near.sum() + self.received_far.sum())

    @property
    def fraction(self) -> float:
        """Share of all slots that are filled from another rank."""
        return self.n_moved / self.n_slots


def moved_experts(old: Placement, new: Placement, *, ranks_per_domain: int | None = None) -> Moved:
    """Count the experts that each rank has to fetch, and from where.

    Parameters
    ----------
    old, new
        Of the same group and layers.
    ranks_per_domain
        Ranks of one NVLink domain; all where None.

    Raises
    ------
    LayoutError
        If groups, experts or layers differ.

    Notes
    -----
    A rank keeps what it had, in whichever slot. What it lacks comes from a rank of its own domain if one holds
    it, else from one of another; of several, from the one that has sent least so far.
    """
    olds, news = _tables(old, new)
    n_ranks = old.n_ranks
    per_domain = min(ranks_per_domain or n_ranks, n_ranks)
    counts = np.zeros((4, n_ranks), dtype=np.int64)
    for before, after in zip(olds, news, strict=True):
        had = _held(before, n_ranks, old.n_experts)
        for rank, expert in np.argwhere(_held(after, n_ranks, old.n_experts) & ~had).tolist():
            holders = np.flatnonzero(had[:, expert])
            near = holders[holders // per_domain == rank // per_domain]
            level, among = (0, near) if near.size else (2, holders)
            source = among[np.argmin(counts[1, among] + counts[3, among])]
            counts[level, rank] += 1
            counts[level + 1, source] += 1
    return Moved(counts[0], counts[1], counts[2], counts[3], news.size)


def aligned(old: Placement, new: Placement, *, ranks_per_domain: int | None = None) -> Placement:
    """The new placement with its ranks renamed so that many experts stay where they were.

    Parameters
    ----------
    old, new, ranks_per_domain
        As in :func:`moved_experts`. Domains are renamed first, then ranks inside each: neither changes loads
        or which copies cross domains.

    Notes
    -----
    Pairs are taken greedily, those that share most experts first.
    """
    olds, news = _tables(old, new)
    n_ranks = old.n_ranks
    per_domain = min(ranks_per_domain or n_ranks, n_ranks)
    if n_ranks % per_domain:
        per_domain = n_ranks
    out = np.empty_like(news)
    for layer, (before, after) in enumerate(zip(olds, news, strict=True)):
        had = _held(before, n_ranks, old.n_experts).astype(np.int64)
        gets = _held(after, n_ranks, old.n_experts).astype(np.int64)
        domain = _matched(_by_domain(had, per_domain) @ _by_domain(gets, per_domain).T)
        rows = after.reshape(n_ranks, -1)
        for to, taken in enumerate(domain):
            own = slice(to * per_domain, (to + 1) * per_domain)
            theirs = slice(taken * per_domain, (taken + 1) * per_domain)
            out[layer].reshape(n_ranks, -1)[own] = rows[theirs][_matched(had[own] @ gets[theirs].T)]
    return Placement(n_ranks, new.n_experts, out, new.name)


def rebalanced(old: Placement, counts: ArrayLike) -> Placement:
    """Even loads again with few moves: change replicas where needed, then swap slots.

    Parameters
    ----------
    old
        Where experts are now.
    counts : (n_layers, n_experts)
        Load to follow.

    Raises
    ------
    LayoutError
        If the load is not of the placement's experts.
    """
    load = load_of(counts)
    if load.shape[1] != old.n_experts or len(old.slot_to_expert) not in (1, len(load)):
        raise LayoutError(f"load is of the placement's {old.n_experts} experts", value=load.shape)
    check_slots(old.n_experts, old.n_slots, old.n_ranks)
    table = np.broadcast_to(old.slot_to_expert, (len(load), old.n_slots)).copy()
    _, wanted = replicate_experts(load, old.n_slots)
    for row, target in zip(table, wanted, strict=True):
        _replace_replicas(row, target)
    per_slot = load / Placement(old.n_ranks, old.n_experts, table).n_replicas
    return Placement(old.n_ranks, old.n_experts, evened_by_swaps(table, per_slot, old.n_ranks), "rebalanced")


def _replace_replicas(row: IndexArray, wanted: IndexArray) -> None:
    """Give the slots of replicas that an expert has too many of to experts that have too few, in place."""
    surplus = np.bincount(row, minlength=wanted.size) - wanted
    free = [slot for slot in range(row.size - 1, -1, -1) if surplus[row[slot]] > 0]
    for expert in np.repeat(np.arange(wanted.size), np.maximum(-surplus, 0)):
        slot = next(one for one in free if surplus[row[one]] > 0)
        free.remove(slot)
        surplus[row[slot]] -= 1
        row[slot] = expert


def _tables(old: Placement, new: Placement) -> tuple[IndexArray, IndexArray]:
    if (old.n_ranks, old.n_experts, old.n_slots) != (new.n_ranks, new.n_experts, new.n_slots):
        raise LayoutError("two placements of one group have the same ranks, experts and slots")
    n_layers = max(len(old.slot_to_expert), len(new.slot_to_expert))
    tables = [one.slot_to_expert for one in (old, new)]
    if any(len(one) not in (1, n_layers) for one in tables):
        raise LayoutError("two placements of one group have the same layers")
    olds, news = (np.broadcast_to(one, (n_layers, old.n_slots)) for one in tables)
    return olds, news


def _held(row: IndexArray, n_ranks: int, n_experts: int) -> NDArray[np.bool_]:
    held = np.zeros((n_ranks, n_experts), dtype=bool)
    held[np.repeat(np.arange(n_ranks), row.size // n_ranks), row] = True
    return held


def _by_domain(held: IndexArray, per_domain: int) -> IndexArray:
    return np.asarray(held.reshape(-1, per_domain, held.shape[1]).sum(axis=1))


def _matched(overlap: IndexArray) -> IndexArray:
    """Column for each row, no column twice, large overlaps first: (n,)."""
    left = overlap.astype(np.int64).copy()
    column = np.empty(len(left), dtype=np.int64)
    for _ in range(len(left)):
        row, best = np.unravel_index(int(left.argmax()), left.shape)
        column[row] = best
        left[row, :] = -1
        left[:, best] = -1
    return column
