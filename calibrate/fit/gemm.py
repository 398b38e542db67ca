"""Fit the dense matrix products of `moesim.cost.gemm` to ``gemm.parquet``.

Run ``python -m calibrate.fit.gemm DATA_DIR -o moesim/catalog/profiles``; DATA_DIR holds ``measured/``.
Equations, errors and what was tried: docs/fits/dense.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.fit.common import FloatArray, LogFit, fit_log_least_squares, grouped_folds, write_fragment
from calibrate.statistics import ape_stats
from moesim.cost.gemm import gemm_kernel_s, launched_s
from moesim.hardware.gpu import Gpu

__all__ = ["KERNELS", "PEAKS", "Kernel", "families", "load_rows", "predicted_s"]


def _hopper(name: str, memory_bytes: float, hbm_bytes_per_s: float) -> Gpu:
    return Gpu(
        name=name, memory_bytes=memory_bytes, hbm_bytes_per_s=hbm_bytes_per_s,
        flops_per_s={"bfloat16": 989.4e12, "fp8": 1978.9e12}, n_sms=132, l2_bytes=50 * 2**20, clock_hz=1.98e9,
        nvlink_bytes_per_s=450e9, pcie_bytes_per_s=64e9, usd_per_gpu_hour=1.0,
        sources={"all": "NVIDIA H100 and H200 datasheets; the price is not used here"},
    )  # fmt: skip


PEAKS = {
    "h200-sxm": _hopper("h200-sxm", 141e9, 4.8e12),
    "h100-sxm": _hopper("h100-sxm", 80e9, 3.35e12),
}
"""Datasheet peaks that the fitted fractions refer to."""

DATA = "AIConfigurator silicon database @095f58a51 (Apache-2.0): gemm, {device}, {software}, {kernel}"
SPLIT = "5-fold by (n, k)"
FIT_ROWS = 3000
"""Rows of one fit, drawn at random from its folds; the table has many neighbours of every shape."""

MEANING = {
    "launch_s": "first to last thread block of an empty kernel in a CUDA graph [s]",
    "compute_fraction": "matrix rate of full tiles over the datasheet's peak",
    "hbm_fraction": "rate of reading operands over the datasheet's memory rate",
    "write_fraction": "rate of writing outputs over the datasheet's memory rate",
    "l2_ratio": "rate at which all SMs together load tiles over the datasheet's memory rate",
    "tile_s": "fixed cost of one tile on its SM [s]",
    "wave_rounding": "share of a last, partial wave that is paid as a whole one",
    "overlap_power": "sharpness of the maximum of tiles and memory",
    "split_s": "second kernel that sums the parts of a cut reduction [s]",
    "max_split": "parts that the library may cut the reduction into (a switch, not fitted)",
    "ladder": "1 where the number of rows alone picks the tile (a switch, not fitted)",
    "quantise_s": "kernel that casts the activations, few rows [s]",
    "quantise_row_s": "the same, each further row [s]",
    "host_s": "host time of one call outside a CUDA graph [s]",
}
_START = {
    "launch_s": 2.4e-6, "compute_fraction": 0.75, "hbm_fraction": 0.85, "write_fraction": 0.6,
    "l2_ratio": 3.0, "tile_s": 5e-7, "wave_rounding": 0.5, "overlap_power": 3.0, "split_s": 2e-6, "max_split": 16.0,
}  # fmt: skip
_BOUNDS = {
    "launch_s": (1e-6, 5e-6), "compute_fraction": (0.4, 1.0), "hbm_fraction": (0.5, 0.95),
    "write_fraction": (0.4, 0.95), "l2_ratio": (1.0, 6.0), "tile_s": (1e-8, 5e-6),
    "wave_rounding": (0.01, 1.0), "overlap_power": (1.5, 8.0), "split_s": (5e-7, 1e-5), "max_split": (16.0, 16.0),
}  # fmt: skip
_HELD_LAUNCH = 2.4e-6
"""Launch of the kernels that were only timed one by one: bfloat16's, which were timed in a graph."""
_HELD_QUANTISE = 2.1e-6
"""Their cast: vLLM's dynamic fp8 cast, fitted in the fp8 family."""


@dataclass(frozen=True)
class Kernel:
    """One family of the profile and the rows that it is fitted to."""

    implementation: str
    dtype: str
    measured: str
    """Implementation in the measured table."""
    extra: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    """Further parameters: start, low, high; equal bounds hold them."""

    @property
    def start(self) -> dict[str, float]:
        """First guess."""
        return _START | {name: first for name, (first, _, _) in self.extra.items()}

    @property
    def bounds(self) -> dict[str, tuple[float, float]]:
        """Search range."""
        return _BOUNDS | {name: (low, high) for name, (_, low, high) in self.extra.items()}


_WHOLE = {"max_split": (1.0, 1.0, 1.0), "split_s": (2e-6, 2e-6, 2e-6)}
_UNSEEN = {
    "launch_s": (_HELD_LAUNCH,) * 3, "quantise_s": (_HELD_QUANTISE,) * 3, "tile_s": (5e-7,) * 3,
    "l2_ratio": (3.6,) * 3, "hbm_fraction": (0.85, 0.8, 0.95), "overlap_power": (5.0, 4.0, 8.0),
}  # fmt: skip
"""What a kernel that always waited for the host cannot tell: taken from the kernels timed in a graph."""
_CAST = {"quantise_s": (2e-6, 5e-7, 5e-6), "quantise_row_s": (7e-9, 1e-11, 2e-8)}
_HOST = {"host_s": (8e-5, 2e-5, 3e-4)}
KERNELS = (
    Kernel("torch-cublas", "bfloat16", "vllm:torch.nn.functional.linear"),
    Kernel("vllm-cutlass", "fp8", "vllm:CutlassFP8ScaledMMLinearKernel",
           _WHOLE | _CAST | {"ladder": (1.0, 1.0, 1.0)}),
    Kernel("vllm-deepgemm", "fp8_block", "vllm:DeepGemmFp8BlockScaledMMKernel",
           _WHOLE | _CAST | _HOST | _UNSEEN),
    Kernel("vllm-flashinfer", "fp8_block", "vllm:FlashInferFp8BlockScaledMMKernel",
           _WHOLE | _CAST | _HOST | _UNSEEN | {"write_fraction": (0.6, 0.6, 0.6),
                                                       "quantise_row_s": (1e-10, 1e-10, 1e-10)}),
    Kernel("vllm-cutlass", "fp8_block", "vllm:CutlassFp8BlockScaledMMKernel",
           _WHOLE | _CAST | _HOST | _UNSEEN),
)  # fmt: skip


def load_rows(data_dir: Path, device: str, kernel: Kernel) -> pd.DataFrame:
    """Measured rows of one kernel, each shape once: columns m, n, k, latency_s, software."""
    table = pd.read_parquet(data_dir / "measured" / "gemm.parquet")
    table = table[(table.device == device) & (table.implementation == kernel.measured)]
    rows = table.groupby(["m", "n", "k"], as_index=False).agg({"latency_s": "median", "software": "first"})
    return rows


def predicted_s(rows: pd.DataFrame, values: Mapping[str, float], gpu: Gpu, dtype: str) -> FloatArray:
    """Model's time of every row, launched as it was measured [s]."""
    m, n, k = (rows[name].to_numpy(dtype=float) for name in ("m", "n", "k"))
    return launched_s(gemm_kernel_s(m, n, k, gpu=gpu, params=values, dtype=dtype), values, in_graph=False)


def _fit(rows: pd.DataFrame, kernel: Kernel, gpu: Gpu, seed: int) -> LogFit:
    sample = rows.sample(min(FIT_ROWS, len(rows)), random_state=seed)
    return fit_log_least_squares(
        lambda values: predicted_s(sample, values, gpu, kernel.dtype),
        sample.latency_s.to_numpy(), kernel.start, kernel.bounds, max_evaluations=25,
    )  # fmt: skip


def held_out(rows: pd.DataFrame, kernel: Kernel, gpu: Gpu) -> dict[str, Any]:
    """Errors on (n, k) that the fit did not see."""
    predicted = np.zeros(len(rows))
    masks: list[NDArray[np.bool_]] = grouped_folds(rows[["n", "k"]].to_numpy(), 5, seed=0)
    for seed, mask in enumerate(masks):
        values = _fit(rows[~mask], kernel, gpu, seed).values
        predicted[mask] = predicted_s(rows[mask], values, gpu, kernel.dtype)
    return {"split": SPLIT, **ape_stats(predicted, rows.latency_s.to_numpy())}


def families(data_dir: Path, device: str) -> list[dict[str, Any]]:
    """Every gemm family of one device, as a profile holds it."""
    gpu = PEAKS[device]
    found: list[dict[str, Any]] = []
    for kernel in KERNELS:
        rows = load_rows(data_dir, device, kernel)
        fit = _fit(rows, kernel, gpu, seed=0)
        found.append(_family(kernel, device, rows, fit, held_out(rows, kernel, gpu)))
    found.append(_widened(found[0]))
    found += _unmeasured(found[0])
    return found


def _family(
    kernel: Kernel, device: str, rows: pd.DataFrame, fit: LogFit, error: Mapping[str, Any]
) -> dict[str, Any]:
    data = DATA.format(device=device, software=rows.software.iloc[0], kernel=kernel.measured)
    return {
        "op": "gemm",
        "implementation": kernel.implementation,
        "dtype": kernel.dtype,
        "parameters": {
            name: {"value": value, "stderr": fit.stderr[name], "meaning": MEANING[name]}
            for name, value in fit.values.items()
        },
        "provenance": {"kind": "fitted", "data": data, "n_points": len(rows)},
        "held_out": dict(error),
    }


def _assumed(op: str, implementation: str, dtype: str, data: str, values: dict[str, Any]) -> dict[str, Any]:
    parameters = {name: {"value": value, "meaning": meaning} for name, (value, meaning) in values.items()}
    return {
        "op": op, "implementation": implementation, "dtype": dtype, "parameters": parameters,
        "provenance": {"kind": "assumed", "data": data},
    }  # fmt: skip


def _widened(bfloat16: Mapping[str, Any]) -> dict[str, Any]:
    """4-bit weights with 16-bit activations: bfloat16's kernel that reads fewer bytes, not measured."""
    data = "the bfloat16 family of this device with 4-bit weights read; widening them is taken to be hidden"
    values = {name: (item["value"], item["meaning"]) for name, item in bfloat16["parameters"].items()}
    return _assumed("gemm", "torch-cublas", "w4a16_mxfp4", data, values)


def _unmeasured(bfloat16: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Kernels without a table: priced from what the dense products say of launch and memory."""
    launch = bfloat16["parameters"]["launch_s"]["value"]
    fraction = bfloat16["parameters"]["hbm_fraction"]["value"]
    data = (
        "not measured; launch: smallest bfloat16 products of gemm.parquet; memory: the rate at which its "
        "bfloat16 products read weights"
    )
    element = {
        "launch_s": (launch, "one small kernel in a CUDA graph [s]"),
        "hbm_fraction": (fraction, "rate of a long copy over the datasheet's memory rate"),
    }
    router_data = (
        "not measured; TensorRT-LLM tech blog 3 (NVIDIA/TensorRT-LLM @2cd3b52) gives 252 us in 18 kernels and "
        "15 us fused for top-8 of 256 experts on B200, at a batch that it does not state"
    )
    router = {
        "topk_s": (5e-6, "fused scores, top-k and normalisation of few tokens [s]"),
        "token_s": (1e-10, "one score of one token on one SM [s]"),
        "hbm_fraction": (fraction, "rate of reading scores over the datasheet's memory rate"),
    }
    return [
        _assumed("elementwise", "fused", "any", data, element),
        _assumed("router", "fused-topk", "any", router_data, router),
    ]


def main() -> None:
    """Fit both devices and write their fragments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", action="append", choices=sorted(PEAKS))
    chosen = parser.parse_args()
    for device in chosen.device or sorted(PEAKS):
        path = chosen.output / f"{device}.dense.yaml"
        write_fragment(path, device, families(chosen.data_dir, device))


if __name__ == "__main__":
    main()
