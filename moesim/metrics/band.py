"""How sure a simulated time is, from the errors of the fits behind it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from moesim.hardware.profile import Family

__all__ = ["CARRIED_FACTOR", "MODEL_ERROR", "UNMEASURED_ERROR", "relative_band", "step_band"]

FloatArray = NDArray[np.float64]

UNMEASURED_ERROR = 0.35
"""90th percentile error given to a family without held-out measurements. Assumed: twice what the fitted families
show on shapes that they did not see."""

MODEL_ERROR = 0.21
"""Error of a whole step that its kernels' errors do not explain: 80th percentile of the absolute error of TPOT over
314 measurements of MoE models on SGLang, vLLM and TensorRT-LLM (docs/fits/serving.md), seen by the authors."""

CARRIED_FACTOR = 2.0
"""What a fit's error is multiplied by on a device it was not measured on. Assumed."""


def relative_band(
    parts: Iterable[tuple[Family | None, FloatArray]], total_s: FloatArray, *, carried: bool
) -> FloatArray:
    """(n_points,) what the kernels' own errors come to, as a fraction of the time: an 80% half-width.

    Parameters
    ----------
    parts : (family, (n_points,) seconds)
        Time booked under each family, overlap not taken off; None for what has no family.
    total_s : (n_points,)
        The time that the parts make up.
    carried
        The parameters were measured on another device.

    Notes
    -----
    A family's error at one shape repeats in every layer, so it does not average out inside the family;
    errors of different families are taken as independent. The 90th percentile of the absolute held-out error
    is used as each family's 80% half-width. Parts that overlap count by their share of the sum.
    """
    rows = list(parts)
    whole = np.sum([np.broadcast_to(seconds, total_s.shape) for _, seconds in rows], axis=0)
    square = np.zeros_like(total_s)
    for family, seconds in rows:
        error = family.held_out.p90_ape if family and family.held_out else UNMEASURED_ERROR
        factor = CARRIED_FACTOR if carried and family and family.held_out else 1.0
        square = (
            square
            + (np.broadcast_to(seconds, total_s.shape) / np.maximum(whole, 1e-30) * error * factor) ** 2
        )
    return np.asarray(np.sqrt(square))


def step_band(kernels: FloatArray) -> FloatArray:
    """(n_points,) half-width of the band, as a fraction of the time: 80 of 100 measurements should lie inside.

    `MODEL_ERROR` joins the kernels' error as one more independent error: kernels alone would promise too much.
    """
    return np.asarray(np.minimum(np.hypot(kernels, MODEL_ERROR), 0.95))
