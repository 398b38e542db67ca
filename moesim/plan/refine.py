"""Long lists of sizes: some of them first, then those around the best."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.scenario import Choices, Scenario

__all__ = ["COARSE", "coarse", "finer"]

COARSE = 10
"""Sizes of a long list that every layout is priced at."""

FINE = 24
"""Sizes tried between the two around the best."""

AXES = ("batch_per_rank", "concurrency", "tokens_per_rank")
"""Sizes that a person gives as a long range."""


def coarse(scenario: Scenario) -> Scenario:
    """The scenario with a long list of sizes cut to `COARSE` of them, evenly spaced by ratio, ends kept."""
    axis, values = _long_axis(scenario)
    return scenario if axis is None else _with(scenario, axis, _spaced(values))


def finer(scenario: Scenario, sizes: dict[str, float]) -> Scenario | None:
    """The scenario with the sizes between the two that were tried around `sizes`; None where none are left."""
    axis, values = _long_axis(scenario)
    if axis is None:
        return None
    tried = _spaced(values)
    at = int(np.argmin(np.abs(np.array(tried) - sizes[axis])))
    low, high = tried[max(at - 1, 0)], tried[min(at + 1, len(tried) - 1)]
    inside = [value for value in values if low < value < high and value != tried[at]]
    if not inside:
        return None
    picks = np.unique(np.linspace(0, len(inside) - 1, min(FINE, len(inside))).round().astype(int))
    return _with(scenario, axis, [inside[pick] for pick in picks])


def _long_axis(scenario: Scenario) -> tuple[str | None, list[int]]:
    for axis in AXES:
        choices: Choices[int] | None = getattr(scenario.workload, axis, None)
        if choices is not None and len(set(choices)) > COARSE:
            return axis, sorted(set(choices))
    return None, []


def _spaced(values: list[int]) -> list[int]:
    """`COARSE` values whose ratios are alike, as far as the list has them."""
    wanted = np.geomspace(values[0], values[-1], COARSE)
    nearest = np.abs(np.array(values)[None, :] - wanted[:, None]).argmin(axis=1)
    return [values[position] for position in np.unique(nearest)]


def _with(scenario: Scenario, axis: str, values: list[int]) -> Scenario:
    update: dict[str, Any] = {axis: Choices(tuple(values))}
    return scenario.model_copy(update={"workload": scenario.workload.model_copy(update=update)})
