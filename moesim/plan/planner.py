"""Rank layouts: price all of them at all sizes, keep what fits and meets the targets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from moesim.errors import LayoutError
from moesim.hardware.cluster import Cluster
from moesim.plan.context import Choice, Context
from moesim.plan.outcome import Outcome, cluster_row, layout_row
from moesim.plan.refine import coarse, finer
from moesim.plan.space import Refused, choices_of, enumerate_layouts
from moesim.plan.train import train_outcome
from moesim.plan.workloads import Sizes, decode_outcome, memory_of, prefill_outcome, serve_outcome
from moesim.routing.capacity import CapacityPolicy
from moesim.scenario.schema import Scenario
from moesim.scenario.workload import TrainWorkload
from moesim.units import Bound, format_seconds
from moesim.work.case import Layout
from moesim.work.memory import TrainingState
from moesim.work.ops import FloatArray

__all__ = ["Plan", "Ranked", "outcome_of", "plan", "sizes_of", "warnings_of"]

PLAN_FLOWS = 20_000
"""Flows of a step up to which a confirmation plays exchanges on the links: a tenth of a second; a run plays more."""
PLAN_DRAWN_TOKENS = 2048
"""Tokens drawn per expert group while planning; a run draws four times as many."""


KEPT = 10
"""Layouts that are surely in the right order: a two-batch variant that cannot be among them is not priced."""

EXCHANGES = ("dispatch", "combine", "prefill dispatch", "prefill combine")
"""Categories that two-batch overlap can hide."""


@dataclass(frozen=True, eq=False)
class Ranked:
    """One layout at its best size."""

    outcome: Outcome
    point: int
    score: float
    """The objective, less is better."""
    choice: Choice = field(default_factory=Choice)
    """Dispatch, overlap and capacity that were asked of it."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Layouts in order, what is out, and what it took."""

    scenario: Scenario
    context: Context
    """Model, routing and engine that were priced."""
    ranked: tuple[Ranked, ...]
    refused: tuple[Refused, ...]
    cloud: tuple[dict[str, Any], ...]
    """Every size that fits, in a few numbers each, for the Pareto front."""
    n_evaluated: int
    """Sizes priced, over all layouts."""
    n_layouts: int
    """Layouts priced."""
    elapsed_s: float
    cpu_s: float
    warnings: tuple[str, ...] = field(default=())


def plan(scenario: Scenario, *, progress: Callable[[float], None] | None = None) -> Plan:
    """Price every layout that a scenario allows and rank those that fit and meet its targets.

    Parameters
    ----------
    scenario
        Keys left out or with several values are what is searched.
    progress
        Called with the fraction done.

    Raises
    ------
    MoesimError
        If the scenario names what does not exist, or its routing is of another model.
    """
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    context = Context.of(scenario, max_drawn_tokens=PLAN_DRAWN_TOKENS, max_flows=PLAN_FLOWS)
    refused: list[Refused] = []
    todo: list[tuple[Cluster, Layout, Choice]] = []
    train = isinstance(scenario.workload, TrainWorkload)
    for cluster in scenario.cluster.clusters():
        space = enumerate_layouts(context.model, cluster, scenario.layout, train=train)
        refused += space.refused
        for layout in space.layouts:
            exchanges = context.model.is_moe and layout.group_dp > 1 and not train
            todo += [
                (cluster, layout, one) for one in choices_of(scenario.policy, plan=True, exchanges=exchanges)
            ]
    search = _Search(coarse(scenario), context, refused)
    for number, (cluster, layout, choice) in enumerate(
        sorted(todo, key=lambda one: one[2].overlap != "none")
    ):
        search.add(cluster, layout, choice)
        if progress is not None:
            progress((number + 1) / len(todo))
    search.refine(scenario)
    ranked, cloud = search.ranked, search.cloud
    return Plan(
        scenario,
        context,
        tuple(ranked),
        tuple(refused),
        tuple(cloud),
        search.n_evaluated,
        search.n_layouts,
        time.perf_counter() - begin_s,
        time.process_time() - begin_cpu_s,
        tuple(warnings_of(scenario, context)),
    )


def warnings_of(scenario: Scenario, context: Context) -> list[str]:
    """What a reader has to know of a scenario's inputs, each once."""
    work = scenario.workload
    longest = {
        "decode": lambda: max(work.context),  # type: ignore[union-attr]
        "prefill": lambda: max(work.prompt),  # type: ignore[union-attr]
        "serve": lambda: max(work.input) + max(work.output),  # type: ignore[union-attr]
        "train": lambda: max(work.sequence),  # type: ignore[union-attr]
    }[work.kind]()
    said = [
        line for cluster in scenario.cluster.clusters() for line in context.warnings(cluster, float(longest))
    ]
    said += context.policy_warnings(scenario)
    if scenario.subject_to.ttft or scenario.subject_to.ttft_p50:
        said.append("time to first token is off by a third in the median (docs/fits/serving.md)")
    return list(dict.fromkeys(said))


class _Search:
    """Prices layouts one after another and keeps those that may matter."""

    def __init__(self, scenario: Scenario, context: Context, refused: list[Refused]) -> None:
        self.scenario = scenario
        self.context = context
        self.refused = refused
        self.ranked: list[Ranked] = []
        self.cloud: list[dict[str, Any]] = []
        self.n_evaluated = 0
        self.n_layouts = 0
        self._serial: dict[tuple[int, Layout, str, CapacityPolicy | None], Outcome] = {}

    def add(self, cluster: Cluster, layout: Layout, choice: Choice) -> None:
        """Price one layout and choice, unless a bound shows that it cannot come near the top."""
        key = (id(cluster), layout, choice.dispatch, choice.capacity)
        if choice.overlap != "none" and key in self._serial and self._hopeless(self._serial[key]):
            self.refused.append(
                _refused(
                    self._serial[key],
                    0,
                    "dominated",
                    "two-batch overlap cannot lift it among the best: its bound is worse",
                )
            )
            return
        try:
            outcome = outcome_of(self.scenario, self.context, cluster, layout, choice)
        except LayoutError as error:  # a batch that does not divide over the replicas
            outcome = Refused(
                layout_row(layout),
                "divisibility",
                f"{error.rule}{f'; fix: {error.fix}' if error.fix else ''}",
                cluster=cluster_row(cluster, layout),
            )
        if isinstance(outcome, Refused):
            self.refused.append(outcome)
            return
        if choice.overlap == "none":
            self._serial[key] = outcome
        self.n_layouts += 1
        self.n_evaluated += outcome.n_points
        best = _best(self.scenario, outcome)
        if isinstance(best, Refused):
            self.refused.append(best)
        else:
            self.ranked.append(replace(best, choice=choice))
        self.cloud += _cloud(self.scenario, outcome)

    def refine(self, scenario: Scenario) -> None:
        """Rank, trying the best layouts at the sizes of a long list that lie between those priced so far."""
        self.ranked.sort(key=lambda one: one.score)
        for place, one in enumerate(self.ranked[:KEPT]):
            sizes = {name: float(values[one.point]) for name, values in one.outcome.workload.items()}
            between = finer(scenario, sizes)
            if between is None:
                continue
            case = one.outcome.case
            outcome = outcome_of(between, self.context, case.cluster, case.layout, one.choice)
            if isinstance(outcome, Refused):
                continue
            self.n_evaluated += outcome.n_points
            self.cloud += _cloud(scenario, outcome)
            best = _best(scenario, outcome)
            if isinstance(best, Ranked) and best.score < one.score:
                self.ranked[place] = replace(best, choice=one.choice)
        self.ranked.sort(key=lambda one: one.score)

    def _hopeless(self, serial: Outcome) -> bool:
        """Whether hiding every exchange of a serial run still leaves its score behind the best `KEPT`.

        Two half batches compute at least as long as one whole batch, so at best the exchanges vanish. That the
        halves may also even out waiting between ranks is left out: the bound is not strict.
        """
        scores = sorted(one.score for one in self.ranked)
        if len(scores) < KEPT:
            return False
        name, sign = self.scenario.objective
        hidden = sum(
            (serial.category_s.get(part, np.zeros(1)) for part in EXCHANGES), np.zeros(serial.n_points)
        )
        time_s = serial.tpot_s if serial.tpot_s is not None else serial.step_s
        faster = np.clip(1.0 - hidden / time_s, 0.05, 1.0)
        values = serial.metric(name)
        if values is None:
            return False
        bound = sign * values * (faster if sign > 0 else 1.0 / faster)
        return bool(np.min(bound[serial.fits], initial=np.inf) > scores[KEPT - 1])


def sizes_of(scenario: Scenario, layout: Layout) -> Sizes:
    """Every combination of a workload's sizes, one array an axis: (n_points,) each."""
    workload = scenario.workload
    names = [
        name
        for name in ("batch_per_rank", "tokens_per_rank", "context", "prompt", "input", "output", "concurrency",
                     "chunk", "global_batch", "micro_batch", "sequence")
        if getattr(workload, name, None) is not None
    ]  # fmt: skip
    table = np.array(list(product(*(getattr(workload, name) for name in names))), dtype=float)
    sizes = {name: table[:, column] for column, name in enumerate(names)}
    if "concurrency" in sizes:
        sizes["batch_per_rank"] = np.maximum(sizes["concurrency"] / layout.dp, 1.0)
    return sizes


def outcome_of(
    scenario: Scenario, context: Context, cluster: Cluster, layout: Layout, choice: Choice
) -> Outcome | Refused:
    """Price one layout at those of the workload's sizes that fit in memory; refuse it where none does."""
    sizes = sizes_of(scenario, layout)
    if isinstance(scenario.workload, TrainWorkload):
        state = state_of(scenario.workload)
        return train_outcome(context, cluster, layout, choice, sizes, state)
    kind = scenario.workload.kind
    case = context.case(cluster, layout, choice, "prefill" if kind == "prefill" else "decode")
    memory = memory_of(kind, case, sizes, context.busiest(case))
    fits = memory["total"] <= memory["capacity"]
    if not fits.any():
        least = int(np.argmin(memory["total"]))
        need, have = float(memory["total"][least]), float(memory["capacity"][least])
        return Refused(
            layout_row(layout),
            "memory",
            f"needs {need / 1e9:.1f} GB of memory and the GPU has {have / 1e9:.1f} GB",
            _size(sizes, least),
            cluster_row(cluster, layout),
            {name: float(values[least]) for name, values in memory.items()},
        )
    price = {"decode": decode_outcome, "prefill": prefill_outcome, "serve": serve_outcome}[kind]
    return price(context, cluster, layout, choice, {name: axis[fits] for name, axis in sizes.items()})


def state_of(work: TrainWorkload) -> TrainingState:
    """What a training workload keeps for every weight."""
    zero: Literal[0, 1, 2, 3] = work.zero  # type: ignore[assignment]
    return TrainingState(zero, 4.0 if work.gradient_dtype == "float32" else 2.0, 12.0, work.recompute)


def _best(scenario: Scenario, outcome: Outcome) -> Ranked | Refused:
    """The size that does best by the objective among those that fit and meet every target."""
    name, sign = scenario.objective
    values = outcome.metric(name)
    if values is None:
        return _refused(outcome, 0, "target", f"{name} is no figure of a {scenario.workload.kind} workload")
    if not outcome.fits.any():
        least = int(np.argmin(outcome.memory_bytes["total"]))
        return _refused(outcome, least, "memory", outcome.why_not(least) or "")
    allowed = outcome.fits.copy()
    for metric, bound in scenario.subject_to.bounds().items():
        allowed &= _meets(outcome.metric(metric), bound, outcome.n_points)
    if not allowed.any():
        point, reason = _nearest_miss(scenario, outcome)
        return _refused(outcome, point, "target", reason)
    score = np.where(allowed, sign * values, np.inf)
    point = int(np.argmin(score))
    return Ranked(outcome, point, float(score[point]))


def _refused(outcome: Outcome, point: int, kind: str, reason: str) -> Refused:
    layout = outcome.case.layout
    return Refused(
        layout_row(layout),
        kind,
        reason,
        _size(outcome.workload, point),
        cluster_row(outcome.case.cluster, layout),
    )


def _size(sizes: Sizes, point: int) -> float | None:
    for name in ("batch_per_rank", "tokens_per_rank", "micro_batch"):
        if name in sizes:
            return float(sizes[name][point])
    return None


def _meets(values: FloatArray | None, bound: Bound, n_points: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if values is None:
        return np.zeros(n_points, dtype=bool)
    return np.asarray(values <= bound.value if bound.op == "<=" else values >= bound.value)


def _nearest_miss(scenario: Scenario, outcome: Outcome) -> tuple[int, str]:
    """The size that fits and misses its targets by the smallest factor, in words."""
    worst = np.where(outcome.fits, 1.0, np.inf)
    said = np.full(outcome.n_points, "", dtype=object)
    for metric, bound in scenario.subject_to.bounds().items():
        values = outcome.metric(metric)
        if values is None:
            return 0, f"{metric} is no figure of a {scenario.workload.kind} workload"
        miss = values / bound.value if bound.op == "<=" else bound.value / np.maximum(values, 1e-30)
        text = [f"{metric} is {_shown(metric, float(value))}, not {bound.text}" for value in values]
        said = np.where(miss > worst, text, said)
        worst = np.maximum(worst, miss)
    point = int(np.argmin(worst))
    return point, str(said[point])


def _shown(metric: str, value: float) -> str:
    if metric.removesuffix("_p50") in ("ttft", "tpot", "step"):
        return format_seconds(value)
    return f"{value:.3g}"


def _cloud(scenario: Scenario, outcome: Outcome) -> list[dict[str, Any]]:
    layout, cluster = outcome.case.layout, outcome.case.cluster
    allowed = np.ones(outcome.n_points, dtype=bool)
    for metric, bound in scenario.subject_to.bounds().items():
        allowed &= _meets(outcome.metric(metric), bound, outcome.n_points)
    common = {"layout": layout_row(layout), "cluster": cluster_row(cluster, layout)}
    figures = {name: outcome.metric(name) for name in ("ttft", "tpot", "step")}
    times = {f"{name}_s": values for name, values in figures.items() if values is not None}
    return [
        {
            **common,
            "workload": {name: float(values[point]) for name, values in outcome.workload.items()},
            "feasible": bool(allowed[point]),
            **{name: float(values[point]) for name, values in times.items()},
            "tokens_per_s_per_gpu": float(outcome.tokens_per_s[point]) / layout.n_ranks,
            "usd_per_mtok": float(outcome.usd_per_mtok[point]),
        }
        for point in np.flatnonzero(outcome.fits).tolist()
    ]
