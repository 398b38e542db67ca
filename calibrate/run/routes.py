"""Which expert each token goes to, for a load given by name: fresh for every sample, the same on every machine.

The busiest rank of an expert-parallel group is the one measured, and it holds the first block of experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calibrate.fit.moe_load import tokens_per_expert_of_row
from calibrate.loads import TRACE, trace_ids

__all__ = ["N_DRAWS", "expert_ids"]

IdArray = NDArray[np.int32]
CountArray = NDArray[np.int64]

N_DRAWS = 30
"""Draws of a load before they come round again: one a sample."""


def expert_ids(
    *, n_tokens: int, top_k: int, n_experts: int, ep: int, load: str, sample: int, seed: int = 0
) -> IdArray:
    """Choices of one batch.

    Parameters
    ----------
    n_tokens
        Tokens that enter the whole expert-parallel group.
    top_k, n_experts, ep
        Experts a token, experts in all, ranks that share them in contiguous blocks.
    load
        ``balanced``, ``power_law_<a>`` as the fits draw it, or ``trace:<name>`` of the routing catalog.
    sample
        Number of the batch; each has other tokens, and other loads where the load is drawn.
    seed
        Of the order of tokens.

    Returns
    -------
    [n_tokens, top_k] distinct experts of each token; those of the measured rank are 0 .. n_experts / ep - 1.
    """
    draw = sample % N_DRAWS
    if load.startswith(TRACE):
        ids = trace_ids(load, n_tokens=n_tokens, top_k=top_k, n_experts=n_experts, ep=ep, draw=draw)
    else:
        local = tokens_per_expert_of_row(n_tokens, top_k, n_experts, ep, load, n_draws=N_DRAWS)
        ids = _dealt(_whole_counts(local[draw % len(local)], n_tokens, top_k, n_experts), n_tokens, top_k)
    rng = np.random.default_rng([seed, sample, n_tokens])
    return rng.permuted(ids[rng.permutation(n_tokens)], axis=1).astype(np.int32)


def _whole_counts(local: CountArray, n_tokens: int, top_k: int, n_experts: int) -> CountArray:
    """Counts of all experts: those here as given, the rest even, because no kernel here multiplies them."""
    n_rest = n_experts - local.size
    rest = n_tokens * top_k - int(local.sum())
    if n_rest == 0:
        return local
    remote = np.full(n_rest, rest // n_rest, dtype=np.int64)
    remote[: rest % n_rest] += 1
    return np.concatenate([local, remote])


def _dealt(counts: CountArray, n_tokens: int, top_k: int) -> CountArray:
    """Deal experts to tokens like cards: an expert's run is no longer than a round, so no token gets it twice."""
    return np.repeat(np.arange(counts.size), counts).reshape(top_k, n_tokens).T
