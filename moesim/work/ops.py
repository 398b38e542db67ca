"""Operators of a step: what is computed and moved, with no time in it.

Every array broadcasts to (n_points, n_layers, n_ranks): workload sizes evaluated together, repeats of
the block that the operator stands in, ranks. `moesim.cost` turns an operator into seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AllGather", "AllReduce", "AttentionDecode", "AttentionPrefill", "Combine", "DenseGemm", "Dispatch",
    "Elementwise", "Exchange", "ExpertFfn", "FloatArray", "Op", "Pause", "ReduceScatter", "Router", "SendRecv",
]  # fmt: skip

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class DenseGemm:
    """``n_gemms`` products of (m, k) by (k, n), each its own kernel.

    `m` is an array of rows (tokens); `n` and `k` are this rank's share.
    """

    m: FloatArray
    n: int
    k: int
    dtype: str
    n_gemms: int = 1
    batched: int = 1
    """Independent products inside one kernel (MLA's per-head absorption)."""


@dataclass(frozen=True, eq=False)
class ExpertFfn:
    """Feed-forward of the experts on one rank: permute, grouped GEMMs, activation, weighted sum."""

    tokens_per_expert: FloatArray
    """[P, L, R, local expert slots] rows that each slot multiplies."""
    n_tokens: FloatArray
    """[P, L, R] tokens that enter the kernel, whether or not an expert of theirs is on this rank."""
    hidden: int
    intermediate: int
    """Width of one expert on this rank, after expert tensor parallelism."""
    top_k: int
    dtype: str
    gated: bool = True
    """Three matrices (SwiGLU) or two."""
    deepep_layout: bool = False
    """Rows arrive already sorted by expert (after a dispatch), so nothing is permuted here."""
    passes: Literal["forward", "backward"] = "forward"
    """Backward multiplies twice: for the inputs and for the weights."""


@dataclass(frozen=True, eq=False)
class AttentionPrefill:
    """Causal attention over fresh tokens: `n_query` of them a sequence, ending at `n_context`."""

    kind: Literal["gqa", "mla"]
    batch: FloatArray
    n_query: FloatArray
    n_context: FloatArray
    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int
    kv_dtype: str
    passes: Literal["forward", "backward"] = "forward"


@dataclass(frozen=True, eq=False)
class AttentionDecode:
    """One query a sequence against `n_context` cached tokens; heads are this rank's share."""

    kind: Literal["gqa", "mla"]
    batch: FloatArray
    n_context: FloatArray
    n_heads: int
    n_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int
    kv_dtype: str


@dataclass(frozen=True, eq=False)
class Elementwise:
    """Kernels bound by memory: norms, rotary embedding, activations, residuals, optimiser."""

    moved_bytes: FloatArray
    """Bytes read and written by all of them."""
    n_kernels: int = 1


@dataclass(frozen=True, eq=False)
class Router:
    """Gate product, scores, top-k and their normalisation."""

    n_tokens: FloatArray
    hidden: int
    n_experts: int
    top_k: int


@dataclass(frozen=True, eq=False)
class AllReduce:
    """Sum of `payload_bytes` over a group; every rank ends with the whole."""

    payload_bytes: FloatArray
    group: str
    """Which ranks: ``tp``, ``etp``, ``tp_ep``, ``dp``, ``edp``."""


@dataclass(frozen=True, eq=False)
class AllGather:
    """Every rank contributes a share of `payload_bytes` and ends with the whole."""

    payload_bytes: FloatArray
    group: str


@dataclass(frozen=True, eq=False)
class ReduceScatter:
    """Sum of `payload_bytes` over a group; every rank ends with its share."""

    payload_bytes: FloatArray
    group: str


@dataclass(frozen=True, eq=False)
class Exchange:
    """Token vectors between ranks, either way.

    Copies are token vectors that leave or reach a rank, its own not counted. ``low-latency`` and ``nccl`` count
    one per (token, expert), over either link. ``normal`` counts over NVLink one per (token, rank), what a rank
    forwards included, and over NICs one per (token, domain); where domains do not divide the group, it counts one
    per (token, rank) over either link.
    """

    n_tokens: FloatArray
    """[P, L, R] tokens that each rank holds."""
    sent_nvlink: FloatArray
    """[P, L, R] copies sent inside the scale-up domain, forwarded ones included."""
    received_nvlink: FloatArray
    """[P, L, R] the same, received."""
    sent_nic: FloatArray
    """[P, L, R] copies sent to other domains."""
    received_nic: FloatArray
    """[P, L, R] the same, received."""
    token_bytes: float
    """Bytes of one copy, scales included."""
    hidden: int
    top_k: int
    n_experts: int
    kind: Literal["low-latency", "normal", "nccl"]
    group: str = "ep"
    n_sms: int = 0
    """SMs that the kernel takes from compute."""


@dataclass(frozen=True, eq=False)
class Dispatch(Exchange):
    """Tokens to the ranks of their experts."""


@dataclass(frozen=True, eq=False)
class Combine(Exchange):
    """Expert outputs back to their tokens' ranks: a dispatch's copies, the other way, in bf16."""


@dataclass(frozen=True, eq=False)
class SendRecv:
    """`payload_bytes` from one pipeline stage to the next."""

    payload_bytes: FloatArray
    group: str = "pp"


@dataclass(frozen=True, eq=False)
class Pause:
    """Time that is no kernel's: the host's share of a step (scheduling, sampling, launch)."""

    kind: Literal["host"]
    n_sequences: FloatArray


Op = (
    DenseGemm | ExpertFfn | AttentionPrefill | AttentionDecode | Elementwise | Router | AllReduce | AllGather
    | ReduceScatter | Dispatch | Combine | SendRecv | Pause
)  # fmt: skip
