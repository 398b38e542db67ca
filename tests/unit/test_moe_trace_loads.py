"""Loads of our own measurements are drawn again for the fit, token for token."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from calibrate.fit.moe_ffn import predict_table
from calibrate.fit.moe_load import draws_of_row
from calibrate.loads import trace_ids
from moesim.hardware import load_gpu, load_profile

LOAD = "trace:deepseek-v3-decode"


@pytest.mark.parametrize("ep", [1, 8])
def test_a_fit_counts_the_tokens_that_were_routed(ep: int) -> None:
    draws = draws_of_row(300, 8, 256, ep, LOAD)
    for number, draw in enumerate(draws):
        ids = trace_ids(LOAD, n_tokens=300, top_k=8, n_experts=256, ep=ep, draw=number)
        assert draw.tokens.tolist() == [int((ids == expert).sum()) for expert in range(256 // ep)]
        assert draw.n_entered == 300
        assert draw.tokens.sum() + draw.remote_pairs == 300 * 8
        per_rank = np.bincount(ids.ravel() // (256 // ep), minlength=ep)
        assert per_rank[0] == per_rank.max()


def test_rows_of_a_trace_are_predicted_and_unknown_loads_are_not() -> None:
    rows = pd.DataFrame(
        [
            {
                "op": "moe_ffn", "device": "h200-sxm", "implementation": "vllm-triton", "software": "x",
                "dtype": "bfloat16", "n_tokens": 300, "hidden": 7168, "intermediate": 2048, "top_k": 8,
                "n_experts": 256, "tp": 1, "ep": 8, "load": load, "latency_s": 1.0,
            }
            for load in (LOAD, "balanced", "trace:nobody-knows")
        ]
    )  # fmt: skip
    told = predict_table(rows, gpu=load_gpu("h200-sxm"), profile=load_profile("h200-sxm"))
    trace_s, balanced_s, unknown_s = told.time_s
    assert 0.5 * balanced_s < trace_s < 2 * balanced_s
    assert np.isnan(unknown_s)
    assert told.why_not[2]
