"""Popularity of a layer's experts as a curve: log load against the normal score of an expert's rank.

A curve keeps the whole distribution, tail and all, in 13 numbers, and says what the load is for any number of
experts: expert i of E sits at the score of (i + 1/2) / E. Where load goes with the expert's index, as in
DeepSeek-V3, the curve says how (a power of the index, and the busiest of 8 to 64 blocks of neighbours).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError

__all__ = ["BLOCKS", "KNOTS", "LoadCurve", "arranged", "between_rows", "block_peaks", "curve_load"]

FloatArray = NDArray[np.float64]

KNOTS: FloatArray = np.arange(-3.0, 3.01, 0.5)
"""Normal scores at which a curve is given; it goes on straight beyond."""
BLOCKS = (8, 16, 32, 64)
"""Numbers of blocks of neighbouring experts whose busiest one a curve keeps."""
_N_TRIED = 24
"""Orders of the experts tried per layer, the one nearest to the curve's blocks being taken."""


@dataclass(frozen=True)
class LoadCurve:
    """Popularity of one layer's experts.

    Parameters
    ----------
    log_load
        Log of load over mean at each of `KNOTS`, rising.
    index_trend
        Correlation of popularity (as a normal score) with minus the log of the expert's index, -1..1.
    block_peaks
        Busiest over mean of 8, 16, 32 and 64 blocks of neighbouring experts, as numbered; empty where
        unknown. It holds for the number of experts it was measured on.
    """

    log_load: tuple[float, ...]
    index_trend: float = 0.0
    block_peaks: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.log_load) != KNOTS.size or not np.isfinite(self.log_load).all():
            rule = f"a load curve is {KNOTS.size} finite numbers"
            raise TraceError(rule, value=self.log_load, place="routing.curves.log_load")
        if not abs(self.index_trend) <= 1:
            raise TraceError("lies within -1..1", value=self.index_trend, place="routing.curves.index_trend")
        if len(self.block_peaks) > len(BLOCKS) or not all(p >= 1 for p in self.block_peaks):
            rule = f"are at most {len(BLOCKS)} numbers, 1 or more"
            raise TraceError(rule, value=self.block_peaks, place="routing.curves.block_peaks")


def between_rows(rows: tuple[LoadCurve, ...], share: FloatArray) -> FloatArray:
    """Curves at given shares of the layers, as a table (n_layers, 13 + 1 + n_blocks)."""
    at = np.clip(share, 0.0, 1.0) * (len(rows) - 1)
    weights = hats(at, np.arange(len(rows), dtype=np.float64)) if len(rows) > 1 else np.ones((at.size, 1))
    return np.asarray(weights @ table(rows))


def curve_load(log_load: FloatArray, n_experts: int) -> FloatArray:
    """Load over mean of each expert, idlest first: (n_layers, n_experts) of curves (n_layers, 13)."""
    load = np.exp(log_load @ hats(scores(n_experts)).T)
    return np.asarray(load / load.mean(-1, keepdims=True))


def arranged(curves: FloatArray, n_experts: int, *, blocks: bool, rng: np.random.Generator) -> FloatArray:
    """Loads of curves laid out by expert index.

    Parameters
    ----------
    curves : (n_layers, 13 + 1 + n_blocks)
        As :func:`between_rows` gives it.
    n_experts
        Experts per layer.
    blocks
        Whether to choose, among a few orders with the curve's trend, the one nearest to its block peaks.
    rng
        Source of the orders.

    Returns
    -------
    (n_layers, n_experts)
        Load over mean.
    """
    load = curve_load(curves[:, : KNOTS.size], n_experts)
    trend = np.clip(curves[:, KNOTS.size], -1.0, 1.0)[:, None]
    wanted = curves[:, KNOTS.size + 1 :]
    n_tried = _N_TRIED if blocks and wanted.shape[1] else 1
    best = np.empty_like(load)
    least = np.full(len(load), np.inf)
    lower = falling(n_experts)
    for _ in range(n_tried):
        score = trend * lower + np.sqrt(1.0 - trend**2) * rng.standard_normal(load.shape)
        tried = np.empty_like(load)
        np.put_along_axis(tried, np.argsort(score, axis=-1), load, axis=-1)
        gap = np.zeros(len(load))
        if n_tried > 1:
            peaks = block_peaks(tried)[:, : wanted.shape[1]]
            gap = (np.log(peaks / wanted[:, : peaks.shape[1]]) ** 2).sum(-1)
        nearer = gap < least
        best[nearer], least[nearer] = tried[nearer], gap[nearer]
    return best


def block_peaks(load: FloatArray) -> FloatArray:
    """Busiest over mean of blocks of neighbouring experts: (n_layers, n_blocks), for `BLOCKS` that divide."""
    n_experts = load.shape[-1]
    sums = [load.reshape(len(load), n, -1).sum(-1) for n in BLOCKS if n_experts % n == 0]
    if not sums:
        return np.empty((len(load), 0))
    return np.stack([s.max(-1) / s.mean(-1) for s in sums], axis=-1)


@lru_cache(maxsize=64)
def scores(n_experts: int) -> FloatArray:
    """Normal scores of `n_experts` ranks, ascending: (n_experts,)."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / n_experts) for i in range(n_experts)])


def falling(n_experts: int) -> FloatArray:
    """Minus the log of the index, standardised: (n_experts,)."""
    values = -np.log(np.arange(n_experts) + 1.0)
    return np.asarray((values - values.mean()) / max(values.std(), 1e-12))


def hats(at: FloatArray, knots: FloatArray = KNOTS) -> FloatArray:
    """Weights (n, n_knots) of straight lines between knots, going on beyond the outer ones."""
    step = knots[1] - knots[0]
    left = np.clip(np.floor((at - knots[0]) / step).astype(np.int64), 0, knots.size - 2)
    share = (at - knots[left]) / step
    weights = np.zeros((at.size, knots.size))
    weights[np.arange(at.size), left] = 1.0 - share
    weights[np.arange(at.size), left + 1] = share
    return weights


def table(curves: tuple[LoadCurve, ...]) -> FloatArray:
    """Curves as rows: (n_layers, 13 + 1 + n_blocks)."""
    return np.array([(*c.log_load, c.index_trend, *c.block_peaks) for c in curves])
