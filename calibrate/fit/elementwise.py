"""Fit launches and device memory to tables of kinds ``launch`` and ``memory``.

A kernel launched from a CUDA graph costs ``launch_s``, the graph itself ``graph_s`` once. A long read or copy costs
``start_s`` and its bytes, a copy's counted twice, at a share of the datasheet's memory rate; bytes that stay in the
level-2 cache between two runs move ``l2_ratio`` times as fast. Together they make ``elementwise``, the family that
prices kernels bound by memory (`moesim.cost.elementwise`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, Prediction
from calibrate.fit.doubts import n_free
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

__all__ = ["TABLES", "fit_table", "predict_launch", "predict_memory", "predict_table"]

TABLES = ("launch", "memory")
_LAUNCHES = Method(("n_kernels",))
_BYTES = Method(("n_bytes",))
_ONCE = {
    "eager": ("call_s", 1e-5, "what a batch of kernels costs besides, once [s]"),
    "graph": ("graph_s", 5e-6, "starting the graph, once [s]"),
}
_MEMORY: Spec = {
    "start_s": (3e-6, 3e-7, 1e-4, "fixed cost of one kernel or copy [s]"),
    "hbm_fraction": (0.85, 0.2, 1.0, "share of the datasheet's memory rate"),
    "l2_ratio": (2.0, 1.0, 8.0, "rate of what is found in the level-2 cache, over that"),
}
_CACHE_SHARPNESS = 4.0
"""How suddenly bytes stop being found in the cache as they outgrow it."""


def _launch_kernel(mode: str) -> Kernel:
    name, first, meaning = _ONCE[mode]
    each = "one small kernel in a CUDA graph [s]" if mode == "graph" else "the host's time of one launch [s]"
    spec: Spec = {"launch_s": (3e-6, 2e-7, 1e-4, each), name: (first, 1e-8, 1e-3, meaning)}
    return Kernel("launch", mode, "any", spec)


def predict_launch(rows: pd.DataFrame, values: Values) -> FloatArray:
    """Time of one of `n_kernels` launched together [s]."""
    once_s = values.get("graph_s", 0.0) + values.get("call_s", 0.0)
    return np.asarray(values["launch_s"] + once_s / rows["n_kernels"].to_numpy(dtype=float))


def predict_memory(rows: pd.DataFrame, values: Values, gpu: Gpu) -> FloatArray:
    """Time of one read or copy of `n_bytes` [s]; with a cold cache nothing is found there."""
    moved = rows["n_bytes"].to_numpy(dtype=float) * np.where(rows["op"] == "hbm_copy", 2.0, 1.0)
    found = 1 / (1 + (moved / gpu.l2_bytes) ** _CACHE_SHARPNESS)
    if "cache" in rows:
        found = np.where(rows["cache"] == "cold", 0.0, found)
    rate = values["hbm_fraction"] * gpu.hbm_bytes_per_s
    return np.asarray(values["start_s"] + moved * (1 - found + found / values["l2_ratio"]) / rate)


def fit_table(
    rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note, source: str = ""
) -> list[dict[str, Any]]:
    """Families ``launch``, ``hbm_read``, ``hbm_copy``, and ``elementwise`` where graphs and copies were measured.

    Arguments as in `calibrate.fit.gemm.fit_table`.
    """
    found = []
    launches = rows[rows["op"] == "launch"]
    if len(launches):
        for mode, part in launches.groupby("mode", sort=True):
            kept = newest_software(part, note)
            found.append(
                fit_family(
                    _launch_kernel(mode), kept, predict_launch, _LAUNCHES, base=base, note=note, source=source
                )
            )
    for op, part in rows[rows["op"] != "launch"].groupby("op", sort=True):
        kept = newest_software(part, note)
        found.append(
            fit_family(
                Kernel(op, "cuda", "any", _MEMORY),
                kept,
                lambda some, values: predict_memory(some, values, gpu),
                _BYTES,
                base=base,
                note=note,
                source=source,
            )
        )
    return [*found, *_elementwise(found)]


def _elementwise(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels bound by memory: a graph's launch, and the rate of a long copy; the worse of their errors."""
    by_name = {(one["op"], one["implementation"]): one for one in found}
    launch, copy = by_name.get(("launch", "graph")), by_name.get(("hbm_copy", "cuda"))
    if launch is None or copy is None:
        return []
    parts = [one["provenance"] for one in (launch, copy)]
    if any(one["provenance"]["n_points"] < n_free(one) for one in (launch, copy)):
        return []
    held = [one for one in (launch, copy) if one.get("held_out")]
    worse = max(held, key=lambda one: one["held_out"]["median_ape"], default=None)
    error = (
        {"held_out": {**worse["held_out"], "split": f"{worse['op']}: {worse['held_out']['split']}"}}
        if worse
        else {}
    )
    return [
        {
            "op": "elementwise", "implementation": "fused", "dtype": "any",
            "parameters": {
                "launch_s": launch["parameters"]["launch_s"],
                "hbm_fraction": copy["parameters"]["hbm_fraction"],
            },
            "provenance": {
                "kind": "fitted", "data": "; ".join(part["data"] for part in parts),
                "n_points": sum(part["n_points"] for part in parts),
            },
            **error,
        }
    ]  # fmt: skip


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Times of measured launches, reads and copies."""

    def locate(values: tuple[Any, ...]) -> Key | str:
        op, mode = values
        return (op, mode, "any") if op == "launch" else (op, "cuda", "any")

    def price(part: pd.DataFrame, values: Values, key: Key) -> FloatArray:
        return predict_launch(part, values) if key[0] == "launch" else predict_memory(part, values, gpu)

    mode = rows["mode"].fillna("") if "mode" in rows else ""
    return predict_by_family(rows.assign(mode=mode), ["op", "mode"], locate, profile, price)
