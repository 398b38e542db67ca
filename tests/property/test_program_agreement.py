"""Programs made from real steps: both executors agree, fusing changes nothing, no task starts too early."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesim.engine import Program, evaluate, makespan, simulate
from moesim.engine.unroll import TimedStep, time_step
from moesim.errors import LayoutError
from moesim.plan.context import Choice
from moesim.work.case import Layout
from moesim.work.memory import TrainingState
from moesim.work.step import Batch
from moesim.work.training import backward_step
from tests.work_cases import case_of, context_of, step_of

MODELS = ("mixtral-8x7b", "deepseek-v2-lite", "olmoe-1b-7b", "qwen3-32b", "switch-base-8")
LAYOUTS = (
    Layout(), Layout(tp=4, ep=4), Layout(tp=4, ep=2, etp=2), Layout(tp=8, ep=2), Layout(dp=8, ep=8),
    Layout(tp=2, dp=4, ep=8), Layout(tp=2, dp=4, ep=4, etp=2), Layout(dp=16, ep=4), Layout(tp=4),
)  # fmt: skip
EXAMPLES = settings(max_examples=25, deadline=None)
cases = st.tuples(
    st.sampled_from(MODELS),
    st.sampled_from(LAYOUTS),
    st.sampled_from(["prefill", "decode", "train", "backward"]),
    st.sampled_from(["auto", "allgather", "nccl"]),
    st.sampled_from(["none", "two-batch"]),
)


def timed(drawn: tuple[str, Layout, str, str, str]) -> TimedStep:
    model, layout, kind, dispatch, overlap = drawn
    phase = "train" if kind == "backward" else kind
    try:
        case = case_of(model, layout, phase, Choice(dispatch, overlap), routing="zipf")
    except LayoutError:
        assume(False)
    query = 1 if phase == "decode" else 32
    step = step_of(case, Batch.of(phase, np.array([4.0, 8.0]), query, 32), routing="zipf")
    if kind == "backward":
        step = backward_step(step, TrainingState(recompute="full"))
    return time_step(step, context_of(model, "zipf").pricer(case, phase))


def overlapping(program: Program) -> bool:
    """Two streams fill one class of link."""
    streams: dict[str, set[str]] = {}
    for task in program.tasks:
        if task.link is not None:
            streams.setdefault(task.link, set()).add(task.stream)
    return any(len(used) > 1 for used in streams.values())


@given(drawn=cases)
@EXAMPLES
def test_the_engine_and_the_recurrence_agree(drawn):
    program = timed(drawn).program()
    schedule = evaluate(program)
    for point in range(program.n_points):
        alone = simulate(program, point, contention=False)
        np.testing.assert_allclose(alone.end_s, schedule.end_s[:, point], rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(alone.start_s, schedule.start_s[:, point], rtol=1e-9, atol=1e-15)
        shared_s = simulate(program, point).makespan_s
        assert shared_s >= alone.makespan_s * (1 - 1e-9)
        if not overlapping(program):
            apart = replace(program, sharing=None)
            assert simulate(apart, point).makespan_s == pytest.approx(alone.makespan_s, rel=1e-9)
            assert program.sharing or shared_s == pytest.approx(alone.makespan_s, rel=1e-9)


@given(drawn=cases)
@EXAMPLES
def test_joined_tasks_end_when_single_ones_do(drawn):
    step = timed(drawn)
    single, joined = step.program(), step.program(fused=True)
    assert len(joined.tasks) < len(single.tasks)
    np.testing.assert_allclose(makespan(joined), makespan(single), rtol=1e-9)
    np.testing.assert_allclose(step.makespan_s(), makespan(step.program(stretched=True)), rtol=1e-9)
    if step.sharing is None:
        np.testing.assert_allclose(step.makespan_s(), makespan(single), rtol=1e-9)


@given(drawn=cases, first=st.integers(0, 3), more=st.integers(1, 12))
@EXAMPLES
def test_some_layers_take_as_long_by_sums_as_by_the_recurrence(drawn, first, more):
    step = timed(drawn)
    layers = frozenset(range(first, first + more))
    stretched = step.program(layers, stretched=True)
    np.testing.assert_allclose(step.makespan_s(layers), makespan(stretched), rtol=1e-9)


@given(drawn=cases)
@EXAMPLES
def test_the_recurrence_holds_what_overlap_costs_on_average(drawn):
    step = timed(drawn)
    alone_s, stretched_s = makespan(step.program()), step.makespan_s()
    assert np.all(stretched_s >= alone_s * (1 - 1e-9))
    most = 1.0 if step.sharing is None else max(step.sharing.exchange_stretch, step.sharing.compute_stretch)
    assert np.all(stretched_s <= alone_s * most * (1 + 1e-9))


@given(drawn=cases)
@EXAMPLES
def test_no_task_starts_before_what_it_waits_for(drawn):
    program = timed(drawn).program()
    timeline = simulate(program)
    last_on = {}
    for position, task in enumerate(program.tasks):
        for earlier in task.after:
            assert np.all(timeline.start_s[position] >= timeline.end_s[earlier] - 1e-15)
        previous = last_on.get(task.stream)
        if previous is not None:
            assert np.all(timeline.start_s[position] >= timeline.end_s[previous] - 1e-15)
        last_on[task.stream] = position
        if task.group is not None:
            for one in np.unique(task.group):
                assert np.ptp(timeline.start_s[position][task.group == one]) == 0


@pytest.mark.parametrize(
    "layout", [Layout(dp=16, ep=16), Layout(tp=2, dp=8, ep=8, etp=2), Layout(tp=8, ep=2)]
)
def test_groups_of_a_program_are_those_of_the_layout(layout):
    """An expert group is ep x etp consecutive ranks; its exchange joins the same shard of every expert."""
    case = case_of("mixtral-8x7b" if layout.ep <= 8 else "olmoe-1b-7b", layout, "train")
    step = step_of(case, Batch.of("train", 2.0, 32, 32))
    program = time_step(step, context_of(case.model.name).pricer(case, "train")).program()
    ranks = np.arange(layout.group_ranks)
    wanted = ranks // (layout.ep * layout.etp) * layout.etp + ranks % layout.etp
    dispatches = [task for task in program.tasks if "dispatch" in task.name]
    assert dispatches
    for task in dispatches:
        np.testing.assert_array_equal(task.group, wanted)
        assert np.all(np.bincount(task.group) == layout.ep)


def test_two_batches_hide_part_of_the_exchange():
    layout = Layout(dp=16, ep=16)
    batch = Batch.of("prefill", 4.0, 2048, 2048)
    times = {}
    for overlap in ("none", "two-batch"):
        case = case_of("olmoe-1b-7b", layout, "prefill", Choice("normal", overlap))
        step = time_step(step_of(case, batch), context_of("olmoe-1b-7b").pricer(case, "prefill"))
        times[overlap] = (
            float(makespan(step.program())[0]),
            sum(
                float(np.broadcast_to(one, (1, len(block.layers), 16)).mean(axis=2).sum())
                for block, row in zip(step.step.blocks, step.seconds, strict=True)
                for one in row
            ),
        )
    chained, summed = times["none"]
    assert chained >= summed * (1 - 1e-9)
    assert times["two-batch"][0] < times["two-batch"][1]
