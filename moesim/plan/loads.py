"""Expert loads of a layout at many workload sizes, drawn once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.errors import LayoutError
from moesim.model.spec import ModelSpec
from moesim.routing import (
    Exchange,
    ExchangeKind,
    Phase,
    Placement,
    RoutingShape,
    RoutingSource,
    Traffic,
    balanced,
    coactivation,
    contiguous,
    eplb,
    inclusion,
    load_points,
    load_traffic,
    read_placement,
    round_robin,
    some_tokens,
)
from moesim.routing.capacity import CapacityLoss, CapacityPolicy
from moesim.work.case import Case, Layout
from moesim.work.ffn import ExpertTraffic

__all__ = ["TrafficMaker", "routing_shape", "scaled_traffic"]


def routing_shape(model: ModelSpec) -> RoutingShape:
    """What a model's routers draw.

    Raises
    ------
    LayoutError
        If the model is dense.
    """
    moe = model.moe
    if moe is None:
        raise LayoutError("a dense model has no router")
    return RoutingShape(len(model.moe_layers), moe.n_experts, moe.top_k, moe.n_groups, moe.top_groups)


def scaled_traffic(traffic: Traffic, share: float) -> Traffic:
    """The same copies as of `share` times as many tokens; expected copies need not be whole."""
    parts = (traffic.copies_per_rank, traffic.copies_per_node, traffic.assignments)
    scaled = [np.asarray(one * share) for one in parts]
    return Traffic(*scaled)


_KEPT_LOADS = 256
"""Layouts, phases and capacities whose loads are kept: 0.5 MB each, of a large model on 64 ranks."""


class TrafficMaker:
    """Draws what each rank of an expert group receives.

    Parameters
    ----------
    model
        Whose experts.
    source
        Trace or generator.
    seed
        Seed of the draws.
    max_tokens
        Most tokens drawn for one group.
    placed_by
        Trace or generator that placements are made from, where it is not `source`.
    """

    def __init__(
        self,
        model: ModelSpec,
        source: RoutingSource,
        seed: int,
        max_tokens: int,
        placed_by: RoutingSource | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.placed_by = placed_by or source
        self.seed = seed
        self.max_tokens = max_tokens
        self._placements: dict[tuple[object, ...], Placement] = {}
        self._busiest: dict[tuple[Placement, CapacityPolicy | None], float] = {}
        self._sizes: dict[tuple[object, ...], dict[int, _Size]] = {}

    @property
    def shape(self) -> RoutingShape:
        """What the model's routers draw."""
        return routing_shape(self.model)

    def placement(
        self, layout: Layout, ranks_per_domain: int, placed_by: RoutingSource | None = None
    ) -> Placement:
        """Experts in slots, by the layout's policy and what is known of the routing: `placed_by`, or the maker's."""
        n_domains = max(1, layout.ep // ranks_per_domain) if layout.ep % ranks_per_domain == 0 else 1
        by = placed_by or self.placed_by
        key = (layout.placement, layout.ep, layout.redundant_experts, n_domains, by)
        if key not in self._placements:
            self._placements[key] = self._place(layout, n_domains, by)
        return self._placements[key]

    def _place(self, layout: Layout, n_domains: int, by: RoutingSource) -> Placement:
        shape, ep, extra = self.shape, layout.ep, layout.redundant_experts
        match layout.placement:
            case "contiguous":
                return contiguous(shape.n_experts, ep, extra)
            case "round-robin":
                return round_robin(shape.n_experts, ep, extra)
            case "balanced":
                return balanced(inclusion(by, shape), ep, extra)
            case "coactivation":
                return coactivation(
                    some_tokens(by, shape),
                    inclusion(by, shape),
                    n_slots=shape.n_experts + extra,
                    n_ranks=ep,
                    n_nodes=n_domains,
                    n_groups=shape.n_groups,
                )
            case "eplb":
                return eplb(
                    inclusion(by, shape),
                    n_slots=shape.n_experts + extra,
                    n_ranks=ep,
                    n_groups=shape.n_groups,
                    n_nodes=n_domains,
                )
            case _:
                return self._given(layout)

    def _given(self, layout: Layout) -> Placement:
        """The map of a file, if it has the layout's slots; a map of all layers is cut to those with experts."""
        shape, file = self.shape, layout.placement
        found = read_placement(file, n_experts=shape.n_experts, n_ranks=layout.ep)
        if found.n_redundant != layout.redundant_experts:
            raise LayoutError(
                f"the map has {found.n_slots} slots a layer and the layout "
                f"{shape.n_experts + layout.redundant_experts}",
                fix=f"write redundant_experts: {found.n_redundant}",
                place=file,
            )
        n_rows = found.slot_to_expert.shape[0]
        if n_rows == self.model.n_layers != shape.n_layers:
            return replace(found, slot_to_expert=found.slot_to_expert[list(self.model.moe_layers)])
        if n_rows not in (1, shape.n_layers):
            raise LayoutError(
                f"the map has {n_rows} rows and the model {shape.n_layers} MoE layers",
                fix="give one list for all layers, or one for each",
                place=file,
            )
        return found

    def traffic(self, case: Case, phase: str, replica_tokens: Sequence[float]) -> ExpertTraffic:
        """Loads of every MoE layer of the model.

        Parameters
        ----------
        case
            Layout and dispatch.
        phase
            ``decode``, ``prefill`` or ``train`` (drawn as prefill).
        replica_tokens : (n_points,)
            Tokens of each attention replica in one micro-batch.
        """
        layout = case.layout
        domain = max(1, case.cluster.near_ranks // layout.etp)
        kind = self._kind(case, domain)
        drawn_phase: Phase = "decode" if phase == "decode" else "prefill"
        # an expert group's ranks hold etp / tp of a replica's tokens each, whichever of the two is larger
        per_rank = np.asarray(replica_tokens, dtype=float) * layout.etp / layout.tp
        whole = np.maximum(np.ceil(per_rank - 1e-9), 1).astype(int)
        known = self._drawn(layout, domain, drawn_phase, whole, case.capacity)
        # a fraction of a token per rank is drawn as one: scaled back
        share = (per_rank / whole)[:, None, None]
        sizes = [known[n] for n in whole.tolist()]
        buffers = case.dispatch == "nccl"
        copies = [one.padded if buffers and one.padded is not None else one.exchanges[kind] for one in sizes]
        losses = [one.loss for one in sizes if one.loss is not None]
        return ExpertTraffic(
            np.stack([one.slots for one in sizes]) * share[..., None],
            np.stack([one.sent_nvlink for one in copies]) * share,
            np.stack([one.received_nvlink for one in copies]) * share,
            np.stack([one.sent_nic for one in copies]) * share,
            np.stack([one.received_nic for one in copies]) * share,
            CapacityLoss.of_points(losses) if losses else None,
        )

    def copies(self, case: Case, phase: str, replica_tokens: float) -> Traffic:
        """Who sends to whom in every MoE layer: of the draw that `traffic` has the sums of, scaled as there.

        Parameters
        ----------
        case, phase, replica_tokens
            As `traffic`, for one point.

        Returns
        -------
        Traffic
            (n_layers, ep, ep) copies, an expert's shards as one rank.
        """
        layout = case.layout
        domain = min(max(1, case.cluster.near_ranks // layout.etp), layout.ep)
        per_rank = replica_tokens * layout.etp / layout.tp
        whole = max(int(np.ceil(per_rank - 1e-9)), 1)
        drawn = load_traffic(
            self.source,
            self.shape,
            n_tokens=whole,
            placement=self.placement(layout, max(1, case.cluster.near_ranks // layout.etp)),
            phase="decode" if phase == "decode" else "prefill",
            ranks_per_domain=domain,
            seed=self.seed,
            max_tokens=self.max_tokens,
            capacity=_carried(case),
        )
        return scaled_traffic(drawn, per_rank / whole)

    def matrix(self, case: Case, phase: str, replica_tokens: float) -> NDArray[np.float64]:
        """(ep, ep) copies that one layer's dispatch moves between ranks, mean over layers, own rank zero.

        One copy a token and rank.
        """
        copies = self.copies(case, phase, replica_tokens).copies_per_rank.mean(axis=0)
        return np.asarray(copies * ~np.eye(case.layout.ep, dtype=bool))

    def _drawn(
        self,
        layout: Layout,
        domain: int,
        phase: Phase,
        whole: NDArray[np.int64],
        capacity: CapacityPolicy | None,
    ) -> dict[int, _Size]:
        """Loads by tokens per rank; sizes not met before are drawn together."""
        key = (layout.ep, layout.redundant_experts, layout.placement, min(domain, layout.ep), phase, capacity)
        if key not in self._sizes and len(self._sizes) >= _KEPT_LOADS:
            self._sizes.pop(next(iter(self._sizes)))  # a sweep over capacities would keep every one
        known = self._sizes.setdefault(key, {})
        missing = sorted(set(whole.tolist()) - set(known))
        if missing:
            load = load_points(
                self.source,
                self.shape,
                tokens_per_rank=missing,
                placement=self.placement(layout, domain),
                phase=phase,
                ranks_per_domain=min(domain, layout.ep),
                seed=self.seed,
                max_tokens=self.max_tokens,
                capacity=capacity,
            )
            for point, size in enumerate(missing):
                exchanges = {kind: _of_point(one, point) for kind, one in load.exchanges.items()}
                padded = None if load.padded is None else _of_point(load.padded, point)
                loss = None if load.loss is None else load.loss.at(point)
                known[size] = _Size(load.tokens_per_slot[point], exchanges, padded, loss)
        return known

    def busiest(self, case: Case) -> float:
        """Rows of the busiest rank over the mean that was routed, by popularity alone, in the worst layer."""
        layout = case.layout
        placement = self.placement(layout, max(1, case.cluster.near_ranks // layout.etp))
        key = (placement, case.capacity)
        if key not in self._busiest:
            load = placement.expand(inclusion(self.source, self.shape))
            mean = load.mean(axis=(-2, -1), keepdims=True)
            held = load if case.capacity is None else _held(load, mean, case.capacity)
            self._busiest[key] = float((held.mean(axis=-1).max(axis=-1) / mean[..., 0, 0]).max())
        return self._busiest[key]

    def _kind(self, case: Case, domain: int) -> ExchangeKind:
        # Megatron's all-to-all, as DeepEP's low-latency kernels, sends a row to each expert
        if case.dispatch in ("low-latency", "nccl"):
            return "per_assignment"
        whole_domains = case.layout.ep % min(domain, case.layout.ep) == 0
        return "two_level" if case.dispatch == "normal" and whole_domains else "per_rank"


@dataclass(frozen=True, eq=False)
class _Size:
    """Loads of one batch size."""

    slots: NDArray[np.float64]
    exchanges: dict[ExchangeKind, Exchange]
    padded: Exchange | None = None
    """Of an all-to-all that carries whole buffers of a capacity."""
    loss: CapacityLoss | None = None


def _held(
    load: NDArray[np.float64], mean: NDArray[np.float64], capacity: CapacityPolicy
) -> NDArray[np.float64]:
    """Rows of slots, (n_layers, n_ranks, slots), that are left of a load; roundings apart."""
    most = capacity.factor * mean
    if capacity.padding == "capacity" or capacity.router == "expert-choice":
        return np.broadcast_to(most, load.shape)
    kept = np.minimum(load, most)
    if capacity.overflow == "reroute":  # what is over goes to slots as they have room
        over, room = (load - kept).sum((-2, -1), keepdims=True), most - kept
        kept = kept + room * np.minimum(over / np.maximum(room.sum((-2, -1), keepdims=True), 1e-12), 1.0)
    return kept


def _carried(case: Case) -> CapacityPolicy | None:
    """The capacity as the exchange sees it: only a plain all-to-all carries padding."""
    if case.capacity is None or case.dispatch == "nccl":
        return case.capacity
    return replace(case.capacity, padding="none")


def _of_point(one: Exchange, point: int) -> Exchange:
    return Exchange(
        one.sent_nvlink[point], one.received_nvlink[point], one.sent_nic[point], one.received_nic[point]
    )
