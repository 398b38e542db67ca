"""Tiles that SGLang and vLLM choose, against their published rules and tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesim.cost import moe_tiles
from moesim.cost.moe_tiles import LIBRARIES, Tile, tile_choice, tile_library, tuned_shapes


def chosen(
    library: str, dtype: str, slots: int, width: int, tokens: float, device: str = "h200-sxm"
) -> list[float]:
    """Rows, columns, depth, warps, stages."""
    tile = tile_choice(library, device, dtype, n_slots=slots, intermediate=width, n_tokens=tokens)
    return [float(part) for part in vars(tile).values()]


@pytest.mark.parametrize(
    ("library", "dtype", "slots", "tokens", "tile"),
    [
        # SGLang, get_default_config: 16 x 32 x 64 up to as many tokens as experts, then 64 x 64 x 32
        ("sglang", "bfloat16", 64, 64, [16, 32, 64, 4, 3]),
        ("sglang", "bfloat16", 64, 65, [64, 64, 32, 4, 3]),
        ("sglang", "fp8_block", 64, 1, [64, 128, 128, 4, 3]),
        # vLLM, get_default_config: taller with tokens, eight warps above 128
        ("vllm", "bfloat16", 64, 32, [16, 64, 128, 4, 4]),
        ("vllm", "bfloat16", 64, 33, [32, 64, 128, 4, 3]),
        ("vllm", "bfloat16", 64, 65, [32, 128, 64, 4, 3]),
        ("vllm", "bfloat16", 64, 128, [64, 128, 64, 4, 3]),
        ("vllm", "bfloat16", 64, 512, [64, 128, 64, 8, 3]),
        ("vllm", "bfloat16", 64, 513, [128, 128, 64, 8, 3]),
        ("vllm", "fp8", 64, 513, [128, 128, 128, 8, 3]),
        ("vllm", "fp8_block", 64, 64, [16, 128, 128, 4, 3]),
        ("vllm", "fp8_block", 64, 65, [64, 128, 128, 4, 3]),
    ],
)
def test_default_rules(library, dtype, slots, tokens, tile):
    assert chosen(library, dtype, slots, 1000, tokens) == tile


def test_tuned_pair_of_gemma_4():
    """E=128, N=704 of SGLang on H200, first and last entries of its published file."""
    assert (128, 704) in tuned_shapes("sglang", "h200-sxm", "bfloat16")
    assert chosen("sglang", "bfloat16", 128, 704, 1) == [16, 64, 64, 4, 5]
    assert chosen("sglang", "bfloat16", 128, 704, 1e6) == [64, 128, 64, 4, 3]


def test_the_nearest_token_count_counts():
    """Keys 64 and 96: 80 is as near to both, and the first in the file wins."""
    near = [chosen("vllm", "bfloat16", 128, 1024, tokens) for tokens in (64, 80, 81, 96)]
    assert near[0] == near[1] == [16, 128, 128, 8, 3]
    assert near[2] == near[3] == [16, 128, 128, 4, 4]


def test_an_unknown_device_gets_the_default():
    assert chosen("sglang", "bfloat16", 128, 704, 4096, "a-new-gpu") == [64, 64, 32, 4, 3]


def test_rows_of_different_shapes_choose_on_their_own():
    slots, widths = np.array([[128.0], [64.0]]), np.array([704.0, 768.0])
    tile = tile_choice(
        "sglang",
        "h200-sxm",
        "bfloat16",
        n_slots=slots,
        intermediate=widths,
        n_tokens=np.full((3, 1, 1), 4096.0),
    )
    assert tile.columns.shape == (3, 2, 2)
    assert tile.columns[0].tolist() == [[128, 256], [64, 64]]


@pytest.mark.parametrize("library", LIBRARIES)
def test_tables_are_complete_and_say_where_they_are_from(library):
    content = json.loads((moe_tiles.CATALOG / f"{library}.json").read_text(encoding="utf-8"))
    assert content["licence"] == "Apache-2.0"
    assert library in content["version"].lower()
    seen = set()
    for entry in content["tiles"]:
        key = (entry["device"], entry["dtype"], entry["slots"], entry["intermediate"])
        assert key not in seen
        seen.add(key)
        tokens, rows, columns, depth, group, warps, stages = np.array(entry["of"]).T
        assert np.all(np.diff(tokens) > 0)
        assert set(rows) <= {8, 16, 32, 64, 128, 256}
        assert set(columns) <= {32, 64, 128, 256}
        assert set(depth) <= {32, 64, 128, 256}
        assert set(warps) <= {4, 8, 16}
        assert np.all((stages >= 2) & (stages <= 5) & (group >= 1))
    assert len(seen) > 30


def test_only_libraries_whose_rule_is_known_have_one():
    assert tile_library("sglang-triton", "bfloat16") == "sglang"
    assert tile_library("vllm-triton", "fp8_block") == "vllm"
    for name, dtype in (
        ("vllm-triton", "w4a16_mxfp4"),
        ("trtllm-cutlass", "bfloat16"),
        ("moesim-triton", "bfloat16"),
    ):
        assert tile_library(name, dtype) is None
    assert isinstance(tile_choice("vllm", "x", "fp8", n_slots=1, intermediate=1, n_tokens=1.0), Tile)
