"""Our tiles priced by the parameters of SGLang's kernel, beside the fastest public Triton time of the same shape.

It says whether the tile rule is sound, not how fast our kernels are: that takes a GPU (tests/gpu).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from calibrate.fit.moe_rows import MeasuredRows, Priced
from calibrate.kernels.tiles import Tile as OwnTile
from calibrate.kernels.tiles import choose_pair
from moesim.cost.expert_ffn import ExpertFfnParameters, ffn_parts
from moesim.cost.moe_tiles import Tile
from moesim.hardware import load_gpu, load_profile

H200 = load_gpu("h200-sxm")
PUBLIC = (
    "sglang:sglang_fused_moe_triton",
    "vllm:vllm_unquantizedfusedmoe_triton_tritonexperts",
    "vllm:vllm_fp8moe_triton_tritonexperts",
)
SHAPE = ["n_tokens", "hidden", "intermediate", "top_k", "n_experts", "tp", "ep", "load"]


def fastest_public(path: Path, dtype: str) -> pd.DataFrame:
    """Time of the faster library for every shape that our kernels take, without expert parallelism."""
    table = pd.read_parquet(path)
    table = table[(table.device == "h200-sxm") & (table.dtype == dtype) & table.implementation.isin(PUBLIC)]
    multiple = 128 if dtype == "fp8_block" else 16
    fits = (table.hidden % multiple == 0) & ((table.intermediate // table.tp) % multiple == 0)
    table = table[fits & (table.ep == 1) & (table.top_k != 22)]
    return table.groupby(SHAPE, as_index=False).latency_s.min().sample(1500, random_state=0)


def side_by_side(tiles: list[OwnTile]) -> Tile:
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    return Tile(*(np.array([float(getattr(tile, name)) for tile in tiles]) for name in names))


def own_s(rows: pd.DataFrame, dtype: str) -> np.ndarray:
    """Seconds of our two products with their own tiles, all else as SGLang's."""
    priced = Priced(
        MeasuredRows.of(rows.assign(implementation=PUBLIC[0], dtype=dtype)), H200, "sglang-triton", dtype
    )
    params = ExpertFfnParameters.from_values(
        load_profile("h200-sxm").family("moe_ffn", "sglang-triton", dtype).values()
    )
    pairs = [
        choose_pair(n * k / experts, hidden, inner // tp, dtype, H200.n_sms)
        for n, hidden, inner, k, experts, tp in rows[SHAPE[:6]].itertuples(index=False)
    ]
    up, down = (
        ffn_parts(
            replace(priced.tiled(side_by_side(list(tiles))), library=None, warm=True), gpu=H200, params=params
        )
        for tiles in zip(*pairs, strict=True)
    )
    return np.asarray(up.permute_s + up.up_s + down.down_s + down.combine_s)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
def test_tiles_are_as_good_as_what_libraries_tuned(dtype: str, shared_data: Path) -> None:
    rows = fastest_public(shared_data / "measured" / "moe_ffn.parquet", dtype)
    speed = rows.latency_s.to_numpy() / own_s(rows, dtype)
    worst, tenth, median = np.quantile(speed, [0.01, 0.1, 0.5])
    print(f"{dtype}: speed over the fastest public kernel's: {worst:.2f} {tenth:.2f} {median:.2f}")
    assert median > 0.95
    assert tenth > 0.8
