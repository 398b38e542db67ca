"""Training: the pipeline's bubble, its bounds, and what an outcome says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine import evaluate, makespan, simulate
from moesim.errors import LayoutError
from moesim.metrics import check_timeline
from moesim.plan.context import Choice
from moesim.plan.explain import explain
from moesim.plan.outcome import Outcome
from moesim.plan.train import StageTimes, pipeline_program, pipeline_s, train_outcome, train_run
from moesim.work.case import Layout
from moesim.work.memory import TrainingState, training_memory
from tests.work_cases import case_of, context_of, h200

TWO_STAGES = Layout(tp=2, dp=8, ep=8, pp=2)
SIZES = {"global_batch": np.array([64.0, 128.0]), "micro_batch": np.ones(2), "sequence": np.full(2, 1024.0)}
seconds = st.floats(1e-3, 1e-1)


def stage_times(forward: object, backward: object, hop_s: float = 0.0, tail: object = 0.0) -> StageTimes:
    forward = np.asarray(forward, dtype=float).reshape(-1, 1)
    backward = np.asarray(backward, dtype=float).reshape(-1, 1)
    each = np.broadcast_to(np.asarray(tail, dtype=float), (len(forward),)).copy()
    return StageTimes(forward, backward, np.array([hop_s]), each, 0 * each, 0 * each)


def outcome(model: str = "mixtral-8x7b", layout: Layout = TWO_STAGES, **state) -> Outcome:
    return train_outcome(context_of(model), h200(), layout, Choice(), SIZES, TrainingState(**state))


@given(pp=st.integers(1, 8), n_micro=st.integers(1, 24), f=seconds, b=seconds)
@settings(max_examples=80, deadline=None)
def test_1f1b_of_equal_stages_and_free_sends(pp, n_micro, f, b):
    """(m + pp - 1)(f + b): the bubble is pp - 1 micro-batches (arXiv:2104.04473, section 2.2.1)."""
    times = stage_times([f] * pp, [b] * pp)
    assert float(makespan(pipeline_program(times, n_micro))[0]) == pytest.approx((n_micro + pp - 1) * (f + b))


@given(data=st.data(), pp=st.integers(1, 6), n_micro=st.integers(1, 12), hop_s=st.floats(0, 1e-2))
@settings(max_examples=60, deadline=None)
def test_a_pipeline_keeps_its_bounds_and_both_executors_agree(data, pp, n_micro, hop_s):
    rows = st.lists(seconds, min_size=pp, max_size=pp)
    forward, backward, tail = (np.array(data.draw(rows)) for _ in range(3))
    program = pipeline_program(stage_times(forward, backward, hop_s, tail), n_micro)
    timeline = simulate(program)
    check_timeline(timeline)
    span_s = float(evaluate(program).makespan_s[0])
    assert timeline.makespan_s == pytest.approx(span_s, rel=1e-9)
    both = forward + backward
    assert span_s >= max(both * n_micro + tail) * (1 - 1e-12)
    assert span_s >= (both.sum() + 2 * hop_s * (pp - 1)) * (1 - 1e-12)
    slowest = (n_micro + pp - 1) * (forward.max() + backward.max() + 4 * hop_s) + tail.max()
    assert span_s <= slowest * (1 + 1e-12)


@given(data=st.data(), pp=st.integers(1, 5), n_micro=st.integers(1, 60), hop_s=st.floats(0, 1e-3))
@settings(max_examples=60, deadline=None)
def test_many_micro_batches_are_extrapolated(data, pp, n_micro, hop_s):
    rows = st.lists(seconds, min_size=pp, max_size=pp)
    times = stage_times(data.draw(rows), data.draw(rows), hop_s)
    whole_s = float(makespan(pipeline_program(times, n_micro))[0])
    assert float(pipeline_s(times, np.array([float(n_micro)]))[0]) == pytest.approx(whole_s, rel=0.02)


def test_a_stage_runs_ahead_by_the_stages_after_it():
    """So that a stage holds at most that many micro-batches' activations, and one more."""
    program = pipeline_program(stage_times([1.0] * 4, [2.0] * 4), 8)
    timeline = simulate(program)
    for stage in range(4):
        spans = {span.name: span for span in timeline.spans(stage) if span.stream == "compute"}
        ends = sorted(span.end_s for name, span in spans.items() if name.startswith("forward"))
        done = sorted(span.end_s for name, span in spans.items() if name.startswith("backward"))
        alive = max(sum(e <= t for e in ends) - sum(e <= t for e in done) for t in ends)
        assert alive == 4 - stage


def test_stages_reduce_after_their_own_last_backward():
    program = pipeline_program(stage_times([1.0] * 3, [2.0] * 3, tail=5.0), 4)
    timeline = simulate(program)
    for stage in range(3):
        spans = {span.name: span for span in timeline.spans(stage)}
        assert spans[f"gradients.{stage}"].start_s == spans[f"backward.{stage}.3"].end_s
        assert spans[f"optimizer.{stage}"].start_s == spans[f"gradients.{stage}"].end_s


def test_an_outcome_adds_up():
    one = outcome()
    assert one.n_points == 2
    np.testing.assert_allclose(one.tokens_per_s, SIZES["global_batch"] * 1024 / one.step_s)
    assert np.all((one.mfu > 0) & (one.mfu < 1))
    assert np.all((one.band_fraction > 0) & (one.band_fraction < 1))
    assert one.step_s[1] > one.step_s[0]
    assert one.tokens_per_s[1] > one.tokens_per_s[0]  # the bubble is a smaller part
    items = [value for name, value in one.memory_bytes.items() if name not in ("total", "capacity")]
    np.testing.assert_allclose(np.sum(items, axis=0), one.memory_bytes["total"])
    # kernels, means over ranks, and the bubble: what is missing is waiting for the busiest expert rank
    share = sum(one.category_s.values()) / one.step_s
    assert np.all((share > 0.9) & (share <= 1 + 1e-9))
    assert one.category_s["pipeline_bubble"][1] < 0.2 * one.step_s[1]


def test_playing_gives_the_priced_step():
    one = outcome()
    for point in range(2):
        played = one.play(point)
        assert played.step_s == pytest.approx(float(one.step_s[point]), rel=0.01)
        assert sum(played.breakdown_s.values()) == pytest.approx(played.step_s)
        [timeline] = played.timelines
        assert timeline.program.labels == ("stage 0", "stage 1")


def test_recomputing_adds_a_forward_and_frees_activations():
    none, full = outcome(recompute="none"), outcome(recompute="full")
    assert np.all(full.memory_bytes["activations"] < 0.3 * none.memory_bytes["activations"])
    grown = full.step_s / none.step_s
    assert np.all((grown > 1.15) & (grown < 4 / 3 + 1e-9))
    # computed twice is not credited twice
    np.testing.assert_allclose(full.mfu * full.step_s, none.mfu * none.step_s)


def test_zero_divides_what_it_says():
    case = case_of("mixtral-8x7b", Layout(dp=64, ep=8), "train")
    stages = [training_memory(case, TrainingState(zero=level), 1, 1024, 1) for level in range(4)]
    for level, item in ((1, "optimizer"), (2, "gradients"), (3, "weights")):
        assert stages[level][item] < 0.2 * stages[level - 1][item]
        for other in {"optimizer", "gradients", "weights"} - {item}:
            assert stages[level][other] == stages[level - 1][other]
    elements = stages[0]["weights"] / 2
    assert stages[0]["gradients"] == 4 * elements
    assert stages[0]["optimizer"] == 12 * elements


def test_a_global_batch_that_does_not_divide():
    sizes = {"global_batch": np.array([60.0]), "micro_batch": np.ones(1), "sequence": np.array([1024.0])}
    with pytest.raises(LayoutError, match=r"global_batch=60.*fix: try global_batch=64"):
        train_outcome(
            context_of("mixtral-8x7b"), h200(), Layout(dp=16, ep=8), Choice(), sizes, TrainingState()
        )


def test_sizes_that_do_not_divide_are_left_out():
    sizes = {
        "global_batch": np.array([60.0, 64.0, 8.0]),
        "micro_batch": np.ones(3),
        "sequence": np.full(3, 512.0),
    }
    one = train_outcome(
        context_of("mixtral-8x7b"), h200(), Layout(dp=16, ep=8), Choice(), sizes, TrainingState()
    )
    assert one.workload["global_batch"].tolist() == [64.0]


def test_a_dense_model_trains_too():
    one = train_outcome(
        context_of("llama-3.1-8b"), h200(), Layout(tp=2, dp=4), Choice(), SIZES, TrainingState(zero=0)
    )  # fmt: skip
    assert one.imbalance is None
    assert "weight_gather" not in one.category_s
    assert np.all(one.mfu > 0.2)


def test_backward_takes_about_twice_the_forward():
    case = case_of("mixtral-8x7b", Layout(tp=2, dp=4, ep=4), "train")
    run = train_run(context_of("mixtral-8x7b"), case, SIZES, TrainingState())
    ratio = run.times.backward_s / run.times.forward_s
    assert np.all((ratio > 1.7) & (ratio < 2.3))


@pytest.mark.parametrize("layout", [Layout(dp=16, ep=8), TWO_STAGES])
def test_divided_gradients_and_weights_cost_every_micro_batch(layout):
    """64 sequences over 16 (8) replicas are 4 (8) micro-batches."""
    by_zero = [outcome(layout=layout, zero=zero) for zero in (1, 2, 3)]
    n_micro = SIZES["global_batch"] / layout.dp
    once, each, thrice = ({k: one.category_s[k] for k in ("gradients", "weight_gather")} for one in by_zero)
    np.testing.assert_allclose(each["gradients"], once["gradients"] * n_micro)
    np.testing.assert_allclose(each["weight_gather"], once["weight_gather"])
    np.testing.assert_allclose(thrice["gradients"], each["gradients"])
    np.testing.assert_allclose(thrice["weight_gather"], once["weight_gather"] * 2 * n_micro)
    if layout.pp == 1:  # nothing to hide behind
        more = by_zero[1].step_s - by_zero[0].step_s
        np.testing.assert_allclose(more, once["gradients"] * (n_micro - 1))
        more = by_zero[2].step_s - by_zero[1].step_s
        np.testing.assert_allclose(more, once["weight_gather"] * (2 * n_micro - 1))
    assert np.all(by_zero[0].step_s < by_zero[1].step_s)
    assert np.all(by_zero[1].step_s < by_zero[2].step_s)
    played = by_zero[2].play(0)
    assert played.step_s == pytest.approx(float(by_zero[2].step_s[0]), rel=0.01)


def test_redundant_experts_are_not_trained():
    layout = Layout(dp=16, ep=8, redundant_experts=8, placement="eplb")
    with pytest.raises(LayoutError, match=r"redundant_experts=8.*fix: set redundant_experts=0"):
        outcome(layout=layout)


@pytest.mark.parametrize("layout", [Layout(dp=16, ep=8), TWO_STAGES])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_terms_of_training_add_up_to_the_step(layout, zero):
    one = outcome(layout=layout, zero=zero, recompute="full")
    for point in range(2):
        told = explain(one, point)
        terms = [term for entry in told["passes"] for term in entry["terms"]]
        assert sum(term["seconds"] for term in terms) == pytest.approx(float(one.step_s[point]))
        assert sum(term["share"] for term in terms) == pytest.approx(1)
        named = {term["name"]: term for term in told["passes"][-1]["terms"]}
        assert named["optimizer"]["times"] == 1
        assert ("pipeline_bubble" in named) == (layout.pp > 1)
        # little is left to the terms that no operator explains
        left = sum(named[name]["share"] for name in ("wait", "pipeline_bubble") if name in named)
        assert 0 <= left < 0.25
        n_micro = SIZES["global_batch"][point] / layout.dp
        experts = next(term for term in terms if term["operator"] == "ExpertFfn")
        assert experts["times"] == 32 * n_micro / layout.pp
