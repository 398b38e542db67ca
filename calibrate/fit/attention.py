"""Fit the attention kernels of `moesim.cost.attention` to tables of kind ``attention``.

Equations, errors and what was tried: docs/fits/attention.md.
"""

from __future__ import annotations

from functools import partial
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
    newest_software,
    predict_by_family,
    seen_rows,
    with_cache,
)
from calibrate.fit.mla_block import decode_block_s, missing_family
from moesim.cost.attention import Heads, decode_kernel_s, prefill_kernel_s
from moesim.hardware.gpu import Gpu, weight_bytes_per_element
from moesim.hardware.profile import Profile

__all__ = ["NAMES", "TABLES", "fit_table", "kernel_of", "predict_table", "predicted_s"]

TABLES = ("attention", "mla_block")
LATENT_DIM, LATENT_V_DIM = 576, 512
"""DeepSeek's latent (512) with its rotary part (64): the measured MLA kernels are the absorbed ones."""
WIDEST_HEAD = 256
"""Widest head whose tiles the model knows; FlashAttention-4 runs heads of 512 in another way."""
NAMES = {"vllm:vllm_flash_attn_fa3": "gqa-fa3", "sglang:flash_attention": "mla-fa3", "sglang:fa3": "mla-fa3"}
"""Implementation in the measured tables to that of the profile; others keep their name."""
METHODS = {
    "gqa": Method(("n_heads", "n_kv_heads", "head_dim", "window")),
    # MLA's other columns say the same of every layout: all heads share one latent.
    "mla": Method(("n_heads",), split="5-fold by n_heads"),
}

_MEANING = {
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
    "append_fraction": "rate of storing up to 2048 bytes a token of fresh keys and values, over the memory rate",
    "append_wide_fraction": "the same, the bytes of a token beyond those",
    "sequence_s": "listing one sequence of a batch: its pages, its place among the tiles [s]",
    "cast_fraction": "rate of casting queries to fp8, in bytes read, over the datasheet's memory rate",
    "wide_power": "growth of a key's cost in heads wider than 128, beyond their dimensions",
    "widen_fraction": "rate of widening the whole fp8 cache before the product, in bytes read, over the memory rate",
}
_SHARED = {
    "launch_s": (8e-6, 2e-6, 2e-5), "hbm_fraction": (0.85, 0.5, 0.95), "l2_ratio": (4.0, 0.5, 8.0),
    "unit_s": (2e-6, 1e-8, 1e-5), "unit_dim_s": (2e-9, 1e-11, 5e-8), "wave_rounding": (0.8, 0.01, 1.0),
    "overlap_power": (3.0, 1.5, 8.0), "append_fraction": (0.1, 0.005, 0.95),
    "compute_fraction": (0.7, 0.4, 0.9), "split_s": (2e-6, 1e-7, 1e-5),
}  # fmt: skip
_RANGES = {
    "attention_prefill": _SHARED | {"softmax_dims": (60.0, 1.0, 200.0), "edge_steps": (0.5, 0.05, 2.0)},
    "attention_decode": _SHARED | {"softmax_dims": (30.0, 1.0, 200.0)},
}
_SEQUENCE = {"sequence_s": (5e-9, 1e-11, 1e-6)}
_WINDOW = {"window_s": (2e-6, 1e-8, 1e-5), "window_steps": (1.0, 1.0, 1.0)}
_CAST = {"cast_fraction": (0.2, 0.02, 0.95)}
_LATENT = {"compute_fraction": (0.68, 0.4, 0.9)}
_ANY_RATE = {
    "launch_s": (1e-6, 2e-4), "hbm_fraction": (0.01, 0.95), "l2_ratio": (0.05, 8.0), "unit_s": (1e-8, 1e-4),
    "compute_fraction": (0.01, 0.95),
}  # fmt: skip
"""Bounds for a kernel of which nothing is known."""
_COLUMNS = ["batch", "n_query", "n_context", "n_heads", "n_kv_heads", "head_dim", "window"]


def kernel_of(op: str, kind: str, implementation: str, dtype: str) -> Kernel:
    """Family that rows of a measured implementation are fitted as; `dtype` is that of the KV cache."""
    ranges = dict(_RANGES[op])
    decode, fp8 = op == "attention_decode", dtype == "fp8"
    if kind == "mla":
        ranges |= _LATENT | ({"widen_fraction": (0.07, 0.01, 0.95)} if decode and fp8 else {})
    else:
        ranges |= {"append_wide_fraction": (0.2, 0.01, 0.95)}
        ranges |= (_WINDOW | _SEQUENCE if decode else {}) | (_CAST if fp8 else {})
        ranges |= {"wide_power": (1.0, 0.05, 3.0)} if fp8 else {}
    if implementation not in NAMES:
        ranges |= {name: (row[0], *_ANY_RATE[name]) for name, row in ranges.items() if name in _ANY_RATE}
    spec: Spec = {name: (*row, _MEANING[name]) for name, row in ranges.items()}
    return Kernel(op, NAMES.get(implementation, implementation), dtype, spec)


def predicted_s(rows: pd.DataFrame, values: Values, gpu: Gpu, op: str, kind: str, dtype: str) -> FloatArray:
    """Model's time of every row of one family [s]; MLA's heads are the latent's."""
    column = {name: rows[name].to_numpy(dtype=float) for name in _COLUMNS}
    latent = kind == "mla"
    heads = Heads(
        column["n_heads"], np.ones(len(rows)) if latent else column["n_kv_heads"],
        np.full(len(rows), LATENT_DIM) if latent else column["head_dim"],
        LATENT_V_DIM if latent else column["head_dim"], column["window"],
        weight_bytes_per_element(dtype), kind,
    )  # fmt: skip
    batch, context = column["batch"], column["n_context"]
    if op == "attention_decode":
        return decode_kernel_s(batch, context, heads, gpu=gpu, params=values)
    return prefill_kernel_s(batch, column["n_query"], context, heads, gpu=gpu, params=values)


def fit_table(
    rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note, source: str = ""
) -> list[dict[str, Any]]:
    """Families ``attention_prefill`` and ``attention_decode`` of one device.

    Whole MLA blocks are not fitted: they are the sum of their attention and their products. Arguments as in
    `calibrate.fit.gemm.fit_table`.
    """
    found = []
    names = ["op", "kind", "implementation", "kv_dtype"]
    for (op, kind, implementation, dtype), every in _attention_rows(rows).groupby(names, sort=False):
        part = every[every["head_dim"] <= WIDEST_HEAD] if kind == "gqa" else every
        if len(part) < len(every):
            wide = len(every) - len(part)
            note(f"{op} {implementation}: {wide} rows not fitted: heads wider than {WIDEST_HEAD}")
        part = cold_rows(part, note)
        if not seen_rows(part).any():
            continue
        found.append(
            fit_family(
                kernel_of(op, kind, implementation, dtype),
                newest_software(part, note),
                partial(predicted_s, gpu=gpu, op=op, kind=kind, dtype=dtype),
                METHODS[kind],
                base=base,
                note=note,
                source=source,
            )
        )
    return found


def _attention_rows(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["op"].isin(list(_RANGES))]


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Times of measured attention, and of DeepSeek-V3's attention block at decode; NaN with a reason elsewhere."""

    def locate(values: tuple[Any, ...]) -> Key | str:
        op, _, implementation, dtype, wide, cache = values
        if cache == "warm":
            return WARM
        if op == "mla_block_prefill":
            return "a prefill block launched kernel by kernel waits for its host, which has no model"
        if op == "mla_block_decode":
            if NAMES.get(implementation) != "mla-fa3":
                return f"the block of {implementation} runs attention that was not fitted"
            lacking = missing_family(profile)
            return (
                f"the profile has no family {lacking}"
                if lacking
                else ("attention_decode", "mla-fa3", "bfloat16")
            )
        if op not in _RANGES:
            return f"no model of {op}"
        if wide:
            return f"heads wider than {WIDEST_HEAD} run in a kernel that the model does not know"
        return op, NAMES.get(implementation, implementation), dtype

    def price(part: pd.DataFrame, values: Values, key: Key) -> FloatArray:
        if part["op"].iloc[0] == "mla_block_decode":
            return decode_block_s(part, gpu, profile)
        return predicted_s(part, values, gpu, key[0], part["kind"].iloc[0], key[2])

    kind = rows["kind"] if "kind" in rows else pd.Series("mla", index=rows.index)
    kind = kind.fillna("mla")
    width = rows["head_dim"] if "head_dim" in rows else pd.Series(0, index=rows.index)
    wide = (kind == "gqa") & (width.fillna(0).astype(float) > WIDEST_HEAD)
    columns = ["op", "kind", "implementation", "kv_dtype", "wide", "cache"]
    return predict_by_family(with_cache(rows).assign(kind=kind, wide=wide), columns, locate, profile, price)
