"""How many rows one expert takes, and what becomes of those beyond.

References
----------
Megatron-LM, ``megatron/core/transformer/moe/moe_utils.py`` (``apply_router_token_dropping``); Tutel,
``tutel/impls/fast_dispatch.py`` (``extract_critical``); MegaBlocks, ``megablocks/layers/moe.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import LayoutError

__all__ = [
    "CapacityConvention",
    "CapacityLoss",
    "CapacityPolicy",
    "Overflow",
    "Padding",
    "RouterKind",
    "expert_capacity",
]

FloatArray = NDArray[np.float64]
CapacityConvention = Literal["megatron", "tutel", "megablocks"]
Overflow = Literal["drop-position", "drop-weight", "reroute"]
Padding = Literal["none", "capacity"]
RouterKind = Literal["top-k", "expert-choice"]


@dataclass(frozen=True)
class CapacityPolicy:
    """What an expert takes, and what becomes of the tokens beyond."""

    factor: float
    """Rows that an expert takes, over the mean."""
    convention: CapacityConvention = "megatron"
    """Whose rounding, and whose tokens share a capacity."""
    overflow: Overflow = "drop-position"
    """Which of an expert's tokens are beyond its capacity, and whether they go elsewhere."""
    padding: Padding = "none"
    """Whether every expert computes its capacity of rows."""
    router: RouterKind = "top-k"
    """Whether tokens choose experts, or experts tokens."""

    @property
    def per_source(self) -> bool:
        """Each source rank's tokens have a capacity of their own; else the group's tokens share one."""
        return self.convention != "megablocks"


@dataclass(frozen=True, eq=False)
class CapacityLoss:
    """What a capacity does to the copies that a router asked for; arrays are (n_points,)."""

    dropped_fraction: FloatArray
    """Of (token, expert) pairs."""
    dropped_weight_fraction: FloatArray | None
    """Of router weight; None where the source has no weights."""
    tokens_without_expert_fraction: FloatArray
    """Of (token, layer) pairs, those left without any expert."""
    rerouted_fraction: FloatArray
    """Of (token, expert) pairs, those that went to another expert than the router's."""
    padding_fraction: FloatArray
    """Of computed rows, those that hold no token."""
    imbalance_before_capacity: FloatArray
    """Busiest rank over the mean as the router asked, averaged over layers."""


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
