"""The plain loop over experts: one product an expert, launched from the host.

::

    for each expert e:
        mine    = pairs of e
        hidden  = silu(x[mine] @ gate[e].T) * (x[mine] @ up[e].T)
        out    += router_weight[mine] * (hidden @ w_down[e].T)

What a model written without grouped kernels does (the first Mixtral of Hugging Face transformers), and the
baseline that grouped and padded kernels are compared with. The host asks the device for the number of pairs of
each expert, so no CUDA graph can hold it; the products are the vendor's (cuBLAS).
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from calibrate.kernels.padded import check_moe_ffn

__all__ = ["moe_ffn_naive"]


def moe_ffn_naive(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, router_weights: Tensor
) -> Tensor:
    """Routed experts, one after the other.

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

    Returns
    -------
    Tensor
        [T, H] of the type of `x`, summed in float32.

    Raises
    ------
    KernelError
        If shapes or types do not fit each other.
    """
    check_moe_ffn(x, w_up, w_down, expert_ids, router_weights)
    n_experts, top_k = w_up.shape[0], expert_ids.shape[1]
    flat = expert_ids.flatten().long()
    flat = torch.where((flat >= 0) & (flat < n_experts), flat, n_experts)
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=n_experts + 1).tolist()[:n_experts]
    weights = router_weights.flatten().float()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, (begin, end) in enumerate(pairwise(accumulate(counts, initial=0))):
        if begin == end:
            continue
        mine = order[begin:end]
        tokens = mine // top_k
        gate, up = (x[tokens] @ w_up[expert].T).float().chunk(2, dim=1)
        hidden = (torch.nn.functional.silu(gate) * up).to(x.dtype)
        out.index_add_(0, tokens, (hidden @ w_down[expert].T).float() * weights[mine, None])
    return out.to(x.dtype)
