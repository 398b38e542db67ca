"""Fit the dense matrix products of `moesim.cost.gemm` to tables of kind ``gemm``.

Equations, errors and what was tried: docs/fits/dense.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd

from calibrate.fit.assumed import assumed_dense
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
from moesim.cost.gemm import gemm_kernel_s, launched_s
from moesim.errors import HardwareError
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Profile

__all__ = ["NAMES", "TABLES", "fit_table", "kernel_of", "predict_table", "predicted_s"]

TABLES = ("gemm",)
METHOD = Method(("n", "k"), max_rows=3000, max_evaluations=40)

NAMES = {
    "torch:linear": "torch-cublas",
    "vllm:torch.nn.functional.linear": "torch-cublas",
    "vllm:CutlassFP8ScaledMMLinearKernel": "vllm-cutlass",
    "vllm:CutlassFp8BlockScaledMMKernel": "vllm-cutlass",
    "vllm:DeepGemmFp8BlockScaledMMKernel": "vllm-deepgemm",
    "vllm:FlashInferFp8BlockScaledMMKernel": "vllm-flashinfer",
}
"""Implementation in the measured table to that of the profile; others keep their name. `torch:linear` is the kernel
that vLLM's bfloat16 layers call, and both were timed in graphs or with the GPU kept busy, so no host time is in either:
they are one family."""

_SPEC: Spec = {
    "launch_s": (2.4e-6, 1e-6, 5e-6, "first to last thread block of an empty kernel in a CUDA graph [s]"),
    "compute_fraction": (0.75, 0.4, 1.0, "matrix rate of full tiles over the datasheet's peak"),
    "hbm_fraction": (0.85, 0.5, 0.95, "rate of reading operands over the datasheet's memory rate"),
    "write_fraction": (0.6, 0.4, 0.95, "rate of writing outputs over the datasheet's memory rate"),
    "l2_ratio": (3.0, 1.0, 6.0, "rate at which all SMs together load tiles over the datasheet's memory rate"),
    "tile_s": (5e-7, 1e-8, 5e-6, "fixed cost of one tile on its SM [s]"),
    "wave_rounding": (0.5, 0.01, 1.0, "share of a last, partial wave that is paid as a whole one"),
    "overlap_power": (3.0, 1.5, 8.0, "sharpness of the maximum of tiles and memory"),
    "split_s": (2e-6, 5e-7, 1e-5, "second kernel that sums the parts of a cut reduction [s]"),
    "max_split": (16.0, 16.0, 16.0, "parts that the library may cut the reduction into (held)"),
}
_WHOLE: Spec = {
    "max_split": (1.0, 1.0, 1.0, _SPEC["max_split"][3]),
    "split_s": (2e-6, 2e-6, 2e-6, _SPEC["split_s"][3]),
}
_CAST: Spec = {
    "quantise_s": (2e-6, 5e-7, 5e-6, "kernel that casts the activations, few rows [s]"),
    "quantise_row_s": (7e-9, 1e-11, 2e-8, "the same, each further row [s]"),
}
_STEPS: Spec = {
    "quantise_step_s": (4e-9, 1e-11, 2e-8, "the same, each 2048 elements of each further row [s]"),
    "quantise_lag_s": (3e-7, 1e-10, 2e-6, "the same, each 2048 elements of few rows [s]"),
}
_LADDER: Spec = {
    **{name: row for name, row in _SPEC.items() if name not in ("split_s", "max_split")},
    **_CAST,
    **_STEPS,
    "compute_fraction": (0.9, 0.5, 1.0, "matrix rate of tiles of 128 columns over the datasheet's peak"),
    "narrow_fraction": (0.65, 0.1, 1.0, "the same of tiles of 64 by 64"),
    "slim_fraction": (0.2, 0.05, 1.0, "the same of tiles of 16 by 64"),
    "l2_ratio": (4.0, 1.0, 10.0, _SPEC["l2_ratio"][3]),
    "missing_ratio": (6.0, 1.0, 15.0, "cost of loading a tile's row beyond the matrix, over one within"),
    "fill_s": (2e-6, 1e-8, 1e-5, "filling and draining the kernels whose warp groups take turns [s]"),
    "tile_s": (1.5e-6, 1e-8, 5e-6, "fixed cost of a tile of the others on its SM [s]"),
    "quantise_s": (1e-6, 1e-8, 5e-6, _CAST["quantise_s"][3]),
    "quantise_row_s": (3e-9, 1e-11, 2e-8, _CAST["quantise_row_s"][3]),
    "hbm_fraction": (0.95, 0.5, 1.0, _SPEC["hbm_fraction"][3]),
    "wave_rounding": (0.8, 0.01, 1.0, _SPEC["wave_rounding"][3]),
    "overlap_power": (1.5, 1.1, 8.0, _SPEC["overlap_power"][3]),
    "ladder": (
        1.0,
        1.0,
        1.0,
        "1 where rows and columns alone pick the kernel, as vLLM's CUTLASS does (held)",
    ),
}
_HOST: Spec = {
    "host_s": (8e-5, 2e-5, 3e-4, "host time of one call outside a CUDA graph [s]"),
    "host_pad_s": (
        5e-6,
        1e-8,
        5e-5,
        "more of it where the rows are no multiple of 4, whose scales are padded [s]",
    ),
    "quantise_fraction": (
        0.3,
        0.05,
        0.95,
        "rate of casting many rows, scales laid out anew, over the memory rate",
    ),
}
_UNSEEN = {
    "launch_s": (2.4e-6,) * 3, "quantise_s": (2.1e-6,) * 3, "tile_s": (5e-7,) * 3, "l2_ratio": (3.6,) * 3,
    "hbm_fraction": (0.85, 0.8, 0.95), "overlap_power": (5.0, 4.0, 8.0),
}  # fmt: skip
"""What a kernel that always waited for the host cannot tell: taken from the kernels timed in a graph."""


def _unseen(spec: Spec, **held: float) -> Spec:
    """`spec` with that, and `held`, fixed."""
    limits = {**_UNSEEN, **{name: (value,) * 3 for name, value in held.items()}}
    return {name: (*limits.get(name, row[:3]), row[3]) for name, row in spec.items()}


def _any_rate(spec: Spec) -> Spec:
    """`spec` for a kernel of which nothing is known: slower launches, and lower shares of the peaks."""
    limits = {"launch_s": (1e-6, 1e-4), "compute_fraction": (0.02, 1.0), "hbm_fraction": (0.02, 0.95)}
    limits |= {"write_fraction": (0.02, 0.95), "l2_ratio": (0.1, 10.0)}
    return {name: (row[0], *limits.get(name, row[1:3]), row[3]) for name, row in spec.items()}


_EAGER = _unseen({**_SPEC, **_WHOLE, **_CAST, **_HOST})
_SPECS: dict[tuple[str, str], Spec] = {
    ("torch-cublas", "bfloat16"): _SPEC,
    ("torch:linear", "bfloat16"): _any_rate(_SPEC),
    ("vllm-cutlass", "fp8"): _LADDER,
    ("vllm-deepgemm", "fp8_block"): _EAGER,
    ("vllm-flashinfer", "fp8_block"): _unseen(
        _EAGER, write_fraction=0.6, quantise_row_s=1e-10, quantise_fraction=0.3
    ),
    ("vllm-cutlass", "fp8_block"): _EAGER,
}


def kernel_of(implementation: str, dtype: str) -> Kernel:
    """Family that rows of a measured implementation are fitted as.

    Notes
    -----
    A library that is not known is taken to pick the fastest tile and cut, at whatever rates; in fp8 it may cast its
    activations.
    """
    name = NAMES.get(implementation, implementation)
    quantised = {**_SPEC, **_CAST, "quantise_s": (1e-6, 1e-9, 5e-6, _CAST["quantise_s"][3])}
    generic = _any_rate(_SPEC if dtype in ("bfloat16", "w4a16_mxfp4") else quantised)
    return Kernel(
        "gemm", name, dtype, _SPECS.get((implementation, dtype), _SPECS.get((name, dtype), generic))
    )


def predicted_s(rows: pd.DataFrame, values: Values, gpu: Gpu, dtype: str) -> FloatArray:
    """Model's time of every row, launched as it was measured [s]."""
    m, n, k = (rows[name].to_numpy(dtype=float) for name in ("m", "n", "k"))
    kernel_s = gemm_kernel_s(m, n, k, gpu=gpu, params=values, dtype=dtype)
    return launched_s(m, kernel_s, values, in_graph=False)


def fit_table(
    rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note, source: str = ""
) -> list[dict[str, Any]]:
    """Families ``gemm`` of one device, and those assumed from its bfloat16 products.

    Parameters
    ----------
    rows
        Measured rows of one device.
    gpu
        Peaks that the fractions refer to.
    base
        Profile to stay near where rows are few.
    note
        Takes a line of progress.
    source
        Who measured, for the provenance.
    """
    found = []
    names = rows["implementation"].map(lambda name: NAMES.get(name, name))
    for (implementation, dtype), every in rows.groupby([names, "dtype"], sort=False):
        part = cold_rows(every, note)
        if not seen_rows(part).any():
            continue
        if (reason := _unpriced(gpu, dtype)) is not None:
            note(f"gemm {implementation}: {len(part)} rows not fitted: {reason}")
            continue
        kept = newest_software(part, note)
        kernel = kernel_of(kept["implementation"].iloc[0], dtype)
        found.append(
            fit_family(
                kernel,
                kept,
                partial(predicted_s, gpu=gpu, dtype=dtype),
                METHOD,
                base=base,
                note=note,
                source=source,
            )
        )
    return [*found, *assumed_dense(found)]


def _unpriced(gpu: Gpu, dtype: str) -> str | None:
    try:
        gpu.peak_flops_per_s(dtype)
    except HardwareError as error:
        return str(error)
    return None


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Times of measured products; NaN with a reason where the profile has no family."""

    def locate(values: tuple[Any, ...]) -> Key | str:
        implementation, dtype, cache = values
        if cache == "warm":
            return WARM
        return _unpriced(gpu, dtype) or ("gemm", NAMES.get(implementation, implementation), dtype)

    def price(part: pd.DataFrame, values: Values, key: Key) -> FloatArray:
        return predicted_s(part, values, gpu, key[2])

    return predict_by_family(with_cache(rows), ["implementation", "dtype", "cache"], locate, profile, price)
