"""Search layouts, rank them, run one, explain it, sweep some keys."""

from moesim.plan.answer import Maps, PlanAnswer, plan_answer, run_answer
from moesim.plan.context import Choice, Context
from moesim.plan.explain import explain
from moesim.plan.grid import Grid, read_grid
from moesim.plan.outcome import Outcome
from moesim.plan.planner import Plan, Ranked, plan
from moesim.plan.run import Run, price_one, run
from moesim.plan.space import Refused
from moesim.plan.sweep import sweep

__all__ = [
    "Choice",
    "Context",
    "Grid",
    "Maps",
    "Outcome",
    "Plan",
    "PlanAnswer",
    "Ranked",
    "Refused",
    "Run",
    "explain",
    "plan",
    "plan_answer",
    "price_one",
    "read_grid",
    "run",
    "run_answer",
    "sweep",
]
