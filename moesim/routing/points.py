"""Loads over many batch sizes at once: what the planner asks of routing.

One batch is drawn for the largest size within `max_tokens`; smaller sizes are its first tokens, larger
ones are extrapolated from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.routing.batches import Phase, RoutingSource, draw_batch, inclusion
from moesim.routing.capacity import CapacityLoss, CapacityPolicy
from moesim.routing.limited import Draw, extrapolated, limited, limited_traffic
from moesim.routing.load import Exchange, ExchangeKind, Traffic, count_batch, encode_batch
from moesim.routing.marginals import all_exchanges
from moesim.routing.placement import Placement
from moesim.routing.synthetic import RoutingShape

__all__ = ["BatchLoad", "load_points", "load_traffic"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class BatchLoad:
    """Load of one expert-parallel group at several batch sizes ("points").

    Parameters
    ----------
    n_tokens : (n_points,)
        Tokens on each rank.
    tokens_per_slot : (n_points, n_layers, n_ranks, slots_per_rank)
        Tokens that each expert slot processes; whole numbers up to the size drawn, expectations above.
    exchanges
        Per kind of exchange, copies sent and received per rank, each (n_points, n_layers, n_ranks).
        ``two_level`` is absent where the group does not fill whole domains.
    n_drawn
        Tokens per rank actually drawn; points above it are extrapolated.
    padded
        Copies where an all-to-all carries whole buffers of a capacity, full or not; None where none does.
    loss
        What a capacity does; None without one.
    """

    n_tokens: NDArray[np.int64]
    tokens_per_slot: FloatArray
    exchanges: dict[ExchangeKind, Exchange]
    n_drawn: int
    padded: Exchange | None = None
    loss: CapacityLoss | None = None

    @property
    def tokens_per_rank(self) -> FloatArray:
        """(token, expert) pairs per rank: (n_points, n_layers, n_ranks)."""
        return np.asarray(self.tokens_per_slot.sum(-1))

    @property
    def active_experts(self) -> FloatArray:
        """Slots with work, per rank: (n_points, n_layers, n_ranks)."""
        return np.asarray(np.minimum(self.tokens_per_slot, 1.0).sum(-1))


def load_points(
    source: RoutingSource,
    shape: RoutingShape,
    *,
    tokens_per_rank: Sequence[int],
    placement: Placement,
    phase: Phase,
    ranks_per_domain: int | None = None,
    seed: int = 0,
    max_tokens: int = 8192,
    capacity: CapacityPolicy | None = None,
) -> BatchLoad:
    """Draw and count the load at several batch sizes.

    Parameters
    ----------
    source
        Trace or generator.
    shape
        Model.
    tokens_per_rank
        Batch sizes, tokens on each rank, in any order.
    placement
        Experts in slots; its ranks are those of the group.
    phase
        ``decode`` or ``prefill``.
    ranks_per_domain
        Ranks of one NVLink domain; all where None.
    seed
        Same seed, same loads.
    max_tokens
        Tokens drawn for the whole group; larger batches are extrapolated, smaller ones are its first tokens.
    capacity
        What an expert takes; everything where None.

    Returns
    -------
    BatchLoad
        In the order of `tokens_per_rank`.

    Raises
    ------
    TraceError
        If the source does not fit the model, or a batch size is below 1.
    LayoutError
        If the placement does not fit the model.

    Notes
    -----
    Above the size drawn, ``cap`` tokens, a slot's load at ``n`` is its expectation ``n p`` plus the
    deviation drawn, times ``sqrt(n / cap)``: deviations of a sum of independent tokens grow with the root.
    Traffic grows in proportion to ``n``.
    """
    wanted = np.asarray(list(tokens_per_rank), dtype=np.int64)
    if wanted.size == 0 or wanted.min() < 1:
        raise TraceError("batch sizes are at least 1 token per rank", value=wanted.tolist())
    cap = max(1, max_tokens // placement.n_ranks)
    if capacity is not None:
        draw = Draw(source, shape, placement, phase, ranks_per_domain, seed, cap)
        return _limited_points(draw, capacity, wanted)
    smaller = tuple(sorted({int(n) for n in wanted if n < cap and n & (n - 1)}))
    drawn = _drawn(source, shape, placement, phase, ranks_per_domain, seed, cap, smaller)
    at = np.searchsorted(drawn.cuts, np.minimum(wanted, cap))
    slots = drawn.slots[at].astype(np.float64)
    for point in np.flatnonzero(wanted > cap):
        slots[point] = extrapolated(slots[point], drawn.expected, cap, int(wanted[point]))
    growth = np.maximum(wanted / cap, 1.0)[:, None, None]
    exchanges = {
        kind: Exchange(x.sent_nvlink[at], x.received_nvlink[at], x.sent_nic[at], x.received_nic[at]).scaled(
            growth
        )
        for kind, x in drawn.exchanges.items()
    }
    return BatchLoad(wanted, slots, exchanges, cap)


def _limited_points(draw: Draw, capacity: CapacityPolicy, wanted: NDArray[np.int64]) -> BatchLoad:
    points = [limited(draw, capacity, int(n)) for n in wanted]

    def stacked(parts: Sequence[Exchange]) -> Exchange:
        return Exchange(*(np.stack([getattr(one, f.name) for one in parts]) for f in fields(Exchange)))

    exchanges = {kind: stacked([one.exchanges[kind] for one in points]) for kind in points[0].exchanges}
    padded = [one.padded for one in points if one.padded is not None]
    slots = np.stack([one.slots for one in points])
    whole = stacked(padded) if padded else None
    return BatchLoad(
        wanted, slots, exchanges, draw.cap, whole, CapacityLoss.of_points([one.loss for one in points])
    )


def load_traffic(
    source: RoutingSource,
    shape: RoutingShape,
    *,
    n_tokens: int,
    placement: Placement,
    phase: Phase,
    ranks_per_domain: int | None = None,
    seed: int = 0,
    max_tokens: int = 8192,
    capacity: CapacityPolicy | None = None,
) -> Traffic:
    """Who sends to whom in the batch whose loads `load_points` gives at one size: the same draw.

    Parameters
    ----------
    n_tokens
        Tokens on each rank; those of `load_points`, as all else is.

    Returns
    -------
    Traffic
        (n_layers, n_ranks, n_ranks) copies; expectations above the size drawn, where they need not be whole.
    """
    cap = max(1, max_tokens // placement.n_ranks)
    if capacity is not None:
        draw = Draw(source, shape, placement, phase, ranks_per_domain, seed, cap)
        return limited_traffic(draw, capacity, n_tokens)
    ids = _ids(source, shape, placement.n_ranks, phase, seed, cap)[:, :, : min(n_tokens, cap)]
    drawn = count_batch(ids, placement, ranks_per_domain=ranks_per_domain).traffic
    growth = max(n_tokens / cap, 1.0)
    scaled = (
        np.asarray(one * growth) for one in (drawn.copies_per_rank, drawn.copies_per_node, drawn.assignments)
    )
    return Traffic(*scaled)


def _ids(
    source: RoutingSource, shape: RoutingShape, n_ranks: int, phase: Phase, seed: int, cap: int
) -> NDArray[np.uint16]:
    """(n_layers, n_ranks, cap, top_k) the one draw behind all sizes."""
    rng = np.random.default_rng([seed, n_ranks, cap])
    return draw_batch(source, shape, n_ranks=n_ranks, n_tokens=cap, phase=phase, rng=rng)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """One draw, counted after each of `cuts` tokens per rank."""

    cuts: NDArray[np.int64]
    slots: NDArray[np.int64]
    expected: FloatArray
    exchanges: dict[ExchangeKind, Exchange]


@lru_cache(maxsize=64)
def _drawn(
    source: RoutingSource,
    shape: RoutingShape,
    placement: Placement,
    phase: Phase,
    ranks_per_domain: int | None,
    seed: int,
    cap: int,
    more: tuple[int, ...],
) -> _Drawn:
    """Draw `cap` tokens per rank; counts after every power of two of them, after `more`, and after all."""
    powers = [1 << k for k in range(cap.bit_length()) if 1 << k < cap]
    cuts = tuple(sorted({*powers, *more, cap}))
    n_ranks = placement.n_ranks
    ids = _ids(source, shape, n_ranks, phase, seed, cap)
    batch = encode_batch(ids, placement, ranks_per_domain=ranks_per_domain, n_tokens=cuts)
    return _Drawn(
        np.array(cuts),
        np.cumsum(batch.tokens_per_slot(), axis=0),
        placement.expand(inclusion(source, shape)) * n_ranks,
        all_exchanges(batch, ranks_per_domain=ranks_per_domain),
    )
