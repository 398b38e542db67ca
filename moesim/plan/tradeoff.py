"""Where a trade-off bends: what less of one thing costs of another, over the points of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["DEFINITION", "Knee", "figure", "find_knee", "tradeoff"]

LEAST_STRENGTH = 0.1
"""A curve that comes less than this far below its chord, on axes from 0 to 1, is called straight (assumed)."""

LEAST_RANGE = 0.01
"""A front whose ends are nearer than this share of x is called flat: a prediction is not that sure (assumed)."""

DEFINITION = (
    "the point of the Pareto front farthest below the chord of its ends, both axes scaled to 0..1 "
    "(Kneedle: Satopaa et al. 2011)"
)

PAIRS = (("dropped_fraction", ("tpot_s", "step_s")), ("usd_per_mtok", ("tpot_s", "step_s")))
"""What is given up, and the time that it buys: the first pair that the points trade. Less is better in both."""


@dataclass(frozen=True)
class Knee:
    """Where a falling convex curve bends most."""

    index: int
    """Of the points given."""
    strength: float
    """How far it comes below the chord: 0 on it, 1 in the corner."""
    front: tuple[int, ...]
    """Points that no other beats in both, by rising x."""


def figure(result: Mapping[str, Any], name: str) -> float | None:
    """A finite number of a result by its dotted name; None where it is absent, null or no number."""
    value: Any = result
    for step in name.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        return None
    return float(value)


def find_knee(x: ArrayLike, y: ArrayLike) -> Knee | None:
    """Find the knee of a trade-off; None where fewer than three points are on its front.

    Parameters
    ----------
    x, y : (n_points,)
        Two things of which less is better, in any units and order.

    Notes
    -----
    Of the points on the Pareto front, scaled to 0..1 on both axes, the one with the largest 1 - x - y: the one
    farthest below the chord between the ends.

    References
    ----------
    V. Satopaa et al., "Finding a 'Kneedle' in a Haystack", ICDCS Workshops 2011, section III.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    front: list[int] = []
    for at in np.lexsort((ys, xs)).tolist():
        if not front or ys[at] < ys[front[-1]]:
            front.append(at)
    if len(front) < 3:
        return None
    along, down = xs[front], ys[front]
    below = 1.0 - (along - along[0]) / (along[-1] - along[0]) - (down - down[-1]) / (down[0] - down[-1])
    most = int(np.argmax(below))
    return Knee(front[most], float(below[most]), tuple(front))


def tradeoff(keys: Sequence[str], points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The trade-off that a sweep shows, with a curve for each setting of the other keys.

    Parameters
    ----------
    keys
        Swept keys.
    points
        ``{"set": values by key, "result": ...}`` each; those without a result are left out.

    Returns
    -------
    dict or None
        ``x``, ``y``: names of figures in a result. ``along``: the key that runs on a curve. ``definition`` of the
        knee. ``curves``: ``set`` (the other keys), ``points`` (numbers in `points`), ``front`` (those that no
        other beats), ``knee`` (a number in `points`, or null and ``why_not``), ``strength``, and
        ``costs``: x for one unit of y, before the knee and beyond it. None where no two figures are traded.
    """
    done = [(number, point) for number, point in enumerate(points) if "result" in point]
    for y, times in PAIRS:
        for x in times:
            both = [
                number
                for number, point in done
                if figure(point["result"], x) is not None and figure(point["result"], y) is not None
            ]
            if found := _traded(keys, points, both, x, y):
                return found
    return None


def _traded(
    keys: Sequence[str], points: Sequence[Mapping[str, Any]], numbers: Sequence[int], x: str, y: str
) -> dict[str, Any] | None:
    """The trade-off of two figures along the key that moves the second most on a front; None where none has one."""
    lines = {key: _lines(key, points, numbers) for key in keys}
    for along in sorted(keys, key=lambda key: -_spread(lines[key], points, y)):
        curves = [_curve(set_, line, points, x, y) for set_, line in lines[along]]
        if any(len(curve["front"]) > 2 for curve in curves):
            return {"x": x, "y": y, "along": along, "definition": DEFINITION, "curves": curves}
    return None


def _lines(
    key: str, points: Sequence[Mapping[str, Any]], numbers: Sequence[int]
) -> list[tuple[dict[str, Any], list[int]]]:
    """Points that differ in one key alone, by what the other keys are; numbers first and ascending."""
    found: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for number in numbers:
        others = tuple((name, value) for name, value in points[number]["set"].items() if name != key)
        found.setdefault(others, []).append(number)

    def order(number: int) -> tuple[bool, float]:
        value = points[number]["set"].get(key)
        return (False, float(value)) if isinstance(value, int | float) else (True, 0.0)

    return [(dict(others), sorted(line, key=order)) for others, line in found.items()]


def _spread(lines: Sequence[tuple[Any, list[int]]], points: Sequence[Mapping[str, Any]], y: str) -> float:
    """How far `y` moves along a line, mean over the lines."""
    values = [[figure(points[number]["result"], y) or 0.0 for number in line] for _, line in lines]
    return sum(max(line) - min(line) for line in values) / max(len(values), 1)


def _curve(
    set_: dict[str, Any], line: list[int], points: Sequence[Mapping[str, Any]], x: str, y: str
) -> dict[str, Any]:
    xs = [figure(points[number]["result"], x) or 0.0 for number in line]
    ys = [figure(points[number]["result"], y) or 0.0 for number in line]
    told: dict[str, Any] = {"set": set_, "points": line, "front": [], "knee": None, "why_not": None}
    told |= {"strength": None, "costs": None}
    knee = find_knee(xs, ys)
    if knee is None:
        return told | {"why_not": "fewer than three points trade one for the other"}
    first, at, last = knee.front[0], knee.index, knee.front[-1]
    told |= {"front": [line[one] for one in knee.front], "strength": knee.strength}
    if xs[last] - xs[first] < LEAST_RANGE * xs[last]:
        return told | {"why_not": "what is saved is less than 1%"}
    if knee.strength < LEAST_STRENGTH:
        return told | {"why_not": "the curve is as good as straight"}
    before = (xs[at] - xs[first]) / (ys[first] - ys[at])
    beyond = (xs[last] - xs[at]) / (ys[at] - ys[last])
    return told | {"knee": line[at], "costs": {"before": before, "beyond": beyond}}
