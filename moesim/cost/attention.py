"""Seconds of attention kernels: tiles of packed queries over SMs, bounded by the roofline.

Equations, parameters and errors: docs/fits/attention.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moesim.hardware.gpu import Gpu, weight_bytes_per_element
from moesim.work.ops import AttentionDecode, AttentionPrefill, FloatArray

__all__ = [
    "Heads", "attention_bytes", "attention_decode_s", "attention_prefill_s", "decode_kernel_s", "prefill_kernel_s",
]  # fmt: skip

_WARP_GROUP_ROWS = 64
_NARROW_DIM = 96
"""Heads up to this wide are given taller tiles (flash-attention, hopper/tile_size.h)."""
_FP8_STEPS = ((64, 160.0), (96, 128.0), (128, 224.0), (192, 160.0))
"""Keys of one step over an fp8 cache by the widest head that has it, 128 above (the same file)."""
_LATENT_DIM, _LATENT_V_DIM = 576, 512
"""DeepSeek-V3's cached latent, rotary part included, and the part of it that serves as values."""
_BLOCK_TOKEN_BYTES = 2048.0
"""Fresh keys and values of one token that a block of threads stores in one go: 512 elements of each (vLLM,
``csrc/cache_kernels.cu``, ``reshape_and_cache_flash``: a block per token, of at most 512 threads)."""
_FULL = 0.8
_MIN_STEPS = 4
"""No split where tiles fill this share of the SMs or a sequence has no more steps (hopper/heuristics.h)."""
_SPLITS = (1, 2, 4, 8, 16, 32, 64)
"""Parts that one sequence's keys may be cut into at decode."""
_OUTPUT_BYTES = 2.0
_PARTIAL_BYTES = 4.0
_BACKWARD_FLOPS = 2.5
"""Backward over forward: five products instead of two (FlashAttention-2, Dao 2023, section 3.1)."""
_BACKWARD_EFFICIENCY = 0.8
"""Backward's matrix rate over forward's: assumed. FlashAttention-3's figures on H100 go up to 740 TFLOP/s forward
and, at head dimension 128, 561 backward: 0.76 (Shah et al. 2024)."""
_BACKWARD = _BACKWARD_FLOPS / _BACKWARD_EFFICIENCY


@dataclass(frozen=True, eq=False)
class Heads:
    """Heads of one attention kernel on one rank; fields may be arrays, many layouts at once."""

    n_heads: FloatArray | int
    n_kv_heads: FloatArray | int
    head_dim: FloatArray | int
    v_head_dim: FloatArray | int
    window: FloatArray | int
    """Keys that a query sees at most; 0 = all before it."""
    kv_element_bytes: float
    kind: str
    """``gqa`` or ``mla``; MLA on one KV head is absorbed: it multiplies the cached latent itself."""

    @property
    def latent(self) -> bool:
        """Values are the first part of the keys, so a key is read once for both products."""
        return self.kind == "mla" and bool(np.all(np.asarray(self.v_head_dim) >= _LATENT_V_DIM))

    @property
    def group(self) -> FloatArray:
        """Query heads that share one KV head, packed in one tile."""
        return np.asarray(np.asarray(self.n_heads, dtype=np.float64) / self.n_kv_heads)

    @property
    def dims(self) -> FloatArray:
        """Multiply-adds per (query, key) pair."""
        return np.asarray(self.head_dim, dtype=np.float64) + self.v_head_dim

    @property
    def tile(self) -> tuple[FloatArray, FloatArray]:
        """Query rows of one tile, as FlashAttention-3 picks them, and keys of one of its steps."""
        width = np.asarray(self.head_dim)
        rows = np.where(width <= _NARROW_DIM, 192.0, 128.0)
        if self.latent:
            return np.asarray(64.0), np.asarray(64.0)
        if self.kv_element_bytes == 1:
            return rows, np.select(
                [width <= widest for widest, _ in _FP8_STEPS], [n for _, n in _FP8_STEPS], 128.0
            )
        return rows, np.where(width <= 128, 128.0, 96.0)

    @property
    def key_bytes(self) -> FloatArray:
        """Bytes of one cached token in one KV head."""
        elements = np.asarray(self.head_dim, dtype=np.float64)
        if not self.latent:
            elements = elements + self.v_head_dim
        return elements * self.kv_element_bytes

    @property
    def fresh_bytes(self) -> FloatArray:
        """Bytes of one fresh token, in bfloat16, that go to the cache; MLA stores its latent alone."""
        if self.kind == "mla":
            return np.asarray(_OUTPUT_BYTES * _LATENT_DIM)
        return np.asarray(_OUTPUT_BYTES * np.asarray(self.n_kv_heads) * self.dims)

    @property
    def query_bytes(self) -> FloatArray:
        """Bytes of one token's queries read and outputs written, all heads."""
        return _OUTPUT_BYTES * np.asarray(self.n_heads) * (np.asarray(self.head_dim) + self.v_head_dim)

    def visible(self, context: FloatArray) -> FloatArray:
        """Keys that the last query of a context sees."""
        window = np.asarray(self.window)
        return np.where(window > 0, np.minimum(context, window), context)

    def pairs(self, n_query: FloatArray, n_context: FloatArray) -> FloatArray:
        """(query, key) pairs of one head of one sequence under the causal mask and the window."""
        first = n_context - n_query
        window = np.asarray(self.window)
        limit = np.where(window > 0, window, np.inf)
        rising_to = np.clip(limit, first, n_context)
        rising = (rising_to - first) * (rising_to + first + 1) / 2
        flat = n_context - rising_to
        return rising + np.where(flat > 0, flat * np.where(window > 0, window, 0), 0.0)


def _heads_of(op: AttentionPrefill | AttentionDecode) -> Heads:
    return Heads(
        op.n_heads, op.n_kv_heads, op.head_dim, op.v_head_dim, op.window,
        weight_bytes_per_element(op.kv_dtype), op.kind,
    )  # fmt: skip


def attention_bytes(op: AttentionPrefill | AttentionDecode) -> FloatArray:
    """[P, L, R] bytes of queries, outputs, and keys and values, each once; twice that of a backward pass."""
    heads = _heads_of(op)
    batch, n_context = (np.asarray(one, dtype=np.float64) for one in (op.batch, op.n_context))
    n_query = np.asarray(op.n_query, dtype=np.float64) if isinstance(op, AttentionPrefill) else 1.0
    keys = n_context if isinstance(op, AttentionPrefill) else heads.visible(n_context)
    moved = batch * (n_query * heads.query_bytes + keys * heads.n_kv_heads * heads.key_bytes)
    backward = isinstance(op, AttentionPrefill) and op.passes == "backward"
    return np.asarray(moved * (2.0 if backward else 1.0))


def attention_prefill_s(op: AttentionPrefill, *, gpu: Gpu, params: Mapping[str, float]) -> FloatArray:
    """Time of causal attention over fresh tokens.

    Parameters
    ----------
    op
        Batch, queries and context [P, L, R], heads on this rank.
    gpu
        Peaks that the fractions in `params` refer to.
    params
        Values of a family ``attention_prefill``.

    Returns
    -------
    FloatArray
        [P, L, R] seconds; 0 where nothing is asked.

    Notes
    -----
    Backward is 2.5 forward passes of FLOPs at 0.8 of the forward's rate, the latter assumed.

    References
    ----------
    T. Dao, "FlashAttention-2" (2023), section 3.1; J. Shah et al., "FlashAttention-3" (2024).
    """
    batch, n_query = np.asarray(op.batch, dtype=np.float64), np.asarray(op.n_query, dtype=np.float64)
    n_context = np.asarray(op.n_context, dtype=np.float64)
    kernel_s = prefill_kernel_s(batch, n_query, n_context, _heads_of(op), gpu=gpu, params=params)
    if op.passes == "backward":
        kernel_s = params["launch_s"] + _BACKWARD * (kernel_s - params["launch_s"])
    return np.where(batch * n_query > 0, kernel_s, 0.0)


def prefill_kernel_s(
    batch: FloatArray,
    n_query: FloatArray,
    n_context: FloatArray,
    heads: Heads,
    *,
    gpu: Gpu,
    params: Mapping[str, float],
) -> FloatArray:
    """Time of one prefill kernel [s]; arguments broadcast.

    Notes
    -----
    Every tile holds query rows of one KV head's group, packed, and walks the keys that any of its rows sees.
    Tiles go to SMs longest first, so the makespan is the mean load or the longest tile. Too few tiles to fill
    the SMs are cut along the keys, as at decode.
    """
    rows, step_keys = heads.tile
    n_query = np.maximum(n_query, 1.0)
    positions = rows / heads.group
    n_tiles = batch * heads.n_kv_heads * np.ceil(n_query / positions)
    pairs = heads.pairs(n_query, n_context)
    windowed = heads.visible(n_context) < n_context
    spread = np.where(windowed, 1.0, 0.5) * np.minimum(positions, n_query)
    whole = np.ceil(n_context / step_keys) * step_keys
    keys = np.minimum(pairs / n_query + spread + params["edge_steps"] * step_keys, whole)
    longest_keys = np.minimum(heads.visible(n_context) + spread + params["edge_steps"] * step_keys, whole)
    steps = longest_keys / step_keys
    spare = np.minimum(np.floor(gpu.n_sms / np.maximum(n_tiles, 1.0)), steps)
    cut = np.where((n_tiles < _FULL * gpu.n_sms) & (steps > _MIN_STEPS), np.maximum(spare, 1.0), 1.0)
    key_s = _key_s(rows, heads, gpu, params)
    unit_s = params["unit_s"] + params["unit_dim_s"] * heads.dims
    longest_s = unit_s + longest_keys / cut * key_s
    waves = _rounded(n_tiles * cut / gpu.n_sms, params["wave_rounding"])
    busy_s = np.maximum(waves * (unit_s + keys / cut * key_s), longest_s)
    busy_s = busy_s + np.where(cut > 1, params["split_s"], 0.0)
    met = np.minimum(n_context, heads.visible(n_context) + n_query)
    moved_bytes = batch * (n_query * heads.query_bytes + met * heads.n_kv_heads * heads.key_bytes)
    memory_s = moved_bytes / (params["hbm_fraction"] * gpu.hbm_bytes_per_s)
    kernel_s = params["launch_s"] + _overlapped(busy_s, memory_s, params["overlap_power"])
    kernel_s = kernel_s + _around_s(batch * n_query, batch * n_context, heads, gpu, params)
    floor = 2.0 * batch * heads.n_heads * pairs * heads.dims / gpu.peak_flops_per_s("bfloat16")
    return np.asarray(np.maximum(kernel_s, np.maximum(floor, memory_s * params["hbm_fraction"])))


def attention_decode_s(op: AttentionDecode, *, gpu: Gpu, params: Mapping[str, float]) -> FloatArray:
    """Time of one query a sequence against its cache.

    Parameters
    ----------
    op
        Batch and cached tokens [P, L, R], heads on this rank.
    gpu
        Peaks that the fractions in `params` refer to.
    params
        Values of a family ``attention_decode``.

    Returns
    -------
    FloatArray
        [P, L, R] seconds; 0 where the batch is empty.

    References
    ----------
    T. Dao et al., "Flash-Decoding for long-context inference" (2023): the split over keys.
    """
    batch, n_context = (np.asarray(x, dtype=np.float64) for x in (op.batch, op.n_context))
    kernel_s = decode_kernel_s(batch, n_context, _heads_of(op), gpu=gpu, params=params)
    return np.where(batch > 0, kernel_s, 0.0)


def decode_kernel_s(
    batch: FloatArray, n_context: FloatArray, heads: Heads, *, gpu: Gpu, params: Mapping[str, float]
) -> FloatArray:
    """Time of one decode kernel [s]; arguments broadcast.

    Notes
    -----
    The kernel cuts the keys of a sequence so that the tiles fill the SMs; the model takes the best cut.
    """
    rows, step_keys = heads.tile
    keys = np.maximum(heads.visible(n_context), 1.0)
    n_tiles = batch * heads.n_kv_heads * np.ceil(heads.group / rows)
    moved_bytes = batch * (heads.query_bytes + keys * heads.n_kv_heads * heads.key_bytes)
    memory_s = moved_bytes / (params["hbm_fraction"] * gpu.hbm_bytes_per_s)
    # A warp group multiplies 64 rows at a time; those of a tile that hold no query are skipped.
    used_rows = np.minimum(rows, _WARP_GROUP_ROWS * np.ceil(heads.group / _WARP_GROUP_ROWS))
    step_s = step_keys * _key_s(used_rows, heads, gpu, params)
    unit_s = params["unit_s"] + params["unit_dim_s"] * heads.dims
    edge = np.where(keys < n_context, params.get("window_steps", 0.0), 0.0)
    steps = np.minimum(np.ceil(keys / step_keys) + edge, np.ceil(n_context / step_keys))
    partial_bytes = 2 * _PARTIAL_BYTES * batch * heads.n_heads * np.asarray(heads.v_head_dim)
    undivided = (n_tiles >= _FULL * gpu.n_sms) | (steps <= _MIN_STEPS)
    best: FloatArray = np.asarray(np.inf)
    for split in _SPLITS:
        waves = _rounded(n_tiles * split / gpu.n_sms, params["wave_rounding"])
        walk_s = waves * np.ceil(steps / split) * step_s
        total = waves * unit_s + _overlapped(walk_s, memory_s, params["overlap_power"])
        if split > 1:
            total = total + params["split_s"] + split * partial_bytes / gpu.hbm_bytes_per_s
            total = np.where(undivided, np.inf, total)
        best = np.minimum(best, total)
    floor = 2.0 * batch * heads.n_heads * keys * heads.dims / gpu.peak_flops_per_s("bfloat16")
    floor = np.maximum(floor, memory_s * params["hbm_fraction"])
    windowed_s = np.where(keys < n_context, params.get("window_s", 0.0), 0.0)
    listed_s = batch * params.get("sequence_s", 0.0)
    around_s = listed_s + _around_s(batch, batch * n_context, heads, gpu, params)
    kernel_s = params["launch_s"] + best + windowed_s + around_s
    return np.asarray(np.maximum(kernel_s, floor))


def _around_s(
    tokens: FloatArray, cached: FloatArray, heads: Heads, gpu: Gpu, params: Mapping[str, float]
) -> FloatArray:
    """Kernels around the products [s]: storing fresh keys and values, casting queries, widening the cache."""
    first_bytes = np.minimum(heads.fresh_bytes, _BLOCK_TOKEN_BYTES)
    further_bytes = heads.fresh_bytes - first_bytes
    further_fraction = params.get("append_wide_fraction", params["append_fraction"])
    stored = first_bytes / params["append_fraction"] + further_bytes / further_fraction
    seconds = tokens * stored / gpu.hbm_bytes_per_s
    if "cast_fraction" in params:
        query_bytes = _OUTPUT_BYTES * np.asarray(heads.n_heads) * heads.head_dim
        seconds = seconds + tokens * query_bytes / (params["cast_fraction"] * gpu.hbm_bytes_per_s)
    if "widen_fraction" in params:
        cached_bytes = cached * heads.n_kv_heads * heads.key_bytes
        seconds = seconds + cached_bytes / (params["widen_fraction"] * gpu.hbm_bytes_per_s)
    return np.asarray(seconds)


def _rounded(waves: FloatArray, rounding: float) -> FloatArray:
    """Round waves up in part only: the last wave's tiles run faster, alone."""
    return np.asarray(rounding * np.ceil(waves) + (1 - rounding) * np.maximum(waves, 1.0))


def _key_s(rows: FloatArray, heads: Heads, gpu: Gpu, params: Mapping[str, float]) -> FloatArray:
    """Seconds that one SM needs per key of one tile: both products and the softmax, or loading the key."""
    dims = heads.dims + params["softmax_dims"]
    flops_s = 2.0 * rows * dims * gpu.n_sms / (params["compute_fraction"] * gpu.peak_flops_per_s("bfloat16"))
    load_s = heads.key_bytes * gpu.n_sms / (params["l2_ratio"] * gpu.hbm_bytes_per_s)
    wide = np.maximum(np.asarray(heads.head_dim) / 128.0, 1.0) ** params.get("wide_power", 0.0)
    return np.asarray(np.maximum(flops_s, load_s) * wide)


def _overlapped(one_s: FloatArray, other_s: FloatArray, power: float) -> FloatArray:
    """Smooth maximum of two times."""
    high = np.maximum(np.maximum(one_s, other_s), 1e-12)
    return np.asarray(high * ((one_s / high) ** power + (other_s / high) ** power) ** (1 / power))
