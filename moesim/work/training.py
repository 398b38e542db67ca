"""Backward pass, gradient reduction and optimiser of one training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np

from moesim.work.case import Case, Stage
from moesim.work.memory import TrainingState, rank_elements
from moesim.work.ops import (
    AllGather,
    AllReduce,
    AttentionPrefill,
    Combine,
    DenseGemm,
    Dispatch,
    Elementwise,
    Exchange,
    ExpertFfn,
    Op,
    ReduceScatter,
    Router,
)
from moesim.work.step import Block, Node, Step

__all__ = ["Exchanged", "backward_step", "gradient_ops", "optimizer_op"]


def backward_step(forward: Step, state: TrainingState) -> Step:
    """Operators of the backward pass: the forward's in reverse, gradients of inputs and of weights.

    Notes
    -----
    With full recompute each layer's forward runs once more before its backward; with selective recompute
    only its attention core and expert activation would, which FlashAttention's and the grouped GEMM's
    backward already contain.
    """
    blocks = tuple(_backward_block(block, state) for block in forward.blocks)
    return replace(forward, blocks=blocks, order=tuple(reversed(forward.order)))


def _backward_block(block: Block, state: TrainingState) -> Block:
    again: Sequence[Node] = (
        block.nodes if state.recompute == "full" and block.name in ("moe", "dense") else ()
    )
    reverse = [
        replace(node, name=f"{node.name}.bwd", op=_backward(node.op), after=None)
        for node in reversed(block.nodes)
    ]
    return replace(block, nodes=(*again, *reverse))


def _backward(op: Op) -> Op:
    """What one operator's gradient costs.

    A product has two gradients, each as large as itself; a collective's gradient is its conjugate; a
    dispatch's is a combine of 16-bit gradients, and the other way round.
    """
    match op:
        case DenseGemm():
            return replace(op, n_gemms=2 * op.n_gemms)
        case ExpertFfn() | AttentionPrefill():
            return replace(op, passes="backward")
        case Elementwise():
            return replace(op, moved_bytes=1.5 * op.moved_bytes)
        case Router():
            return replace(op, n_tokens=2 * op.n_tokens)
        case AllGather():
            return ReduceScatter(op.payload_bytes, op.group)
        case ReduceScatter():
            return AllGather(op.payload_bytes, op.group)
        case Dispatch():
            return _turned(op, Combine)
        case Combine():
            return _turned(op, Dispatch)
        case _:
            return op


def _turned(op: Exchange, kind: type[Dispatch] | type[Combine]) -> Dispatch | Combine:
    return kind(
        op.n_tokens, op.received_nvlink, op.sent_nvlink, op.received_nic, op.sent_nic, 2.0 * op.hidden,
        op.hidden, op.top_k, op.n_experts, op.kind, op.group, op.n_sms,
    )  # fmt: skip


class Exchanged(NamedTuple):
    """One exchange among the copies of a stage's weights."""

    name: str
    op: Op
    when: Literal["forward", "backward", "step"]
    """With each micro-batch's forward or backward pass, or once a step."""


def gradient_ops(case: Case, stage: Stage, state: TrainingState) -> list[Exchanged]:
    """Exchanges of one stage's gradients and weights, experts apart: they have `edp` copies, all else `dp`.

    Notes
    -----
    ========  =====================================  ==========================================
    ``zero``  gradients                              weights
    ========  =====================================  ==========================================
    0         all-reduced once a step                whole on every rank
    1         reduce-scattered once a step           gathered once a step, after the optimiser
    2         reduce-scattered after each backward   gathered once a step, after the optimiser
    3         reduce-scattered after each backward   gathered before each forward and backward
    ========  =====================================  ==========================================

    From ZeRO-2 on a rank keeps its share of the gradients alone, so each micro-batch's must be summed before the
    next one's overwrite them; ZeRO-3 frees the weights after each pass (ZeRO, arXiv:1910.02054, sections 5 and 7;
    FSDP, arXiv:2304.11277, sections 3.2.1 and 3.3, without `no_sync`, which would keep whole gradients).
    """
    ops: list[Exchanged] = []
    for name, group, copies in (("dense", "dp", case.layout.dp), ("expert", "edp", case.layout.edp)):
        elements = sum(
            n
            for (part, _), n in rank_elements(case, stage).items()
            if (part == "expert") == (name == "expert")
        )
        if copies < 2 or not elements:
            continue
        grads = np.full((1, 1, 1), elements * state.grad_bytes)
        if state.zero == 0:
            ops.append(Exchanged(f"grad_all_reduce.{name}", AllReduce(grads, group), "step"))
            continue
        scattered, gathered = (
            ReduceScatter(grads, group),
            AllGather(np.full((1, 1, 1), elements * 2.0), group),
        )
        ops.append(
            Exchanged(f"grad_reduce_scatter.{name}", scattered, "backward" if state.zero >= 2 else "step")
        )
        if state.zero == 3:
            ops.append(Exchanged(f"weight_all_gather_forward.{name}", gathered, "forward"))
            ops.append(Exchanged(f"weight_all_gather_backward.{name}", gathered, "backward"))
        else:
            ops.append(Exchanged(f"weight_all_gather.{name}", gathered, "step"))
    return ops


def optimizer_op(case: Case, stage: Stage, state: TrainingState) -> Elementwise:
    """Adam over this rank's share: gradient and 12 bytes of state read, state and weight written."""
    moved = 0.0
    for (part, _), n in rank_elements(case, stage).items():
        copies = case.layout.edp if part == "expert" else case.layout.dp
        cut = copies if state.zero >= 1 else 1
        moved += n * (state.grad_bytes + 2 * state.optimizer_bytes + 2.0) / cut
    return Elementwise(np.full((1, 1, 1), moved), 1)
