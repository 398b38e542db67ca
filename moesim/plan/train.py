"""Training: forward and backward of every stage in a 1F1B pipeline, then gradients and optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.engine import Program, Task, Timeline, makespan, simulate
from moesim.errors import LayoutError
from moesim.hardware.cluster import Cluster
from moesim.hardware.profile import Family
from moesim.metrics import breakdown_s
from moesim.metrics.band import relative_band, step_band
from moesim.plan.context import Choice, Context
from moesim.plan.outcome import Outcome, model_flops
from moesim.plan.played import Played
from moesim.plan.steps import Pass, run_pass
from moesim.plan.workloads import Sizes
from moesim.work.case import Case, Layout
from moesim.work.memory import TrainingState, training_memory
from moesim.work.ops import FloatArray
from moesim.work.step import Batch
from moesim.work.training import backward_step, gradient_ops, optimizer_op

__all__ = ["StageTimes", "TrainRun", "pipeline_program", "pipeline_s", "train_outcome", "train_run"]

FLOPS_PER_FORWARD = 3.0
"""Model FLOPs of a training step over those of its forward pass; what is computed again does not count (PaLM,
arXiv:2204.02311, appendix B)."""

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

    @property
    def n_stages(self) -> int:
        """Pipeline stages."""
        return len(self.forward_s)

    def at(self, points: Sequence[int]) -> StageTimes:
        """The same at some of the points."""
        index = np.asarray(points)
        columns = (self.forward_s[:, index], self.backward_s[:, index], self.hop_s[index])
        return StageTimes(*columns, self.reduce_s, self.optimizer_s, self.gather_s)


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
    tail_parts: tuple[tuple[str, Family | None, FloatArray], ...]
    """What follows the last backward: category, family and (n_stages,) seconds."""

    def program(self, point: int) -> Program:
        """All micro-batches of one size on all stages."""
        return pipeline_program(self.times.at([point]), int(self.n_micro[point]))

    def timeline(self, point: int) -> Timeline:
        """The same, event by event."""
        return simulate(self.program(point))

    def play(self, point: int, *, events: bool = True) -> Played:
        """One size, and where the time of its last stage to end goes; short enough to be always run on the clock."""
        timeline = self.timeline(point)
        return Played(timeline.makespan_s, breakdown_s(timeline), (timeline,))

    def category_s(self) -> dict[str, FloatArray]:
        """(n_points,) kernel time of a step by category, mean over ranks; what is left is pipeline bubble."""
        per_rank = self.n_micro / self.case.layout.pp
        total: dict[str, FloatArray] = {}
        for one in (self.forward, self.backward):
            for name, seconds in one.category_s().items():
                total[name] = total.get(name, np.zeros_like(per_rank)) + seconds * per_rank
        for name, _, stage_s in self.tail_parts:
            total[name] = total.get(name, np.zeros_like(per_rank)) + stage_s.mean()
        times = self.times
        busy = (times.forward_s + times.backward_s).mean(axis=0) * self.n_micro
        busy = busy + (times.reduce_s + times.optimizer_s + times.gather_s).mean()
        total["pipeline_bubble"] = np.maximum(self.step_s - busy, 0.0)
        return total

    def family_s(self) -> Iterable[tuple[Family | None, FloatArray]]:
        """(n_points,) kernel time by family; a backward pass is derived from its forward, so it has none."""
        per_rank = self.n_micro / self.case.layout.pp
        yield from ((family, seconds * per_rank) for family, seconds in self.forward.family_s().values())
        yield None, sum((seconds for _, seconds in self.backward.family_s().values()), np.zeros(1)) * per_rank
        for _, family, stage_s in self.tail_parts:
            yield family, np.full_like(per_rank, stage_s.mean())


def train_outcome(
    context: Context, cluster: Cluster, layout: Layout, choice: Choice, sizes: Sizes, state: TrainingState
) -> Outcome:
    """One optimiser step; sizes ``global_batch``, ``micro_batch`` and ``sequence``, (n_points,) each.

    Sizes whose global batch is no whole number of micro-batches on every replica are left out.

    Raises
    ------
    LayoutError
        If no size divides.
    """
    case = context.case(cluster, layout, choice, "train")
    sizes = _dividing(sizes, layout)
    run = train_run(context, case, sizes, state)
    n_tokens = sizes["global_batch"] * sizes["sequence"]
    flops = FLOPS_PER_FORWARD * model_flops(context.model, n_tokens, sizes["sequence"] / 2)
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
        dropped_fraction=run.forward.dropped_fraction,
        category_s=run.category_s(),
        calibrated=calibrated,
        passes={"forward": run.forward, "backward": run.backward},
        how="step = 1F1B pipeline of both passes, then gradients, optimiser and weights",
        play=run.play,
    )


def train_run(context: Context, case: Case, sizes: Sizes, state: TrainingState) -> TrainRun:
    """Price the stages and run the pipeline; arguments as `train_outcome`, every size dividing."""
    batch = Batch.of("train", sizes["micro_batch"], sizes["sequence"], sizes["sequence"])
    forward = run_pass(context, case, batch)
    backward = run_pass(context, case, batch, build=lambda step: backward_step(step, state))
    tail = _tail(context, case, state)
    times = StageTimes(
        forward.stage_s,
        backward.stage_s,
        forward.hop_s,
        *(sum((s for name, _, s in tail if name == part), np.zeros(case.layout.pp)) for part in TAIL),
    )
    n_micro = sizes["global_batch"] / (case.layout.dp * sizes["micro_batch"])
    return TrainRun(case, forward, backward, times, n_micro, pipeline_s(times, n_micro), tail)


TAIL = ("gradients", "optimizer", "weight_gather")
"""Categories of what follows the last backward of a stage, in order."""


def _tail(
    context: Context, case: Case, state: TrainingState
) -> tuple[tuple[str, Family | None, FloatArray], ...]:
    pricer = context.pricer(case, "train")
    rows: dict[str, tuple[str, Family | None, FloatArray]] = {}
    for stage in case.stages:
        own = [*gradient_ops(case, stage, state), ("optimizer", optimizer_op(case, stage, state))]
        for name, op in own:
            part = "weight_gather" if name.startswith("weight") else "gradients"
            families = pricer.families(op)
            before = rows.get(
                name, (part if name != "optimizer" else name, families[0], np.zeros(case.layout.pp))
            )
            before[2][stage.index] += float(np.max(pricer.seconds(op)))
            rows[name] = before
    return tuple(rows.values())


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
        seconds = (self.times.forward_s if kind == "forward" else self.times.backward_s)[stage]
        name = f"{kind}.{stage}.{micro}"
        self.done[kind, stage, micro] = self._add(name, "compute", seconds, after, self.alone[stage], kind)
        return True

    def _finish(self, stage: int) -> None:
        last = self.done["backward", stage, self.n_micro - 1]
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
