"""Sort pairs by expert, and move rows into that order and back.

::

    for each pair p:            slot[p] = expert_map[expert_ids[p]]
    for each slot e:            count[e] = number of pairs with slot e
                                start[e] = sum over e' < e of ceil(count[e'] / block_m) * block_m
    for each pair p:            rank[p] = number of pairs q < p with slot[q] == slot[p]
                                sorted_pairs[start[slot[p]] + rank[p]] = p

Up to `ONE_PROGRAM` pairs (a decode step) one program does all of it. Beyond, the pairs are cut into chunks: one
kernel counts the slots of every chunk, one sums the counts over the chunks before, one places the pairs. A rank
is a place in a sorted chunk plus the count of the chunks before; none is handed out by an atomic, so the same
input gives the same bits, and pairs of one expert keep the order of their tokens. No size depends on the data: a
CUDA graph can hold every launch.
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

__all__ = ["ONE_PROGRAM", "SortedTokens", "gather_rows", "sort_by_expert", "unpermute", "upper_bound_blocks"]

ONE_PROGRAM = 2048
"""Most pairs that one program sorts."""
CHUNK = 1024
"""Pairs of one program beyond that."""
_MAX_SLOTS = 4096
_ROW_TILE = 1024


class SortedTokens(NamedTuple):
    """Pairs ``p = t * top_k + j`` in expert order, each expert's padded to whole blocks of `block_m` rows."""

    sorted_pairs: Tensor
    """int32 [upper_bound_blocks * block_m]: the pair of each row; ``T * top_k`` where the row is padding."""
    block_expert: Tensor
    """int32 [upper_bound_blocks]: the slot of each block of rows; -1 where the block is not used."""
    n_blocks_used: Tensor
    """int32 [1], on the device: blocks that hold a pair. They come first."""
    pairs_per_expert: Tensor
    """int32 [n_slots]."""
    pair_row: Tensor
    """int32 [T * top_k]: the row of each pair, the inverse of `sorted_pairs`; -1 where its expert is not here."""


def upper_bound_blocks(n_pairs: int, n_slots: int, block_m: int) -> int:
    """Most blocks that `n_pairs` pairs can fill, whatever their experts; known without asking the device.

    An expert with c pairs fills ``ceil(c / block_m) <= (c + block_m - 1) / block_m`` blocks, and at most
    ``min(n_slots, n_pairs)`` experts have pairs.
    """
    return (n_pairs + min(n_slots, n_pairs) * (block_m - 1)) // block_m


# ---------------------------------------------------------------- sorting


@triton.jit
def _slots(ids_ptr, map_ptr, pairs, n_pairs, n_experts, n_slots, HAS_MAP: tl.constexpr):
    """Slot of each of the `pairs`; -1 beyond `n_pairs`, for an absent expert and for an id that is none."""
    expert = tl.load(ids_ptr + pairs, mask=pairs < n_pairs, other=-1).to(tl.int32)
    here = (expert >= 0) & (expert < n_experts)
    slot = expert
    if HAS_MAP:
        slot = tl.load(map_ptr + expert, mask=here, other=-1).to(tl.int32)
        here = here & (slot >= 0) & (slot < n_slots)
    return tl.where(here, slot, -1)


@triton.jit
def _by_slot(
    ids_ptr, map_ptr, first, n_pairs, n_experts, n_slots,
    HAS_MAP: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Chunk [first, first + N) in the order of its slots: slot [N], pair [N], rank [N], count [SLOTS].

    Slot and pair are packed into one key, so that no two keys are equal and any sort is a stable one. The rank
    of a pair is its place less that of its slot's first. Pairs that go nowhere have the slot SLOTS - 1.
    """
    place = tl.arange(0, N)
    slot = _slots(ids_ptr, map_ptr, first + place, n_pairs, n_experts, n_slots, HAS_MAP)
    slot = tl.where(slot >= 0, slot, SLOTS - 1)
    count = tl.histogram(slot, SLOTS)
    begin = tl.cumsum(count, axis=0) - count
    key = tl.sort(slot * N + place)
    slot = key // N
    return slot, first + key % N, place - tl.gather(begin, slot, axis=0), count


@triton.jit
def _place(
    pairs, slot, rank, start, sorted_ptr, block_ptr, row_ptr, n_pairs, n_slots, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Write the [N] `pairs` to their rows; the first pair of a block names the block's slot."""
    here = slot < n_slots
    row = tl.gather(start, slot, axis=0) + rank
    tl.store(sorted_ptr + row, pairs, mask=here)
    tl.store(block_ptr + row // BLOCK_M, slot, mask=here & (rank % BLOCK_M == 0))
    tl.store(row_ptr + pairs, tl.where(here, row, -1), mask=pairs < n_pairs)


@triton.jit(do_not_specialize=["n_pairs", "n_experts", "n_slots", "n_blocks"])
def _sort_small_kernel(
    ids_ptr, map_ptr, sorted_ptr, block_ptr, used_ptr, count_ptr, row_ptr,
    n_pairs, n_experts, n_slots, n_blocks,
    HAS_MAP: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """One program, all pairs: ids [n_pairs] -> rows [n_blocks * BLOCK_M]; N >= n_pairs, SLOTS > n_slots."""
    slot, pairs, rank, count = _by_slot(ids_ptr, map_ptr, 0, n_pairs, n_experts, n_slots, HAS_MAP, N, SLOTS)
    slots = tl.arange(0, SLOTS)
    count = tl.where(slots < n_slots, count, 0)
    padded = (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    start = tl.cumsum(padded, axis=0) - padded
    used = tl.sum(padded, axis=0)
    _place(pairs, slot, rank, start, sorted_ptr, block_ptr, row_ptr, n_pairs, n_slots, BLOCK_M)
    tl.store(count_ptr + slots, count, mask=slots < n_slots)
    tl.store(used_ptr, used // BLOCK_M)
    # Padding inside the used blocks, then all that is behind them: no row is written twice, so no barrier.
    for begin in range(0, BLOCK_M, 8):
        row = count[None, :] + begin + tl.arange(0, 8)[:, None]
        tl.store(sorted_ptr + start[None, :] + row, n_pairs, mask=row < padded[None, :])
    for begin in range(used, n_blocks * BLOCK_M, FILL):
        row = begin + tl.arange(0, FILL)
        tl.store(sorted_ptr + row, n_pairs, mask=row < n_blocks * BLOCK_M)
    for begin in range(used // BLOCK_M, n_blocks, FILL):
        block = begin + tl.arange(0, FILL)
        tl.store(block_ptr + block, -1, mask=block < n_blocks)


@triton.jit(do_not_specialize=["n_pairs", "n_experts", "n_slots", "n_chunks", "n_blocks"])
def _count_kernel(
    ids_ptr, map_ptr, chunk_count_ptr, sorted_ptr, block_ptr, n_pairs, n_experts, n_slots, n_chunks, n_blocks,
    HAS_MAP: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program c: counts of chunk c into chunk_count [n_chunks, n_slots]; rows [c N, (c + 1) N) made padding."""
    chunk = tl.program_id(0)
    at = chunk * N + tl.arange(0, N)
    tl.store(sorted_ptr + at, n_pairs, mask=at < n_blocks * BLOCK_M)
    tl.store(block_ptr + at, -1, mask=at < n_blocks)
    if chunk < n_chunks:
        slot = _slots(ids_ptr, map_ptr, at, n_pairs, n_experts, n_slots, HAS_MAP)
        count = tl.histogram(tl.where(slot >= 0, slot, SLOTS - 1), SLOTS)
        slots = tl.arange(0, SLOTS)
        tl.store(chunk_count_ptr + chunk * n_slots + slots, count, mask=slots < n_slots)


@triton.jit(do_not_specialize=["n_slots", "n_chunks"])
def _scan_kernel(
    chunk_count_ptr, count_ptr, n_slots, n_chunks, CHUNKS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Program i, slots [i WIDTH, (i + 1) WIDTH): counts become sums over the chunks before; totals [n_slots]."""
    slots = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), dtype=tl.int32)
    for begin in range(0, n_chunks, CHUNKS):
        chunks = begin + tl.arange(0, CHUNKS)
        at = chunk_count_ptr + chunks[:, None] * n_slots + slots[None, :]
        mask = (chunks[:, None] < n_chunks) & (slots[None, :] < n_slots)
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, tl.cumsum(count, axis=0) - count + total[None, :], mask=mask)
        total += tl.sum(count, axis=0)
    tl.store(count_ptr + slots, total, mask=slots < n_slots)


@triton.jit(do_not_specialize=["n_pairs", "n_experts", "n_slots"])
def _scatter_kernel(
    ids_ptr, map_ptr, chunk_start_ptr, count_ptr, sorted_ptr, block_ptr, used_ptr, row_ptr,
    n_pairs, n_experts, n_slots,
    HAS_MAP: tl.constexpr, N: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Program c: place the pairs of chunk c behind those of the chunks before."""
    chunk = tl.program_id(0)
    slots = tl.arange(0, SLOTS)
    count = tl.load(count_ptr + slots, mask=slots < n_slots, other=0)
    before = tl.load(chunk_start_ptr + chunk * n_slots + slots, mask=slots < n_slots, other=0)
    padded = (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    start = tl.cumsum(padded, axis=0) - padded
    if chunk == 0:
        tl.store(used_ptr, tl.sum(padded, axis=0) // BLOCK_M)
    slot, pairs, rank, _ = _by_slot(
        ids_ptr, map_ptr, chunk * N, n_pairs, n_experts, n_slots, HAS_MAP, N, SLOTS
    )
    rank += tl.gather(before, slot, axis=0)
    _place(pairs, slot, rank, start, sorted_ptr, block_ptr, row_ptr, n_pairs, n_slots, BLOCK_M)


def sort_by_expert(
    expert_ids: Tensor,
    n_experts: int,
    block_m: int,
    expert_map: Tensor | None = None,
    *,
    n_slots: int | None = None,
) -> SortedTokens:
    """Sort pairs by expert, each expert's padded to whole blocks.

    Parameters
    ----------
    expert_ids : (T, top_k), int32 or int64
        Experts of each token. An id outside [0, n_experts) is a pair that goes nowhere: it is left out.
    n_experts
        Experts of the layer, on all ranks.
    block_m
        Rows of a block, a power of two.
    expert_map : (n_experts,), int32 or int64
        Slot of each expert on this rank, -1 where it is elsewhere; without it every expert is here.
    n_slots
        Slots on this rank (default: `n_experts`); fewer make the upper bounds smaller.

    Returns
    -------
    SortedTokens
        On the device of `expert_ids`; its sizes depend on the arguments' shapes only.

    Raises
    ------
    KernelError
        If an argument has a shape, type or value that the kernels do not take.
    """
    n_slots = n_experts if n_slots is None else n_slots
    _check_sort(expert_ids, n_experts, block_m, expert_map, n_slots)
    n_pairs = expert_ids.numel()
    n_blocks = upper_bound_blocks(n_pairs, n_slots, block_m)
    out = SortedTokens(
        *(
            torch.empty(size, dtype=torch.int32, device=expert_ids.device)
            for size in (n_blocks * block_m, n_blocks, 1, n_slots, n_pairs)
        )
    )
    if n_pairs == 0:
        out.n_blocks_used.zero_()
        out.pairs_per_expert.zero_()
    elif n_pairs <= ONE_PROGRAM:
        _sort_small(expert_ids, expert_map, out, n_experts, block_m)
    else:
        _sort_large(expert_ids, expert_map, out, n_experts, block_m)
    return out


def _sort_small(
    ids: Tensor, expert_map: Tensor | None, out: SortedTokens, n_experts: int, block_m: int
) -> None:
    n_pairs, n_slots = ids.numel(), out.pairs_per_expert.numel()
    size, slots = min(ONE_PROGRAM, _power_of_4(n_pairs)), _padded_slots(n_slots)
    _sort_small_kernel[(1,)](
        ids, ids if expert_map is None else expert_map, out.sorted_pairs, out.block_expert,
        out.n_blocks_used, out.pairs_per_expert, out.pair_row,
        n_pairs, n_experts, n_slots, out.block_expert.numel(),
        HAS_MAP=expert_map is not None, N=size, SLOTS=slots,
        BLOCK_M=block_m, FILL=1024, num_warps=_warps(size, slots),
    )  # fmt: skip


def _sort_large(
    ids: Tensor, expert_map: Tensor | None, out: SortedTokens, n_experts: int, block_m: int
) -> None:
    n_pairs, n_slots, n_blocks = ids.numel(), out.pairs_per_expert.numel(), out.block_expert.numel()
    n_chunks = triton.cdiv(n_pairs, CHUNK)
    slots, width = _padded_slots(n_slots), 8
    mapped = ids if expert_map is None else expert_map
    chunk_count = torch.empty((n_chunks, n_slots), dtype=torch.int32, device=ids.device)
    _count_kernel[(triton.cdiv(max(n_pairs, n_blocks * block_m), CHUNK),)](
        ids, mapped, chunk_count, out.sorted_pairs, out.block_expert,
        n_pairs, n_experts, n_slots, n_chunks, n_blocks,
        HAS_MAP=expert_map is not None, N=CHUNK, SLOTS=slots, BLOCK_M=block_m, num_warps=_warps(CHUNK, slots),
    )  # fmt: skip
    _scan_kernel[(triton.cdiv(n_slots, width),)](
        chunk_count, out.pairs_per_expert, n_slots, n_chunks,
        CHUNKS=min(256, _power_of_4(n_chunks)), WIDTH=width, num_warps=4,
    )  # fmt: skip
    _scatter_kernel[(n_chunks,)](
        ids, mapped, chunk_count, out.pairs_per_expert, out.sorted_pairs, out.block_expert, out.n_blocks_used,
        out.pair_row, n_pairs, n_experts, n_slots,
        HAS_MAP=expert_map is not None, N=CHUNK, SLOTS=slots, BLOCK_M=block_m, num_warps=_warps(CHUNK, slots),
    )  # fmt: skip


def _warps(n_keys: int, n_bins: int) -> int:
    """Two keys or bins a thread where there are many: the sort's shuffles are waited for, and many bins spill."""
    return min(16, max(4, max(n_keys, n_bins) // 64))


def _padded_slots(n_slots: int) -> int:
    """A power of two above `n_slots`: the last bin of a histogram holds the pairs that go nowhere."""
    return int(max(64, triton.next_power_of_2(n_slots + 1)))


def _power_of_4(n: int) -> int:
    """Size of a program's arrays, 16 or more, in coarse steps: each is compiled, which takes a second."""
    return int(max(16, 1 << 2 * ((n - 1).bit_length() + 1 >> 1)))


def _check_sort(ids: Tensor, n_experts: int, block_m: int, expert_map: Tensor | None, n_slots: int) -> None:
    if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64) or not ids.is_contiguous():
        raise KernelError(
            "expert_ids is a contiguous int32 or int64 tensor [T, top_k]", value=(tuple(ids.shape), ids.dtype)
        )
    if n_experts < 1 or not 1 <= n_slots < _MAX_SLOTS:
        raise KernelError(
            f"at least one expert, and 1 to {_MAX_SLOTS - 1} slots a rank", value=(n_experts, n_slots)
        )
    if block_m < 1 or block_m & (block_m - 1):
        raise KernelError("block_m is a power of two", value=block_m, fix="16, 32, 64 or 128")
    if ids.numel() + n_slots * block_m >= 2**31:
        raise KernelError("rows are counted in 32 bits", value=ids.numel(), fix="split the batch")
    if expert_map is None:
        return
    if expert_map.shape != (n_experts,) or expert_map.dtype not in (torch.int32, torch.int64):
        raise KernelError(
            "expert_map is int32 or int64 [n_experts]", value=(tuple(expert_map.shape), expert_map.dtype)
        )
    if expert_map.device != ids.device or not expert_map.is_contiguous():
        raise KernelError("expert_map is contiguous, beside expert_ids", value=str(expert_map.device))


# ---------------------------------------------------------------- moving rows


@triton.jit(do_not_specialize=["n_pairs"])
def _gather_rows_kernel(
    x_ptr, row_pair_ptr, out_ptr, n_pairs, hidden, TOP_K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Program (row, tile): x [T, hidden], row_pair [n_rows] -> out [n_rows, hidden]; padding becomes zero."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    pair = tl.load(row_pair_ptr + row)
    token = (pair // TOP_K).to(tl.int64)
    inside = columns < hidden
    values = tl.load(x_ptr + token * hidden + columns, mask=inside & (pair < n_pairs), other=0.0)
    tl.store(out_ptr + row * hidden + columns, values, mask=inside)


@triton.jit
def _unpermute_kernel(
    rows_ptr, pair_row_ptr, weights_ptr, out_ptr, hidden, TOP_K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Program (token, tile): rows [n_rows, hidden], pair_row and weights [T, TOP_K] -> out [T, hidden]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = columns < hidden
    total = tl.zeros((TILE,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(pair_row_ptr + token * TOP_K + j).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + j).to(tl.float32)
        values = tl.load(rows_ptr + row * hidden + columns, mask=inside & (row >= 0), other=0.0)
        total += weight * values.to(tl.float32)
    tl.store(out_ptr + token * hidden + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def gather_rows(x: Tensor, row_pair: Tensor, top_k: int) -> Tensor:
    """Copy tokens into the order of their experts.

    ::

        out[i] = x[row_pair[i] // top_k], or 0 where row_pair[i] is padding

    Parameters
    ----------
    x : (T, H)
        Tokens of any type.
    row_pair : (n_rows,), int32
        The pair of each row, as in `SortedTokens.sorted_pairs`; ``T * top_k`` where the row is padding.
    top_k
        Pairs of a token.

    Returns
    -------
    Tensor
        [n_rows, H], of the type of `x`.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise KernelError("x is a contiguous tensor [T, H]", value=tuple(x.shape))
    if row_pair.dim() != 1 or row_pair.dtype != torch.int32:
        raise KernelError("row_pair is int32 [n_rows]", value=(tuple(row_pair.shape), row_pair.dtype))
    if top_k < 1:
        raise KernelError("top_k is at least 1", value=top_k)
    n_rows, hidden = row_pair.numel(), x.shape[1]
    out = torch.empty((n_rows, hidden), dtype=x.dtype, device=x.device)
    if n_rows:
        tile = min(_ROW_TILE, triton.next_power_of_2(hidden))
        _gather_rows_kernel[(n_rows, triton.cdiv(hidden, tile))](
            x, row_pair, out, x.shape[0] * top_k, hidden, TOP_K=top_k, TILE=tile, num_warps=4
        )
    return out


def unpermute(rows: Tensor, pair_row: Tensor, router_weights: Tensor) -> Tensor:
    """Bring experts' outputs back to their tokens and add them up.

    ::

        out[t] = sum over j of router_weights[t, j] * rows[pair_row[t * top_k + j]], in float32, j ascending

    Parameters
    ----------
    rows : (n_rows, H)
        Outputs in expert order, not yet weighted.
    pair_row : (T * top_k,), int32
        The row of each pair, as in `SortedTokens.pair_row`; a pair without one (-1) adds nothing.
    router_weights : (T, top_k)
        Weights.

    Returns
    -------
    Tensor
        [T, H], of the type of `rows`.
    """
    if rows.dim() != 2 or not rows.is_contiguous():
        raise KernelError("rows is a contiguous tensor [n_rows, H]", value=tuple(rows.shape))
    if router_weights.dim() != 2 or not router_weights.is_contiguous():
        raise KernelError(
            "router_weights is a contiguous tensor [T, top_k]", value=tuple(router_weights.shape)
        )
    if pair_row.shape != (router_weights.numel(),) or pair_row.dtype != torch.int32:
        raise KernelError("pair_row is int32 [T * top_k]", value=(tuple(pair_row.shape), pair_row.dtype))
    n_tokens, top_k = router_weights.shape
    out = torch.empty((n_tokens, rows.shape[1]), dtype=rows.dtype, device=rows.device)
    if out.numel():
        tile = min(_ROW_TILE, triton.next_power_of_2(rows.shape[1]))
        _unpermute_kernel[(n_tokens, triton.cdiv(rows.shape[1], tile))](
            rows, pair_row, router_weights, out, rows.shape[1], TOP_K=top_k, TILE=tile, num_warps=4
        )
    return out
