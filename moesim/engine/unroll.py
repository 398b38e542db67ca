"""A step with its times: from operators to a program that the engine and the recurrence run."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from moesim.cost.price import Pricer
from moesim.engine.gpus import even_stretches
from moesim.engine.program import Draw, Flows, Network, Program, Sharing, Task
from moesim.engine.recurrence import makespan
from moesim.hardware.profile import Family
from moesim.work.ops import (
    AllGather,
    AllReduce,
    Exchange,
    FloatArray,
    Op,
    Pause,
    ReduceScatter,
)
from moesim.work.step import Block, Node, Step

__all__ = ["FlowsOf", "TimedStep", "time_step"]

IntArray = NDArray[np.int64]
FlowsOf = Callable[[Exchange, int, int, IntArray], tuple[FloatArray, Flows]]
"""From an exchange, its layer, that layer's row in its arrays and the (n_ranks,) groups to the (n_ranks,) time with
nothing else on the links [s], and what is sent."""


@dataclass(frozen=True, eq=False)
class TimedStep:
    """A step and the seconds of each of its nodes."""

    step: Step
    pricer: Pricer
    seconds: tuple[tuple[FloatArray, ...], ...]
    """By block and node: broadcastable to (n_points, n_layers, n_ranks)."""

    def program(
        self, layers: Container[int] | None = None, *, fused: bool = False, stretched: bool = False
    ) -> Program:
        """Unroll the step's layers into tasks.

        Parameters
        ----------
        layers
            Only these layers, -1 for the embedding and the model's number of layers for the head; None = all.
        fused
            Join kernels that follow one another on one rank into one task. The times stay the same; a
            planner evaluates a tenth of the tasks.
        stretched
            Times that hold how exchanges and compute that overlap slow one another, as they do on average; for the
            recurrence, which does not see what overlaps. `simulate` takes times alone.
        """
        return _Unroller(self, self._segments(fused, stretched), stretched=stretched).run(self._order(layers))

    def program_with_flows(
        self,
        layers: Container[int] | None = None,
        *,
        point: int,
        flows_of: FlowsOf,
        network: Callable[[], Network],
    ) -> Program:
        """Unroll one point, its token exchanges as flows.

        Parameters
        ----------
        layers
            As `program`.
        point
            Workload size to keep.
        flows_of
            Asked for every exchange of more than one rank. Times replace the step's own.
        network
            Links of those flows; asked once all flows are known.
        """
        program = _Unroller(self, self._segments(), point, flows_of).run(self._order(layers))
        return Program.trusted(program.n_ranks, program.tasks, network=network(), sharing=program.sharing)

    def makespan_s(self, layers: Container[int] | None = None) -> FloatArray:
        """(n_points,) time of the step, or of some of its layers, as `makespan` of its stretched program.

        A step of one chain whose collectives hold all ranks needs no recurrence over tasks: from one
        collective to the next every rank adds up its own times, and the slowest decides when the next starts.
        """
        chunks = self._chunks(layers)
        if chunks is None:
            return makespan(self.program(layers, fused=True, stretched=True))
        durations_s, starts = chunks
        return np.asarray(np.add.reduceat(durations_s, starts, axis=1).max(axis=2).sum(axis=1))

    def _chunks(self, layers: Container[int] | None) -> tuple[FloatArray, list[int]] | None:
        """(n_points, n_tasks, n_ranks) durations in order and where collectives stand; None where chains meet."""
        segments = self._segments(join=True)
        everyone = (
            one.micro == 0 and (one.group is None or not one.group.any()) for own in segments for one in own
        )
        order = self._order(layers)
        if not order or not all(everyone):
            return None
        runs = [
            (block, [repeat for _, repeat in run])
            for block, run in groupby(order, key=lambda place: place[0])
        ]
        durations_s = [_run_durations(segments[block], repeats, self.step) for block, repeats in runs]
        joint = [one.group is not None for block, repeats in runs for _ in repeats for one in segments[block]]
        starts = [0, *(position for position, together in enumerate(joint) if together and position)]
        return np.concatenate(durations_s, axis=1), starts

    def _order(self, layers: Container[int] | None) -> list[tuple[int, int]]:
        blocks = self.step.blocks
        return [(b, r) for b, r in self.step.order if layers is None or blocks[b].layers[r] in layers]

    def _segments(self, join: bool = False, stretched: bool = False) -> list[list[_Segment]]:
        """Every block's nodes, each its own task or joined; made once."""
        if (join, stretched) not in self._made:
            seconds = self._stretched_s if stretched else self.seconds
            self._made[join, stretched] = [
                _block_segments(self.pricer, self.groups, block, one, join=join)
                for block, one in zip(self.step.blocks, seconds, strict=True)
            ]
        return self._made[join, stretched]

    @cached_property
    def _made(self) -> dict[tuple[bool, bool], list[list[_Segment]]]:
        return {}

    @cached_property
    def _stretched_s(self) -> tuple[tuple[FloatArray, ...], ...]:
        """As `seconds`; where exchanges that SMs copy overlap with compute, as long as both then take."""
        if self.sharing is None or not any(map(any, self._by_sms)):
            return self.seconds
        hidden = self._hidden
        found = []
        for block, seconds, copies in zip(self.step.blocks, self.seconds, self._by_sms, strict=True):
            compute_s, exchange_s = _both_sums(block, seconds, copies)
            compute, exchange = even_stretches(compute_s, exchange_s, self.sharing)
            compute, exchange = 1 + hidden * (compute - 1), 1 + hidden * (exchange - 1)
            found.append(
                tuple(
                    one * (exchange if by_sms else compute) if by_sms or _computes(node) else one
                    for node, one, by_sms in zip(block.nodes, seconds, copies, strict=True)
                )
            )
        return tuple(found)

    @property
    def beside(self) -> tuple[Family, ...]:
        """Families of the profile that say how exchanges and compute slow one another here; none where they do not."""
        profile = self.pricer.profile
        if self.sharing is None or not any(map(any, self._by_sms)):
            return ()
        return tuple(
            profile.family("beside", name) for name in ("exchange", "compute") if profile.has("beside", name)
        )

    @property
    def _hidden(self) -> FloatArray:
        """[P, 1, 1] share of the shorter of exchanges and compute that the other hides, on the busiest rank."""
        alone_s = makespan(self.program(fused=True))
        compute_s, exchange_s = np.zeros((2, self.step.n_points, self.step.n_ranks))
        for block, seconds, copies in zip(self.step.blocks, self.seconds, self._by_sms, strict=True):
            repeats = len(block.layers)
            for total, one in zip((compute_s, exchange_s), _both_sums(block, seconds, copies), strict=True):
                total += one.sum(axis=1) * (repeats if one.shape[1] == 1 else 1)
        at = np.arange(self.step.n_points), (compute_s + exchange_s).argmax(axis=1)
        both_s = compute_s[at] + exchange_s[at] - alone_s
        share = both_s / np.maximum(np.minimum(compute_s[at], exchange_s[at]), 1e-30)
        return np.asarray(np.clip(share, 0.0, 1.0).reshape(-1, 1, 1))

    @cached_property
    def _by_sms(self) -> list[list[bool]]:
        """By block and node: whether it is an exchange that SMs copy."""
        return [[self.pricer.copied_by_sms(node.op) for node in block.nodes] for block in self.step.blocks]

    @cached_property
    def sharing(self) -> Sharing | None:
        """How tasks that overlap slow one another; None where none do."""
        if self.pricer.case.overlap == "none":
            return None
        network = self.pricer.network
        return Sharing(network.exchange_stretch, network.compute_stretch)

    @cached_property
    def groups(self) -> dict[str, IntArray]:
        """(n_ranks,) number of each rank's group, by the group's name."""
        return {name: _membership(self, name) for name in ("tp", "etp", "ep", "tp_ep")}


def _computes(node: Node) -> bool:
    return node.stream == "compute" and not isinstance(node.op, Pause)


def _both_sums(
    block: Block, seconds: Sequence[FloatArray], by_sms: Sequence[bool]
) -> tuple[FloatArray, FloatArray]:
    """[P, L, R] time of all that a block's layers compute, and of all that they exchange by SMs [s]."""
    sums = [
        sum((one for one, is_in in zip(seconds, kind, strict=True) if is_in), np.zeros((1, 1, 1)))
        for kind in ([_computes(node) for node in block.nodes], by_sms)
    ]
    compute_s, exchange_s = np.broadcast_arrays(*sums)
    return compute_s, exchange_s


def time_step(step: Step, pricer: Pricer) -> TimedStep:
    """Price every node of a step once, all its layers together."""
    seconds = tuple(
        tuple(_three_axes(pricer.seconds(node.op)) for node in block.nodes) for block in step.blocks
    )
    return TimedStep(step, pricer, seconds)


def _three_axes(seconds: FloatArray) -> FloatArray:
    array = np.asarray(seconds, dtype=float)
    return array.reshape((1,) * (3 - array.ndim) + array.shape)


@dataclass(eq=False)
class _Segment:
    """Nodes of a block that make one task per repeat."""

    name: str
    stream: str
    micro: int
    after: tuple[int, ...] | None
    """Segments of the same block; None = the micro-batch's last task."""
    seconds: FloatArray
    group: IntArray | None
    category: str
    link: str | None
    op: Op
    memory_s: FloatArray | None = None
    """Time of its bytes in memory; None where nothing overlaps, or the host does it."""
    by_sms: bool = False


def _block_segments(
    pricer: Pricer, groups: dict[str, IntArray], block: Block, seconds: Sequence[FloatArray], *, join: bool
) -> list[_Segment]:
    segments: list[_Segment] = []
    holder: dict[str, int] = {}
    for node, one in zip(block.nodes, seconds, strict=True):
        name = _group_name(node.op)
        alone = name is None or pricer.group(name).n_ranks == 1
        last = len(segments) - 1
        after = None if node.after is None else tuple(sorted({holder[earlier] for earlier in node.after}))
        if join and alone and segments and _continues(segments[last], node, after, last):
            segments[last].seconds = segments[last].seconds + one
            segments[last].category = "fused"
        else:
            group = None if alone else groups[name or ""]
            link = None if alone else pricer.link(name or "")
            draws = not join and pricer.case.overlap != "none" and not isinstance(node.op, Pause)
            memory_s = _three_axes(pricer.memory_s(node.op)) if draws else None
            segments.append(
                _Segment(
                    node.name, node.stream, node.micro, after, one, group, node.category, link, node.op,
                    memory_s, pricer.copied_by_sms(node.op),
                )
            )  # fmt: skip
        holder[node.name] = len(segments) - 1
    return segments


def _continues(segment: _Segment, node: Node, after: tuple[int, ...] | None, position: int) -> bool:
    """Whether a node only extends the segment before it: same rank, stream and chain."""
    same = segment.group is None and (segment.micro, segment.stream) == (node.micro, node.stream)
    return same and (after is None or after == (position,))


def _run_durations(segments: list[_Segment], repeats: list[int], step: Step) -> FloatArray:
    """(n_points, n_repeats * n_segments, n_ranks) durations of consecutive repeats of one block."""
    shape = (step.n_points, len(repeats), step.n_ranks)
    columns = [
        np.broadcast_to(one.seconds if one.seconds.shape[1] == 1 else one.seconds[:, repeats], shape)
        for one in segments
    ]
    return np.stack(columns, axis=2).reshape(step.n_points, -1, step.n_ranks)


class _Unroller:
    """Builds the task list; keeps where each micro-batch's chain stands."""

    def __init__(
        self,
        timed: TimedStep,
        segments: list[list[_Segment]],
        point: int | None = None,
        flows_of: FlowsOf | None = None,
        stretched: bool = False,
    ) -> None:
        self.step = timed.step
        self.segments = segments
        self.point = point
        self.flows_of = flows_of
        self.sharing = None if stretched else timed.sharing
        self.tasks: list[Task] = []
        self.chain: dict[int, int] = {}

    def run(self, order: Sequence[tuple[int, int]]) -> Program:
        for block, repeat in order:
            self._add(self.step.blocks[block], self.segments[block], repeat)
        n_points = self.step.n_points if self.point is None else 1
        return Program.trusted(self.step.n_ranks, tuple(self.tasks), n_points, sharing=self.sharing)

    def _add(self, block: Block, segments: list[_Segment], repeat: int) -> None:
        tasks, chain = self.tasks, self.chain
        first = len(tasks)
        prefix = f"{block.name}.{block.layers[repeat]}." if len(block.layers) > 1 else f"{block.name}."
        for position, one in enumerate(segments):
            if one.after is not None:
                after = tuple([first + earlier for earlier in one.after])
            else:
                after = (chain[one.micro],) if one.micro in chain else ()
            seconds = one.seconds
            duration_s, flows = seconds[:, repeat if seconds.shape[1] > 1 else 0], None
            if self.point is not None:
                duration_s = duration_s[self.point if len(duration_s) > 1 else 0]
            if self.flows_of is not None and isinstance(one.op, Exchange) and one.group is not None:
                duration_s, flows = self.flows_of(one.op, block.layers[repeat], repeat, one.group)
            draw = self._draw(one, repeat, duration_s) if self.sharing else None
            name = prefix + one.name
            tasks.append(
                Task(name, one.stream, duration_s, after, one.group, one.category, one.link, flows, draw)
            )
            chain[one.micro] = first + position

    def _draw(self, one: _Segment, repeat: int, duration_s: FloatArray) -> Draw | None:
        """What a task takes of its GPU: the share of its time in which its bytes alone would keep memory busy."""
        if one.memory_s is None:
            return None
        memory_s = one.memory_s[:, repeat if one.memory_s.shape[1] > 1 else 0]
        if self.point is not None:
            memory_s = memory_s[self.point if len(memory_s) > 1 else 0]
        shape = np.broadcast_shapes(np.shape(memory_s), np.shape(duration_s))
        share = np.divide(memory_s, duration_s, out=np.zeros(shape), where=np.asarray(duration_s) > 0)
        return Draw(np.minimum(share, 1.0), one.by_sms)


def _group_name(op: Op) -> str | None:
    return op.group if isinstance(op, AllReduce | AllGather | ReduceScatter | Exchange) else None


def _membership(timed: TimedStep, name: str) -> IntArray:
    """Group of each simulated rank: `tp` innermost, an expert's shards innermost of an expert group."""
    layout, ranks = timed.pricer.case.layout, np.arange(timed.step.n_ranks)
    if name == "tp":
        return ranks // layout.tp
    if name == "etp":
        return ranks // layout.etp
    if name == "ep":
        return ranks // (layout.ep * layout.etp) * layout.etp + ranks % layout.etp
    return np.zeros_like(ranks)
