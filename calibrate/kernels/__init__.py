"""Triton kernels of one rank's expert feed-forward: what calibration runs and times.

::

    tokens x [T, H], router logits or hidden states
      |  router          scores, top-k, normalisation       -> expert_ids [T, k], router_weights [T, k]
      |  permute         sort (token, expert) pairs          -> SortedTokens
      |  grouped_gemm    up_swiglu: silu(x Wg^T) * (x Wu^T)  -> h [padded, I], sorted order
      |  grouped_gemm    down_combine: weight * (h Wd^T)     -> rows [T * k, H], pair order
      v  rows            combine: sum over k                 -> y [T, H]

`fused.moe_ffn` is the whole of it without a host synchronisation, with tile shapes from `tiles`. `padded` and
`naive` do the same work in two other ways, for comparison; `reference` is the obvious PyTorch version that
every kernel is tested against.

Conventions that the modules share
----------------------------------
pair
    ``p = token * top_k + slot``: one (token, expert) choice. ``expert_ids.flatten()[p]`` is its expert. A
    negative id is a dropped pair.
`expert_map`
    ``[n_experts]`` int32: the slot of an expert on this rank, -1 where it is elsewhere. Without it every expert
    is here. Weights have one entry a *slot*; pairs of absent experts are left out of the sort and of `combine`.
sorted order
    Pairs by slot, each slot padded to a multiple of ``block_m``; ``sorted_pairs[i]`` is the pair at place i, or
    the sentinel ``T * k`` at a padded place. Sizes are upper bounds known on the host, so a CUDA graph can hold
    them; blocks from ``n_blocks_used`` on hold nothing and are never read.
weights
    ``w_up [slots, 2 I, H]``: gate rows first, then up rows; ``w_down [slots, H, I]``: both row-major, K last.
fp8
    e4m3 with one fp32 scale a 128 x 128 block of a weight and a 1 x 128 group of a row (DeepSeek-V3's format):
    ``value = stored * scale``. Products are summed over 128 of K in the matrix unit, then scaled and added in
    fp32. H and I are multiples of 128.
"""

from __future__ import annotations

from moesim.errors import MoesimError

__all__ = ["KernelError"]


class KernelError(MoesimError):
    """Tensors or tiles that a kernel cannot take: shapes that disagree, a wrong dtype, a tile too large."""
