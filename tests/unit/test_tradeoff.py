"""Knees of trade-offs, worked by hand and whatever the units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.plan.tradeoff import find_knee, tradeoff


def test_knee_worked_by_hand() -> None:
    """Scaled: (0, 1), (0.25, 0.2), (0.5, 0.1), (1, 0); below the chord by 0, 0.55, 0.4, 0."""
    knee = find_knee([10, 12.5, 15, 20], [100, 20, 10, 0])
    assert knee is not None
    assert (knee.index, knee.front) == (1, (0, 1, 2, 3))
    assert knee.strength == pytest.approx(0.55)


def test_what_is_beaten_is_not_on_the_front() -> None:
    knee = find_knee([10, 12.5, 15, 20, 21, 16], [100, 20, 10, 0, 0, 50])
    assert knee is not None
    assert knee.front == (0, 1, 2, 3)


@pytest.mark.parametrize(("x", "y"), [([1, 2], [2, 1]), ([1, 2, 3], [1, 2, 3]), ([1, 1, 1], [3, 2, 1])])
def test_no_front_no_knee(x: list[float], y: list[float]) -> None:
    assert find_knee(x, y) is None


@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(3, 40),
    scale=st.floats(1e-6, 1e6),
    shift=st.floats(-100, 100),
)
def test_units_and_order_do_not_move_it(seed: int, n: int, scale: float, shift: float) -> None:
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.uniform(0.1, 1, n))
    y = np.cumsum(rng.uniform(0.1, 1, n) * np.linspace(1, 8, n))[::-1]
    order = rng.permutation(n)
    one = find_knee(x, y)
    other = find_knee((x * scale + shift * scale)[order], y[order] / scale)
    assert one is not None
    assert other is not None
    assert order[other.index] == one.index
    assert other.strength == pytest.approx(one.strength, abs=1e-6)


def points(
    dropped: dict[tuple[float, str], float], step_s: dict[tuple[float, str], float]
) -> list[dict[str, Any]]:
    return [
        {
            "set": {"factor": factor, "policy": policy},
            "result": {"step_s": step_s[factor, policy], "tpot_s": None, "dropped_fraction": share},
        }
        for (factor, policy), share in dropped.items()
    ]


def test_a_curve_for_each_policy() -> None:
    dropped = {(1, "a"): 0.2, (1, "b"): 0.1, (2, "a"): 0.04, (2, "b"): 0.05, (3, "a"): 0.0, (3, "b"): 0.0}
    step_s = {(1, "a"): 1.0, (1, "b"): 1.0, (2, "a"): 1.2, (2, "b"): 1.5, (3, "a"): 2.0, (3, "b"): 2.0}
    told = tradeoff(["factor", "policy"], [*points(dropped, step_s), {"set": {}, "refused": "no"}])
    assert told is not None
    assert (told["x"], told["y"], told["along"]) == ("step_s", "dropped_fraction", "factor")
    a, b = told["curves"]
    assert (a["set"], a["points"], a["knee"]) == ({"policy": "a"}, [0, 2, 4], 2)
    assert a["costs"] == pytest.approx({"before": 0.2 / 0.16, "beyond": 0.8 / 0.04})
    assert a["strength"] == pytest.approx(1 - 0.2 - 0.2)
    assert (b["knee"], b["why_not"]) == (None, "the curve is as good as straight")


def test_a_policy_that_drops_nothing_does_not_hide_the_other_s_curve() -> None:
    shares = {1.0: 0.2, 1.25: 0.1, 1.5: 0.04, 1.75: 0.03, 2.0: 0.02}
    dropped = {
        (factor, policy): share * (policy == "a") for factor, share in shares.items() for policy in "ab"
    }
    told = tradeoff(["factor", "policy"], points(dropped, {(f, p): f for f, p in dropped}))
    assert told is not None
    assert told["along"] == "factor"
    a, b = told["curves"]
    assert (a["knee"], b["knee"], b["why_not"]) == (
        4,
        None,
        "fewer than three points trade one for the other",
    )


def test_less_than_a_prediction_can_tell_is_no_knee() -> None:
    dropped = {(1, "a"): 0.2, (2, "a"): 0.04, (3, "a"): 0.0}
    step_s = {(1, "a"): 1.0, (2, "a"): 1.001, (3, "a"): 1.005}
    told = tradeoff(["factor", "policy"], points(dropped, step_s))
    assert told is not None
    assert told["curves"][0]["why_not"] == "what is saved is less than 1%"


def test_points_of_a_curve_ascend_whatever_order_they_were_asked_in() -> None:
    dropped = {(3, "a"): 0.0, (1, "a"): 0.2, (2, "a"): 0.04}
    told = tradeoff(["factor", "policy"], points(dropped, {(1, "a"): 1.0, (2, "a"): 1.2, (3, "a"): 2.0}))
    assert told is not None
    assert told["curves"][0]["points"] == [1, 2, 0]
    assert told["curves"][0]["knee"] == 2


def test_nothing_traded_is_none() -> None:
    assert tradeoff(["factor", "policy"], []) is None
    same = {(1, "a"): 0.0, (2, "a"): 0.0, (3, "a"): 0.0}
    assert tradeoff(["factor", "policy"], points(same, dict.fromkeys(same, 1.0))) is None
