"""Fit `moesim.cost.router` to tables of kind ``router``: logits, scores, choice of experts and their weights.

The gate product is priced by the profile's bfloat16 ``gemm``, so a base profile has to hold it; what is left of the
measured time is the choice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, Prediction
from calibrate.fit.family import (
    WARM,
    Kernel,
    Key,
    Method,
    Note,
    Spec,
    Values,
    cold_rows,
    fit_family,
    known_family,
    newest_software,
    predict_by_family,
    seen_rows,
    with_cache,
)
from moesim.cost.router import router_s
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Profile
from moesim.work.ops import Router

__all__ = ["TABLES", "fit_table", "predict_table", "predicted_s"]

TABLES = ("router",)
PRICED = "fused-topk"
"""Family that prices routers in a scenario; the implementation with most rows stands for it."""
METHOD = Method(("n_experts", "top_k", "hidden"), max_evaluations=40)
_GATE: Key = ("gemm", "torch-cublas", "bfloat16")
_SPEC: Spec = {
    "topk_s": (5e-6, 5e-7, 2e-4, "scores, top-k and normalisation of few tokens [s]"),
    "token_s": (1e-10, 1e-13, 1e-6, "one score of one token on one SM [s]"),
    "hbm_fraction": (0.7, 0.05, 1.0, "rate of reading scores over the datasheet's memory rate"),
}


def predicted_s(rows: pd.DataFrame, values: Values, gate: Values, gpu: Gpu) -> FloatArray:
    """Model's time of every row [s]; `gate` are the values of the bfloat16 product."""
    time_s = np.zeros(len(rows))
    shape = rows[["hidden", "n_experts", "top_k"]].to_numpy(dtype=int)
    for hidden, n_experts, top_k in np.unique(shape, axis=0):
        here = (shape == (hidden, n_experts, top_k)).all(axis=1)
        op = Router(rows["n_tokens"].to_numpy(dtype=float)[here], int(hidden), int(n_experts), int(top_k))
        time_s[here] = router_s(op, gpu=gpu, params=values, gemm_params=gate)
    return time_s


def fit_table(
    rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note, source: str = ""
) -> list[dict[str, Any]]:
    """Families ``router`` of one device; arguments as in `calibrate.fit.gemm.fit_table`."""
    gate = known_family(base, _GATE)
    if gate is None:
        note(
            f"router: {len(rows)} rows not fitted: the base profile has no {' '.join(_GATE)} for their gate product"
        )
        return []
    gate_values = gate.values()
    found = []
    rows = cold_rows(rows, note)
    order = rows.groupby("implementation").size().sort_values(ascending=False, kind="stable").index
    for implementation in order:
        part = newest_software(rows[rows["implementation"] == implementation], note)
        if not seen_rows(part).any():
            continue
        found.append(
            fit_family(
                Kernel("router", implementation, "any", _SPEC),
                part,
                lambda some, values: predicted_s(some, values, gate_values, gpu),
                METHOD,
                base=base,
                note=note,
                source=source,
            )
        )
    stands = [{**one, "implementation": PRICED} for one in found[:1] if one["implementation"] != PRICED]
    return [*found, *stands]


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Times of measured routers."""
    gate = known_family(profile, _GATE)

    def locate(values: tuple[Any, ...]) -> Key | str:
        implementation, cache = values
        if cache == "warm":
            return WARM
        return (
            f"the profile has no family {' '.join(_GATE)}"
            if gate is None
            else ("router", implementation, "any")
        )

    def price(part: pd.DataFrame, values: Values, key: Key) -> FloatArray:
        return predicted_s(part, values, gate.values() if gate is not None else {}, gpu)

    return predict_by_family(with_cache(rows), ["implementation", "cache"], locate, profile, price)
