"""What tokens share: consecutive ones, ones further apart, of one request, of any two."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.runs import TokenRuns

__all__ = ["locality", "shared_experts"]

_PAIRS = 8192
LAGS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def shared_experts(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Share of experts that tokens a and b, each (n, n_layers, top_k), have in common: (n_layers,)."""
    both = np.zeros(a.shape[:2], dtype=np.uint8)
    for i in range(a.shape[2]):
        for j in range(b.shape[2]):
            both += a[:, :, i] == b[:, :, j]
    return np.asarray(both.mean(0) / a.shape[2])


def locality(runs: TokenRuns, load: NDArray[np.float64], *, seed: int = 0) -> dict[str, Any]:
    """Measure the share of a token's experts that another token has too.

    Parameters
    ----------
    runs
        Tokens.
    load : (n_layers, n_experts)
        Probability that a token goes to each expert.
    seed
        Seed of the pairs.

    Returns
    -------
    dict
        Shares, means over layers: ``shared_with_next_token``, ``shared_in_request`` (any two tokens of one
        run), ``shared_with_any_token``, ``by_lag`` (tokens 1, 2, 4... apart), ``by_layer`` (next token);
        ``chance``, what popularity alone gives; ``even``, what equally popular experts give.

    Notes
    -----
    Chance is sum(p**2) / top_k per layer, p being `load`: two tokens that know nothing of each other.
    """
    if runs.n_tokens < 2:
        return {}
    rng = np.random.default_rng(seed)
    top_k = runs.ids.shape[2]
    by_layer = _at_lag(runs, 1, rng)
    by_lag = {lag: _at_lag(runs, lag, rng) for lag in LAGS[1:]}
    shares = {1: by_layer, **by_lag}
    one, mate = _mates(runs, rng)
    first, other = (rng.integers(0, runs.n_tokens, _PAIRS) for _ in "ab")
    apart = first != other
    return {
        "shared_with_next_token": 0.0 if by_layer is None else float(by_layer.mean()),
        "shared_in_request": float(_shared(runs, one, mate).mean()) if one.size else None,
        "shared_with_any_token": float(_shared(runs, first[apart], other[apart]).mean()),
        "chance": float((load**2).sum(-1).mean() / top_k),
        "even": top_k / runs.n_experts,
        "by_lag": {str(lag): float(one.mean()) for lag, one in shares.items() if one is not None},
        "by_layer": [] if by_layer is None else [float(f"{v:.4g}") for v in by_layer],
    }


def _at_lag(runs: TokenRuns, lag: int, rng: np.random.Generator) -> NDArray[np.float64] | None:
    """Shares per layer of tokens `lag` apart in one run; None where no run is that long."""
    run = runs.run_of
    if runs.n_tokens <= lag:
        return None
    first = np.flatnonzero(run[lag:] == run[:-lag])
    if not first.size:
        return None
    if first.size > _PAIRS:
        first = rng.choice(first, _PAIRS, replace=False)
    return _shared(runs, first, first + lag)


def _shared(runs: TokenRuns, one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float64]:
    return shared_experts(runs.ids[one], runs.ids[other])


def _mates(runs: TokenRuns, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of different tokens of one run."""
    one = rng.integers(0, runs.n_tokens, _PAIRS)
    begin, size = runs.bounds[runs.run_of[one]], np.diff(runs.bounds)[runs.run_of[one]]
    mate = begin + (rng.random(one.size) * size).astype(np.int64)
    apart = mate != one
    return one[apart], mate[apart]
