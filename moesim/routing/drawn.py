"""Batches drawn from routing, kept as a trace of their own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.routing.batches import (
    REQUEST_TOKENS,
    Phase,
    RoutingSource,
    draw_batch,
    inclusion,
    layer_map,
    trace_positions,
)
from moesim.routing.mapped import take_rows
from moesim.routing.synthetic import RoutingShape, SyntheticRouting
from moesim.routing.trace import RoutingTrace

__all__ = ["draw_trace"]

_LARGEST_IDS = 2**31


def draw_trace(
    source: RoutingSource,
    shape: RoutingShape,
    *,
    n_ranks: int,
    n_tokens: int,
    phase: Phase,
    seed: int = 0,
) -> RoutingTrace:
    """Draw what the ranks of a group hold in one step, as a token-level trace.

    Parameters
    ----------
    source
        Trace or generator.
    shape
        Model to draw for.
    n_ranks, n_tokens
        Ranks, and tokens on each.
    phase
        ``decode``: every token of another request, so a sequence each; ``prefill``: runs of requests.
    seed
        Same seed, same tokens.

    Returns
    -------
    RoutingTrace
        Rank 0's tokens first; router weights and domains come along where the source has them.

    Raises
    ------
    TraceError
        If the source is of a model with other experts, or the batch is empty or beyond memory.
    """
    if n_ranks < 1 or n_tokens < 1:
        raise TraceError("a batch has at least one rank and one token", value=(n_ranks, n_tokens))
    if n_ranks * n_tokens * shape.n_layers * shape.top_k > _LARGEST_IDS:
        raise TraceError("a batch has at most 2**31 expert ids", value=(n_ranks, n_tokens), fix="draw fewer")
    inclusion(source, shape)
    rng = np.random.default_rng(seed)
    weights, domains = None, None
    if isinstance(source, RoutingTrace) and source.is_token_level:
        at = trace_positions(source, n_ranks, n_tokens, phase, rng)
        layers = layer_map(source, shape.n_layers)
        ids = take_rows(np.asanyarray(source.expert_ids), at.ravel())[:, layers]
        if source.expert_weights is not None:
            weights = take_rows(source.expert_weights, at.ravel())[:, layers]
        offsets = _offsets(at, phase, source.offsets)
        if source.sequence_domains is not None:
            begins = at.ravel()[offsets[:-1]]
            domains = source.sequence_domains[np.searchsorted(source.offsets, begins, side="right") - 1]
    else:
        drawn = draw_batch(source, shape, n_ranks=n_ranks, n_tokens=n_tokens, phase=phase, rng=rng)
        ids = np.moveaxis(drawn, 0, 2).reshape(n_ranks * n_tokens, shape.n_layers, shape.top_k)
        at = np.tile(np.arange(n_tokens), (n_ranks, 1))
        offsets = _offsets(at, phase, np.arange(0, n_tokens, REQUEST_TOKENS))
    name = source.name if isinstance(source, SyntheticRouting) else source.model
    told = source.provenance if isinstance(source, SyntheticRouting) else source.source
    return RoutingTrace(
        model=name,
        n_experts=shape.n_experts,
        top_k=shape.top_k,
        layer_ids=_layer_ids(source, shape),
        phase=phase,
        source=f"{n_ranks} ranks x {n_tokens} tokens, seed {seed}, drawn from: {told}",
        licence=getattr(source, "licence", "none: generated"),
        expert_ids=np.ascontiguousarray(ids),
        expert_weights=weights,
        sequence_offsets=offsets,
        sequence_domains=domains,
        domains=getattr(source, "domains", ()) if domains is not None else (),
        notes=(*getattr(source, "notes", ()), f"tokens of rank r are those from {n_tokens} r on"),
    )


def _layer_ids(source: RoutingSource, shape: RoutingShape) -> tuple[int, ...]:
    """The trace's own, where all its layers are drawn; else numbered."""
    if isinstance(source, RoutingTrace) and source.n_layers == shape.n_layers:
        return source.layer_ids
    return tuple(range(shape.n_layers))


def _offsets(at: NDArray[np.int64], phase: Phase, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where sequences begin in a batch whose tokens stood at `at` (n_ranks, n_tokens) of their source."""
    if phase == "decode":
        return np.arange(at.size + 1, dtype=np.int64)
    begins = np.ones(at.shape, dtype=bool)
    begins[:, 1:] = (np.diff(at, axis=-1) != 1) | np.isin(at[:, 1:], bounds)
    return np.concatenate([np.flatnonzero(begins.ravel()), [at.size]]).astype(np.int64)
