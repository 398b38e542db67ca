"""Small cases that the tests of `moesim.work`, the engine's programs and the planner share."""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.cost.backend import backend_of
from moesim.hardware import Cluster, load_cluster
from moesim.model import ModelSpec, layer_weights, load_model
from moesim.plan.context import Choice, Context
from moesim.routing import SyntheticRouting
from moesim.scenario.layout import ModelFacts, check_layout
from moesim.work.case import Case, Layout, Stage
from moesim.work.forward import forward_step
from moesim.work.ops import DenseGemm, ExpertFfn, Op, Router
from moesim.work.step import Batch, Step


@cache
def context_of(model: str, routing: str = "uniform", backend: str = "sglang") -> Context:
    spec = load_model(model)
    source = SyntheticRouting.uniform() if routing == "uniform" else SyntheticRouting.zipf(1.0)
    return Context(
        spec, source, backend_of(backend), spec.weight_dtype, spec.expert_dtype, "bfloat16", max_drawn_tokens=256
    )  # fmt: skip


@cache
def h200(nodes: int = 16) -> Cluster:
    return load_cluster("dgx-h200", nodes=nodes)


def checked(model: ModelSpec, layout: Layout) -> Layout:
    """The layout, or LayoutError."""
    attention = max((layer.attention for layer in model.layers), key=lambda one: one.n_heads)
    moe = model.moe
    facts = ModelFacts(
        model.n_layers,
        attention.n_heads,
        attention.n_kv_heads,
        moe.n_experts if moe else 0,
        moe.intermediate if moe else 0,
    )
    check_layout(layout, facts, layout.n_ranks)
    return layout


def case_of(model: str, layout: Layout, phase: str, choice: Choice | None = None, **context: str) -> Case:
    made = context_of(model, **context)
    return made.case(h200(), checked(made.model, layout), choice or Choice(), phase)


def whole(case: Case) -> Stage:
    return Stage(0, tuple(range(case.model.n_layers)), first=True, last=True)


def step_of(case: Case, batch: Batch, **context: str) -> Step:
    """One forward pass through all layers."""
    made = context_of(case.model.name, **context)
    overlapped = 2 if case.overlap == "two-batch" else 1
    traffic = []
    if case.model.is_moe:
        tokens = batch.n_tokens[:, 0, 0] / overlapped
        traffic = [made.traffic.traffic(case, batch.phase, [float(n) for n in tokens])] * overlapped
    return forward_step(case, batch, traffic, whole(case), with_host=batch.phase != "train")


def op_flops(op: Op) -> np.ndarray | float:
    """Multiply-adds of the products with weights, twice; by point, layer and rank."""
    match op:
        case DenseGemm():
            return 2.0 * op.m * op.n * op.k * op.n_gemms * op.batched
        case Router():
            return 2.0 * op.n_tokens * op.hidden * op.n_experts
        case ExpertFfn():
            matrices = (3 if op.gated else 2) * (1 if op.passes == "forward" else 2)
            return 2.0 * op.tokens_per_expert.sum(-1) * op.hidden * op.intermediate * matrices
        case _:
            return 0.0


def step_flops(step: Step) -> np.ndarray:
    """(n_points,) of all layers and all ranks of the group."""
    total = np.zeros(step.n_points)
    for block in step.blocks:
        shape = (step.n_points, len(block.layers), step.n_ranks)
        for node in block.nodes:
            total += np.broadcast_to(op_flops(node.op), shape).sum(axis=(1, 2))
    return total


def weight_flops_per_token(case: Case) -> float:
    """Twice the matrices that a token meets, counted from the list of weights, copies of a layout included."""
    model, tp = case.model, case.layout.tp
    copied_router = tp if case.dispatch == "allreduce" else 1
    total = 2.0 * model.hidden * -(-model.vocab // tp) * tp
    for layer in model.layers:
        for name, weight in layer_weights(layer, model.hidden).items():
            block, _, matrix = name.partition(".")
            if len(weight.shape) < 2 or matrix in ("conv", "scale"):
                continue
            copies = 1.0
            if block in ("attention", "cross_attention"):
                spec = layer.attention if block == "attention" else layer.cross_attention
                if spec.kind == "mla" and matrix in ("q_a", "kv_a"):
                    copies = tp
                if spec.kind == "gqa" and matrix in ("k", "v"):
                    copies = max(1.0, tp / spec.n_kv_heads)
            if block == "router":
                copies = copied_router
            total += 2.0 * weight.n_active * copies
    return total
