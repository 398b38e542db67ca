"""Grouped products on a GPU: right in every tile, held by a CUDA graph, and how fast (printed, not asserted)."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from calibrate.kernels import reference
from calibrate.kernels.fused import Workspace, moe_ffn, tiles_for
from calibrate.kernels.tiles import TilePair, candidate_pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@dataclass
class Layer:
    """Weights of one rank and tokens for it, all random."""

    n_tokens: int
    hidden: int
    inner: int
    n_experts: int
    top_k: int
    dtype: str = "bfloat16"
    n_local: int | None = None
    """Experts on this rank, the first ones; all if None."""

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        n_slots = self.n_local or self.n_experts
        where: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        self.x = torch.randn(self.n_tokens, self.hidden, **where)
        w_up = torch.randn(n_slots, 2 * self.inner, self.hidden, **where) * self.hidden**-0.5
        w_down = torch.randn(n_slots, self.hidden, self.inner, **where) * self.inner**-0.5
        drawn = torch.rand(self.n_tokens, self.n_experts, device="cuda")
        self.ids = drawn.topk(self.top_k, dim=1).indices.int()
        self.weights = torch.rand(self.n_tokens, self.top_k, device="cuda")
        self.scales: dict[str, torch.Tensor] = {}
        self.w_up, self.w_down = w_up, w_down
        if self.dtype == "fp8_block":
            self.w_up, self.scales["w_up_scale"] = reference.quantise_blocks(w_up)
            self.w_down, self.scales["w_down_scale"] = reference.quantise_blocks(w_down)
        self.map = None
        if self.n_local is not None:
            slots = torch.arange(self.n_experts, device="cuda", dtype=torch.int32)
            self.map = torch.where(slots < self.n_local, slots, -1)

    def run(self, tiles: TilePair | None = None, workspace: Workspace | None = None) -> torch.Tensor:
        return moe_ffn(
            self.x, self.w_up, self.w_down, self.ids, self.weights,
            n_experts=self.n_experts, expert_map=self.map, tiles=tiles, workspace=workspace, **self.scales,
        )  # fmt: skip

    def expected(self) -> torch.Tensor:
        """In float64 from the weights as stored; tokens unquantised."""
        w_up, w_down = self.w_up, self.w_down
        if self.scales:
            w_up = reference.dequantise_blocks(w_up, self.scales["w_up_scale"])
            w_down = reference.dequantise_blocks(w_down, self.scales["w_down_scale"])
        ids = self.ids if self.n_local is None else torch.where(self.ids < self.n_local, self.ids, -1)
        return reference.moe_ffn(self.x, w_up, w_down, ids, self.weights)

    @property
    def flops(self) -> float:
        return 6.0 * self.n_tokens * self.top_k * self.hidden * self.inner

    @property
    def weight_bytes(self) -> float:
        """Of the experts that got a token."""
        active = self.ids[self.ids < (self.n_local or self.n_experts)].unique().numel()
        return 3.0 * active * self.hidden * self.inner * self.w_up.element_size()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


TOLERANCE = {"bfloat16": 1e-2, "fp8_block": 6e-2}
"""The same roundings made in PyTorch cost 0.3% (bfloat16: h, rows, result) and 4.4% (e4m3: x and h)."""


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
@pytest.mark.parametrize("n_tokens", [1, 7, 130, 1000, 3001])
def test_right_at_every_size(n_tokens: int, dtype: str) -> None:
    layer = Layer(n_tokens, 1024, 384, 16, 4, dtype)
    assert error(layer.run(), layer.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
@pytest.mark.parametrize("rows", [8, 30, 60, 400])
def test_right_in_every_candidate(rows: int, dtype: str) -> None:
    layer = Layer(rows * 2, 1024, 384, 8, 4, dtype)
    expected = layer.expected()
    for tiles in candidate_pairs(rows, 1024, 384, dtype):
        assert error(layer.run(tiles), expected) < TOLERANCE[dtype], tiles


def test_right_with_remainders_of_every_side() -> None:
    layer = Layer(333, 1040, 208, 5, 2)
    assert error(layer.run(), layer.expected()) < TOLERANCE["bfloat16"]


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
def test_right_on_a_rank_of_an_expert_group(dtype: str) -> None:
    layer = Layer(700, 1024, 256, 32, 4, dtype, n_local=4)
    assert error(layer.run(), layer.expected()) < TOLERANCE[dtype]


def test_the_same_bits_twice() -> None:
    layer = Layer(2000, 1024, 512, 16, 4)
    assert torch.equal(layer.run(), layer.run())


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
def test_a_graph_follows_new_tokens_and_routing(dtype: str) -> None:
    layer = Layer(300, 1024, 256, 8, 2, dtype)
    tiles = tiles_for(300, 2, 8, layer.w_up)
    workspace = Workspace.of(layer.x, layer.w_up, 2, tiles)
    graph = captured(lambda: layer.run(tiles, workspace))
    for _ in range(3):
        layer.x.normal_()
        layer.ids.copy_(torch.rand(300, 8, device="cuda").topk(2, dim=1).indices)
        workspace.out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert error(workspace.out, layer.expected()) < TOLERANCE[dtype]


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Graph of a call, after it has compiled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def median_s(call: Callable[[], object], n_samples: int = 30) -> float:
    """Median of graph replays, a cache full of other data before each [s]."""
    graph = captured(call)
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(n_samples):
        flush.random_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
@pytest.mark.parametrize("n_tokens", [8, 128, 2048, 16384])
def test_print_the_speed_of_each_candidate(n_tokens: int, dtype: str) -> None:
    """Qwen3-30B-A3B's experts (2048, 768, top 8 of 128); run with ``-s`` to read it."""
    layer = Layer(n_tokens, 2048, 768, 128, 8, dtype)
    rows = n_tokens * 8 / 128
    default = tiles_for(n_tokens, 8, 128, layer.w_up)
    print(f"\n{torch.cuda.get_device_name()} {dtype}, {n_tokens} tokens, {rows:g} rows an expert")
    for tiles in candidate_pairs(rows, 2048, 768, dtype):
        workspace = Workspace.of(layer.x, layer.w_up, 8, tiles)
        time_s = median_s(lambda tiles=tiles, workspace=workspace: layer.run(tiles, workspace))
        rates = f"{layer.flops / time_s / 1e12:.0f} TFLOP/s, {layer.weight_bytes / time_s / 1e12:.2f} TB/s of weights"
        print(f"{'*' if tiles == default else ' '} {time_s * 1e6:8.1f} us, {rates}  {tiles}")
        assert time_s > 0.0
