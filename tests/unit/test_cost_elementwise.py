"""Kernels bound by memory."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.elementwise import elementwise_s
from moesim.hardware.catalog import load_gpu
from moesim.hardware.profile import load_profile
from moesim.work.ops import Elementwise

GPU = load_gpu("h200-sxm")
PARAMS = load_profile("h200-sxm").family("elementwise", "fused").values()


def seconds(moved, n_kernels=1):
    return elementwise_s(Elementwise(np.asarray(moved, dtype=float), n_kernels), gpu=GPU, params=PARAMS)


def test_large_tensors_move_near_the_memory_rate_and_never_faster():
    moved = np.array([1.0, 1e6, 1e9, 1e12])
    times = seconds(moved)
    assert np.all(times > moved / GPU.hbm_bytes_per_s)
    assert times[-1] < 1.4 * 1e12 / GPU.hbm_bytes_per_s
    assert np.all(np.diff(times) > 0)


def test_small_tensors_cost_their_launches():
    one, three = seconds(1e3), seconds(1e3, 3)
    assert 1e-6 < one < 5e-6
    assert three == pytest.approx(3 * one, rel=0.01)


def test_nothing_costs_nothing():
    assert np.array_equal(seconds(np.zeros((2, 3))), np.zeros((2, 3)))
