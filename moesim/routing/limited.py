"""Loads of batches whose experts have a capacity: what is kept, dropped, rerouted or padded, from one draw.

Every size is counted on its own, as a larger batch has a larger capacity and so keeps other copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.batches import Phase, RoutingSource, draw_batch, draw_weights, inclusion
from moesim.routing.capacity import Assigned, CapacityLoss, CapacityPolicy, apply_capacity
from moesim.routing.load import (
    CodedBatch,
    Exchange,
    ExchangeKind,
    Traffic,
    encode_slots,
    exchange_counts,
    slots_of,
)
from moesim.routing.marginals import all_exchanges
from moesim.routing.overflow import RowShape
from moesim.routing.placement import Placement
from moesim.routing.synthetic import RoutingShape

__all__ = ["Draw", "Limited", "extrapolated", "limited", "limited_traffic"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Draw:
    """The one draw behind the loads of all sizes."""

    source: RoutingSource
    shape: RoutingShape
    placement: Placement
    phase: Phase
    ranks_per_domain: int | None
    seed: int
    cap: int
    """Tokens drawn for each rank."""

    def ids(self) -> NDArray[np.uint16]:
        """(n_layers, n_ranks, cap, top_k) experts."""
        return draw_batch(self.source, self.shape, rng=self._rng(), **self._sizes)

    def weights(self) -> NDArray[np.float16] | None:
        """Router weights of `ids`; None where the source has none."""
        return draw_weights(self.source, self.shape, rng=self._rng(), **self._sizes)

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.placement.n_ranks, self.cap])

    @property
    def _sizes(self) -> dict[str, Any]:
        return {"n_ranks": self.placement.n_ranks, "n_tokens": self.cap, "phase": self.phase}


@dataclass(frozen=True, eq=False)
class Limited:
    """Load of one size under a capacity."""

    slots: FloatArray
    """(n_layers, n_ranks, slots_per_rank) rows that each slot computes, padding included."""
    exchanges: dict[ExchangeKind, Exchange]
    """Copies that travel, each (n_layers, n_ranks)."""
    padded: Exchange | None
    """The same where an all-to-all carries whole buffers, full or not; None where none does."""
    loss: CapacityLoss
    """Of this one point: arrays are (1,)."""


@lru_cache(maxsize=128)
def limited(draw: Draw, policy: CapacityPolicy, n_tokens: int) -> Limited:
    """Load of one size.

    Parameters
    ----------
    draw
        What is drawn.
    policy
        What an expert takes.
    n_tokens
        Tokens on each rank. Beyond `draw.cap`, the copies that each row asks of each slot are extrapolated
        first and limited then; the copies that travel are those drawn, thinned to the same shares.
    """
    one = _assign(draw, policy, n_tokens)
    coded = _coded(one, draw, policy)
    exchanges = {
        kind: Exchange(x.sent_nvlink[0], x.received_nvlink[0], x.sent_nic[0], x.received_nic[0]).scaled(
            one.growth
        )
        for kind, x in all_exchanges(coded, ranks_per_domain=draw.ranks_per_domain).items()
    }
    padded = None
    if policy.exchange_is_padded:
        buffers = _buffers(draw, one.most)
        whole = exchange_counts(
            Traffic(buffers, buffers, buffers), "per_assignment", ranks_per_domain=draw.ranks_per_domain
        )
        padded = whole.scaled(np.ones((draw.shape.n_layers, 1)))
    slots = one.computed.reshape(draw.shape.n_layers, draw.placement.n_ranks, -1)
    return Limited(slots, exchanges, padded, one.loss)


def limited_traffic(draw: Draw, policy: CapacityPolicy, n_tokens: int) -> Traffic:
    """Who sends to whom: (n_layers, n_ranks, n_ranks) copies of the draw behind `limited`.

    Where an all-to-all carries whole buffers, `assignments` are these.
    """
    one = _assign(draw, policy, n_tokens)
    found = _coded(one, draw, policy).traffic()
    pairs = np.asarray(found.assignments[0] * one.growth)
    if policy.exchange_is_padded:
        pairs = np.broadcast_to(_buffers(draw, one.most), pairs.shape)
    per_rank, per_node = (
        np.asarray(one.growth * x[0]) for x in (found.copies_per_rank, found.copies_per_node)
    )
    return Traffic(per_rank, per_node, pairs)


@dataclass(frozen=True, eq=False)
class _One:
    found: Assigned
    """Of the tokens drawn."""
    most: int
    """Rows that a slot takes of a row."""
    growth: float
    """Copies at the size asked for, over those in `found`."""
    computed: FloatArray
    """(n_layers, n_slots) rows, padding included."""
    loss: CapacityLoss


def _assign(draw: Draw, policy: CapacityPolicy, n_tokens: int) -> _One:
    placement, shape = draw.placement, draw.shape
    n_ranks, n_slots = placement.n_ranks, placement.n_slots
    drawn = min(n_tokens, draw.cap)
    ids, weights = draw.ids()[:, :, :drawn], draw.weights()
    weights = None if weights is None else weights[:, :, :drawn]
    rng = np.random.default_rng([draw.seed, n_ranks, n_tokens, 3])
    most = policy.rows_per_slot(n_tokens, n_ranks, n_slots, shape.top_k)
    growth = n_tokens / drawn
    limits, demand = None, None
    own = RowShape(shape.n_layers, n_ranks, drawn, policy.per_source)
    if n_tokens > drawn:
        asked = own.counts(slots_of(np.ascontiguousarray(np.moveaxis(ids, -1, 0)), placement), n_slots)
        demand = _wanted(draw, asked, own, n_tokens)
        limits = _drawn_limits(asked, demand, most, growth, policy, rng)
    popularity = inclusion(draw.source, shape)
    found = apply_capacity(
        ids, placement, policy, limits=limits, weights=weights, popularity=popularity, rng=rng
    )
    choosing = policy.router == "expert-choice"
    if choosing:
        growth = most / max(policy.rows_per_slot(drawn, n_ranks, n_slots, shape.top_k), 1)
    wanted, rows, rerouted = _rows(found, demand, most, growth, own, n_slots, choosing=choosing)
    computed = rows
    if policy.padding == "capacity":
        # MegaBlocks pads to the busiest expert where nothing limits it
        free = policy.convention == "megablocks" and most == n_tokens * n_ranks
        whole = rows.max(axis=1, keepdims=True) if free else float(most * own.n_rows // shape.n_layers)
        computed = np.broadcast_to(whole, rows.shape)
    loss = _loss(found, weights, wanted, rows, computed, rerouted, n_ranks, policy)
    return _One(found, most, growth, computed, loss)


def _rows(
    found: Assigned,
    demand: FloatArray | None,
    most: int,
    growth: float,
    own: RowShape,
    n_slots: int,
    *,
    choosing: bool,
) -> tuple[FloatArray, FloatArray, float]:
    """Rows that slots were asked for, and those they take, at the size asked for; share of copies rerouted.

    (n_layers, n_slots) each. `demand` (n_rows, n_slots) is what rows ask of slots, where not all tokens were drawn.
    Where a row's rerouted copies go is as in the draw; how many there are is what that row's demand leaves over,
    as the draw's own spread is wider.
    """
    by_layer = RowShape(own.n_layers, own.n_ranks, own.n_tokens, per_source=False)
    wanted = by_layer.counts(found.asked, n_slots) if demand is None else _summed(demand, own.n_layers)
    if demand is None or choosing:
        return wanted, by_layer.counts(found.slots, n_slots) * growth, float(found.rerouted.mean())
    kept = np.minimum(demand, most)
    over = (demand - kept).sum(axis=1, keepdims=True)
    if found.rerouted.any():
        moved = own.counts(np.where(found.rerouted, found.slots, np.uint16(n_slots)), n_slots) * growth
        moved = moved * np.minimum(over / np.maximum(moved.sum(axis=1, keepdims=True), 1e-12), 1.0)
        taken = np.minimum(kept + moved, most)
        return wanted, _summed(taken, own.n_layers), float((taken - kept).sum() / demand.sum())
    return wanted, _summed(kept, own.n_layers), 0.0


def _summed(by_row: FloatArray, n_layers: int) -> FloatArray:
    """Rows of one layer added up: (n_layers, n_slots)."""
    return np.asarray(by_row.reshape(n_layers, -1, by_row.shape[1]).sum(axis=1))


def _wanted(draw: Draw, asked: FloatArray, own: RowShape, n_tokens: int) -> FloatArray:
    """Copies that rows ask of slots at `n_tokens` a rank, from those of the draw: (n_rows, n_slots)."""
    n_layers, n_slots = draw.shape.n_layers, draw.placement.n_slots
    expected = draw.placement.expand(inclusion(draw.source, draw.shape)).reshape(n_layers, n_slots)
    expected = expected[own.layer_of_row] * (1 if own.per_source else own.n_ranks)
    return extrapolated(asked[:, None], expected[:, None], draw.cap, n_tokens)[:, 0]


def _drawn_limits(
    asked: FloatArray,
    wanted: FloatArray,
    most: int,
    growth: float,
    policy: CapacityPolicy,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Copies to keep of those drawn, so that shares are as at the larger size; a broken copy is kept by chance."""
    kept = asked * np.minimum(most / np.maximum(wanted, 1e-12), 1.0)
    if policy.overflow == "reroute":
        kept = kept + np.maximum(most - wanted, 0.0) / growth
    return np.floor(kept + rng.random(kept.shape)).astype(np.int64)


def _loss(
    found: Assigned,
    weights: NDArray[np.float16] | None,
    wanted: FloatArray,
    rows: FloatArray,
    computed: FloatArray,
    rerouted: float,
    n_ranks: int,
    policy: CapacityPolicy,
) -> CapacityLoss:
    refused = float(found.dropped.mean())
    dropped = refused if policy.router == "expert-choice" else 1.0 - rows.sum() / wanted.sum()
    lost: float | None = None
    if weights is not None:
        heavy = np.moveaxis(weights, -1, 0).astype(np.float32)
        lost = float(heavy[found.dropped].sum() / heavy.sum())
    by_rank = wanted.reshape(len(wanted), n_ranks, -1).sum(axis=-1)
    n_slots = wanted.shape[1]
    figures = (
        max(dropped, 0.0),
        float((found.slots == n_slots).all(axis=0).mean()),
        rerouted,
        1.0 - rows.sum() / computed.sum() if computed.any() else 0.0,
        float((by_rank.max(axis=-1) / by_rank.mean(axis=-1)).mean()),
    )
    columns = [np.array([one]) for one in figures]
    return CapacityLoss(columns[0], None if lost is None else np.array([lost]), *columns[1:])


def _coded(one: _One, draw: Draw, policy: CapacityPolicy) -> CodedBatch:
    """Copies that travel."""
    travels = one.found.asked if policy.dropped_travel else one.found.slots
    return encode_slots(travels, draw.placement, ranks_per_domain=draw.ranks_per_domain, has_gaps=True)


def _buffers(draw: Draw, most: int) -> NDArray[np.int64]:
    """(1, n_ranks, n_ranks) rows that each rank sends each, full or not."""
    n_ranks = draw.placement.n_ranks
    return np.full((1, n_ranks, n_ranks), most * draw.placement.slots_per_rank)


def extrapolated(drawn: FloatArray, expected: FloatArray, cap: int, n: int) -> FloatArray:
    """Slot loads (..., n_ranks, slots) at `n` tokens per rank from those drawn at `cap`.

    Parameters
    ----------
    drawn, expected : (..., n_ranks, slots)
        Loads drawn at `cap`, and what one token a rank adds in expectation.
    cap, n
        Tokens per rank.
    """
    deviation = drawn - cap * expected
    load = np.maximum(n * expected + deviation * np.sqrt(n / cap), 0.0)
    # Clipping at 0 may add a little; totals per layer are kept.
    total = drawn.sum((-2, -1), keepdims=True) * (n / cap)
    return np.asarray(load * total / load.sum((-2, -1), keepdims=True))
