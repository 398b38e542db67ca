"""How fast traces are opened, shown and drawn from: CPU seconds in extra_info; figures, no limits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.routing import (
    RoutingShape,
    catalog_routing,
    contiguous,
    count_batch,
    describe,
    draw_batch,
    read_trace,
)

SHAPES = {"24x32x4": RoutingShape(24, 32, 4), "58x256x8": RoutingShape(58, 256, 8)}
N_TOKENS = 200_000
"""Tokens of the file; what is held does not grow with them, what is counted grows in proportion."""


@pytest.fixture(scope="module", params=SHAPES)
def long_trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated pattern of 4096 tokens, repeated in another order each time."""
    shape = SHAPES[request.param]
    rng = np.random.default_rng(0)
    drawn = draw_batch(catalog_routing("default"), shape, n_ranks=1, n_tokens=4096, phase="prefill", rng=rng)
    pattern = np.ascontiguousarray(drawn[:, 0].transpose(1, 0, 2)).astype(np.uint8)
    offsets = np.arange(0, N_TOKENS + 1, 1000, dtype="<i8")
    n_bytes = N_TOKENS * pattern[0].size
    ends = [n_bytes, n_bytes + offsets.nbytes]
    header = {
        "__metadata__": {
            "n_experts": str(shape.n_experts),
            "top_k": str(shape.top_k),
            "layer_ids": json.dumps(list(range(shape.n_layers))),
        },
        "expert_ids": {"dtype": "U8", "shape": [N_TOKENS, *pattern.shape[1:]], "data_offsets": [0, n_bytes]},
        "sequence_offsets": {"dtype": "I64", "shape": [offsets.size], "data_offsets": ends},
    }
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("long") / f"{request.param}.safetensors"
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, N_TOKENS, 4096):
            shifted = np.roll(pattern, int(rng.integers(4096)) // 32 * 32, axis=0)
            stream.write(shifted[: N_TOKENS - start].tobytes())
        stream.write(offsets.tobytes())
    return path


def cpu_s(benchmark: Any, work: Any, rounds: int) -> float:
    """Least CPU seconds of some rounds."""
    taken = []

    def once() -> None:
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)

    benchmark.pedantic(once, rounds=rounds, iterations=1)
    return min(taken)


def test_open(benchmark: Any, long_trace: Path) -> None:
    benchmark.extra_info |= {"cpu_s": cpu_s(benchmark, lambda: read_trace(long_trace), 5), "goal_s": 0.1}


def test_show(benchmark: Any, long_trace: Path) -> None:
    def show() -> None:
        trace = read_trace(long_trace)
        trace.check()
        describe(trace)

    benchmark.extra_info |= {"cpu_s": cpu_s(benchmark, show, 1), "goal_s": 10.0, "n_tokens": N_TOKENS}


@pytest.mark.parametrize("source", ["generator", "file"])
def test_decode_step(benchmark: Any, long_trace: Path, source: str) -> None:
    """32 ranks x 128 tokens drawn and counted, with traffic matrices; goal 40 ms at 58 x top-8."""
    trace = read_trace(long_trace)
    shape = RoutingShape(trace.n_layers, trace.n_experts, trace.top_k or 1)
    routing = trace if source == "file" else catalog_routing("default")
    placement = contiguous(shape.n_experts, 32)

    def step() -> None:
        rng = np.random.default_rng(0)
        ids = draw_batch(routing, shape, n_ranks=32, n_tokens=128, phase="decode", rng=rng)
        count_batch(ids, placement, ranks_per_domain=8)

    step()  # the bank of a generator is drawn once
    benchmark.extra_info |= {"cpu_s": cpu_s(benchmark, step, 10), "goal_s": 0.04}
