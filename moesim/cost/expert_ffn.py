"""Seconds of one rank's fused expert feed-forward, from the tokens of each expert slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np

from moesim.cost.moe_tiles import Tile, tile_choice, tile_library
from moesim.errors import ProfileError
from moesim.hardware.gpu import Gpu, compute_dtype, weight_bytes_per_element
from moesim.work.ops import ExpertFfn, FloatArray

__all__ = [
    "ExpertFfnParameters", "FfnCall", "FfnParts", "expert_call", "expert_ffn_s", "ffn_parts", "ffn_time_s", "tile_for",
    "tile_rows_for", "tiles_skipped",
]  # fmt: skip

_ACTIVATION_BYTES = 2.0
"""Activations are bf16 between kernels whatever the weights are."""
_OPERAND_BYTES_PER_CLOCK = 64.0
"""What one SM can take from the level-2 cache a clock [bytes] (H100: L2 read bandwidth of 5.5 to 7 TB/s measured,
port of 64 bytes a clock and SM)."""
_SHARED_BYTES = 232_448.0
"""Shared memory of one SM that its blocks divide [bytes] (CUDA C++ Programming Guide, compute capability 9.0)."""
_REGISTERS, _REGISTERS_BESIDE_SUM = 65_536.0, 56.0
"""Registers of one SM, and those of a thread beside its part of the accumulator (assumed: Triton's kernels take
about 88 with 32 for the sum, 120 with 64)."""
_LINE_BYTES = 128.0
"""A step whose rows of weight are shorter than a cache line does not draw the full memory rate."""
_SUSTAINED_S = 0.01
"""Length of a product at which half of the clock's drop under load is there [s] (assumed)."""
_KERNELS, _SORT_KERNELS = 6, 3
"""Launches of a call, and those of sorting among them."""
_WAYS_JOINED = 4.0
"""Norm that joins the matrix units' time in a tile with that of feeding them."""


@dataclass(frozen=True)
class ExpertFfnParameters:
    """How well one library's fused MoE uses a GPU; rates are fractions of the GPU's datasheet peak."""

    launch_s: float
    """Launches and dependencies of the call's kernels [s]."""
    ramp_s: float
    """What each doubling of the (token, expert) pairs adds: sorting, wider grids [s]."""
    align_s: float
    """Sorting rows by expert, which a call of few pairs may skip [s]."""
    score_s: float
    """Router's top-k inside a measured call, a token and expert [s]; engines' routers are priced apart."""
    hbm_fraction: float
    """Share of the memory rate at which expert weights stream."""
    line_power: float
    """How steeply that share falls where a step reads less than a cache line of each row."""
    flops_fraction: float
    """Share of the matrix rate inside a tile of 64 rows or more."""
    small_flops_fraction: float
    """The same for flatter tiles, which use the older matrix instruction."""
    operand_fraction: float
    """Share of the level-2 cache's rate at which a tile's operands arrive."""
    step_s: float
    """Latency of one step of a tile's inner loop, weights from memory; stages overlap it [s]."""
    step_warm_s: float
    """The same, weights from the level-2 cache [s]."""
    warm_share: float
    """Weights that a measured loop finds in the level-2 cache, over its size."""
    tile_s: float
    """Prologue and epilogue of a tile [s]."""
    wave_quantisation: float
    """Compute: 0, SMs never idle in the last wave; 1, they idle until it ends."""
    overlap_power: float
    """Norm that joins compute, latency and memory: 1 is their sum, large is the longest."""
    sustained_loss: float
    """What the clock drops by under a product that lasts."""
    reread_fraction: float
    """Share of an expert's weights that every further tile of rows fetches from memory again."""
    unaligned_factor: float
    """Slowdown of the down product where the intermediate size is no multiple of 16 elements."""
    local_traffic_fraction: float
    """Share of the memory rate at which rows of local experts are permuted, activated and combined."""
    remote_wide_fraction: float
    """The same for the intermediate columns of pairs whose expert is on another rank."""
    remote_hidden_fraction: float
    """The same for their hidden columns."""
    token_traffic_fraction: float
    """The same for tokens on their way in and out."""
    empty_tile_s: float
    """A block of the grid that finds no rows, on its SM [s]."""
    remote_tile_s: float
    """A tile of rows whose expert is elsewhere, on its SM [s]."""
    slot_s: float
    """Scheduling of one expert slot in one product, used or not, hidden where memory is slower [s]."""
    host_s: float
    """What the host takes to issue the call where it is not hidden; the device's time runs beneath it [s]."""
    tile_by_group: float
    """Where no library's rule is known, tiles are chosen by the mean of: 0, this rank's rows over its slots; 1, the
    whole group's over this rank's slots; 2, the group's over the group's experts."""
    tile_fill: float
    """Tile height over that number of rows per expert slot."""
    tile_rows_min: float
    """Shortest tile [rows]."""
    tile_rows_max: float
    """Tallest tile [rows]."""
    tile_columns: float
    """Width of a tile [columns of the weight]."""
    tile_depth: float
    """Depth of one step."""
    tile_warps: float
    """Warps of a tile."""
    tile_stages: float
    """Steps in flight."""

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
class FfnCall:
    """Calls of one library's kernel, reduced to what its cost reads; arrays that broadcast together."""

    rows: FloatArray
    """Rows multiplied, all slots together."""
    active: FloatArray
    """Slots that received a row."""
    tiles: FloatArray
    """Tiles that the rows fill, each slot padded on its own."""
    remote_pairs: FloatArray
    """(token, expert) pairs that entered, but whose expert is on another rank."""
    entered: FloatArray
    """Tokens that entered unsorted; 0 where rows arrive sorted by expert."""
    n_slots: FloatArray
    """Expert slots on the rank."""
    n_experts: FloatArray
    """Experts of the whole group."""
    hidden: FloatArray
    intermediate: FloatArray
    """Width of one expert on this rank."""
    n_up: FloatArray
    """Matrices before the activation: 2 where gated."""
    tile: Tile
    dtype: str
    library: str | None
    """Library whose tile rule and grid it is; None where no more than rows a slot is known."""
    warm: bool = False
    """Timed in a loop, so that small weights stay in the level-2 cache from call to call."""
    routed: FloatArray | float = 0.0
    """Tokens whose router's top-k is inside the measured call."""


def tile_rows_for(
    rows: FloatArray,
    remote_pairs: FloatArray,
    n_slots: FloatArray | int,
    n_experts: FloatArray | int,
    params: ExpertFfnParameters,
) -> FloatArray:
    """Tile height by mean rows: the power of two that holds them, in the family's range.

    A library knows how many pairs enter and how many experts there are, without a look at the device, not how many
    pairs are for this rank.
    """
    seen = rows + min(params.tile_by_group, 1.0) * remote_pairs
    bins = n_slots + max(params.tile_by_group - 1.0, 0.0) * (np.asarray(n_experts) - n_slots)
    wanted = np.maximum(seen / bins * params.tile_fill, 1.0)
    power = np.exp2(np.ceil(np.log2(wanted) - 1e-9))
    return np.asarray(np.clip(power, params.tile_rows_min, params.tile_rows_max))


def tile_for(
    rows: FloatArray,
    remote_pairs: FloatArray,
    n_slots: FloatArray | int,
    n_experts: FloatArray | int,
    params: ExpertFfnParameters,
) -> Tile:
    """Tile of a family that carries its own rule."""
    height = tile_rows_for(rows, remote_pairs, n_slots, n_experts, params)
    rest = (params.tile_columns, params.tile_depth, params.tile_warps, params.tile_stages)
    return Tile(height, *(np.asarray(value) for value in rest))


def tiles_skipped(
    library: str | None, pairs: FloatArray, remote_pairs: FloatArray, n_experts: FloatArray
) -> FloatArray:
    """Whether rows are not sorted: vLLM, without expert parallelism, gives few pairs a tile each instead.

    References
    ----------
    vLLM 0.24.0, ``fused_moe.py``: no sorting where ``4 * n_tokens * top_k <= n_experts`` and no expert map.
    """
    alone = (remote_pairs <= 0) & (4.0 * pairs <= n_experts)
    return np.asarray(alone if library == "vllm" else np.zeros_like(alone))


def expert_ffn_s(
    op: ExpertFfn, *, gpu: Gpu, params: ExpertFfnParameters, implementation: str = ""
) -> FloatArray:
    """Time of permute, both grouped products, activation and combine on one rank.

    Parameters
    ----------
    op
        Tokens per slot [P, L, R, slots], tokens that enter [P, L, R] and the slots' shape.
    gpu
        Peaks of the device.
    params
        Fitted shares of those peaks.
    implementation
        Family of the profile, which tells whose rule chooses tiles; the parameters' own rule where left out.

    Returns
    -------
    [P, L, R] seconds, never below the roofline of the weights of active slots and of the products; where no
    token enters, the launches alone.

    Notes
    -----
    The equations are in docs/fits/moe_ffn.md. Weights are cold: other layers have passed through the cache since.
    The backward pass is derived, not measured: twice the products (for the inputs and for the weights), twice the
    traffic, twice the launches.
    """
    call = expert_call(op, gpu=gpu, params=params, implementation=implementation)
    return np.asarray((1 if op.passes == "forward" else 2) * ffn_time_s(call, gpu=gpu, params=params))


def expert_call(op: ExpertFfn, *, gpu: Gpu, params: ExpertFfnParameters, implementation: str = "") -> FfnCall:
    """Reduce an operator over its slots; arguments as of `expert_ffn_s`.

    Notes
    -----
    A slot with less than one token, an expectation, counts as that share of an active slot. How many experts the
    group has follows from how its pairs compare with a mean rank's rows.
    """
    library = tile_library(implementation, op.dtype)
    tokens = np.asarray(op.tokens_per_expert, dtype=float)
    n_slots = max(tokens.shape[-1], 1)
    rows = tokens.sum(axis=-1)
    entered = np.asarray(op.n_tokens, dtype=float) * (0.0 if op.deepep_layout else 1.0)
    remote = np.maximum(entered * op.top_k - rows, 0.0)
    n_experts = np.asarray(float(n_slots))
    if remote.any():
        mean_rows = np.maximum(rows.mean(axis=-1, keepdims=True), 1e-9)
        n_experts = n_slots * np.clip((remote + rows) / mean_rows, 1.0, 1024.0)
    if library is None:
        # behind a sorting dispatch a library that goes by the group is told what an expert is to expect on average
        told = rows.mean(axis=-1, keepdims=True) if op.deepep_layout and params.tile_by_group else rows
        tile = tile_for(told, remote, n_slots, n_experts, params)
    else:
        tile = tile_choice(
            library, gpu.name, op.dtype, n_slots=n_slots, intermediate=op.intermediate, n_tokens=entered
        )
    present = np.minimum(tokens, 1.0)
    filled = tokens / tile.rows[..., None]
    np.ceil(filled, out=filled)
    tiles = np.einsum("...e,...e->...", filled, present)
    tiles = np.where(tiles_skipped(library, rows, remote, n_experts), rows, tiles)
    return FfnCall(
        rows, present.sum(axis=-1), tiles, remote, entered, np.asarray(float(n_slots)), n_experts,
        np.asarray(float(op.hidden)), np.asarray(float(op.intermediate)), np.asarray(2.0 if op.gated else 1.0),
        tile, op.dtype, library,
    )  # fmt: skip


def ffn_time_s(call: FfnCall, *, gpu: Gpu, params: ExpertFfnParameters) -> FloatArray:
    """Time of calls already reduced; the fit gives it calls whose shapes differ by row."""
    parts = ffn_parts(call, gpu=gpu, params=params)
    time_s = parts.permute_s + parts.up_s + parts.down_s + parts.combine_s
    time_s = time_s + params.score_s * call.routed * call.n_experts
    elements = (call.n_up + 1.0) * call.hidden * call.intermediate
    time_s = np.maximum(time_s, _floor_s(call, elements, _resident(call, gpu, params), gpu))
    return _joined(6.0, time_s, np.asarray(params.host_s)) if params.host_s > 0 else np.asarray(time_s)


@dataclass(frozen=True, eq=False)
class FfnParts:
    """What each kernel of a call takes on its own; they add up to the call, above its roofline."""

    permute_s: FloatArray
    """Rows sorted by expert [s]."""
    up_s: FloatArray
    """Up and gate product with the activation [s]."""
    down_s: FloatArray
    """Down product [s]."""
    combine_s: FloatArray
    """Sum of each token's pairs [s]."""


def ffn_parts(call: FfnCall, *, gpu: Gpu, params: ExpertFfnParameters) -> FfnParts:
    """Split a call's time among its kernels.

    Notes
    -----
    The launches of a call are `launch_s` together; sorting is taken to be half of them (three kernels of six). Rows
    moved go to the kernel that reads or writes them.
    """
    wide, narrow = call.hidden, call.intermediate
    up = call.n_up * narrow
    resident = _resident(call, gpu, params)
    slowed = np.where(narrow % 16 > 0, params.unaligned_factor, 1.0) if call.library else 1.0
    pairs = call.rows + call.remote_pairs
    skipped = tiles_skipped(call.library, pairs, call.remote_pairs, call.n_experts)
    sorted_s = np.where(skipped, 0.0, params.align_s) * (pairs > 0) + params.ramp_s * np.log2(1.0 + pairs)
    local, remote = call.rows / params.local_traffic_fraction, call.remote_pairs
    returned = local + remote / params.remote_hidden_fraction
    tokens = call.entered / params.token_traffic_fraction
    moved_up = local * (wide + 2 * up + narrow) + tokens * wide
    moved_up = moved_up + remote * (2 * up + narrow) / params.remote_wide_fraction
    launch_s = params.launch_s / _KERNELS
    value_s = _ACTIVATION_BYTES / gpu.hbm_bytes_per_s
    return FfnParts(
        permute_s=launch_s * _SORT_KERNELS + sorted_s,
        up_s=launch_s + _product_s(call, up, wide, resident, gpu, params) + value_s * moved_up,
        down_s=launch_s
        + _product_s(call, wide, narrow, resident, gpu, params, slowed)
        + value_s * (local * narrow + returned * wide),
        combine_s=launch_s + value_s * (returned + tokens) * wide,
    )


def _resident(call: FfnCall, gpu: Gpu, params: ExpertFfnParameters) -> FloatArray | float:
    """Share of the active weights that the call before left in the level-2 cache."""
    if not call.warm:
        return 0.0
    elements = call.active * call.hidden * call.intermediate * (call.n_up + 1)
    held = elements * weight_bytes_per_element(call.dtype) / (params.warm_share * gpu.l2_bytes)
    return np.asarray(1.0 / (1.0 + held**4))


def _product_s(
    call: FfnCall, n: FloatArray, k: FloatArray, resident: FloatArray | float, gpu: Gpu,
    params: ExpertFfnParameters, slowed: FloatArray | float = 1.0,
) -> FloatArray:  # fmt: skip
    """One grouped product, rows by their slot's (k, n) matrix: waves of tiles, their latency, the weights' stream."""
    tile, weight_bytes = call.tile, weight_bytes_per_element(call.dtype)
    operand_bytes = 1.0 if compute_dtype(call.dtype) == "fp8" else _ACTIVATION_BYTES
    across = np.ceil(n / tile.columns)
    steps = np.ceil(k / tile.depth)
    blocks = call.tiles * across
    filled = blocks / gpu.n_sms
    share = np.where(tile.rows < 64, params.small_flops_fraction, params.flops_fraction)
    sm_flops_per_s = gpu.peak_flops_per_s(call.dtype) * share / gpu.n_sms
    deep = steps * tile.depth
    multiply_s = 2.0 * np.maximum(tile.rows, 16.0) * tile.columns * deep / sm_flops_per_s
    step_bytes = tile.rows * operand_bytes + tile.columns * weight_bytes
    feed_s = deep * step_bytes / (_OPERAND_BYTES_PER_CLOCK * gpu.clock_hz * params.operand_fraction)
    waves = filled + params.wave_quantisation * (np.ceil(filled) - filled)
    compute_s = _joined(_WAYS_JOINED, multiply_s, feed_s) * waves
    compute_s = compute_s + params.slot_s * call.n_slots * (filled > 0)
    compute_s = compute_s * (1.0 + params.sustained_loss * compute_s / (compute_s + _SUSTAINED_S))
    step_s = params.step_s * (1.0 - resident) + params.step_warm_s * resident
    alone_s = steps * step_s / np.maximum(tile.stages - 1.0, 1.0) + params.tile_s
    latency_s = alone_s * np.ceil(filled / _blocks_per_sm(tile, operand_bytes, weight_bytes))
    again = params.reread_fraction * np.maximum(call.tiles - call.active, 0.0)
    streamed = n * k * weight_bytes * (call.active * (1.0 - resident) + again)
    memory_s = streamed / (gpu.hbm_bytes_per_s * params.hbm_fraction)
    if call.library:
        line_share = np.minimum(tile.depth * weight_bytes, _LINE_BYTES) / _LINE_BYTES
        memory_s = memory_s / line_share**params.line_power
    joined_s = _joined(params.overlap_power, compute_s * slowed, latency_s * slowed, memory_s)
    return joined_s + _vacant_s(call, across, gpu, params) if call.library else joined_s


def _vacant_s(call: FfnCall, across: FloatArray, gpu: Gpu, params: ExpertFfnParameters) -> FloatArray:
    """Blocks of the grid beside those with rows: tiles of other ranks' pairs, and blocks that find nothing.

    vLLM sorts by the experts of the whole group, so every remote expert pads to tiles of its own; SGLang gathers
    all remote pairs as one expert. Either launches as many blocks as the worst routing would need.
    """
    height, by_group = call.tile.rows, call.library == "vllm"
    bins = np.maximum(call.n_experts - call.n_slots, 1.0) if by_group else np.asarray(1.0)
    used = np.minimum(call.remote_pairs, bins)
    remote = used * np.ceil(call.remote_pairs / np.maximum(used, 1e-9) / height)
    pairs = call.rows + call.remote_pairs
    slots = call.n_experts if by_group else call.n_slots
    launched = np.minimum((pairs + slots * (height - 1.0)) / height, pairs)
    empty = np.maximum(launched - remote - call.tiles, 0.0)
    return np.asarray(across / gpu.n_sms * (empty * params.empty_tile_s + remote * params.remote_tile_s))


def _blocks_per_sm(tile: Tile, operand_bytes: float, weight_bytes: float) -> FloatArray:
    """Tiles that an SM holds at once, by shared memory, registers and threads."""
    staged = tile.stages * tile.depth * (tile.rows * operand_bytes + tile.columns * weight_bytes) + 2048.0
    threads = tile.warps * 32.0
    registers = threads * np.minimum(tile.rows * tile.columns / threads + _REGISTERS_BESIDE_SUM, 255.0)
    fit = np.minimum(np.minimum(_SHARED_BYTES / staged, _REGISTERS / registers), 64.0 / tile.warps)
    return np.asarray(np.clip(np.floor(fit), 1.0, 32.0))


def _joined(power: float, *parts_s: FloatArray) -> FloatArray:
    """Between the sum of times (power 1) and the longest of them (power large)."""
    longest = parts_s[0]
    for part in parts_s[1:]:
        longest = np.maximum(longest, part)
    longest = np.maximum(longest, 1e-30)
    total = sum((part / longest) ** power for part in parts_s)
    return np.asarray(longest * total ** (1.0 / power))


def _floor_s(
    call: FfnCall, matrix_elements: FloatArray, resident: FloatArray | float, gpu: Gpu
) -> FloatArray:
    """No kernel beats it: active slots' weights once at the memory's peak, products at the matrix peak."""
    weight_bytes = matrix_elements * weight_bytes_per_element(call.dtype) * (1.0 - resident)
    multiply_s = 2.0 * call.rows * matrix_elements / gpu.peak_flops_per_s(call.dtype)
    return np.maximum(call.active * weight_bytes / gpu.hbm_bytes_per_s, multiply_s)
