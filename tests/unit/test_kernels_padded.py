"""Experts of a fixed capacity and the plain loop: against the reference, and compiled for sm_90."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from calibrate.kernels import KernelError, naive, padded, reference
from tests.kernel_tools import Interpreter, compile_sm90, faults


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


def layer(
    n_tokens: int, top_k: int, n_experts: int, hidden: int, inner: int, dtype: torch.dtype = torch.float16
) -> list[torch.Tensor]:
    """x, w_up, w_down, expert_ids (distinct for a token), router_weights."""
    draw = torch.Generator().manual_seed(n_tokens)
    scores = torch.rand(n_tokens, n_experts, generator=draw)
    return [
        torch.randn(n_tokens, hidden, generator=draw).to(dtype),
        (torch.randn(n_experts, 2 * inner, hidden, generator=draw) / hidden**0.5).to(dtype),
        (torch.randn(n_experts, hidden, inner, generator=draw) / inner**0.5).to(dtype),
        scores.argsort(dim=1)[:, :top_k].contiguous(),
        torch.rand(n_tokens, top_k, generator=draw),
    ]


def padded_there(arrays: list[np.ndarray], capacity: int) -> list[np.ndarray]:
    out, dropped = padded.moe_ffn_padded(*map(torch.from_numpy, arrays), capacity=capacity)
    return [out.numpy(), dropped.numpy()]


def places_there(ids: np.ndarray, n_experts: int, capacity: int) -> list[np.ndarray]:
    return [one.numpy() for one in padded.pad_to_capacity(torch.from_numpy(ids), n_experts, capacity)]


TOLERANCE = {torch.float16: 4e-3, torch.float32: 1e-5}
"""Of outputs near 1; hidden values are stored in the type of the tokens."""
SHAPES = [
    # tokens, top_k, experts, hidden, inner, capacity
    (1, 1, 1, 16, 16, 1),
    (7, 2, 5, 48, 40, 3),
    (33, 3, 9, 64, 32, 17),
    (129, 1, 3, 72, 33, 50),
    (40, 2, 2, 136, 72, 40),
]


# ---------------------------------------------------------------- the reference itself


def test_reference_drops_by_position_and_nothing_else() -> None:
    x, w_up, w_down, _, _ = layer(5, 1, 2, 16, 8)
    ids, weights = torch.tensor([[0], [0], [1], [0], [0]]), torch.ones(5, 1)
    whole = reference.moe_ffn(x, w_up, w_down, ids, weights)
    out, dropped = reference.moe_ffn_padded(x, w_up, w_down, ids, weights, capacity=2)
    assert dropped.tolist() == [2]
    assert torch.equal(out[:3], whole[:3])
    assert torch.all(out[3:] == 0)


def test_reference_is_the_layer_written_out() -> None:
    x, w_up, w_down, ids, weights = layer(3, 2, 4, 16, 8, torch.float32)
    for token in range(3):
        total = torch.zeros(16)
        for expert, weight in zip(ids[token], weights[token], strict=True):
            gate, up = w_up[expert][:8] @ x[token], w_up[expert][8:] @ x[token]
            total += weight * (w_down[expert] @ (torch.nn.functional.silu(gate) * up))
        found = reference.moe_ffn(x, w_up, w_down, ids, weights)[token]
        assert torch.allclose(found, total, atol=1e-5)


# ---------------------------------------------------------------- interpreted


@pytest.mark.parametrize(
    ("n_tokens", "top_k", "n_experts", "hidden", "inner", "capacity", "dtype"),
    [*((*shape, torch.float16) for shape in SHAPES), (*SHAPES[1], torch.float32)],
)
def test_padded_agrees_with_the_reference(
    interpreter: Interpreter, n_tokens: int, top_k: int, n_experts: int, hidden: int, inner: int, capacity: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    tensors = layer(n_tokens, top_k, n_experts, hidden, inner, dtype)
    out, dropped = interpreter(padded_there, [one.numpy() for one in tensors], capacity)
    expected, expected_dropped = reference.moe_ffn_padded(*tensors, capacity=capacity)
    assert dropped.tolist() == expected_dropped.tolist()
    assert np.abs(out - expected.numpy()).max() < TOLERANCE[dtype]


def test_all_tokens_on_one_expert(interpreter: Interpreter) -> None:
    x, w_up, w_down, ids, weights = layer(20, 1, 6, 32, 16)
    ids = torch.full_like(ids, 4)
    out, dropped = interpreter(padded_there, [one.numpy() for one in (x, w_up, w_down, ids, weights)], 16)
    assert dropped.tolist() == [4]
    assert np.all(out[16:] == 0)
    expected = reference.moe_ffn(x, w_up, w_down, ids, weights).numpy()
    assert np.abs(out[:16] - expected[:16]).max() < TOLERANCE[torch.float16]


def test_places_are_ranks_in_the_order_of_tokens(interpreter: Interpreter) -> None:
    ids = torch.tensor([[2, 0], [2, 1], [-1, 2], [0, 2]])
    row_pair, pair_row, dropped = interpreter(places_there, ids.numpy(), 4, 3)
    assert row_pair.reshape(4, 3).tolist() == [[1, 6, 8], [3, 8, 8], [0, 2, 5], [8, 8, 8]]
    assert pair_row.tolist() == [6, 0, 7, 3, -1, 8, 1, -1]
    assert dropped.tolist() == [1]


@pytest.mark.parametrize("capacity", [1, 300])
def test_places_hold_for_any_capacity(interpreter: Interpreter, capacity: int) -> None:
    ids = layer(90, 2, 7, 16, 16)[3]
    row_pair, pair_row, dropped = interpreter(places_there, ids.numpy(), 7, capacity)
    held = np.flatnonzero(row_pair < 180)
    assert np.array_equal(pair_row[row_pair[held]], held)
    assert np.array_equal(ids.flatten().numpy()[row_pair[held]], held // capacity)
    assert len(held) + dropped[0] == 180
    assert (pair_row < 0).sum() == dropped[0]


def test_no_tokens(interpreter: Interpreter) -> None:
    out, dropped = interpreter(padded_there, [one.numpy() for one in layer(0, 2, 3, 16, 16)], 4)
    assert out.shape == (0, 16)
    assert dropped.tolist() == [0]


# ---------------------------------------------------------------- the plain loop


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts", "hidden", "inner", "capacity"), SHAPES)
def test_naive_agrees_with_the_reference(
    n_tokens: int, top_k: int, n_experts: int, hidden: int, inner: int, capacity: int, dtype: torch.dtype
) -> None:
    tensors = layer(n_tokens, top_k, n_experts, hidden, inner, dtype)
    tensors[3][0, 0] = -1
    out = naive.moe_ffn_naive(*tensors)
    assert out.dtype == dtype
    tolerance = {**TOLERANCE, torch.bfloat16: 4e-2}[dtype]
    assert torch.allclose(out.float(), reference.moe_ffn(*tensors), atol=tolerance)


def test_naive_takes_no_tokens_and_ids_that_are_no_expert() -> None:
    assert naive.moe_ffn_naive(*layer(0, 2, 3, 16, 16)).shape == (0, 16)
    x, w_up, w_down, ids, weights = layer(4, 2, 3, 16, 16)
    assert torch.all(naive.moe_ffn_naive(x, w_up, w_down, torch.full_like(ids, 7), weights) == 0)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("place", "tensor", "words"),
    [
        (0, torch.zeros(4, 17).half(), r"x is \[T, H\]"),
        (0, torch.zeros(4, 16), "all float16"),
        (0, torch.zeros(4, 16, 1).half(), r"x is \[T, H\]"),
        (1, torch.zeros(3, 31, 16).half(), r"w_up is \[E, 2 I, H\]"),
        (2, torch.zeros(3, 16, 8).half(), r"w_down is \[E, H, I\]"),
        (3, torch.zeros(3, 2, dtype=torch.int64), "expert_ids"),
        (4, torch.zeros(4, 3), "router_weights"),
    ],
)
def test_layers_that_do_not_fit_are_refused(place: int, tensor: torch.Tensor, words: str) -> None:
    tensors = layer(4, 2, 3, 16, 16)
    tensors[place] = tensor
    with pytest.raises(KernelError, match=words):
        padded.moe_ffn_padded(*tensors, capacity=4)
    with pytest.raises(KernelError, match=words):
        naive.moe_ffn_naive(*tensors)


def test_capacity_is_checked() -> None:
    with pytest.raises(KernelError, match="at least one pair"):
        padded.moe_ffn_padded(*layer(4, 2, 3, 16, 16), capacity=0)
    with pytest.raises(KernelError, match="32 bits"):
        padded.pad_to_capacity(torch.zeros(4, 2, dtype=torch.int32), 4, 2**30)


@pytest.mark.parametrize(
    ("rows", "w"),
    [
        (torch.zeros(2, 4, 16).half(), torch.zeros(3, 8, 16).half()),
        (torch.zeros(2, 4, 16).half(), torch.zeros(2, 8, 16)),
        (torch.zeros(4, 16).half(), torch.zeros(8, 16).half()),
        (torch.zeros(4, 2, 16).half().transpose(0, 1), torch.zeros(2, 8, 16).half()),
        (torch.zeros(2, 4, 16).int(), torch.zeros(2, 8, 16).int()),
    ],
)
def test_batched_products_refuse(rows: torch.Tensor, w: torch.Tensor) -> None:
    with pytest.raises(KernelError):
        padded.batched_down(rows, w)


# ---------------------------------------------------------------- compiled for sm_90


@pytest.mark.parametrize("gated", [True, False], ids=["up", "down"])
@pytest.mark.parametrize(
    ("n_rows", "dtype"),
    [(1, "bf16"), (32, "bf16"), (64, "bf16"), (300, "bf16"), (300, "fp32")],
)
def test_batched_products_compile_for_hopper(n_rows: int, dtype: str, gated: bool) -> None:
    wide = dtype == "fp32"
    tile = padded.batched_tile(n_rows, gated=gated, wide=wide)
    signature = {
        **dict.fromkeys(("a_ptr", "w_ptr", "out_ptr"), f"*{dtype}"),
        **dict.fromkeys(("n_rows", "n_columns", "depth", "m_tiles", "n_tiles"), "i32"),
    }
    constants: dict[str, Any] = {
        "GATED": gated, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "PRECISION": "tf32x3" if wide else "tf32",
    }  # fmt: skip
    made = compile_sm90(
        padded._batched_kernel, signature, constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages, divisible=("n_columns", "depth"),
    )  # fmt: skip
    assert faults(made, matrix=tile.block_m >= 64) == []
    assert wide or made.instructions["WARPGROUP"] <= 4, "matrix instructions wait for each other"
    if not wide:
        assert tile.block_m >= 64 or made.instructions["HMMA"] > 0
        assert any(form.startswith("LDGSTS.E.BYPASS.128") for form in made.forms), "operands are copied ahead"


def test_places_compile_for_hopper() -> None:
    signature = {
        **dict.fromkeys(("sorted_ptr", "count_ptr", "row_pair_ptr", "pair_row_ptr"), "*i32"),
        **dict.fromkeys(("n_experts", "n_pairs", "capacity"), "i32"),
    }
    made = compile_sm90(padded._capacity_kernel, signature, {"EXPERTS": 512, "TILE": 256})
    assert faults(made, matrix=False) == []
