"""Fit the expert feed-forward of `moesim.cost.expert_ffn` to tables of kind ``moe_ffn``.

Equations, errors and what was tried: docs/fits/moe_ffn.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, LogFit, Prediction, fit_log_least_squares, grouped_folds
from calibrate.fit.family import (
    MARKED,
    Key,
    Note,
    Values,
    is_blind,
    known_family,
    newest_software,
    predict_by_family,
    provenance_text,
    say,
    seen_rows,
)
from calibrate.fit.moe_load import UPCAST
from calibrate.fit.moe_rows import MeasuredRows, Priced, sample_rows
from calibrate.loads import TRACE
from calibrate.statistics import ape_stats
from moesim.cost.expert_ffn import ExpertFfnParameters
from moesim.cost.moe_tiles import tile_library
from moesim.errors import HardwareError
from moesim.hardware.gpu import Gpu, weight_bytes_per_element
from moesim.hardware.profile import Profile
from moesim.routing.catalog import catalog_names

__all__ = [
    "NAMES",
    "RATES",
    "TABLES",
    "fit_table",
    "kernel_of",
    "parameters_of",
    "predict_table",
    "usable_rows",
]

TABLES = ("moe_ffn",)
NAMES = {
    "sglang:sglang_fused_moe_triton": "sglang-triton",
    "sglang:sglang_flashinfer_cutlass_moe": "sglang-cutlass",
    "sglang:wideep_context": "sglang-deepep-context",
    "sglang:wideep_generation": "sglang-deepep-decode",
    "trtllm:moe_torch_flow": "trtllm-cutlass",
    "trtllm:moe_torch_flow_cutlass": "trtllm-cutlass",
    "trtllm:moe_torch_flow_nongated": "trtllm-cutlass",
    "vllm:vllm_fp8moe_flashinfer_cutlass_flashinferexperts": "vllm-cutlass",
    "vllm:vllm_fp8moe_triton_tritonexperts": "vllm-triton",
    "vllm:vllm_gptossmxfp4moe_triton_oaitritonmxfp4expertsmonolithic": "vllm-triton",
    "vllm:vllm_modeloptfp8moe_flashinfer_cutlass_flashinferexperts": "vllm-cutlass",
    "vllm:vllm_unquantizedfusedmoe_triton_tritonexperts": "vllm-triton",
}
"""Implementation in the measured table to that of the profile; others keep their name."""

FIT_ROWS, FEW_ROWS, CHECK_ROWS = 2500, 700, 6000
UNFITTED = frozenset({"trtllm:moe_torch_flow_nongated"})
"""Predicted by the family of their name, but left out of its fit: TensorRT-LLM's experts of two matrices."""
RATES = ("launch_s", "hbm_fraction", "flops_fraction", "local_traffic_fraction")
"""What alone is fitted where a device has fewer rows than there are parameters and a base to take the others from."""
RATE_WEIGHT = 1.0
"""How strongly these stay near the base's."""
PRIOR_WEIGHT = 8.0
"""How strongly a device's parameters stay near the base profile's; see `fit_log_least_squares`."""
GUESS_WEIGHT = 0.1
"""The same for first guesses where there is no base: only what the rows say nothing of stays."""

FREE: dict[str, tuple[float, float, float]] = {
    "launch_s": (15e-6, 1e-6, 1e-3),
    "ramp_s": (1e-6, 1e-9, 2e-5),
    "align_s": (5e-6, 1e-7, 5e-5),
    "score_s": (1e-11, 1e-14, 1e-9),
    "hbm_fraction": (0.88, 0.05, 0.96),
    "line_power": (0.6, 0.05, 2.0),
    "flops_fraction": (0.8, 0.05, 1.0),
    "small_flops_fraction": (0.4, 0.02, 1.0),
    "operand_fraction": (0.8, 0.05, 1.0),
    "step_s": (9e-7, 1e-8, 1e-5),
    "step_warm_s": (3e-7, 1e-8, 1e-5),
    "warm_share": (0.6, 0.02, 3.0),
    "tile_s": (1e-6, 1e-8, 5e-5),
    "wave_quantisation": (0.9, 0.01, 1.0),
    "overlap_power": (3.0, 1.0, 12.0),
    "sustained_loss": (0.05, 1e-3, 0.1),
    "reread_fraction": (0.1, 1e-4, 1.0),
    "unaligned_factor": (4.0, 1.0, 20.0),
    "local_traffic_fraction": (1.0, 0.02, 5.0),
    "remote_wide_fraction": (1.0, 0.02, 100.0),
    "remote_hidden_fraction": (1.0, 0.02, 100.0),
    "token_traffic_fraction": (1.0, 0.02, 30.0),
    "empty_tile_s": (1e-7, 1e-10, 1e-5),
    "remote_tile_s": (1e-7, 1e-10, 1e-5),
    "slot_s": (1e-7, 1e-11, 5e-6),
}
"""First guess, lower and upper bound of each fitted parameter."""

HELD: dict[str, float] = {
    "host_s": 0.0,
    "tile_by_group": 0.0,
    "tile_fill": 1.0,
    "tile_rows_min": 16.0,
    "tile_rows_max": 128.0,
    "tile_columns": 128.0,
    "tile_depth": 64.0,
    "tile_warps": 8.0,
    "tile_stages": 4.0,
}
"""Parameters that are chosen from a few values, or given, instead of fitted."""
_OWN_RULE = {"line_power": 0.0, "unaligned_factor": 1.0, "empty_tile_s": 0.0, "remote_tile_s": 0.0}
"""Held where the library's tiles are not known: they are effects of known tiles."""
_SORTED = {
    "remote_wide_fraction": 1.0,
    "remote_hidden_fraction": 1.0,
    "token_traffic_fraction": 1.0,
    "score_s": 0.0,
}
"""Held where rows arrive sorted: nothing of it is in the call."""


@dataclass(frozen=True)
class _Kernel:
    """One library's kernel in one weight format."""

    implementation: str
    dtype: str

    @property
    def key(self) -> Key:
        """Name in a profile."""
        return "moe_ffn", self.implementation, self.dtype

    @property
    def sorted(self) -> bool:
        """Whether rows arrive sorted by expert."""
        return self.implementation.startswith("sglang-deepep")

    def choices(self, own: bool) -> Iterator[dict[str, float]]:
        """Held parameters to try; where the library's tile rule is known there is nothing to choose."""
        if tile_library(self.implementation, self.dtype) is not None:
            yield HELD | {"slot_s": 0.0}
            return
        held = HELD | _OWN_RULE | (_SORTED if self.sorted else {}) | ({"score_s": 0.0} if own else {})
        if self.implementation == "sglang-deepep-context":  # DeepGEMM's contiguous layout pads to 128 rows
            for columns in (64.0, 128.0):
                yield held | {"host_s": 3.7e-4, "tile_rows_min": 128.0, "tile_columns": columns}
            return
        if self.implementation == "moesim-triton":  # whose rule is known: calibrate.kernels.tiles
            for columns in (128.0, 256.0):
                yield held | {"tile_by_group": 2.0, "tile_columns": columns}
            return
        ranges = ((16.0, 64.0), (16.0, 128.0), (64.0, 64.0), (64.0, 128.0))
        by_group = (0.0,) if self.sorted else (0.0, 1.0)
        # MXFP4 weights lie in tiles of 8 warps by 32 columns on Hopper (triton_kernels, HopperMXScaleLayout)
        widths = (128.0, 256.0) if self.dtype == "w4a16_mxfp4" else (64.0, 128.0)
        for (low, high), group, columns in itertools.product(ranges, by_group, widths):
            yield held | {
                "tile_rows_min": low, "tile_rows_max": high, "tile_by_group": group, "tile_columns": columns
            }  # fmt: skip


def kernel_of(implementation: str, dtype: str) -> Key:
    """Family that rows of a measured implementation are fitted as."""
    if (implementation, dtype) == UPCAST:
        return "moe_ffn", "sglang-upcast", "bfloat16"
    return "moe_ffn", NAMES.get(implementation, implementation), dtype


def fit_table(rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note) -> list[dict[str, Any]]:
    """Families of a profile, one a library and weight format; see docs/calibration.md."""
    found = []
    rows = rows[~rows["implementation"].isin(UNFITTED)]
    keys = [kernel_of(*pair) for pair in zip(rows["implementation"], rows["dtype"], strict=True)]
    names, dtypes = ([key[i] for key in keys] for i in (1, 2))
    for (implementation, dtype), part in rows.groupby([names, dtypes], sort=True):
        kernel = _Kernel(implementation, dtype)
        if reason := _reason_against(kernel):
            note(f"{implementation} {dtype}: {reason}")
            continue
        newest = newest_software(part, note)
        used = usable_rows(newest)
        if len(used) < len(newest):
            note(
                f"{implementation} {dtype}: {len(newest) - len(used)} rows are left out, their load is unknown"
            )
        if used.empty or not seen_rows(used).any():
            continue
        found.append(_fit_family(kernel, used, gpu, base, note))
    return found


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Times of measured rows by a profile; NaN, with a reason, where it has none."""

    def locate(values: tuple[Any, ...]) -> Key | str:
        implementation, dtype = values
        kernel = _Kernel(*kernel_of(implementation, dtype)[1:])
        return _reason_against(kernel) or kernel.key

    def price(part: pd.DataFrame, values: Values, key: Key) -> FloatArray:
        parameters_of(values)
        time_s = np.full(len(part), np.nan)
        known = part.index.isin(usable_rows(part).index)
        if not known.any():
            return time_s
        measured = MeasuredRows.of(part[known].assign(latency_s=1.0))
        time_s[known] = Priced(measured, gpu, key[1], key[2]).predict(values)
        return time_s

    return predict_by_family(rows, ("implementation", "dtype"), locate, profile, price)


def parameters_of(values: Values) -> ExpertFfnParameters:
    """A family's parameters; KeyError, with the name, where a profile of before lacks one."""
    missing = {field.name for field in fields(ExpertFfnParameters)} - set(values)
    if missing:
        raise KeyError(min(missing))
    return ExpertFfnParameters.from_values(values)


def usable_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows whose load the table describes, of what the model means.

    Notes
    -----
    `sglang:wideep_context` with a uniform load gives DeepGEMM's contiguous layout counts that are not padded
    to its 128-row blocks, so that below 128 tokens an expert most experts are never multiplied (1 token for
    each of 128 experts is timed at a third of what reading their weights takes): those rows are left out.
    """
    load = rows["load"].astype(str)
    known = load.isin(["balanced", "uniform"]) | load.str.fullmatch(r"power_law_\d+(\.\d+)?")
    known |= load.isin([f"{TRACE}{name}" for name in catalog_names()])
    ragged = (rows["implementation"] == "sglang:wideep_context") & (load == "uniform")
    mean_rows = rows["n_tokens"] * rows["top_k"] / rows["n_experts"]
    return rows[known & ~(ragged & (mean_rows % 128 != 0))]


def _reason_against(kernel: _Kernel) -> str:
    """Why a weight format cannot be priced; empty where it can."""
    try:
        weight_bytes_per_element(kernel.dtype)
    except HardwareError:
        return f"no weight format {kernel.dtype} is known"
    return ""


def _fit_family(
    kernel: _Kernel, rows: pd.DataFrame, gpu: Gpu, base: Profile | None, note: Note
) -> dict[str, Any]:
    """Choose tiles, fit, hold out; returns one family of a profile."""
    known = known_family(base, kernel.key)
    prior = known.values() if known is not None and set(HELD) <= set(known.values()) else None
    seen = rows[seen_rows(rows)]
    own = not seen["implementation"].iloc[0].startswith(("sglang:", "vllm:", "trtllm:"))
    choices = [_held_of(kernel, prior)] if prior else list(kernel.choices(own))
    if prior and len(seen) < len(
        FREE
    ):  # too few to say more than how fast the device is: the shape is the base's
        choices = [choices[0] | {name: prior[name] for name in FREE if name not in RATES}]
    fit_rows = Priced(
        MeasuredRows.of(sample_rows(seen, FIT_ROWS, seed=0)), gpu, kernel.implementation, kernel.dtype
    )
    best: LogFit | None = None
    held = choices[0]
    if len(choices) > 1:
        few = Priced(
            MeasuredRows.of(sample_rows(seen, FEW_ROWS, seed=1)), gpu, kernel.implementation, kernel.dtype
        )
        tried = [(_fit(few, one, prior, 8), one) for one in choices]
        best, held = min(tried, key=lambda pair: pair[0].cost)
    fit = _fit(fit_rows, held, prior, 40, best.values if best else None)
    if len(seen) < len(rows):
        check = MeasuredRows.of(rows[~seen_rows(rows)])
        blind_to = known is None or is_blind(known, rows)
        split = MARKED if blind_to else f"{MARKED}; the base was fitted on {gpu.name} before"
        error: dict[str, Any] | None = {"split": split, **_error(check, gpu, kernel, {**held, **fit.values})}
    else:
        blind = prior if known is not None and is_blind(known, rows) else None
        error = _held_out(fit_rows, rows, gpu, kernel, held, fit.values, blind)
    data = provenance_text(rows, "AIConfigurator silicon database @095f58a51 (Apache-2.0)" if not own else "")
    if base is not None and prior:
        data += f"; kept near the values of {base.device}'s profile"
    note(f"{' '.join(kernel.key)}: {len(seen)} rows" + (f", held out {say(error)}" if error else ""))
    entry: dict[str, Any] = {
        "op": "moe_ffn",
        "implementation": kernel.implementation,
        "dtype": kernel.dtype,
        "parameters": _described({**held, **fit.values}, fit.stderr),
        "provenance": {"kind": "fitted", "data": data, "n_points": fit.n_rows},
    }
    return entry | ({"held_out": error} if error else {})


def _held_of(kernel: _Kernel, prior: Mapping[str, float]) -> dict[str, float]:
    """What another device's family held: its tiles, and what its kind of kernel does not have."""
    example = next(kernel.choices(own=False))
    held = {name: prior[name] for name in example}
    return held | ({"score_s": 0.0} if prior["score_s"] == 0.0 else {})


def _fit(
    rows: Priced, held: Mapping[str, float], prior: Mapping[str, float] | None, evaluations: int,
    start: Mapping[str, float] | None = None,
) -> LogFit:  # fmt: skip
    """Fit the free parameters, the others held; `host_s` is free where it is not zero."""
    held = dict(held)
    guess = {name: first for name, (first, _, _) in FREE.items()}
    bounds = {name: (low, high) for name, (_, low, high) in FREE.items()}
    if held["host_s"] > 0:
        guess["host_s"] = held.pop("host_s")
        bounds["host_s"] = (1e-4, 1e-3)
    near = {name: (prior or guess)[name] for name in guess if name not in held}
    first = {name: (start or near).get(name, value) for name, value in near.items()}
    return fit_log_least_squares(
        lambda values: rows.predict({**held, **values}),
        rows.rows.latency_s,
        first,
        bounds,
        prior={name: value for name, value in near.items() if value > 0},
        prior_weight=GUESS_WEIGHT
        if not prior
        else PRIOR_WEIGHT
        if len(near) > len(RATES) + 1
        else RATE_WEIGHT,
        max_evaluations=evaluations,
    )


def _held_out(
    fit_rows: Priced, rows: pd.DataFrame, gpu: Gpu, kernel: _Kernel, held: Mapping[str, float],
    start: Mapping[str, float], prior: Mapping[str, float] | None,
) -> dict[str, Any] | None:  # fmt: skip
    """Error on shapes that the fit did not see; where there are few shapes, on rank counts."""
    check = MeasuredRows.of(sample_rows(rows, CHECK_ROWS, seed=2))
    by_cell = len(np.unique(check.shapes, axis=0)) < 3
    keys, fit_keys = (one.cells if by_cell else one.shapes for one in (check, fit_rows.rows))
    if len(np.unique(keys, axis=0)) < 2:
        return None
    predicted = np.zeros(len(keys))
    for fold in grouped_folds(keys, 5, seed=0):
        hidden_keys = {tuple(key) for key in keys[fold].tolist()}
        train = np.array([tuple(key) not in hidden_keys for key in fit_keys.tolist()])
        priced = Priced(fit_rows.rows.where(train), gpu, kernel.implementation, kernel.dtype)
        values = {**held, **_fit(priced, held, prior, 15, start).values}
        predicted[fold] = Priced(check.where(fold), gpu, kernel.implementation, kernel.dtype).predict(values)
    split = "5-fold by (hidden, intermediate, top_k, n_experts"
    split += ", tp, ep): too few shapes" if by_cell else ")"
    return {"split": split, **ape_stats(predicted, check.latency_s)}


def _error(rows: MeasuredRows, gpu: Gpu, kernel: _Kernel, values: Mapping[str, float]) -> dict[str, Any]:
    predicted = Priced(rows, gpu, kernel.implementation, kernel.dtype).predict(values)
    return dict(ape_stats(predicted, rows.latency_s))


def _described(values: Mapping[str, float], stderr: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    described = {}
    for field in fields(ExpertFfnParameters):
        entry: dict[str, Any] = {"value": values[field.name], "meaning": MEANINGS[field.name]}
        if field.name in stderr:
            entry["stderr"] = stderr[field.name]
        else:
            entry["meaning"] += " (held)"
        described[field.name] = entry
    return described


MEANINGS = {
    "launch_s": "launches and dependencies of one call",
    "ramp_s": "added by each doubling of the (token, expert) pairs",
    "align_s": "sorting rows by expert",
    "score_s": "router's top-k in a measured call, a token and expert",
    "hbm_fraction": "share of the memory peak at which weights stream",
    "line_power": "how steeply that falls with steps shorter than a cache line",
    "flops_fraction": "share of the matrix peak inside a tile of 64 rows or more",
    "small_flops_fraction": "the same inside a flatter tile",
    "operand_fraction": "share of 64 bytes a clock and SM at which operands arrive",
    "step_s": "latency of a step of the inner loop, weights in memory",
    "step_warm_s": "the same, weights in the level-2 cache",
    "warm_share": "weights that stay in the cache between calls, over its size",
    "tile_s": "prologue and epilogue of a tile",
    "wave_quantisation": "how far SMs idle in the last wave",
    "overlap_power": "norm that joins compute, latency and memory",
    "sustained_loss": "clock's drop under a product that lasts",
    "reread_fraction": "share of a weight fetched again by each further tile of rows",
    "unaligned_factor": "slowdown of the down product at widths that 16 does not divide",
    "local_traffic_fraction": "share of the memory peak of permute, activation and combine",
    "remote_wide_fraction": "the same for the intermediate columns of other ranks' pairs",
    "remote_hidden_fraction": "the same for their hidden columns",
    "token_traffic_fraction": "the same for tokens in and out",
    "empty_tile_s": "a block of the grid without rows, on its SM",
    "remote_tile_s": "a tile of other ranks' pairs, on its SM",
    "slot_s": "scheduling of one expert slot in one product",
    "host_s": "host time of a call that is not hidden",
    "tile_by_group": "tiles chosen by rows a slot: the rank's (0), the group's over the rank's slots (1) or all (2)",
    "tile_fill": "tile height over mean rows a slot",
    "tile_rows_min": "shortest tile",
    "tile_rows_max": "tallest tile",
    "tile_columns": "width of a tile",
    "tile_depth": "depth of one step",
    "tile_warps": "warps of a tile",
    "tile_stages": "steps in flight",
}
