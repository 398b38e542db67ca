"""How fast routing is drawn, counted, fitted and generated: CPU time, figures, no limits."""

from __future__ import annotations

import time

import numpy as np
import pytest

from moesim.routing import (
    RoutingShape,
    RoutingTrace,
    contiguous,
    count_batch,
    default_routing,
    draw_batch,
    fit_generator,
    generate_trace,
    popularity,
)
from moesim.routing.banks import decode_bank, prefill_bank

DEEPSEEK = RoutingShape(58, 256, 8, 8, 4)
PLAIN = RoutingShape(58, 256, 8)


def test_decode_step_drawn_and_counted(benchmark):
    """32 ranks x 128 tokens x 58 layers x top-8, all traffic matrices."""
    source, place = default_routing(), contiguous(256, 32)

    def step(seed=0):
        rng = np.random.default_rng(seed)
        ids = draw_batch(source, DEEPSEEK, n_ranks=32, n_tokens=128, phase="decode", rng=rng)
        return count_batch(ids, place, ranks_per_domain=8)

    step()
    start = time.process_time()
    found = benchmark.pedantic(step, rounds=5, iterations=1)
    benchmark.extra_info["cpu_ms"] = (time.process_time() - start) / 5 * 1e3
    assert int(found.tokens_per_slot[0].sum()) == 32 * 128 * 8


@pytest.mark.parametrize("shape", [DEEPSEEK, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_bank(benchmark, shape, phase):
    source = default_routing()
    p = popularity(source, shape)

    def bank():
        rng = np.random.default_rng(0)
        if phase == "decode":
            return decode_bank(p, shape, source, rng, n_tokens=4096)
        length = 64 if shape is DEEPSEEK else 128
        return prefill_bank(p, shape, source, rng, n_sequences=64, sequence_length=length)

    start = time.process_time()
    found = benchmark.pedantic(bank, rounds=2, iterations=1)
    benchmark.extra_info["cpu_s"] = (time.process_time() - start) / 2
    assert found.shape[:2] == (8, 58)


def test_fit_and_generate(benchmark):
    """A count file of DeepSeek-V3's size fitted, 4096 tokens generated."""
    counts = (1e6 * popularity(default_routing(), PLAIN)).astype(np.int64)[None]
    trace = RoutingTrace("deepseek-v3", 256, 8, tuple(range(58)), expert_counts=counts)

    def round_trip():
        generator = fit_generator(trace, per_layer=True)
        return generate_trace(generator, DEEPSEEK, n_sequences=32, sequence_length=128)

    start = time.process_time()
    made = benchmark.pedantic(round_trip, rounds=1, iterations=1)
    benchmark.extra_info["cpu_s"] = time.process_time() - start
    assert made.n_tokens == 4096
