"""Capacity of an expert under three libraries' conventions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import LayoutError
from moesim.routing.capacity import expert_capacity

CONVENTIONS = ("megatron", "tutel", "megablocks")


@given(
    tokens=st.integers(1, 10_000), experts=st.integers(1, 256), top_k=st.integers(1, 8),
    factor=st.floats(0, 4), convention=st.sampled_from(CONVENTIONS),
)  # fmt: skip
def test_capacity_is_whole_and_near_the_factor_times_the_mean(tokens, experts, top_k, factor, convention):
    rows = float(expert_capacity(np.array(float(tokens)), experts, top_k, factor, convention))
    mean = factor * tokens * top_k / experts
    assert rows == int(rows)
    slack = {"megatron": (0, 1), "megablocks": (-1, 0), "tutel": (-top_k, top_k * factor)}[convention]
    assert mean + slack[0] - 1e-6 <= rows <= mean + slack[1] + 1e-6


def test_roundings_differ():
    """10 tokens, top-2 of 8, factor 1.5: ceil(3.75), 2 int(1.5 x 2), int(3.75)."""
    rows = [float(expert_capacity(np.array(10.0), 8, 2, 1.5, one)) for one in CONVENTIONS]
    assert rows == [4, 6, 3]


@pytest.mark.parametrize("factor", [-0.1, float("nan")])
def test_a_negative_factor_is_refused(factor):
    with pytest.raises(LayoutError, match="0 or more"):
        expert_capacity(np.array(1.0), 1, 1, factor, "megatron")


def test_an_unknown_convention_is_refused():
    with pytest.raises(LayoutError, match="unknown capacity convention; fix: megatron, tutel or megablocks"):
        expert_capacity(np.array(1.0), 1, 1, 1.0, "gshard")  # type: ignore[arg-type]
