"""Latent attention (MLA) of one query a sequence, projections absorbed: every head reads the cached latent itself.

::

    scores[b, h, s] = scale * (q[b, h] . cache[b, s])            q, cache [.., C + R]: latent, then rotary part
    out[b, h]       = sum over s of softmax(scores)[s] * cache[b, s, :C]

All heads of a sequence share its cache, so a program takes 16 or 64 heads at once and each key serves them all. The
keys of a sequence are cut into parts until the programs fill the SMs; a second kernel adds the parts up by their
log-sum-exp (flash-decoding: Dao et al. 2023; the absorbed form: DeepSeek-V2, section 2.1.2).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# Inside a kernel stand values of Triton's own language, which have no Python types.

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from calibrate.kernels import KernelError
from calibrate.kernels.latent_parts import KEYS, STAGES, WARPS, parts_for
from calibrate.kernels.rows import buffer

__all__ = ["join_kernel", "latent_decode", "latent_kernel"]

_LOG2E = 1.0 / math.log(2.0)


@triton.jit
def latent_kernel(
    q_ptr, cache_ptr, out_ptr, sum_ptr, lse_ptr, scale, n_heads, n_context, part_keys,
    C: tl.constexpr, R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Program (part, heads, sequence): out [B, H, C] where WHOLE, else sum [B, H, parts, C] and lse [B, H, parts].

    `scale` is the softmax's, times log2(e).
    """
    part, n_parts = tl.program_id(0), tl.num_programs(0)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    sequence = tl.program_id(2).to(tl.int64)
    here = heads < n_heads
    latent, rotary = tl.arange(0, C), C + tl.arange(0, R)
    rows = sequence * n_heads + heads
    q = tl.load(q_ptr + rows[:, None] * (C + R) + latent[None, :], mask=here[:, None], other=0.0)
    turned = tl.load(q_ptr + rows[:, None] * (C + R) + rotary[None, :], mask=here[:, None], other=0.0)
    begin = part * part_keys
    end = tl.minimum(begin + part_keys, n_context)
    highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_H, C), tl.float32)
    first = cache_ptr + sequence * n_context * (C + R)
    for start in range(begin, end, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        seen = keys < end
        places = keys[:, None] * (C + R)
        key = tl.load(first + places + latent[None, :], mask=seen[:, None], other=0.0)
        key_turned = tl.load(first + places + rotary[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(key))
        scores = tl.dot(turned, tl.trans(key_turned), scores)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        share = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        weight = weight * shrunk + tl.sum(share, 1)
        total = tl.dot(share.to(key.dtype), key, total * shrunk[:, None])
        highest = higher
    total = total / weight[:, None]
    if WHOLE:
        values = total.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows[:, None] * C + latent[None, :], values, mask=here[:, None])
    else:
        places = rows * n_parts + part
        tl.store(sum_ptr + places[:, None] * C + latent[None, :], total, mask=here[:, None])
        tl.store(lse_ptr + places, highest + tl.log2(weight), mask=here)


@triton.jit
def join_kernel(sum_ptr, lse_ptr, out_ptr, n_parts, C: tl.constexpr, PARTS: tl.constexpr):
    """Program (sequence and head): parts [n_parts, C], each divided by its own weight -> out [C]."""
    row = tl.program_id(0).to(tl.int64)
    latent, parts = tl.arange(0, C), tl.arange(0, PARTS)
    lse = tl.load(lse_ptr + row * n_parts + parts, mask=parts < n_parts, other=float("-inf"))
    highest = tl.max(lse, 0)
    weight = tl.sum(tl.exp2(lse - highest), 0)
    total = tl.zeros((C,), tl.float32)
    for part in range(n_parts):
        share = tl.exp2(tl.load(lse_ptr + row * n_parts + part) - highest) / weight
        total += share * tl.load(sum_ptr + (row * n_parts + part) * C + latent)
    tl.store(out_ptr + row * C + latent, total.to(out_ptr.dtype.element_ty))


def latent_decode(
    q: Tensor,
    cache: Tensor,
    *,
    scale: float,
    latent: int = 512,
    n_sms: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of one query a sequence over the whole cached latent.

    Parameters
    ----------
    q : (B, H, latent + rotary)
        Queries multiplied into the latent's space, then their rotary part; bfloat16 or float16, contiguous.
    cache : (B, S, latent + rotary)
        Latents of all S tokens, then their rotary keys; the same type.
    scale
        Of the scores before the softmax: 1 / sqrt(192) in DeepSeek-V3.
    latent
        Width of the latent, a power of two; the rotary part is what is left, a power of two as well.
    n_sms
        Multiprocessors, by which keys are cut; those of the device by default.
    out : (B, H, latent)
        Where to write.

    Returns
    -------
    (B, H, latent) of the type of `q`.

    Raises
    ------
    KernelError
        If shapes or types do not fit together.
    """
    batch, n_heads, width = q.shape
    rotary = width - latent
    if cache.dim() != 3 or cache.shape[0] != batch or cache.shape[2] != width or cache.shape[1] < 1:
        raise KernelError(
            "cache is [B, S, latent + rotary] for q [B, H, latent + rotary]",
            value=(tuple(q.shape), tuple(cache.shape)),
        )
    if any(one < 16 or one & (one - 1) for one in (latent, rotary)):
        raise KernelError("latent and rotary widths are powers of two, at least 16", value=(latent, rotary))
    if q.dtype not in (torch.bfloat16, torch.float16) or cache.dtype is not q.dtype:
        raise KernelError("q and cache are both bfloat16, or both float16", value=(q.dtype, cache.dtype))
    if not (q.is_contiguous() and cache.is_contiguous()):
        raise KernelError("q and cache are contiguous", value=(q.stride(), cache.stride()))
    if n_sms is None:
        n_sms = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    y = buffer(out, (batch, n_heads, latent), None, q, "out")
    cut = parts_for(batch, n_heads, cache.shape[1], n_sms)
    whole = cut.n_parts == 1
    sums = y if whole else q.new_empty((batch, n_heads, cut.n_parts, latent), dtype=torch.float32)
    lse = y if whole else q.new_empty((batch, n_heads, cut.n_parts), dtype=torch.float32)
    latent_kernel[(cut.n_parts, triton.cdiv(n_heads, cut.block_h), batch)](
        q, cache, y, sums, lse, scale * _LOG2E, n_heads, cache.shape[1], cut.part_keys,
        C=latent, R=rotary, BLOCK_H=cut.block_h, BLOCK_S=KEYS[cut.block_h], WHOLE=whole,
        num_warps=WARPS[cut.block_h], num_stages=STAGES[cut.block_h],
    )  # fmt: skip
    if not whole:
        join_kernel[(batch * n_heads,)](
            sums, lse, y, cut.n_parts, C=latent, PARTS=triton.next_power_of_2(cut.n_parts), num_warps=4
        )
    return y
