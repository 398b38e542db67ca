"""What a scenario's names become, and the loads that a layout draws."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import LayoutError, ProfileError
from moesim.hardware import load_cluster
from moesim.hardware.gpu import weight_bytes_per_element
from moesim.plan.context import Choice, Context
from moesim.scenario.read import parse_scenario
from moesim.work.case import Layout
from moesim.work.memory import rank_elements
from tests.work_cases import case_of, context_of, h200

TEXT = """
model: {model}
cluster: {{gpu: h200-sxm, nodes: 4, gpus_per_node: 8}}
workload: {{kind: decode, batch_per_rank: 8, context: 1000}}
{more}
"""


def read(model: str = "deepseek-v3", more: str = "") -> Context:
    return Context.of(parse_scenario(TEXT.format(model=model, more=more)).scenario)


@pytest.mark.parametrize(
    ("model", "more", "formats"),
    [
        ("deepseek-v3", "", ("fp8_block", "fp8_block", "bfloat16")),
        ("deepseek-v3", "dtype: bfloat16", ("bfloat16", "bfloat16", "bfloat16")),
        ("deepseek-v3", "backend: trtllm", ("fp8_block", "fp8_block", "fp8")),
        ("mixtral-8x7b", "kv_dtype: fp8", ("bfloat16", "bfloat16", "fp8")),
        ("gpt-oss-20b", "", ("bfloat16", "w4a16_mxfp4", "bfloat16")),
    ],
)
def test_formats(model, more, formats):
    context = read(model, more)
    assert (context.weight_dtype, context.expert_dtype, context.kv_dtype) == formats


@pytest.mark.parametrize(
    ("more", "spread"),
    [("routing: {kind: uniform}", 1.05), ("routing: {kind: zipf, exponent: 1.0}", 2.0), ("", 1.05)],
)
def test_routing_sources(more, spread):
    context = read("mixtral-8x7b", more)
    case = context.case(h200(), Layout(dp=8, ep=8), Choice(), "decode")
    rows = context.traffic.traffic(case, "decode", [4096.0]).tokens_per_slot
    skew = rows.max() / rows.mean()
    assert skew < 1.2 if spread == 1.05 and more else skew > spread


@pytest.mark.parametrize("placement", ["contiguous", "round-robin", "balanced", "eplb"])
@pytest.mark.parametrize("extra", [0, 8])
def test_every_placement_serves_all_rows(placement, extra):
    layout = Layout(dp=8, ep=8, placement=placement, redundant_experts=extra)
    case = case_of("olmoe-1b-7b", layout, "decode", routing="zipf")
    made = context_of("olmoe-1b-7b", "zipf").traffic.traffic(case, "decode", [16.0, 64.0])
    assert made.tokens_per_slot.shape == (2, 16, 8, 8 + extra // 8)
    np.testing.assert_allclose(
        made.tokens_per_slot.sum(axis=(2, 3)), np.array([[16.0], [64.0]]) * 8 * 8 * np.ones(16)
    )


def test_balancing_lightens_the_busiest_rank():
    busiest = {}
    for placement in ("contiguous", "balanced"):
        layout = Layout(dp=8, ep=8, placement=placement)
        case = case_of("olmoe-1b-7b", layout, "decode", routing="zipf")
        rows = (
            context_of("olmoe-1b-7b", "zipf").traffic.traffic(case, "decode", [64.0]).tokens_per_slot.sum(-1)
        )
        busiest[placement] = (rows.max(axis=2) / rows.mean(axis=2)).mean()
    assert busiest["balanced"] < 0.9 * busiest["contiguous"]


def test_shares_of_a_token_are_scaled():
    """Two sequences over tp=8: each rank holds a quarter of one."""
    case = case_of("mixtral-8x7b", Layout(tp=8, ep=8), "decode")
    rows = context_of("mixtral-8x7b").traffic.traffic(case, "decode", [2.0]).tokens_per_slot
    np.testing.assert_allclose(rows.sum(axis=(2, 3)), 2 * 2)


def test_a_row_for_each_expert_by_nccl_and_low_latency():
    sent = {}
    for dispatch in ("nccl", "low-latency", "normal"):
        case = case_of("olmoe-1b-7b", Layout(dp=8, ep=8), "decode", Choice(dispatch))
        made = context_of("olmoe-1b-7b").traffic.traffic(case, "decode", [64.0])
        sent[dispatch] = float((made.sent_nvlink + made.sent_nic).sum())
    # of 8 choices among 8 ranks about 5.3 ranks are distinct
    assert sent["nccl"] == sent["low-latency"] == pytest.approx(16 * 8 * 64 * 8 * 7 / 8, rel=0.02)
    assert sent["normal"] < 0.8 * sent["nccl"]


def test_a_dense_model_has_no_router():
    with pytest.raises(LayoutError, match="dense"):
        _ = context_of("llama-3.1-8b").traffic.shape


def test_an_engine_without_the_format():
    context = read("mixtral-8x7b", "dtype: nvfp4")
    case = context.case(h200(), Layout(), Choice(), "decode")
    with pytest.raises(ProfileError, match=r"no expert kernel of sglang.*fix: use one of"):
        context.pricer(case, "decode").backend.expert_ffn_for(case.expert_dtype)


@pytest.mark.parametrize(
    ("backend", "gpu", "ep", "held"),
    [
        ("sglang", "h200-sxm", 1, "w4a16_mxfp4"),
        ("sglang", "h200-sxm", 8, "bfloat16"),
        ("sglang", "b200-sxm", 8, "w4a16_mxfp4"),  # multiplies FP4 itself
        ("vllm", "h200-sxm", 8, "w4a16_mxfp4"),
    ],
)
def test_sglang_widens_mxfp4_experts_that_are_spread(backend, gpu, ep, held):
    """server_args.py and mxfp4.py of SGLang 0.5: triton_kernels on one expert rank, upcast weights on more."""
    context = read("gpt-oss-120b", f"backend: {backend}")
    cluster = load_cluster(gpu=gpu, nodes=1)
    layout = Layout(tp=8, dp=1, ep=ep) if ep == 1 else Layout(tp=1, dp=8, ep=ep)
    assert context.case(cluster, layout, Choice(), "decode").expert_dtype == held
    assert context.case(cluster, layout, Choice(), "train").expert_dtype == "w4a16_mxfp4"
    warned = any("widens w4a16_mxfp4 experts" in line for line in context.warnings(cluster, 1024.0))
    assert warned == (backend == "sglang" and gpu == "h200-sxm")


def test_widened_experts_take_their_memory():
    context = read("gpt-oss-120b")
    held = {
        name: sum(rank_elements_bytes(context_case))
        for name, context_case in (
            ("spread", context.case(h200(), Layout(tp=1, dp=8, ep=8), Choice(), "decode")),
            ("cut", context.case(h200(), Layout(tp=8, etp=8), Choice(), "decode")),
        )
    }
    # 114.7B expert parameters over 8 GPUs: 2 bytes each, or 4.25 bits
    assert held["spread"] == pytest.approx(114.7e9 / 8 * 2, rel=0.02)
    assert held["cut"] == pytest.approx(114.7e9 / 8 * 0.53125, rel=0.02)


def rank_elements_bytes(case):
    """Bytes of the experts of one rank."""
    return [
        n * weight_bytes_per_element(dtype)
        for stage in case.stages
        for (part, dtype), n in rank_elements(case, stage).items()
        if part == "expert"
    ]
