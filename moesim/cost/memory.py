"""Bytes that an operator reads and writes in its GPU's memory: each operand once, whatever a cache would save."""

from __future__ import annotations

import numpy as np

from moesim.cost.attention import attention_bytes
from moesim.cost.gemm import product_bytes
from moesim.hardware.gpu import weight_bytes_per_element
from moesim.work.ops import (
    AttentionDecode,
    AttentionPrefill,
    DenseGemm,
    Elementwise,
    Exchange,
    ExpertFfn,
    FloatArray,
    Op,
    Router,
)

__all__ = ["moved_bytes"]

_VALUE_BYTES = 2.0
"""Activations between kernels, in bfloat16."""
_SENT_NEAR, _SENT_FAR, _RECEIVED_NEAR, _RECEIVED_FAR = 1.0, 3.0, 3.0, 1.0
"""Times that a byte of an exchange touches memory. Sent over NVLink: read; over a NIC: also written to a buffer that
the NIC reads. Received over NVLink: written to a buffer, read there, written to its place; over a NIC: written to a
buffer, from which normal kernels forward it. Assumed after the buffers of DeepEP's csrc/kernels/internode.cu."""
_RECEIVED_ALONE = 3.0
"""Received over a NIC by kernels that do not forward (internode_ll.cu)."""


def moved_bytes(op: Op) -> FloatArray:
    """[P, L, R] bytes, or what broadcasts to it; 0 of collectives without an exchange's buffers, and of pauses.

    Parameters
    ----------
    op
        Any operator.

    Notes
    -----
    A backward pass is taken to move twice the bytes of its forward: it reads gradients beside operands.
    """
    match op:
        case DenseGemm():
            return (
                op.n_gemms * op.batched * product_bytes(np.asarray(op.m, dtype=float), op.n, op.k, op.dtype)
            )
        case ExpertFfn():
            return _expert_bytes(op)
        case AttentionPrefill() | AttentionDecode():
            return attention_bytes(op)
        case Elementwise():
            return np.asarray(op.moved_bytes, dtype=np.float64)
        case Router():
            per_token = _VALUE_BYTES * op.hidden + 4.0 * op.n_experts
            return np.asarray(op.n_tokens, dtype=np.float64) * per_token
        case Exchange():
            return _exchange_bytes(op)
        case _:
            return np.zeros((1, 1, 1))


def _expert_bytes(op: ExpertFfn) -> FloatArray:
    rows = np.asarray(op.tokens_per_expert, dtype=np.float64)
    matrices = 3 if op.gated else 2
    weights = matrices * op.hidden * op.intermediate * weight_bytes_per_element(op.dtype)
    # the row in and out; what is between the products is written and read on both sides of the activation
    per_row = _VALUE_BYTES * (2 * op.hidden + 2 * matrices * op.intermediate)
    forward = np.count_nonzero(rows, axis=-1) * weights + rows.sum(axis=-1) * per_row
    return np.asarray(forward * (2.0 if op.passes == "backward" else 1.0))


def _exchange_bytes(op: Exchange) -> FloatArray:
    received_far = _RECEIVED_FAR if op.kind == "normal" else _RECEIVED_ALONE
    near = _SENT_NEAR * op.sent_nvlink + _RECEIVED_NEAR * op.received_nvlink
    far = _SENT_FAR * op.sent_nic + received_far * op.received_nic
    return np.asarray((near + far) * op.token_bytes)
