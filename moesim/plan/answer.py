"""Plans and runs as plain values, and what a report shows of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine import Timeline
from moesim.plan.context import Context
from moesim.plan.explain import families_used
from moesim.plan.outcome import Outcome
from moesim.plan.planner import Plan, warnings_of
from moesim.plan.run import Run, simulated
from moesim.scenario.schema import Scenario
from moesim.scenario.workload import TrainWorkload

__all__ = ["Maps", "PlanAnswer", "maps_of", "plan_answer", "run_answer", "whole_run"]

N_BREAKDOWNS = 8
"""Layouts whose time is broken down on their critical rank; kernel times are given of the others."""


@dataclass(frozen=True, eq=False)
class Maps:
    """Where the load of one layout goes."""

    title: str
    row: dict[str, Any]
    expert_load: NDArray[np.float64] | None
    """(n_layers, n_slots) rows over the layer's mean."""
    rank_load: NDArray[np.float64] | None
    """(n_layers, n_ranks) the same by rank."""
    traffic: NDArray[np.float64] | None
    """(n_ranks, n_ranks) bytes of one layer's dispatch."""
    layers: tuple[int, ...]
    timeline: Timeline | None
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class PlanAnswer:
    """A plan as plain values, and the maps of its best layouts."""

    plan: dict[str, Any]
    maps: tuple[Maps, ...]


def plan_answer(
    found: Plan, *, n_engine: int = 3, n_maps: int = 2, progress: Callable[[float], None] | None = None
) -> PlanAnswer:
    """Play the best layouts event by event and put the plan in plain values.

    Parameters
    ----------
    found
        The plan.
    n_engine
        Layouts to run in the engine.
    n_maps
        Layouts to keep maps and timelines of.
    progress
        Called with the fraction done.
    """
    rows: list[dict[str, Any]] = []
    maps: list[Maps] = []
    for number, one in enumerate(found.ranked):
        if number < n_engine:
            row, timelines = simulated(one.outcome, one.point)
            if number < n_maps:
                maps.append(maps_of(found.context, one.outcome, one.point, row, timelines))
            if progress is not None:
                progress((number + 1) / n_engine)
        else:
            row = {**one.outcome.row(one.point), "engine": None}
            if number < N_BREAKDOWNS:
                row["breakdown_s"] = one.outcome.play(one.point, events=False).breakdown_s
        rows.append({"rank": number + 1, **row, **whole_run(row, found.scenario)})
    best = found.ranked[0].outcome if found.ranked else None
    plan = {
        "scenario": scenario_row(found.scenario),
        "objective": found.scenario.objective[0],
        "targets": {name: bound.text for name, bound in found.scenario.subject_to.bounds().items()},
        "layouts": rows,
        "layouts_all": list(found.cloud),
        "ruled_out": [one.row() for one in found.refused],
        "n_layouts": found.n_layouts,
        "n_evaluated": found.n_evaluated,
        "elapsed_s": found.elapsed_s,
        "cpu_s": found.cpu_s,
        "points_per_cpu_s": found.n_evaluated / max(found.cpu_s, 1e-9),
        "warnings": list(found.warnings),
        "provenance": families_used(best) if best else [],
    }
    return PlanAnswer(plan, tuple(maps))


def run_answer(found: Run, scenario: Scenario) -> tuple[dict[str, Any], Maps]:
    """A run as plain values, and its maps."""
    result = {"scenario": scenario_row(scenario), **found.row, **whole_run(found.row, scenario)}
    result["warnings"] = warnings_of(scenario, found.context) + _link_warnings(found.row)
    if found.outcome is None:
        return {**result, "provenance": []}, Maps("", result, None, None, None, (), None, ())
    result["provenance"] = families_used(found.outcome)
    return result, maps_of(found.context, found.outcome, 0, result, found.timelines)


def _link_warnings(row: dict[str, Any]) -> list[str]:
    """What the engine did not play on the links of the cluster."""
    exchanged = {"low-latency", "normal", "nccl"} & set(
        ((row["choice"] or {}).get("resolved") or {}).values()
    )
    if not exchanged or row["layout"]["ep"] == 1 or (row["engine"] or {}).get("links") != "ports":
        return []
    slow = "" if find_spec("numba") else "; pip install 'moesim[fast]' plays 500 times as many"
    return [f"token exchanges have too many flows to share links: each rank's own ports price them{slow}"]


def whole_run(row: dict[str, Any], scenario: Scenario) -> dict[str, Any]:
    """Days and dollars of a whole training run; null where its tokens are not given, absent of other workloads."""
    if not isinstance(scenario.workload, TrainWorkload):
        return {}
    tokens = scenario.workload.tokens
    if tokens is None or row["tokens_per_s"] is None:
        return {"days": None, "usd": None}
    return {"days": tokens / row["tokens_per_s"] / 86_400, "usd": tokens / 1e6 * row["usd_per_mtok"]}


def scenario_row(scenario: Scenario, swept: Collection[str] = ()) -> dict[str, Any]:
    """What was asked, in short, less what a sweep varies."""
    work = scenario.workload.model_dump(exclude_none=True)
    kept = [key for key in work if key != "kind" and f"workload.{key}" not in swept]
    sizes = ", ".join(f"{key} {_shown(work[key])}" for key in kept)
    workload = f"{scenario.workload.kind}: {sizes}" if sizes else scenario.workload.kind
    row = {"model": scenario.model, "workload": workload, "seed": scenario.seed}
    return {key: value for key, value in row.items() if key not in swept}


def _shown(value: Any) -> str:
    plain = value.plain() if hasattr(value, "plain") else value
    if isinstance(plain, list):
        return f"{plain[0]}..{plain[-1]}" if len(plain) > 3 else ", ".join(str(one) for one in plain)
    return str(plain)


def maps_of(
    context: Context, outcome: Outcome, point: int, row: dict[str, Any], timelines: tuple[Timeline, ...]
) -> Maps:
    """Loads and traffic of one layout at one size."""
    layout = outcome.case.layout
    title = f"tp {layout.tp}, dp {layout.dp}, ep {layout.ep}, etp {layout.etp}, pp {layout.pp}"
    first = next(iter(outcome.passes.values()), None)
    timeline = timelines[0] if timelines else None
    if first is None or first.traffic is None:
        return Maps(title, row, None, None, None, (), timeline, ())
    rows = first.traffic.tokens_per_slot[min(point, first.batch.n_points - 1)]
    by_rank = rows.sum(axis=2)
    slots = rows.reshape(len(rows), -1)
    tokens = float(first.batch.n_tokens[min(point, first.batch.n_points - 1), 0, 0])
    copies = context.traffic.matrix(outcome.case, first.batch.phase, tokens)
    notes = [f"Routing: {context.source_name}.", f"Placement: {layout.placement}."]
    return Maps(
        title,
        row,
        slots / np.maximum(slots.mean(axis=1, keepdims=True), 1e-12),
        by_rank / np.maximum(by_rank.mean(axis=1, keepdims=True), 1e-12),
        copies * context.model.hidden * outcome.case.dispatch_bytes_per_value,
        context.model.moe_layers,
        timeline,
        tuple(notes),
    )
