"""Which points first: those whose time is least known, given the base profile and the points before them.

Two things are unknown before a measurement: the parameters of the family's cost model, and how far the model itself is
off at each point. Both are given a prior, which makes log time a Gaussian process over the candidates:

    log t(x) = log t0(x) + J(x) dp + r(x),    dp ~ N(0, s_p^2),    r ~ N(0, s_r^2 exp(-|z - z'|^2 / 2))

J is the cost model's sensitivity to the log of each parameter, at the base profile's values; z are the logarithms of
the point's sizes. The next point is the one whose time has the largest variance given those before it, so every prefix
is a design of its own. Where there is no cost model, J is empty, and what is left fills the space of sizes.

References
----------
With no residual this is sequential D-optimal design (Fedorov, Theory of optimal experiments, 1972); with one, greedy
maximum entropy sampling (Krause, Singh and Guestrin, Near-optimal sensor placements in Gaussian processes, JMLR 9,
2008, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from calibrate.run.points import HELD_OUT_SHARE, Point
from calibrate.schema import Value

__all__ = ["Candidate", "informative_order", "interleave", "log_sizes", "rounds", "with_held_out"]

FloatArray = NDArray[np.float64]
T = TypeVar("T")

PARAMETER_SPREAD = 0.4
"""Prior standard deviation of a parameter's logarithm: another device's or kernel's value is off by this much."""
MODEL_ERROR = 0.08
"""Prior standard deviation of the model's own error, of log time; shipped profiles show as much on held-out shapes."""
NOISE = 0.03
"""Standard deviation of one measured log time."""
LENGTH = 4.0
"""Points whose sizes differ by a factor of 2**LENGTH in one dimension say little of each other's model error."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A point and what measuring it costs."""

    point: Point
    seconds: float
    """Time that the measurement takes, all samples and the preparation included [s]."""


def log_sizes(rows: Sequence[Mapping[str, Value]]) -> FloatArray:
    """Coordinates of points: log2 of the numbers, one coordinate a word, words a unit apart; (n_points, n_dims)."""
    columns: list[FloatArray] = []
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        if isinstance(values[0], str):
            words = sorted({str(value) for value in values})
            if len(words) > 1:
                columns += [np.asarray([value == word for value in values]) / math.sqrt(2) for word in words]
        elif len(set(values)) > 1:
            columns.append(np.log2(1.0 + np.asarray(values, dtype=np.float64)) / LENGTH)
    return np.stack(columns, axis=1).astype(np.float64) if columns else np.zeros((len(rows), 0))


def covariance(sensitivity: FloatArray, coordinates: FloatArray) -> FloatArray:
    """Prior covariance of log time among the points, (n, n).

    Parameters
    ----------
    sensitivity : (n_points, n_parameters)
        d log t / d log parameter.
    coordinates : (n_points, n_dims)
        As `log_sizes` gives them.
    """
    of_parameters = PARAMETER_SPREAD**2 * sensitivity @ sensitivity.T
    square = np.sum(coordinates**2, axis=1)
    distance2 = np.maximum(square[:, None] + square[None, :] - 2.0 * coordinates @ coordinates.T, 0.0)
    return np.asarray(of_parameters + MODEL_ERROR**2 * np.exp(-0.5 * distance2))


def informative_order(sensitivity: FloatArray, coordinates: FloatArray, n_wanted: int) -> list[int]:
    """Indices of the `n_wanted` points to measure, the most informative first.

    Notes
    -----
    A pivoted Cholesky factorisation of the covariance plus noise: each step conditions on the point taken.
    """
    prior = covariance(sensitivity, coordinates)
    variance = np.diag(prior).copy()
    left = np.ones(variance.size, dtype=bool)
    factors: list[FloatArray] = []
    order: list[int] = []
    for _ in range(min(n_wanted, variance.size)):
        taken = int(np.argmax(np.where(left, variance, -np.inf)))
        known = sum((one * one[taken] for one in factors), np.zeros(variance.size))
        factor = (prior[:, taken] - known) / math.sqrt(max(variance[taken], 0.0) + NOISE**2)
        variance = variance - factor**2
        factors.append(factor)
        left[taken] = False
        order.append(taken)
    return order


def with_held_out(fitted: Sequence[T], held_out: Sequence[T]) -> list[T]:
    """One list out of two, in their own orders, with a fifth of any prefix held out as far as they last."""
    return interleave({"fitted": [(one, 1.0) for one in fitted], "held out": [(one, 1.0) for one in held_out]},
                      {"fitted": 1.0 - HELD_OUT_SHARE, "held out": HELD_OUT_SHARE})  # fmt: skip


def interleave(queues: Mapping[str, Sequence[tuple[T, float]]], shares: Mapping[str, float]) -> list[T]:
    """Serve several queues so that, after any number of items, each has had its share of the cost.

    Parameters
    ----------
    queues
        Items with their cost, by name.
    shares
        Weight of each queue.
    """
    places = dict.fromkeys(queues, 0)
    spent = dict.fromkeys(queues, 0.0)
    served: list[T] = []
    while open_queues := [name for name in queues if places[name] < len(queues[name])]:
        name = min(open_queues, key=lambda one: (spent[one] + queues[one][places[one]][1]) / shares[one])
        item, cost = queues[name][places[name]]
        served.append(item)
        places[name] += 1
        spent[name] += cost
    return served


def rounds(items: Sequence[T], size: int, seed: int) -> list[list[T]]:
    """Cut into rounds, each in random order: drift of the machine does not fall on one kind of point.

    A round is short, so that what is measured when time runs out is still the best of its length.
    """
    rng = np.random.default_rng(seed)
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    return [[part[i] for i in rng.permutation(len(part))] for part in parts]
