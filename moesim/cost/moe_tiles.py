"""Which tile a library's grouped product runs: its tuned table where it has one for the shape, else its default rule.

SGLang and vLLM look a tile up by (experts on the rank, intermediate size, device, weight format) and the nearest
number of tokens; where nobody tuned that pair they fall back to a rule of a few lines. Neighbouring shapes differ
by up to three times for that reason alone, so the choice is a fact to look up, not a thing to fit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.work.ops import FloatArray

__all__ = ["LIBRARIES", "Tile", "tile_choice", "tile_library", "tuned_shapes"]

CATALOG = Path(__file__).resolve().parents[1] / "catalog" / "tiles"
LIBRARIES = ("sglang", "vllm")
"""Libraries whose choice is known."""
_RULED = {
    "sglang-triton": ("sglang", frozenset({"bfloat16", "fp8_block"})),
    "sglang-upcast": ("sglang", frozenset({"bfloat16"})),
    "vllm-triton": ("vllm", frozenset({"bfloat16", "fp8", "fp8_block"})),
}


@dataclass(frozen=True, eq=False)
class Tile:
    """Shape of a grouped product's tile; arrays that broadcast together."""

    rows: FloatArray
    """Rows of one expert."""
    columns: FloatArray
    """Columns of the weight."""
    depth: FloatArray
    """Depth of one step of the inner loop."""
    warps: FloatArray
    """Warps of 32 threads."""
    stages: FloatArray
    """Steps in flight at once, the one that is multiplied included."""


def tile_library(implementation: str, dtype: str) -> str | None:
    """Library whose choice a family of the profile makes; None where the family's parameters say it."""
    library, dtypes = _RULED.get(implementation, ("", frozenset()))
    return library if dtype in dtypes else None


def tile_choice(
    library: str,
    device: str,
    dtype: str,
    *,
    n_slots: FloatArray | int,
    intermediate: FloatArray | int,
    n_tokens: FloatArray | float,
) -> Tile:
    """Tile of both products of one fused feed-forward.

    Parameters
    ----------
    library
        One of `LIBRARIES`.
    device, dtype
        Which tuned table; a device that nobody tuned for gets the default rule, as it does in the library.
    n_slots, intermediate
        Experts on the rank and their width there: what the table is looked up by.
    n_tokens
        Tokens that enter the call, whether or not their experts are on the rank.

    Returns
    -------
    Arrays of the common shape of `n_slots`, `intermediate` and `n_tokens`.

    References
    ----------
    SGLang 0.5.14, ``get_default_config`` and ``try_get_optimal_moe_config`` of its Triton MoE runner; vLLM 0.24.0,
    ``get_default_config`` of ``fused_moe.py``; the tables' sources are in the files of ``moesim/catalog/tiles``.
    """
    slots, width, tokens = np.broadcast_arrays(
        np.asarray(n_slots, dtype=float),
        np.asarray(intermediate, dtype=float),
        np.asarray(n_tokens, dtype=float),
    )
    rule = _sglang_default if library == "sglang" else _vllm_default
    chosen = rule(dtype, slots, tokens)
    tables = _tables(library).get((device, dtype), {})
    for key, (keys, tiles) in tables.items():
        here = (slots == key[0]) & (width == key[1])
        if here.any():
            chosen[:, here] = tiles[:, _nearest(keys, tokens[here])]
    return Tile(*chosen)


def tuned_shapes(library: str, device: str, dtype: str) -> frozenset[tuple[int, int]]:
    """(experts on the rank, intermediate size) of every pair that the library was tuned for."""
    return frozenset(_tables(library).get((device, dtype), {}))


def _nearest(keys: FloatArray, tokens: FloatArray) -> NDArray[np.int64]:
    """Index of the nearest key; of two as near, the smaller, which the files list first."""
    return np.asarray(np.searchsorted((keys[1:] + keys[:-1]) / 2, tokens, side="left"))


def _sglang_default(dtype: str, slots: FloatArray, tokens: FloatArray) -> FloatArray:
    """[5, ...] rows, columns, depth, warps, stages where SGLang has no table."""
    if dtype == "fp8_block":
        return _stacked(tokens, 64, 128, 128, 4, 3)
    few = tokens <= slots
    return _stacked(tokens, np.where(few, 16, 64), np.where(few, 32, 64), np.where(few, 64, 32), 4, 3)


def _vllm_default(dtype: str, slots: FloatArray, tokens: FloatArray) -> FloatArray:
    """[5, ...] rows, columns, depth, warps, stages where vLLM has no table."""
    if dtype == "fp8_block":
        return _stacked(tokens, np.where(tokens <= 64, 16, 64), 128, 128, 4, 3)
    rows = np.select([tokens <= 32, tokens <= 96, tokens <= 512], [16, 32, 64], 128)
    few = tokens <= 64
    depth = 128 if dtype == "fp8" else np.where(few, 128, 64)
    warps, stages = np.where(tokens <= 128, 4, 8), np.where(tokens <= 32, 4, 3)
    return _stacked(tokens, rows, np.where(few, 64, 128), depth, warps, stages)


def _stacked(like: FloatArray, *parts: FloatArray | int) -> FloatArray:
    return np.stack([np.broadcast_to(np.asarray(part, dtype=float), like.shape) for part in parts])


@cache
def _tables(library: str) -> dict[tuple[str, str], dict[tuple[int, int], tuple[FloatArray, FloatArray]]]:
    """Token counts [k] and tiles [5, k] by (slots, intermediate), by (device, dtype)."""
    content = json.loads((CATALOG / f"{library}.json").read_text(encoding="utf-8"))
    found: dict[tuple[str, str], dict[tuple[int, int], tuple[FloatArray, FloatArray]]] = {}
    for entry in content["tiles"]:
        tokens, rows, columns, depth, _, warps, stages = np.array(entry["of"], dtype=float).T
        if entry["dtype"] == "fp8_block":
            depth = np.minimum(depth, 128.0)  # one scale a step: the kernel cuts deeper steps
        tiles = np.stack([rows, columns, depth, warps, stages])
        key = (entry["slots"], entry["intermediate"])
        found.setdefault((entry["device"], entry["dtype"]), {})[key] = (tokens, tiles)
    return found
