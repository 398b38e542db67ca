"""Every layout of a model on a cluster, and why the others are none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from moesim.errors import LayoutError
from moesim.hardware.cluster import Cluster
from moesim.model.spec import ModelSpec
from moesim.plan.context import Choice
from moesim.plan.outcome import layout_row
from moesim.routing.capacity import CapacityPolicy
from moesim.scenario.layout import LayoutSizes, ModelFacts, check_layout
from moesim.scenario.schema import LayoutChoice, Policy
from moesim.work.case import Layout

__all__ = ["Refused", "Space", "check_sizes", "choices_of", "enumerate_layouts", "facts_of"]

MOST_SHARDS = 8
"""Largest `etp` and `tp` tried unasked: past a node's NVLink domain every layer's sums cross the network."""


@dataclass(frozen=True)
class Refused:
    """A layout that is out, and why."""

    layout: dict[str, Any]
    kind: str
    """``divisibility``, ``memory``, ``target``, or ``dominated`` (behind a bound, and not priced)."""
    reason: str
    batch_per_rank: float | None = None
    """Size at which it came closest; None where none was tried."""
    cluster: dict[str, Any] | None = None
    memory_bytes: dict[str, float] | None = None
    """By item, where it was memory that failed."""

    def row(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "layout": self.layout,
            "cluster": self.cluster,
            "batch_per_rank": self.batch_per_rank,
            "kind": self.kind,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Space:
    """Layouts that divide, and those that do not."""

    layouts: tuple[Layout, ...]
    refused: tuple[Refused, ...]


def facts_of(model: ModelSpec) -> ModelFacts:
    """What of a model decides whether a layout divides."""
    attention = next(
        (layer.attention for layer in model.layers if layer.attention.kind in ("gqa", "mla")), None
    )
    moe = model.moe
    return ModelFacts(
        n_layers=model.n_layers,
        n_heads=attention.n_heads if attention else 1,
        n_kv_heads=attention.n_kv_heads if attention else 1,
        n_experts=moe.n_experts if moe else 0,
        expert_width=moe.intermediate if moe else 0,
    )


def enumerate_layouts(
    model: ModelSpec, cluster: Cluster, choice: LayoutChoice, *, train: bool = False
) -> Space:
    """Layouts that fill the cluster; keys left out take every value.

    Parameters
    ----------
    model
        Heads, experts and layers to divide.
    cluster
        GPUs to fill.
    choice
        What the scenario fixes.
    train
        Redundant experts are not tried: their gradients would have to be joined.

    Notes
    -----
    Left out, `tp` takes powers of two up to `MOST_SHARDS` (or the NVLink domain, if larger), `pp` powers of
    two that leave a stage at least one layer, `ep` every divisor of a stage's ranks that makes groups of
    whole attention replicas, `etp` what cuts an attention replica's experts both ways, redundant experts
    none or one more slot per rank.
    """
    facts = facts_of(model)
    kept: dict[Layout, None] = {}
    refused: list[Refused] = []
    for sizes in _candidates(facts, cluster, choice, train):
        try:
            check_sizes(sizes, facts, cluster.n_gpus)
            kept[Layout(**vars(sizes))] = None
        except LayoutError as error:
            fix = f"; fix: {error.fix}" if error.fix else ""
            refused.append(Refused(layout_row(Layout(**vars(sizes))), "divisibility", f"{error.rule}{fix}"))
    return Space(tuple(kept), tuple(refused))


def check_sizes(sizes: LayoutSizes, facts: ModelFacts, n_gpus: int) -> None:
    """Refuse a layout that does not divide, or whose expert groups are no whole attention replicas.

    Raises
    ------
    LayoutError
        With the first rule broken, and a value that keeps it.
    """
    check_layout(sizes, facts, n_gpus)
    if facts.n_experts and (sizes.ep * sizes.etp) % sizes.tp:
        raise LayoutError(
            f"ep x etp = {sizes.ep * sizes.etp} ranks hold the experts of tp = {sizes.tp} ranks' tokens",
            value=f"ep={sizes.ep} etp={sizes.etp}",
            fix=f"try ep={sizes.tp} etp=1, or ep=1 etp={sizes.tp}",
        )


def _candidates(
    facts: ModelFacts, cluster: Cluster, choice: LayoutChoice, train: bool
) -> Iterator[LayoutSizes]:
    n_gpus = cluster.n_gpus
    most = max(MOST_SHARDS, min(cluster.scale_up_ranks, 16))
    tps = _values(choice.tp, _powers(min(most, n_gpus)))
    pps = _values(choice.pp, [p for p in _powers(n_gpus) if p <= facts.n_layers])
    for tp, pp in product(tps, pps):
        stage = n_gpus // pp if choice.dp is None else 0
        for dp in _values(choice.dp, [max(1, stage // tp)]):
            yield from _with_experts(facts, choice, train, tp, dp, pp, most)


def _with_experts(
    facts: ModelFacts, choice: LayoutChoice, train: bool, tp: int, dp: int, pp: int, most: int
) -> Iterator[LayoutSizes]:
    if not facts.n_experts:
        yield LayoutSizes(tp=tp, dp=dp, pp=pp)
        return
    ranks = tp * dp
    for etp in _values(choice.etp, [n for n in _powers(min(most, ranks)) if tp % n == 0]):
        eps = _values(choice.ep, _expert_ranks(ranks, tp, etp, asked=choice.etp is not None))
        for ep in eps:
            for extra in _values(choice.redundant_experts, _redundant(facts, ep, train)):
                placements = [*choice.placement] if choice.placement else ["eplb" if extra else "contiguous"]
                for placement in placements:
                    yield LayoutSizes(tp, dp, ep, pp, etp, extra, placement)


def _expert_ranks(ranks: int, tp: int, etp: int, *, asked: bool) -> list[int]:
    """Values of `ep` that make groups of whole attention replicas; sharded experts, unasked, inside one."""
    whole = [ep for ep in _divisors(max(1, ranks // etp)) if (ep * etp) % tp == 0]
    return whole if etp == 1 or asked else [ep for ep in whole if ep * etp == tp]


def _redundant(facts: ModelFacts, ep: int, train: bool) -> list[int]:
    fill = -facts.n_experts % ep
    if train or ep == 1:
        return [0]
    return [fill] if fill else [0, ep]


def _values(given: Any, default: list[int]) -> list[int]:
    return default if given is None else list(given)


def _powers(limit: int) -> list[int]:
    return [1 << k for k in range(limit.bit_length()) if 1 << k <= limit]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def choices_of(policy: Policy, *, plan: bool, exchanges: bool) -> list[Choice]:
    """Dispatch, overlap and capacity to try with one layout.

    Two-batch overlap is tried unasked only where tokens are exchanged.
    """
    overlaps = (
        list(policy.overlap)
        if policy.overlap
        else (["none", "two-batch"] if plan and exchanges else ["none"])
    )
    return [
        Choice(dispatch, overlap, capacity)  # type: ignore[arg-type]
        for dispatch, overlap, capacity in product(policy.dispatch, overlaps, _capacities(policy))
    ]


def _capacities(policy: Policy) -> list[CapacityPolicy | None]:
    """Every capacity asked for; without a factor the other keys say nothing, so dropless is there once."""
    rest = (policy.capacity_convention, policy.overflow, policy.padding, policy.router)
    found: dict[CapacityPolicy | None, None] = {}
    for factor, convention, overflow, padding, router in product(policy.capacity_factor, *rest):
        given = None if factor is None else CapacityPolicy(factor, convention, overflow, padding, router)  # type: ignore[arg-type]
        found[given] = None
    return list(found)
