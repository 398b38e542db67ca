"""Forward pass of one pipeline stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.errors import LayoutError
from moesim.model.spec import LayerSpec
from moesim.work.attention import ACTIVATION_BYTES, Named, attention_ops, cross_projection, tp_sum
from moesim.work.case import Case, Stage
from moesim.work.ffn import ExpertTraffic, dense_ops, expert_ops, head_ops, loss_ops, sequence_cut
from moesim.work.ops import Elementwise, Pause
from moesim.work.step import Batch, Block, Node, Step

__all__ = ["forward_step"]


def forward_step(
    case: Case, batch: Batch, traffic: Sequence[ExpertTraffic], stage: Stage, *, with_host: bool = True
) -> Step:
    """Operators of one stage's forward pass, layer by layer.

    Parameters
    ----------
    case
        Model, cluster and layout.
    batch
        What each attention replica is given.
    traffic
        One entry per micro-batch, over the MoE layers of this stage; empty for a dense model. Two
        entries run as two overlapping micro-batches of half of `batch` each.
    stage
        Which layers, and whether embedding and head are among them.
    with_host
        Book the host's share of a step in the first stage.

    Raises
    ------
    LayoutError
        If heads do not divide over `tp`, or an overlap is asked of a single micro-batch.
    """
    n_micro = max(1, len(traffic))
    if n_micro > 2:
        raise LayoutError("at most two micro-batches overlap", value=n_micro)
    micros = [batch.share(1 / n_micro) for _ in range(n_micro)]
    blocks: list[Block] = []
    order: list[tuple[int, int]] = []
    if stage.first:
        blocks.append(_embedding(case, micros, with_host))
        order.append((0, 0))
    _append_layers(case, micros, traffic, stage, blocks, order)
    if stage.last:
        blocks.append(_head(case, micros))
        order.append((len(blocks) - 1, 0))
    return Step(tuple(blocks), tuple(order), batch.n_points, case.layout.group_ranks)


def _append_layers(
    case: Case, micros: list[Batch], traffic: Sequence[ExpertTraffic], stage: Stage,
    blocks: list[Block], order: list[tuple[int, int]],
) -> None:  # fmt: skip
    """Group the stage's layers by kind, one block a kind, and note the order of their repeats."""
    roles = _running_roles(case, micros[0].phase)
    running = [i for i in stage.layers if case.layer(i).role in roles]
    moe_rank = {
        layer: row for row, layer in enumerate(i for i in stage.layers if case.layer(i).moe is not None)
    }
    kinds: dict[int, list[int]] = {}
    for index in running:
        kinds.setdefault(case.model.kind_of_layer[index], []).append(index)
    places: dict[int, tuple[int, int]] = {}
    for kind, layers in kinds.items():
        spec = case.model.kinds[kind]
        places |= {layer: (len(blocks), repeat) for repeat, layer in enumerate(layers)}
        rows = [moe_rank[i] for i in layers if i in moe_rank]
        own = [one.of_layers(rows) for one in traffic] if spec.moe is not None else []
        nodes = _layer_nodes(case, spec, micros, own)
        blocks.append(Block("moe" if spec.moe else "dense", tuple(layers), nodes))
    order += [places[i] for i in running]
    if "decoder" not in roles:
        _append_projections(case, micros, stage, blocks, order)


def _running_roles(case: Case, phase: str) -> tuple[str, ...]:
    """An encoder reads the prompt, once; then its decoder runs in every decode step. Training runs both."""
    if phase == "decode":
        return ("decoder",)
    encodes = any(layer.role == "encoder" for layer in case.model.layers)
    return ("encoder",) if encodes and phase == "prefill" else ("encoder", "decoder")


def _append_projections(
    case: Case, micros: list[Batch], stage: Stage, blocks: list[Block], order: list[tuple[int, int]]
) -> None:
    """What a prompt costs in a decoder that has an encoder: the keys and values of its cross-attentions."""
    cross = {i: case.layer(i).cross_attention for i in stage.layers}
    kinds = {
        spec: [i for i, one in cross.items() if one == spec] for spec in cross.values() if spec is not None
    }
    for spec, layers in kinds.items():
        order += [(len(blocks), repeat) for repeat in range(len(layers))]
        nodes = [n for m, one in enumerate(micros) for n in _named(cross_projection(case, spec, one), m)]
        blocks.append(Block("cross", tuple(layers), tuple(nodes)))


def _named(
    ops: Named, micro: int, stream: str = "compute", after: tuple[str, ...] | None = None
) -> list[Node]:
    """Nodes of one part; only the first has `after`, the rest follow one another."""
    nodes: list[Node] = []
    for name, op, category in ops:
        nodes.append(Node(f"{name}.{micro}", op, category, stream, None if nodes else after, micro))
    return nodes


def _before_experts(case: Case, spec: LayerSpec, batch: Batch) -> Named:
    ops = attention_ops(case, spec.attention, batch, masked=spec.role == "decoder")
    if spec.cross_attention is not None:
        ops = [*ops, *tp_sum(case, batch.n_tokens)]
        ops += [(f"cross_{n}", op, c) for n, op, c in attention_ops(case, spec.cross_attention, batch)]
    return ops


def _layer_nodes(
    case: Case, spec: LayerSpec, micros: list[Batch], traffic: list[ExpertTraffic]
) -> tuple[Node, ...]:
    if spec.moe is None:
        return tuple(
            node
            for micro, batch in enumerate(micros)
            for node in _named(
                [
                    *_before_experts(case, spec, batch),
                    *_renamed("attention_", tp_sum(case, batch.n_tokens)),
                    *dense_ops(case, spec, batch.n_tokens),
                ],
                micro,
            )
        )
    heads, tails = [], []
    for micro, (batch, one) in enumerate(zip(micros, traffic, strict=True)):
        head, tail = _moe_nodes(case, spec, batch, one, micro)
        heads.append(head)
        tails.append(tail)
    return tuple(node for part in (*heads, *tails) for node in part)


def _renamed(prefix: str, ops: Named) -> Named:
    return [(prefix + name, op, category) for name, op, category in ops]


def _moe_nodes(
    case: Case, spec: LayerSpec, batch: Batch, traffic: ExpertTraffic, micro: int
) -> tuple[list[Node], list[Node]]:
    """Attention to dispatch, and shared experts to combine: two-batch overlap puts the other's between."""
    if spec.moe is None:
        raise LayoutError("the layer has no experts")
    gate, out, shared, experts, back = expert_ops(case, spec.moe, batch.n_tokens, traffic)
    head = _named([*_before_experts(case, spec, batch), *sequence_cut(case, batch.n_tokens), *gate], micro)
    chosen = head[-1].name
    sent = _named(out, micro, "comm", (chosen,))
    own = _named(shared, micro, "compute", (chosen,))
    # without overlap the shared experts run before the tokens leave, so that the chain has no gap to hide in
    if case.overlap == "none":
        sent = [
            replace(node, after=(own[-1].name,)) if own and i == 0 else node for i, node in enumerate(sent)
        ]
        head, own = head + own, []
    ready = sent[-1].name if sent else head[-1].name
    work = _named(experts, micro, "compute", (ready,))
    stream = "compute" if case.dispatch == "allreduce" else "comm"
    home = _named(back, micro, stream, (work[-1].name,))
    return head + sent, own + work + home


def _embedding(case: Case, micros: list[Batch], with_host: bool) -> Block:
    nodes: list[Node] = []
    if with_host:
        total = sum((m.n_rows_out for m in micros), np.zeros(1))
        nodes.append(Node("host.0", Pause("host", total), "host"))
    for micro, batch in enumerate(micros):
        moved = batch.n_tokens * case.model.hidden * 2 * ACTIVATION_BYTES
        # rows of the vocabulary are split over the replica, so one sum joins them
        summed = _renamed("embedding_", tp_sum(case, batch.n_tokens))
        nodes += _named([("embedding", Elementwise(moved), "elementwise"), *summed], micro)
    return Block("embedding", (-1,), tuple(nodes))


def _head(case: Case, micros: list[Batch]) -> Block:
    nodes: list[Node] = []
    for micro, batch in enumerate(micros):
        ops = loss_ops(case, batch.n_tokens) if batch.phase == "train" else head_ops(case, batch.n_rows_out)
        nodes += _named(ops, micro)
    return Block("head", (case.model.n_layers,), tuple(nodes))
