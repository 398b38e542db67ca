"""The router: its reference against hand-worked facts, its kernels interpreted and compiled for sm_90."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.kernels import KernelError, reference, router
from tests.kernel_tools import Interpreter, compile_sm90, faults


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(how: dict[str, Any]) -> dict[str, Any]:
    return {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in how.items()
    }


def select_there(logits: np.ndarray, how: dict[str, Any]) -> list[np.ndarray]:
    return [one.numpy() for one in router.select_experts(torch.from_numpy(logits), **tensors(how))]


def route_there(x: np.ndarray, w: np.ndarray, how: dict[str, Any]) -> list[np.ndarray]:
    return [one.numpy() for one in router.route(torch.from_numpy(x), torch.from_numpy(w), **tensors(how))]


def logits_there(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return router.router_logits(torch.from_numpy(x), torch.from_numpy(w)).numpy()


# ---------------------------------------------------------------- the reference itself


def test_reference_chooses_as_worked_by_hand() -> None:
    """Two groups of three. With biases the choices are .5 .2 .1 | .6 .4 .3 less .35 at expert 3."""
    score = torch.tensor([[0.5, 0.2, 0.1, 0.6, 0.4, 0.3]])
    logits = torch.logit(score)
    bias = torch.tensor([0.0, 0.0, 0.0, -0.35, 0.0, 0.0])
    how: dict[str, Any] = {"top_k": 2, "scoring": "sigmoid", "bias": bias, "n_groups": 2, "top_groups": 1}
    # Two best of each group: .5 + .2 = .7 and .4 + .3 = .7 (a tie, so the first); one best: .5 and .4.
    ids, weights = reference.select(logits, group_score="max", scale=2.5, **how)
    assert ids.tolist() == [[0, 1]]
    assert weights.tolist() == [pytest.approx([2.5 * 5 / 7, 2.5 * 2 / 7])]
    # Without the limit the best two are experts 0 (.5) and 4 (.4); 3 has the best score but not the best choice.
    ids, weights = reference.select(logits, top_k=2, scoring="sigmoid", bias=bias, normalise=False)
    assert ids.tolist() == [[0, 4]]
    assert weights.tolist() == [pytest.approx([0.5, 0.4])]


def test_reference_scores_a_group_by_its_two_best() -> None:
    score = torch.tensor([[0.9, 0.1, 0.6, 0.5]])
    how: dict[str, Any] = {"top_k": 1, "scoring": "sigmoid", "n_groups": 2, "top_groups": 1}
    assert reference.select(torch.logit(score), group_score="top2", **how)[0].item() == 2
    assert reference.select(torch.logit(score), group_score="max", **how)[0].item() == 0


def test_softmax_before_or_after_the_choice_is_the_same_when_normalised() -> None:
    logits = normal(50, 33)
    ids, weights = reference.select(logits, top_k=5)
    after = logits.gather(1, ids.long()).softmax(dim=1)
    assert torch.allclose(weights, after, atol=1e-6)


def test_blocks_come_back_within_half_a_step_of_their_largest() -> None:
    values = normal(2, 130, 300)
    for block in ((128, 128), (1, 128)):
        stored, scales = reference.quantise_blocks(values, block)
        assert scales.shape == (2, -(-130 // block[0]), 3)
        back = reference.dequantise_blocks(stored, scales, block)
        # e4m3 has three bits behind the point: 2 ** -4 of the value, and 2 ** -10 of the scale below its normals.
        spread = scales.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)[:, :130, :300]
        assert torch.all((back - values).abs() <= values.abs() / 16 + spread * 2**-10)
        largest = stored.float().abs().amax(dim=(1, 2))
        assert torch.all(largest == reference.FP8_MAX)
    assert torch.all(reference.quantise_blocks(torch.zeros(3, 5))[1] == 1)


# ---------------------------------------------------------------- interpreted

DEEPSEEK_V3 = {"top_k": 8, "scoring": "sigmoid", "n_groups": 8, "top_groups": 4, "scale": 2.5}
CASES: list[tuple[int, int, int, dict[str, Any], bool]] = [
    (1, 64, 8, {"top_k": 2}, False),
    (7, 200, 60, {"top_k": 4, "normalise": False}, False),
    (37, 40, 20, {"top_k": 1, "scoring": "sigmoid"}, False),
    (9, 130, 256, DEEPSEEK_V3, True),
    (17, 96, 160, {"top_k": 6, "n_groups": 8, "top_groups": 3, "group_score": "max", "scale": 16.0}, False),
    (3, 1100, 32, {"top_k": 4}, False),
    (2, 64, 512, {"top_k": 22}, False),
    (5, 33, 17, {"top_k": 17}, True),
    (4, 16, 1, {"top_k": 1}, False),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n_tokens", "hidden", "n_experts", "how", "biased"), CASES)
def test_route_agrees_with_the_reference(
    interpreter: Interpreter, n_tokens: int, hidden: int, n_experts: int, how: dict[str, Any], biased: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    x = normal(n_tokens, hidden, seed=1).to(dtype)
    w = (normal(n_experts, hidden, seed=2) / hidden**0.5).to(dtype)
    if biased:
        how = {
            **how,
            "bias": normal(n_experts, seed=3).numpy() / 4,
            "logit_bias": normal(n_experts, seed=4).numpy(),
        }
    ids, weights = interpreter(route_there, x.numpy(), w.numpy(), how)
    expected_ids, expected_weights = reference.route(x, w, **tensors(how))
    assert np.array_equal(ids, expected_ids.numpy())
    assert ids.dtype == np.int32
    assert np.allclose(weights, expected_weights.numpy(), rtol=1e-4, atol=1e-6)
    if how.get("normalise", True):
        assert np.allclose(weights.sum(axis=1), how.get("scale", 1.0), rtol=1e-5)


def test_product_of_two_types_is_in_float32(interpreter: Interpreter) -> None:
    x, w = normal(5, 300, seed=1).half(), normal(12, 300, seed=2)
    found = interpreter(logits_there, x.numpy(), w.numpy())
    expected = reference.logits(x, w).numpy()
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert not np.allclose(found, reference.logits(x, w.half()).numpy(), rtol=1e-5, atol=1e-4)


def test_no_tokens_route_nowhere(interpreter: Interpreter) -> None:
    x, w = np.zeros((0, 16), dtype=np.float16), np.zeros((8, 16), dtype=np.float16)
    ids, weights = interpreter(route_there, x, w, {"top_k": 2})
    assert ids.shape == weights.shape == (0, 2)
    assert interpreter(logits_there, x, w).shape == (0, 8)


def test_equals_go_to_the_lowest_index(interpreter: Interpreter) -> None:
    level = np.zeros((3, 40), dtype=np.float32)
    ids, weights = interpreter(select_there, level, {"top_k": 5})
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert np.allclose(weights, 0.2)
    level[1, 30] = level[1, 35] = level[2, 12] = 1.0
    ids, _ = interpreter(select_there, level, {"top_k": 5, "n_groups": 4, "top_groups": 2})
    assert ids.tolist() == [[0, 1, 2, 3, 4], [30, 35, 0, 1, 2], [12, 0, 1, 2, 3]]


def test_parts_are_added(interpreter: Interpreter) -> None:
    parts = normal(3, 6, 24).numpy()
    apart = interpreter(select_there, parts, {"top_k": 3})
    whole = interpreter(select_there, parts.sum(axis=0), {"top_k": 3})
    assert np.array_equal(apart[0], whole[0])
    assert np.allclose(apart[1], whole[1], atol=1e-6)
    many = interpreter(select_there, np.repeat(parts, 7, axis=0) / 7, {"top_k": 3})
    assert np.array_equal(many[0], whole[0])


def test_bias_chooses_and_does_not_weigh(interpreter: Interpreter) -> None:
    logits = np.zeros((1, 6), dtype=np.float32)
    bias = np.array([0, 0, 0, 0, 1, 2], dtype=np.float32)
    ids, weights = interpreter(select_there, logits, {"top_k": 2, "scoring": "sigmoid", "bias": bias})
    assert ids.tolist() == [[5, 4]]
    assert weights.tolist() == [[0.5, 0.5]]
    ids, weights = interpreter(select_there, logits, {"top_k": 2, "logit_bias": bias})
    assert ids.tolist() == [[5, 4]]
    assert weights[0, 0] / weights[0, 1] == pytest.approx(np.e, rel=1e-5)


GRID = st.integers(-16, 16).map(lambda step: step / 4)
"""Logits that are either equal or clearly apart, so that rounding never decides."""


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_select_agrees_with_the_reference_ties_included(
    interpreter: Interpreter, data: st.DataObject
) -> None:
    n_experts = data.draw(st.integers(1, 40))
    row = st.lists(GRID, min_size=n_experts, max_size=n_experts)
    logits = np.array(data.draw(st.lists(row, min_size=1, max_size=5)), dtype=np.float32)
    how = {
        "top_k": data.draw(st.integers(1, min(22, n_experts))),
        "scoring": data.draw(st.sampled_from(["softmax", "sigmoid"])),
        "normalise": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from([1.0, 2.5])),
    }
    ids, weights = interpreter(select_there, logits, how)
    expected_ids, expected_weights = reference.select(torch.from_numpy(logits), **how)
    assert np.array_equal(ids, expected_ids.numpy())
    assert np.allclose(weights, expected_weights.numpy(), rtol=1e-5, atol=1e-7)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    n_groups=st.sampled_from([2, 3, 8]), size=st.integers(2, 12), seed=st.integers(0, 2**16), data=st.data()
)  # fmt: skip
def test_chosen_experts_lie_in_the_best_groups(
    interpreter: Interpreter, n_groups: int, size: int, seed: int, data: st.DataObject
) -> None:
    top_groups = data.draw(st.integers(1, n_groups))
    top_k = data.draw(st.integers(1, min(8, top_groups * size)))
    logits, bias = (
        normal(4, n_groups * size, seed=seed).numpy(),
        normal(n_groups * size, seed=seed + 1).numpy(),
    )
    how = {
        "top_k": top_k, "scoring": "sigmoid", "bias": bias, "n_groups": n_groups, "top_groups": top_groups,
        "scale": 1.5,
    }  # fmt: skip
    ids, weights = interpreter(select_there, logits, how)
    choice = 1 / (1 + np.exp(-logits)) + bias
    for chosen, weighed, row in zip(ids, weights, choice, strict=True):
        two_best = np.sort(row.reshape(n_groups, size), axis=1)[:, -2:].sum(axis=1)
        best = set(np.argsort(-two_best)[:top_groups].tolist())
        assert set((chosen // size).tolist()) <= best
        allowed = [e for e in range(n_groups * size) if e // size in best]
        assert chosen.tolist() == sorted(allowed, key=lambda e: -row[e])[:top_k]
        assert weighed.sum() == pytest.approx(1.5, rel=1e-5)


# ---------------------------------------------------------------- how the product is cut


@pytest.mark.parametrize("n_tokens", [1, 7, 64, 129, 1024, 4096, 65536])
@pytest.mark.parametrize(("n_experts", "hidden"), [(8, 4096), (256, 7168), (32, 2880), (512, 64)])
def test_cut_fills_the_gpu_and_not_more(n_tokens: int, n_experts: int, hidden: int) -> None:
    tile = router.logits_tile(n_tokens, n_experts, hidden)
    tiles = -(-n_tokens // tile.block_t) * -(-n_experts // tile.block_e)
    steps = -(-hidden // tile.block_h)
    assert tile.n_parts == 1 or tiles * tile.n_parts <= 132
    assert tile.n_parts == 1 or steps / tile.n_parts >= 4
    # At least half of the SMs work, or the depth is used up.
    assert tiles * tile.n_parts > 132 / 2 or tile.n_parts == 32 or 2 * tile.n_parts >= steps // 4
    assert tile.n_parts <= 8 or tile.n_parts % 8 == 0


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 9}, "1 to 8"),
        ({"top_k": 5, "n_groups": 4, "top_groups": 2}, "1 to 4"),
        ({"scoring": "tanh"}, "softmax or sigmoid"),
        ({"group_score": "mean"}, "top2 or max"),
        ({"n_groups": 3}, "divide"),
        ({"n_groups": 4, "top_groups": 5}, "divide"),
        ({"n_groups": 8, "top_groups": 4}, "two experts"),
        ({"bias": torch.zeros(7)}, r"bias is .*\[E\]"),
        ({"logit_bias": torch.zeros(8, dtype=torch.int32)}, "logit_bias is .*floating"),
        ({"bias": torch.zeros(8, device="meta")}, "device"),
        ({"logits": torch.zeros(4, 8).double()}, "float32"),
        ({"logits": torch.zeros(8)}, r"\[T, E\]"),
        ({"logits": torch.zeros(4, 4097)}, "4096"),
    ],
)
def test_select_refuses(change: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {"logits": torch.zeros(4, 8), "top_k": 2}
    with pytest.raises(KernelError, match=words):
        router.select_experts(**{**good, **change})


@pytest.mark.parametrize(
    ("x", "w", "words"),
    [
        (torch.zeros(4, 16), torch.zeros(8, 17), r"\[T, H\]"),
        (torch.zeros(4), torch.zeros(8, 4), r"\[T, H\]"),
        (torch.zeros(4, 16, dtype=torch.int32), torch.zeros(8, 16), "float16"),
        (torch.zeros(16, 4).T, torch.zeros(8, 16), "contiguous"),
        (torch.zeros(4, 16), torch.zeros(8, 16, device="meta"), "one device"),
    ],
)
def test_product_refuses(x: torch.Tensor, w: torch.Tensor, words: str) -> None:
    with pytest.raises(KernelError, match=words):
        router.router_logits(x, w)


# ---------------------------------------------------------------- compiled for sm_90


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "wide"),
    [
        (1, 256, False),
        (128, 256, False),
        (128, 32, False),
        (8192, 256, False),
        (8192, 32, False),
        (128, 256, True),
    ],
)
def test_product_compiles_for_hopper(n_tokens: int, n_experts: int, wide: bool) -> None:
    tile = router.logits_tile(n_tokens, n_experts, 7168, wide=wide)
    made = compile_sm90(
        router._logits_kernel,
        {
            "x_ptr": "*bf16", "w_ptr": "*fp32" if wide else "*bf16", "parts_ptr": "*fp32",
            "n_tokens": "i32", "n_experts": "i32", "hidden": "i32", "steps": "i32",
        },
        {"BLOCK_T": tile.block_t, "BLOCK_E": tile.block_e, "BLOCK_H": tile.block_h, "SAME_TYPE": not wide},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        divisible=("n_experts", "hidden"),
    )  # fmt: skip
    assert faults(made, matrix=tile.block_t >= 64) == []
    assert any(form.startswith("LDGSTS.E.BYPASS.128") for form in made.forms), (
        "operands are copied behind the scenes"
    )


@pytest.mark.parametrize(
    ("n_experts", "n_groups", "top_groups", "top_k", "block_t"),
    [
        (256, 8, 4, 8, 1),
        (256, 8, 4, 8, 2),
        (160, 8, 3, 6, 2),
        (512, 1, 1, 22, 1),
        (128, 1, 1, 8, 4),
        (32, 1, 1, 4, 8),
        (4096, 1, 1, 8, 1),
    ],
)
def test_selection_compiles_for_hopper(
    n_experts: int, n_groups: int, top_groups: int, top_k: int, block_t: int
) -> None:
    size = 1 << (n_experts // n_groups - 1).bit_length()
    biased = dict.fromkeys(("HAS_LOGIT_BIAS", "HAS_BIAS"), n_groups > 1)
    flags = {**biased, **dict.fromkeys(("SIGMOID", "NORMALISE", "TOP2"), True)}
    cut = {"BLOCK_T": block_t, "GROUPS": n_groups, "SIZE": size}
    cut |= {"CHOICES": 1 << (top_k - 1).bit_length(), "UNROLL": 8 if block_t == 1 else 2}
    pointers = {"parts_ptr": "*fp32", "logit_bias_ptr": "*fp32", "bias_ptr": "*fp32", "weights_ptr": "*fp32"}
    integers = ("n_tokens", "n_experts", "n_parts", "part_stride", "group_size")
    made = compile_sm90(
        router._select_kernel,
        {**pointers, "ids_ptr": "*i32", "scale": "fp32", **dict.fromkeys(integers, "i32")},
        {**flags, **cut, "N_GROUPS": n_groups, "TOP_GROUPS": top_groups, "TOP_K": top_k},
        num_warps=max(1, block_t * n_groups * size // 512),
    )
    assert faults(made, matrix=False) == []
    if n_experts <= 512:
        assert made.instructions["BAR"] <= 1, (
            "one warp holds its tokens: nothing to wait for but the last store"
        )
