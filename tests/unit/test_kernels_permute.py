"""Pairs sorted by expert and rows moved with them: interpreted against the reference, compiled for sm_90."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.kernels import KernelError, permute, reference
from tests.kernel_tools import Interpreter, compile_sm90, faults


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


def drawn(n_tokens: int, top_k: int, n_experts: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts for every token."""
    scores = torch.rand(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(dim=1)[:, :top_k].contiguous()


def sort_there(
    ids: np.ndarray,
    n_experts: int,
    block_m: int,
    expert_map: np.ndarray | None,
    n_slots: int | None,
    limits: tuple[int, int] | None,
) -> list[np.ndarray]:
    """`sort_by_expert` in the interpreter's process, with other (ONE_PROGRAM, CHUNK) where given."""
    kept = permute.ONE_PROGRAM, permute.CHUNK
    permute.ONE_PROGRAM, permute.CHUNK = limits or kept
    try:
        mapped = None if expert_map is None else torch.from_numpy(expert_map)
        out = permute.sort_by_expert(torch.from_numpy(ids), n_experts, block_m, mapped, n_slots=n_slots)
        return [field.numpy() for field in out]
    finally:
        permute.ONE_PROGRAM, permute.CHUNK = kept


def sorted_there(
    interpreter: Interpreter,
    ids: torch.Tensor,
    n_experts: int,
    block_m: int,
    expert_map: torch.Tensor | None = None,
    n_slots: int | None = None,
    limits: tuple[int, int] | None = None,
) -> permute.SortedTokens:
    mapped = None if expert_map is None else expert_map.numpy()
    fields = interpreter(sort_there, ids.numpy(), n_experts, block_m, mapped, n_slots, limits)
    return permute.SortedTokens(*map(torch.from_numpy, fields))


def same(found: permute.SortedTokens, expected: permute.SortedTokens) -> list[str]:
    """Names of the fields that differ."""
    pairs = zip(found._fields, found, expected, strict=True)
    return [name for name, one, other in pairs if not torch.equal(one, other)]


# ---------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("block_m", [1, 4, 16])
@pytest.mark.parametrize(("n_tokens", "top_k", "n_experts"), [(1, 1, 1), (7, 3, 5), (129, 4, 60)])
def test_reference_places_every_pair_once_in_the_blocks_of_its_expert(
    n_tokens: int, top_k: int, n_experts: int, block_m: int
) -> None:
    ids = drawn(n_tokens, top_k, n_experts)
    out = reference.sort_by_expert(ids, n_experts, block_m)
    n_pairs = n_tokens * top_k
    real = out.sorted_pairs[out.sorted_pairs < n_pairs]
    assert torch.equal(real.sort().values, torch.arange(n_pairs, dtype=torch.int32))
    assert torch.equal(out.pairs_per_expert, ids.flatten().bincount(minlength=n_experts).int())
    for block in range(int(out.n_blocks_used)):
        rows = out.sorted_pairs[block * block_m : (block + 1) * block_m]
        mine = rows[rows < n_pairs].long()
        assert len(mine) > 0
        assert torch.all(ids.flatten()[mine] == out.block_expert[block])
        assert torch.all(mine.diff() > 0), "the order of the tokens is kept"
    used = int(out.n_blocks_used)
    assert torch.all(out.block_expert[used:] == -1)
    assert torch.all(out.sorted_pairs[used * block_m :] == n_pairs)
    assert torch.equal(out.sorted_pairs[out.pair_row.long()], torch.arange(n_pairs, dtype=torch.int32))


def test_upper_bound_is_reached_and_never_passed() -> None:
    for counts in ([17, 1, 1, 1], [5, 5, 5, 5], [20, 0, 0, 0]):
        ids = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[:, None]
        for block_m in (1, 4, 16):
            used = sum(-(-count // block_m) for count in counts)
            assert used <= permute.upper_bound_blocks(20, 4, block_m)
            assert int(reference.sort_by_expert(ids, 4, block_m).n_blocks_used) == used
    assert permute.upper_bound_blocks(20, 4, 16) == 5  # 17, 1, 1, 1: two blocks and three
    assert permute.upper_bound_blocks(8, 256, 64) == 8  # as many blocks as pairs, not as experts


# ---------------------------------------------------------------- interpreted


@pytest.mark.parametrize("limits", [None, (8, 16)], ids=["one-program", "chunks"])
@pytest.mark.parametrize(
    ("n_tokens", "top_k", "n_experts", "block_m"),
    [(1, 1, 1, 1), (1, 8, 256, 16), (7, 3, 5, 4), (129, 1, 3, 64), (33, 4, 60, 16), (5, 22, 100, 128)],
)
def test_sort_agrees_with_the_reference(
    interpreter: Interpreter, n_tokens: int, top_k: int, n_experts: int, block_m: int, limits: Any
) -> None:
    ids = drawn(n_tokens, top_k, n_experts)
    found = sorted_there(interpreter, ids, n_experts, block_m, limits=limits)
    assert same(found, reference.sort_by_expert(ids, n_experts, block_m)) == []


def scan_there(counts: np.ndarray) -> list[np.ndarray]:
    table, total = torch.from_numpy(counts), torch.empty(counts.shape[1], dtype=torch.int32)
    permute._scan_kernel[(-(-counts.shape[1] // 8),)](
        table, total, counts.shape[1], len(counts), CHUNKS=256, WIDTH=8
    )
    return [table.numpy(), total.numpy()]


@pytest.mark.parametrize("n_chunks", [1, 256, 601])
def test_chunks_start_behind_those_before_them(interpreter: Interpreter, n_chunks: int) -> None:
    counts = np.random.default_rng(0).integers(0, 99, (n_chunks, 11), dtype=np.int32)
    starts, total = interpreter(scan_there, counts)
    assert np.array_equal(starts, counts.cumsum(axis=0) - counts)
    assert np.array_equal(total, counts.sum(axis=0))


@pytest.mark.parametrize("limits", [None, (8, 16)], ids=["one-program", "chunks"])
def test_sort_leaves_out_experts_of_other_ranks(interpreter: Interpreter, limits: Any) -> None:
    ids = drawn(29, 4, 12)
    expert_map = torch.full((12,), -1, dtype=torch.int32)
    expert_map[torch.tensor([9, 2, 5])] = torch.arange(3, dtype=torch.int32)
    found = sorted_there(interpreter, ids, 12, 8, expert_map, 3, limits)
    assert same(found, reference.sort_by_expert(ids, 12, 8, expert_map, n_slots=3)) == []
    assert found.pairs_per_expert.tolist() == [int((ids == expert).sum()) for expert in (9, 2, 5)]
    absent = (expert_map[ids.flatten()] < 0).numpy()
    assert np.array_equal(found.pair_row.numpy() < 0, absent)


@pytest.mark.parametrize("limits", [None, (8, 16)], ids=["one-program", "chunks"])
def test_sort_leaves_out_ids_that_are_no_expert(interpreter: Interpreter, limits: Any) -> None:
    ids = torch.tensor([[0, -1], [4, 2], [5, 1_000_000], [-7, 0], [2, 3]] * 4)
    found = sorted_there(interpreter, ids, 5, 4, limits=limits)
    assert same(found, reference.sort_by_expert(ids, 5, 4)) == []
    assert int(found.pairs_per_expert.sum()) == 24


def test_nothing_here_and_nothing_at_all(interpreter: Interpreter) -> None:
    absent = torch.full((4,), -1, dtype=torch.int64)
    found = sorted_there(interpreter, drawn(6, 2, 4), 4, 8, absent)
    assert int(found.n_blocks_used) == 0
    assert torch.all(found.sorted_pairs == 12)
    none = sorted_there(interpreter, torch.zeros((0, 2), dtype=torch.int64), 4, 8)
    assert [len(field) for field in none] == [0, 0, 1, 4, 0]
    assert int(none.n_blocks_used) == int(none.pairs_per_expert.sum()) == 0


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_sort_agrees_with_the_reference_for_any_ids(interpreter: Interpreter, data: st.DataObject) -> None:
    n_experts = data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, 4))
    token = st.lists(st.integers(-1, n_experts - 1), min_size=top_k, max_size=top_k)
    ids = torch.tensor(data.draw(st.lists(token, min_size=1, max_size=16)))
    block_m = 2 ** data.draw(st.integers(0, 5))
    limits = data.draw(st.sampled_from([(2048, 1024), (1, 16)]))
    found = sorted_there(interpreter, ids, n_experts, block_m, limits=limits)
    assert same(found, reference.sort_by_expert(ids, n_experts, block_m)) == []


def move_there(x: np.ndarray, ids: np.ndarray, weights: np.ndarray, n_experts: int) -> list[np.ndarray]:
    placed = permute.sort_by_expert(torch.from_numpy(ids), n_experts, 16)
    rows = permute.gather_rows(torch.from_numpy(x), placed.sorted_pairs, ids.shape[1])
    back = permute.unpermute(rows, placed.pair_row, torch.from_numpy(weights))
    return [rows.numpy(), back.numpy()]


@pytest.mark.parametrize(("n_tokens", "top_k", "hidden"), [(1, 1, 1), (7, 3, 100), (21, 4, 1030), (0, 2, 16)])
def test_rows_go_to_their_experts_and_back(
    interpreter: Interpreter, n_tokens: int, top_k: int, hidden: int
) -> None:
    ids = drawn(n_tokens, top_k, 6)
    if n_tokens > 1:
        ids[1, 0] = -1
    x = torch.randn(n_tokens, hidden, generator=torch.Generator().manual_seed(1)).half()
    weights = torch.rand(n_tokens, top_k, generator=torch.Generator().manual_seed(2))
    rows, back = interpreter(move_there, x.numpy(), ids.numpy(), weights.numpy(), 6)
    placed = reference.sort_by_expert(ids, 6, 16)
    real = placed.sorted_pairs < ids.numel()
    expected = torch.zeros(len(placed.sorted_pairs), hidden, dtype=x.dtype)
    expected[real] = x[placed.sorted_pairs[real].long() // top_k]
    assert np.array_equal(rows, expected.numpy())
    total = (weights * (ids >= 0)).sum(dim=1, keepdim=True)
    assert np.allclose(back, (x.float() * total).numpy(), rtol=2e-3, atol=1e-3)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"expert_ids": torch.zeros(4, dtype=torch.int32)}, r"\[T, top_k\]"),
        ({"expert_ids": torch.zeros(4, 2)}, "int32 or int64"),
        ({"expert_ids": torch.zeros(4, 2, dtype=torch.int32).T}, "contiguous"),
        ({"block_m": 24}, "power of two"),
        ({"n_experts": 0}, "at least one expert"),
        ({"n_slots": 4096}, "slots"),
        ({"expert_map": torch.zeros(7, dtype=torch.int32)}, r"\[n_experts\]"),
        ({"expert_map": torch.zeros(8)}, "int32 or int64"),
        ({"expert_map": torch.zeros(8, dtype=torch.int32, device="meta")}, "beside"),
        ({"block_m": 2**30}, "32 bits"),
    ],
)
def test_sort_refuses(change: dict[str, Any], words: str) -> None:
    good = {"expert_ids": torch.zeros(4, 2, dtype=torch.int32), "n_experts": 8, "block_m": 16}
    with pytest.raises(KernelError, match=words):
        permute.sort_by_expert(**{**good, **change})


def test_moving_refuses() -> None:
    rows, places, weights = torch.zeros(8, 4), torch.zeros(6, dtype=torch.int32), torch.zeros(3, 2)
    with pytest.raises(KernelError, match=r"\[T, H\]"):
        permute.gather_rows(rows.T, places, 2)
    with pytest.raises(KernelError, match="row_pair"):
        permute.gather_rows(rows, places.long(), 2)
    with pytest.raises(KernelError, match="at least 1"):
        permute.gather_rows(rows, places, 0)
    with pytest.raises(KernelError, match="rows"):
        permute.unpermute(rows[None], places, weights)
    with pytest.raises(KernelError, match="router_weights"):
        permute.unpermute(rows, places, weights.flatten())
    with pytest.raises(KernelError, match="pair_row"):
        permute.unpermute(rows, places[:5], weights)


# ---------------------------------------------------------------- compiled for sm_90


INTEGERS = ("n_pairs", "n_experts", "n_slots", "n_chunks", "n_blocks", "hidden")
TYPES = {"x_ptr": "*bf16", "rows_ptr": "*bf16", "out_ptr": "*bf16", "weights_ptr": "*fp32", "ids_ptr": "*i64"}
SORT = {"HAS_MAP": True, "BLOCK_M": 128}


@pytest.mark.parametrize(
    ("kernel", "constants", "num_warps"),
    [
        ("_sort_small_kernel", {**SORT, "N": 16, "SLOTS": 64, "FILL": 1024}, None),
        ("_sort_small_kernel", {**SORT, "N": 16, "SLOTS": 1024, "FILL": 1024}, None),
        ("_sort_small_kernel", {**SORT, "N": 256, "SLOTS": 512, "FILL": 1024}, None),
        ("_sort_small_kernel", {**SORT, "N": 2048, "SLOTS": 1024, "FILL": 1024}, None),
        ("_count_kernel", {**SORT, "N": 1024, "SLOTS": 1024}, None),
        ("_scan_kernel", {"CHUNKS": 256, "WIDTH": 8}, 4),
        ("_scatter_kernel", {**SORT, "N": 1024, "SLOTS": 1024}, None),
        ("_scatter_kernel", {**SORT, "N": 1024, "SLOTS": 64}, None),
        ("_gather_rows_kernel", {"TOP_K": 8, "TILE": 1024}, 4),
        ("_unpermute_kernel", {"TOP_K": 8, "TILE": 1024}, 4),
    ],
)
def test_compiles_for_hopper(kernel: str, constants: dict[str, Any], num_warps: int | None) -> None:
    function = getattr(permute, kernel)
    num_warps = num_warps or permute._warps(constants["N"], constants["SLOTS"])
    signature = {
        name: "i32" if name in INTEGERS else TYPES.get(name, "*i32")
        for name in function.arg_names
        if name not in constants
    }
    made = compile_sm90(function, signature, constants, num_warps=num_warps, divisible=("hidden",))
    assert faults(made, matrix=False) == []
    assert made.registers <= 120
    if kernel in ("_gather_rows_kernel", "_unpermute_kernel"):
        assert any(form.startswith("LDG.E.128") for form in made.forms), "rows are read in 16-byte pieces"
