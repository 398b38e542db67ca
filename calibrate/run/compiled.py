"""Which Triton kernels a point is the first to need: each is compiled once, which takes longer than timing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from calibrate.kernels.latent_parts import parts_for
from calibrate.kernels.tiles import choose_pair
from calibrate.run.design import Candidate
from calibrate.run.points import Point
from moesim.hardware.gpu import Gpu

__all__ = ["COMPILE_S", "START_S", "all_kernels", "compiling_s", "kernels_of", "with_compiling"]

COMPILE_S = 1.0
"""One kernel's compilation, on one core: assumed; for sm_90 on a busy core of a server 62 of them took 0.7 s each."""
START_S = 10.0
"""Processes that compile ahead: their start, imports, and following all points to their launches; likewise."""
_ONE_PROGRAM = 2048
"""Pairs that one program sorts; more take three kernels."""
_CHUNK = 1024
"""Pairs of one program where there are more."""

Kernel = tuple[Any, ...]
"""Name and what it is compiled for."""


def with_compiling(
    planned: Sequence[Candidate], gpu: Gpu, *, jobs: int = 1, compiled: Iterable[Kernel] = ()
) -> list[Candidate]:
    """Add to each point the time of the kernels that it is the first of the list to need.

    Parameters
    ----------
    planned, gpu
        Points without it, in order, and what they run on.
    jobs
        Processes that compile ahead, if more than one; the first kernel has their start.
    compiled
        Kernels that are there.
    """
    seen: set[Kernel] = set(compiled)
    found, n_new = [], 0
    for one in planned:
        new = kernels_of(one.point, gpu) - seen
        seen |= new
        before_s = compiling_s(n_new, jobs)
        n_new += len(new)
        found.append(replace(one, seconds=one.seconds + compiling_s(n_new, jobs) - before_s))
    return found


def compiling_s(n_kernels: int, jobs: int) -> float:
    """Time that compiling takes: as kernels are met, or ahead of all points on several processes [s]."""
    if jobs < 2 or not n_kernels:
        return COMPILE_S * n_kernels
    return START_S + COMPILE_S * n_kernels / jobs


def all_kernels(planned: Iterable[Candidate], gpu: Gpu) -> frozenset[Kernel]:
    """Triton kernels of several points."""
    return frozenset().union(*(kernels_of(one.point, gpu) for one in planned))


def kernels_of(point: Point, gpu: Gpu) -> frozenset[Kernel]:
    """Triton kernels of a point, told apart by tile and shape class; none of torch's own, which are compiled already.

    Notes
    -----
    Triton makes further variants by the divisibility of integers; shapes here are multiples of 16 but for few tokens.
    """
    make = _KERNELS.get(str(point.columns["implementation"]))
    return frozenset(make(point, gpu)) if make else frozenset()


def _experts(point: Point, gpu: Gpu) -> set[Kernel]:
    if point.kind == "router":
        return _router(point)
    if point.kind == "attention":
        return _latent(point, gpu)
    hidden, inner, rows, n_local = _sizes(point)
    dtype = str(point.columns["dtype"])
    fp8 = dtype == "fp8_block"
    up, down = choose_pair(rows, hidden, inner, dtype, gpu.n_sms)
    products: set[Kernel] = {
        ("up", up, hidden % up.block_k == 0, fp8),
        ("down", down, hidden % down.block_n == 0, fp8),
        ("combine", point.columns["top_k"]),
    }
    sort = _sort(point, up.block_m, n_local)
    if point.columns["op"] == "moe_permute":
        return sort
    return sort | products | ({("quantise", min(hidden, 1024))} if fp8 else set())


def _sort(point: Point, block_m: int, n_local: int) -> set[Kernel]:
    n_pairs = int(point.columns["n_tokens"]) * int(point.columns["top_k"])
    slots = max(64, 1 << n_local.bit_length())
    fixed = (n_local < int(point.columns["n_experts"]), slots, block_m)
    if n_pairs <= _ONE_PROGRAM:
        return {("sort", _power_of_4(n_pairs), *fixed)}
    return {("count", *fixed), ("scan", min(256, _power_of_4(-(-n_pairs // _CHUNK)))), ("scatter", *fixed)}


def _padded(point: Point, gpu: Gpu) -> set[Kernel]:
    """Places of pairs, two batched products by size class, a copy before and a sum after them."""
    hidden, inner, rows, n_local = _sizes(point)
    size, top_k = _class(rows), point.columns["top_k"]
    columns = {64: 64, 128: 128}.get(size, 64)
    return _sort(point, 1, n_local) | {
        ("capacity", 1 << (n_local - 1).bit_length()), ("gather", top_k), ("unpermute", top_k),
        ("batched up", size, inner // columns % 16 == 0), ("batched down", size, hidden // (2 * columns) % 16 == 0),
    }  # fmt: skip


def _router(point: Point) -> set[Kernel]:
    """The gate product by tile, and the choice by experts and how many are chosen."""
    at = point.columns
    tile = (_class(float(at["n_tokens"])), int(at["n_tokens"]) > 2048, _class(float(at["n_experts"])))
    return {
        ("logits", *tile),
        ("select", at["n_experts"], at["top_k"], at["scoring"], _class(float(at["n_tokens"]))),
    }


def _latent(point: Point, gpu: Gpu) -> set[Kernel]:
    """Attention by its heads, and the sum of its parts by how many there are."""
    batch, heads, context = (int(point.columns[name]) for name in ("batch", "n_heads", "n_context"))
    cut = parts_for(batch, heads, context, gpu.n_sms)
    whole = cut.n_parts == 1
    found: set[Kernel] = {("latent", cut.block_h, whole, heads % 16 == 0)}
    return found if whole else found | {("join", 1 << (cut.n_parts - 1).bit_length())}


def _sizes(point: Point) -> tuple[int, int, float, int]:
    """Hidden width, an expert's cut width, rows an expert, experts on this rank."""
    at = point.columns
    rows = float(at["n_tokens"]) * float(at["top_k"]) / float(at["n_experts"])
    return (
        int(at["hidden"]),
        int(at["intermediate"]) // int(at["tp"]),
        rows,
        int(at["n_experts"]) // int(at["ep"]),
    )


def _class(n: float) -> int:
    """Size of a tile for `n` rows: 16, 32, 64 or 128."""
    return next((size for size in (16, 32, 64) if n <= size), 128)


def _power_of_4(n: int) -> int:
    return int(max(16, 1 << 2 * (((n - 1).bit_length() + 1) >> 1)))


_KERNELS: dict[str, Callable[[Point, Gpu], set[Kernel]]] = {
    "moesim-triton": _experts,
    "moesim-padded": _padded,
}
