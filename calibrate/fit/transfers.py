"""Fit copies between host and device memory to tables of kind ``transfer``.

A copy costs ``latency_s``, ``stream_s`` for each further stream, and its bytes at a share of the link's datasheet
rate: PCIe's to and from the host, half the memory's on the device, which reads and writes. While kernels run the
bytes take ``busy_ratio`` as long. Pinned and pageable memory of the host are families of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, Prediction
from calibrate.fit.family import (
    Kernel,
    Key,
    Method,
    Note,
    Spec,
    Values,
    fit_family,
    newest_software,
    predict_by_family,
)
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Profile

__all__ = ["TABLES", "fit_table", "predict_table", "predicted_s"]

TABLES = ("transfer",)
METHOD = Method(("n_bytes",))
_SPEC: Spec = {
    "latency_s": (8e-6, 5e-7, 1e-3, "fixed cost of a copy [s]"),
    "rate_fraction": (0.8, 0.005, 1.0, "share of the link's datasheet rate"),
    "stream_s": (1e-6, 1e-9, 1e-3, "each further stream [s]"),
    "busy_ratio": (1.05, 1.0, 10.0, "time of the bytes while kernels run, over that without"),
}


def _key(op: str, pinned: int) -> Key:
    if op == "d2d":
        return op, "cuda", "any"
    return op, "cuda-pinned" if pinned else "cuda-pageable", "any"


def predicted_s(rows: pd.DataFrame, values: Values, gpu: Gpu) -> FloatArray:
    """Time of all `n_streams` copies, `n_bytes` together [s]."""
    column = {name: rows[name].to_numpy(dtype=float) for name in ("n_bytes", "n_streams", "busy")}
    peak = np.where(rows["op"] == "d2d", gpu.hbm_bytes_per_s / 2, gpu.pcie_bytes_per_s)
    slower = np.where(column["busy"] == 1, values["busy_ratio"], 1.0)
    start_s = values["latency_s"] + values["stream_s"] * (column["n_streams"] - 1)
    return np.asarray(start_s + slower * column["n_bytes"] / (values["rate_fraction"] * peak))


def fit_table(
    rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note, source: str = ""
) -> list[dict[str, Any]]:
    """Families ``h2d``, ``d2h`` and ``d2d`` of one device; arguments as in `calibrate.fit.gemm.fit_table`."""
    found = []
    names = [_key(op, pinned) for op, pinned in zip(rows["op"], rows["pinned"], strict=True)]
    labels = pd.Series([" ".join(name) for name in names], index=rows.index)
    for _, part in rows.groupby(labels, sort=True):
        key = _key(part["op"].iloc[0], int(part["pinned"].iloc[0]))
        found.append(
            fit_family(
                Kernel(*key, _spec_of(part)),
                newest_software(part, note),
                lambda some, values: predicted_s(some, values, gpu),
                METHOD,
                base=base,
                note=note,
                source=source,
            )
        )
    return found


def _spec_of(rows: pd.DataFrame) -> Spec:
    """Parameters; what the rows never vary is held at no effect."""
    held = {}
    if (rows["n_streams"] == 1).all():
        held["stream_s"] = (1e-9, 1e-9, 1e-9, "each further stream: not measured [s]")
    if (rows["busy"] == 0).all():
        held["busy_ratio"] = (1.0, 1.0, 1.0, "time of the bytes while kernels run: not measured")
    return {**_SPEC, **held}


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Times of measured copies."""

    def locate(values: tuple[Any, ...]) -> Key | str:
        return _key(str(values[0]), int(values[1]))

    def price(part: pd.DataFrame, values: Values, key: Key) -> FloatArray:
        return predicted_s(part, values, gpu)

    return predict_by_family(rows, ["op", "pinned"], locate, profile, price)
