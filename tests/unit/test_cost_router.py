"""Routing of tokens to experts."""

from __future__ import annotations

import numpy as np

from moesim.cost.gemm import dense_gemm_s
from moesim.cost.router import router_s
from moesim.hardware.catalog import load_gpu
from moesim.hardware.profile import load_profile
from moesim.work.ops import DenseGemm, Router

GPU = load_gpu("h200-sxm")
PROFILE = load_profile("h200-sxm")
GATE = PROFILE.family("gemm", "torch-cublas", "bfloat16").values()
PARAMS = PROFILE.family("router", "fused-topk").values()


def seconds(tokens, hidden=7168, n_experts=256, top_k=8):
    op = Router(np.asarray(tokens, dtype=float), hidden, n_experts, top_k)
    return router_s(op, gpu=GPU, params=PARAMS, gemm_params=GATE)


def test_contains_its_gate_product():
    tokens = np.array([1.0, 64.0, 4096.0, 65536.0])
    gate = dense_gemm_s(DenseGemm(tokens, 256, 7168, "bfloat16"), gpu=GPU, params=GATE)
    assert np.all(seconds(tokens) > gate)


def test_is_of_the_size_that_fused_routing_is_published_at():
    """TensorRT-LLM tech blog 3: about 15 us fused, 252 us in 18 kernels (B200; batch not stated)."""
    assert 5e-6 < seconds(128.0) < 25e-6


def test_grows_with_tokens_experts_and_width():
    times = seconds([1.0, 256.0, 4096.0, 65536.0])
    assert np.all(np.diff(times) > 0)
    assert seconds(65536.0, n_experts=512) > 1.3 * seconds(65536.0, n_experts=128)
    assert seconds(65536.0, hidden=16384) > seconds(65536.0, hidden=2048)


def test_no_tokens_cost_nothing():
    times = seconds(np.array([[0.0], [3.0]]))
    assert times.shape == (2, 1)
    assert times[0, 0] == 0 < times[1, 0]
