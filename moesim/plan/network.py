"""The collectives of one layer: what the links make of them, with routing even, real, and re-balanced."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.errors import LayoutError, ScenarioError, TrafficError
from moesim.hardware.cluster import Cluster
from moesim.network import NetworkParams, Topology
from moesim.network.choice import DispatchChoice
from moesim.network.explain import Busiest, Explanation, explain
from moesim.network.playing import Played
from moesim.network.shared_links import (
    CollectiveFluid,
    ExchangeCall,
    ExchangeFluid,
    collective_fluid,
    exchange_fluid,
)
from moesim.network.transfers import evened
from moesim.plan.context import Context
from moesim.plan.exchanges import one_layer
from moesim.plan.outcome import cluster_row, layout_row
from moesim.plan.run import layout_of
from moesim.plan.space import choices_of
from moesim.routing import Phase, Placement, Traffic, count_batch, draw_batch, inclusion
from moesim.scenario.schema import Scenario
from moesim.scenario.workload import DecodeWorkload, PrefillWorkload, ServeWorkload
from moesim.work.case import Case, Layout
from moesim.work.ops import FloatArray

__all__ = ["NetworkAnswer", "NetworkView", "network_answer"]

MAX_DRAWN = 32_768
"""Tokens drawn for one group; a larger batch is these, scaled."""
ACTIVATION_BYTES = 2.0
EVEN = "evenly spread"


@dataclass(frozen=True, eq=False)
class NetworkView:
    """One collective, for a figure."""

    title: str
    played: Played
    pair_bytes: FloatArray | None
    """(n_ranks, n_ranks) ``[source, target]`` bytes of token copies; None where the collective has none."""


@dataclass(frozen=True, eq=False)
class NetworkAnswer:
    """What `moesim network` tells."""

    told: dict[str, Any]
    """As ``--json`` prints it."""
    views: tuple[NetworkView, ...]
    """Collectives in the order of ``told``."""


def network_answer(scenario: Scenario, *, layer: int | None = None) -> NetworkAnswer:
    """Solve one layer's collectives over the links of a scenario's cluster.

    Parameters
    ----------
    scenario
        One layout on one cluster; of serving, its decode steps.
    layer
        Number of an MoE layer of the model; the one of median imbalance where left out.

    Raises
    ------
    MoesimError
        If a key has several values, the layout does not divide, the layer has no experts, or links are missing.
    """
    one = _Setting.of(scenario.single())
    if one.dispatch.kind in ("low-latency", "normal", "nccl") and one.context.model.is_moe:
        told, solved = _exchanges(one, layer)
    else:
        told, solved = _collectives(one)
    rows = [
        {"collective": name, "routing": routing, **_row(explain(fluid))} for name, routing, fluid, _ in solved
    ]
    views = tuple(
        NetworkView(f"{name}, {routing}" if routing else name, fluid.played, pairs)
        for name, routing, fluid, pairs in solved
    )
    return NetworkAnswer({**one.told(), **told, "collectives": rows}, views)


Solved = tuple[str, str, ExchangeFluid | CollectiveFluid, FloatArray | None]
"""Collective, routing, its solution, bytes between ranks."""


@dataclass(frozen=True, eq=False)
class _Setting:
    """One layout with its choices made."""

    name: str
    context: Context
    case: Case
    dispatch: DispatchChoice
    phase: str
    replica_tokens: float
    """Tokens of one attention replica in one exchange."""
    topology: Topology
    params: NetworkParams

    @classmethod
    def of(cls, scenario: Scenario) -> _Setting:
        context = Context.of(scenario)
        (cluster,) = scenario.cluster.clusters()
        layout = layout_of(scenario, context, cluster)
        (choice,) = choices_of(scenario.policy, plan=False, exchanges=True)
        phase, tokens = _tokens(scenario, layout)
        case = context.case(cluster, layout, choice, phase)
        if layout.n_ranks > cluster.n_gpus:
            raise TrafficError(
                f"the layout has {layout.n_ranks} ranks", value=cluster.n_gpus, fix="more GPUs"
            )
        return cls(
            scenario.model,
            context,
            case,
            context.dispatch(cluster, layout, choice.dispatch, phase),
            phase,
            tokens / 2 if case.overlap == "two-batch" else tokens,
            Topology(cluster),
            NetworkParams.from_profile(context.profile(cluster)),
        )

    @property
    def cluster(self) -> Cluster:
        return self.case.cluster

    @property
    def rank_tokens(self) -> float:
        """Tokens of one rank of an expert group, shards counted as one."""
        return self.replica_tokens * self.case.layout.etp / self.case.layout.tp

    def told(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "cluster": cluster_row(self.cluster, self.case.layout),
            "layout": layout_row(self.case.layout),
            "phase": self.phase,
            "dispatch": {
                "kind": self.dispatch.kind,
                "why": self.dispatch.why,
                "library": self.dispatch.library,
            },
            "tokens_per_rank": self.replica_tokens / self.case.layout.tp,
            "routing": self.context.source_name,
        }


def _tokens(scenario: Scenario, layout: Layout) -> tuple[str, float]:
    """Phase, and tokens of one attention replica in one step of it."""
    work = scenario.workload
    if isinstance(work, PrefillWorkload):
        return "prefill", float(work.tokens_per_rank.values[0])
    if isinstance(work, DecodeWorkload):
        return "decode", float(work.batch_per_rank.values[0])
    if isinstance(work, ServeWorkload):
        if work.batch_per_rank is not None:
            return "decode", float(work.batch_per_rank.values[0])
        running = work.concurrency.values[0] if work.concurrency is not None else 1
        return "decode", float(running) / layout.dp
    return "train", float(work.micro_batch.values[0] * work.sequence.values[0])


def _exchanges(one: _Setting, layer: int | None) -> tuple[dict[str, Any], list[Solved]]:
    layout, cluster = one.case.layout, one.cluster
    per_domain = min(max(1, cluster.near_ranks // layout.etp), layout.ep)
    row = _layer_row(one, layer, per_domain)
    ids = _drawn(one, row)
    placed = _traffic(ids, one.context.traffic.placement(layout, per_domain), row, per_domain, one)
    routings = [(EVEN, evened(placed, ranks_per_domain=per_domain))]
    for name, placement in _placements(one, per_domain).items():
        routings.append((name, _traffic(ids, placement, row, per_domain, one)))
    solved: list[Solved] = []
    for combine in (False, True):
        call = _call(one, combine)
        gpus = np.arange(layout.ep) * layout.etp
        for name, traffic in routings:
            fluid = exchange_fluid(call, traffic, topology=one.topology, params=one.params, ranks=gpus)
            counted = traffic.copies_per_rank if call.kind == "normal" else traffic.assignments
            pairs = np.asarray(counted * call.token_bytes * ~np.eye(layout.ep, dtype=bool), dtype=np.float64)
            solved.append(("combine" if combine else "dispatch", name, fluid, pairs.T if combine else pairs))
    told = {
        "layer": int(one.context.model.moe_layers[row]),
        "copy_bytes": {"dispatch": _call(one, False).token_bytes, "combine": _call(one, True).token_bytes},
    }
    return told, solved


def _placements(one: _Setting, per_domain: int) -> dict[str, Placement]:
    """The plain placement, the scenario's own, and EPLB with its redundant experts, or with one more slot a rank."""
    own = one.case.layout
    wanted = [
        replace(own, placement="contiguous", redundant_experts=0),
        own,
        replace(own, placement="eplb", redundant_experts=own.redundant_experts or own.ep),
    ]
    found: dict[str, Placement] = {}
    for layout in wanted:
        # as many more slots may not divide: then there is nothing to compare with
        with suppress(LayoutError) if layout != own else nullcontext():
            found[_placement_name(layout)] = one.context.traffic.placement(layout, per_domain)
    return found


def _placement_name(layout: Layout) -> str:
    extra = f" +{layout.redundant_experts}" if layout.redundant_experts else ""
    return f"as routed, {layout.placement}{extra}"


def _call(one: _Setting, combine: bool) -> ExchangeCall:
    model, moe = one.context.model, one.context.model.moe
    if moe is None or one.dispatch.kind not in ("low-latency", "normal", "nccl"):
        raise ScenarioError("exchanges no tokens", value=one.dispatch.kind)
    value_bytes = ACTIVATION_BYTES if combine else one.case.dispatch_bytes_per_value
    tokens = one.replica_tokens / one.case.layout.tp
    sizes = (model.hidden, moe.top_k, moe.n_experts, model.hidden * value_bytes)
    return ExchangeCall(one.dispatch.kind, combine, tokens, *sizes)


def _layer_row(one: _Setting, layer: int | None, per_domain: int) -> int:
    """Row of the MoE layer asked for, or of the one whose busiest rank is the median over layers."""
    layers = list(one.context.model.moe_layers)
    if layer is not None:
        if layer not in layers:
            raise ScenarioError(
                f"{one.name} has experts in layers {layers[0]} to {layers[-1]}", value=layer, place="--layer"
            )
        return layers.index(layer)
    made = one.context.traffic
    load = made.placement(one.case.layout, per_domain).rank_load(inclusion(made.source, made.shape))
    return int(np.argsort(load.max(axis=-1) / load.mean(axis=-1), kind="stable")[len(layers) // 2])


def _drawn(one: _Setting, row: int) -> np.ndarray:
    """(1, ep, tokens, top_k) experts of one layer."""
    made, ep = one.context.traffic, one.case.layout.ep
    n_tokens = int(np.clip(np.ceil(one.rank_tokens - 1e-9), 1, max(1, MAX_DRAWN // ep)))
    phase: Phase = "decode" if one.phase == "decode" else "prefill"
    rng = np.random.default_rng([made.seed, ep])
    ids = draw_batch(made.source, made.shape, n_ranks=ep, n_tokens=n_tokens, phase=phase, rng=rng)
    return np.asarray(ids[row : row + 1])


def _traffic(ids: np.ndarray, placement: Placement, row: int, per_domain: int, one: _Setting) -> Traffic:
    """Copies of one shard of the experts, scaled from the tokens drawn to those there are."""
    table = placement.slot_to_expert
    here = replace(placement, slot_to_expert=table[row : row + 1]) if len(table) > 1 else placement
    drawn = count_batch(ids, here, ranks_per_domain=per_domain).traffic
    return one_layer(drawn, 0, one.rank_tokens / ids.shape[2] / one.case.layout.etp)


def _collectives(one: _Setting) -> tuple[dict[str, Any], list[Solved]]:
    """Collectives of a layer that exchanges no tokens: sums over a replica, or a gather and its mirror."""
    layout, hidden = one.case.layout, one.context.model.hidden
    values = one.replica_tokens * hidden
    asked: list[tuple[str, str, float, int]] = []
    if layout.tp > 1:
        asked.append(("all-reduce", "all_reduce", values * ACTIVATION_BYTES, layout.tp))
    if one.dispatch.kind == "allgather":
        whole = values * layout.group_dp
        asked = [
            (
                "dispatch, all-gather",
                "all_gather",
                whole * one.case.dispatch_bytes_per_value,
                layout.group_ranks,
            ),
            ("combine, reduce-scatter", "reduce_scatter", whole * ACTIVATION_BYTES, layout.group_ranks),
        ]
    if not asked:
        raise ScenarioError(
            "one rank runs a whole layer: nothing is sent",
            value="tp=1, ep=1",
            fix="layout.ep or layout.tp above 1",
        )
    solved: list[Solved] = [
        (
            name,
            "",
            collective_fluid(op, size, topology=one.topology, params=one.params, ranks=np.arange(n)),
            None,
        )
        for name, op, size, n in asked
    ]
    return {"layer": None, "copy_bytes": None}, solved


def _row(told: Explanation) -> dict[str, Any]:
    return {
        "time_s": told.total_s,
        "port_bound_s": told.port_bound_s,
        "gap": told.gap,
        "bound": told.bound,
        "link": _link(told.link) if told.link else None,
        "margin": told.margin,
        "by_kind": {kind: _link(one) for kind, one in told.by_kind.items()},
        "parts_s": dict(told.parts_s),
        "doubled_s": dict(told.doubled_s),
        "n_sms": told.n_sms,
        "beside_compute_s": told.beside_s,
        "compute_stretch": told.compute_stretch,
        "gain": {kind: told.gain(kind) for kind in told.doubled_s},
    }


def _link(one: Busiest) -> dict[str, Any]:
    return {
        "name": one.name, "kind": one.kind, "load_bytes": one.load_bytes, "alone_s": one.alone_s,
        "utilisation": one.utilisation,
    }  # fmt: skip
