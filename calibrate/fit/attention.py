"""Fit the attention kernels of `moesim.cost.attention` to ``attention.parquet``.

Run ``python -m calibrate.fit.attention DATA_DIR -o moesim/catalog/profiles``; DATA_DIR holds ``measured/``.
Equations, errors and what was tried: docs/fits/attention.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, LogFit, fit_log_least_squares, grouped_folds, write_fragment
from calibrate.fit.gemm import PEAKS
from calibrate.statistics import ape_stats
from moesim.cost.attention import Heads, decode_kernel_s, prefill_kernel_s
from moesim.hardware.gpu import Gpu, weight_bytes_per_element

__all__ = ["KERNELS", "Kernel", "families", "load_rows", "predicted_s"]

MEASURED = "h200-sxm"
CARRIED = ("h100-sxm",)
"""Same SM, other memory: the fractions are carried over."""
DATA = "AIConfigurator silicon database @095f58a51 (Apache-2.0): {op} {kind}, {device}, {software}, {kernel}"
SPLIT = "5-fold by (n_heads, n_kv_heads, head_dim, window), or one layout at a time where there are fewer"
FIT_ROWS = 4000
"""Rows of one fit, drawn at random from its folds."""
LATENT_DIM, LATENT_V_DIM = 576, 512
"""DeepSeek's latent (512) with its rotary part (64): the measured MLA kernels are the absorbed ones."""

MEANING = {
    "launch_s": "launches of the attention layer with one token [s]",
    "compute_fraction": "rate of both products over the datasheet's bfloat16 peak, softmax apart",
    "softmax_dims": "softmax of one pair, in multiply-adds per pair",
    "hbm_fraction": "rate of reading the cache over the datasheet's memory rate",
    "l2_ratio": "rate at which all SMs together load keys over the datasheet's memory rate",
    "unit_s": "fixed cost of one tile of queries on its SM [s]",
    "unit_dim_s": "the same, per dimension of key and value [s]",
    "edge_steps": "further steps of keys that a tile visits at the mask's edge",
    "wave_rounding": "share of a last, partial wave that is paid as a whole one",
    "overlap_power": "sharpness of the maximum of tiles and memory",
    "split_s": "summing the parts of a sequence cut over SMs [s]",
    "window_s": "further cost of a window shorter than the context [s]",
    "window_steps": "further steps of keys at the window's edge",
    "append_fraction": "rate of storing 4096 bytes a token of fresh keys and values, over the memory rate",
    "append_power": "growth of that time with the bytes of a token",
    "cast_fraction": "rate of casting queries to fp8, in bytes read, over the datasheet's memory rate",
    "wide_power": "growth of a key's cost in heads wider than 128, beyond their dimensions",
    "widen_fraction": "rate of widening the whole fp8 cache before the product, in bytes read, over the memory rate",
}
_SHARED = {
    "launch_s": (8e-6, 2e-6, 2e-5), "hbm_fraction": (0.85, 0.5, 0.95), "l2_ratio": (4.0, 0.5, 8.0),
    "unit_s": (2e-6, 1e-8, 1e-5), "unit_dim_s": (2e-9, 1e-11, 5e-8), "wave_rounding": (0.8, 0.01, 1.0),
    "overlap_power": (3.0, 1.5, 8.0), "append_fraction": (0.2, 0.005, 0.95), "append_power": (0.8, 0.3, 1.0),
}  # fmt: skip
_PREFILL = {
    "compute_fraction": (0.7, 0.4, 0.9), "softmax_dims": (60.0, 1.0, 200.0), "edge_steps": (0.5, 0.05, 2.0),
    "split_s": (2e-6, 1e-7, 1e-5),
}  # fmt: skip
_DECODE = {
    "compute_fraction": (0.7, 0.4, 0.9), "softmax_dims": (30.0, 1.0, 200.0), "split_s": (2e-6, 1e-7, 1e-5),
}  # fmt: skip
_WINDOW = {"window_s": (2e-6, 1e-8, 1e-5), "window_steps": (1.0, 1.0, 1.0)}
_CAST = {"cast_fraction": (0.2, 0.02, 0.95)}
_WIDE = {"wide_power": (1.0, 0.05, 3.0)}
_LATENT = {"compute_fraction": (0.68, 0.4, 0.9), "append_power": (1.0, 1.0, 1.0)}
_WIDEN = {"widen_fraction": (0.07, 0.01, 0.95)}


@dataclass(frozen=True)
class Kernel:
    """One family of the profile and the rows that it is fitted to."""

    op: str
    kind: str
    implementation: str
    dtype: str
    """Format of the KV cache."""
    measured: str
    """Implementation in the measured table."""
    ranges: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Start, low, high by parameter; equal bounds hold it."""


_FA3, _MLA = "vllm:vllm_flash_attn_fa3", "sglang:flash_attention"
_P, _D = _SHARED | _PREFILL, _SHARED | _DECODE
KERNELS = (
    Kernel("attention_prefill", "gqa", "gqa-fa3", "bfloat16", _FA3, _P),
    Kernel("attention_prefill", "gqa", "gqa-fa3", "fp8", _FA3, _P | _CAST),
    Kernel("attention_prefill", "mla", "mla-fa3", "bfloat16", _MLA, _P | _LATENT),
    Kernel("attention_prefill", "mla", "mla-fa3", "fp8", _MLA, _P | _LATENT),
    Kernel("attention_decode", "gqa", "gqa-fa3", "bfloat16", _FA3, _D | _WINDOW),
    Kernel("attention_decode", "gqa", "gqa-fa3", "fp8", _FA3, _D | _WINDOW | _CAST | _WIDE),
    Kernel("attention_decode", "mla", "mla-fa3", "bfloat16", _MLA, _D | _LATENT),
    Kernel("attention_decode", "mla", "mla-fa3", "fp8", _MLA, _D | _LATENT | _WIDEN),
)
_LAYOUT = ["n_heads", "n_kv_heads", "head_dim", "window"]
_COLUMNS = ["batch", "n_query", "n_context", *_LAYOUT]


def load_rows(data_dir: Path, kernel: Kernel) -> pd.DataFrame:
    """Measured rows of one kernel; MLA's layouts are spelled out as the latent's."""
    table = pd.read_parquet(data_dir / "measured" / "attention.parquet")
    table = table[(table.device == MEASURED) & (table.op == kernel.op) & (table.kind == kernel.kind)]
    rows = table[(table.implementation == kernel.measured) & (table.kv_dtype == kernel.dtype)].copy()
    if kernel.kind == "mla":
        rows["n_kv_heads"], rows["head_dim"] = 1, LATENT_DIM
    rows[_COLUMNS] = rows[_COLUMNS].astype(float)
    return rows.reset_index(drop=True)


def predicted_s(rows: pd.DataFrame, values: Mapping[str, float], gpu: Gpu, kernel: Kernel) -> FloatArray:
    """Model's time of every row [s]."""
    column = {name: rows[name].to_numpy(dtype=float) for name in _COLUMNS}
    latent = kernel.kind == "mla"
    heads = Heads(
        column["n_heads"], column["n_kv_heads"], column["head_dim"],
        LATENT_V_DIM if latent else column["head_dim"], column["window"],
        weight_bytes_per_element(kernel.dtype), kernel.kind,
    )  # fmt: skip
    batch, context = column["batch"], column["n_context"]
    if kernel.op == "attention_decode":
        return decode_kernel_s(batch, context, heads, gpu=gpu, params=values)
    return prefill_kernel_s(batch, column["n_query"], context, heads, gpu=gpu, params=values)


def _fit(rows: pd.DataFrame, kernel: Kernel, gpu: Gpu, seed: int) -> LogFit:
    sample = rows.sample(min(FIT_ROWS, len(rows)), random_state=seed)
    start = {name: first for name, (first, _, _) in kernel.ranges.items()}
    bounds = {name: (low, high) for name, (_, low, high) in kernel.ranges.items()}
    return fit_log_least_squares(
        lambda values: predicted_s(sample, values, gpu, kernel),
        sample.latency_s.to_numpy(), start, bounds, max_evaluations=30,
    )  # fmt: skip


def held_out(rows: pd.DataFrame, kernel: Kernel, gpu: Gpu) -> dict[str, Any]:
    """Errors on head layouts that the fit did not see."""
    predicted = np.zeros(len(rows))
    for seed, mask in enumerate(grouped_folds(rows[_LAYOUT].to_numpy(), 5, seed=0)):
        values = _fit(rows[~mask], kernel, gpu, seed).values
        predicted[mask] = predicted_s(rows[mask], values, gpu, kernel)
    return {"split": SPLIT, **ape_stats(predicted, rows.latency_s.to_numpy())}


def families(data_dir: Path) -> list[dict[str, Any]]:
    """Every attention family, as a profile holds it."""
    gpu = PEAKS[MEASURED]
    found = []
    for kernel in KERNELS:
        rows = load_rows(data_dir, kernel)
        fit = _fit(rows, kernel, gpu, seed=0)
        found.append(_family(kernel, rows, fit, held_out(rows, kernel, gpu)))
    return found


def _family(kernel: Kernel, rows: pd.DataFrame, fit: LogFit, error: Mapping[str, Any]) -> dict[str, Any]:
    data = DATA.format(
        op=kernel.op,
        kind=kernel.kind,
        device=MEASURED,
        software=rows.software.iloc[0],
        kernel=kernel.measured,
    )
    return {
        "op": kernel.op,
        "implementation": kernel.implementation,
        "dtype": kernel.dtype,
        "parameters": {
            name: {"value": value, "stderr": fit.stderr[name], "meaning": MEANING[name]}
            for name, value in fit.values.items()
        },
        "provenance": {"kind": "fitted", "data": data, "n_points": len(rows)},
        "held_out": dict(error),
    }


def _carried(family: Mapping[str, Any]) -> dict[str, Any]:
    """The same fractions on a GPU that was not measured."""
    kept = {key: value for key, value in family.items() if key != "held_out"}
    data = f"fractions of peak fitted on {MEASURED}: {family['provenance']['data']}"
    return kept | {"provenance": {"kind": "carried-over", "data": data}}


def main() -> None:
    """Fit the measured device, carry over to its sibling, and write the fragments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args()
    found = families(chosen.data_dir)
    write_fragment(chosen.output / f"{MEASURED}.attention.yaml", MEASURED, found)
    for device in CARRIED:
        path = chosen.output / f"{device}.attention.yaml"
        write_fragment(path, device, [_carried(family) for family in found])


if __name__ == "__main__":
    main()
