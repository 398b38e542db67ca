"""Attention blocks: projections, rotary embedding, attention, output projection."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from moesim.errors import LayoutError
from moesim.model.spec import AttentionSpec
from moesim.work.case import Case
from moesim.work.ops import (
    AllReduce,
    AttentionDecode,
    AttentionPrefill,
    DenseGemm,
    Elementwise,
    FloatArray,
    Op,
)
from moesim.work.step import Batch

__all__ = ["attention_ops"]

ACTIVATION_BYTES = 2.0
"""Activations between kernels are 16-bit."""

Named = list[tuple[str, Op, str]]


def attention_ops(case: Case, spec: AttentionSpec, batch: Batch, *, masked: bool = True) -> Named:
    """Operators of one attention block on one rank, as (name, operator, category), in order.

    Parameters
    ----------
    case
        Model, cluster and layout.
    spec
        The attention, whole.
    batch
        One micro-batch of one attention replica.
    masked
        A token sees those before it alone; False in an encoder, whose tokens see each other.

    Raises
    ------
    LayoutError
        If heads do not divide over `tp`.
    """
    if spec.kind == "none":
        return []
    if spec.n_heads % case.layout.tp:
        raise LayoutError(
            f"{spec.n_heads} heads do not divide over tp={case.layout.tp}",
            fix=f"try tp={_divisor(spec, case)}",
        )
    if batch.phase != "decode" and (spec.cross or not masked):
        batch = _unmasked(batch)
    build = {"gqa": _gqa, "mla": _mla, "linear": _linear}[spec.kind]
    ops = [("norm", norm(case, batch.n_tokens), "elementwise"), *build(case, spec, batch)]
    n_local_values = spec.n_heads // case.layout.tp * spec.v_head_dim
    ops.append(("o_proj", gemm(case, batch.n_tokens, case.model.hidden, n_local_values), "attention_gemm"))
    return ops


def cross_projection(case: Case, spec: AttentionSpec, batch: Batch) -> Named:
    """Keys and values of the encoder's tokens, made once a prompt for every later decode step."""
    kv_heads = _local_heads(case, spec)[1]
    width = kv_heads * (spec.head_dim + spec.v_head_dim)
    return [("cross_kv_proj", gemm(case, batch.n_tokens, width, case.model.hidden), "attention_gemm")]


def _unmasked(batch: Batch) -> Batch:
    """Batch whose causal (query, key) pairs are the ``n_query * n_context`` of attention without a mask."""
    return replace(batch, n_context=batch.n_context + (batch.n_query - 1) / 2)


def tp_sum(case: Case, n_tokens: FloatArray) -> Named:
    """All-reduce of the residual stream over the attention replica, where it is split."""
    if case.layout.tp == 1:
        return []
    payload = n_tokens * case.model.hidden * ACTIVATION_BYTES
    return [("all_reduce", AllReduce(payload, "tp"), "all_reduce")]


def _divisor(spec: AttentionSpec, case: Case) -> int:
    return max(n for n in range(1, case.layout.tp + 1) if spec.n_heads % n == 0)


def gemm(case: Case, m: FloatArray, n: int, k: int) -> DenseGemm:
    """Product with a weight matrix in the case's format."""
    return DenseGemm(m, n, k, case.weight_dtype)


def norm(case: Case, n_tokens: FloatArray) -> Elementwise:
    """RMS norm with the residual added: two vectors read, two written."""
    return Elementwise(n_tokens * case.model.hidden * 4 * ACTIVATION_BYTES)


def _gqa(case: Case, spec: AttentionSpec, batch: Batch) -> Named:
    heads, kv_heads = _local_heads(case, spec)
    q_width = heads * spec.head_dim * (2 if spec.output_gate else 1)
    # a cross-attention's keys and values were made with the prompt
    fresh_heads = 0 if spec.cross and batch.phase == "decode" else kv_heads
    kv_width = fresh_heads * (spec.head_dim + spec.v_head_dim)
    n_tokens = batch.n_tokens
    rope_bytes = n_tokens * (heads + fresh_heads) * spec.head_dim * 2 * ACTIVATION_BYTES
    return [
        ("qkv_proj", gemm(case, n_tokens, q_width + kv_width, case.model.hidden), "attention_gemm"),
        ("rope", Elementwise(rope_bytes, 1 if spec.qk_norm == "none" else 2), "elementwise"),
        *_cores(case, spec, batch, "gqa", heads, kv_heads, spec.head_dim, spec.v_head_dim),
    ]


def _mla(case: Case, spec: AttentionSpec, batch: Batch) -> Named:
    heads = spec.n_heads // case.layout.tp
    n_tokens, hidden = batch.n_tokens, case.model.hidden
    latent = spec.kv_lora_rank + spec.qk_rope_head_dim
    q_rank = spec.q_lora_rank or 0
    ops: Named = [("qkv_down", gemm(case, n_tokens, q_rank + latent, hidden), "attention_gemm")]
    ops.append(
        ("latent_norm", Elementwise(n_tokens * (q_rank + latent) * 2 * ACTIVATION_BYTES), "elementwise")
    )
    ops.append(("q_up", gemm(case, n_tokens, heads * spec.head_dim, q_rank or hidden), "attention_gemm"))
    ops.append(
        ("rope", Elementwise(n_tokens * heads * spec.qk_rope_head_dim * 2 * ACTIVATION_BYTES), "elementwise")
    )
    if batch.phase == "decode":
        return [*ops, *_absorbed(case, spec, batch, heads)]
    kv_up = heads * (spec.qk_nope_head_dim + spec.v_head_dim)
    # the latents of tokens cached by earlier chunks are decompressed again
    n_latents = batch.n_sequences * batch.n_context
    ops.append(("kv_up", gemm(case, n_latents, kv_up, spec.kv_lora_rank), "attention_gemm"))
    core = _core(case, spec, batch, "mla", heads, heads, spec.head_dim, spec.v_head_dim)
    ops.append(("attention", core, "attention"))
    riding = [] if batch.riders is None else _absorbed(case, spec, batch.riders, heads)
    return [*ops, *((f"riding_{name}", op, category) for name, op, category in riding)]


def _absorbed(case: Case, spec: AttentionSpec, batch: Batch, heads: int) -> Named:
    """Attention of decoding sequences to the latent itself, between two products by head."""
    n_tokens, latent = batch.n_tokens, spec.kv_lora_rank + spec.qk_rope_head_dim
    absorb_q = DenseGemm(n_tokens, spec.kv_lora_rank, spec.qk_nope_head_dim, "bfloat16", batched=heads)
    absorb_v = DenseGemm(n_tokens, spec.v_head_dim, spec.kv_lora_rank, "bfloat16", batched=heads)
    core = _core(case, spec, batch, "mla", heads, 1, latent, spec.kv_lora_rank)
    return [
        ("absorb_q", absorb_q, "attention_gemm"),
        ("attention", core, "attention"),
        ("absorb_v", absorb_v, "attention_gemm"),
    ]


def _linear(case: Case, spec: AttentionSpec, batch: Batch) -> Named:
    """Gated delta net: its state is read and written once a token (decode) or once a chunk of 64.

    Kernels as SGLang launches them: two input products (queries, keys, values and output gate; decay and
    write gates), their split, convolution, the recurrence and the gated norm.
    """
    tp = case.layout.tp
    widths = (spec.q_width + spec.k_width + 2 * spec.v_width) // tp
    n_tokens = batch.n_tokens
    state_bytes = spec.state_elements_per_sequence / tp * 4.0
    n_updates = batch.n_sequences * np.ceil(batch.n_query / 64.0) + batch.n_riding
    moved = n_tokens * widths * 2 * ACTIVATION_BYTES + 2 * state_bytes * n_updates
    return [
        ("qkv_proj", gemm(case, n_tokens, widths, case.model.hidden), "attention_gemm"),
        ("gates_proj", gemm(case, n_tokens, -(-2 * spec.n_heads // tp), case.model.hidden), "attention_gemm"),
        ("conv", Elementwise(n_tokens * widths * 2 * ACTIVATION_BYTES, 2), "elementwise"),
        ("delta_rule", Elementwise(moved, 1 if batch.phase == "decode" else 4), "attention"),
        ("gated_norm", Elementwise(n_tokens * 3 * spec.v_width // tp * ACTIVATION_BYTES), "elementwise"),
    ]


def _cores(
    case: Case,
    spec: AttentionSpec,
    batch: Batch,
    kind: Literal["gqa", "mla"],
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_dim: int,
) -> Named:
    """Attention proper: of the batch, and of the sequences that decode along with it."""
    parts = {"attention": batch, "riding_attention": batch.riders}
    return [
        (name, _core(case, spec, part, kind, heads, kv_heads, head_dim, v_dim), "attention")
        for name, part in parts.items()
        if part is not None
    ]


def _core(
    case: Case,
    spec: AttentionSpec,
    batch: Batch,
    kind: Literal["gqa", "mla"],
    heads: int,
    kv_heads: int,
    head_dim: int,
    v_dim: int,
) -> AttentionPrefill | AttentionDecode:
    batch, window = _seen(spec, batch)
    if batch.phase == "decode":
        return AttentionDecode(
            kind, batch.n_sequences, batch.n_context, heads, kv_heads, head_dim, v_dim, window, case.kv_dtype
        )  # fmt: skip
    return AttentionPrefill(
        kind, batch.n_sequences, batch.n_query, batch.n_context, heads, kv_heads, head_dim, v_dim,
        window, case.kv_dtype,
    )  # fmt: skip


def _seen(spec: AttentionSpec, batch: Batch) -> tuple[Batch, int]:
    """Batch and sliding window that have a kernel's (query, key) pairs.

    Fixed chunks (Llama 4) are sequences of their own; a lone query stands anywhere in its chunk, and sees
    half of it in the mean.
    """
    if not (spec.chunked and spec.window):
        return batch, spec.window
    chunk = float(spec.window)
    n_chunks = np.maximum(batch.n_query / chunk, 1.0)
    query = batch.n_query / n_chunks
    context = np.where(batch.n_context <= chunk, batch.n_context, (chunk + query) / 2)
    return replace(batch, n_sequences=batch.n_sequences * n_chunks, n_query=query, n_context=context), 0


def _local_heads(case: Case, spec: AttentionSpec) -> tuple[int, int]:
    """Query and key-value heads on one rank; key-value heads are copied where `tp` exceeds them."""
    return spec.n_heads // case.layout.tp, max(1, spec.n_kv_heads // case.layout.tp)
