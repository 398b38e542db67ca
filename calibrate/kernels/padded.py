"""Experts with a fixed capacity: every expert computes the same number of rows, full or not.

::

    rank[p]        = number of pairs before p that have p's expert
    kept[p]        = rank[p] < capacity                                     the rest are dropped, by position
    rows[e, c]     = x[token of the kept pair with expert e and rank c], or 0
    hidden[e]      = silu(rows[e] @ gate[e].T) * (rows[e] @ up[e].T)        one batched product, [E, capacity, I]
    result[e]      = hidden[e] @ w_down[e].T                                one batched product, [E, capacity, H]
    out[t]         = sum over kept pairs of t of router_weight * result[e, rank]

This is how Switch Transformer, GShard and Megatron-LM's capacity-factor mode run experts: shapes never depend on
the routing, at the price of padding for cold experts and of drops for hot ones. moesim measures it beside the
grouped products (`grouped_gemm`), which do neither.

References
----------
Fedus et al., Switch Transformers, arXiv:2101.03961, section 2.2 (capacity, dropped tokens).
Lepikhin et al., GShard, arXiv:2006.16668, algorithm 1 (capacity of an expert, position in it).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Inside a kernel stand values of Triton's own language, which have no Python types.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibrate.kernels import KernelError
from calibrate.kernels.permute import gather_rows, sort_by_expert, unpermute

__all__ = [
    "BatchedTile",
    "PaddedTokens",
    "batched_down",
    "batched_tile",
    "batched_up_swiglu",
    "check_moe_ffn",
    "moe_ffn_padded",
    "pad_to_capacity",
]

_SLOT_TILE = 256
_TYPES = (torch.float16, torch.bfloat16, torch.float32)


class PaddedTokens(NamedTuple):
    """Where every pair stands in the blocks of E experts by `capacity` rows."""

    row_pair: Tensor
    """int32 [E * capacity]: the pair of row ``e * capacity + rank``; ``T * top_k`` where the row is padding."""
    pair_row: Tensor
    """int32 [T * top_k]: the row of each pair; -1 where it was dropped or its expert is not here."""
    n_dropped: Tensor
    """int32 [1], on the device: pairs beyond their expert's capacity."""


class BatchedTile(NamedTuple):
    """Tile of the batched products."""

    block_m: int
    block_n: int
    """Columns of the result; the gated product reads twice as many rows of weights."""
    block_k: int
    num_warps: int
    num_stages: int


# ---------------------------------------------------------------- places


@triton.jit(do_not_specialize=["n_pairs", "capacity"])
def _capacity_kernel(
    sorted_ptr, count_ptr, row_pair_ptr, pair_row_ptr, n_experts, n_pairs, capacity,
    EXPERTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (expert, tile of ranks): pairs in expert order -> rows [E, capacity] and their inverse."""
    expert = tl.program_id(0)
    rank = tl.program_id(1) * TILE + tl.arange(0, TILE)
    experts = tl.arange(0, EXPERTS)
    counts = tl.load(count_ptr + experts, mask=experts < n_experts, other=0)
    start = tl.sum(tl.where(experts < expert, counts, 0), axis=0)
    count = tl.load(count_ptr + expert)
    kept = (rank < count) & (rank < capacity)
    pair = tl.load(sorted_ptr + start + rank, mask=kept, other=0)
    row = expert * capacity + rank
    tl.store(row_pair_ptr + row, tl.where(kept, pair, n_pairs), mask=rank < capacity)
    tl.store(pair_row_ptr + pair, row, mask=kept)


def pad_to_capacity(expert_ids: Tensor, n_experts: int, capacity: int) -> PaddedTokens:
    """Give each expert its first `capacity` pairs, in the order of the pairs.

    Parameters
    ----------
    expert_ids : (T, top_k), int32 or int64
        Experts of each token; an id outside [0, n_experts) goes nowhere and is not counted as dropped.
    n_experts
        Experts.
    capacity
        Rows of one expert.

    Returns
    -------
    PaddedTokens
        On the device of `expert_ids`; its sizes depend on the arguments' shapes only.

    Raises
    ------
    KernelError
        If the capacity is below 1, or as `calibrate.kernels.permute.sort_by_expert`.
    """
    if capacity < 1:
        raise KernelError("an expert has capacity for at least one pair", value=capacity)
    if n_experts * capacity >= 2**31:
        raise KernelError(
            "rows are counted in 32 bits", value=(n_experts, capacity), fix="a smaller capacity"
        )
    placed = sort_by_expert(expert_ids, n_experts, 1)
    n_pairs = expert_ids.numel()
    row_pair = torch.empty(n_experts * capacity, dtype=torch.int32, device=expert_ids.device)
    pair_row = torch.full((n_pairs,), -1, dtype=torch.int32, device=expert_ids.device)
    _capacity_kernel[(n_experts, triton.cdiv(capacity, _SLOT_TILE))](
        placed.sorted_pairs, placed.pairs_per_expert, row_pair, pair_row, n_experts, n_pairs, capacity,
        EXPERTS=triton.next_power_of_2(n_experts), TILE=_SLOT_TILE, num_warps=4,
    )  # fmt: skip
    dropped = (placed.pairs_per_expert - capacity).clamp(min=0).sum(dtype=torch.int32)
    return PaddedTokens(row_pair, pair_row, dropped.reshape(1))


# ---------------------------------------------------------------- batched products


@triton.jit(do_not_specialize=["n_rows", "m_tiles"])
def _batched_kernel(
    a_ptr, w_ptr, out_ptr, n_rows, n_columns, depth, m_tiles, n_tiles,
    GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of one expert: a [E, n_rows, depth] times w [E, n_columns, depth] -> out [E, n_rows, n_columns].

    GATED: w is [E, 2 n_columns, depth], gate before up, and silu(gate) * up is stored. Programs that follow each
    other share a tile of weights: rows run fastest, then columns, then experts.
    """
    tile = tl.program_id(0)
    m = tile % m_tiles
    n = tile // m_tiles % n_tiles
    expert = (tile // (m_tiles * n_tiles)).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows and columns beyond the end read the first ones: never stored, and no mask for them in the loop.
    real_row = m * BLOCK_M + row < n_rows
    real_column = column < n_columns
    k = tl.arange(0, BLOCK_K)
    a_ptr += (expert * n_rows + m * BLOCK_M) * depth
    w_ptr += expert * n_columns * (2 if GATED else 1) * depth
    up_ptr = w_ptr + n_columns * depth
    a_at = tl.where(real_row, row, 0)[:, None] * depth + k[None, :]
    w_at = tl.where(real_column, column, 0)[None, :] * depth + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    above = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, depth, BLOCK_K):
        inside = begin + k < depth
        a = tl.load(a_ptr + a_at, mask=inside[None, :], other=0.0)
        w = tl.load(w_ptr + w_at, mask=inside[:, None], other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
        if GATED:
            up = tl.load(up_ptr + w_at, mask=inside[:, None], other=0.0)
            above = tl.dot(a, up, above, input_precision=PRECISION)
        a_at += BLOCK_K
        w_at += BLOCK_K
    if GATED:
        total = total * tl.sigmoid(total) * above
    out_ptr += (expert * n_rows + m * BLOCK_M) * n_columns
    at = out_ptr + row[:, None] * n_columns + column[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=real_row[:, None] & real_column[None, :])


def batched_tile(n_rows: int, *, gated: bool, wide: bool = False) -> BatchedTile:
    """Tile by the rows of an expert. `wide`: float32 operands, which take twice the room."""
    block_m = min(128, max(16, triton.next_power_of_2(n_rows)))
    if wide:
        return BatchedTile(min(block_m, 64), 64, 32, num_warps=4, num_stages=3)
    if block_m == 128:
        return BatchedTile(128, 128 if gated else 256, 64, num_warps=8, num_stages=4)
    if block_m == 64:
        return BatchedTile(64, 64 if gated else 128, 128, num_warps=4, num_stages=4)
    # Few rows: reading the weights is all there is to it, so the pipelines of two programs an SM are what counts.
    return BatchedTile(block_m, 64, 64, num_warps=4, num_stages=6)


def _batched(a: Tensor, w: Tensor, *, gated: bool) -> Tensor:
    shapes = (tuple(a.shape), tuple(w.shape))
    if a.dim() != 3 or w.dim() != 3 or shapes[0][::2] != shapes[1][::2] or a.dtype != w.dtype:
        raise KernelError("rows are [E, capacity, K] and weights [E, N, K] of one type", value=shapes)
    n_experts, n_rows, depth = a.shape
    n_columns = w.shape[1] // 2 if gated else w.shape[1]
    if a.dtype not in _TYPES or not a.is_contiguous() or not w.is_contiguous():
        raise KernelError("rows and weights are contiguous float16, bfloat16 or float32", value=a.dtype)
    tile = batched_tile(n_rows, gated=gated, wide=a.dtype == torch.float32)
    m_tiles, n_tiles = triton.cdiv(n_rows, tile.block_m), triton.cdiv(n_columns, tile.block_n)
    out = torch.empty((n_experts, n_rows, n_columns), dtype=a.dtype, device=a.device)
    _batched_kernel[(n_experts * m_tiles * n_tiles,)](
        a, w, out, n_rows, n_columns, depth, m_tiles, n_tiles,
        GATED=gated, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        PRECISION="tf32x3" if a.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def batched_up_swiglu(rows: Tensor, w_up: Tensor) -> Tensor:
    """``silu(rows @ gate.T) * (rows @ up.T)``: rows [E, capacity, H], w_up [E, 2 I, H] -> [E, capacity, I]."""
    return _batched(rows, w_up, gated=True)


def batched_down(hidden: Tensor, w_down: Tensor) -> Tensor:
    """``hidden @ w_down.T``: hidden [E, capacity, I], w_down [E, H, I] -> [E, capacity, H], not yet weighted."""
    return _batched(hidden, w_down, gated=False)


def moe_ffn_padded(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, router_weights: Tensor, *, capacity: int
) -> tuple[Tensor, Tensor]:
    """Routed experts with a fixed capacity; no host synchronisation.

    Parameters
    ----------
    x : (T, H), float16, bfloat16 or float32
        Tokens.
    w_up : (E, 2 I, H)
        Weights of the first product, gate rows before up rows, of the type of `x`.
    w_down : (E, H, I)
        Weights of the second.
    expert_ids : (T, top_k), int32 or int64
        Experts of each token; an id outside [0, E) goes nowhere.
    router_weights : (T, top_k)
        Weight of each pair.
    capacity
        Pairs that an expert takes; those after, in the order of tokens, are dropped and add nothing.

    Returns
    -------
    tuple of Tensor
        [T, H] of the type of `x`; int32 [1], pairs dropped.

    Raises
    ------
    KernelError
        If shapes, types or the capacity do not fit.
    """
    check_moe_ffn(x, w_up, w_down, expert_ids, router_weights)
    n_experts, hidden = w_up.shape[0], x.shape[1]
    places = pad_to_capacity(expert_ids, n_experts, capacity)
    rows = gather_rows(x, places.row_pair, expert_ids.shape[1]).view(n_experts, capacity, hidden)
    result = batched_down(batched_up_swiglu(rows, w_up), w_down)
    return unpermute(result.view(-1, hidden), places.pair_row, router_weights), places.n_dropped


def check_moe_ffn(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, router_weights: Tensor
) -> None:
    """Refuse tensors of an expert layer that do not fit each other."""
    shapes = tuple(map(tuple, (x.shape, w_up.shape, w_down.shape)))
    if x.dim() != 2 or w_up.dim() != 3 or w_down.dim() != 3:
        raise KernelError("x is [T, H], w_up is [E, 2 I, H] and w_down is [E, H, I]", value=shapes)
    n_experts, both, hidden = w_up.shape
    if both % 2 or x.shape[1] != hidden or tuple(w_down.shape) != (n_experts, hidden, both // 2):
        raise KernelError("x is [T, H], w_up is [E, 2 I, H] and w_down is [E, H, I]", value=shapes)
    if expert_ids.dim() != 2 or expert_ids.shape != router_weights.shape or len(expert_ids) != len(x):
        raise KernelError(
            "expert_ids and router_weights are [T, top_k]",
            value=(tuple(expert_ids.shape), tuple(router_weights.shape)),
        )
    types = {x.dtype, w_up.dtype, w_down.dtype}
    if len(types) > 1 or x.dtype not in _TYPES:
        raise KernelError(
            "x and the weights are all float16, bfloat16 or float32", value=sorted(map(str, types))
        )
