"""Seconds of one rank's fused expert feed-forward, from the tokens of each expert slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from moesim.errors import ProfileError
from moesim.hardware.gpu import Gpu, weight_bytes_per_element
from moesim.work.ops import ExpertFfn, FloatArray

__all__ = ["ExpertFfnParameters", "RowTiles", "expert_ffn_s", "ffn_time_s", "tile_rows_for"]

_ACTIVATION_BYTES = 2.0
"""Activations are bf16 between kernels whatever the weights are."""


@dataclass(frozen=True)
class ExpertFfnParameters:
    """How well one library's fused MoE uses a GPU; rates are fractions of the GPU's datasheet peak."""

    launch_s: float
    """Launches and dependencies of the call's kernels [s]."""
    ramp_s: float
    """What each doubling of the (token, expert) pairs adds: sorting, wider grids [s]."""
    hbm_fraction: float
    """Share of the memory rate at which expert weights stream."""
    flops_fraction: float
    """Share of the matrix rate inside a full tile."""
    tile_overhead_rows: float
    """Rows' worth of time that a tile costs beside its own rows: loading the weight side."""
    tile_latency_s: float
    """Prologue and epilogue of one wave of tiles [s]."""
    wave_quantisation: float
    """Compute: 0, SMs never idle in the last wave; 1, they idle until it ends."""
    stream_quantisation: float
    """Memory: the same for the rate that idle SMs do not draw."""
    overlap_power: float
    """Norm that joins compute with memory: 1 is their sum, large is their maximum."""
    reread_fraction: float
    """Share of an expert's weights that every further tile of rows fetches from memory again."""
    local_traffic_fraction: float
    """Share of the memory rate at which rows of local experts are permuted, activated and combined."""
    remote_traffic_fraction: float
    """The same for (token, expert) pairs whose expert is on another rank."""
    slot_s: float
    """Scheduling of one expert slot in one product, used or not, hidden where memory is slower [s]."""
    host_s: float
    """What the host takes to issue the call where it is not hidden; the device's time runs beneath it [s]."""
    tile_by_group: float
    """What the library chooses tiles by: 0, rows on this rank; 1, rows of the whole expert-parallel group."""
    tile_fill: float
    """Tile height that the library picks, over that number of rows per expert slot."""
    tile_rows_min: float
    """Shortest tile [rows]."""
    tile_rows_max: float
    """Tallest tile [rows]."""
    tile_columns: float
    """Width of a tile [columns of the weight]."""

    @classmethod
    def from_values(cls, values: Mapping[str, float]) -> ExpertFfnParameters:
        """Take the parameters of a profile's family.

        Raises
        ------
        ProfileError
            If one is missing or is not a parameter of this model.
        """
        names = {field.name for field in fields(cls)}
        if missing := names - set(values):
            raise ProfileError(f"expert feed-forward parameters are missing: {sorted(missing)}")
        if extra := set(values) - names:
            raise ProfileError(f"not parameters of the expert feed-forward: {sorted(extra)}")
        return cls(**{name: float(values[name]) for name in names})


@dataclass(frozen=True, eq=False)
class RowTiles:
    """What the cost needs of a vector of tokens per expert slot; arrays [P, L, R]."""

    rows: FloatArray
    """Rows multiplied, all slots together."""
    active: FloatArray
    """Slots that received a row."""
    tiles: FloatArray
    """Tiles of `tile_rows` that the rows fill, each slot padded on its own."""
    tile_rows: FloatArray
    """Height of a tile."""
    n_slots: FloatArray
    """Expert slots on the rank."""

    @classmethod
    def of(cls, tokens_per_expert: FloatArray, pairs: FloatArray, params: ExpertFfnParameters) -> RowTiles:
        """Reduce over the last axis.

        Notes
        -----
        A slot with less than one token, an expectation, counts as that share of an active slot.
        """
        tokens = np.asarray(tokens_per_expert, dtype=float)
        n_slots = max(tokens.shape[-1], 1)
        rows = tokens.sum(axis=-1)
        tile_rows = tile_rows_for(rows, pairs, n_slots, params)
        present = np.minimum(tokens, 1.0)
        filled = tokens / tile_rows[..., None]
        np.ceil(filled, out=filled)
        tiles = np.einsum("...e,...e->...", filled, present)
        return cls(rows, present.sum(axis=-1), tiles, tile_rows, np.asarray(float(n_slots)))


def tile_rows_for(
    rows: FloatArray, pairs: FloatArray, n_slots: FloatArray | int, params: ExpertFfnParameters
) -> FloatArray:
    """Tile height that the library picks: the power of two that holds a slot's mean rows, in its range."""
    seen = rows + params.tile_by_group * np.maximum(pairs - rows, 0.0)
    wanted = np.maximum(seen / n_slots * params.tile_fill, 1.0)
    power = np.exp2(np.ceil(np.log2(wanted) - 1e-9))
    return np.asarray(np.clip(power, params.tile_rows_min, params.tile_rows_max))


def expert_ffn_s(op: ExpertFfn, *, gpu: Gpu, params: ExpertFfnParameters) -> FloatArray:
    """Time of permute, both grouped products, activation and combine on one rank.

    Parameters
    ----------
    op
        Tokens per slot [P, L, R, slots], tokens that enter [P, L, R] and the slots' shape.
    gpu
        Peaks of the device.
    params
        Fitted shares of those peaks.

    Returns
    -------
    [P, L, R] seconds, never below the roofline of the weights of active slots and of the products; where no
    token enters, the launches alone.

    Notes
    -----
    The equations are in docs/fits/moe_ffn.md. The backward pass is derived, not measured: twice the products
    (for the inputs and for the weights), twice the traffic, twice the launches.
    """
    pairs = op.n_tokens * 0.0 if op.deepep_layout else op.n_tokens * op.top_k
    tiles = RowTiles.of(op.tokens_per_expert, pairs, params)
    return ffn_time_s(
        tiles,
        n_tokens=op.n_tokens,
        hidden=op.hidden,
        intermediate=op.intermediate,
        top_k=op.top_k,
        dtype=op.dtype,
        n_up=2 if op.gated else 1,
        deepep_layout=op.deepep_layout,
        n_passes=1 if op.passes == "forward" else 2,
        gpu=gpu,
        params=params,
    )


def ffn_time_s(
    tiles: RowTiles,
    *,
    n_tokens: FloatArray,
    hidden: FloatArray | int,
    intermediate: FloatArray | int,
    top_k: FloatArray | int,
    dtype: str,
    n_up: FloatArray | int,
    deepep_layout: bool,
    n_passes: int,
    gpu: Gpu,
    params: ExpertFfnParameters,
) -> FloatArray:
    """Time of rows already reduced to tiles; the fit calls it with shapes that differ by row."""
    up = n_up * np.asarray(intermediate, dtype=float)
    down = np.asarray(intermediate, dtype=float)
    wide = np.asarray(hidden, dtype=float)
    products_s = sum(_product_s(tiles, n, k, dtype, gpu, params) for n, k in ((up, wide), (wide, down)))
    row_bytes = _ACTIVATION_BYTES * (3 * wide + 2 * up + 2 * down)
    entered_bytes = np.asarray(n_tokens) * (0.0 if deepep_layout else 2 * _ACTIVATION_BYTES * wide)
    remote_rows = 0.0 if deepep_layout else np.maximum(np.asarray(n_tokens) * top_k - tiles.rows, 0.0)
    traffic_s = (tiles.rows * row_bytes + entered_bytes) / params.local_traffic_fraction
    traffic_s = (traffic_s + remote_rows * row_bytes / params.remote_traffic_fraction) / gpu.hbm_bytes_per_s
    pairs = tiles.rows if deepep_layout else np.asarray(n_tokens, dtype=float) * top_k
    time_s = params.launch_s + params.ramp_s * np.log2(1.0 + pairs)
    time_s = time_s + products_s + traffic_s
    time_s = np.maximum(time_s, _floor_s(tiles, (up + down) * wide, dtype, gpu))
    return np.asarray(n_passes * _norm(time_s, np.asarray(params.host_s), 6.0))


def _product_s(
    tiles: RowTiles, n: FloatArray, k: FloatArray, dtype: str, gpu: Gpu, params: ExpertFfnParameters
) -> FloatArray:
    """One grouped product, rows by their slot's (k, n) matrix: tiles in waves against the weights' stream."""
    sm_flops_per_s = gpu.peak_flops_per_s(dtype) * params.flops_fraction / gpu.n_sms
    height = tiles.tile_rows + params.tile_overhead_rows
    tile_s = 2.0 * height * params.tile_columns * k / sm_flops_per_s + params.tile_latency_s
    filled = tiles.tiles * np.ceil(n / params.tile_columns) / gpu.n_sms
    busy = np.maximum(filled, 1e-9)
    idle = np.maximum(np.ceil(filled), 1.0) / busy - 1.0
    waves = np.maximum(filled * (1 + params.wave_quantisation * idle), 1.0) * (filled > 0)
    compute_s = tile_s * waves + params.slot_s * tiles.n_slots * np.minimum(tiles.rows, 1.0)
    again = params.reread_fraction * np.maximum(tiles.tiles - tiles.active, 0.0)
    weight_bytes = n * k * weight_bytes_per_element(dtype) * (tiles.active + again)
    memory_s = weight_bytes / (gpu.hbm_bytes_per_s * params.hbm_fraction)
    memory_s = memory_s * (1 + params.stream_quantisation * idle)
    return _norm(compute_s, memory_s, params.overlap_power)


def _norm(a: FloatArray, b: FloatArray, power: float) -> FloatArray:
    """Between the sum of two times (power 1) and the longer of them (power large)."""
    longer = np.maximum(np.maximum(a, b), 1e-30)
    shorter = np.minimum(a, b)
    return np.asarray(longer * (1.0 + (shorter / longer) ** power) ** (1.0 / power))


def _floor_s(tiles: RowTiles, matrix_elements: FloatArray, dtype: str, gpu: Gpu) -> FloatArray:
    """No kernel beats it: active slots' weights once at the memory's peak, products at the matrix peak."""
    memory_s = tiles.active * matrix_elements * weight_bytes_per_element(dtype) / gpu.hbm_bytes_per_s
    return np.maximum(memory_s, 2.0 * tiles.rows * matrix_elements / gpu.peak_flops_per_s(dtype))
