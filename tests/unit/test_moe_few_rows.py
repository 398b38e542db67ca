"""A device with a handful of rows: how fast it is, is its own; how shapes behave, its base's."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from calibrate.fit.moe_ffn import RATES, fit_table, predict_table
from moesim.hardware import Profile, load_gpu, load_profile

H100, H200 = load_gpu("h100-sxm"), load_profile("h200-sxm")
KEY = ("moe_ffn", "vllm-triton", "bfloat16")


def rows(tokens: list[int]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "op": "moe_ffn", "device": "h100-sxm", "implementation": "vllm-triton", "software": "x",
                "dtype": "bfloat16", "n_tokens": n, "hidden": hidden, "intermediate": 1536, "top_k": 8,
                "n_experts": 128, "tp": 1, "ep": ep, "load": "balanced", "latency_s": 1.0,
            }
            for n in tokens
            for hidden, ep in ((2048, 1), (4096, 4))
        ]
    )  # fmt: skip


def test_six_rows_of_a_slower_memory_move_the_rates_and_nothing_else() -> None:
    slow = H200.model_dump(exclude_none=True)
    for family in slow["families"]:
        if (family["op"], family["implementation"], family["dtype"]) == KEY:
            family["parameters"]["hbm_fraction"]["value"] *= 0.6
    truth = Profile.model_validate(slow)
    few, many = rows([8, 512, 16384]), rows([1, 32, 128, 2048, 8192])
    few["latency_s"] = predict_table(few, gpu=H100, profile=truth).time_s
    (family,) = fit_table(few, gpu=H100, base=H200, note=lambda line: None)
    values = {name: one["value"] for name, one in family["parameters"].items()}
    base = H200.family(*KEY).values()
    same = [name for name in base if name not in RATES]
    assert [values[name] for name in same] == pytest.approx([base[name] for name in same])
    fitted = Profile.model_validate({"device": "h100-sxm", "families": [family]})
    told, wanted = (predict_table(many, gpu=H100, profile=one).time_s for one in (fitted, truth))
    unchanged = predict_table(many, gpu=H100, profile=H200).time_s
    assert np.median(np.abs(told / wanted - 1)) < 0.3 * np.median(np.abs(unchanged / wanted - 1))
    assert np.median(np.abs(told / wanted - 1)) < 0.06
