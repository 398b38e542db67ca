"""What it costs to follow the load: experts' weights that change ranks when a new placement takes over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moesim.network.collectives import send_recv_s
from moesim.plan.context import Context
from moesim.plan.outcome import Outcome
from moesim.routing import Moved, Placement, aligned, inclusion, moved_experts, rebalanced
from moesim.work.case import Case, Stage
from moesim.work.memory import weight_bytes

__all__ = ["moving_row"]


def moving_row(context: Context, outcome: Outcome, point: int) -> dict[str, Any] | None:
    """Cost of one change of placement, spread over the steps until the next; None where none is asked for.

    Parameters
    ----------
    context
        With the routing that placements were made from, and the steps between two.
    outcome, point
        Which layout, and the size whose step it is spread over.

    Notes
    -----
    The placement made from `placement_trace` gives way to one made from the routing that is priced. Ranks stand
    still while NCCL sends the weights, all pipeline stages at once, each rank's messages one after another at its
    links, both levels at once, as vLLM's and SGLang's balancers do by default; engines that copy behind the
    computation hide some of it.
    """
    case = outcome.case
    every = context.rebalance_every
    if every is None or not case.model.is_moe or case.layout.ep == 1:
        return None
    maker = context.traffic
    domain = max(1, case.cluster.near_ranks // case.layout.etp)
    old = maker.placement(case.layout, domain)
    per_domain = min(domain, case.layout.ep)
    new = _next(context, case, old, domain)
    size = _expert_bytes(case)
    stages = [
        moved_experts(_of_stage(case, old, stage), _of_stage(case, new, stage), ranks_per_domain=per_domain)
        for stage in case.stages
        if _moe_rows(case, stage)
    ]
    transfer_s = max(_transfer_s(context, case, moved, size) for moved in stages)
    return {
        "every_steps": every,
        "moved_fraction": moved_experts(old, new, ranks_per_domain=per_domain).fraction,
        "busiest_rank_bytes": max(float((one.received_near + one.received_far).max()) for one in stages)
        * size,
        "transfer_s": transfer_s,
        "step_share": transfer_s / (every * float(outcome.step_s[point])),
    }


def _moe_rows(case: Case, stage: Stage) -> list[int]:
    """Which of the model's MoE layers a stage holds, as a placement numbers them."""
    return [row for row, layer in enumerate(case.model.moe_layers) if layer in stage.layers]


def _of_stage(case: Case, placement: Placement, stage: Stage) -> Placement:
    """The placement of a stage's layers alone."""
    table = placement.slot_to_expert
    if len(table) == 1:
        table = np.broadcast_to(table, (len(case.model.moe_layers), table.shape[1]))
    return replace(placement, slot_to_expert=np.ascontiguousarray(table[_moe_rows(case, stage)]))


def _transfer_s(context: Context, case: Case, moved: Moved, size: float) -> float:
    """Time of the rank that moves longest."""
    params = context.pricer(case, "decode").network
    near, far = (
        send_recv_s(np.maximum(sent, got) * size, same_domain=same, cluster=case.cluster, params=params)
        for sent, got, same in (
            (moved.sent_near, moved.received_near, True),
            (moved.sent_far, moved.received_far, False),
        )
    )
    moves = np.maximum(np.where(moved.received_near + moved.sent_near > 0, near, 0.0),
                       np.where(moved.received_far + moved.sent_far > 0, far, 0.0))  # fmt: skip
    return float(moves.max())


def _next(context: Context, case: Case, old: Placement, domain: int) -> Placement:
    """The placement that takes over: a few moves for `balanced`, as made anew for the others."""
    maker = context.traffic
    if case.layout.placement == "balanced":
        return rebalanced(old, inclusion(maker.source, maker.shape))
    new = maker.placement(case.layout, domain, maker.source)
    return (
        aligned(old, new, ranks_per_domain=min(domain, case.layout.ep))
        if case.layout.placement == "coactivation"
        else new
    )


def _expert_bytes(case: Case) -> float:
    """Weights of one slot on one rank, in one layer [bytes]."""
    layers = tuple(range(case.model.n_layers))
    whole = weight_bytes(case, Stage(0, layers, first=True, last=True))["weights_experts"]
    moe = case.model.moe
    slots = -(-((moe.n_experts if moe else 1) + case.layout.redundant_experts) // case.layout.ep)
    return whole / (len(case.model.moe_layers) * slots)
