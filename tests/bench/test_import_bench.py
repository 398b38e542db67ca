"""How fast a million tokens come in, and how fast their trace opens."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from moesim.cli.trace_import import imported
from moesim.routing import read_trace

N_TOKENS = 1_000_000


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """vLLM's array of a million tokens, 24 layers, top-4 of 32."""
    rng = np.random.default_rng(0)
    part = np.argsort(rng.random((10_000, 24, 32)), axis=-1)[..., :4].astype(np.int16)
    folder = tmp_path_factory.mktemp("recording")
    np.save(folder / "routed.npy", np.tile(part, (N_TOKENS // 10_000, 1, 1)))
    yield folder / "routed.npy"
    shutil.rmtree(folder)  # pytest would keep it for three runs


def test_million_tokens_imported(benchmark, recording):
    target = recording.with_name("out.safetensors")
    told = benchmark.pedantic(imported, (str(recording), target, "auto", None), rounds=3)
    benchmark.extra_info["n_tokens"] = told["n_tokens"]
    assert told["n_tokens"] == N_TOKENS


def test_million_tokens_opened(benchmark, recording):
    target = recording.with_name("open.safetensors")
    imported(str(recording), target, "auto", None)
    trace = benchmark(read_trace, target)
    benchmark.extra_info["n_tokens"] = trace.n_tokens
    assert trace.n_tokens == N_TOKENS
