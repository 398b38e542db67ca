"""How many rows one expert takes before it drops."""

from __future__ import annotations

from typing import Literal

import numpy as np

from moesim.errors import LayoutError
from moesim.work.ops import FloatArray

__all__ = ["CapacityConvention", "expert_capacity"]

CapacityConvention = Literal["megatron", "tutel", "megablocks"]


def expert_capacity(
    n_tokens: FloatArray, n_experts: int, top_k: int, capacity_factor: float, convention: CapacityConvention
) -> FloatArray:
    """Rows that one expert takes.

    Parameters
    ----------
    n_tokens
        Tokens that are routed together.
    n_experts
        Slots that share them, replicas included.
    top_k
        Experts of each token.
    capacity_factor
        Rows over the mean.
    convention
        ``megatron``: ``ceil(n_tokens * top_k / n_experts * capacity_factor)``; ``tutel``:
        ``top_k * int(capacity_factor * ceil(n_tokens / n_experts))``; ``megablocks``:
        ``int(capacity_factor * top_k * n_tokens / n_experts)``.

    Raises
    ------
    LayoutError
        If the factor is negative or the convention is not known.

    References
    ----------
    Megatron-Core ``moe_utils.get_capacity``; Tutel ``extract_critical``; MegaBlocks ``ParallelMLP.expert_capacity``.
    """
    if not capacity_factor >= 0:
        raise LayoutError("a capacity factor is 0 or more", value=capacity_factor)
    if convention == "megatron":
        return np.asarray(np.ceil(n_tokens * top_k / n_experts * capacity_factor))
    if convention == "tutel":
        return np.asarray(top_k * np.floor(capacity_factor * np.ceil(n_tokens / n_experts)))
    if convention == "megablocks":
        return np.asarray(np.floor(capacity_factor * top_k * n_tokens / n_experts))
    raise LayoutError("unknown capacity convention", value=convention, fix="megatron, tutel or megablocks")
