"""Router, sort, padded experts and the plain loop on a device, in bfloat16 and at sizes the interpreter cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from calibrate.kernels import naive, padded, permute, reference, router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=draw, device="cuda")


def drawn(n_tokens: int, top_k: int, n_experts: int, *, skew: float = 0.0) -> torch.Tensor:
    """Distinct experts for every token; `skew` makes low indices likelier."""
    score = normal(n_tokens, n_experts) - skew * torch.arange(n_experts, device="cuda") / n_experts
    return score.topk(top_k, dim=1).indices.contiguous()


def layer(n_tokens: int, top_k: int, n_experts: int, hidden: int, inner: int) -> list[torch.Tensor]:
    return [
        normal(n_tokens, hidden, seed=1).bfloat16(),
        (normal(n_experts, 2 * inner, hidden, seed=2) / hidden**0.5).bfloat16(),
        (normal(n_experts, hidden, inner, seed=3) / inner**0.5).bfloat16(),
        drawn(n_tokens, top_k, n_experts, skew=2.0),
        normal(n_tokens, top_k, seed=4).softmax(dim=1),
    ]


def replayed(launch: Callable[[], Any]) -> Any:
    """What `launch` returned when captured, after the graph has been replayed."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    graph.replay()
    torch.cuda.synchronize()
    return out


# ---------------------------------------------------------------- router


DEEPSEEK_V3 = {"top_k": 8, "scoring": "sigmoid", "n_groups": 8, "top_groups": 4, "scale": 2.5}


@pytest.mark.parametrize("n_tokens", [1, 7, 129, 2049, 16384])
@pytest.mark.parametrize(
    ("n_experts", "hidden", "how", "biased"),
    [
        (256, 7168, DEEPSEEK_V3, True),
        (8, 4096, {"top_k": 2}, False),
        (512, 2048, {"top_k": 22, "normalise": False}, False),
        (60, 2040, {"top_k": 4}, False),
        (160, 5120, {"top_k": 6, "n_groups": 8, "top_groups": 3, "group_score": "max", "scale": 16.0}, False),
    ],
)
@pytest.mark.parametrize("w_type", [torch.bfloat16, torch.float32])
def test_route(
    n_tokens: int, n_experts: int, hidden: int, how: Any, biased: bool, w_type: torch.dtype
) -> None:
    x = normal(n_tokens, hidden, seed=1).bfloat16()
    w = (normal(n_experts, hidden, seed=2) / hidden**0.5).to(w_type)
    how = {**how, "bias": normal(n_experts, seed=3) / 4} if biased else how
    logits = router.router_logits(x, w)
    assert torch.allclose(logits, reference.logits(x, w), rtol=1e-4, atol=1e-3)
    ids, weights = replayed(lambda: router.route(x, w, **how))
    expected_ids, expected_weights = reference.select(logits, **how)
    agree = (ids == expected_ids).all(dim=1)
    # The two sum their parts in different orders, so that a near tie may fall the other way.
    assert agree.float().mean() > 0.995
    assert torch.allclose(weights[agree], expected_weights[agree], rtol=1e-4, atol=1e-6)
    again = router.route(x, w, **how)
    assert torch.equal(again[0], ids)
    assert torch.equal(again[1], weights)


# ---------------------------------------------------------------- sort


@pytest.mark.parametrize("block_m", [1, 16, 128])
@pytest.mark.parametrize(
    ("n_tokens", "top_k", "n_experts"),
    [(1, 1, 1), (1, 8, 256), (129, 8, 60), (256, 8, 512), (300, 8, 256), (8192, 8, 256), (50_000, 22, 512)],
)
def test_sort(n_tokens: int, top_k: int, n_experts: int, block_m: int) -> None:
    ids = drawn(n_tokens, top_k, n_experts, skew=3.0)
    found = replayed(lambda: permute.sort_by_expert(ids, n_experts, block_m))
    expected = reference.sort_by_expert(ids.cpu(), n_experts, block_m)
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert torch.equal(one.cpu(), other), name


def test_sort_of_a_million_pairs_on_one_of_many_ranks() -> None:
    ids = drawn(131_072, 8, 256, skew=3.0).int()
    expert_map = torch.full((256,), -1, dtype=torch.int32, device="cuda")
    expert_map[64:96] = torch.arange(32, dtype=torch.int32, device="cuda")
    found = permute.sort_by_expert(ids, 256, 128, expert_map, n_slots=32)
    expected = reference.sort_by_expert(ids.cpu(), 256, 128, expert_map.cpu(), n_slots=32)
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert torch.equal(one.cpu(), other), name


@pytest.mark.parametrize(("n_tokens", "top_k", "hidden"), [(1, 1, 16), (129, 8, 2880), (4096, 8, 7168)])
def test_rows_there_and_back(n_tokens: int, top_k: int, hidden: int) -> None:
    x, ids = normal(n_tokens, hidden).bfloat16(), drawn(n_tokens, top_k, 64)
    weights = normal(n_tokens, top_k, seed=1).softmax(dim=1)
    placed = permute.sort_by_expert(ids, 64, 16)
    rows = replayed(lambda: permute.gather_rows(x, placed.sorted_pairs, top_k))
    real = placed.sorted_pairs < ids.numel()
    assert torch.equal(rows[real], x[placed.sorted_pairs[real].long() // top_k])
    assert torch.all(rows[~real] == 0)
    back = replayed(lambda: permute.unpermute(rows, placed.pair_row, weights))
    assert torch.allclose(back.float(), x.float(), rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------- experts


@pytest.mark.parametrize(
    ("n_tokens", "top_k", "n_experts", "hidden", "inner", "capacity"),
    [
        (1, 2, 8, 256, 128, 1),
        (129, 4, 60, 512, 352, 20),
        (1024, 8, 32, 1024, 512, 300),
        (77, 1, 3, 136, 72, 50),
    ],
)
def test_padded(n_tokens: int, top_k: int, n_experts: int, hidden: int, inner: int, capacity: int) -> None:
    tensors = layer(n_tokens, top_k, n_experts, hidden, inner)
    out, dropped = replayed(lambda: padded.moe_ffn_padded(*tensors, capacity=capacity))
    expected, expected_dropped = reference.moe_ffn_padded(*tensors, capacity=capacity)
    assert torch.equal(dropped, expected_dropped)
    assert (out.float() - expected).norm() < 1e-2 * expected.norm()


def test_padded_with_room_for_all_is_the_plain_loop() -> None:
    tensors = layer(500, 4, 16, 1024, 768)
    out, dropped = padded.moe_ffn_padded(*tensors, capacity=500)
    loop = naive.moe_ffn_naive(*tensors)
    assert int(dropped) == 0
    assert (out - loop).float().norm() < 1e-2 * loop.float().norm()
    expected = reference.moe_ffn(*tensors)
    assert (loop.float() - expected).norm() < 1e-2 * expected.norm()
