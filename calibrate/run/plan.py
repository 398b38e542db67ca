"""All points of a run in the order in which they are measured, with what each will take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from calibrate.run.design import Candidate, informative_order, interleave, log_sizes, with_held_out
from calibrate.run.estimate import measuring_s, predicted_s, sensitivity
from calibrate.run.points import FAMILIES, HELD_OUT_SHARE, Plan, Point, Scope, candidates
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Profile

__all__ = ["LONGEST_S", "family_order", "plan_points", "within_budget"]

LONGEST_S = 2.5
"""Points that take longer, compiling apart, are not measured: each would cost as much as five others."""


def plan_points(
    groups: Iterable[str],
    scope: Scope,
    gpu: Gpu,
    profile: Profile | None,
    *,
    plans: Sequence[Plan] = FAMILIES,
) -> list[Candidate]:
    """Choose and order the points of a run.

    Parameters
    ----------
    groups
        ``kernels``, ``transfers`` or both.
    scope
        What the machine can be asked.
    gpu, profile
        Datasheet and base profile behind estimates and sensitivities.
    plans
        Families to choose from.

    Returns
    -------
    Most informative first in every family; after any number of points each family has had its share of the time.
    A point's seconds are without compiling: `calibrate.run.compiled.with_compiling` adds it.
    """
    chosen = set(groups)
    queues = {plan.name: family_order(plan, scope, gpu, profile) for plan in plans if plan.group in chosen}
    return interleave(
        {name: [(one, one.seconds) for one in queue] for name, queue in queues.items()},
        {plan.name: plan.share for plan in plans},
    )


def within_budget(planned: Sequence[Candidate], budget_s: float | None) -> list[Candidate]:
    """Points that fit the time, if estimates are right; all without a budget."""
    if budget_s is None:
        return list(planned)
    spent_s, found = 0.0, []
    for one in planned:
        if spent_s + one.seconds <= budget_s:
            spent_s += one.seconds
            found.append(one)
    return found


def family_order(plan: Plan, scope: Scope, gpu: Gpu, profile: Profile | None) -> list[Candidate]:
    """Points of one family, most informative first, a fifth of them of held-out shapes."""
    points = candidates(plan, scope)
    n_held_out = min(round(HELD_OUT_SHARE * plan.quota), sum(point.held_out for point in points))
    fitted = [point for point in points if not point.held_out]
    held_out = [point for point in points if point.held_out]
    return with_held_out(
        _ordered(fitted, plan.quota - n_held_out, gpu, profile), _ordered(held_out, n_held_out, gpu, profile)
    )


def _ordered(points: Sequence[Point], n_wanted: int, gpu: Gpu, profile: Profile | None) -> list[Candidate]:
    if not points or not n_wanted:
        return []
    seconds = measuring_s(points, predicted_s(points, gpu, profile))
    affordable = seconds <= LONGEST_S
    points, seconds = (
        [point for point, kept in zip(points, affordable, strict=True) if kept],
        seconds[affordable],
    )
    known = sensitivity(points, gpu, profile)
    order = informative_order(known, log_sizes([point.columns for point in points]), n_wanted)
    return [Candidate(points[i], float(seconds[i])) for i in order]
