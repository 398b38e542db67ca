"""Shipped dense and attention parameters against the measured tables, and published figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calibrate.fit import attention as fit_attention
from calibrate.fit import gemm as fit_gemm
from calibrate.statistics import ape_stats
from moesim.cost.attention import attention_decode_s, attention_prefill_s
from moesim.cost.gemm import gemm_kernel_s
from moesim.hardware.profile import Family, load_profile
from moesim.work.ops import AttentionDecode, AttentionPrefill

SAMPLE = 600
SLACK = 1.3
"""A random sample may be this much worse than the whole table's held-out figure."""
H800 = fit_gemm.PEAKS["h100-sxm"]
"""Same SMs and memory rate as the published H800 figures; only its NVLink differs."""


def check(predicted: np.ndarray, measured: np.ndarray, family: Family) -> None:
    error = ape_stats(predicted, measured)
    assert family.held_out is not None
    assert error["median_ape"] < SLACK * family.held_out.median_ape + 0.005
    assert error["p90_ape"] < SLACK * family.held_out.p90_ape + 0.02


@pytest.mark.parametrize("device", sorted(fit_gemm.PEAKS))
@pytest.mark.parametrize("kernel", fit_gemm.KERNELS, ids=lambda k: f"{k.implementation}-{k.dtype}")
def test_gemm_parameters_reproduce_the_measurements(shared_data: Path, device, kernel):
    family = load_profile(device).family("gemm", kernel.implementation, kernel.dtype)
    rows = fit_gemm.load_rows(shared_data, device, kernel)
    rows = rows.sample(min(SAMPLE, len(rows)), random_state=11)
    predicted = fit_gemm.predicted_s(rows, family.values(), fit_gemm.PEAKS[device], kernel.dtype)
    check(predicted, rows.latency_s.to_numpy(), family)


@pytest.mark.parametrize(
    "kernel", fit_attention.KERNELS, ids=lambda k: f"{k.op}-{k.implementation}-{k.dtype}"
)
def test_attention_parameters_reproduce_the_measurements(shared_data: Path, kernel):
    family = load_profile("h200-sxm").family(kernel.op, kernel.implementation, kernel.dtype)
    rows = fit_attention.load_rows(shared_data, kernel)
    rows = rows.sample(min(SAMPLE, len(rows)), random_state=11)
    predicted = fit_attention.predicted_s(rows, family.values(), fit_gemm.PEAKS["h200-sxm"], kernel)
    check(predicted, rows.latency_s.to_numpy(), family)


# {m, n, k, published TFLOP/s}; convention: the kernel alone, without the launch and the cast that the
# model's time includes. The limits of that fit were set with these in sight.
# Source: DeepGEMM README @55ab91f, "normal GEMMs for dense models", H800, CUDA 12.8.
DEEPGEMM = [
    (64, 24576, 1536, 289), (64, 32768, 512, 219), (64, 7168, 16384, 336), (64, 4096, 7168, 287),
    (128, 24576, 1536, 535), (128, 7168, 16384, 645), (128, 4096, 7168, 533), (4096, 24576, 1536, 1125),
    (4096, 4096, 7168, 1265), (4096, 7168, 2048, 1168), (4096, 7168, 16384, 1426),
]  # fmt: skip


@pytest.mark.parametrize(("m", "n", "k", "tflops"), DEEPGEMM)
def test_deepgemm_in_a_graph_is_near_its_published_rate(m, n, k, tflops):
    params = load_profile("h100-sxm").family("gemm", "vllm-deepgemm", "fp8_block").values()
    params = params | {"quantise_s": 0.0, "quantise_row_s": 0.0}
    kernel_s = gemm_kernel_s(np.array(float(m)), n, k, gpu=H800, params=params, dtype="fp8_block")
    assert kernel_s == pytest.approx(2 * m * n * k / (tflops * 1e12), rel=0.35)


# {batch, cached tokens, us}; source: InferSim @f2293da, bench_data/mla/decode/h800/128-512-64.csv, bfloat16.
MLA_DECODE = [(1, 4096, 21.653), (1, 131072, 94.21), (16, 8192, 83.951), (16, 131072, 1085.607)]


@pytest.mark.parametrize(("batch", "context", "micros"), MLA_DECODE)
def test_absorbed_mla_decode_is_near_its_published_time(batch, context, micros):
    params = load_profile("h100-sxm").family("attention_decode", "mla-fa3", "bfloat16").values()
    op = AttentionDecode(
        "mla", np.array(float(batch)), np.array(float(context)), 128, 1, 576, 512, 0, "bfloat16"
    )
    assert attention_decode_s(op, gpu=H800, params=params) == pytest.approx(micros * 1e-6, rel=0.25)


# {tokens, us}; source: InferSim @f2293da, bench_data/mla/prefill/h800/128-128-64.csv, bfloat16, causal.
MLA_PREFILL = [(4096, 1104.692), (8192, 4538.828), (16384, 17774.458), (32768, 76337.72)]


@pytest.mark.parametrize(("length", "micros"), MLA_PREFILL)
def test_plain_mla_prefill_is_near_its_published_time(length, micros):
    params = load_profile("h100-sxm").family("attention_prefill", "gqa-fa3", "bfloat16").values()
    tokens = np.array(float(length))
    op = AttentionPrefill("mla", np.array(1.0), tokens, tokens, 128, 128, 192, 128, 0, "bfloat16")
    assert attention_prefill_s(op, gpu=H800, params=params) == pytest.approx(micros * 1e-6, rel=0.25)
