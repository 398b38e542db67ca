"""Whole traces from a generator: sequences one behind the other, in the order they ran."""

from __future__ import annotations

import numpy as np

from moesim.errors import TraceError
from moesim.routing.banks import RUN, Requests
from moesim.routing.batches import Phase
from moesim.routing.synthetic import RoutingShape, SyntheticRouting, cached_popularity
from moesim.routing.trace import RoutingTrace

__all__ = ["generate_trace"]

_TOKENS_AT_ONCE = 4096
_SPAN = 1024
"""Tokens of a long sequence drawn together."""


def generate_trace(
    generator: SyntheticRouting,
    shape: RoutingShape,
    *,
    n_sequences: int,
    sequence_length: int,
    phase: Phase = "decode",
    seed: int = 0,
) -> RoutingTrace:
    """Draw a token-level trace.

    Parameters
    ----------
    generator
        What to draw from, fitted or made up.
    shape
        Model; any number of layers and experts.
    n_sequences, sequence_length
        Sequences, and tokens of each.
    phase
        Phase that the trace is said to be of.
    seed
        Same seed, same trace; the generator's own seed says which experts are popular.

    Returns
    -------
    RoutingTrace
        In memory: n_sequences * sequence_length * n_layers * top_k bytes (two each above 256 experts).

    Raises
    ------
    TraceError
        If there are no tokens to draw.
    """
    if n_sequences < 1 or sequence_length < 1:
        sizes = (n_sequences, sequence_length)
        raise TraceError("a trace has at least one sequence and one token", value=sizes)
    rng = np.random.default_rng([seed, generator.seed, 3])
    span = min(-(-sequence_length // RUN) * RUN, _SPAN)
    n_spans = -(-sequence_length // span)
    requests = Requests.dealt(shape, generator, n_sequences, n_spans * span, rng).cut(span)
    small = np.uint8 if shape.n_experts <= 256 else np.uint16
    ids = np.empty((n_sequences * n_spans, span, shape.n_layers, shape.top_k), dtype=small)
    p = cached_popularity(generator, shape)
    at_once = max(1, _TOKENS_AT_ONCE // span)
    for start in range(0, len(ids), at_once):
        which = slice(start, start + at_once)
        drawn = requests.tokens(p, shape, which, rng)
        ids[which] = drawn.reshape(shape.top_k, shape.n_layers, -1, span).transpose(2, 3, 1, 0)
    ids = ids.reshape(n_sequences, n_spans * span, *ids.shape[2:])[:, :sequence_length]
    return RoutingTrace(
        model=generator.name,
        n_experts=shape.n_experts,
        top_k=shape.top_k,
        layer_ids=tuple(range(shape.n_layers)),
        phase=phase,
        source=f"synthetic, drawn from {generator.name}: {generator.provenance}",
        licence="none: generated",
        expert_ids=ids.reshape(-1, shape.n_layers, shape.top_k),
        sequence_offsets=np.arange(n_sequences + 1, dtype=np.int64) * sequence_length,
    )
