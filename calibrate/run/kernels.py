"""The expert layer's own kernels: whole feed-forwards in three ways, their steps, and the router."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from calibrate.run.device import Device
from calibrate.run.points import Point
from calibrate.run.protocol import Cache, Case, check_close, n_sets_for
from calibrate.run.routes import N_DRAWS, expert_ids
from moesim.hardware.gpu import weight_bytes_per_element

__all__ = ["ExpertCase", "RouterCase", "StepCase", "expert_case", "step_case"]

_CHECKED_TOKENS = 8
_TOLERANCE = 0.03
_FP8_TOLERANCE = 0.1
"""The reference rounds where the kernel does; a value between two neighbours may still go either way."""
_BLOCK = 128
"""Side of a block of fp8 weights that shares a scale."""
Forward = Callable[[Any, Any, Any, Any, Any, Any], Any]


class Layer:
    """One rank's experts with tokens and routing, as many sets of them as outweigh the cache.

    Experts of this rank are 0 .. n_local - 1 of n_experts; ids above go to other ranks.
    """

    def __init__(self, point: Point, device: Device, *, own_scratch: bool = False) -> None:
        import torch

        self.torch: Any = torch
        at = point.columns
        self.n_tokens, self.hidden, self.top_k, self.n_experts = (
            int(at[name]) for name in ("n_tokens", "hidden", "top_k", "n_experts")
        )
        self.inner = int(at["intermediate"]) // int(at["tp"])
        self.ep = int(at["ep"])
        self.n_local = self.n_experts // self.ep
        self.load = str(at["load"])
        self.dtype = str(at["dtype"])
        self.where = device.torch_name
        self.n_sms = device.n_sms
        self._float = torch.float16 if self.dtype == "float16" else torch.bfloat16
        set_bytes, shared_bytes = self._bytes()
        if own_scratch:
            set_bytes, shared_bytes = set_bytes + shared_bytes, 0.0
        self.n_sets = n_sets_for(set_bytes, device, shared_bytes=shared_bytes)
        self.x = [self._randn(self.n_tokens, self.hidden) for _ in range(self.n_sets)]
        self.ids = [self._routes(index) for index in range(self.n_sets)]
        self.weights = [self._router_weights() for _ in range(self.n_sets)]
        self.w_up = [self._matrices(2 * self.inner, self.hidden) for _ in range(self.n_sets)]
        self.w_down = [self._matrices(self.hidden, self.inner) for _ in range(self.n_sets)]
        self.up_scale = [self._scales(2 * self.inner, self.hidden) for _ in range(self.n_sets)]
        self.down_scale = [self._scales(self.hidden, self.inner) for _ in range(self.n_sets)]
        self.expert_map = None
        if self.ep > 1:
            slots = torch.arange(self.n_experts, dtype=torch.int32, device=self.where)
            self.expert_map = torch.where(slots < self.n_local, slots, -1)

    @property
    def fp8(self) -> bool:
        """Whether weights are in blocks of fp8."""
        return self.dtype == "fp8_block"

    def refresh(self, index: int, sample: int) -> None:
        """New tokens and new routing; the weights stay."""
        self.x[index].normal_()
        self.ids[index].copy_(self._routes(sample))
        self.weights[index].copy_(self._router_weights())

    def check(self, out: Any) -> None:
        """Some tokens' outputs against the reference on just their experts."""
        from calibrate.kernels import reference

        torch = self.torch
        here = ((self.ids[0] >= 0) & (self.ids[0] < self.n_local)).any(dim=1).nonzero().flatten()
        tokens = here[torch.linspace(0, here.numel() - 1, min(_CHECKED_TOKENS, here.numel())).long()]
        ids = self.ids[0][tokens].long()
        used = ids[ids < self.n_local].unique()
        position = torch.full((self.n_experts,), -1, dtype=torch.long, device=self.where)
        position[used] = torch.arange(used.numel(), device=self.where)
        w_up, w_down = (
            self._values(self.w_up, self.up_scale, used),
            self._values(self.w_down, self.down_scale, used),
        )
        hidden = reference.up_swiglu(self._rounded(self.x[0][tokens]), w_up, position[ids])
        rows = reference.down(self._rounded(hidden), w_down, position[ids])
        expected = reference.combine(rows, self.weights[0][tokens])
        check_close(out[tokens], expected, tolerance=_FP8_TOLERANCE if self.fp8 else _TOLERANCE)

    def _rounded(self, rows: Any) -> Any:
        """Rows as an fp8 kernel sees them, so that its rounding is not taken for an error."""
        from calibrate.kernels import reference

        if not self.fp8:
            return rows
        return reference.dequantise_blocks(*reference.quantise_blocks(rows, (1, _BLOCK)), (1, _BLOCK))

    # ------------------------------------------------------------ data

    def _bytes(self) -> tuple[float, float]:
        """One set, and what all sets share: hidden rows of every pair, and room to make weights in bfloat16."""
        weights = 3.0 * self.n_local * self.inner * self.hidden
        pairs = self.n_tokens * self.top_k
        each = weight_bytes_per_element(self.dtype) if self.fp8 else 2.0
        set_bytes = weights * each + 2.0 * self.n_tokens * self.hidden + 8.0 * pairs
        scratch = 2.0 * (pairs + _BLOCK * self.n_local) * (self.hidden + 2 * self.inner)
        return set_bytes, scratch + (6.0 * self.inner * self.hidden * self.n_local if self.fp8 else 0.0)

    def _randn(self, *size: int) -> Any:
        return self.torch.randn(*size, device=self.where, dtype=self._float)

    def _matrices(self, rows: int, columns: int) -> Any:
        values = self._randn(self.n_local, rows, columns)
        return values.to(self.torch.float8_e4m3fn) if self.fp8 else values.mul_(columns**-0.5)

    def _scales(self, rows: int, columns: int) -> Any:
        """Scale of each block of an fp8 matrix; None for bfloat16."""
        if not self.fp8:
            return None
        blocks = (self.n_local, math.ceil(rows / _BLOCK), math.ceil(columns / _BLOCK))
        return (self.torch.rand(blocks, device=self.where) + 0.5) * columns**-0.5

    def _values(self, matrices: list[Any], scales: list[Any], used: Any) -> Any:
        from calibrate.kernels import reference

        stored = matrices[0][used]
        return reference.dequantise_blocks(stored, scales[0][used]) if self.fp8 else stored

    def _routes(self, sample: int) -> Any:
        ids = expert_ids(
            n_tokens=self.n_tokens, top_k=self.top_k, n_experts=self.n_experts, ep=self.ep, load=self.load,
            sample=sample % N_DRAWS,
        )  # fmt: skip
        return self.torch.from_numpy(ids).to(self.where)

    def _router_weights(self) -> Any:
        raw = self.torch.rand(self.n_tokens, self.top_k, device=self.where) + 0.1
        return raw / raw.sum(dim=1, keepdim=True)


class ExpertCase:
    """A whole feed-forward: from tokens and their experts to the weighted sum."""

    n_units = 1
    repeats = True
    caches: tuple[Cache, ...] = ("cold", "warm")

    def __init__(
        self, layer: Layer, forward: Callable[[int], Any], n_kernels: int, *, capturable: bool
    ) -> None:
        self._layer = layer
        self._forward = forward
        self.n_sets = layer.n_sets
        self.n_kernels = n_kernels
        self.capturable = capturable
        self.refresh = layer.refresh

    def call(self, index: int) -> None:
        """One feed-forward."""
        self._forward(index)

    def check(self) -> None:
        """Some tokens against the reference."""
        self._layer.check(self._forward(0))


def expert_case(point: Point, device: Device) -> Case:
    """Make the feed-forward that a point's implementation names."""
    layer = Layer(point, device)
    return _FORWARDS[str(point.columns["implementation"])](layer)


class Pipeline:
    """Our fused kernels on one layer: tiles chosen and buffers made once, as a serving engine does.

    Whole calls share what lies between their kernels; a step alone reads it, so each set needs its own to be cold.
    """

    def __init__(self, layer: Layer, *, n_spaces: int = 1) -> None:
        from calibrate.kernels import fused, grouped_gemm, permute, rows

        self._layer = layer
        self._fused: Any = fused
        self._products: Any = grouped_gemm
        self._sum: Any = rows.combine
        self._sort: Any = permute.sort_by_expert
        self._tiles = fused.tiles_for(
            layer.n_tokens, layer.top_k, layer.n_experts, layer.w_up[0], layer.n_sms
        )
        self._spaces = [
            fused.Workspace.of(layer.x[0], layer.w_up[0], layer.top_k, self._tiles) for _ in range(n_spaces)
        ]

    def whole(self, index: int) -> Any:
        """All kernels; the result is overwritten by the next call."""
        at = self._layer
        return self._fused.moe_ffn(
            at.x[index], at.w_up[index], at.w_down[index], at.ids[index], at.weights[index],
            n_experts=at.n_experts, expert_map=at.expert_map, tiles=self._tiles, workspace=self._space(index),
            w_up_scale=at.up_scale[index], w_down_scale=at.down_scale[index],
        )  # fmt: skip

    def sort(self, index: int) -> Any:
        """Pairs in the order of experts."""
        at = self._layer
        height = self._tiles[0].block_m
        return self._sort(at.ids[index], at.n_experts, height, at.expert_map, n_slots=at.n_local)

    def up(self, index: int, tokens: Any) -> Any:
        """First product and activation."""
        at = self._layer
        how = {"tile": self._tiles[0], "top_k": at.top_k, "out": self._space(index).h}
        return self._products.up_swiglu(at.x[index], at.w_up[index], tokens, **how)

    def down(self, index: int, tokens: Any) -> Any:
        """Second product, weighted."""
        at = self._layer
        space = self._space(index)
        how = {"tile": self._tiles[1], "out": space.rows}
        return self._products.down_combine(space.h, at.w_down[index], tokens, at.weights[index], **how)

    def combine(self, index: int, tokens: Any) -> Any:
        """Sum of each token's pairs."""
        space = self._space(index)
        return self._sum(space.rows, tokens, top_k=self._layer.top_k, out=space.out)

    def _space(self, index: int) -> Any:
        return self._spaces[index % len(self._spaces)]


class StepCase:
    """One kernel of the pipeline; the sort, as rows are moved by the products themselves, is the permutation."""

    n_units = 1
    repeats = True
    capturable = True
    caches: tuple[Cache, ...] = ("cold", "warm")

    def __init__(self, point: Point, device: Device) -> None:
        self._layer = Layer(point, device, own_scratch=True)
        self._pipeline = Pipeline(self._layer, n_spaces=self._layer.n_sets)
        self._op = str(point.columns["op"])
        self.n_sets = self._layer.n_sets
        self.n_kernels = 3 if self._op == "moe_permute" else 1
        self._tokens = [self._pipeline.sort(index) for index in range(self.n_sets)]
        if self._op in ("moe_down", "moe_combine"):  # what they read is what the steps before them left
            for index, tokens in enumerate(self._tokens):
                self._pipeline.up(index, tokens)
                self._pipeline.down(index, tokens)

    def refresh(self, index: int, sample: int) -> None:
        """New tokens and routing, sorted anew into the same buffers, which a graph may hold."""
        self._layer.refresh(index, sample)
        for kept, new in zip(self._tokens[index], self._pipeline.sort(index), strict=True):
            kept.copy_(new)

    def call(self, index: int) -> None:
        """Run the kernel."""
        if self._op == "moe_permute":
            self._pipeline.sort(index)
            return
        step = {
            "moe_up": self._pipeline.up,
            "moe_down": self._pipeline.down,
            "moe_combine": self._pipeline.combine,
        }
        step[self._op](index, self._tokens[index])

    def check(self) -> None:
        """All steps in turn, against the reference."""
        tokens = self._tokens[0]
        self._pipeline.up(0, tokens)
        self._pipeline.down(0, tokens)
        self._layer.check(self._pipeline.combine(0, tokens))


def step_case(point: Point, device: Device) -> Case:
    """Make one step of the pipeline."""
    return StepCase(point, device)


def _triton(layer: Layer) -> Case:
    """Sort (three kernels of many pairs, one of few), two products, a sum; in fp8 the tokens are quantised first."""
    return ExpertCase(layer, Pipeline(layer).whole, 7 if layer.fp8 else 6, capturable=True)


def _padded(layer: Layer) -> Case:
    """Every expert takes as many rows as the busiest of all samples: the price of equal batches."""
    from calibrate.kernels.padded import moe_ffn_padded

    busiest = max(
        int(np.bincount(_ids(layer, i)[_ids(layer, i) < layer.n_local]).max()) for i in range(N_DRAWS)
    )
    capacity = 16 * math.ceil(busiest / 16)

    def forward(index: int) -> Any:
        out, _ = moe_ffn_padded(
            layer.x[index], layer.w_up[index], layer.w_down[index], layer.ids[index], layer.weights[index],
            capacity=capacity,
        )  # fmt: skip
        return out

    return ExpertCase(layer, forward, 5, capturable=True)


def _naive(layer: Layer) -> Case:
    """One expert after the other, the host reading each one's count."""
    from calibrate.kernels.naive import moe_ffn_naive

    def forward(index: int) -> Any:
        return moe_ffn_naive(
            layer.x[index], layer.w_up[index], layer.w_down[index], layer.ids[index], layer.weights[index]
        )

    return ExpertCase(layer, forward, 8 * layer.n_local, capturable=False)


def _ids(layer: Layer, sample: int) -> Any:
    return expert_ids(
        n_tokens=layer.n_tokens, top_k=layer.top_k, n_experts=layer.n_experts, ep=layer.ep, load=layer.load,
        sample=sample,
    )  # fmt: skip


_FORWARDS: dict[str, Callable[[Layer], Case]] = {
    "moesim-triton": _triton,
    "moesim-padded": _padded,
    "moesim-naive": _naive,
}


class RouterCase:
    """Gate product, scores, choice."""

    n_kernels = 2
    n_units = 1
    repeats = True
    capturable = True
    caches: tuple[Cache, ...] = ("cold", "warm")

    def __init__(self, point: Point, device: Device) -> None:
        import torch

        from calibrate.kernels.router import route

        self._torch: Any = torch
        self._route = route
        at = point.columns
        n_tokens, n_experts, hidden = (int(at[name]) for name in ("n_tokens", "n_experts", "hidden"))
        self._how: dict[str, Any] = {"top_k": int(at["top_k"]), "scoring": str(at["scoring"])}
        self.n_sets = n_sets_for(2.0 * hidden * (n_tokens + n_experts) + 4.0 * n_tokens * n_experts, device)
        where: dict[str, Any] = {"device": device.torch_name, "dtype": torch.bfloat16}
        self._x = [torch.randn(n_tokens, hidden, **where) for _ in range(self.n_sets)]
        self._w = [torch.randn(n_experts, hidden, **where) / math.sqrt(hidden) for _ in range(self.n_sets)]

    def refresh(self, index: int, sample: int) -> None:
        """New tokens."""
        self._x[index].normal_()

    def call(self, index: int) -> None:
        """Route all tokens."""
        self._route(self._x[index], self._w[index], **self._how)

    def check(self) -> None:
        """Weights of the first tokens; their experts may differ where two scores are nearly equal."""
        from calibrate.kernels import reference

        _, found = self._route(self._x[0], self._w[0], **self._how)
        _, expected = reference.route(self._x[0][:64], self._w[0], **self._how)
        check_close(found[:64], expected, tolerance=_TOLERANCE)
