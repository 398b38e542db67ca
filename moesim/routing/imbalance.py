"""Popularity of a stated unevenness, for any model: what layouts are compared on.

The figure is the Gini coefficient of the experts' load over the largest that `top_k` distinct experts a token
allow, ``1 - top_k / n_experts``: 0 where all are equally popular, 1 where every token takes the same experts.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import ndtri

from moesim.errors import TraceError
from moesim.routing.sampling import inclusion_probabilities

__all__ = ["COLLAPSED_SHARES", "collapsed_inclusion", "skewed_inclusion", "unevenness"]

FloatArray = NDArray[np.float64]

COLLAPSED_SHARES = (0.80, 0.05, 0.03, 0.02, 0.03, 0.02, 0.03, 0.02)
"""Shares of a collapsed top-1 router's choices over 8 experts, the example that others are made from."""
_MOST_SIGMA = 60.0
"""Spread of log popularity at which the same experts are always taken, to rounding."""


def unevenness(load: ArrayLike, top_k: int) -> FloatArray:
    """Gini coefficient over the last axis, over the largest that distinct experts allow.

    Parameters
    ----------
    load : (..., n_experts)
        Tokens of each expert, in any unit.
    top_k
        Experts of each token.

    Returns
    -------
    (...,)
        0 to 1; 0 where a token takes all experts.
    """
    x = np.sort(np.asarray(load, dtype=np.float64), axis=-1)
    n = x.shape[-1]
    gini = (2.0 * (np.arange(1, n + 1) * x).sum(-1) / x.sum(-1) - (n + 1)) / n
    return np.asarray(gini / (1.0 - top_k / n)) if top_k < n else np.zeros(x.shape[:-1])


def skewed_inclusion(
    skew: float, *, n_layers: int, n_experts: int, top_k: int, rng: np.random.Generator
) -> FloatArray:
    """Log-normal popularity that is exactly as uneven as asked in every layer.

    Parameters
    ----------
    skew
        `unevenness` wanted, from 0 to below 1.
    n_layers, n_experts, top_k
        Model.
    rng
        Gives the order of the experts, a new one in each layer.

    Returns
    -------
    (n_layers, n_experts)
        Probability that a token goes to each expert; rows add up to top_k.

    Raises
    ------
    TraceError
        If the model's few experts cannot be that uneven.
    """
    row = _skewed_row(float(skew), n_experts, top_k)
    return rng.permuted(np.tile(row, (n_layers, 1)), axis=-1)


@lru_cache(maxsize=64)
def _skewed_row(skew: float, n_experts: int, top_k: int) -> FloatArray:
    """Quantiles of a log-normal distribution, its spread chosen for the unevenness; ascending."""
    quantiles = ndtri((np.arange(n_experts) + 0.5) / n_experts)
    beyond = quantiles - quantiles[n_experts - top_k]

    def row(sigma: float) -> FloatArray:
        # what is so far beyond the last expert that a token can take is certain, and need not overflow
        return inclusion_probabilities(np.exp(np.minimum(sigma * beyond, 12.0)), top_k)

    def excess(sigma: float) -> float:
        return float(unevenness(row(sigma), top_k)) - skew

    if skew < 1e-9 or top_k == n_experts:
        return row(0.0)
    if excess(_MOST_SIGMA) < 0:
        rule = f"{n_experts} experts, {top_k} a token, are at most {skew + excess(_MOST_SIGMA):.4f} uneven"
        raise TraceError(rule, value=skew, place="routing.skew")
    return row(float(brentq(excess, 0.0, _MOST_SIGMA, xtol=1e-12)))


def collapsed_inclusion(
    *, n_layers: int, n_experts: int, top_k: int, n_groups: int, n_top_groups: int, rng: np.random.Generator
) -> FloatArray:
    """Popularity under a collapsed router: 80% of all choices go to `top_k` experts.

    Parameters
    ----------
    n_layers, n_experts, top_k
        Model.
    n_groups, n_top_groups
        Groups of consecutive experts, and how many of them one token may use: the experts that all is collapsed
        on lie in so many groups, evenly.
    rng
        Gives the places of the experts, new ones in each layer.

    Returns
    -------
    (n_layers, n_experts)
        Probability that a token goes to each expert; rows add up to top_k.

    Notes
    -----
    Each of a token's `top_k` choices collapses as the one of `COLLAPSED_SHARES` does: the busiest `top_k` experts
    get 80% of all choices between them, ``0.8 / top_k`` each, which keeps below the ``1 / top_k`` that distinct
    experts allow. The others share 20% in the proportions 5, 3, 2, 3, 2, 3, 2: of the n others, sorted, a seventh
    of n has each. Eight experts with top-1 thus get exactly `COLLAPSED_SHARES`.
    """
    first, *rest = COLLAPSED_SHARES
    n_rest = n_experts - top_k
    edges = np.linspace(0.0, 1.0, n_rest + 1)
    knots, filled = np.linspace(0.0, 1.0, len(rest) + 1), np.concatenate([[0.0], np.cumsum(rest)])
    others = np.diff(np.interp(edges, knots, filled)) * top_k
    inclusion = np.empty((n_layers, n_experts))
    for layer in range(n_layers):
        groups = rng.permutation(n_groups)[:n_top_groups]
        places = rng.permuted(np.arange(n_experts).reshape(n_groups, -1), axis=-1)
        busy = places[groups].T.reshape(-1)[:top_k]  # one from each group in turn
        inclusion[layer, busy] = first
        inclusion[layer, np.setdiff1d(np.arange(n_experts), busy)] = rng.permutation(others)
    return inclusion_probabilities(inclusion, top_k)
