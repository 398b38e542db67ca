"""Batches of tokens drawn from a trace or a generator, as the ranks of an expert-parallel group see them.

Decode: every token of a rank is from another request, at a random position. Prefill: a rank holds whole
runs of requests, so that locality within a request is kept. A generator or a counts-only trace is drawn
once into a bank of a few thousand tokens, from which every batch is gathered.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.routing.banks import decode_bank, prefill_bank
from moesim.routing.catalog import default_routing
from moesim.routing.mapped import take_rows
from moesim.routing.sampling import inclusion_probabilities
from moesim.routing.synthetic import (
    RoutingShape,
    SyntheticRouting,
    cached_popularity,
    spread_layers,
)
from moesim.routing.trace import RoutingTrace

__all__ = [
    "REQUEST_TOKENS",
    "Phase",
    "RoutingSource",
    "draw_batch",
    "draw_weights",
    "inclusion",
    "layer_map",
    "some_tokens",
    "trace_positions",
]

FloatArray = NDArray[np.float64]
IdArray = NDArray[np.uint16]
IndexArray = NDArray[np.int64]
RoutingSource = RoutingTrace | SyntheticRouting
Phase = Literal["decode", "prefill"]

BANK_TOKENS = 4096
"""Tokens in a decode bank: enough that its own noise is below that of any batch drawn from it."""
_BANK_SEQUENCES = 64
REQUEST_TOKENS = 512
"""Tokens of a request in prefill; a rank that holds more holds several requests."""
_TOKENS_DRAWN, _GROUPED_TOKENS_DRAWN = 128, 64
"""Of these, how many are drawn (fewer with group-limited routing, which takes longer); then they come again."""


def layer_map(trace: RoutingTrace, n_layers: int) -> IndexArray:
    """Trace layer that stands in for each of a model's `n_layers` MoE layers: (n_layers,).

    The trace's own where the numbers agree; evenly spaced ones for a shallower model; cycled for a
    deeper one.
    """
    return spread_layers(trace.n_layers, n_layers)


def check_fits(source: RoutingSource, shape: RoutingShape) -> None:
    """Refuse a trace of a model with other experts or another top_k.

    Raises
    ------
    TraceError
        Saying what to use instead.
    """
    if isinstance(source, SyntheticRouting):
        return
    fix = "use routing `default`, which fits any model, or a trace of this model"
    if source.n_experts != shape.n_experts:
        rule = f"the trace of {source.model} has the model's {shape.n_experts} experts per layer"
        raise TraceError(rule, value=source.n_experts, fix=fix, place="routing.trace")
    if source.top_k is not None and source.top_k != shape.top_k:
        rule = f"the trace of {source.model} has the model's top_k {shape.top_k}"
        raise TraceError(rule, value=source.top_k, fix=fix, place="routing.trace")


def inclusion(source: RoutingSource, shape: RoutingShape) -> FloatArray:
    """Probability that a token goes to each expert: (n_layers, n_experts), rows adding up to top_k.

    Parameters
    ----------
    source
        Trace or generator.
    shape
        Model to draw for.

    Raises
    ------
    TraceError
        If the trace is of a model with other experts.
    """
    check_fits(source, shape)
    if isinstance(source, SyntheticRouting):
        return cached_popularity(source, shape)
    return _trace_inclusion(source, shape)


@lru_cache(maxsize=16)
def _trace_inclusion(trace: RoutingTrace, shape: RoutingShape) -> FloatArray:
    counts = trace.counts[layer_map(trace, shape.n_layers)]
    if trace.is_token_level:
        # Exact: no cap is needed, and an expert that no token chose stays at 0.
        return np.asarray(counts / trace.n_tokens, dtype=np.float64)
    return inclusion_probabilities(counts, shape.top_k)


def draw_batch(
    source: RoutingSource,
    shape: RoutingShape,
    *,
    n_ranks: int,
    n_tokens: int,
    phase: Phase,
    rng: np.random.Generator,
) -> IdArray:
    """Draw one batch of logical expert ids.

    Parameters
    ----------
    source
        Trace or generator.
    shape
        Model to draw for.
    n_ranks
        Ranks that hold tokens.
    n_tokens
        Tokens on each rank.
    phase
        ``decode`` or ``prefill``.
    rng
        Source of randomness; the same state gives the same batch.

    Returns
    -------
    (n_layers, n_ranks, n_tokens, top_k) uint16
        Distinct experts per token and layer. A view with the choices in contiguous planes, as
        :mod:`moesim.routing.load` wants them.

    Raises
    ------
    TraceError
        If the trace is of a model with other experts, or the batch is empty.
    """
    check_fits(source, shape)
    if n_ranks < 1 or n_tokens < 1:
        raise TraceError("a batch has at least one rank and one token", value=(n_ranks, n_tokens))
    if isinstance(source, RoutingTrace) and source.is_token_level:
        planes = _gather_trace(source, shape, trace_positions(source, n_ranks, n_tokens, phase, rng))
    else:
        phase = "decode" if _generator(source).is_independent else phase
        bank = _bank(source, shape, phase)
        at = _bank_tokens(bank.shape[-1], n_ranks, n_tokens, phase, rng).ravel()
        planes = np.take(bank, at, axis=-1)
    planes = planes.reshape(shape.top_k, shape.n_layers, n_ranks, n_tokens)
    return np.moveaxis(planes, 0, -1)


def _generator(source: RoutingSource) -> SyntheticRouting:
    """What draws a source's tokens: counts have the locality of `default`."""
    return source if isinstance(source, SyntheticRouting) else default_routing()


def some_tokens(source: RoutingSource, shape: RoutingShape) -> NDArray[Any]:
    """Experts of tokens of a source, (n_tokens, n_layers, top_k): a trace's own, or a bank of generated ones.

    Parameters
    ----------
    source
        Trace or generator.
    shape
        Model; layers of a trace stand in for its own as in `draw_batch`.

    Raises
    ------
    TraceError
        If the trace is of a model with other experts.
    """
    check_fits(source, shape)
    if isinstance(source, RoutingTrace) and source.expert_ids is not None:
        layers = layer_map(source, shape.n_layers)
        whole = source.expert_ids
        return whole if shape.n_layers == source.n_layers else whole[:, layers]
    return np.moveaxis(_bank(source, shape, "decode"), (0, 1, 2), (2, 1, 0))


def draw_weights(
    source: RoutingSource,
    shape: RoutingShape,
    *,
    n_ranks: int,
    n_tokens: int,
    phase: Phase,
    rng: np.random.Generator,
) -> NDArray[np.float16] | None:
    """Router weights of the batch that `draw_batch` draws from the same state of `rng`.

    Returns
    -------
    (n_layers, n_ranks, n_tokens, top_k) float16
        In the order of the batch's experts; None where the source has no weights.
    """
    if not isinstance(source, RoutingTrace) or source.expert_weights is None:
        return None
    at = trace_positions(source, n_ranks, n_tokens, phase, rng)
    weights = np.asarray(take_rows(source.expert_weights, at.ravel()), dtype=np.float16)
    layers = layer_map(source, shape.n_layers)
    planes = np.ascontiguousarray(weights.transpose(2, 1, 0)[:, layers])
    return np.moveaxis(planes.reshape(shape.top_k, shape.n_layers, n_ranks, n_tokens), 0, -1)


@lru_cache(maxsize=8)
def _bank(source: RoutingSource, shape: RoutingShape, phase: Phase) -> IdArray:
    """Bank of tokens (top_k, n_layers, n_tokens) of a generator or of a counts-only trace."""
    generator = _generator(source)
    rng = np.random.default_rng([generator.seed, 2])
    p = np.asarray(inclusion(source, shape))
    if phase == "decode":
        return decode_bank(p, shape, generator, rng, n_tokens=BANK_TOKENS)
    length = _TOKENS_DRAWN if shape.n_groups == shape.n_top_groups else _GROUPED_TOKENS_DRAWN
    return prefill_bank(p, shape, generator, rng, n_sequences=_BANK_SEQUENCES, sequence_length=length)


def _bank_tokens(
    n_bank: int, n_ranks: int, n_tokens: int, phase: Phase, rng: np.random.Generator
) -> IndexArray:
    if phase == "decode":
        return rng.integers(0, n_bank, (n_ranks, n_tokens))
    # Whole requests, each rank with a random order of its own, wrapping where a rank holds more than all.
    length = n_bank // _BANK_SEQUENCES
    n_runs = -(-n_tokens // REQUEST_TOKENS)
    n_orders = -(-n_runs // _BANK_SEQUENCES)
    keys = rng.random((n_ranks, n_orders, _BANK_SEQUENCES))
    order = np.argsort(keys, axis=-1).reshape(n_ranks, -1)[:, :n_runs]
    passes = np.arange(REQUEST_TOKENS) % length
    at = (order * length)[:, :, None] + passes
    return at.reshape(n_ranks, -1)[:, :n_tokens]


def trace_positions(
    trace: RoutingTrace, n_ranks: int, n_tokens: int, phase: Phase, rng: np.random.Generator
) -> IndexArray:
    """Index in the trace of each token of each rank: (n_ranks, n_tokens).

    Sequences come in random order per rank, longer ones sooner (Efraimidis and Spirakis 2006), because a
    running batch holds a request for as long as it is long.
    """
    offsets = trace.offsets
    lengths = np.diff(offsets)
    at = np.empty((n_ranks, n_tokens), dtype=np.int64)
    for rank in range(n_ranks):
        if phase == "decode":
            at[rank] = _one_per_request(offsets, lengths, n_tokens, rng)
        else:
            at[rank] = _whole_requests(offsets, lengths, n_tokens, rng)
    return at


def _one_per_request(
    offsets: IndexArray, lengths: IndexArray, n_tokens: int, rng: np.random.Generator
) -> IndexArray:
    n_rounds = -(-n_tokens // lengths.size)
    keys = rng.exponential(size=(n_rounds, lengths.size)) / lengths
    chosen = np.argsort(keys, axis=-1).ravel()[:n_tokens]
    return np.asarray(offsets[chosen] + (rng.random(n_tokens) * lengths[chosen]).astype(np.int64))


def _whole_requests(
    offsets: IndexArray, lengths: IndexArray, n_tokens: int, rng: np.random.Generator
) -> IndexArray:
    order = rng.permutation(lengths.size)
    n_rounds = -(-n_tokens // int(lengths.sum()))
    order = np.tile(order, n_rounds)
    order = order[: int(np.searchsorted(np.cumsum(lengths[order]), n_tokens)) + 1]
    taken = lengths[order]
    first = np.cumsum(taken) - taken
    at = np.arange(int(taken.sum())) - np.repeat(first, taken) + np.repeat(offsets[order], taken)
    return np.asarray(at[:n_tokens])


def _gather_trace(trace: RoutingTrace, shape: RoutingShape, at: IndexArray) -> IdArray:
    ids = trace.expert_ids
    if ids is None:  # pragma: no cover - callers ask token-level traces only
        raise TraceError("the trace has no single tokens", value=trace.model)
    flat = at.ravel()
    tokens = take_rows(ids, flat).astype(np.uint16)
    planes = np.ascontiguousarray(tokens.transpose(2, 1, 0))
    layers = layer_map(trace, shape.n_layers)
    if shape.n_layers != trace.n_layers:
        planes = planes[:, layers]
    return np.ascontiguousarray(planes)
