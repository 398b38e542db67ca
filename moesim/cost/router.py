"""Seconds of a mixture-of-experts router: gate product, scores, top-k and their normalisation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moesim.cost.gemm import gemm_kernel_s
from moesim.hardware.gpu import Gpu
from moesim.work.ops import FloatArray, Router

__all__ = ["router_s"]

_SCORE_BYTES = 4.0
_CHOICE_BYTES = 8.0
"""An int32 expert and a float32 weight."""


def router_s(
    op: Router, *, gpu: Gpu, params: Mapping[str, float], gemm_params: Mapping[str, float]
) -> FloatArray:
    """Time of the gate product and of the fused top-k kernel.

    Parameters
    ----------
    op
        Tokens [P, L, R] and the router's extents.
    gpu
        Peaks that the fractions refer to.
    params
        Values of a family ``router``: ``topk_s`` (the kernel with few tokens), ``token_s`` (one token of one
        SM, per expert), ``hbm_fraction``.
    gemm_params
        Values of the family ``gemm`` in bfloat16, which prices the gate product.

    Returns
    -------
    FloatArray
        [P, L, R] seconds; 0 where no token enters.

    Notes
    -----
    The gate product writes float32 scores; its weights are taken as bfloat16. The top-k kernel is one fused
    kernel, as serving engines ship it; unfused, DeepSeek-V3's grouped top-k is 18 kernels.
    """
    tokens = np.asarray(op.n_tokens, dtype=np.float64)
    gate_s = gemm_kernel_s(tokens, op.n_experts, op.hidden, gpu=gpu, params=gemm_params, dtype="bfloat16")
    moved = tokens * (_SCORE_BYTES * op.n_experts + _CHOICE_BYTES * op.top_k)
    select_s = tokens * op.n_experts * params["token_s"] / gpu.n_sms
    moved_s = moved / (params["hbm_fraction"] * gpu.hbm_bytes_per_s)
    topk_s = params["topk_s"] + np.maximum(select_s, moved_s)
    return np.where(tokens > 0, gate_s + topk_s, 0.0)
