"""Copies beyond a limit: found, sent elsewhere, or never asked for because experts choose.

A *row* is a set of tokens that share a limit: those of one layer on one source rank, or of one layer on all
ranks. Every function works on all rows at once; slots are numbered through, and `n_slots` stands for none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.placement import Placement

__all__ = [
    "WEIGHT_BITS",
    "RowShape",
    "by_weight",
    "chosen_by_experts",
    "drawn_proposals",
    "over_limit",
    "place_elsewhere",
]

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]
Propose = Callable[[IndexArray], IndexArray]
"""Experts that tokens (flat indices) try next; -1 = none is left."""

WEIGHT_BITS = 15
"""Bits of a priority made of a router's weight."""


@dataclass(frozen=True)
class RowShape:
    """How planes (n_planes, n_layers, n_ranks, n_tokens) are cut into rows."""

    n_layers: int
    n_ranks: int
    n_tokens: int
    per_source: bool
    """One row a source rank, else one for all ranks."""
    by_choice: bool = False
    """All first choices stand before all second ones, else a token's choices stand together."""

    @property
    def n_rows(self) -> int:
        """Rows of all layers."""
        return self.n_layers * (self.n_ranks if self.per_source else 1)

    @property
    def layer_of_row(self) -> IndexArray:
        """(n_rows,) layer of each."""
        return np.repeat(np.arange(self.n_layers), self.n_rows // self.n_layers)

    def rows(self, planes: NDArray[Any]) -> NDArray[Any]:
        """(n_rows, n_items): items in the order in which places are given out."""
        axes = (1, 2, 0, 3) if self.by_choice else (1, 2, 3, 0)
        return np.ascontiguousarray(planes.transpose(axes)).reshape(self.n_rows, -1)

    def planes(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Undo `rows`."""
        lead = (self.n_layers, self.n_ranks)
        if self.by_choice:
            return np.ascontiguousarray(rows.reshape(*lead, -1, self.n_tokens).transpose(2, 0, 1, 3))
        return np.ascontiguousarray(rows.reshape(*lead, self.n_tokens, -1).transpose(3, 0, 1, 2))

    def counts(self, slots: NDArray[Any], n_slots: int) -> FloatArray:
        """Copies of each row and slot, (n_rows, n_slots), of slots (n_planes, n_layers, n_ranks, n_tokens)."""
        first = np.repeat(np.arange(self.n_rows) * (n_slots + 1), slots[0].size // self.n_rows)
        total = np.zeros(self.n_rows * (n_slots + 1), dtype=np.int64)
        for plane in slots:
            total += np.bincount(first + plane.ravel(), minlength=total.size)
        return total.reshape(self.n_rows, -1)[:, :n_slots].astype(np.float64)

    def row_of_token(self, token: IndexArray) -> IndexArray:
        """Row of a token by its flat index over layers, ranks and tokens."""
        return token // (self.n_tokens * (1 if self.per_source else self.n_ranks))


def over_limit(
    slots: NDArray[Any],
    limits: NDArray[Any] | int,
    n_slots: int,
    *,
    priority: NDArray[Any] | None = None,
    priority_bits: int = 0,
) -> BoolArray:
    """Items beyond their slot's limit, in the order of `priority`, then of their place in the row.

    Parameters
    ----------
    slots : (n_rows, n_items)
        Slot that each item asks for.
    limits : (n_rows, n_slots) or int
        Items that a slot takes of a row.
    n_slots
        Slots; this value asks for none.
    priority : (n_rows, n_items), optional
        The least is served first.
    priority_bits
        Bits that hold every priority.

    Returns
    -------
    (n_rows, n_items)
        True for items that find no place.
    """
    n_rows, n_items = slots.shape
    place_bits = max(1, (n_items - 1).bit_length())
    below = place_bits + priority_bits
    wide = n_slots.bit_length() + below > 32
    key = slots.astype(np.uint64 if wide else np.uint32)
    if priority is not None:
        key = (key << np.array(priority_bits, key.dtype)) | priority.astype(key.dtype)
    key = (key << np.array(place_bits, key.dtype)) | np.arange(n_items, dtype=key.dtype)
    key.sort(axis=-1)
    beyond = _beyond((key >> np.array(below, key.dtype)).astype(np.uint16), limits, n_slots)
    flat = np.flatnonzero(beyond)
    place = key.ravel()[flat] & np.array((1 << place_bits) - 1, key.dtype)
    out = np.zeros(n_rows * n_items, dtype=bool)
    out[flat // n_items * n_items + place.astype(np.intp)] = True
    return out.reshape(n_rows, n_items)


def _beyond(slot: NDArray[np.uint16], limits: NDArray[Any] | int, n_slots: int) -> BoolArray:
    """Which items of sorted rows come after as many of the same slot as it takes."""
    n_rows, n_items = slot.shape
    beyond = np.zeros(slot.shape, dtype=bool)
    if isinstance(limits, int):
        if limits == 0:
            np.less(slot, n_slots, out=beyond)
        elif limits < n_items:  # the item that stands `limits` before has the same slot
            same = np.equal(slot[:, limits:], slot[:, :-limits], out=beyond[:, limits:])
            same &= slot[:, limits:] < n_slots
        return beyond
    at = np.arange(n_items, dtype=np.int32)
    first = np.zeros(slot.shape, dtype=np.int32)
    np.copyto(first[:, 1:], at[1:], where=slot[:, 1:] != slot[:, :-1])
    turn = at - np.maximum.accumulate(first, axis=-1)
    padded = np.append(limits, np.full((n_rows, 1), n_items, dtype=limits.dtype), axis=-1)
    return np.asarray(turn >= np.take_along_axis(padded, slot.astype(np.intp), -1))


def drawn_proposals(
    popularity: FloatArray, room: IndexArray, shape: RowShape, placement: Placement, rng: np.random.Generator
) -> Propose:
    """Propose experts drawn by popularity among those that have room now.

    Parameters
    ----------
    popularity : (n_layers, n_experts)
        Weight of each expert.
    room : (n_rows, n_slots)
        Items that slots still take.
    shape, placement, rng
        Rows; experts in slots; source of randomness.
    """
    open_ = np.zeros((shape.n_rows, placement.n_experts), dtype=bool)
    layers = shape.layer_of_row
    for replica in range(int(placement.n_replicas.max())):
        # the replica-th slot of each expert, or its first again
        slot = placement.replica_table[:, :, min(replica, placement.replica_table.shape[-1] - 1)]
        slot = np.broadcast_to(slot, (shape.n_layers, placement.n_experts))[layers].astype(np.intp)
        open_ |= np.take_along_axis(room, slot, -1) > 0
    summed = np.cumsum(np.maximum(popularity, 1e-12)[layers] * open_, axis=-1)
    total = summed[:, -1]
    edges = (summed / np.maximum(total, 1e-300)[:, None] + np.arange(shape.n_rows)[:, None]).ravel()

    def propose(tokens: IndexArray) -> IndexArray:
        row = shape.row_of_token(tokens)
        at = np.searchsorted(edges, row + rng.random(tokens.size), side="right") - row * placement.n_experts
        return np.where(total[row] > 0, np.minimum(at, placement.n_experts - 1), -1)

    return propose


def place_elsewhere(
    planes: NDArray[Any],
    slots: NDArray[np.uint16],
    over: BoolArray,
    room: IndexArray,
    shape: RowShape,
    placement: Placement,
    rounds: Iterable[Propose],
) -> BoolArray:
    """Send copies that found no place to other experts, as far as these have room.

    Parameters
    ----------
    planes : (top_k, n_layers, n_ranks, n_tokens)
        Expert of each copy.
    slots : (top_k, n_layers, n_ranks, n_tokens)
        Slot of each copy; changed where a copy goes elsewhere.
    over : (top_k, n_layers, n_ranks, n_tokens)
        Copies without a place.
    room : (n_rows, n_slots)
        Items that slots still take; what is placed is taken off.
    shape, placement
        Rows; experts in slots.
    rounds
        What proposes experts in each round; made when the round begins.

    Returns
    -------
    (top_k, n_layers, n_ranks, n_tokens)
        Copies that went elsewhere.

    Notes
    -----
    In a round the first choices that wait propose, then the second ones, and so on. An expert that its token has
    already is passed over; among those that propose one slot the first tokens are served.
    """
    top_k = planes.shape[0]
    ids, at_slot, waits = (
        planes.reshape(top_k, -1).copy(),
        slots.reshape(top_k, -1),
        over.reshape(top_k, -1).copy(),
    )
    went = np.zeros_like(waits)
    table = placement.replica_table
    n_turns = table.shape[-1]
    free = room.reshape(-1)
    for propose in rounds:
        for choice in range(top_k):
            token = np.flatnonzero(waits[choice])
            expert = propose(token)
            new = (expert >= 0) & (ids[:, token] != expert).all(axis=0)
            token, expert = token[new], expert[new]
            rank, place = token // shape.n_tokens % shape.n_ranks, token % shape.n_tokens
            layer = token // (shape.n_tokens * shape.n_ranks) if table.shape[0] > 1 else 0
            slot = table[layer, expert, (rank + place) % n_turns]
            group = shape.row_of_token(token) * placement.n_slots + slot
            served = _served(group, free)
            token, expert, slot = token[served], expert[served], slot[served]
            ids[choice, token], at_slot[choice, token] = expert, slot
            waits[choice, token], went[choice, token] = False, True
        if not waits.any():
            break
    return went.reshape(over.shape)


def _served(group: IndexArray, free: IndexArray) -> IndexArray:
    """Indices of those that find a place of their group's, first come first served; places are taken off."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    at = np.arange(ordered.size)
    first = np.zeros(ordered.size, dtype=np.int64)
    np.copyto(first[1:], at[1:], where=ordered[1:] != ordered[:-1])
    fits = at - np.maximum.accumulate(first) < free[ordered]
    np.subtract.at(free, ordered[fits], 1)
    return order[fits]


def chosen_by_experts(
    slots: NDArray[np.uint16],
    weights: NDArray[np.float16] | None,
    n_taken: int,
    n_slots: int,
    shape: RowShape,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint16], BoolArray]:
    """Every slot takes exactly `n_taken` tokens of a row (or all of them, where there are fewer).

    Parameters
    ----------
    slots, weights : (top_k, n_layers, n_ranks, n_tokens)
        What tokens would have chosen, and the router's weight of it.
    n_taken
        Tokens of a slot and row.
    n_slots, shape, rng
        Slots; rows; source of randomness.

    Returns
    -------
    taken : (n_planes, n_layers, n_ranks, n_tokens)
        Slots that each token is taken by; `n_slots` where there is none.
    refused : (top_k, n_layers, n_ranks, n_tokens)
        Tokens' own choices that did not come about.

    Notes
    -----
    Of the router's scores only each token's largest are known. A slot takes first the tokens that chose it,
    the heaviest first (or the first), then tokens at random: assumed.
    """
    top_k = slots.shape[0]
    n_row_tokens = shape.n_tokens * (1 if shape.per_source else shape.n_ranks)
    own = slots.reshape(top_k, shape.n_rows, n_row_tokens)
    rank = None if weights is None else by_weight(weights).reshape(own.shape)
    per_layer = shape.n_rows // shape.n_layers
    refused = np.empty(own.shape, dtype=bool)
    found: list[NDArray[np.uint16]] = []
    for first in range(0, shape.n_rows, per_layer):
        rows = slice(first, first + per_layer)
        own_rank = None if rank is None else rank[:, rows]
        held = _taken(own[:, rows], own_rank, min(n_taken, n_row_tokens), n_slots, rng)
        for choice, one in enumerate(own[:, rows]):
            refused[choice, rows] = ~np.take_along_axis(held, one[..., None].astype(np.intp), -1)[..., 0]
        found.append(_as_planes(held.reshape(-1, n_slots)))
    n_planes = max(1, *(len(one) for one in found))
    taken = np.full((n_planes, shape.n_layers, found[0].shape[1]), n_slots, dtype=np.uint16)
    for layer, one in enumerate(found):
        taken[: len(one), layer] = one
    return taken.reshape(-1, *slots.shape[1:]), refused.reshape(slots.shape)


def _as_planes(held: BoolArray) -> NDArray[np.uint16]:
    """Slots of each token, one below the other, then none: (most, n_tokens) of (n_tokens, n_slots)."""
    n_tokens, n_slots = held.shape
    token, slot = np.nonzero(held)
    count = np.bincount(token, minlength=n_tokens)
    turn = np.arange(token.size) - np.repeat(np.cumsum(count) - count, count)
    planes = np.full((int(count.max()), n_tokens), n_slots, dtype=np.uint16)
    planes[turn, token] = slot
    return planes


def _taken(
    own: NDArray[np.uint16], rank: NDArray[Any] | None, n_taken: int, n_slots: int, rng: np.random.Generator
) -> BoolArray:
    """Which tokens one layer's slots take: (n_rows, n_tokens, n_slots); `own` is (top_k, n_rows, n_tokens)."""
    _, n_rows, n_tokens = own.shape
    # who did not choose the slot stands behind all who did, in random order
    key = rng.integers(0, 1 << 32, (n_rows, n_slots, n_tokens), dtype=np.uint32) >> np.uint32(17)
    key |= np.uint32(1 << 15)
    row, token = np.arange(n_rows)[:, None], np.arange(n_tokens)[None, :]
    for choice, slot in enumerate(own):
        key[row, slot, token] = 0 if rank is None else rank[choice]
    key = (key << np.uint32(16)) | np.arange(n_tokens, dtype=np.uint32)
    out = np.zeros((n_rows, n_slots, n_tokens), dtype=bool)
    if n_taken == 0:
        return out.transpose(0, 2, 1)
    first = np.partition(key, n_taken - 1, axis=-1)[..., :n_taken] & np.uint32(0xFFFF)
    np.put_along_axis(out, first.astype(np.intp), True, -1)
    return out.transpose(0, 2, 1)


def by_weight(weights: NDArray[np.float16]) -> NDArray[np.uint16]:
    """Priorities that rank the largest weight first: bits of a float16 from 0 up ascend as the number does."""
    return np.uint16(0x7FFF) - np.abs(np.maximum(weights, np.float16(0))).view(np.uint16)
