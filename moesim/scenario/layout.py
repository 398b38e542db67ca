"""Which layouts are possible: the rules that ranks, experts, heads and layers must divide by."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from moesim.errors import LayoutError

__all__ = ["LayoutSizes", "ModelFacts", "check_layout"]


@dataclass(frozen=True)
class LayoutSizes:
    """One layout, every size given."""

    tp: int = 1
    """Ranks that share one attention replica."""
    dp: int = 1
    """Attention replicas in one pipeline stage."""
    ep: int = 1
    """Ranks that share one layer's routed experts."""
    pp: int = 1
    """Pipeline stages."""
    etp: int = 1
    """Ranks that share one expert."""
    redundant_experts: int = 0
    """Extra expert replicas per layer."""
    placement: str = "contiguous"
    """How experts are put into slots."""


@dataclass(frozen=True)
class ModelFacts:
    """What of a model decides whether a layout divides."""

    n_layers: int
    """Transformer layers."""
    n_heads: int
    """Query heads."""
    n_kv_heads: int
    """Key and value heads; `n_heads` for multi-head latent attention."""
    n_experts: int = 0
    """Routed experts of a layer; 0 for a dense model."""
    expert_width: int = 0
    """Intermediate width of one expert; 0 where it is not to be checked."""


def check_layout(layout: LayoutSizes, model: ModelFacts, n_gpus: int) -> None:
    """Refuse a layout that does not divide.

    Parameters
    ----------
    layout
        Sizes.
    model
        Heads, experts and layers to divide.
    n_gpus
        GPUs of the cluster.

    Raises
    ------
    LayoutError
        With the first rule broken, and a value that keeps it.
    """
    _check_ranks(layout, n_gpus)
    _check_attention(layout, model)
    _check_experts(layout, model)


def _check_ranks(layout: LayoutSizes, n_gpus: int) -> None:
    used = layout.tp * layout.dp * layout.pp
    if used != n_gpus:
        dp, rest = divmod(n_gpus, layout.tp * layout.pp)
        fix = f"try dp={dp}" if dp and not rest else f"choose tp and pp that divide {n_gpus}"
        raise LayoutError(
            f"takes {used} GPUs and the cluster has {n_gpus}",
            value=f"tp={layout.tp} dp={layout.dp} pp={layout.pp}",
            fix=fix,
        )
    ranks, group = layout.tp * layout.dp, layout.ep * layout.etp
    if ranks % group:
        raise LayoutError(
            f"ep x etp must divide tp x dp = {ranks}",
            value=f"ep={layout.ep} etp={layout.etp}",
            fix=f"try ep={_nearest_ep(ranks, layout)} etp={layout.etp}"
            if ranks % layout.etp == 0
            else "try etp=1",
        )
    if group % layout.tp and layout.tp % group:
        raise LayoutError(
            "an expert group must hold whole attention replicas, or a replica whole expert groups",
            value=f"ep={layout.ep} etp={layout.etp} tp={layout.tp}",
            fix=f"try ep={layout.tp} etp=1",
        )


def _nearest_ep(ranks: int, layout: LayoutSizes) -> int:
    """Value of `ep` nearest to the one wanted that makes groups of whole attention replicas."""
    groups = [ep for ep in range(1, ranks // layout.etp + 1) if ranks % (ep * layout.etp) == 0]
    whole = [ep for ep in groups if ep * layout.etp % layout.tp == 0]
    return min(whole or groups, key=lambda ep: abs(ep - layout.ep))


def _check_attention(layout: LayoutSizes, model: ModelFacts) -> None:
    if model.n_heads % layout.tp:
        tp = next(size for size in range(layout.tp, 0, -1) if model.n_heads % size == 0)
        raise LayoutError(
            f"{model.n_heads} attention heads do not divide", value=f"tp={layout.tp}", fix=f"try tp={tp}"
        )
    # Fewer key-value heads than ranks are copied, so either may divide the other.
    if model.n_kv_heads and model.n_kv_heads % layout.tp and layout.tp % model.n_kv_heads:
        raise LayoutError(
            f"{model.n_kv_heads} key-value heads neither divide over the ranks nor the ranks over them",
            value=f"tp={layout.tp}",
            fix=f"try tp={model.n_kv_heads}",
        )
    if layout.pp > model.n_layers:
        raise LayoutError(
            f"{model.n_layers} layers make no {layout.pp} stages",
            value=f"pp={layout.pp}",
            fix=f"try pp={model.n_layers}",
        )


def _check_experts(layout: LayoutSizes, model: ModelFacts) -> None:
    if not model.n_experts:
        if layout.ep > 1 or layout.etp > 1 or layout.redundant_experts:
            raise LayoutError(
                "a dense model has no experts to spread",
                value=f"ep={layout.ep} etp={layout.etp} redundant_experts={layout.redundant_experts}",
                fix="set ep=1 etp=1 redundant_experts=0",
            )
        return
    slots = model.n_experts + layout.redundant_experts
    if slots % layout.ep:
        shared = gcd(slots, layout.ep)
        fewer = f"ep={shared} or " if shared > 1 else ""
        raise LayoutError(
            f"{slots} expert slots do not divide over ep={layout.ep}",
            value=f"redundant_experts={layout.redundant_experts}",
            fix=f"try {fewer}redundant_experts={layout.redundant_experts + -slots % layout.ep}",
        )
    if layout.redundant_experts > model.n_experts * (layout.ep - 1):
        most = model.n_experts * (layout.ep - 1)
        raise LayoutError(
            f"{model.n_experts} experts have at most one replica on each of ep={layout.ep} ranks",
            value=f"redundant_experts={layout.redundant_experts}",
            fix=f"try redundant_experts={most} or fewer",
        )
    if model.expert_width % layout.etp:
        etp = next(size for size in range(layout.etp, 0, -1) if model.expert_width % size == 0)
        raise LayoutError(
            f"experts of width {model.expert_width} do not divide",
            value=f"etp={layout.etp}",
            fix=f"try etp={etp}",
        )
