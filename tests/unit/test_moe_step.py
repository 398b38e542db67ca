"""Rows of single kernels of the expert feed-forward, beside the whole call that they make up."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from calibrate.fit import moe_ffn, moe_step
from calibrate.fit.registry import fit_tables, predict_rows
from calibrate.tables import Table
from moesim.errors import MeasurementError
from moesim.hardware import load_gpu, load_profile

H200 = load_gpu("h200-sxm")
PROFILE = load_profile("h200-sxm")
STEPS = ("moe_permute", "moe_up", "moe_down", "moe_combine")


def rows(n_tokens: list[int], **cells: object) -> pd.DataFrame:
    shape = {
        "device": "h200-sxm", "implementation": "sglang-triton", "software": "mine 1", "dtype": "bfloat16",
        "hidden": 4096, "intermediate": 1536, "top_k": 8, "n_experts": 128, "tp": 1, "ep": 1, "load": "balanced",
        "latency_s": 1.0, "cache": "cold",
    }  # fmt: skip
    return pd.DataFrame([{"op": "moe_ffn", **shape, **cells, "n_tokens": n} for n in n_tokens])


def steps_s(table: pd.DataFrame) -> dict[str, np.ndarray]:
    return {
        op: predict_rows(table.assign(op=op), "moe_step", gpu=H200, profile=PROFILE).time_s for op in STEPS
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
@pytest.mark.parametrize("ep", [1, 8])
def test_kernels_add_up_to_their_call(dtype: str, ep: int) -> None:
    table = rows([1, 16, 256, 4096, 16384], dtype=dtype, ep=ep, load="power_law_1.2")
    whole_s = predict_rows(table, "moe_ffn", gpu=H200, profile=PROFILE).time_s
    parts_s = sum(steps_s(table).values())
    np.testing.assert_allclose(parts_s, whole_s, rtol=1e-9)


def test_each_kernel_does_its_own_work() -> None:
    few, many = (steps_s(rows([n])) for n in (16, 16384))
    weights_s = 128 * 4096 * 1536 * 2 / H200.hbm_bytes_per_s
    # 16 tokens with 8 of 128 experts each activate all: up reads two matrices an expert, down one
    assert 2.0 * weights_s < few["moe_up"][0] < 3.0 * weights_s
    assert 1.0 * weights_s < few["moe_down"][0] < 1.6 * weights_s
    assert few["moe_combine"][0] < 0.1 * few["moe_up"][0]
    flops_s = 2 * 16384 * 8 * 4096 * 1536 / H200.peak_flops_per_s("bfloat16")
    assert many["moe_down"][0] > flops_s
    assert many["moe_up"][0] > 2.0 * flops_s
    written_s = 16384 * 8 * 4096 * 2 / H200.hbm_bytes_per_s
    assert many["moe_combine"][0] > 0.5 * written_s


def test_warm_rows_are_named_not_guessed() -> None:
    table = rows([16, 256], op="moe_up").assign(cache=["cold", "warm"])
    told = predict_rows(table, "moe_step", gpu=H200, profile=PROFILE)
    assert np.isfinite(told.time_s).tolist() == [True, False]
    assert "level-2 cache" in str(told.why_not[1])


def test_what_has_no_whole_call_in_the_profile_says_so() -> None:
    told = predict_rows(
        rows([16], op="moe_up", implementation="theirs"), "moe_step", gpu=H200, profile=PROFILE
    )
    assert np.isnan(told.time_s).all()
    assert "no family moe_ffn theirs bfloat16" in str(told.why_not[0])


def test_no_fit_sees_them(tmp_path: object) -> None:
    notes: list[str] = []
    table = Table("moe_step", "steps.csv", rows([16], op="moe_up"), [2])  # type: ignore[arg-type]
    with pytest.raises(MeasurementError, match="can be fitted"):
        fit_tables([table], gpu=H200, base=None, note=notes.append, modules=[moe_ffn, moe_step])  # type: ignore[list-item]
    assert any("not fitted" in note and "validate" in note for note in notes)
