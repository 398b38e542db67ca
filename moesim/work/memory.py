"""Memory of one rank, item by item."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.hardware.gpu import weight_bytes_per_element
from moesim.model.params import Weight, layer_weights, model_weights
from moesim.model.spec import LayerSpec, MoeSpec
from moesim.work.attention import ACTIVATION_BYTES
from moesim.work.case import Case, Stage

__all__ = [
    "KV_BYTES",
    "RUNTIME_BYTES",
    "TrainingState",
    "inference_memory",
    "kv_bytes_per_sequence",
    "rank_elements",
    "training_memory",
    "weight_bytes",
]

FloatArray = NDArray[np.float64]

KV_BYTES = {"bfloat16": 2.0, "fp8": 1.0}
"""Bytes of one cached number."""

RUNTIME_BYTES = 3.0e9
"""CUDA context, library handles, NCCL and graph buffers [bytes]. Assumed. Engines leave more free by default, about
a tenth of the device (vLLM's `gpu-memory-utilization`, SGLang's `mem-fraction-static`), as slack."""

KV_PAGE_TOKENS = 64
"""Tokens of one page of the KV cache: a sequence's last page is half empty on average (vLLM's block for MLA)."""

SPLIT_OVER_TP = frozenset({"attention", "dense_ffn", "embedding", "head"})
"""Parts that tensor parallelism divides; norms and routers are copied."""


@dataclass(frozen=True)
class TrainingState:
    """What training keeps for every weight."""

    zero: Literal[0, 1, 2, 3] = 1
    """What data parallelism divides: 1 optimiser, 2 gradients too, 3 weights too (ZeRO, arXiv:1910.02054)."""
    grad_bytes: float = 4.0
    """Bytes of one gradient: Megatron-Core accumulates in float32."""
    optimizer_bytes: float = 12.0
    """Bytes of one weight's master copy and two Adam moments in float32 (ZeRO, section 3.1)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass."""


def rank_elements(case: Case, stage: Stage) -> Counter[tuple[str, str]]:
    """Parameters on one rank by (part, format); routed experts include replicas."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind, n_layers in Counter(case.model.kind_of_layer[index] for index in stage.layers).items():
        layer = case.model.kinds[kind]
        for name, weight in _weights_of(layer, case.model.hidden).items():
            n_parts = _attention_parts(case, layer, name)
            counts[weight.part, _format(case, weight)] += n_layers * _on_rank(case, weight, n_parts)
    outer = model_weights(case.model)
    for name, weight in outer.items():
        tied_head = case.model.tied_embeddings and name == "embedding" and stage.last
        if (stage.first and name == "embedding") or (stage.last and name != "embedding") or tied_head:
            counts[weight.part, _format(case, weight)] += _on_rank(case, weight, case.layout.tp)
    return counts


_weights_of = lru_cache(maxsize=256)(layer_weights)
"""A planner asks for the same few kinds of layers thousands of times."""


def _attention_parts(case: Case, layer: LayerSpec, name: str) -> int:
    """Ranks that an attention weight is divided over: fewer than `tp` where it is copied.

    Engines copy MLA's down projections, and key and value heads that are fewer than the ranks.
    """
    block, _, matrix = name.partition(".")
    attention = layer.cross_attention if block == "cross_attention" else layer.attention
    if attention is None or block not in ("attention", "cross_attention"):
        return case.layout.tp
    if attention.kind == "mla" and matrix in ("q_a", "kv_a", "qkv_bias"):
        return 1
    if attention.kind == "gqa" and matrix in ("k", "v"):
        return min(case.layout.tp, attention.n_kv_heads)
    return case.layout.tp


def _on_rank(case: Case, weight: Weight, n_parts: int) -> int:
    layout = case.layout
    per_copy = weight.n_parameters // weight.copies
    if weight.part == "expert":
        slots = ceil((weight.copies + layout.redundant_experts) / layout.ep)
        return ceil(per_copy * slots / layout.etp)
    split_shared = weight.part == "shared_expert" and case.dispatch == "allreduce"
    if weight.part in SPLIT_OVER_TP or split_shared:
        return ceil(weight.n_parameters / n_parts)
    return weight.n_parameters


def _format(case: Case, weight: Weight) -> str:
    if weight.part == "expert" and len(weight.shape) > 1:
        return case.expert_dtype
    if weight.part in ("attention", "dense_ffn", "shared_expert") and len(weight.shape) > 1:
        return case.weight_dtype
    return "bfloat16"


def weight_bytes(case: Case, stage: Stage) -> dict[str, float]:
    """Weights on one rank of a stage: routed experts, and everything else [bytes]."""
    experts = other = 0.0
    for (part, dtype), n in rank_elements(case, stage).items():
        size = n * weight_bytes_per_element(dtype)
        if part == "expert":
            experts += size
        else:
            other += size
    return {"weights_experts": experts, "weights_dense": other}


def kv_bytes_per_sequence(case: Case, stage: Stage, context: FloatArray) -> FloatArray:
    """KV cache of one sequence on one rank of a stage [bytes]: heads are cut over `tp`, latents are not."""
    total = np.zeros_like(context)
    for kind, n_layers in Counter(case.model.kind_of_layer[index] for index in stage.layers).items():
        layer = case.model.kinds[kind]
        for attention in (layer.attention, layer.cross_attention):
            if attention is None or layer.role == "encoder":
                continue
            cut = 1 if attention.kind == "mla" else min(case.layout.tp, max(1, attention.n_kv_heads))
            held = np.minimum(context, attention.window) if attention.window else context
            pages = held + (KV_PAGE_TOKENS / 2 if attention.kv_elements_per_token else 0)
            per_layer = pages * attention.kv_elements_per_token / cut * KV_BYTES[case.kv_dtype]
            total = total + n_layers * (
                per_layer + attention.state_elements_per_sequence / case.layout.tp * 4.0
            )
    return total


def inference_memory(
    case: Case, n_sequences: FloatArray, context: FloatArray, n_tokens: FloatArray, busiest: float = 1.0
) -> dict[str, FloatArray]:
    """Memory of the fullest rank while serving [bytes].

    Parameters
    ----------
    case
        Model, cluster and layout.
    n_sequences : (n_points,)
        Sequences held by one attention replica.
    context : (n_points,)
        Tokens of each at its longest.
    n_tokens : (n_points,)
        Tokens of the largest step that one replica runs.
    busiest
        Routed rows of the busiest rank over the mean.

    Returns
    -------
    dict of str to (n_points,) array
        ``weights_experts, weights_dense, kv_cache, activations, exchange_buffers, runtime, total, capacity``.
    """
    per_stage = [_stage_memory(case, stage, n_sequences, context, n_tokens, busiest) for stage in case.stages]
    totals = np.stack([sum(items.values(), np.zeros_like(context)) for items in per_stage])
    fullest = totals.argmax(axis=0)
    points = np.arange(len(fullest))
    result = {key: np.stack([items[key] for items in per_stage])[fullest, points] for key in per_stage[0]}
    result["total"] = totals.max(axis=0)
    result["capacity"] = np.full_like(context, case.cluster.gpu.memory_bytes)
    return result


def _stage_memory(
    case: Case,
    stage: Stage,
    n_sequences: FloatArray,
    context: FloatArray,
    n_tokens: FloatArray,
    busiest: float,
) -> dict[str, FloatArray]:
    ones = np.ones_like(context)
    items = {name: size * ones for name, size in weight_bytes(case, stage).items()}
    items["kv_cache"] = n_sequences * kv_bytes_per_sequence(case, stage, context)
    items["activations"] = _step_activations(case, stage, n_sequences, n_tokens, busiest)
    items["exchange_buffers"] = _exchange_buffers(case, n_sequences)
    items["runtime"] = RUNTIME_BYTES * ones
    return items


def _step_activations(
    case: Case, stage: Stage, n_sequences: FloatArray, n_tokens: FloatArray, busiest: float
) -> FloatArray:
    """Live tensors of the widest layer, and the logits.

    The widest moment holds the residual, its norm, and either a feed-forward's up and gate or the routed
    rows' input and both products; engines free the rest between kernels.
    """
    widest = 0.0
    for layer in {case.model.kind_of_layer[i]: case.layer(i) for i in stage.layers}.values():
        if layer.moe is not None:
            width = _moe_width(case, layer.moe, busiest)
        else:
            width = 3 * (layer.dense_intermediate or 0) / case.layout.tp
        attention = layer.attention
        heads = (
            attention.q_width + attention.k_width + attention.v_width + attention.out_width
        ) / case.layout.tp
        widest = max(widest, width, heads)
    logits = n_sequences * case.model.vocab * 4.0 if stage.last else 0.0 * n_sequences
    return n_tokens * (4 * case.model.hidden + widest) * 2.0 + logits


def _moe_width(case: Case, moe: MoeSpec, busiest: float) -> float:
    """Values per token of a replica that one rank's routed rows take: input, output, both products."""
    layout = case.layout
    each = busiest * (2 * case.model.hidden + 3 * moe.intermediate / layout.etp)
    if case.dispatch == "allreduce":
        return moe.top_k / (layout.ep * layout.n_expert_groups) * each
    if case.dispatch == "allgather":
        gathered = 2 * layout.group_dp * case.model.hidden
        return gathered + moe.top_k * layout.group_dp / layout.ep * each
    return moe.top_k * layout.etp / layout.tp * each


def _exchange_buffers(case: Case, n_sequences: FloatArray) -> FloatArray:
    """Send and receive buffers of the dispatch.

    Low latency, a decode step's one token a sequence, reserves for every expert what one rank could send it
    and what it could get back, ``n_experts * tokens * hidden`` in 16 bits, twice each as steps alternate
    (DeepEP's `get_low_latency_rdma_size_hint`); normal keeps 1 to 2 GB of NVLink and RDMA buffers (the hints
    in DeepEP's README).
    """
    moe = case.model.moe
    if moe is None or case.dispatch in ("allreduce", "allgather"):
        return 0.0 * n_sequences
    if case.dispatch == "low-latency":
        per_rank = n_sequences / case.layout.tp
        return 4.0 * moe.n_experts * per_rank * case.model.hidden * ACTIVATION_BYTES
    return np.full_like(n_sequences, 1.5e9)


def training_memory(
    case: Case, state: TrainingState, micro_batch: int, sequence: int, n_micro: int
) -> dict[str, float]:
    """Memory of the fullest rank while training, with the first stage holding `pp` micro-batches [bytes].

    Notes
    -----
    Activations follow Korthikanti et al. (arXiv:2205.05198), equation 2, with sequence parallelism over
    `tp`: 34 bytes per token and hidden value of a dense layer, attention scores never stored
    (FlashAttention); the feed-forward's 19 of these are replaced by what the routed rows take.
    """
    per_stage = [_training_stage(case, state, stage, micro_batch, sequence, n_micro) for stage in case.stages]
    fullest = max(per_stage, key=lambda items: sum(items.values()))
    return {**fullest, "total": sum(fullest.values()), "capacity": case.cluster.gpu.memory_bytes}


def _training_stage(
    case: Case, state: TrainingState, stage: Stage, micro_batch: int, sequence: int, n_micro: int
) -> dict[str, float]:
    layout = case.layout
    items = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for (part, dtype), n in rank_elements(case, stage).items():
        copies = layout.edp if part == "expert" else layout.dp
        cut = [copies if state.zero >= level else 1 for level in (1, 2, 3)]
        items["optimizer"] += n * state.optimizer_bytes / cut[0]
        items["gradients"] += n * state.grad_bytes / cut[1]
        items["weights"] += n * max(2.0, weight_bytes_per_element(dtype)) / cut[2]
    in_flight = min(n_micro, layout.pp - stage.index)
    tokens = micro_batch * sequence / layout.tp
    per_token = sum(_activation_bytes(case, state, index) for index in stage.layers)
    items["activations"] = tokens * per_token * in_flight
    if stage.last:
        items["activations"] += micro_batch * sequence * case.model.vocab / layout.tp * 6.0
    items["runtime"] = RUNTIME_BYTES
    return items


def _rows_over_routed(case: Case) -> float:
    """Rows that the experts of a rank hold over those routed to them, at most: padding counts, drops do."""
    if case.capacity is None:
        return 1.0
    whole = case.capacity.padding == "capacity" or case.capacity.router == "expert-choice"
    return case.capacity.factor if whole else min(case.capacity.factor, 1.0)


def _activation_bytes(case: Case, state: TrainingState, index: int) -> float:
    """Bytes kept per token of one layer on one rank for its backward pass."""
    hidden, layer = case.model.hidden, case.layer(index)
    if state.recompute == "full":
        return 2.0 * hidden
    attention = layer.attention
    widths = attention.q_width + attention.k_width + attention.v_width + 2 * attention.out_width
    kept = 2.0 * (4 * hidden + widths)
    if layer.moe is None:
        return kept + 2.0 * 3 * (layer.dense_intermediate or 0)
    wide = 3 * layer.moe.intermediate if state.recompute == "none" else 0
    rows = 2.0 * layer.moe.top_k * (hidden + wide) * _rows_over_routed(case)
    return kept + rows + 2.0 * 3 * layer.moe.shared_intermediate
