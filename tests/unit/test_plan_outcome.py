"""What decode, prefill and serving outcomes say, and that their figures hang together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import LayoutError
from moesim.plan.context import Choice
from moesim.plan.outcome import Outcome, model_flops
from moesim.plan.steps import run_pass
from moesim.plan.workloads import decode_outcome, prefill_outcome, serve_outcome
from moesim.work.case import Layout
from moesim.work.step import Batch
from tests.work_cases import case_of, context_of, h200

EIGHT = Layout(dp=8, ep=8)
BATCHES = np.array([1.0, 8.0, 64.0])


def decoded(model: str = "mixtral-8x7b", layout: Layout = EIGHT, **choice) -> Outcome:
    sizes = {"batch_per_rank": BATCHES, "context": np.full(3, 2048.0)}
    return decode_outcome(context_of(model), h200(), layout, Choice(**choice), sizes)


def prefilled(model: str = "mixtral-8x7b", layout: Layout = EIGHT) -> Outcome:
    sizes = {"tokens_per_rank": np.array([1024.0, 4096.0, 16384.0]), "prompt": np.full(3, 2048.0)}
    return prefill_outcome(context_of(model), h200(), layout, Choice(), sizes)


def served(backend: str = "sglang", layout: Layout = EIGHT, **more: np.ndarray) -> Outcome:
    sizes = {"input": np.full(3, 1024.0), "output": np.full(3, 256.0), "batch_per_rank": BATCHES, **more}
    return serve_outcome(context_of("mixtral-8x7b", "uniform", backend), h200(), layout, Choice(), sizes)


@pytest.mark.parametrize("make", [decoded, prefilled, served])
def test_figures_hang_together(make):
    one = make()
    assert one.n_points == 3
    assert np.all((one.mfu > 0) & (one.mfu <= 1))
    assert np.all((one.band_fraction > 0) & (one.band_fraction < 1))
    assert np.all(np.diff(one.step_s) > 0)
    # a larger batch may meet a tile that was tuned worse
    assert np.all(one.tokens_per_s[1:] > 0.97 * one.tokens_per_s[:-1])
    assert np.all(one.imbalance >= 1)
    items = [value for name, value in one.memory_bytes.items() if name not in ("total", "capacity")]
    np.testing.assert_allclose(np.sum(items, axis=0), one.memory_bytes["total"])
    price = one.case.cluster.usd_per_gpu_hour * 8 / 3600
    np.testing.assert_allclose(one.usd_per_mtok * one.tokens_per_s / 1e6, price)
    np.testing.assert_allclose(one.metric("tokens_per_s_per_gpu"), one.tokens_per_s / 8)


def test_a_dollar_an_hour_and_a_million_tokens_an_hour():
    one = decoded()
    cluster = one.case.cluster.model_copy(update={"usd_per_gpu_hour": 1.0})
    made = replace(one, case=replace(one.case, cluster=cluster), tokens_per_s=np.full(3, 1e6 / 3600))
    np.testing.assert_allclose(made.usd_per_mtok, 8.0)


def test_a_row_says_what_the_arrays_say():
    one = decoded()
    row = one.row(2)
    assert row["layout"]["ep"] == 8
    assert row["workload"] == {"batch_per_rank": 64, "context": 2048}
    assert (row["feasible"], row["why_not"], row["ttft_s"]) == (True, None, None)
    assert row["band"]["low"] < row["tpot_s"] < row["band"]["high"]
    assert row["tokens_per_s"] == pytest.approx(8 * 64 / row["tpot_s"])
    assert one.metric("ttft") is None
    np.testing.assert_array_equal(one.metric("tpot_p50"), one.tpot_s)


def test_what_does_not_fit_says_why():
    one = decoded("deepseek-v3", Layout(dp=2, ep=2))
    assert not one.fits.any()
    assert "the GPU has 141.0 GB" in one.why_not(0)


def test_a_served_token_waits_for_the_decode_step_and_prompts():
    for backend in ("sglang", "vllm", "trtllm"):
        one = served(backend)
        assert np.all(one.tpot_s >= one.step_s * (1 - 1e-9))
        assert np.all(one.ttft_s > 0)
        # requests that wait for their first token produce none: below what decoding alone would give
        assert np.all(one.tokens_per_s <= BATCHES * 8 / one.step_s)


def test_chunks_are_no_faster_than_whole_prompts_for_the_first_token():
    whole, cut = served(), served(chunk=np.full(3, 256.0))
    assert np.all(cut.ttft_s >= whole.ttft_s)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_pipeline_takes_at_least_its_stages(phase):
    case = case_of("mixtral-8x7b", Layout(tp=2, ep=2, pp=4), phase)
    batch = Batch.of(phase, np.array([1.0, 4.0, 32.0]), 1024 if phase == "prefill" else 1, 1024)
    one = run_pass(context_of("mixtral-8x7b"), case, batch)
    assert np.all(one.latency_s >= one.stage_s.sum(axis=0) + 3 * one.hop_s)
    assert one.n_micro.tolist() == [1, 4, 4]
    if phase == "decode":
        assert np.all(one.period_s >= one.stage_s.sum(axis=0))
    else:
        assert np.all(one.period_s <= one.latency_s)
    alone = run_pass(context_of("mixtral-8x7b"), case_of("mixtral-8x7b", Layout(tp=2, ep=2), phase), batch)
    np.testing.assert_array_equal(alone.latency_s, alone.stage_s[0])
    # one sequence walks through the stages as it would through one rank, and over the hops between them
    assert one.stage_s[:, 0].sum() == pytest.approx(alone.stage_s[0, 0], rel=1e-6)


def test_categories_and_families_book_the_same_time():
    case = case_of("mixtral-8x7b", Layout(dp=8, ep=8), "prefill")
    one = run_pass(context_of("mixtral-8x7b"), case, Batch.of("prefill", 2, 2048, 2048))
    booked = sum(one.category_s().values())
    np.testing.assert_allclose(sum(seconds for _, seconds in one.family_s().values()), booked)
    assert np.all(booked <= one.latency_s * (1 + 1e-9))
    assert one.play(0, events=False).step_s == pytest.approx(float(one.latency_s[0]), rel=1e-6)
    # routing is nearly even inside one node, and exchanges share links
    assert one.play(0).step_s == pytest.approx(float(one.latency_s[0]), rel=1e-4)


def test_dense_layers_know_no_dispatch():
    one = decode_outcome(
        context_of("llama-3.1-8b"), h200(), Layout(tp=2), Choice(),
        {"batch_per_rank": BATCHES, "context": np.full(3, 2048.0)},
    )  # fmt: skip
    assert one.row(0)["choice"]["dispatch"] is None
    assert one.imbalance is None


def test_model_flops_of_a_dense_model():
    """2 N per token and 4 s d per layer and token of attention (PaLM, appendix B)."""
    model = context_of("llama-3.1-8b").model
    tokens = np.array([1.0])
    near, far = (model_flops(model, tokens, np.array([n]))[0] for n in (0.0, 1000.0))
    assert near == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=1e-3)
    assert far - near == 1000 * 32 * 4 * 4096


def test_a_window_bounds_the_flops_of_attention():
    model = context_of("gpt-oss-20b").model
    one = np.ones(1)
    far, farther = (model_flops(model, one, n * one)[0] for n in (1000.0, 2000.0))
    full = sum(layer.attention.window == 0 for layer in model.layers)
    assert farther - far == 1000 * full * 4 * 64 * 64


def test_an_encoders_phases_count_the_layers_that_run():
    """Switch-Base: 12 encoder and 12 decoder layers; 4 d^2 of attention, 2 d f of one expert or dense layer."""
    model = context_of("switch-base-8").model
    one, none = np.ones(1), np.zeros(1)
    flops = {phase: model_flops(model, one, none, phase)[0] for phase in ("prefill", "decode", "train")}
    d, f = 768, 3072
    layer = 4 * d * d + 2 * d * f
    wanted = {
        "prefill": 12 * layer + 12 * 2 * d * d,  # the encoder, and the decoder's cross keys and values
        "decode": 12 * layer + 12 * 2 * d * d + 32128 * d,  # cross queries and outputs, and the head
    }
    for phase, weights in wanted.items():
        assert flops[phase] == pytest.approx(2 * weights, rel=5e-3)
    assert flops["train"] == pytest.approx(flops["prefill"] + flops["decode"], rel=1e-3)
    # a prompt of 1,000 tokens: all of them see all of it in 12 layers; a new token sees them in 24 attentions
    seen = model_flops(model, one, 500 * one, "prefill")[0] - flops["prefill"]
    assert seen == 12 * 1000 * 4 * d
    assert model_flops(model, one, 1000 * one, "decode")[0] - flops["decode"] == 24 * 1000 * 4 * d
    dense = context_of("llama-3.1-8b").model
    assert len({float(model_flops(dense, one, one, phase)[0]) for phase in flops}) == 1


@pytest.mark.parametrize(
    ("layout", "phase", "wanted", "why"),
    [
        (Layout(dp=8, ep=8), "decode", "allreduce", "8 attention replicas has to exchange tokens"),
        (Layout(dp=8, ep=8), "train", "allreduce", "has to exchange tokens"),
        (Layout(tp=8, ep=8), "decode", "low-latency", "its ranks hold every token already"),
        (Layout(tp=8, ep=4, etp=2), "prefill", "allgather", "its ranks hold every token already"),
        (Layout(dp=8), "decode", "normal", "its ranks hold every token already"),
        (Layout(tp=8, ep=8), "train", "normal", "training exchanges them by nccl"),
    ],
)
def test_a_dispatch_that_does_not_go_with_the_layout_is_refused(layout, phase, wanted, why):
    with pytest.raises(LayoutError, match=why) as caught:
        case_of("mixtral-8x7b", layout, phase, Choice(wanted))
    assert caught.value.place == "policy.dispatch"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("backend", "layout", "phase", "wanted", "dispatch"),
    [
        ("sglang", Layout(tp=8, ep=8), "decode", "auto", "allreduce"),
        ("sglang", Layout(dp=8, ep=8), "decode", "auto", "low-latency"),
        ("sglang", Layout(dp=8, ep=8), "prefill", "auto", "normal"),
        ("trtllm", Layout(dp=8, ep=8), "decode", "auto", "allgather"),
        ("vllm", Layout(dp=8, ep=4, etp=2), "decode", "auto", "allgather"),
        ("vllm", Layout(dp=8, ep=8), "decode", "nccl", "nccl"),
        ("sglang", Layout(tp=8, ep=8), "train", "auto", "nccl"),
        ("sglang", Layout(tp=8, etp=8), "train", "auto", "allreduce"),
        ("sglang", Layout(dp=8, ep=8), "train", "auto", "nccl"),
        ("sglang", Layout(tp=8, ep=8), "train", "nccl", "nccl"),
        ("sglang", Layout(tp=8, ep=8), "decode", "allreduce", "allreduce"),
    ],
)
def test_how_tokens_reach_their_experts(backend, layout, phase, wanted, dispatch):
    case = case_of("mixtral-8x7b", layout, phase, Choice(wanted, "two-batch"), backend=backend)
    assert case.dispatch == dispatch
    exchanged = dispatch in ("low-latency", "normal", "nccl")
    assert case.overlap == ("two-batch" if exchanged else "none")
