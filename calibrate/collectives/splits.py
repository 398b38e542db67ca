"""Uneven all-to-alls: how many elements each rank sends to each other, as a router parts real tokens."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.routing import RoutingShape, RoutingSource, RoutingTrace, contiguous, count_batch, draw_batch

__all__ = ["as_equal_elements", "split_elements", "token_shares"]

N_TOKENS = 256
"""Tokens on each rank of the batch that is drawn: the unevenness of a large decode batch."""
N_EXPERTS, TOP_K = 256, 8
"""Router of a generated source, as DeepSeek-V3's (its config.json)."""


def token_shares(source: RoutingSource, n_ranks: int, seed: int) -> NDArray[np.float64]:
    """Share of each rank's (token, expert) pairs that goes to each rank, for a middle layer of a decode batch.

    Parameters
    ----------
    source
        Trace or generator; a generator draws for 256 experts, top-8.
    n_ranks
        Ranks of the group; experts stand on them in order.
    seed
        Same seed, same batch.

    Returns
    -------
    (n_ranks, n_ranks)
        ``[source, destination]``; rows sum to 1.

    Raises
    ------
    TraceError
        If the trace cannot be drawn from.
    """
    n_experts, top_k = (source.n_experts, source.top_k) if isinstance(source, RoutingTrace) else (None, None)
    n_experts = n_experts or N_EXPERTS
    shape = RoutingShape(1, n_experts, min(top_k or TOP_K, n_experts))
    if isinstance(source, RoutingTrace):
        shape = RoutingShape(source.n_layers, n_experts, shape.top_k)
    rng = np.random.default_rng([seed, n_ranks])
    ids = draw_batch(source, shape, n_ranks=n_ranks, n_tokens=N_TOKENS, phase="decode", rng=rng)
    middle = ids[shape.n_layers // 2][None]
    placement = contiguous(n_experts, n_ranks, n_redundant=-n_experts % n_ranks)
    pairs = count_batch(middle, placement).traffic.assignments[0].astype(np.float64)
    return np.asarray(pairs / pairs.sum(-1, keepdims=True))


def split_elements(shares: ArrayLike, n_elements: int) -> NDArray[np.int64]:
    """Whole elements that each rank sends to each; every rank sends `n_elements`, its own share included.

    Parameters
    ----------
    shares : (n_ranks, n_ranks)
        As `token_shares` gives them.
    n_elements
        Send buffer of one rank.
    """
    exact = np.asarray(shares, dtype=np.float64) * n_elements
    whole = np.floor(exact).astype(np.int64)
    # what rounding left over goes to the largest remainders of the row
    order = np.argsort(-(exact - whole), axis=-1, kind="stable")
    rank_of = np.argsort(order, axis=-1, kind="stable")
    return np.asarray(whole + (rank_of < (n_elements - whole.sum(-1, keepdims=True))))


def as_equal_elements(split: NDArray[np.int64]) -> int:
    """Send buffer of the equal all-to-all whose ports are as busy as this one's busiest [elements].

    Parameters
    ----------
    split : (n_ranks, n_ranks)
        Elements ``[source, destination]``; a rank's own stay there.

    Notes
    -----
    This is what an uneven row's ``message_elements`` says: the same figure that `moesim.network` prices one by.
    """
    n_ranks = len(split)
    moved = split - np.diag(np.diag(split))
    busiest = int(max(moved.sum(0).max(), moved.sum(1).max()))
    return max(1, round(busiest * n_ranks / (n_ranks - 1)))
