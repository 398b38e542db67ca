"""Run one layout: price it, then play it event by event."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moesim.engine import Timeline
from moesim.errors import LayoutError
from moesim.hardware.cluster import Cluster
from moesim.plan.context import Choice, Context
from moesim.plan.moving import moving_row
from moesim.plan.outcome import Outcome, cluster_row, layout_row, loss_row
from moesim.plan.planner import outcome_of
from moesim.plan.space import Refused, check_sizes, choices_of, facts_of
from moesim.scenario.schema import Scenario
from moesim.work.case import Layout

__all__ = ["Priced", "Run", "price_one", "priced_in", "result_row", "run", "simulated"]


@dataclass(frozen=True, eq=False)
class Run:
    """One layout at one size."""

    context: Context
    cluster: Cluster
    layout: Layout
    choice: Choice
    outcome: Outcome | None
    """None where it does not fit in memory."""
    row: dict[str, Any]
    """As `moesim run --json` prints it."""
    timelines: tuple[Timeline, ...]
    """One micro-batch in each pipeline stage; of training, the pipeline itself."""


def run(scenario: Scenario) -> Run:
    """Price and simulate the one layout of a scenario.

    Raises
    ------
    MoesimError
        If a key has several values, the layout does not divide, or a name is unknown.
    """
    one = _priced(scenario)
    if isinstance(one.outcome, Refused):
        return Run(one.context, one.cluster, one.layout, one.choice, None, _refused_row(one.outcome), ())
    row, timelines = result_row(one.context, one.outcome)
    return Run(one.context, one.cluster, one.layout, one.choice, one.outcome, row, timelines)


def result_row(
    context: Context, outcome: Outcome, *, engine: bool = True
) -> tuple[dict[str, Any], tuple[Timeline, ...]]:
    """The one size of an outcome as `moesim run --json` prints it; without `engine` nothing is played."""
    row, timelines = simulated(outcome, 0) if engine else ({**outcome.row(0), "engine": None}, ())
    return {**row, "rebalance": moving_row(context, outcome, 0)}, timelines


def price_one(scenario: Scenario) -> Outcome:
    """Price the one layout of a scenario, with no simulation.

    Raises
    ------
    MoesimError
        As `run`, and where it does not fit in memory.
    """
    one = _priced(scenario)
    if isinstance(one.outcome, Refused):
        raise LayoutError(one.outcome.reason, fix="more GPUs, a smaller batch, or a narrower format")
    return one.outcome


@dataclass(frozen=True, eq=False)
class Priced:
    """One layout at one size, or why it is out."""

    context: Context
    cluster: Cluster
    layout: Layout
    choice: Choice
    outcome: Outcome | Refused


def _priced(scenario: Scenario) -> Priced:
    scenario = scenario.single()
    (cluster,) = scenario.cluster.clusters()
    return priced_in(Context.of(scenario), cluster, scenario)


def priced_in(context: Context, cluster: Cluster, scenario: Scenario) -> Priced:
    """Price the one layout of a scenario whose model, routing and cluster are loaded already.

    Raises
    ------
    MoesimError
        If the layout does not divide, or the routing is of another model.
    """
    layout = layout_of(scenario, context, cluster)
    (choice,) = choices_of(scenario.policy, plan=False, exchanges=True)
    outcome = outcome_of(scenario, context, cluster, layout, choice)
    return Priced(context, cluster, layout, choice, _fitting(outcome))


def _fitting(outcome: Outcome | Refused) -> Outcome | Refused:
    """The same, refused where the one size that was priced does not fit (training prices before it looks)."""
    if isinstance(outcome, Refused) or bool(outcome.fits[0]):
        return outcome
    case = outcome.case
    memory = {name: float(values[0]) for name, values in outcome.memory_bytes.items()}
    return Refused(
        layout_row(case.layout),
        "memory",
        outcome.why_not(0) or "",
        cluster=cluster_row(case.cluster, case.layout),
        memory_bytes=memory,
    )


def layout_of(scenario: Scenario, context: Context, cluster: Cluster) -> Layout:
    """The layout of a run, with defaults filled in and checked.

    Raises
    ------
    LayoutError
        If it does not divide.
    """
    facts = facts_of(context.model)
    sizes = scenario.layout.sizes(cluster.n_gpus, facts.n_experts)
    if (
        facts.n_experts
        and scenario.layout.etp is None
        and scenario.layout.ep is not None
        and sizes.tp % sizes.ep == 0
    ):
        sizes = replace(sizes, etp=sizes.tp // sizes.ep)
    check_sizes(sizes, facts, cluster.n_gpus)
    return Layout(**vars(sizes))


def simulated(outcome: Outcome, point: int) -> tuple[dict[str, Any], tuple[Timeline, ...]]:
    """A size of an outcome as a row, with the engine's time and breakdown in it, and the timelines."""
    row = outcome.row(point)
    played = outcome.play(point)
    row["engine"] = {
        "step_s": played.step_s,
        "difference": played.step_s / float(outcome.step_s[point]) - 1.0,
        "links": played.links,
    }
    row["breakdown_s"] = played.breakdown_s
    return row, played.timelines


def _refused_row(refused: Refused) -> dict[str, Any]:
    empty = dict.fromkeys(
        (
            "step_s",
            "tokens_per_s",
            "tokens_per_s_per_gpu",
            "ttft_s",
            "tpot_s",
            "mfu",
            "usd_per_mtok",
            "imbalance",
        )
    )
    return {
        "layout": refused.layout,
        "cluster": refused.cluster,
        "choice": None,
        "workload": None,
        "feasible": False,
        "why_not": refused.reason,
        "memory_bytes": refused.memory_bytes,
        **empty,
        "breakdown_s": None,
        **loss_row(None, 0),
        "band": {"low": None, "high": None},
        "calibrated": None,
        "engine": None,
        "rebalance": None,
    }
