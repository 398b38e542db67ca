"""How many rows one expert takes, and what becomes of the copies beyond.

References
----------
Megatron-LM, ``megatron/core/transformer/moe/moe_utils.py`` (``get_capacity``, ``apply_router_token_dropping``);
Tutel, ``tutel/impls/fast_dispatch.py`` (``extract_critical``); MegaBlocks, ``megablocks/layers/moe.py``
(``parallel_forward_once``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import LayoutError
from moesim.routing.load import slots_of
from moesim.routing.overflow import (
    WEIGHT_BITS,
    Propose,
    RowShape,
    by_weight,
    chosen_by_experts,
    drawn_proposals,
    over_limit,
    place_elsewhere,
)
from moesim.routing.placement import Placement

__all__ = [
    "Assigned",
    "CapacityConvention",
    "CapacityLoss",
    "CapacityPolicy",
    "Overflow",
    "Padding",
    "RouterKind",
    "apply_capacity",
    "expert_capacity",
]

FloatArray = NDArray[np.float64]
CapacityConvention = Literal["megatron", "tutel", "megablocks"]
Overflow = Literal["drop-position", "drop-weight", "reroute"]
Padding = Literal["none", "capacity"]
RouterKind = Literal["top-k", "expert-choice"]


@dataclass(frozen=True)
class CapacityPolicy:
    """What an expert takes, and what becomes of the tokens beyond."""

    factor: float
    """Rows that an expert takes, over the mean."""
    convention: CapacityConvention = "megatron"
    """Whose rounding, and whose tokens share a capacity."""
    overflow: Overflow = "drop-position"
    """Which of an expert's tokens are beyond its capacity, and whether they go elsewhere."""
    padding: Padding = "none"
    """Whether every expert computes its capacity of rows."""
    router: RouterKind = "top-k"
    """Whether tokens choose experts, or experts tokens."""

    @property
    def per_source(self) -> bool:
        """Each source rank's tokens have a capacity of their own; else the group's tokens share one.

        Megatron and Tutel count before the exchange, each rank its own tokens; MegaBlocks after it.
        """
        return self.convention != "megablocks"

    @property
    def dropped_travel(self) -> bool:
        """MegaBlocks exchanges every copy and drops at the expert."""
        return not self.per_source and self.overflow != "reroute" and self.router == "top-k"

    @property
    def exchange_is_padded(self) -> bool:
        """A plain all-to-all carries whole buffers: Megatron's where it pads, Tutel's always does."""
        return self.padding == "capacity" and self.per_source

    def rows_per_slot(self, n_tokens: int, n_ranks: int, n_slots: int, top_k: int) -> int:
        """Rows that a slot takes of the tokens that share a capacity.

        Parameters
        ----------
        n_tokens
            Tokens on each rank.
        n_ranks
            Ranks of the group.
        n_slots
            Slots of the group, replicas included: each is an expert of its own.
        top_k
            Experts of each token.

        Notes
        -----
        MegaBlocks takes a capacity that rounds to 0 for none: every token fits.
        """
        together = np.asarray(float(n_tokens if self.per_source else n_tokens * n_ranks))
        rows = int(expert_capacity(together, n_slots, top_k, self.factor, self.convention))
        return rows or int(together) if self.convention == "megablocks" else rows


@dataclass(frozen=True, eq=False)
class CapacityLoss:
    """What a capacity does to the copies that a router asked for; arrays are (n_points,)."""

    dropped_fraction: FloatArray
    """Of (token, expert) pairs; where experts choose, of the pairs that tokens would have chosen."""
    dropped_weight_fraction: FloatArray | None
    """Of router weight; None where the source has no weights."""
    tokens_without_expert_fraction: FloatArray
    """Of (token, layer) pairs, those left without any expert."""
    rerouted_fraction: FloatArray
    """Of (token, expert) pairs, those that went to another expert than the router's."""
    padding_fraction: FloatArray
    """Of computed rows, those that hold no token."""
    imbalance_before_capacity: FloatArray
    """Busiest rank over the mean as the router asked, averaged over layers."""

    @classmethod
    def of_points(cls, points: Sequence[CapacityLoss]) -> CapacityLoss:
        """Several points' figures behind one another."""

        def joined(name: str) -> FloatArray:
            return np.concatenate([getattr(one, name) for one in points])

        weighed = all(one.dropped_weight_fraction is not None for one in points)
        return cls(
            joined("dropped_fraction"),
            joined("dropped_weight_fraction") if weighed else None,
            joined("tokens_without_expert_fraction"),
            joined("rerouted_fraction"),
            joined("padding_fraction"),
            joined("imbalance_before_capacity"),
        )

    def at(self, point: int) -> CapacityLoss:
        """One of several points."""
        weight = self.dropped_weight_fraction
        at = slice(point, point + 1)
        return CapacityLoss(
            self.dropped_fraction[at],
            None if weight is None else weight[at],
            self.tokens_without_expert_fraction[at],
            self.rerouted_fraction[at],
            self.padding_fraction[at],
            self.imbalance_before_capacity[at],
        )

    @classmethod
    def none(cls, imbalance: FloatArray) -> CapacityLoss:
        """Without a capacity nothing is lost; `imbalance` (n_points,) is as the router asked."""
        zeros = np.zeros_like(imbalance)
        return cls(zeros, zeros, zeros, zeros, zeros, imbalance)


def expert_capacity(
    n_tokens: FloatArray, n_experts: int, top_k: int, capacity_factor: float, convention: CapacityConvention
) -> FloatArray:
    """Rows that one expert takes.

    Parameters
    ----------
    n_tokens
        Tokens that are routed together.
    n_experts
        Slots that share them, replicas included.
    top_k
        Experts of each token.
    capacity_factor
        Rows over the mean.
    convention
        ``megatron``: ``ceil(n_tokens * top_k / n_experts * capacity_factor)``; ``tutel``:
        ``top_k * int(capacity_factor * ceil(n_tokens / n_experts))``; ``megablocks``:
        ``int(capacity_factor * top_k * n_tokens / n_experts)``.

    Raises
    ------
    LayoutError
        If the factor is negative or the convention is not known.

    References
    ----------
    Megatron-Core ``moe_utils.get_capacity``; Tutel ``extract_critical``; MegaBlocks ``ParallelMLP.expert_capacity``.
    """
    if not capacity_factor >= 0:
        raise LayoutError("a capacity factor is 0 or more", value=capacity_factor)
    if convention == "megatron":
        return np.asarray(np.ceil(n_tokens * top_k / n_experts * capacity_factor))
    if convention == "tutel":
        return np.asarray(top_k * np.floor(capacity_factor * np.ceil(n_tokens / n_experts)))
    if convention == "megablocks":
        return np.asarray(np.floor(capacity_factor * top_k * n_tokens / n_experts))
    raise LayoutError("unknown capacity convention", value=convention, fix="megatron, tutel or megablocks")


@dataclass(frozen=True, eq=False)
class Assigned:
    """Where a batch's copies end up."""

    slots: NDArray[np.uint16]
    """(n_planes, n_layers, n_ranks, n_tokens) slot of each copy; n_slots where there is none."""
    asked: NDArray[np.uint16]
    """(top_k, n_layers, n_ranks, n_tokens) slot that the router asked for."""
    dropped: NDArray[np.bool_]
    """(top_k, n_layers, n_ranks, n_tokens) the router's copies that no expert took."""
    rerouted: NDArray[np.bool_]
    """The same shape: copies that another expert took."""


def apply_capacity(
    ids: NDArray[Any],
    placement: Placement,
    policy: CapacityPolicy,
    *,
    limits: NDArray[Any] | None = None,
    weights: NDArray[np.float16] | None = None,
    next_ids: NDArray[Any] | None = None,
    popularity: FloatArray | None = None,
    rng: np.random.Generator | None = None,
) -> Assigned:
    """Keep, drop or reroute the copies of one batch.

    Parameters
    ----------
    ids : (n_layers, n_ranks, n_tokens, top_k)
        Logical experts, as :func:`moesim.routing.batches.draw_batch` gives them, preferred ones first.
    placement
        Experts in slots; the replicas of an expert take its copies in turn, and each has a capacity.
    policy
        What an expert takes, and what becomes of the rest.
    limits : (n_rows, n_slots), optional
        Copies that each slot takes of each row, instead of the policy's capacity. A row is a layer's tokens
        on one source rank, or on all ranks where the convention counts them together.
    weights : as `ids`, optional
        Router weights. Without them ``drop-weight`` drops by position.
    next_ids : (n_layers, n_ranks, n_tokens, n_more), optional
        Experts after the top_k, in order: where copies are rerouted to. Without them, experts are drawn.
    popularity : (n_layers, n_experts), optional
        What they are drawn by; even where it is not given.
    rng
        Source of randomness; a fixed one where it is not given.

    Returns
    -------
    Assigned
        Kept copies are those whose slot was asked for.

    Raises
    ------
    LayoutError
        If batch and placement disagree, or more than 65536 tokens share a capacity.

    Notes
    -----
    Position is the order of tokens, rank after rank; with Tutel all first choices stand before all second
    ones. By weight, the largest are kept; Tutel's batch-prioritised routing ranks tokens by their largest.
    Rerouted copies find what room is left when all first choices have been placed.
    """
    planes = np.ascontiguousarray(np.moveaxis(ids, -1, 0))
    heavy = None if weights is None else np.ascontiguousarray(np.moveaxis(weights, -1, 0))
    top_k, n_layers, n_ranks, n_tokens = planes.shape
    shape = RowShape(n_layers, n_ranks, n_tokens, policy.per_source, policy.convention == "tutel")
    if n_tokens * (1 if policy.per_source else n_ranks) > 2**16:
        raise LayoutError("at most 65536 tokens share a capacity in one draw", value=n_tokens)
    asked = slots_of(planes, placement)
    rng = rng or np.random.default_rng(0)
    capacity = policy.rows_per_slot(n_tokens, n_ranks, placement.n_slots, top_k)
    if policy.router == "expert-choice":
        taken, refused = chosen_by_experts(asked, heavy, capacity, placement.n_slots, shape, rng)
        return Assigned(taken, asked, refused, np.zeros_like(refused))
    most = capacity if limits is None else limits
    over = _over(asked, most, placement.n_slots, policy, heavy, shape)
    if policy.overflow != "reroute":
        return Assigned(_without(asked, over, placement.n_slots), asked, over, np.zeros_like(over))
    kept = _without(asked, over, placement.n_slots)
    room = np.asarray(most - shape.counts(kept, placement.n_slots), dtype=np.int64)
    flat = np.ones((n_layers, placement.n_experts)) if popularity is None else popularity
    rounds = (
        _drawn_rounds(flat, room, shape, placement, rng)
        if next_ids is None
        else _preferred_rounds(np.ascontiguousarray(np.moveaxis(next_ids, -1, 0)))
    )
    slots = asked.copy()
    went = place_elsewhere(planes, slots, over, room, shape, placement, rounds)
    dropped = over & ~went
    return Assigned(_without(slots, dropped, placement.n_slots), asked, dropped, went)


def _without(slots: NDArray[np.uint16], dropped: NDArray[np.bool_], n_slots: int) -> NDArray[np.uint16]:
    """The same slots, `n_slots` where a copy is dropped."""
    return np.maximum(slots, dropped * np.uint16(n_slots))


def _over(
    asked: NDArray[np.uint16],
    limits: NDArray[Any] | int,
    n_slots: int,
    policy: CapacityPolicy,
    weights: NDArray[np.float16] | None,
    shape: RowShape,
) -> NDArray[np.bool_]:
    """Copies beyond the limits: (top_k, n_layers, n_ranks, n_tokens)."""
    priority: NDArray[Any] | None = None
    bits = 0
    if policy.overflow == "drop-weight" and weights is not None:
        priority, bits = by_weight(weights), WEIGHT_BITS
        if shape.by_choice:  # first choices first, then the tokens of largest weight
            choice = np.arange(len(asked), dtype=np.uint32)[:, None, None, None]
            priority = (choice << np.uint32(WEIGHT_BITS)) | by_weight(weights.max(axis=0))
            bits += len(asked).bit_length()
        priority = shape.rows(priority)
    over = over_limit(shape.rows(asked), limits, n_slots, priority=priority, priority_bits=bits)
    return shape.planes(over)


_ATTEMPTS = 8
"""Experts that a copy is offered where its token's further preferences are not known."""


def _drawn_rounds(
    popularity: FloatArray,
    room: NDArray[Any],
    shape: RowShape,
    placement: Placement,
    rng: np.random.Generator,
) -> Iterator[Propose]:
    for _ in range(_ATTEMPTS):
        yield drawn_proposals(popularity, room, shape, placement, rng)


def _preferred_rounds(next_planes: NDArray[Any]) -> Iterator[Propose]:
    """Each proposal is the token's next expert that was not proposed yet."""
    wanted = next_planes.reshape(len(next_planes), int(np.prod(next_planes.shape[1:])))
    turn = np.zeros(wanted.shape[1], dtype=np.int64)

    def propose(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        now = turn[tokens]
        turn[tokens] = now + 1
        at = np.minimum(now, len(wanted) - 1)
        return np.where(now < len(wanted), wanted[at, tokens].astype(np.int64), -1)

    for _ in range(len(wanted)):
        yield propose
