"""Engines on real hardware: measured serving and published throughput against the simulator.

Measured rows: AIConfigurator's silicon sample (../shared/data/measured/serving.csv). Nothing that prices an MoE
model was fitted on them; the host's share of a step was, on the rows of dense models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from calibrate.validate.published import Fact, published, published_table
from calibrate.validate.serving import SPECULATIVE, deployment_of, predict, read_rows, report, summary


@pytest.fixture(scope="module")
def moe(shared_data: Path) -> pd.DataFrame:
    rows = read_rows(shared_data)
    models = rows[rows.moe_quant_mode.notna() & ~rows.model.str.contains("Llama|Qwen3-32B")]
    return predict(models)


@pytest.fixture(scope="module")
def facts(shared_data: Path) -> list[Fact]:
    return published(shared_data)


def test_time_per_output_token_of_moe_rows(moe: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(moe)
    with capsys.disabled():
        print()
        for group in summary(moe):
            print(
                f"{group['model']:28}{group['system']:10}{group['backend']:8}{group['n']:4d} rows  TPOT median "
                f"{group['tpot']['median_ape']:6.1%}  p90 {group['tpot']['p90_ape']:6.1%}  bias "
                f"{group['tpot']['bias']:6.1%}  TTFT median {group['ttft']['median_ape']:6.1%}"
            )
    assert found["moe"]["n"] == 314
    assert not found["skipped"]
    assert found["moe"]["tpot"]["median_ape"] <= 0.13
    assert found["moe"]["tpot"]["p90_ape"] <= 0.40
    assert found["moe_without_speculative"]["tpot"]["p90_ape"] <= 0.30
    assert abs(found["moe"]["tpot"]["bias"]) <= 0.08


def test_time_grows_with_concurrency_as_measured(moe: pd.DataFrame) -> None:
    """Not only the level: from 4 to 64 requests the ratio of times is right to a fifth, in the median."""
    plain = moe[~moe["notes"].str.contains(SPECULATIVE)]
    ratios = []
    for _, rows in plain.groupby(
        [plain["deployment"].map(str), "isl", "osl", "backend_version"], dropna=False
    ):
        by_load = rows.groupby("concurrency")[["tpot_s", "tpot_pred_s"]].median()
        if {4.0, 64.0} <= set(by_load.index):
            growth = by_load.loc[64.0] / by_load.loc[4.0]
            ratios.append(growth.tpot_pred_s / growth.tpot_s)
    assert len(ratios) >= 20
    assert np.median(np.abs(np.array(ratios) - 1)) <= 0.20


@pytest.mark.parametrize("case", ["A15", "A16", "A17", "A20"])
def test_published_throughput(facts: list[Fact], case: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = [fact for fact in facts if fact.case == case]
    with capsys.disabled():
        print("\n" + published_table(own))
    assert len(own) == {"A15": 1, "A16": 4, "A17": 1, "A20": 9}[case]
    assert max(abs(fact.error) for fact in own) <= 0.25


def _row(**values: Any) -> dict[str, Any]:
    plain = {
        "model": "deepseek-ai/DeepSeek-V3", "system": "h200-sxm", "backend": "trtllm", "backend_version": "1.1.0rc2",
        "precision": "fp8", "moe_quant_mode": "fp8", "gemm_quant_mode": "fp8", "tp_size": 8, "attention_dp_size": 1,
        "moe_tp_size": 1, "moe_ep_size": 8, "isl": 1024, "osl": 1024, "concurrency": 64.0, "batch_size": 64.0,
        "measured_on": "2025-12-15",
    }  # fmt: skip
    return {**plain, **values}


@pytest.mark.parametrize(
    ("values", "tp", "dp", "etp", "ep"),
    [
        ({}, 8, 1, 1, 8),
        ({"moe_tp_size": 8, "moe_ep_size": 1}, 8, 1, 8, 1),
        ({"tp_size": 64, "moe_tp_size": 8}, 8, 1, 1, 8),
        ({"tp_size": 1, "attention_dp_size": 64, "moe_tp_size": 8}, 1, 8, 1, 8),
        ({"tp_size": 1, "attention_dp_size": np.nan, "moe_tp_size": 2, "moe_ep_size": 1}, 1, 2, 2, 1),
    ],
)
def test_layout_as_read(values: dict[str, Any], tp: int, dp: int, etp: int, ep: int) -> None:
    found = deployment_of(_row(**values)).deployment
    assert found is not None
    assert (found.layout.tp, found.layout.dp, found.layout.etp, found.layout.ep) == (tp, dp, etp, ep)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model": "acme/unknown"}, "no catalog entry"),
        ({"moe_ep_size": 4}, "is not moe_tp"),
        ({"tp_size": 32, "moe_tp_size": 4}, "on 32 GPUs"),
        ({"concurrency": np.nan, "batch_size": np.nan}, "neither concurrency"),
    ],
)
def test_rows_that_cannot_be_read_are_named(values: dict[str, Any], reason: str) -> None:
    found = deployment_of(_row(**values))
    assert found.deployment is None
    assert reason in found.skip


def test_formats_as_read() -> None:
    block = deployment_of(_row()).deployment
    mxfp4 = deployment_of(
        _row(model="openai/gpt-oss-120b", precision="fp4", moe_quant_mode="nvfp4")
    ).deployment
    dense = deployment_of(_row(model="Qwen/Qwen3-32B", precision=np.nan, gemm_quant_mode=np.nan)).deployment
    assert block is not None and mxfp4 is not None and dense is not None
    assert (block.weight_dtype, block.expert_dtype, block.kv_dtype) == ("fp8_block", "fp8_block", "fp8")
    assert (mxfp4.weight_dtype, mxfp4.expert_dtype, mxfp4.kv_dtype) == ("bfloat16", "w4a16_mxfp4", "bfloat16")
    assert dense.weight_dtype == "bfloat16"


def test_asynchronous_scheduling_by_release() -> None:
    old, new, unknown = (
        deployment_of(_row(backend="vllm", backend_version=release)).deployment
        for release in ("0.12.0", "0.18.0", np.nan)
    )
    assert old is not None and new is not None and unknown is not None
    assert (old.host, new.host, unknown.host) == ("vllm-sync", "vllm", "vllm")
