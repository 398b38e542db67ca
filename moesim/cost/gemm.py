"""Seconds of dense matrix products: tiles and waves over SMs, bounded by the roofline.

Equations, parameters and errors: docs/fits/dense.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moesim.hardware.gpu import Gpu, weight_bytes_per_element
from moesim.work.ops import DenseGemm, FloatArray

__all__ = ["dense_gemm_s", "gemm_floor_s", "gemm_kernel_s", "launched_s", "product_bytes"]

_TILES = ((64, 32), (64, 64), (64, 128), (128, 128), (128, 256))
"""Output tiles that libraries choose among on Hopper; the long side lies along either operand."""
_SPLITS = (1, 2, 4, 8, 16)
"""Parts that the reduction dimension may be cut into."""
_K_STEP = 64
"""Elements of the reduction dimension per pipeline stage."""
_OUTPUT_BYTES = 2.0
_PARTIAL_BYTES = 4.0
_ACTIVATION_BYTES = {"fp8": 1.0, "fp8_block": 1.0 + 4 / 128}
"""Bytes per quantised activation; fp8_block adds one float32 scale per 128. Others multiply in bfloat16."""
_CAST_STEP = 2048
"""Elements of a row that one block of the casting kernel reads at a time."""
_SCALES_ALIGNED = 4
"""Rows whose float32 scales fill the 16 bytes that a bulk copy needs."""
_HOST_POWER = 4.0
"""A call takes the longer of host and kernel, with a small rounding where they meet."""
_MANY_ROWS = 2048
"""Arrays of rows longer than this are priced once per distinct value."""


def dense_gemm_s(
    op: DenseGemm, *, gpu: Gpu, params: Mapping[str, float], in_graph: bool = True
) -> FloatArray:
    """Time of `op.n_gemms` products, one kernel each.

    Parameters
    ----------
    op
        Rows [P, L, R] and the extents of the other two dimensions on this rank.
    gpu
        Peaks that the fractions in `params` refer to.
    params
        Values of a family ``gemm`` of a profile.
    in_graph
        Launched from a CUDA graph, so the host's share is not waited for. The fp8_block rows of the
        measured tables were launched one by one: compare with them with False.

    Returns
    -------
    FloatArray
        [P, L, R] seconds; 0 where no row enters.
    """
    rows = np.asarray(op.m, dtype=np.float64)
    if rows.size <= _MANY_ROWS:
        each_s = _product_s(rows, op, gpu, params, in_graph)
    else:
        distinct, where = np.unique(rows, return_inverse=True)
        each_s = _product_s(distinct, op, gpu, params, in_graph)[where].reshape(rows.shape)
    return op.n_gemms * each_s


def _product_s(
    m: FloatArray, op: DenseGemm, gpu: Gpu, params: Mapping[str, float], in_graph: bool
) -> FloatArray:
    kernel_s = gemm_kernel_s(m, op.n, op.k, gpu=gpu, params=params, dtype=op.dtype, n_products=op.batched)
    return np.where(m > 0, launched_s(m, kernel_s, params, in_graph=in_graph), 0.0)


def launched_s(
    m: FloatArray, kernel_s: FloatArray, params: Mapping[str, float], *, in_graph: bool
) -> FloatArray:
    """Time between two calls of a kernel [s]: the host's time where it is longer and not in a CUDA graph.

    Rows whose scales do not fill 16 bytes (not a multiple of 4) are padded first by a call of their own.
    """
    host_s = params.get("host_s", 0.0)
    if in_graph or host_s <= 0:
        return kernel_s
    waited_s = host_s + np.where(m % _SCALES_ALIGNED == 0, 0.0, params.get("host_pad_s", 0.0))
    return np.asarray(_overlapped(kernel_s, waited_s, {"overlap_power": _HOST_POWER}))


def gemm_floor_s(
    m: FloatArray, n: FloatArray | float, k: FloatArray | float, *, gpu: Gpu, dtype: str, n_products: int = 1
) -> FloatArray:
    """Roofline: the slower of multiplying at the datasheet's peak and moving each operand once [s].

    Parameters
    ----------
    m, n, k
        Rows, columns and reduction length, broadcastable.
    gpu
        Peaks.
    dtype
        Weight format.
    n_products
        Independent products in the kernel.
    """
    flops = 2.0 * m * n * k
    read, written = _moved_bytes(m, n, k, dtype)
    floor = np.maximum(flops / gpu.peak_flops_per_s(dtype), (read + written) / gpu.hbm_bytes_per_s)
    return np.asarray(n_products * floor)


def product_bytes(m: FloatArray, n: FloatArray | float, k: FloatArray | float, dtype: str) -> FloatArray:
    """Bytes of the operands and of the result of one product, each once; arguments as `gemm_floor_s`."""
    read, written = _moved_bytes(m, n, k, dtype)
    return read + written


def _moved_bytes(
    m: FloatArray, n: FloatArray | float, k: FloatArray | float, dtype: str
) -> tuple[FloatArray, FloatArray]:
    read = m * k * _ACTIVATION_BYTES.get(dtype, 2.0) + n * k * weight_bytes_per_element(dtype)
    return np.asarray(read), np.asarray(_OUTPUT_BYTES * m * n)


def gemm_kernel_s(
    m: FloatArray,
    n: FloatArray | float,
    k: FloatArray | float,
    *,
    gpu: Gpu,
    params: Mapping[str, float],
    dtype: str,
    n_products: int = 1,
) -> FloatArray:
    """Time of one kernel on the device, quantisation of its activations included [s].

    Parameters
    ----------
    m, n, k
        Rows, columns and reduction length, broadcastable.
    gpu
        Peaks that the fractions refer to.
    params
        Values of a family ``gemm``.
    dtype
        Weight format.
    n_products
        Independent products in the kernel.

    Notes
    -----
    The library picks the fastest of a few tiles and splits of the reduction, so the model does too.
    Power capping of long kernels is averaged into the peak's fraction.
    """
    m = np.asarray(m, dtype=np.float64)
    read, written = _moved_bytes(m, n, k, dtype)
    memory_s = n_products * (read / params["hbm_fraction"] + written / params["write_fraction"])
    memory_s = memory_s / gpu.hbm_bytes_per_s
    if params.get("ladder", 0.0):
        best = _ladder_s(m, n, k, memory_s, gpu, params, dtype, n_products)
    else:
        splits = [split for split in _SPLITS if split <= params["max_split"]]
        choices = [_Choice(*tile, split) for tile in _TILES for split in splits]
        best = _tiled_s(m, n, k, choices[0], memory_s, gpu, params, dtype, n_products)
        for choice in choices[1:]:
            candidate = _tiled_s(m, n, k, choice, memory_s, gpu, params, dtype, n_products)
            best = np.minimum(best, candidate)
    kernel_s = params["launch_s"] + best + _quantise_s(m, k, gpu, params)
    return np.maximum(kernel_s, gemm_floor_s(m, n, k, gpu=gpu, dtype=dtype, n_products=n_products))


class _Choice(NamedTuple):
    """One kernel of a library: its output tile and how it cuts the reduction."""

    rows: FloatArray | float
    columns: FloatArray | float
    split: int


def _tiled_s(
    m: FloatArray,
    n: FloatArray | float,
    k: FloatArray | float,
    tile: _Choice,
    memory_s: FloatArray,
    gpu: Gpu,
    params: Mapping[str, float],
    dtype: str,
    n_products: int,
) -> FloatArray:
    """Waves of tiles against memory, for one choice of tile and split."""
    n_tiles = np.ceil(m / tile.rows) * np.ceil(n / tile.columns)
    n_tiles = np.minimum(n_tiles, np.ceil(m / tile.columns) * np.ceil(n / tile.rows))
    waves = n_products * tile.split * n_tiles / gpu.n_sms
    tile_s = _tile_s(k, tile, gpu, params, dtype)
    total = _overlapped(_rounded_waves(waves, params) * tile_s, memory_s, params)
    if tile.split > 1:
        partial_bytes = n_products * _PARTIAL_BYTES * tile.split * m * n
        total = total + params["split_s"] + partial_bytes / (params["l2_ratio"] * gpu.hbm_bytes_per_s)
    return np.asarray(total)


class _Rung(NamedTuple):
    """One kernel of a ladder, and the most rows and columns that it serves."""

    most_rows: float
    most_columns: float
    tile_rows: int
    tile_columns: int
    cluster: int
    """Tiles along the rows that run together and load each tile of weights once."""
    step: int
    """Elements of the reduction dimension per pipeline stage."""
    rate: str
    """Parameter that says how near to the matrix peak it runs."""


_LADDER = (
    _Rung(16, 1280, 16, 64, 2, 256, "slim_fraction"),
    _Rung(16, np.inf, 16, 64, 1, 256, "slim_fraction"),
    _Rung(64, 1280, 16, 64, 4, 256, "slim_fraction"),
    _Rung(64, np.inf, 64, 64, 1, 256, "narrow_fraction"),
    _Rung(128, np.inf, 64, 128, 2, 128, "compute_fraction"),
    _Rung(np.inf, np.inf, 128, 128, 2, 128, "compute_fraction"),
)
"""vLLM's CUTLASS fp8 kernels for Hopper (``csrc/quantization/w8a8/cutlass/c3x/scaled_mm_sm90_fp8_dispatch.cuh``
@68f442eb), the first that serves a shape: up to 64 rows weights and activations change places, above that two warp
groups take turns (ping-pong), so that one stores its tile while the other multiplies."""
_PING_PONG = 64
"""Rows above which they do."""


def _ladder_s(
    m: FloatArray,
    n: FloatArray | float,
    k: FloatArray | float,
    memory_s: FloatArray,
    gpu: Gpu,
    params: Mapping[str, float],
    dtype: str,
    n_products: int,
) -> FloatArray:
    """Time of the kernel that the library's ladder picks.

    Notes
    -----
    Tiles run in whole waves. Beside them the level-2 cache serves every tile's loads; rows of a tile that lie beyond
    the matrix are not free there: they cost ``missing_ratio`` times what rows that exist do (129 rows of 65,536
    columns take 1.7 times as long as 256).
    """
    serves = [(m <= rung.most_rows) & (np.asarray(n) <= rung.most_columns) for rung in _LADDER]
    rows, columns, cluster, step = (
        np.select(serves, [getattr(rung, name) for rung in _LADDER]).astype(np.float64)
        for name in ("tile_rows", "tile_columns", "cluster", "step")
    )
    fraction = np.select(serves, [params[rung.rate] for rung in _LADDER])
    clusters, across = np.ceil(m / (rows * cluster)), np.ceil(n / columns)
    length = np.ceil(np.asarray(k) / step) * step
    waves = n_products * clusters * cluster * across / gpu.n_sms
    multiply_s = 2.0 * rows * columns * length * gpu.n_sms / (fraction * gpu.peak_flops_per_s(dtype))
    taking_turns = m > _PING_PONG
    busy_s = np.where(
        taking_turns,
        _rounded_waves(waves, params) * multiply_s + params["fill_s"],
        np.ceil(waves) * (multiply_s + params["tile_s"]),
    )
    loaded_rows = clusters * cluster * rows
    missing = (params["missing_ratio"] - 1) * (loaded_rows - m)
    loaded = across * (loaded_rows + missing + clusters * columns) * length
    loaded_bytes = n_products * loaded * _ACTIVATION_BYTES.get(dtype, 2.0)
    load_s = loaded_bytes / (params["l2_ratio"] * gpu.hbm_bytes_per_s)
    return _overlapped(busy_s, np.maximum(load_s, memory_s), params)


def _rounded_waves(waves: FloatArray, params: Mapping[str, float]) -> FloatArray:
    """Round waves up in part only: the last wave's tiles run faster, alone on their SMs."""
    rounding = params["wave_rounding"]
    return np.asarray(rounding * np.ceil(waves) + (1 - rounding) * np.maximum(waves, 1.0))


def _tile_s(
    k: FloatArray | float, tile: _Choice, gpu: Gpu, params: Mapping[str, float], dtype: str
) -> FloatArray:
    """One tile alone on its SM: multiplying or loading, whichever is slower, and a fixed cost."""
    steps = np.ceil(np.asarray(k) / (_K_STEP * tile.split)) * _K_STEP
    flops_s = 2.0 * tile.rows * tile.columns * steps * gpu.n_sms
    flops_s = flops_s / (params["compute_fraction"] * gpu.peak_flops_per_s(dtype))
    loaded_bytes = (tile.rows + tile.columns) * steps * _ACTIVATION_BYTES.get(dtype, 2.0)
    load_s = loaded_bytes * gpu.n_sms / (params["l2_ratio"] * gpu.hbm_bytes_per_s)
    return np.asarray(np.maximum(flops_s, load_s) + params["tile_s"])


def _overlapped(busy_s: FloatArray, memory_s: FloatArray, params: Mapping[str, float]) -> FloatArray:
    """Smooth maximum: one hides the other except where they are nearly equal."""
    high = np.maximum(np.maximum(busy_s, memory_s), 1e-12)
    power = params["overlap_power"]
    return np.asarray(high * ((busy_s / high) ** power + (memory_s / high) ** power) ** (1 / power))


def _quantise_s(
    m: FloatArray, k: FloatArray | float, gpu: Gpu, params: Mapping[str, float]
) -> FloatArray | float:
    """Casting bf16 activations before an fp8 product: its own kernel, a block of threads per row.

    A block walks its row in steps of 2,048 elements (256 threads of 8).
    """
    if "quantise_s" not in params:
        return 0.0
    fraction = params.get("quantise_fraction", params["hbm_fraction"])
    moved_s = 3.0 * m * k / (fraction * gpu.hbm_bytes_per_s)
    steps = np.ceil(np.asarray(k) / _CAST_STEP)
    row_s = params["quantise_row_s"] + steps * params.get("quantise_step_s", 0.0)
    alone_s = params["quantise_s"] + steps * params.get("quantise_lag_s", 0.0)
    return np.asarray(alone_s + np.maximum(m * row_s, moved_s))
