"""Reading of arrays that stay on disk: a block at a time, and nothing kept resident afterwards.

Pages of a mapped file count as memory of the process for as long as they are mapped; handing them back
after each block keeps that memory the same however long the file is.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["blocks", "count_ids", "take_rows"]

_BLOCK_IDS = 2**20
_COUNTED_AT_ONCE = 2**16
"""Ids that are counted together [count]: few enough to stay in the cache."""
_PLACES, _PLACE_ROWS = 64, 256
_ROWS_AT_ONCE = 256
"""Rows taken before pages go back; the kernel maps up to 64 KiB around each."""
_SMALL_BYTES = 2**25
"""Mapping that stays resident when rows are taken from all over it: it is no longer than what is held anyway."""


def blocks(values: NDArray[Any], *, sampled: bool = False) -> Iterator[tuple[int, NDArray[Any]]]:
    """Go over the rows of an array in order, a million values at a time.

    Parameters
    ----------
    values : (n_rows, ...)
        Mapped to a file, or not.
    sampled
        Look at 64 places only, where there are many rows.

    Yields
    ------
    start, block
        Index of the block's first row, and its rows; valid until the next block is asked for.
    """
    n = values.shape[0]
    step = max(1, _BLOCK_IDS // max(1, values[:1].size))
    if sampled and n > _PLACES * _PLACE_ROWS:
        starts = np.linspace(0, n - _PLACE_ROWS, _PLACES).astype(int).tolist()
        step = _PLACE_ROWS
    else:
        starts = list(range(0, n, step))
    for start in starts:
        yield start, values[start : start + step]
        _give_back(values)


def take_rows(values: NDArray[Any], at: NDArray[np.int64]) -> NDArray[Any]:
    """Rows `at` (n) of an array (n_rows, ...), in that order, as an array in memory."""
    mapping = _mapping(values)
    if mapping is None or len(mapping) <= _SMALL_BYTES or at.size <= _ROWS_AT_ONCE:
        return np.asarray(values[at])
    order = np.argsort(at, kind="stable")
    out = np.empty((at.size, *values.shape[1:]), dtype=values.dtype)
    for first in range(0, at.size, _ROWS_AT_ONCE):
        some = order[first : first + _ROWS_AT_ONCE]
        out[some] = values[at[some]]
        _give_back(values)
    return out


def count_ids(ids: NDArray[Any], n_experts: int) -> NDArray[np.int64]:
    """Tokens per (layer, expert), (n_layers, n_experts), of ids (n_tokens, n_layers, top_k)."""
    n_layers = ids.shape[1]
    base = (np.arange(n_layers) * n_experts)[None, :, None]
    total = np.zeros(n_layers * n_experts, dtype=np.int64)
    step = max(1, _COUNTED_AT_ONCE // max(1, ids[:1].size))
    for start in range(0, ids.shape[0], step):
        flat = np.add(ids[start : start + step], base, dtype=np.int64)
        total += np.bincount(flat.ravel(), minlength=total.size)
    return total.reshape(n_layers, n_experts)


def _mapping(values: NDArray[Any]) -> mmap.mmap | None:
    """Mapping that an array is the whole of, if nobody can have written to it."""
    base: object = values.base
    if isinstance(values, np.memmap) and values.mode == "r" and isinstance(base, mmap.mmap):
        return base
    return None


def _give_back(values: NDArray[Any]) -> None:
    """Unmap what is mapped; it is read again from the file where it is needed again."""
    mapping = _mapping(values)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
