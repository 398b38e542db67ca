"""A pipeline stage may hold nothing that runs in a phase."""

from __future__ import annotations

import numpy as np

from moesim.engine.unroll import time_step
from moesim.work.case import Layout
from moesim.work.step import Batch
from tests.work_cases import case_of, context_of, step_of


def test_a_stage_without_work_takes_no_time():
    case = case_of("mixtral-8x7b", Layout(), "decode")
    step = step_of(case, Batch.of("decode", np.array([1.0, 2.0]), 1, 8))
    timed = time_step(step, context_of("mixtral-8x7b").pricer(case, "decode"))
    np.testing.assert_array_equal(timed.makespan_s(frozenset()), [0.0, 0.0])
    assert (timed.makespan_s() > 0).all()
