"""Least time that a datasheet allows for each measured point, to notice times in another unit.

A floor is what must move over the rate of the memory or the link that it moves over, or the arithmetic over the peak,
whichever is longer. It is no prediction: a kernel takes one to a few times its floor, plus a launch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moesim.errors import HardwareError, MeasurementError
from moesim.hardware import Gpu, list_gpus, load_gpu, weight_bytes_per_element

__all__ = ["SLOW", "check_units", "far_rows", "floor_s"]

FloatArray = NDArray[np.float64]

LAUNCH_S = 5e-6
"""About what a kernel takes that has nothing to do, from launch to end, on any GPU of the catalog [s]."""
LEAST_S = 1e-6
"""Less than any of these kernels was ever measured to take [s]: CUDA graphs replay an empty one in about 1 us."""
ABOVE_LAUNCH_S = 2e-5
"""Floor above which a row says something about rates: its data exceed every cache and its time every launch [s]."""
SLOW = 300.0
"""Times the floor and a launch that a median is taken for another unit; the slowest kernels measured take 30."""
MICROSECONDS = 1e5
"""The same, from which it is microseconds that were written rather than milliseconds."""
NANOSECONDS = 1e8
"""The same, from which it is nanoseconds."""
FAST = 1.0 / 3.0
"""Share of the floor below which a median is taken for another unit: caches and clocks explain less."""

NETWORK_BYTES_PER_S = 1e11
"""Fastest NIC of a GPU today, per direction: 800 Gb/s (NVIDIA ConnectX-8 datasheet) [bytes/s]."""
LATENT_ELEMENTS = 576
"""Cached elements a token of latent attention: 512 latent and 64 rotary (DeepSeek-V2 report, section 2.1)."""
MLA_HEAD_DIM = 128
"""Smallest head of latent attention (DeepSeek-V2 report)."""
MLA_BLOCK_WEIGHTS = 187e6 / 128
"""Projection weights a head of DeepSeek-V3's attention (its config.json: 187 M a layer, 128 heads)."""


def floor_s(kind: str, rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    """Least time of every row [s], shape (n_rows,).

    Parameters
    ----------
    kind
        Kind of table.
    rows
        Rows of a table, of one device.
    gpu
        The device's datasheet.
    """
    return np.asarray(_FLOORS[kind](rows, gpu), dtype=float)


def check_units(kind: str, rows: pd.DataFrame, place: str, gpu: Gpu | None = None) -> None:
    """Refuse a table whose median time is far from what the datasheet allows.

    Parameters
    ----------
    kind, rows
        A table.
    place
        File, for the message.
    gpu
        Datasheet of a device that is not in the catalog. A device known neither way is compared with the fastest
        of the catalog, and with nothing where it has no device memory to speak of (``cpu``).

    Raises
    ------
    MeasurementError
        If times look like milliseconds, like microseconds, or too short for the device.
    """
    rows = rows[~rows.device.astype(str).str.startswith("cpu")]
    if rows.empty:
        return
    measured = rows.latency_s.to_numpy(dtype=float)
    floor = _floors_s(kind, rows, gpu)
    median = f"median {float(np.median(measured)):.4g} s"
    slow = float(np.median(measured / (floor + _launch_s(kind, rows))))
    if slow >= SLOW and not _own_network(rows).all():
        unit, by = _unit(slow)
        raise MeasurementError(
            f"is {float(f'{slow:.2g}'):,.0f} times what bytes over bandwidth, flops over peak and a launch take: "
            f"latency_s looks like {unit}",
            value=median,
            place=place,
            fix=f"divide latency_s by {by}",
        )
    telling = floor > ABOVE_LAUNCH_S if (floor > ABOVE_LAUNCH_S).any() else np.ones(len(rows), dtype=bool)
    least = LEAST_S if kind != "launch" else LEAST_S / 5  # one of many, which overlap
    fast = float(np.median(measured[telling] / np.maximum(floor[telling], least)))
    if fast < FAST:
        raise MeasurementError(
            f"is {fast:.2g} of the time that bytes over bandwidth and flops over peak take at least: latency_s looks "
            "divided by 1000 too often, or the shapes are of another measurement",
            value=median,
            place=place,
            fix="give latency_s in seconds" + (" and the sizes in bytes" if "n_bytes" in rows else ""),
        )


def far_rows(kind: str, rows: pd.DataFrame, gpu: Gpu | None = None) -> NDArray[np.bool_]:
    """[n_rows] rows as slow as if their time were in another unit, in a table whose median is not.

    Arguments as of `check_units`.
    """
    judged = ~(rows.device.astype(str).str.startswith("cpu") | _own_network(rows)).to_numpy()
    far = np.zeros(len(rows), dtype=bool)
    if judged.any():
        some = rows[judged]
        least = _floors_s(kind, some, gpu) + _launch_s(kind, some)
        far[judged] = some.latency_s.to_numpy(dtype=float) >= SLOW * least
    return far


def _unit(slow: float) -> tuple[str, str]:
    """Unit that times look written in, and what to divide them by."""
    if slow >= NANOSECONDS:
        return "nanoseconds", "1e9"
    return ("microseconds", "1e6") if slow >= MICROSECONDS else ("milliseconds", "1000")


def _own_network(rows: pd.DataFrame) -> pd.Series:
    """[n_rows] rows of links of any rate."""
    return rows.implementation.isin(("gloo", "nccl-sockets-one-gpu"))


def _floors_s(kind: str, rows: pd.DataFrame, gpu: Gpu | None) -> FloatArray:
    """Floor of rows of any devices [s]."""
    floor = np.zeros(len(rows))
    for device, index in rows.groupby("device", sort=False).indices.items():
        floor[index] = floor_s(kind, rows.iloc[index], _datasheet(str(device), gpu))
    return floor


def _launch_s(kind: str, rows: pd.DataFrame) -> FloatArray:
    """About what a row takes besides its floor [s]."""
    replayed = (rows["mode"] == "graph") if kind == "launch" else np.zeros(len(rows), dtype=bool)
    return np.where(replayed, LEAST_S, LAUNCH_S)


def _datasheet(device: str, gpu: Gpu | None) -> Gpu:
    if gpu is not None and gpu.name == device:
        return gpu
    try:
        return load_gpu(device)
    except HardwareError:
        return _fastest()


def _fastest() -> Gpu:
    """A GPU with the best rate of the catalog in everything."""
    known = list_gpus()
    best = max(known, key=lambda one: one.hbm_bytes_per_s)
    units = {unit for one in known for unit in one.flops_per_s}
    return best.model_copy(
        update={
            "hbm_bytes_per_s": max(one.hbm_bytes_per_s for one in known),
            "nvlink_bytes_per_s": max(one.nvlink_bytes_per_s for one in known),
            "pcie_bytes_per_s": max(one.pcie_bytes_per_s for one in known),
            "flops_per_s": {u: max(one.flops_per_s.get(u, 0.0) for one in known) for u in units},
        }
    )


def _peak(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    """Dense matrix rate of each row's format [FLOP/s]; the fastest unit for a format that moesim does not price."""

    def one(dtype: str) -> float:
        try:
            return gpu.peak_flops_per_s({"fp16": "bfloat16", "float16": "bfloat16"}.get(dtype, dtype))
        except HardwareError:
            return max(gpu.flops_per_s.values())

    return np.asarray(
        rows["dtype"].map({dtype: one(str(dtype)) for dtype in rows["dtype"].unique()}), dtype=float
    )


_INDEX_BYTES = 4.0
"""Of a pair in sorted order."""
_BYTES = {"fp16": 2.0, "float16": 2.0, "int8": 1.0, "uint8": 1.0, "int8_wo": 1.0}


def _width(words: pd.Series) -> FloatArray:
    """Bytes an element of each row's format; half a byte where the format is not known."""

    def one(dtype: str) -> float:
        try:
            return _BYTES.get(dtype) or weight_bytes_per_element(dtype)
        except HardwareError:
            return 0.5

    return np.asarray(words.map({dtype: one(str(dtype)) for dtype in words.unique()}), dtype=float)


def _longer(n_bytes: FloatArray, rate: FloatArray | float, flops: FloatArray, peak: FloatArray) -> FloatArray:
    return np.asarray(np.maximum(n_bytes / rate, flops / peak))


def _moe_ffn(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    return _experts(rows, gpu, n_matrices=2.0)  # three where the activation is gated: a floor takes two


def _experts(rows: pd.DataFrame, gpu: Gpu, n_matrices: float) -> FloatArray:
    pairs = _floats(rows, "n_tokens") * _floats(rows, "top_k") / _floats(rows, "ep")
    active = np.minimum(_floats(rows, "n_experts") / _floats(rows, "ep"), np.maximum(pairs, 1.0))
    matrix = n_matrices * _floats(rows, "hidden") * _floats(rows, "intermediate") / _floats(rows, "tp")
    # a skewed load leaves experts without a token
    active = np.where(rows.load == "balanced", active, np.minimum(active, np.maximum(active / 4, 1.0)))
    return _longer(
        active * matrix * _width(rows["dtype"]), gpu.hbm_bytes_per_s, 2 * pairs * matrix, _peak(rows, gpu)
    )


def _moe_step(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    pairs = _floats(rows, "n_tokens") * _floats(rows, "top_k") / _floats(rows, "ep")
    summed = pairs * _floats(rows, "hidden") / gpu.hbm_bytes_per_s
    sorted_ = pairs * _INDEX_BYTES / gpu.hbm_bytes_per_s  # a library may leave the rows where they are
    moved = np.where(rows.op == "moe_permute", sorted_, summed)
    return np.where(rows.op.isin(["moe_up", "moe_down"]), _experts(rows, gpu, n_matrices=1.0), moved)


def _gemm(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    m, n, k = (_floats(rows, name) for name in "mnk")
    n_bytes = (m * k + n * k) * _width(rows["dtype"]) + 2 * m * n
    return _longer(n_bytes, gpu.hbm_bytes_per_s, 2 * m * n * k, _peak(rows, gpu))


def _attention(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    batch, n_query, n_context, n_heads = (
        _floats(rows, name) for name in ("batch", "n_query", "n_context", "n_heads")
    )
    window = _floats(rows, "window")
    seen = np.where(window > 0, np.minimum(window, n_context), n_context)
    head_dim = _floats(rows, "head_dim", MLA_HEAD_DIM)
    cached = np.where(rows.kind == "mla", LATENT_ELEMENTS, 2 * _floats(rows, "n_kv_heads", 1.0) * head_dim)
    n_bytes = batch * seen * cached * _width(rows.kv_dtype)
    flops = 4 * batch * n_heads * head_dim * n_query * np.where(n_query > 1, seen / 2, seen)
    return _longer(n_bytes, gpu.hbm_bytes_per_s, flops, np.full(len(rows), max(gpu.flops_per_s.values())))


def _mla_block(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    batch, n_context, n_heads = (_floats(rows, name) for name in ("batch", "n_context", "n_heads"))
    n_bytes = batch * n_context * LATENT_ELEMENTS * _width(rows.kv_dtype)
    tokens = np.where(rows.op == "mla_block_prefill", batch * n_context, batch)
    weights = np.where(rows.model == "deepseek-v3", MLA_BLOCK_WEIGHTS * n_heads, 0.0)
    return _longer(
        n_bytes + weights * _width(rows["dtype"]), gpu.hbm_bytes_per_s, 2 * tokens * weights, _peak(rows, gpu)
    )


def _link(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    """Fastest link that a rank may have to the others [bytes/s]."""
    inside = gpu.nvlink_bytes_per_s or gpu.pcie_bytes_per_s
    nodes = _floats(rows, "n_nodes", 1.0)
    return np.where(
        (nodes > 1) & (_floats(rows, "n_ranks") <= nodes), min(inside, NETWORK_BYTES_PER_S), inside
    )


def _collective(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    n_ranks = _floats(rows, "n_ranks")
    share = np.where(rows.op.isin(["send_recv", "broadcast"]), 1.0, (n_ranks - 1) / n_ranks)
    return np.asarray(_floats(rows, "message_bytes") * share / _link(rows, gpu))


def _all_reduce(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    n_ranks = _floats(rows, "n_ranks")
    n_bytes = _floats(rows, "message_elements") * _width(rows["dtype"])
    return np.asarray(n_bytes * (n_ranks - 1) / n_ranks / _link(rows, gpu))


def _deepep(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    """Every token leaves its rank at least once, in one byte an element."""
    n_ranks = _floats(rows, "n_ranks")
    n_bytes = _floats(rows, "n_tokens") * _floats(rows, "hidden")
    return np.asarray(n_bytes * (n_ranks - 1) / n_ranks / _link(rows, gpu))


def _router(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    return np.asarray(_floats(rows, "n_tokens") * _floats(rows, "hidden") / gpu.hbm_bytes_per_s)


def _transfer(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    rate = np.where(rows.op == "d2d", gpu.hbm_bytes_per_s, gpu.pcie_bytes_per_s)
    return np.asarray(_floats(rows, "n_bytes") / rate)


def _memory(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    return np.asarray(_floats(rows, "n_bytes") / gpu.hbm_bytes_per_s)


def _launch(rows: pd.DataFrame, gpu: Gpu) -> FloatArray:
    return np.zeros(len(rows))


def _floats(rows: pd.DataFrame, name: str, blank: float = 0.0) -> FloatArray:
    """Column as floats, `blank` where a cell, or the whole column, is."""
    if name not in rows:
        return np.full(len(rows), blank)
    return np.asarray(rows[name].astype("Float64").fillna(blank), dtype=float)


_FLOORS: dict[str, Callable[[pd.DataFrame, Gpu], FloatArray]] = {
    "moe_ffn": _moe_ffn,
    "moe_step": _moe_step,
    "gemm": _gemm,
    "attention": _attention,
    "mla_block": _mla_block,
    "collective": _collective,
    "all_reduce": _all_reduce,
    "deepep": _deepep,
    "router": _router,
    "transfer": _transfer,
    "memory": _memory,
    "launch": _launch,
}
