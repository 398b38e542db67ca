"""Choose experts: logits, softmax or sigmoid, group limit, top-k and normalisation in two kernels.

::

    logits[t, e] = sum over h of x[t, h] * w_router[e, h] + logit_bias[e]      kernel 1, in parts of h
    score        = softmax(logits) or sigmoid(logits)                          kernel 2 from here on
    choice       = score + bias
    group[g]     = sum of the two best (or the best) choice in group g
    choice[e]    = -inf unless e's group is among the top_groups best
    experts      = the top_k of choice, best first, ties by the lowest index
    weights      = score[experts] (/ their sum) * scale

Softmax before top-k with normalised weights equals top-k before softmax (Mixtral, gpt-oss):
``exp(l_i) / sum over chosen of exp(l_j)`` either way. gpt-oss's router has a bias in its linear layer
(`logit_bias`, which weighs as well); DeepSeek-V3's `bias` only chooses.

With few tokens the product is cut along h, so that all SMs read the router's weights at once; the parts are
added in the second kernel, in a fixed order: the same input gives the same bits.
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

__all__ = ["LogitsTile", "logits_tile", "route", "router_logits", "select_experts"]

_MAX_EXPERTS = 4096
_WARP_SCORES = 512
"""Scores that one warp holds in registers. A program of one warp needs no barrier in its top-k loop."""
_PROGRAMS = 132
"""Programs that the gate product is cut into where it has fewer tiles: SMs of an H100 or H200."""
_UNROLL = 8
"""Parts that the selection reads at once; one after the other, each would wait for the memory. With two tokens a
program only two: eight would spill, and many parts come with few tokens anyway."""
_TYPES = (torch.float16, torch.bfloat16, torch.float32)


class LogitsTile(NamedTuple):
    """How the gate product is cut."""

    block_t: int
    """Tokens of a tile."""
    block_e: int
    """Experts of a tile."""
    block_h: int
    """Depth of one step."""
    n_parts: int
    """Parts that the depth is cut into."""
    num_warps: int
    num_stages: int


# ---------------------------------------------------------------- gate product


@triton.jit(do_not_specialize=["n_tokens", "steps"])
def _logits_kernel(
    x_ptr, w_ptr, parts_ptr, n_tokens, n_experts, hidden, steps,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, SAME_TYPE: tl.constexpr,
):  # fmt: skip
    """Program (tokens, experts, part): x [T, hidden], w [E, hidden] -> parts [n_parts, T, E] float32.

    Part s sums steps [s * steps, (s + 1) * steps) of BLOCK_H. Operands of one 16-bit type are multiplied as they
    are; else both as float32, in three passes of tf32 (relative error near 1e-6).
    """
    first = tl.program_id(0) * BLOCK_T
    row = tl.arange(0, BLOCK_T)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(2)
    depth = part * steps * BLOCK_H + tl.arange(0, BLOCK_H)
    # Rows beyond the end read the tile's first: their products are never stored, and need no mask in the loop.
    # 64 bits for the tile's place, 32 inside it: 64-bit offsets an element would spill.
    x_rows = x_ptr + first.to(tl.int64) * hidden + tl.where(first + row < n_tokens, row, 0)[:, None] * hidden
    w_rows = w_ptr + tl.where(experts < n_experts, experts, 0)[None, :] * hidden
    total = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    for _ in range(steps):
        inside = depth < hidden
        x = tl.load(x_rows + depth[None, :], mask=inside[None, :], other=0.0)
        w = tl.load(w_rows + depth[:, None], mask=inside[:, None], other=0.0)
        if SAME_TYPE:
            total = tl.dot(x, w, total)
        else:
            total = tl.dot(x.to(tl.float32), w.to(tl.float32), total, input_precision="tf32x3")
        depth += BLOCK_H
    out_ptr = parts_ptr + (part.to(tl.int64) * n_tokens + first) * n_experts
    mask = (first + row[:, None] < n_tokens) & (experts[None, :] < n_experts)
    tl.store(out_ptr + row[:, None] * n_experts + experts[None, :], total, mask=mask)


def logits_tile(n_tokens: int, n_experts: int, hidden: int, *, wide: bool = False) -> LogitsTile:
    """Cut of the gate product: tiles by tokens, parts so that about one program an SM runs.

    `wide` is the float32 product, whose operands take twice the room.
    """
    largest = 64 if wide or n_tokens <= 2048 else 128
    block_t = min(largest, max(16, triton.next_power_of_2(n_tokens)))
    block_e = min(64 if wide or n_tokens <= 64 else 128, max(16, triton.next_power_of_2(n_experts)))
    block_h = 64
    tiles = triton.cdiv(n_tokens, block_t) * triton.cdiv(n_experts, block_e)
    steps = triton.cdiv(hidden, block_h)
    # At least four steps a part, else filling the pipeline costs more than the part itself.
    n_parts = max(1, min(_PROGRAMS // tiles, steps // 4, 32))
    if n_parts > _UNROLL:
        n_parts -= n_parts % _UNROLL
    num_warps = 8 if block_t == 128 else 4
    return LogitsTile(block_t, block_e, block_h, n_parts, num_warps, num_stages=3 if wide else 4)


def _logits_parts(x: Tensor, w_router: Tensor) -> Tensor:
    """Parts of the gate product, float32 [n_parts, T, E]; their sum is the product."""
    (n_tokens, hidden), n_experts = x.shape, w_router.shape[0]
    same = x.dtype == w_router.dtype and x.dtype != torch.float32
    tile = logits_tile(n_tokens, n_experts, hidden, wide=not same)
    steps = triton.cdiv(triton.cdiv(hidden, tile.block_h), tile.n_parts)
    parts = torch.empty((tile.n_parts, n_tokens, n_experts), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(n_tokens, tile.block_t), triton.cdiv(n_experts, tile.block_e), tile.n_parts)
    _logits_kernel[grid](
        x, w_router, parts, n_tokens, n_experts, hidden, steps,
        BLOCK_T=tile.block_t, BLOCK_E=tile.block_e, BLOCK_H=tile.block_h, SAME_TYPE=same,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return parts


def router_logits(x: Tensor, w_router: Tensor) -> Tensor:
    """Gate product alone.

    Parameters
    ----------
    x : (T, H), float16, bfloat16 or float32
        Tokens.
    w_router : (E, H)
        Router weights; where their type is not that of `x`, or it is float32, the product is in float32.

    Returns
    -------
    Tensor
        float32 [T, E].
    """
    _check_product(x, w_router)
    if not x.shape[0]:
        return torch.empty((0, w_router.shape[0]), dtype=torch.float32, device=x.device)
    parts = _logits_parts(x, w_router)
    return parts[0] if parts.shape[0] == 1 else parts.sum(dim=0)


# ---------------------------------------------------------------- selection


@triton.jit(do_not_specialize=["n_tokens", "n_parts", "part_stride"])
def _select_kernel(
    parts_ptr, logit_bias_ptr, bias_ptr, ids_ptr, weights_ptr,
    n_tokens, n_experts, n_parts, part_stride, group_size, scale,
    HAS_LOGIT_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr,
    TOP2: tl.constexpr, N_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, CHOICES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Program i, BLOCK_T tokens: parts [n_parts, T, E] -> ids and weights [T, TOP_K].

    Scores are held as [BLOCK_T, GROUPS, SIZE], all powers of two: expert ``g * group_size + s`` is at (g, s), so
    that places rise with experts and the lowest place of equals is the lowest expert.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, SIZE)
    expert = group[:, None] * group_size + member[None, :]
    real = (group[:, None] < N_GROUPS) & (member[None, :] < group_size)
    mask = (tokens < n_tokens)[:, None, None] & real[None, :, :]
    at = tokens.to(tl.int64)[:, None, None] * n_experts + expert[None, :, :]
    logits = tl.zeros((BLOCK_T, GROUPS, SIZE), dtype=tl.float32)
    for _ in tl.range(0, n_parts, loop_unroll_factor=UNROLL):
        logits += tl.load(parts_ptr + at, mask=mask, other=0.0)
        at += part_stride
    if HAS_LOGIT_BIAS:
        logits += tl.load(logit_bias_ptr + expert, mask=real, other=0.0).to(tl.float32)[None, :, :]

    if SIGMOID:
        score = tl.sigmoid(logits)
    else:
        logits = tl.where(real[None, :, :], logits, float("-inf"))
        largest = tl.max(tl.max(logits, axis=2), axis=1)
        score = tl.exp(logits - largest[:, None, None])
        score = score / tl.sum(tl.sum(score, axis=2), axis=1)[:, None, None]
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)[None, :, :]
    choice = tl.where(real[None, :, :], choice, float("-inf"))

    if TOP_GROUPS < N_GROUPS:
        best = tl.max(choice, axis=2)
        if TOP2:
            first = tl.argmax(choice, axis=2, tie_break_left=True)
            rest = tl.where(member[None, None, :] == first[:, :, None], float("-inf"), choice)
            best += tl.max(rest, axis=2)
        allowed = tl.zeros((BLOCK_T, GROUPS), dtype=tl.int32)
        for _ in range(TOP_GROUPS):
            winner = tl.argmax(best, axis=1, tie_break_left=True)
            won = group[None, :] == winner[:, None]
            allowed = tl.where(won, 1, allowed)
            best = tl.where(won, float("-inf"), best)
        choice = tl.where(allowed[:, :, None] > 0, choice, float("-inf"))

    PLACES: tl.constexpr = GROUPS * SIZE
    choice = tl.reshape(choice, (BLOCK_T, PLACES))
    score = tl.reshape(score, (BLOCK_T, PLACES))
    place = tl.arange(0, PLACES)
    column = tl.arange(0, CHOICES)
    ids = tl.zeros((BLOCK_T, CHOICES), dtype=tl.int32)
    weights = tl.zeros((BLOCK_T, CHOICES), dtype=tl.float32)
    for j in range(TOP_K):
        winner = tl.argmax(choice, axis=1, tie_break_left=True)
        won = place[None, :] == winner[:, None]
        weight = tl.sum(tl.where(won, score, 0.0), axis=1)
        choice = tl.where(won, float("-inf"), choice)
        chosen = winner // SIZE * group_size + winner % SIZE
        ids = tl.where(column[None, :] == j, chosen[:, None], ids)
        weights = tl.where(column[None, :] == j, weight[:, None], weights)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
    out = tokens.to(tl.int64)[:, None] * TOP_K + column[None, :]
    stored = (tokens < n_tokens)[:, None] & (column < TOP_K)[None, :]
    tl.store(ids_ptr + out, ids, mask=stored)
    tl.store(weights_ptr + out, weights * scale, mask=stored)


def select_experts(
    logits: Tensor,
    *,
    top_k: int,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    logit_bias: Tensor | None = None,
    n_groups: int = 1,
    top_groups: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
    group_score: str = "top2",
) -> tuple[Tensor, Tensor]:
    """Everything after the gate product, in one kernel.

    Parameters
    ----------
    logits : (T, E) or (n_parts, T, E), float32
        Scores before the softmax or sigmoid, or parts that add up to them.
    top_k
        Experts a token.
    scoring
        ``softmax`` or ``sigmoid``.
    bias : (E,)
        Added to the score that chooses, not to the weight (DeepSeek-V3's load-balancing bias).
    logit_bias : (E,)
        Added to the logits (the bias of gpt-oss's router).
    n_groups, top_groups
        Experts are cut into `n_groups` equal runs; only the best `top_groups` runs may be chosen from.
    normalise
        Divide the weights of a token by their sum.
    scale
        Factor on every weight (2.5 in DeepSeek-V3).
    group_score
        ``top2``: a group's score is the sum of its two best experts' (DeepSeek-V3); ``max``: that of its best
        (DeepSeek-V2).

    Returns
    -------
    tuple of Tensor
        expert_ids int32 [T, top_k], best first, ties by the lowest index; weights float32 [T, top_k].

    Raises
    ------
    KernelError
        If shapes, types or counts do not fit each other.

    Notes
    -----
    Scores are float32: logits so far apart that their sigmoids round to one are a tie.
    """
    if logits.dim() not in (2, 3) or logits.dtype != torch.float32 or not logits.is_contiguous():
        raise KernelError(
            "logits are contiguous float32 [T, E] or [n_parts, T, E]",
            value=(tuple(logits.shape), logits.dtype),
        )
    parts = logits if logits.dim() == 3 else logits[None]
    n_parts, n_tokens, n_experts = parts.shape
    _check_choice(n_experts, top_k, scoring, n_groups, top_groups, group_score)
    _check_bias("bias", bias, logits, n_experts)
    _check_bias("logit_bias", logit_bias, logits, n_experts)
    ids = torch.empty((n_tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((n_tokens, top_k), dtype=torch.float32, device=logits.device)
    if not n_tokens:
        return ids, weights
    # Without a limit the groups do not matter, and one run pads least.
    limited = top_groups < n_groups
    groups = n_groups if limited else 1
    held = max(2, triton.next_power_of_2(n_experts // groups))
    padded = triton.next_power_of_2(groups)
    spread = triton.next_power_of_2(triton.cdiv(n_tokens, 8 * _PROGRAMS))
    block_t = max(1, min(_WARP_SCORES // (held * padded), spread, 8))
    _select_kernel[(triton.cdiv(n_tokens, block_t),)](
        parts, logits if logit_bias is None else logit_bias, logits if bias is None else bias, ids, weights,
        n_tokens, n_experts, n_parts, n_tokens * n_experts, n_experts // groups, float(scale),
        HAS_LOGIT_BIAS=logit_bias is not None, HAS_BIAS=bias is not None, SIGMOID=scoring == "sigmoid",
        NORMALISE=normalise, TOP2=group_score == "top2", N_GROUPS=groups, TOP_GROUPS=top_groups if limited else 1,
        TOP_K=top_k, BLOCK_T=block_t, GROUPS=padded, SIZE=held, CHOICES=triton.next_power_of_2(top_k),
        UNROLL=_UNROLL if block_t == 1 and n_parts >= _UNROLL else min(2, n_parts),
        num_warps=max(1, min(8, block_t * padded * held // _WARP_SCORES)),
    )  # fmt: skip
    return ids, weights


def route(
    x: Tensor,
    w_router: Tensor,
    *,
    top_k: int,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    logit_bias: Tensor | None = None,
    n_groups: int = 1,
    top_groups: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
    group_score: str = "top2",
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` of the experts for every token: `router_logits`, then `select_experts`.

    Parameters
    ----------
    x : (T, H), float16, bfloat16 or float32
        Tokens.
    w_router : (E, H)
        Router weights; where their type is not that of `x`, or it is float32, the product is in float32.
    top_k, scoring, bias, logit_bias, n_groups, top_groups, normalise, scale, group_score
        As in `select_experts`.

    Returns
    -------
    tuple of Tensor
        expert_ids int32 [T, top_k], best first, ties by the lowest index; weights float32 [T, top_k].

    Raises
    ------
    KernelError
        If shapes, types or counts do not fit each other.
    """
    _check_product(x, w_router)
    n_tokens, n_experts = x.shape[0], w_router.shape[0]
    if n_tokens:
        logits = _logits_parts(x, w_router)
    else:
        logits = torch.empty((0, n_experts), dtype=torch.float32, device=x.device)
    return select_experts(
        logits, top_k=top_k, scoring=scoring, bias=bias, logit_bias=logit_bias, n_groups=n_groups,
        top_groups=top_groups, normalise=normalise, scale=scale, group_score=group_score,
    )  # fmt: skip


# ---------------------------------------------------------------- checks


def _check_product(x: Tensor, w_router: Tensor) -> None:
    shapes = (tuple(x.shape), tuple(w_router.shape))
    if x.dim() != 2 or w_router.dim() != 2 or x.shape[1] != w_router.shape[1]:
        raise KernelError("x is [T, H] and w_router is [E, H]", value=shapes)
    if x.dtype not in _TYPES or w_router.dtype not in _TYPES:
        raise KernelError("x and w_router are float16, bfloat16 or float32", value=(x.dtype, w_router.dtype))
    if not x.is_contiguous() or not w_router.is_contiguous():
        raise KernelError("x and w_router are contiguous", value=shapes, fix="call .contiguous()")
    if x.device != w_router.device:
        raise KernelError("x and w_router are on one device", value=(str(x.device), str(w_router.device)))


def _check_choice(
    n_experts: int, top_k: int, scoring: str, n_groups: int, top_groups: int, group_score: str
) -> None:
    if scoring not in ("softmax", "sigmoid"):
        raise KernelError("scoring is softmax or sigmoid", value=scoring)
    if group_score not in ("top2", "max"):
        raise KernelError("group_score is top2 or max", value=group_score)
    if not 1 <= n_experts <= _MAX_EXPERTS:
        raise KernelError(f"1 to {_MAX_EXPERTS} experts", value=n_experts)
    if n_groups < 1 or n_experts % n_groups or not 1 <= top_groups <= n_groups:
        raise KernelError(
            "experts divide into n_groups, of which 1 to n_groups are taken",
            value=(n_experts, n_groups, top_groups),
        )
    size = n_experts // n_groups
    if group_score == "top2" and size < 2 and top_groups < n_groups:
        raise KernelError(
            "a group scored by its two best has two experts", value=size, fix='group_score="max"'
        )
    if not 1 <= top_k <= top_groups * size:
        raise KernelError(f"top_k is 1 to {top_groups * size}, the experts that may be chosen", value=top_k)


def _check_bias(name: str, bias: Tensor | None, logits: Tensor, n_experts: int) -> None:
    if bias is None:
        return
    if bias.shape != (n_experts,) or bias.dtype not in _TYPES or not bias.is_contiguous():
        raise KernelError(f"{name} is contiguous floating point [E]", value=(tuple(bias.shape), bias.dtype))
    if bias.device != logits.device:
        raise KernelError(f"{name} is on the device of the logits", value=str(bias.device))
