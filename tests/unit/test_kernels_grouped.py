"""Grouped products against an obvious reference, in Triton's interpreter, with awkward remainders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from calibrate.kernels import KernelError
from calibrate.kernels.tiles import (
    Tile,
    TilePair,
    block_rows,
    candidate_pairs,
    candidates,
    check_tile,
    choose,
    choose_pair,
    tune,
)
from tests.kernel_tools import Interpreter


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as one:
        yield one


@dataclass(frozen=True)
class Shape:
    """One call; sizes that no tile divides unless a test says so."""

    n_tokens: int = 37
    hidden: int = 80
    inner: int = 48
    n_experts: int = 5
    top_k: int = 2
    block_m: int = 16
    block_n: int = 128
    block_k: int = 64
    group_m: int = 2
    routing: str = "random"
    here: tuple[int, ...] | None = None
    """Experts on this rank, in the order of their slots; all if None."""
    seed: int = 0

    @property
    def tiles(self) -> tuple[Tile, Tile]:
        def tile(block_n: int) -> Tile:
            return Tile(self.block_m, block_n, self.block_k, self.group_m, 4, 3)

        return tile(self.block_n), tile(128)


def _routing(shape: Shape) -> Any:
    """Experts of each token, distinct within a token."""
    import torch

    generator = torch.Generator().manual_seed(shape.seed)
    drawn = torch.rand(shape.n_tokens, shape.n_experts, generator=generator)
    if shape.routing == "one idle":
        drawn[:, 1] = -1.0
    if shape.routing == "one takes all":
        drawn[:, 3] = 2.0
    ids = drawn.topk(shape.top_k, dim=1).indices.int()
    if shape.routing == "some dropped":
        ids[::3, 0] = -1
    return ids


def _operands(shape: Shape) -> tuple[Any, Any, Any]:
    """x, w_up, w_down in float16, scaled so that results are near one."""
    import torch

    torch.manual_seed(shape.seed)
    n_slots = len(shape.here) if shape.here else shape.n_experts
    x = torch.randn(shape.n_tokens, shape.hidden)
    w_up = torch.randn(n_slots, 2 * shape.inner, shape.hidden) / shape.hidden**0.5
    w_down = torch.randn(n_slots, shape.hidden, shape.inner) / shape.inner**0.5
    return x.half(), w_up.half(), w_down.half()


def _error(found: Any, expected: Any) -> float:
    """Relative error in the 2-norm; a NaN stays one."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _expert_map(shape: Shape) -> Any:
    import torch

    if shape.here is None:
        return None
    slots = torch.full((shape.n_experts,), -1, dtype=torch.int32)
    slots[list(shape.here)] = torch.arange(len(shape.here), dtype=torch.int32)
    return slots


def _slots(ids: Any, expert_map: Any) -> Any:
    """Ids as slots of this rank, -1 where the expert is elsewhere."""
    if expert_map is None:
        return ids
    import torch

    return torch.where(ids >= 0, expert_map[ids.clamp(min=0).long()], -1)


def whole(shape: Shape) -> float:
    """Error of `moe_ffn` against the reference; buffers start as NaN, so a value left out shows."""
    import torch

    from calibrate.kernels import reference
    from calibrate.kernels.fused import Workspace, moe_ffn

    x, w_up, w_down = _operands(shape)
    ids, expert_map = _routing(shape), _expert_map(shape)
    weights = torch.rand(shape.n_tokens, shape.top_k)
    workspace = Workspace.of(x, w_up, shape.top_k, shape.tiles)
    for buffer in (workspace.h, workspace.rows, workspace.out):
        buffer.fill_(float("nan"))
    found = moe_ffn(
        x, w_up, w_down, ids, weights,
        n_experts=shape.n_experts, expert_map=expert_map, tiles=shape.tiles, workspace=workspace,
    )  # fmt: skip
    assert found.data_ptr() == workspace.out.data_ptr()
    expected = reference.moe_ffn(x, w_up, w_down, _slots(ids, expert_map), weights)
    return _error(found, expected)


def halves(shape: Shape) -> tuple[float, float, float]:
    """Error of `up_swiglu`, its largest value in rows of padding, and the error of `down_combine`."""
    import torch

    from calibrate.kernels import reference
    from calibrate.kernels.grouped_gemm import down_combine, up_swiglu
    from calibrate.kernels.permute import sort_by_expert

    x, w_up, w_down = _operands(shape)
    ids, weights = _routing(shape), torch.rand(shape.n_tokens, shape.top_k)
    up, down = shape.tiles
    tokens = sort_by_expert(ids, shape.n_experts, shape.block_m)
    h, _ = up_swiglu(x, w_up, tokens, tile=up, top_k=shape.top_k)
    expected = reference.up_swiglu(x, w_up, ids)
    used = int(tokens.n_blocks_used) * shape.block_m
    padding = tokens.sorted_pairs[:used] == ids.numel()
    rows = down_combine(h, w_down, tokens, weights, tile=down)
    weighted = reference.down(expected, w_down, ids) * weights.reshape(-1, 1)
    return (
        _error(h[tokens.pair_row.long()], expected),
        float(h[:used][padding].abs().max()),
        _error(rows, weighted),
    )


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_each_half_in_every_height(interpreter: Interpreter, block_m: int) -> None:
    up, padding, down = interpreter(halves, Shape(block_m=block_m))
    assert up < 1e-3
    assert padding == 0.0
    assert down < 1e-3


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(Shape(routing="one idle"), id="an expert without rows"),
        pytest.param(Shape(routing="one takes all", top_k=1), id="an expert with all rows"),
        pytest.param(Shape(top_k=1, n_tokens=1), id="one pair"),
        pytest.param(Shape(top_k=5, n_tokens=7), id="every expert"),
        pytest.param(Shape(here=(4, 1)), id="foreign experts"),
        pytest.param(Shape(here=(2,), routing="some dropped"), id="dropped and foreign pairs"),
        pytest.param(Shape(routing="some dropped", block_m=64), id="dropped pairs"),
        pytest.param(Shape(n_tokens=128, group_m=3), id="more blocks than a group"),
        pytest.param(Shape(hidden=256, inner=128, n_tokens=64), id="no remainder"),
        pytest.param(
            Shape(hidden=144, inner=176, block_n=256, block_m=64), id="columns beyond the gate rows"
        ),
        pytest.param(Shape(hidden=144, inner=176, block_n=256), id="the same, transposed"),
        pytest.param(Shape(hidden=16, inner=16), id="far less than a tile"),
        pytest.param(Shape(hidden=208, block_k=128), id="deep step"),
        pytest.param(Shape(n_tokens=3, n_experts=64, top_k=6), id="more experts than pairs"),
    ],
)
def test_whole_feed_forward(interpreter: Interpreter, shape: Shape) -> None:
    assert interpreter(whole, shape) < 1e-3


def nothing(_: None) -> tuple[int, ...]:
    """Shape of the result of no tokens."""
    import torch

    from calibrate.kernels.fused import moe_ffn

    x, w_up, w_down = _operands(Shape(n_tokens=0))
    ids = torch.empty(0, 2, dtype=torch.int32)
    return tuple(moe_ffn(x, w_up, w_down, ids, ids.float(), n_experts=5).shape)


def test_no_tokens(interpreter: Interpreter) -> None:
    assert interpreter(nothing, None) == (0, 80)


def only_foreign(_: None) -> float:
    """Largest output where no pair's expert is on this rank."""
    import torch

    from calibrate.kernels.fused import moe_ffn

    shape = Shape(here=(0, 1))
    x, w_up, w_down = _operands(shape)
    ids = torch.full((shape.n_tokens, 2), 3, dtype=torch.int32)
    weights = torch.ones(shape.n_tokens, 2)
    out = moe_ffn(x, w_up, w_down, ids, weights, n_experts=5, expert_map=_expert_map(shape))
    return float(out.abs().max())


def test_a_rank_without_any_pair_gives_zeros(interpreter: Interpreter) -> None:
    assert interpreter(only_foreign, None) == 0.0


def twice(shape: Shape) -> bool:
    """Whether two runs give the same bits."""
    import torch

    from calibrate.kernels.fused import moe_ffn

    x, w_up, w_down = _operands(shape)
    ids, weights = _routing(shape), torch.rand(shape.n_tokens, shape.top_k)
    one, other = (
        moe_ffn(x, w_up, w_down, ids, weights, n_experts=5, tiles=shape.tiles).clone() for _ in range(2)
    )
    return bool(torch.equal(one, other))


def test_the_same_bits_twice(interpreter: Interpreter) -> None:
    assert interpreter(twice, Shape())


# ---------------------------------------------------------------- fp8


def _nearest_or_carry(stored: Any, values: Any) -> float:
    """Share of e4m3 values that are not a neighbour of `values`.

    Triton's interpreter drops a carry: a value whose mantissa rounds up to the next power of two loses half its
    size where its exponent was odd. Such values are left out; a GPU rounds them right.
    """
    import torch

    nearest = values.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    is_power = torch.frexp(nearest).mantissa.abs() == 0.5
    carried = is_power & (nearest.abs() > values.abs())
    ulp = 2.0 ** (torch.frexp(nearest).exponent - 4).clamp(min=-9)
    wrong = ((stored.float() - values).abs() > ulp) & ~carried
    return float(wrong.float().mean())


def fp8_halves(shape: Shape) -> dict[str, float]:
    """Errors of each fp8 kernel given exact inputs, against the dequantised reference."""
    import torch

    from calibrate.kernels import reference
    from calibrate.kernels.grouped_gemm import down_combine, up_swiglu
    from calibrate.kernels.permute import sort_by_expert
    from calibrate.kernels.rows import quantise_rows

    x, w_up, w_down = _operands(shape)
    ids, weights = _routing(shape), torch.rand(shape.n_tokens, shape.top_k)
    up, down = shape.tiles
    tokens = sort_by_expert(ids, shape.n_experts, shape.block_m)
    x8, x_scale = reference.quantise_blocks(x, (1, 128))
    found8, found_scale = quantise_rows(x)
    up8, up_scale = reference.quantise_blocks(w_up)
    down8, down_scale = reference.quantise_blocks(w_down)

    h, h_scale = up_swiglu(x8, up8, tokens, tile=up, top_k=shape.top_k, x_scale=x_scale, w_scale=up_scale)
    x_is = reference.dequantise_blocks(x8, x_scale, (1, 128))
    expected = reference.up_swiglu(x_is, reference.dequantise_blocks(up8, up_scale), ids)
    _, expected_scale = reference.quantise_blocks(expected, (1, 128))
    place = tokens.pair_row.long()
    scale = h_scale.T[place]

    exact8, exact_scale = reference.quantise_blocks(expected, (1, 128))
    h_exact, scale_exact = torch.zeros_like(h), torch.ones_like(h_scale)
    h_exact.view(torch.uint8)[place] = exact8.view(torch.uint8)
    scale_exact.T[place] = exact_scale
    out = torch.empty(ids.numel(), shape.hidden, dtype=torch.float16)
    rows = down_combine(
        h_exact, down8, tokens, weights, tile=down, h_scale=scale_exact, w_scale=down_scale, out=out
    )
    h_is = reference.dequantise_blocks(exact8, exact_scale, (1, 128))
    weighted = reference.down(h_is, reference.dequantise_blocks(down8, down_scale), ids)
    spread = x_scale.repeat_interleave(128, dim=1)
    return {
        "token scales": _error(found_scale, x_scale),
        "token values": _nearest_or_carry(found8, x.float() / spread),
        "h scales": _error(scale, expected_scale),
        "h values": _nearest_or_carry(h[place], expected / scale.repeat_interleave(128, dim=1)),
        "rows": _error(rows, weighted * weights.reshape(-1, 1)),
    }


@pytest.mark.parametrize("block_m", [16, 64])
def test_fp8(interpreter: Interpreter, block_m: int) -> None:
    shape = Shape(hidden=256, inner=256, n_experts=3, n_tokens=21, block_m=block_m, block_n=256, block_k=128)
    errors = interpreter(fp8_halves, shape)
    assert errors["token scales"] < 1e-6
    assert errors["token values"] == 0.0
    assert errors["h scales"] < 1e-5
    assert errors["h values"] == 0.0
    assert errors["rows"] < 1e-3


def fp8_whole(_: None) -> float:
    """Error of the whole in fp8 against the reference in float16."""
    import torch

    from calibrate.kernels import reference
    from calibrate.kernels.fused import Workspace, moe_ffn

    shape = Shape(hidden=256, inner=128, n_experts=4, n_tokens=19, block_n=256, block_k=128)
    x, w_up, w_down = _operands(shape)
    ids, weights = _routing(shape), torch.rand(shape.n_tokens, shape.top_k)
    up8, up_scale = reference.quantise_blocks(w_up)
    down8, down_scale = reference.quantise_blocks(w_down)
    workspace = Workspace.of(x, up8, shape.top_k, shape.tiles)
    assert workspace.n_bytes > workspace.h.nbytes + workspace.rows.nbytes + workspace.out.nbytes
    found = moe_ffn(
        x, up8, down8, ids, weights, n_experts=4, tiles=shape.tiles,
        w_up_scale=up_scale, w_down_scale=down_scale, workspace=workspace,
    )  # fmt: skip
    return _error(found, reference.moe_ffn(x, w_up, w_down, ids, weights))


def test_fp8_whole_is_near_sixteen_bits(interpreter: Interpreter) -> None:
    # e4m3 keeps 4 significant bits: 2.6% RMS an operand. The interpreter also halves 2% of what it rounds.
    assert interpreter(fp8_whole, None) < 0.13


# ---------------------------------------------------------------- refusals


def refusal(name: str) -> str:
    """Message of what a wrong call raises."""
    import torch

    from calibrate.kernels.fused import moe_ffn
    from calibrate.kernels.grouped_gemm import down_combine, up_swiglu
    from calibrate.kernels.permute import sort_by_expert
    from calibrate.kernels.rows import combine, quantise_rows

    shape = Shape()
    x, w_up, w_down = _operands(shape)
    ids, weights = _routing(shape), torch.ones(shape.n_tokens, shape.top_k)
    tokens = sort_by_expert(ids, 5, 16)
    up, down = shape.tiles
    e4m3 = torch.float8_e4m3fn
    wide = Tile(16, 256, 128, 1, 4, 3)
    h = torch.zeros(tokens.sorted_pairs.numel(), 48, dtype=torch.float16)
    calls = {
        "types": lambda: up_swiglu(x, w_up.bfloat16(), tokens, tile=up, top_k=2),
        "depth": lambda: up_swiglu(x, w_up[:, :, :64].contiguous(), tokens, tile=up, top_k=2),
        "strides": lambda: up_swiglu(x, w_up.transpose(1, 2).contiguous().transpose(1, 2), tokens, tile=up, top_k=2),
        "alignment": lambda: up_swiglu(x[:, :72].contiguous(), w_up[:, :, :72].contiguous(), tokens, tile=up, top_k=2),
        "height": lambda: up_swiglu(x, w_up, tokens, tile=Tile(32, 128, 64, 1, 4, 3), top_k=2),
        "top_k": lambda: up_swiglu(x, w_up, tokens, tile=up, top_k=3),
        "out": lambda: up_swiglu(x, w_up, tokens, tile=up, top_k=2, out=torch.zeros(3, 3)),
        "no scales": lambda: up_swiglu(
            torch.zeros(37, 128, dtype=e4m3), torch.zeros(5, 256, 128, dtype=e4m3), tokens, tile=wide, top_k=2
        ),
        "scale shape": lambda: up_swiglu(
            torch.zeros(37, 128, dtype=e4m3), torch.zeros(5, 256, 128, dtype=e4m3), tokens, tile=wide, top_k=2,
            x_scale=torch.ones(37, 1), w_scale=torch.ones(5, 2, 2),
        ),
        "rows of h": lambda: down_combine(h[:-1], w_down, tokens, weights, tile=down),
        "router strides": lambda: down_combine(h, w_down, tokens, weights.T.contiguous().T, tile=down),
        "pairs": lambda: combine(torch.zeros(12, 8), tokens, top_k=2),
        "width": lambda: quantise_rows(x),
        "token type": lambda: moe_ffn(x.float(), w_up, w_down, ids, weights, n_experts=5),
        "weight type": lambda: moe_ffn(x, w_up.float(), w_down, ids, weights, n_experts=5),
        "ids": lambda: moe_ffn(x, w_up, w_down, ids[:-1], weights, n_experts=5),
        "router weights": lambda: moe_ffn(x, w_up, w_down, ids, weights[:, :1], n_experts=5),
        "weights": lambda: moe_ffn(x, w_up, w_up, ids, weights, n_experts=5),
        "heights": lambda: moe_ffn(x, w_up, w_down, ids, weights, n_experts=5, tiles=(up, Tile(32, 128, 64, 1, 4, 3))),
    }  # fmt: skip
    try:
        calls[name]()
    except KernelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("types", "both bfloat16, float16"),
        ("depth", r"x is \[rows, K\]"),
        ("strides", "contiguous"),
        ("alignment", "multiples of 16"),
        ("height", "sorted with the tile's block_m"),
        ("top_k", r"T \* top_k"),
        ("out", "out is contiguous"),
        ("no scales", "fp8 needs x_scale; fix: quantise_rows"),
        ("scale shape", "w_scale is contiguous float32"),
        ("rows of h", "one row for each sorted place"),
        ("router strides", "router_weights .* contiguous"),
        ("pairs", "the T \\* top_k pairs that were sorted"),
        ("width", "multiple of 128"),
        ("token type", "tokens are bfloat16 or float16"),
        ("weight type", "weights are bfloat16, float16 or float8_e4m3fn"),
        ("ids", r"expert_ids is \[T, top_k\]"),
        ("router weights", "shape of expert_ids"),
        ("weights", r"w_down \[slots, H, I\]"),
        ("heights", "walk the same blocks"),
    ],
)
def test_refused(interpreter: Interpreter, name: str, said: str) -> None:
    message = interpreter(refusal, name)
    assert len(message.splitlines()) == 1
    assert re.search(said, message), message


# ---------------------------------------------------------------- choice of tiles


@pytest.mark.parametrize(
    ("rows", "height"), [(0.1, 16), (16, 16), (16.5, 32), (32, 32), (64, 64), (65, 128), (9000, 128)]
)
def test_height_holds_the_mean_rows(rows: float, height: int) -> None:
    assert block_rows(rows) == height
    assert {tile.block_m for tile in candidates(rows, 4096, 2048, "bfloat16")} == {height}


def test_a_narrower_tile_where_a_wide_one_would_pad() -> None:
    assert choose(500, 2 * 768, 2048, "bfloat16", 132).block_n == 256
    assert choose(500, 2 * 192, 2048, "bfloat16", 132).block_n == 128


def test_a_narrower_tile_where_few_experts_leave_sms_idle() -> None:
    assert choose(1, 7168, 2048, "bfloat16", 132, product="down").block_n == 128
    assert choose(1, 2048, 768, "bfloat16", 132, product="down").block_n == 64


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8_block"])
def test_every_candidate_is_a_tile_that_the_kernels_take(dtype: str) -> None:
    for rows in (1, 20, 50, 500):
        pairs = list(candidate_pairs(rows, 2048, 768, dtype))
        assert pairs[0][0] == candidates(rows, 1536, 2048, dtype, product="up")[0]
        assert choose_pair(rows, 2048, 768, dtype, 132) in pairs
        assert len(set(pairs)) == len(pairs)
        for up, down in pairs:
            assert up.block_m == down.block_m
            check_tile(up, product="up", fp8=dtype == "fp8_block")
            check_tile(down, product="down", fp8=dtype == "fp8_block")


@pytest.mark.parametrize(
    ("tile", "product", "fp8", "said"),
    [
        (Tile(48, 128, 64, 1, 4, 3), "up", False, "powers of two"),
        (Tile(512, 128, 64, 1, 4, 3), "up", False, "16 to 256"),
        (Tile(64, 64, 64, 1, 4, 3), "up", False, "at least 128"),
        (Tile(64, 32, 64, 1, 4, 3), "down", False, "at least 64"),
        (Tile(64, 256, 64, 1, 4, 3), "up", True, "block_k is 128"),
        (Tile(64, 128, 128, 1, 4, 3), "up", True, "block_n is 256"),
        (Tile(64, 256, 128, 1, 4, 3), "down", True, "at most 128"),
        (Tile(64, 128, 64, 1, 2, 3), "up", False, "4 or 8 warps"),
        (Tile(256, 256, 128, 1, 8, 4), "up", False, "524288: operands of all stages.*fewer stages"),
    ],
)
def test_a_tile_that_cannot_run_is_refused(tile: Tile, product: Any, fp8: bool, said: str) -> None:
    with pytest.raises(KernelError, match=said):
        check_tile(tile, product=product, fp8=fp8)


def test_tuning_orders_by_time_and_leaves_out_what_is_refused() -> None:
    pairs = list(candidate_pairs(1, 2048, 768, "bfloat16"))
    seconds = {pair: 1.0 / (1 + i) for i, pair in enumerate(pairs)}

    def run(pair: TilePair) -> float:
        if pair == pairs[-1]:
            raise KernelError("too large")
        return seconds[pair]

    times = tune(run, pairs, lambda call: float(str(call())))
    assert list(times) == pairs[-2::-1]
    assert times[pairs[0]] == 1.0
    with pytest.raises(KernelError, match="too large"):
        tune(run, pairs[-1:], lambda call: float(str(call())))
    with pytest.raises(KernelError, match="needs candidates"):
        tune(run, [], lambda call: 1.0)


def test_a_tile_is_recorded_in_a_few_letters() -> None:
    assert str(Tile(16, 128, 64, 4, 4, 3, 2)) == "16x128x64 g4 w4 s3 p2"


def test_formats_and_shapes_without_a_tile_are_refused() -> None:
    with pytest.raises(KernelError, match="int8"):
        candidates(1, 128, 128, "int8")
    with pytest.raises(KernelError, match="multiples of 128"):
        choose(1, 192, 128, "fp8_block", 132)
