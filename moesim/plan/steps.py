"""Steps of one case at many sizes: seconds, where they go, and how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.cost.price import Pricer
from moesim.engine import Program, Timeline, evaluate, simulate
from moesim.engine.unroll import TimedStep, time_step
from moesim.errors import LayoutError
from moesim.hardware.profile import Family
from moesim.metrics import breakdown_s
from moesim.plan.context import Context
from moesim.plan.exchanges import LinkedExchanges, StageExchanges
from moesim.plan.played import Played
from moesim.routing.capacity import CapacityLoss
from moesim.work.case import Case, Stage
from moesim.work.ffn import ExpertTraffic
from moesim.work.forward import forward_step
from moesim.work.ops import Exchange, FloatArray, SendRecv
from moesim.work.step import Batch, Block, Node, Step

__all__ = ["Pass", "run_pass"]


@dataclass(frozen=True, eq=False)
class Pass:
    """One step through all pipeline stages, at many sizes."""

    case: Case
    batch: Batch
    n_micro: FloatArray
    """(n_points,) micro-batches that follow one another through the stages."""
    timed: TimedStep
    """All layers, priced once."""
    stage_s: FloatArray
    """(n_stages, n_points) time of one micro-batch in each stage."""
    hop_s: FloatArray
    """(n_points,) time of one send from stage to stage."""
    traffic: ExpertTraffic | None
    """Of one micro-batch, over all MoE layers."""
    exchanges: LinkedExchanges | None = None
    """What the engine needs to play its token exchanges as flows; None for a dense model."""
    row_of: NDArray[np.intp] | None = None
    """Row here of each point of the outcome, where several points run the same step; None = its own number."""

    def row(self, point: int) -> int:
        """Row of one of the outcome's points."""
        return point if self.row_of is None else int(self.row_of[point])

    @property
    def latency_s(self) -> FloatArray:
        """(n_points,) time until the last micro-batch leaves the last stage, stages empty at first."""
        slowest = self.stage_s.max(axis=0)
        through = self.stage_s.sum(axis=0) + self.hop_s * (len(self.stage_s) - 1)
        return np.asarray(through + (self.n_micro - 1) * slowest)

    @property
    def period_s(self) -> FloatArray:
        """(n_points,) time between two passes of the whole batch, one after another without a break.

        A decode step waits for its own tokens, so with fewer micro-batches than stages the pipeline runs
        partly empty.
        """
        slowest = self.stage_s.max(axis=0)
        through = self.stage_s.sum(axis=0) + self.hop_s * (len(self.stage_s) - 1)
        if self.batch.phase == "decode":
            return np.asarray(np.maximum(through, self.n_micro * slowest))
        return np.asarray(self.n_micro * slowest)

    def category_s(self) -> dict[str, FloatArray]:
        """(n_points,) kernel time of all stages by category, mean over ranks, overlap not taken off."""
        total: dict[str, FloatArray] = {}
        for node, seconds in self._node_s():
            total[node.category] = total.get(node.category, np.zeros(1)) + seconds
        return {name: np.broadcast_to(seconds, (self.batch.n_points,)) for name, seconds in total.items()}

    def family_s(self) -> dict[str, tuple[Family, FloatArray]]:
        """(n_points,) kernel time by family of the profile, mean over ranks."""
        total: dict[str, tuple[Family, FloatArray]] = {}
        for node, seconds in self._node_s():
            family = max(self.timed.pricer.families(node.op), key=_uncertainty)
            key = f"{family.op} {family.implementation} {family.dtype}"
            total[key] = (family, total.get(key, (family, np.zeros(1)))[1] + seconds)
        return total

    def rank_s(self) -> FloatArray:
        """(n_points, n_ranks) kernel time of all stages on each rank of a group; the rest it waits."""
        total = np.zeros((1, 1))
        for block, times in zip(self.timed.step.blocks, self.timed.seconds, strict=True):
            for one in times:
                total = total + one.sum(axis=1) * (len(block.layers) if one.shape[1] == 1 else 1)
        return np.broadcast_to(total, (self.batch.n_points, total.shape[1]))

    def _node_s(self) -> Iterator[tuple[Node, FloatArray]]:
        for block, times in zip(self.timed.step.blocks, self.timed.seconds, strict=True):
            for node, one in zip(block.nodes, times, strict=True):
                repeats = len(block.layers) if one.shape[1] == 1 else 1
                yield node, one.sum(axis=(1, 2)) * (repeats / one.shape[2])

    @property
    def loss(self) -> CapacityLoss | None:
        """What a capacity takes of the router's copies; None for a dense model."""
        if self.traffic is None or self.rank_imbalance is None:
            return None
        return self.traffic.loss or CapacityLoss.none(self.rank_imbalance)

    @property
    def rank_imbalance(self) -> FloatArray | None:
        """(n_points,) busiest expert rank's rows over the mean, averaged over layers; None for a dense model."""
        if self.traffic is None:
            return None
        rows = self.traffic.tokens_per_slot.sum(axis=3)
        return np.asarray((rows.max(axis=2) / np.maximum(rows.mean(axis=2), 1e-12)).mean(axis=1))

    def program(self, stage: int, *, fused: bool = False, stretched: bool = False) -> Program:
        """One micro-batch in one pipeline stage."""
        held = _held(self.case, self.case.stages[stage])
        return self.timed.program(held, fused=fused, stretched=stretched)

    def linked_program(self, stage: int, point: int) -> Program:
        """The same at one size, token exchanges as flows on the GPUs that run the stage."""
        own = self._on_gpus(stage, point)
        held = _held(self.case, self.case.stages[stage])
        return self.timed.program_with_flows(held, point=point, flows_of=own.flows, network=own.network)

    def _on_gpus(self, stage: int, point: int) -> StageExchanges:
        """Exchanges of the stage's first set of ranks, or where links differ of the one that they slow most."""
        layout, exchanges = self.case.layout, self.exchanges
        if exchanges is None:
            raise LayoutError("a dense model exchanges no tokens")
        first = stage * layout.tp * layout.dp
        if not exchanges.sets_differ:
            return exchanges.at(point, first)
        block = next(one for one in self.timed.step.blocks if _exchanged(one))
        group = self.timed.groups["ep"]
        sets = [exchanges.at(point, first + n * layout.group_ranks) for n in range(layout.n_groups)]
        even_s = [sum(one.even_s(op, block.layers[0], group) for op in _exchanged(block)) for one in sets]
        return sets[int(np.argmax(even_s))]

    def timelines(self, point: int, *, events: bool = True) -> tuple[Timeline, ...]:
        """Every stage's micro-batch, event by event with links shared, or by the recurrence."""
        stages = range(len(self.stage_s))
        if not events:
            programs = (self.program(stage, stretched=True) for stage in stages)
            return tuple(evaluate(program).timeline(point) for program in programs)
        if self.links == "ports":
            return tuple(simulate(self.program(stage), point) for stage in stages)
        return tuple(simulate(self.linked_program(stage, point)) for stage in stages)

    @property
    def links(self) -> Literal["fluid", "ports"]:
        """Whether the engine plays its token exchanges as flows."""
        return "fluid" if self.exchanges is not None and self.exchanges.on_links else "ports"

    def play(self, point: int, *, events: bool = True) -> Played:
        """Run one size; `step_s` is the period (of a prefill the latency), as `stage_s` gives it by the recurrence."""
        timelines = self.timelines(point, events=events)
        stage_s = self.stage_s.copy()
        stage_s[:, point] = [timeline.makespan_s for timeline in timelines]
        one = replace(self, stage_s=stage_s)
        step_s = float((one.latency_s if self.batch.phase == "prefill" else one.period_s)[point])
        links = self.links if events else "ports"
        return Played(step_s, _scaled(_mean_breakdown(timelines), step_s), timelines, links)


def _exchanged(block: Block) -> list[Exchange]:
    """Token exchanges of one layer of a block."""
    return [node.op for node in block.nodes if isinstance(node.op, Exchange)]


def _mean_breakdown(timelines: Sequence[Timeline]) -> dict[str, float]:
    """Where a micro-batch's time goes on each stage's critical rank, all stages together."""
    parts: dict[str, float] = {}
    for timeline in timelines:
        for name, seconds in breakdown_s(timeline).items():
            parts[name] = parts.get(name, 0.0) + seconds
    return parts


def _scaled(parts: dict[str, float], step_s: float) -> dict[str, float]:
    """The same shares of a whole step; what a pipeline adds (sends, bubbles) is booked as its own part."""
    total_s = sum(parts.values())
    if total_s <= step_s:
        return {**parts, "pipeline": step_s - total_s} if step_s - total_s > 1e-9 * step_s else parts
    # several micro-batches are under way at once: a step is a stage's share of them
    return {name: seconds * step_s / total_s for name, seconds in parts.items()}


def _uncertainty(family: Family) -> float:
    """Held-out error, for choosing the least sure of the families that price one operator."""
    return family.held_out.p90_ape if family.held_out else float("inf")


def run_pass(
    context: Context, case: Case, batch: Batch, *, build: Callable[[Step], Step] | None = None
) -> Pass:
    """Price one step of a case.

    Parameters
    ----------
    context
        Model, routing and engine.
    case
        Layout and choices.
    batch
        What each attention replica is given; with several pipeline stages it is cut into one micro-batch
        a stage where it has that many sequences.
    build
        Turns each stage's forward step into the one to be priced (a backward pass, say).
    """
    micro, n_micro = _micro_batches(case, batch)
    n_overlapped = 2 if case.overlap == "two-batch" and case.model.is_moe else 1
    pricer = context.pricer(case, batch.phase)
    traffic = exchanges = None
    if case.model.is_moe:
        tokens = micro.n_tokens[:, 0, 0] / n_overlapped
        traffic = context.traffic.traffic(case, batch.phase, [float(n) for n in tokens])
        exchanges = LinkedExchanges(
            case, context.traffic, pricer.network, batch.phase, tokens, context.max_flows
        )
    everything = Stage(0, tuple(range(case.model.n_layers)), first=True, last=True)
    copies = [] if traffic is None else [traffic] * n_overlapped
    step = forward_step(case, micro, copies, everything, with_host=batch.phase != "train")
    timed = time_step(build(step) if build else step, pricer)
    stage_s = np.stack([timed.makespan_s(_held(case, stage)) for stage in case.stages])
    hop_s = _hop_s(case, micro, pricer)
    return Pass(case, batch, n_micro, timed, stage_s, hop_s, traffic, exchanges)


def _held(case: Case, stage: Stage) -> frozenset[int]:
    """Layers of a stage, with the embedding (-1) and the head (the number of layers) where it has them."""
    outer = ([-1] if stage.first else []) + ([case.model.n_layers] if stage.last else [])
    return frozenset([*stage.layers, *outer])


def _micro_batches(case: Case, batch: Batch) -> tuple[Batch, FloatArray]:
    sequences = batch.n_sequences[:, 0, 0]
    if case.layout.pp == 1 or batch.phase == "train":
        return batch, np.ones(batch.n_points)
    n_micro = np.clip(sequences, 1, case.layout.pp)
    parts = n_micro[:, None, None]
    return replace(batch, n_sequences=batch.n_sequences / parts, n_riding=batch.n_riding / parts), n_micro


def _hop_s(case: Case, batch: Batch, pricer: Pricer) -> FloatArray:
    if case.layout.pp == 1:
        return np.zeros(batch.n_points)
    payload = batch.n_tokens * case.model.hidden * 2.0 / case.layout.tp
    return np.broadcast_to(pricer.seconds(SendRecv(payload)).reshape(-1), (batch.n_points,)).astype(float)
