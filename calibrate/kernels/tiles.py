"""Tile shapes of the grouped products, by rows an expert.

The height follows the mean rows an expert receives: the power of two between 16 and 128 that holds them, which
is the rule that the cost model knows. The rest is a short list a height. Its first entry is the default; the
others are what `candidates` offers to a device that can time them.

What decides, on an H200: 4.8 TB/s over 132 SMs with a latency near 1 us is 36 KB that an SM must have in flight
at all times (Little's law). Tiles of 16 to 64 rows therefore keep 110 KB or more in flight, with two to five
programs an SM; tiles of 128 rows are bound by arithmetic and take the largest instruction (64 x 256), eight
warps and one program.

Compiler figures of every entry are in docs/kernels.md; a test compiles them all and fails where one spills,
overflows or does not stay resident `programs_per_sm` times. No entry has been timed on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from calibrate.kernels import KernelError

__all__ = [
    "SCALE_GROUP",
    "Product",
    "Tile",
    "TilePair",
    "block_rows",
    "candidate_pairs",
    "candidates",
    "check_tile",
    "choose",
    "choose_pair",
    "tune",
]

Product = Literal["up", "down"]
SCALE_GROUP = 128
"""Elements along K that share a scale in fp8, and rows of a weight."""
MAX_SHARED_BYTES = 232_448
"""Most shared memory of a block on sm_90 (CUDA C++ Programming Guide, table of compute capabilities)."""
_HEIGHTS = (16, 32, 64, 128)
_WASTE = 1.125
"""Padded columns over real ones from which a narrower tile is taken."""
_FEW_EXPERTS = 8
"""Experts that a decode step of one token activates, about."""


@dataclass(frozen=True)
class Tile:
    """Shape and launch options of one grouped product."""

    block_m: int
    """Rows (pairs of one expert)."""
    block_n: int
    """Rows of the weight; for `up_swiglu` half are gate rows, so it yields half as many columns."""
    block_k: int
    """Depth of one step."""
    group_m: int
    """Blocks of rows that share a column of weights before the next column."""
    num_warps: int
    num_stages: int
    """Steps whose operands are in shared memory at once."""
    programs_per_sm: int = 1
    """Programs that an SM holds at once; the persistent grid has that many."""

    def __str__(self) -> str:
        """Short enough to record beside a measurement: ``16x128x64 g4 w4 s4 p3``."""
        sides = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{sides} g{self.group_m} w{self.num_warps} s{self.num_stages} p{self.programs_per_sm}"

    @property
    def transposed(self) -> bool:
        """Whether the weight takes the rows of the matrix instruction, which has 64."""
        return self.block_m < 64


TilePair = tuple[Tile, Tile]
"""Tiles of both products; one height, since both walk the same blocks."""


# (block_n, block_k, num_warps, num_stages, programs_per_sm), the default first
_Entry = tuple[int, int, int, int, int]
_UP_16BIT: dict[int, tuple[_Entry, ...]] = {
    16: ((128, 64, 4, 4, 3), (128, 128, 4, 3, 2), (256, 64, 4, 3, 2)),
    32: ((128, 64, 4, 5, 2), (256, 64, 4, 5, 1)),
    64: ((128, 64, 4, 4, 2), (256, 64, 4, 4, 1)),
    128: ((256, 64, 8, 4, 1), (256, 64, 8, 3, 1), (128, 64, 8, 3, 2)),
}
_DOWN_16BIT: dict[int, tuple[_Entry, ...]] = {
    16: ((128, 64, 4, 4, 3), (64, 64, 4, 4, 5), (128, 128, 4, 3, 2)),
    32: ((128, 64, 4, 5, 2), (64, 64, 4, 4, 4), (256, 64, 4, 3, 2)),
    64: ((128, 64, 4, 4, 2), (256, 64, 4, 4, 1)),
    128: ((256, 64, 8, 4, 1), (256, 64, 8, 3, 1), (128, 64, 4, 3, 2)),
}
_UP_FP8: dict[int, tuple[_Entry, ...]] = {
    16: ((256, 128, 4, 3, 2), (256, 128, 8, 3, 2)),
    32: ((256, 128, 4, 3, 2), (256, 128, 8, 5, 1)),
    64: ((256, 128, 8, 4, 1), (256, 128, 8, 3, 1)),
    128: ((256, 128, 8, 4, 1), (256, 128, 8, 3, 1)),
}
_DOWN_FP8: dict[int, tuple[_Entry, ...]] = {
    16: ((128, 128, 4, 4, 3), (64, 128, 4, 4, 5)),
    32: ((128, 128, 4, 5, 2), (64, 128, 4, 4, 4)),
    64: ((128, 128, 4, 4, 2), (128, 128, 8, 4, 2)),
    128: ((128, 128, 8, 4, 1), (64, 128, 8, 4, 2)),
}
_TABLES = {
    ("up", False): _UP_16BIT,
    ("down", False): _DOWN_16BIT,
    ("up", True): _UP_FP8,
    ("down", True): _DOWN_FP8,
}


def block_rows(rows_per_expert: float) -> int:
    """Height of a tile: the power of two that holds the mean rows of an expert, 16 to 128.

    Examples
    --------
    >>> [block_rows(rows) for rows in (0.2, 16, 17, 100, 5000)]
    [16, 16, 32, 128, 128]
    """
    return next((height for height in _HEIGHTS if rows_per_expert <= height), _HEIGHTS[-1])


def candidates(rows_per_expert: float, n: int, k: int, dtype: str, *, product: Product = "up") -> list[Tile]:
    """Tiles of one height worth timing, the default first.

    Parameters
    ----------
    rows_per_expert
        Mean pairs an expert: ``T * top_k / n_experts``.
    n, k
        Rows and depth of one expert's weight: (2 I, H) for ``up``, (H, I) for ``down``.
    dtype
        ``bfloat16``, ``float16`` or ``fp8_block``.
    product
        Which of the two.

    Returns
    -------
    list of Tile
        All that the shape allows; `choose` picks among the same.

    Raises
    ------
    KernelError
        If the format is unknown or the shape has no tile.
    """
    fp8 = _is_fp8(dtype)
    if n < 1 or k < 1 or (fp8 and (n % SCALE_GROUP or k % SCALE_GROUP)):
        multiple = SCALE_GROUP if fp8 else 1
        raise KernelError(f"n and k are positive multiples of {multiple} in {dtype}", value=(n, k))
    height = block_rows(rows_per_expert)
    group_m = 8 if height == 128 else 4
    return [
        Tile(height, block_n, block_k, group_m, warps, stages, programs)
        for block_n, block_k, warps, stages, programs in _TABLES[product, fp8][height]
    ]


def choose(
    rows_per_expert: float, n: int, k: int, dtype: str, n_sms: int, *, product: Product = "up"
) -> Tile:
    """Take the default tile, or a narrower one where it would pad many columns or leave SMs without a tile.

    The first of `candidates` whose columns pad `n` by at most an eighth and, at 16 rows, which gives every SM a
    tile when as few experts are active as one token chooses; the narrowest where none does.
    """
    offered = candidates(rows_per_expert, n, k, dtype, product=product)
    for tile in offered:
        columns = -(-n // tile.block_n)
        enough = tile.block_m > _HEIGHTS[0] or columns * _FEW_EXPERTS >= n_sms
        if enough and columns * tile.block_n <= _WASTE * n:
            return tile
    return min(offered, key=lambda tile: (tile.block_n, tile.block_k))


def choose_pair(rows_per_expert: float, hidden: int, inner: int, dtype: str, n_sms: int) -> TilePair:
    """Tiles of both products of an expert with weights [2 I, H] and [H, I]."""
    return (
        choose(rows_per_expert, 2 * inner, hidden, dtype, n_sms, product="up"),
        choose(rows_per_expert, hidden, inner, dtype, n_sms, product="down"),
    )


def candidate_pairs(rows_per_expert: float, hidden: int, inner: int, dtype: str) -> Iterator[TilePair]:
    """Pairs to time on a device: every pair of the rule's height, then the defaults one height below and above."""
    height = block_rows(rows_per_expert)
    yield from _pairs(height, hidden, inner, dtype)
    for other in (height // 2, height * 2):
        if other in _HEIGHTS:
            yield next(_pairs(other, hidden, inner, dtype))


def _pairs(height: int, hidden: int, inner: int, dtype: str) -> Iterator[TilePair]:
    for up in candidates(height, 2 * inner, hidden, dtype, product="up"):
        for down in candidates(height, hidden, inner, dtype, product="down"):
            yield up, down


def tune(
    run: Callable[[TilePair], object],
    pairs: Iterable[TilePair],
    time_s: Callable[[Callable[[], object]], float],
) -> dict[TilePair, float]:
    """Time each pair of tiles on the device at hand.

    Parameters
    ----------
    run
        Makes the call with given tiles, as `fused.moe_ffn` does.
    pairs
        What `candidate_pairs` offers.
    time_s
        Times a call without arguments [s].

    Returns
    -------
    dict
        Seconds of each pair, the fastest first. Pairs that this GPU refuses, for want of shared memory say, are
        left out.

    Raises
    ------
    KernelError
        If the GPU refuses them all.
    """
    times: dict[TilePair, float] = {}
    refused: KernelError | None = None
    for pair in pairs:
        try:
            times[pair] = time_s(partial(run, pair))
        except KernelError as error:
            refused = error
    if not times:
        raise refused or KernelError("tuning needs candidates", value=[])
    return dict(sorted(times.items(), key=lambda item: item[1]))


def check_tile(tile: Tile, *, product: Product, fp8: bool) -> None:
    """Refuse a tile that the kernels cannot run.

    Raises
    ------
    KernelError
        If a side is no power of two, out of the kernels' range, or the operands overflow shared memory.
    """
    sides = (tile.block_m, tile.block_n, tile.block_k)
    if any(side < 16 or side & (side - 1) for side in sides) or max(tile.block_m, tile.block_n) > 256:
        raise KernelError("sides of a tile are powers of two, 16 to 256", value=tile)
    narrowest = 128 if product == "up" else 64
    if tile.block_n < narrowest:
        raise KernelError(f"block_n of {product} is at least {narrowest}", value=tile.block_n)
    if fp8 and tile.block_k != SCALE_GROUP:
        raise KernelError("fp8 has one scale a step, so block_k is 128", value=tile.block_k)
    if fp8 and (tile.block_n != 2 * SCALE_GROUP if product == "up" else tile.block_n > SCALE_GROUP):
        wanted = "block_n is 256, one group of the result" if product == "up" else "block_n is at most 128"
        raise KernelError(f"fp8 has one scale a tile of the weight: {wanted}", value=tile.block_n)
    if tile.num_warps not in (4, 8) or tile.num_stages < 1 or tile.group_m < 1 or tile.programs_per_sm < 1:
        raise KernelError("a tile has 4 or 8 warps, and at least one stage, group and program", value=tile)
    held = tile.num_stages * (tile.block_m + tile.block_n) * tile.block_k * (1 if fp8 else 2)
    if held > MAX_SHARED_BYTES:
        raise KernelError(
            f"operands of all stages take at most {MAX_SHARED_BYTES} bytes", value=held, fix="fewer stages"
        )


def _is_fp8(dtype: str) -> bool:
    if dtype not in ("bfloat16", "float16", "fp8_block"):
        raise KernelError("the kernels take bfloat16, float16 and fp8_block", value=dtype)
    return dtype == "fp8_block"
