"""Whole traces from a generator: sequences one behind the other, popularity drifting as they go."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.routing.batches import Phase
from moesim.routing.synthetic import RoutingShape, SyntheticRouting, cached_popularity, prefill_bank
from moesim.routing.trace import RoutingTrace

__all__ = ["generate_trace"]

FloatArray = NDArray[np.float64]
_BLOCK = 64
"""Sequences drawn at a time; over each block experts get exactly their popularity."""


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
    p = cached_popularity(generator, shape)
    small = np.uint8 if shape.n_experts <= 256 else np.uint16
    ids = np.empty((n_sequences * sequence_length, shape.n_layers, shape.top_k), dtype=small)
    for start in range(0, n_sequences, _BLOCK):
        n_block = min(_BLOCK, n_sequences - start)
        bank = prefill_bank(
            p, shape, generator, rng, n_sequences=n_block, sequence_length=-(-sequence_length // 32) * 32
        )
        tokens = bank.reshape(shape.top_k, shape.n_layers, n_block, -1)[..., :sequence_length]
        at = start * sequence_length
        block = tokens.reshape(shape.top_k, shape.n_layers, -1).transpose(2, 1, 0)
        ids[at : at + n_block * sequence_length] = block
    return RoutingTrace(
        model=generator.name,
        n_experts=shape.n_experts,
        top_k=shape.top_k,
        layer_ids=tuple(range(shape.n_layers)),
        phase=phase,
        source=f"synthetic, drawn from {generator.name}: {generator.provenance}",
        licence="none: generated",
        expert_ids=ids,
        sequence_offsets=np.arange(n_sequences + 1, dtype=np.int64) * sequence_length,
    )
