"""Tokens per expert behind a row of the measured table, from the table's description of its loads.

The collecting scripts draw a load, put the busiest rank first and time that rank; the table keeps only the
name of the load. Equal draws are made here from the description, so a fit sees the tiles that were timed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["IntArray", "tokens_per_expert_of_row"]

IntArray = NDArray[np.int64]


@lru_cache(maxsize=65536)
def tokens_per_expert_of_row(
    n_tokens: int, top_k: int, n_experts: int, ep: int, load: str, n_draws: int = 5
) -> tuple[IntArray, ...]:
    """Tokens of each expert slot on the busiest rank, one array a draw.

    Parameters
    ----------
    n_tokens
        Tokens that enter the whole expert-parallel group.
    top_k, n_experts, ep
        Experts a token, experts in all, ranks that share them in contiguous blocks.
    load
        ``balanced`` and ``uniform`` (every expert the same: one draw), or ``power_law_<a>``.
    n_draws
        Draws of a power law; always the same ones for the same row.

    Returns
    -------
    Arrays [n_experts / ep].

    Notes
    -----
    Expert weights follow p(x) ~ x^-a on [1, 0.8 n_tokens], or on [0.01, 2] where no more pairs than experts
    enter; they are scaled to n_tokens * top_k, rounded, and cut at n_tokens an expert.
    """
    if not load.startswith("power_law_"):
        return (_balanced(n_tokens, top_k, n_experts)[: n_experts // ep],)
    exponent = float(load.removeprefix("power_law_"))
    rng = np.random.default_rng([n_tokens, top_k, n_experts, ep, round(exponent * 100)])
    draws = (_power_law(n_tokens, top_k, n_experts, ep, exponent, rng) for _ in range(n_draws))
    return tuple(counts[int(np.argmax(counts.sum(axis=1)))] for counts in draws)


def _balanced(n_tokens: int, top_k: int, n_experts: int) -> IntArray:
    """Lay each token's choices evenly over the experts; the next token starts at the next free one."""
    stride = -(-n_experts // top_k)
    token = np.arange(n_tokens, dtype=np.int64)[:, None]
    start = token if n_tokens >= stride else token * stride // n_tokens
    chosen = (start + np.arange(top_k)[None, :] * stride) % n_experts
    return np.bincount(chosen.ravel(), minlength=n_experts)


def _power_law(
    n_tokens: int, top_k: int, n_experts: int, ep: int, exponent: float, rng: np.random.Generator
) -> IntArray:
    """[ep, n_experts / ep] tokens of one draw."""
    total = n_tokens * top_k
    low, high = (1.0, max(0.8 * n_tokens, 1.0)) if total > n_experts else (0.01, 2.0)
    power = 1.0 - exponent
    weight = ((high**power - low**power) * rng.random(n_experts) + low**power) ** (1.0 / power)
    counts = np.minimum(np.rint(weight / weight.sum() * total).astype(np.int64), n_tokens)
    counts = counts.reshape(ep, n_experts // ep)
    surplus = total - int(counts.sum())
    if surplus < 0:
        return n_tokens - _spread(n_tokens - counts, -surplus, n_tokens)
    return _spread(counts, surplus, n_tokens)


def _spread(counts: IntArray, surplus: int, cap: int) -> IntArray:
    """Hand out tokens rank after rank, each to the rank's least loaded expert, none above `cap`."""
    counts = counts.copy()
    while surplus > 0:
        room = (cap - counts).sum(axis=1)
        ranks = np.flatnonzero(room)
        if not ranks.size:
            break
        share = np.zeros(len(counts), dtype=np.int64)
        share[ranks] = surplus // ranks.size
        share[ranks[: surplus % ranks.size]] += 1
        share = np.minimum(share, room)
        for rank in np.flatnonzero(share):
            counts[rank] = _pour(counts[rank], int(share[rank]))
        surplus -= int(share.sum())
    return counts


def _pour(counts: IntArray, amount: int) -> IntArray:
    """Raise the lowest counts to one level with `amount` more tokens."""
    order = np.argsort(counts, kind="stable")
    level_counts = counts[order]
    cost_to_reach = np.arange(1, counts.size + 1) * level_counts - np.cumsum(level_counts)
    n_low = int(np.searchsorted(cost_to_reach, amount, side="right"))
    level, rest = divmod(int(level_counts[:n_low].sum()) + amount, n_low)
    level_counts[:n_low] = level
    level_counts[:rest] += 1
    poured = np.empty_like(counts)
    poured[order] = level_counts
    return poured
