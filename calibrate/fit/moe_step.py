"""Predict tables of kind ``moe_step``, one kernel of the expert feed-forward each, from the fit of whole calls.

Nothing is fitted to them: a whole call tells only the sum of its kernels, and these rows check how the model splits it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, Prediction
from calibrate.fit.family import WARM, Key, Note, Values, predict_by_family, with_cache
from calibrate.fit.moe_ffn import kernel_of, parameters_of, usable_rows
from calibrate.fit.moe_rows import MeasuredRows, Priced
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Profile

__all__ = ["TABLES", "fit_table", "predict_table"]

TABLES = ("moe_step",)


def fit_table(rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note) -> list[dict[str, Any]]:
    """No family: the rows are left for `validate`."""
    note(f"moe_step: {len(rows)} rows not fitted: moe_ffn's parameters predict them, validate says how well")
    return []


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Times of measured steps by the family of their whole call; NaN, with a reason, where it has none."""

    def locate(values: tuple[Any, ...]) -> Key | str:
        implementation, dtype, _, cache = values
        if cache == "warm":
            return WARM
        return kernel_of(implementation, dtype)

    def price(part: pd.DataFrame, values: Values, key: Key) -> FloatArray:
        time_s = np.full(len(part), np.nan)
        known = part.index.isin(usable_rows(part).index)
        if known.any():
            measured = MeasuredRows.of(part[known].assign(latency_s=1.0, cache="cold"))
            parts = Priced(measured, gpu, key[1], key[2]).parts(parameters_of(values))
            time_s[known] = getattr(parts, f"{part['op'].iloc[0].removeprefix('moe_')}_s")
        return time_s

    names = ("implementation", "dtype", "op", "cache")
    return predict_by_family(with_cache(rows), names, locate, profile, price)
