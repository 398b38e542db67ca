"""The two products of an expert feed-forward over sorted pairs, and the sum that ends it.

Both products are persistent: about as many programs as fit on the GPU at once walk the tiles, so blocks that
no pair fills cost nothing and the host never asks how many there are. A tile is one block of rows (one expert)
by `block_n` rows of that expert's weight:

::

    for tile in range(program, n_blocks_used * n_columns, n_programs):
        block, column = place of the tile            # group_m blocks share a column before the next column
        e = block_expert[block]
        for k in steps of block_k:                   # num_stages steps are in flight
            up:    gate += x[pairs // top_k, k] @ w_up[e, gate rows of the column, k].T
                   up   += x[pairs // top_k, k] @ w_up[e, up rows of the column, k].T
            down:  acc  += h[rows of the block, k] @ w_down[e, column, k].T
        up:    h[rows of the block, column] = silu(gate) * up               # fp8: quantised here, 128 a scale
        down:  rows[pairs, column] = router_weights[pairs] * acc
    combine:   y[token] = sum over j of rows[token * top_k + j]

Why it is made so
-----------------
Weights come through tensor descriptors (Hopper's copy engine): no address arithmetic, zero fill beyond the
edge, so no loop has a mask for them. `h` is kept in sorted order, where a block is contiguous: it is written and read
by the same engine. Only x is gathered, by 16-byte asynchronous copies.

Blocks of 16 and 32 rows compute the transpose, weight @ rows.T: Hopper's matrix instruction has 64 rows and 8
to 256 columns, so the weight takes the rows and goes from shared memory to the matrix unit without passing
through registers. Such tiles wait for weights alone; what counts is the bytes in flight.

Blocks of 64 and 128 rows read the gate and up rows of a column as one [2, block_n / 2, block_k] box and
multiply once: one 64 x 256 instruction has a better ratio of arithmetic to shared memory than two 64 x 128, and
with one accumulator the compiler can fuse the tile loop with the k loop (`flatten`), so that loads of the next
tile run under the epilogue of this one. With two accumulators it would serialise the matrix instructions, so
transposed and fp8 tiles of `up` are not fused; there two or three programs an SM, or the two warpgroups of one,
cover for each other. Products of `down` have one accumulator and are always fused.

A column's blocks of one expert follow each other (`group_m`), so a weight tile is read from memory once and
from L2 after that. Sums are in a fixed order: no atomics, the same bits every time.

Products of fp8 are summed over 128 of K in the matrix unit, then scaled and added in fp32, as in DeepSeek-V3
(arXiv 2412.19437, section 3.3.2); scales are asked for ahead of the product that needs them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Inside a kernel stand values of Triton's own language, which have no Python types.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from calibrate.kernels import KernelError
from calibrate.kernels.permute import SortedTokens
from calibrate.kernels.rows import SCALE_GROUP, buffer, row_scale
from calibrate.kernels.tiles import Product, Tile, check_tile

__all__ = ["down_combine", "down_kernel", "up_kernel", "up_swiglu"]

_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_ALIGNED = 16
"""Triton takes an integer argument for a multiple of 16 or of nothing; without that x is loaded element by element."""


# ---------------------------------------------------------------- kernels


@triton.jit
def _place(tile, n_blocks, n_columns, GROUP_M: tl.constexpr):
    """Block of rows and column of a tile: GROUP_M blocks walk the columns together."""
    group = tile // (GROUP_M * n_columns)
    first = group * GROUP_M
    height = tl.minimum(n_blocks - first, GROUP_M)
    inside = tile % (GROUP_M * n_columns)
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["n_pairs", "top_k"])
def up_kernel(
    x_ptr, x_scale_ptr, w_desc, w_scale_ptr, h_desc, h_scale_ptr,
    sorted_ptr, expert_ptr, used_ptr, n_pairs, top_k, n_rows, K, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SWAP: tl.constexpr, JOINED: tl.constexpr, EVEN_K: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Write silu(x Wg^T) * (x Wu^T) of every sorted row.

    x [T, K], x_scale [T, K / 128], w [slots, 2, N, K] as boxes [1, 2, BLOCK_N / 2, BLOCK_K] if JOINED, else
    [slots * 2 N, K] as boxes [BLOCK_N / 2, BLOCK_K]; w_scale [slots, 2 N / 128, K / 128];
    h [n_rows, N], h_scale [N / 128, n_rows]. N is the intermediate size, n_rows the padded rows.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    n_columns = tl.cdiv(N, HALF)
    n_blocks = tl.load(used_ptr)
    n_steps = tl.cdiv(K, BLOCK_K)
    lanes = tl.arange(0, BLOCK_M)
    depth = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), n_blocks * n_columns, tl.num_programs(0), flatten=JOINED):
        block, column = _place(tile, n_blocks, n_columns, GROUP_M)
        expert = tl.load(expert_ptr + block)
        pairs = tl.load(sorted_ptr + block * BLOCK_M + lanes)
        here = pairs < n_pairs
        token = (pairs // top_k).to(tl.int64)
        x_ptrs = x_ptr + token[:, None] * K + depth[None, :]
        gate_row = expert * (2 * N) + column * HALF
        if JOINED:
            both = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        elif SWAP:
            gate = tl.zeros((HALF, BLOCK_M), tl.float32)
            up = tl.zeros((HALF, BLOCK_M), tl.float32)
        else:
            gate = tl.zeros((BLOCK_M, HALF), tl.float32)
            up = tl.zeros((BLOCK_M, HALF), tl.float32)
        if FP8:
            x_scales = x_scale_ptr + token * n_steps
            gate_scales = w_scale_ptr + (gate_row // 128).to(tl.int64) * n_steps
            up_scales = gate_scales + (N // 128).to(tl.int64) * n_steps
            x_scale = tl.load(x_scales, mask=here, other=0.0)
            gate_scale = tl.load(gate_scales)
            up_scale = tl.load(up_scales)
        for step in tl.range(0, n_steps):
            k = step * BLOCK_K
            if EVEN_K:
                x = tl.load(x_ptrs + k, mask=here[:, None], other=0.0)
            else:
                x = tl.load(x_ptrs + k, mask=here[:, None] & (depth[None, :] < K - k), other=0.0)
            if JOINED:
                w = w_desc.load([expert, 0, column * HALF, k]).reshape(BLOCK_N, BLOCK_K)
                both = tl.dot(x, w.T, both)
            else:
                w_gate = w_desc.load([gate_row, k])
                w_up = w_desc.load([gate_row + N, k])
                if FP8:
                    ahead = tl.minimum(step + 1, n_steps - 1)
                    next_x_scale = tl.load(x_scales + ahead, mask=here, other=0.0)
                    next_gate_scale = tl.load(gate_scales + ahead)
                    next_up_scale = tl.load(up_scales + ahead)
                    if SWAP:
                        gate += tl.dot(w_gate, x.T) * (x_scale * gate_scale)[None, :]
                        up += tl.dot(w_up, x.T) * (x_scale * up_scale)[None, :]
                    else:
                        gate += tl.dot(x, w_gate.T) * (x_scale * gate_scale)[:, None]
                        up += tl.dot(x, w_up.T) * (x_scale * up_scale)[:, None]
                    x_scale = next_x_scale
                    gate_scale = next_gate_scale
                    up_scale = next_up_scale
                elif SWAP:
                    gate = tl.dot(w_gate, x.T, gate)
                    up = tl.dot(w_up, x.T, up)
                else:
                    gate = tl.dot(x, w_gate.T, gate)
                    up = tl.dot(x, w_up.T, up)
        if JOINED:
            gate, up = both.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        h = gate * tl.sigmoid(gate) * up
        if FP8:
            h_scale = row_scale(tl.max(tl.abs(h), 0 if SWAP else 1))
            tl.store(h_scale_ptr + column * n_rows + block * BLOCK_M + lanes, h_scale)
            if SWAP:
                h = h * (1.0 / h_scale)[None, :]
            else:
                h = h * (1.0 / h_scale)[:, None]
        if SWAP:
            h = h.T
        h_desc.store([block * BLOCK_M, column * HALF], h.to(h_desc.dtype))


@triton.jit(do_not_specialize=["n_pairs"])
def down_kernel(
    h_desc, h_scale_ptr, w_desc, w_scale_ptr, weight_ptr, out_ptr,
    sorted_ptr, expert_ptr, used_ptr, n_pairs, n_rows, K, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, SWAP: tl.constexpr, EVEN_N: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Write router weight * (h Wd^T) of every pair that is here.

    h [n_rows, K] in sorted order, h_scale [K / 128, n_rows], w [slots * N, K], w_scale [slots, N / 128, K / 128],
    weight [n_pairs], out [n_pairs, N] in pair order. N is the hidden size, K the intermediate one.
    """
    n_columns = tl.cdiv(N, BLOCK_N)
    n_blocks = tl.load(used_ptr)
    n_steps = tl.cdiv(K, BLOCK_K)
    lanes = tl.arange(0, BLOCK_M)
    for tile in tl.range(tl.program_id(0), n_blocks * n_columns, tl.num_programs(0), flatten=True):
        block, column = _place(tile, n_blocks, n_columns, GROUP_M)
        expert = tl.load(expert_ptr + block)
        row = block * BLOCK_M
        w_row = expert * N + column * BLOCK_N
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, n_steps):
            h = h_desc.load([row, step * BLOCK_K])
            w = w_desc.load([w_row, step * BLOCK_K])
            if FP8:
                scale = tl.load(h_scale_ptr + step * n_rows + row + lanes)
                scale *= tl.load(w_scale_ptr + (w_row // 128).to(tl.int64) * n_steps + step)
                if SWAP:
                    acc += tl.dot(w, h.T) * scale[None, :]
                else:
                    acc += tl.dot(h, w.T) * scale[:, None]
            elif SWAP:
                acc = tl.dot(w, h.T, acc)
            else:
                acc = tl.dot(h, w.T, acc)
        pairs = tl.load(sorted_ptr + row + lanes)
        here = pairs < n_pairs
        weight = tl.load(weight_ptr + pairs, mask=here, other=0.0).to(tl.float32)
        if SWAP:
            acc = acc.T
        y = (acc * weight[:, None]).to(out_ptr.dtype.element_ty)
        columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
        if EVEN_N:
            tl.store(out_ptrs, y, mask=here[:, None])
        else:
            tl.store(out_ptrs, y, mask=here[:, None] & (columns < N)[None, :])


# ---------------------------------------------------------------- wrappers


def up_swiglu(
    x: Tensor,
    w_up: Tensor,
    tokens: SortedTokens,
    *,
    tile: Tile,
    top_k: int,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """First product and activation: silu(x Wg^T) * (x Wu^T), in sorted order.

    Parameters
    ----------
    x : (T, H)
        Tokens in bfloat16, float16 or float8_e4m3fn.
    w_up : (slots, 2 I, H)
        Gate rows, then up rows, of each expert slot; the type of `x`.
    tokens
        What `permute.sort_by_expert` gave with ``tile.block_m``.
    tile
        `block_n` counts rows of `w_up`, half of them gate rows.
    top_k
        Experts a token.
    x_scale : (T, H / 128)
        float32, for fp8.
    w_scale : (slots, 2 I / 128, H / 128)
        float32, for fp8.
    out : (n_rows, I)
        Where to write; made if absent.
    out_scale : (I / 128, n_rows)
        float32, for fp8: one scale a group of 128 columns, groups first. Made if absent.

    Returns
    -------
    (n_rows, I) of the type of `x`, and its scales for fp8. Rows of padding within a used block are zero; blocks
    that are not used are not written.

    Raises
    ------
    KernelError
        If shapes, types or the tile do not fit together.
    """
    fp8 = x.dtype is torch.float8_e4m3fn
    n_slots, two_inner, hidden = _check_operands("x", x, w_up, tile, "up")
    inner = two_inner // 2
    n_rows = _check_sorted(tokens, tile, x.shape[0] * top_k)
    _check_aligned(x, hidden, inner)
    h = buffer(out, (n_rows, inner), x.dtype, x, "out")
    h_scale = None
    if fp8:
        n_groups = (hidden // SCALE_GROUP, inner // SCALE_GROUP)
        _check_scale("x_scale", x_scale, (x.shape[0], n_groups[0]), x)
        _check_scale("w_scale", w_scale, (n_slots, 2 * n_groups[1], n_groups[0]), x)
        h_scale = buffer(out_scale, (n_groups[1], n_rows), torch.float32, x, "out_scale")
    if n_rows == 0:
        return h, h_scale
    swap = tile.transposed
    joined = not (swap or fp8)
    half = tile.block_n // 2
    weights = (
        TensorDescriptor.from_tensor(w_up.view(n_slots, 2, inner, hidden), [1, 2, half, tile.block_k])
        if joined
        else TensorDescriptor.from_tensor(w_up.view(n_slots * two_inner, hidden), [half, tile.block_k])
    )
    _launch(
        up_kernel, tile, n_rows, triton.cdiv(inner, half), x.device,
        x, x_scale if fp8 else x, weights, w_scale if fp8 else x,
        TensorDescriptor.from_tensor(h, [tile.block_m, half]), h_scale if fp8 else x,
        tokens.sorted_pairs, tokens.block_expert, tokens.n_blocks_used,
        x.shape[0] * top_k, top_k, n_rows, hidden, inner,
        SWAP=swap, JOINED=joined, EVEN_K=hidden % tile.block_k == 0, FP8=fp8,
    )  # fmt: skip
    return h, h_scale


def down_combine(
    h: Tensor,
    w_down: Tensor,
    tokens: SortedTokens,
    router_weights: Tensor,
    *,
    tile: Tile,
    h_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Second product, weighted, in pair order; `combine` sums a token's pairs.

    Parameters
    ----------
    h : (n_rows, I)
        What `up_swiglu` gave.
    w_down : (slots, H, I)
        Weights, the type of `h`.
    tokens
        The same as for `up_swiglu`.
    router_weights : (T, top_k)
        Weight of each pair, any float type.
    tile
        Its `block_m` is that of the sort.
    h_scale : (I / 128, n_rows)
        For fp8, what `up_swiglu` gave.
    w_scale : (slots, H / 128, I / 128)
        float32, for fp8.
    out : (T * top_k, H)
        Where to write; made if absent, in bfloat16 for fp8 and the type of `h` otherwise.

    Returns
    -------
    (T * top_k, H). Rows of pairs that are not here are not written.

    Raises
    ------
    KernelError
        If shapes, types or the tile do not fit together.
    """
    fp8 = h.dtype is torch.float8_e4m3fn
    n_slots, hidden, inner = _check_operands("h", h, w_down, tile, "down")
    n_pairs = router_weights.numel()
    n_rows = _check_sorted(tokens, tile, n_pairs)
    _check_aligned(h, hidden, inner)
    if h.shape[0] != n_rows:
        raise KernelError("h has one row for each sorted place", value=(h.shape[0], n_rows))
    if not router_weights.is_contiguous():
        raise KernelError("router_weights [T, top_k] is contiguous")
    if fp8:
        groups = inner // SCALE_GROUP
        _check_scale("h_scale", h_scale, (groups, n_rows), h)
        _check_scale("w_scale", w_scale, (n_slots, hidden // SCALE_GROUP, groups), h)
    rows = buffer(out, (n_pairs, hidden), torch.bfloat16 if fp8 and out is None else None, h, "out")
    if n_rows == 0:
        return rows
    weights = TensorDescriptor.from_tensor(w_down.view(n_slots * hidden, inner), [tile.block_n, tile.block_k])
    _launch(
        down_kernel, tile, n_rows, triton.cdiv(hidden, tile.block_n), h.device,
        TensorDescriptor.from_tensor(h, [tile.block_m, tile.block_k]), h_scale if fp8 else h,
        weights, w_scale if fp8 else h, router_weights, rows,
        tokens.sorted_pairs, tokens.block_expert, tokens.n_blocks_used,
        n_pairs, n_rows, inner, hidden,
        SWAP=tile.transposed, EVEN_N=hidden % tile.block_n == 0, FP8=fp8,
    )  # fmt: skip
    return rows


# ---------------------------------------------------------------- checks


def _launch(
    kernel: Any,
    tile: Tile,
    n_rows: int,
    n_columns: int,
    device: torch.device,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Start as many programs as stay resident, or one a tile where there are fewer tiles."""
    n_programs = min(n_rows // tile.block_m * n_columns, _n_sms(device) * tile.programs_per_sm)
    try:
        kernel[(n_programs,)](
            *arguments, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
            **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    except OutOfResources as error:
        raise KernelError(f"this GPU cannot run the tile: {error}", value=tile) from error


def _n_sms(device: torch.device) -> int:
    """Multiprocessors of the GPU; two where the interpreter plays one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _check_operands(name: str, rows: Tensor, w: Tensor, tile: Tile, product: Product) -> tuple[int, int, int]:
    """Shape of the weight: (slots, rows, depth)."""
    if rows.dtype not in _DTYPES or w.dtype is not rows.dtype:
        raise KernelError(
            f"{name} and its weight are both bfloat16, float16 or float8_e4m3fn", value=(rows.dtype, w.dtype)
        )
    if rows.dim() != 2 or w.dim() != 3 or rows.shape[1] != w.shape[2] or (product == "up" and w.shape[1] % 2):
        raise KernelError(
            f"{name} is [rows, K] and its weight [slots, N, K]", value=(tuple(rows.shape), tuple(w.shape))
        )
    if not (rows.is_contiguous() and w.is_contiguous() and rows.device == w.device):
        raise KernelError(f"{name} and its weight are contiguous, on one device")
    check_tile(tile, product=product, fp8=rows.dtype is torch.float8_e4m3fn)
    return w.shape[0], w.shape[1], w.shape[2]


def _check_aligned(rows: Tensor, hidden: int, inner: int) -> None:
    """Refuse sizes whose rows do not start where the copy engine and 16-byte loads can reach them."""
    multiple = SCALE_GROUP if rows.dtype is torch.float8_e4m3fn else _ALIGNED
    if hidden % multiple or inner % multiple or not hidden or not inner:
        raise KernelError(
            f"hidden and intermediate sizes are multiples of {multiple} in {rows.dtype}",
            value=(hidden, inner),
        )


def _check_sorted(tokens: SortedTokens, tile: Tile, n_pairs: int) -> int:
    """Rows of the sorted order."""
    n_rows = tokens.sorted_pairs.numel()
    if n_rows != tokens.block_expert.numel() * tile.block_m:
        raise KernelError(
            "pairs are sorted with the tile's block_m",
            value=(n_rows, tokens.block_expert.numel(), tile.block_m),
        )
    if tokens.pair_row.numel() != n_pairs:
        raise KernelError("the pairs sorted are T * top_k", value=(tokens.pair_row.numel(), n_pairs))
    return n_rows


def _check_scale(name: str, scale: Tensor | None, shape: tuple[int, ...], beside: Tensor) -> None:
    if scale is None:
        raise KernelError(f"fp8 needs {name}", fix="quantise_rows(...) gives rows and scales")
    if tuple(scale.shape) != shape or scale.dtype is not torch.float32 or not scale.is_contiguous():
        raise KernelError(
            f"{name} is contiguous float32 {list(shape)}", value=(tuple(scale.shape), scale.dtype)
        )
    if scale.device != beside.device:
        raise KernelError(f"{name} is on {beside.device}", value=str(scale.device))
