"""Row by row: quantise tokens to fp8 before the products, and sum each token's pairs after them.

::

    quantise_rows:  scale[t, g] = max over group g of |x[t]| / 448;  q = round(x / scale)      g: 128 columns
    combine:        y[t] = sum over j of rows[t * top_k + j]                                   in order of j

Both are bound by memory: 16 bytes a thread and access, each input read once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Inside a kernel stand values of Triton's own language, which have no Python types.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibrate.kernels import KernelError
from calibrate.kernels.permute import SortedTokens
from calibrate.kernels.tiles import SCALE_GROUP

__all__ = [
    "SCALE_GROUP",
    "buffer",
    "combine",
    "combine_kernel",
    "quantise_kernel",
    "quantise_rows",
    "row_scale",
]


@triton.jit
def row_scale(largest):
    """Scale that takes the `largest` magnitude of a group to e4m3's largest value."""
    # A number here, not a global: by a global of a called function Triton keys its caller by what ran before it.
    return tl.maximum(largest, 1e-10) / 448.0


@triton.jit
def quantise_kernel(x_ptr, q_ptr, scale_ptr, K, GROUPS: tl.constexpr):
    """Program (row, GROUPS groups of 128): x [T, K] -> q [T, K], scale [T, K / 128]."""
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    scale = row_scale(tl.max(tl.abs(x), 1))
    tl.store(q_ptr + row * K + columns, (x / scale[:, None]).to(q_ptr.dtype.element_ty), mask=columns < K)
    tl.store(scale_ptr + row * (K // 128) + groups, scale, mask=groups < K // 128)


@triton.jit
def combine_kernel(rows_ptr, pair_row_ptr, out_ptr, H, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program (token, columns): rows [T * TOP_K, H] -> out [T, H]; pairs that are not here add nothing."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        here = tl.load(pair_row_ptr + pair) >= 0
        total += tl.load(rows_ptr + pair * H + columns, mask=here & (columns < H), other=0.0).to(tl.float32)
    tl.store(out_ptr + token * H + columns, total.to(out_ptr.dtype.element_ty), mask=columns < H)


def combine(rows: Tensor, tokens: SortedTokens, *, top_k: int, out: Tensor | None = None) -> Tensor:
    """Sum each token's pairs in order: rows [T * top_k, H] -> [T, H].

    Pairs that `tokens` has no row for (experts elsewhere, dropped pairs) add nothing, whatever `rows` holds there.

    Raises
    ------
    KernelError
        If the rows are not `top_k` a token, or not those of `tokens`.
    """
    n_pairs, hidden = rows.shape
    if n_pairs % top_k or tokens.pair_row.numel() != n_pairs:
        raise KernelError("rows are the T * top_k pairs that were sorted", value=(n_pairs, top_k))
    y = buffer(out, (n_pairs // top_k, hidden), None, rows, "out")
    block = min(1024, triton.next_power_of_2(hidden))
    if n_pairs:
        combine_kernel[(n_pairs // top_k, triton.cdiv(hidden, block))](
            rows, tokens.pair_row, y, hidden, TOP_K=top_k, BLOCK=block, num_warps=4
        )
    return y


def quantise_rows(
    x: Tensor, *, out: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantise rows to e4m3 with one scale a group of 128: x [T, K] -> ([T, K], float32 [T, K / 128]).

    Raises
    ------
    KernelError
        If K is no multiple of 128.
    """
    n_rows, width = x.shape
    if width % SCALE_GROUP or not x.is_contiguous():
        raise KernelError("x is contiguous and its width a multiple of 128", value=tuple(x.shape))
    q = buffer(out, (n_rows, width), torch.float8_e4m3fn, x, "out")
    scales = buffer(scale, (n_rows, width // SCALE_GROUP), torch.float32, x, "scale")
    groups = min(8, triton.next_power_of_2(width // SCALE_GROUP))
    if n_rows:
        quantise_kernel[(n_rows, triton.cdiv(width, SCALE_GROUP * groups))](
            x, q, scales, width, GROUPS=groups, num_warps=4
        )
    return q, scales


def buffer(
    given: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype | None, beside: Tensor, name: str
) -> Tensor:
    """What the caller gave to write to, or a new tensor beside another."""
    if given is None:
        return torch.empty(shape, dtype=dtype or beside.dtype, device=beside.device)
    right = dtype is None or given.dtype is dtype
    if tuple(given.shape) != shape or not given.is_contiguous() or given.device != beside.device or not right:
        raise KernelError(f"{name} is contiguous {list(shape)}", value=(tuple(given.shape), given.dtype))
    return given
