"""Training: forward and backward of every stage in a 1F1B pipeline, then gradients and optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from moesim.engine import Program, Task, makespan, simulate
from moesim.errors import LayoutError
from moesim.hardware.cluster import Cluster
from moesim.hardware.profile import Family
from moesim.metrics import breakdown_s
from moesim.metrics.band import relative_band, step_band
from moesim.plan.context import Choice, Context
from moesim.plan.outcome import Outcome, StepTerm, model_flops
from moesim.plan.played import Played
from moesim.plan.steps import Pass, run_pass
from moesim.plan.workloads import Sizes
from moesim.work.case import Case, Layout
from moesim.work.memory import TrainingState, training_memory
from moesim.work.ops import FloatArray, Op
from moesim.work.step import Batch
from moesim.work.training import Exchanged, backward_step, gradient_ops, optimizer_op

__all__ = [
    "StageTimes",
    "TailPart",
    "TrainRun",
    "pipeline_program",
    "pipeline_s",
    "train_outcome",
    "train_run",
]

FLOPS_PER_FORWARD = 3.0
"""Model FLOPs of a training step over those of its forward pass; what is computed again does not count (PaLM,
arXiv:2204.02311, appendix B)."""

HOW = (
    "step = micro-batches in a 1F1B pipeline of both passes, then gradients, optimiser and weights; terms are of a "
    "whole step, mean over all ranks, and add up to it with wait and bubble"
)
WAIT = (
    "passes of the slowest rank, less the kernels of the mean rank: for the busiest rank of every exchange; "
    "negative where exchanges are hidden"
)
BUBBLE = "step, less what the mean stage is busy: pipeline filling, draining, uneven stages and sends"

PERIODS = 6
"""Pipelines of more micro-batches than this many times the stages repeat themselves: only these are run, which is
exact where sends are free and within 2% where they stall a stage."""


@dataclass(frozen=True, eq=False)
class StageTimes:
    """What each pipeline stage takes, at many sizes."""

    forward_s: FloatArray
    """(n_stages, n_points) one micro-batch forward."""
    backward_s: FloatArray
    """(n_stages, n_points) one micro-batch backward, what is recomputed included."""
    hop_s: FloatArray
    """(n_points,) one send between neighbours; activations and their gradients are equally large."""
    reduce_s: FloatArray
    """(n_stages,) gradients summed over replicas."""
    optimizer_s: FloatArray
    """(n_stages,) weights updated."""
    gather_s: FloatArray
    """(n_stages,) new weights gathered, where the optimiser's state is divided."""
    micro_gather_s: FloatArray = field(default_factory=lambda: np.zeros(1))
    """(n_stages,) or (1,) weights gathered before every pass of a micro-batch, where they are divided."""
    micro_reduce_s: FloatArray = field(default_factory=lambda: np.zeros(1))
    """(n_stages,) or (1,) gradients summed after every backward pass, where they are divided."""

    @property
    def n_stages(self) -> int:
        """Pipeline stages."""
        return len(self.forward_s)

    def at(self, points: Sequence[int]) -> StageTimes:
        """The same at some of the points."""
        index = np.asarray(points)
        columns = (self.forward_s[:, index], self.backward_s[:, index], self.hop_s[index])
        return StageTimes(
            *columns, self.reduce_s, self.optimizer_s, self.gather_s, self.micro_gather_s, self.micro_reduce_s
        )

    def busy_s(self, n_micro: FloatArray) -> FloatArray:
        """(n_stages, n_points) what each stage computes and exchanges in a step, sends apart."""
        each = np.broadcast_to(2 * self.micro_gather_s + self.micro_reduce_s, (self.n_stages,))
        once = self.reduce_s + self.optimizer_s + self.gather_s
        return (self.forward_s + self.backward_s + each[:, None]) * n_micro + once[:, None]


@dataclass(frozen=True, eq=False)
class TailPart:
    """One exchange among replicas, or the optimiser."""

    name: str
    category: str
    op: Op
    """Of the first stage that has it."""
    families: tuple[Family, ...]
    when: Literal["forward", "backward", "step"]
    """With each micro-batch's pass, or once a step."""
    stage_s: FloatArray
    """(n_stages,) of one run."""

    def times(self, n_micro: FloatArray) -> FloatArray:
        """(n_points,) runs of a step."""
        return np.ones_like(n_micro) if self.when == "step" else n_micro


@dataclass(frozen=True, eq=False)
class TrainRun:
    """One optimiser step of a case, at many sizes."""

    case: Case
    forward: Pass
    backward: Pass
    times: StageTimes
    n_micro: FloatArray
    """(n_points,) micro-batches of each replica."""
    step_s: FloatArray
    """(n_points,)"""
    tail_parts: tuple[TailPart, ...]
    """What comes on top of the passes."""

    def play(self, point: int, *, events: bool = True) -> Played:
        """One size, and where the time of its last stage to end goes; short enough to be always run on the clock.

        Each stage's passes take what the engine makes of them where it plays their exchanges as flows.
        """
        links = self.forward.links if events else "ports"
        times = self.times.at([point])
        if links == "fluid":
            forward_s, backward_s = (
                np.array([[timeline.makespan_s] for timeline in one.timelines(point)])
                for one in (self.forward, self.backward)
            )
            times = replace(times, forward_s=forward_s, backward_s=backward_s)
        timeline = simulate(pipeline_program(times, int(self.n_micro[point])))
        return Played(timeline.makespan_s, breakdown_s(timeline), (timeline,), links)

    def category_s(self) -> dict[str, FloatArray]:
        """(n_points,) kernel time of a step by category, mean over ranks; what is left is pipeline bubble."""
        per_rank = self.n_micro / self.case.layout.pp
        total: dict[str, FloatArray] = {}
        for one in (self.forward, self.backward):
            for name, seconds in one.category_s().items():
                total[name] = total.get(name, np.zeros_like(per_rank)) + seconds * per_rank
        for part in self.tail_parts:
            seconds = part.stage_s.mean() * part.times(self.n_micro)
            total[part.category] = total.get(part.category, np.zeros_like(per_rank)) + seconds
        busy = self.times.busy_s(self.n_micro).mean(axis=0)
        total["pipeline_bubble"] = np.maximum(self.step_s - busy, 0.0)
        return total

    def step_terms(self) -> tuple[StepTerm, ...]:
        """What a step holds beside the kernels of its passes: with them it adds up to the step, mean over ranks."""
        terms = []
        for part in self.tail_parts:
            times = part.times(self.n_micro)
            mean_s, most_s = part.stage_s.mean() * times, part.stage_s.max() * times
            terms.append(StepTerm(part.name, part.category, times, mean_s, most_s, part.op, part.families))
        share = self.n_micro / self.case.layout.pp
        passes_s = (self.times.forward_s + self.times.backward_s).sum(axis=0)
        # of the mean rank, and of the one that waits longest
        waits_s = (passes_s[:, None] - self.forward.rank_s() - self.backward.rank_s()) * share[:, None]
        idle_s = (self.step_s - self.times.busy_s(self.n_micro)).T
        rest = [("wait", self.n_micro, waits_s, WAIT)]
        if self.case.layout.pp > 1:
            rest.append(("pipeline_bubble", np.ones_like(share), idle_s, BUBBLE))
        for name, times, per_rank_s, note in rest:
            mean_s, most_s = per_rank_s.mean(axis=1), per_rank_s.max(axis=1)
            terms.append(StepTerm(name, name, times, mean_s, most_s, note=note))
        return tuple(terms)

    def family_s(self) -> Iterable[tuple[Family | None, FloatArray]]:
        """(n_points,) kernel time by family; a backward pass is derived from its forward, so it has none."""
        per_rank = self.n_micro / self.case.layout.pp
        yield from ((family, seconds * per_rank) for family, seconds in self.forward.family_s().values())
        yield None, sum((seconds for _, seconds in self.backward.family_s().values()), np.zeros(1)) * per_rank
        for part in self.tail_parts:
            yield part.families[0], part.stage_s.mean() * part.times(self.n_micro)


def train_outcome(
    context: Context, cluster: Cluster, layout: Layout, choice: Choice, sizes: Sizes, state: TrainingState
) -> Outcome:
    """One optimiser step; sizes ``global_batch``, ``micro_batch`` and ``sequence``, (n_points,) each.

    Sizes whose global batch is no whole number of micro-batches on every replica are left out.

    Raises
    ------
    LayoutError
        If no size divides, or experts have redundant replicas.
    """
    if layout.redundant_experts:
        raise LayoutError(
            "training keeps one replica of an expert in a group: joining the gradients of more is not modelled",
            value=f"redundant_experts={layout.redundant_experts}",
            fix="set redundant_experts=0",
        )
    case = context.case(cluster, layout, choice, "train")
    sizes = _dividing(sizes, layout)
    run = train_run(context, case, sizes, state)
    n_tokens = sizes["global_batch"] * sizes["sequence"]
    flops = FLOPS_PER_FORWARD * model_flops(context.model, n_tokens, sizes["sequence"] / 2, "train")
    peak = cluster.gpu.peak_flops_per_s(case.weight_dtype) * layout.n_ranks
    calibrated = context.profile(cluster).carried_from is None
    return Outcome(
        case,
        dict(sizes),
        _memory(case, sizes, run.n_micro, state),
        step_s=run.step_s,
        tokens_per_s=n_tokens / run.step_s,
        mfu=np.asarray(flops / (run.step_s * peak)),
        band_fraction=step_band(relative_band(run.family_s(), run.step_s, carried=not calibrated)),
        imbalance=run.forward.rank_imbalance,
        loss=run.forward.loss,
        category_s=run.category_s(),
        calibrated=calibrated,
        passes={"forward": run.forward, "backward": run.backward},
        how=HOW,
        pass_times=run.n_micro,
        step_terms=run.step_terms(),
        play=run.play,
    )


def train_run(context: Context, case: Case, sizes: Sizes, state: TrainingState) -> TrainRun:
    """Price the stages and run the pipeline; arguments as `train_outcome`, every size dividing."""
    batch = Batch.of("train", sizes["micro_batch"], sizes["sequence"], sizes["sequence"])
    forward = run_pass(context, case, batch)
    backward = run_pass(context, case, batch, build=lambda step: backward_step(step, state))
    tail = _tail(context, case, state)

    def seconds(category: str, when: str) -> FloatArray:
        own = [part.stage_s for part in tail if (part.category, part.when) == (category, when)]
        return sum(own, np.zeros(case.layout.pp))

    times = StageTimes(
        forward.stage_s,
        backward.stage_s,
        forward.hop_s,
        reduce_s=seconds("gradients", "step"),
        optimizer_s=seconds("optimizer", "step"),
        gather_s=seconds("weight_gather", "step"),
        # both passes gather the same weights
        micro_gather_s=seconds("weight_gather", "forward"),
        micro_reduce_s=seconds("gradients", "backward"),
    )
    n_micro = sizes["global_batch"] / (case.layout.dp * sizes["micro_batch"])
    return TrainRun(case, forward, backward, times, n_micro, pipeline_s(times, n_micro), tail)


TAIL = ("gradients", "optimizer", "weight_gather")
"""Categories of what follows the last backward of a stage, in order."""


def _tail(context: Context, case: Case, state: TrainingState) -> tuple[TailPart, ...]:
    pricer = context.pricer(case, "train")
    parts: dict[str, TailPart] = {}
    for stage in case.stages:
        update = Exchanged("optimizer", optimizer_op(case, stage, state), "step")
        for name, op, when in (*gradient_ops(case, stage, state), update):
            if name not in parts:
                category = "weight_gather" if name.startswith("weight") else "gradients"
                category = "optimizer" if name == "optimizer" else category
                families = tuple(pricer.families(op))
                parts[name] = TailPart(name, category, op, families, when, np.zeros(case.layout.pp))
            parts[name].stage_s[stage.index] = float(np.max(pricer.seconds(op)))
    return tuple(parts.values())


def _dividing(sizes: Sizes, layout: Layout) -> dict[str, FloatArray]:
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(axis, dtype=float)) for axis in sizes.values()))
    named = dict(zip(sizes, arrays, strict=True))
    each = layout.dp * named["micro_batch"]
    good = (named["global_batch"] >= each) & (named["global_batch"] % each == 0)
    if not good.any():
        wanted, unit = float(named["global_batch"][0]), float(each[0])
        raise LayoutError(
            f"a global batch is a whole number of micro-batches on each of dp={layout.dp} replicas",
            value=f"global_batch={wanted:g}",
            fix=f"try global_batch={max(np.ceil(wanted / unit), 1) * unit:g}",
        )
    return {name: axis[good] for name, axis in named.items()}


def _memory(case: Case, sizes: Sizes, n_micro: FloatArray, state: TrainingState) -> dict[str, FloatArray]:
    points = zip(sizes["micro_batch"], sizes["sequence"], n_micro, strict=True)
    items = [training_memory(case, state, int(m), int(s), int(n)) for m, s, n in points]
    return {name: np.array([one[name] for one in items]) for name in items[0]}


def pipeline_s(times: StageTimes, n_micro: FloatArray) -> FloatArray:
    """(n_points,) time of a step.

    Notes
    -----
    A pipeline with many micro-batches repeats itself, so fewer than `PERIODS` fillings are run (a filling is
    a micro-batch a stage) and each of the rest adds what the last of them did.
    """
    step_s = np.zeros_like(n_micro)
    pp = times.n_stages
    for count in np.unique(n_micro):
        points = np.flatnonzero(n_micro == count)
        own = times.at(points.tolist())
        run = int(count if count < PERIODS * pp else (PERIODS - 1) * pp + count % pp)
        step_s[points] = makespan(pipeline_program(own, run))
        if count > run:
            filling_s = step_s[points] - makespan(pipeline_program(own, run - pp))
            step_s[points] += (count - run) / pp * filling_s
    return step_s


def pipeline_program(times: StageTimes, n_micro: int) -> Program:
    """One optimiser step as tasks; its ranks are the pipeline stages.

    Each stage runs ahead by as many forwards as stages follow it, then one forward and one backward in turn
    (1F1B; PipeDream-Flush in Narayanan et al., arXiv:2104.04473, section 2.2.1). A send takes part in both
    stages and nothing else of its direction overlaps with it there, as in Megatron-Core without interleaving.

    Parameters
    ----------
    times
        Of each stage.
    n_micro
        Micro-batches of one replica.
    """
    return _Pipeline(times, n_micro).run()


class _Pipeline:
    """Issues every stage's tasks, each once those that it waits for are issued."""

    def __init__(self, times: StageTimes, n_micro: int) -> None:
        self.times, self.n_micro, self.pp = times, n_micro, times.n_stages
        self.tasks: list[Task] = []
        self.done: dict[tuple[str, int, int], int] = {}
        self.last = [-1] * self.pp
        self.gather_s = np.broadcast_to(times.micro_gather_s, (self.pp,))
        self.reduce_s = np.broadcast_to(times.micro_reduce_s, (self.pp,))
        self.alone = [np.where(np.arange(self.pp) == s, 0, -1) for s in range(self.pp)]
        self.pairs = [
            np.where((np.arange(self.pp) == s) | (np.arange(self.pp) == s + 1), 0, -1)
            for s in range(self.pp - 1)
        ]

    def run(self) -> Program:
        queues = [_order_1f1b(stage, self.pp, self.n_micro) for stage in range(self.pp)]
        position = [0] * self.pp
        while any(position[s] < len(queues[s]) for s in range(self.pp)):
            for stage in reversed(range(self.pp)):
                if position[stage] < len(queues[stage]) and self._issue(
                    stage, *queues[stage][position[stage]]
                ):
                    position[stage] += 1
        for stage in range(self.pp):
            self._finish(stage)
        points = self.times.forward_s.shape[1]
        return Program(self.pp, tuple(self.tasks), points, tuple(f"stage {s}" for s in range(self.pp)))

    def _issue(self, stage: int, kind: str, micro: int) -> bool:
        """Issue one pass, after the send that feeds it; False where its input is not yet issued."""
        source = stage - 1 if kind == "forward" else stage + 1
        after: tuple[int, ...] = ()
        if 0 <= source < self.pp:
            made = self.done.get((kind, source, micro))
            if made is None:
                return False
            stream = "comm" if kind == "forward" else "copy"
            after = (
                self._add(
                    f"send.{kind}.{source}.{micro}", stream, self.times.hop_s, (made,),
                    self.pairs[min(stage, source)], "pipeline_send",
                ),
            )  # fmt: skip
        name = f"{kind}.{stage}.{micro}"
        seconds = (self.times.forward_s if kind == "forward" else self.times.backward_s)[stage]
        # weights come while a stage waits for its input, and a send need not wait for gradients to be summed
        self._around(f"weight_gather.{name}", self.gather_s[stage], stage, "weight_gather")
        self.done[kind, stage, micro] = self._add(name, "compute", seconds, after, self.alone[stage], kind)
        self.last[stage] = self.done[kind, stage, micro]
        if kind == "backward":
            self._around(f"gradients.{name}", self.reduce_s[stage], stage, "gradients")
        return True

    def _around(self, name: str, seconds: float, stage: int, kind: str) -> None:
        """An exchange beside a pass; on the compute stream, so that no pass of its stage hides it."""
        if seconds > 0:
            self.last[stage] = self._add(name, "compute", np.full(1, seconds), (), self.alone[stage], kind)

    def _finish(self, stage: int) -> None:
        last = self.last[stage]
        tail = (self.times.reduce_s, self.times.optimizer_s, self.times.gather_s)
        for name, seconds in zip(TAIL, tail, strict=True):
            stream = "compute" if name == "optimizer" else "comm"
            each = np.full(1, seconds[stage])
            last = self._add(f"{name}.{stage}", stream, each, (last,), self.alone[stage], name)

    def _add(
        self, name: str, stream: str, seconds: FloatArray, after: tuple[int, ...], group: np.ndarray, kind: str
    ) -> int:  # fmt: skip
        self.tasks.append(Task(name, stream, seconds.reshape(-1, 1), after, group, kind))
        return len(self.tasks) - 1


def _order_1f1b(stage: int, n_stages: int, n_micro: int) -> list[tuple[str, int]]:
    """Passes of one stage in order: as many forwards ahead as stages follow it, then in turn."""
    ahead = min(n_stages - 1 - stage, n_micro)
    order = [("forward", micro) for micro in range(ahead)]
    for micro in range(n_micro):
        if micro + ahead < n_micro:
            order.append(("forward", micro + ahead))
        order.append(("backward", micro))
    return order
