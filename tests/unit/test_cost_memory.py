"""Bytes that operators move in memory, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.cost.memory import moved_bytes
from moesim.work.ops import (
    AllReduce,
    AttentionDecode,
    AttentionPrefill,
    Combine,
    DenseGemm,
    Dispatch,
    Elementwise,
    ExpertFfn,
    Pause,
    Router,
)


def one(value: float) -> np.ndarray:
    return np.full((1, 1, 1), float(value))


def test_a_product_reads_its_operands_and_writes_its_result() -> None:
    op = DenseGemm(one(4), 8, 16, "bfloat16", n_gemms=3, batched=2)
    assert moved_bytes(op).item() == 6 * 2 * (4 * 16 + 8 * 16 + 4 * 8)


def test_experts_read_the_weights_of_slots_that_have_rows() -> None:
    rows = np.array([[[[3.0, 0.0, 1.0]]]])
    op = ExpertFfn(rows, one(4), hidden=16, intermediate=8, top_k=1, dtype="bfloat16")
    weights = 2 * 3 * 16 * 8 * 2  # two slots, three matrices
    per_row = 2 * (16 + 16 + 16 + 8 + 8 + 16)  # in; two halves written, read; activation written, read; out
    assert moved_bytes(op).item() == weights + 4 * per_row
    assert moved_bytes(replace(op, passes="backward")).item() == 2 * (weights + 4 * per_row)


def test_decode_reads_the_window_of_its_cache() -> None:
    op = AttentionDecode("gqa", one(2), one(100), 4, 2, 8, 8, 0, "bfloat16")
    keys, queries = 100 * 2 * (8 + 8) * 2, 4 * (8 + 8) * 2
    assert moved_bytes(op).item() == 2 * (keys + queries)
    assert moved_bytes(replace(op, window=10)).item() == 2 * (keys / 10 + queries)


def test_prefill_reads_keys_once_and_moves_twice_backward() -> None:
    op = AttentionPrefill("gqa", one(2), one(10), one(100), 4, 2, 8, 8, 0, "bfloat16")
    forward = 2 * (100 * 2 * (8 + 8) * 2 + 10 * 4 * (8 + 8) * 2)
    assert moved_bytes(op).item() == forward
    assert moved_bytes(replace(op, passes="backward")).item() == 2 * forward


def test_exchanges_touch_their_buffers() -> None:
    copies = (one(10), one(1), one(2), one(3), one(4))
    sent = Dispatch(*copies, 100.0, 64, 2, 8, "normal")
    assert moved_bytes(sent).item() == 100 * (1 + 3 * 2 + 3 * 3 + 4)
    assert moved_bytes(Combine(*copies, 100.0, 64, 2, 8, "low-latency")).item() == 100 * (
        1 + 3 * 2 + 3 * 3 + 3 * 4
    )


def test_the_rest() -> None:
    assert moved_bytes(Elementwise(one(7))).item() == 7
    assert moved_bytes(Router(one(2), 16, 8, 2)).item() == 2 * (16 * 2 + 8 * 4)
    assert moved_bytes(AllReduce(one(7), "tp")).item() == 0
    assert moved_bytes(Pause("host", one(7))).item() == pytest.approx(0)
