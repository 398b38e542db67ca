"""Ranks and nodes that a token of DeepEP's own tests reaches: what its published bandwidths count."""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.network.traffic import hit_fraction

__all__ = ["distinct_groups"]


@cache
def distinct_groups(n_nodes: int, n_experts: int, top_k: int, limit: int | None) -> tuple[float, float]:
    """Expected different (nodes, ranks) of a token in DeepEP's tests.

    Scores are |N(0, 1)| + 1; with a `limit`, only the experts of the `limit` nodes with the highest score
    count. Exact where the limit does not bind, 20,000 draws of a fixed seed where it does.
    """
    n_ranks = 8 * n_nodes
    if limit is None or limit >= n_nodes:
        return (
            n_nodes * hit_fraction(n_nodes, n_experts, top_k),
            n_ranks * hit_fraction(n_ranks, n_experts, top_k),
        )
    scores = np.abs(np.random.default_rng(0).standard_normal((20_000, n_nodes, n_experts // n_nodes)))
    best = np.argsort(-scores.max(axis=-1), axis=1)[:, :limit]
    allowed = np.zeros(scores.shape[:2], dtype=bool)
    np.put_along_axis(allowed, best, True, axis=1)
    masked = np.where(allowed[:, :, None], scores, -1.0).reshape(len(scores), n_experts)
    chosen = np.argpartition(-masked, top_k, axis=1)[:, :top_k]
    hits = [np.zeros((len(scores), n), dtype=bool) for n in (n_nodes, n_ranks)]
    for hit, n in zip(hits, (n_nodes, n_ranks), strict=True):
        np.put_along_axis(hit, chosen // (n_experts // n), True, axis=1)
    return float(hits[0].sum(1).mean()), float(hits[1].sum(1).mean())
