"""Errors of predictions."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["ape_stats"]


def ape_stats(predicted: ArrayLike, measured: ArrayLike) -> dict[str, float]:
    """Median and 90th percentile of the absolute relative error, median signed error, and rows counted."""
    error = np.asarray(predicted, dtype=float) / np.asarray(measured, dtype=float) - 1.0
    absolute = np.abs(error)
    return {
        "n": int(error.size),
        "median_ape": float(np.median(absolute)),
        "p90_ape": float(np.quantile(absolute, 0.9)),
        "bias": float(np.median(error)),
    }
