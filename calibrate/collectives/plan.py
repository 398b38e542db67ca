"""What is measured, and in which order: pairs, then coarse steps of size, so that a short budget spans them all."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from calibrate.collectives.groups import Group
from calibrate.collectives.points import Point
from calibrate.collectives.splits import as_equal_elements, split_elements

__all__ = ["is_held_out", "plan_points"]

_HELD_OUT_SHARE = 0.2
_SALT = "moesim held-out messages 899"
"""Chosen, before anything was measured, so that of the powers of two about a fifth falls out, none beside another:
16 and 128 KiB, 2, 16 and 256 MiB."""
_FEWEST_SIZES = 5
"""Of fewer sizes none is held out: a fit would have too few."""


def is_held_out(size: int) -> bool:
    """Whether no fit may see a message size: by a hash, so the same in every run and on every machine."""
    digest = hashlib.sha256(f"{_SALT}:{size}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < _HELD_OUT_SHARE


def plan_points(
    ops: Sequence[str],
    groups: Sequence[Group],
    pairs: Sequence[Group],
    sizes: Sequence[int],
    *,
    item_bytes: int,
    largest_bytes: Mapping[str, float],
    shares: Mapping[int, NDArray[np.float64]],
    seed: int,
) -> list[Point]:
    """Every point of a run, most informative first.

    Parameters
    ----------
    ops
        Out of `OPS`.
    groups, pairs
        Ranks of collectives, and of `send_recv`.
    sizes
        Wanted message sizes [bytes]; each is rounded to what divides over the group's ranks.
    item_bytes
        Bytes of an element.
    largest_bytes
        Message that the memory of every rank carries, by operator [bytes].
    shares
        Of an uneven all-to-all, by number of ranks, as `moesim.routing` draws them; empty for none.
    seed
        Of the order within one step of sizes.
    """
    rng = np.random.default_rng([seed, 2])
    enough = len(sizes) >= _FEWEST_SIZES
    found: dict[Point, None] = {}

    def add(size: int, wanted: Sequence[str], among: Sequence[Group]) -> None:
        step = [
            point
            for op in wanted
            if size <= largest_bytes[op]
            for index, group in enumerate(among)
            for point in _points(op, index, group, size, item_bytes, shares, enough and is_held_out(size))
        ]
        found.update(dict.fromkeys(step[i] for i in rng.permutation(len(step))))

    # Pairs first: the efficiency of every collective is a share of their rate, and they tell how long others take.
    for size in _coarse_first(sizes):
        add(size, [op for op in ops if op == "send_recv"], pairs)
    for size in dict.fromkeys([sizes[0], sizes[-1], *_coarse_first(sizes)]):
        add(size, [op for op in ops if op != "send_recv"], groups)
    return list(found)


def _points(
    op: str,
    index: int,
    group: Group,
    size: int,
    item_bytes: int,
    shares: Mapping[int, NDArray[np.float64]],
    held: bool,
) -> list[Point]:
    unit = 1 if op in ("send_recv", "broadcast", "all_reduce") else group.size
    elements = max(1, round(size / item_bytes / unit)) * unit
    points = [Point(op, index, elements, elements, "equal", held_out=held)]
    if op == "all_to_all" and group.size in shares:
        matrix = split_elements(shares[group.size], elements)
        if (matrix - np.diag(np.diag(matrix))).any():
            rows = tuple(tuple(row) for row in matrix.tolist())
            points.append(Point(op, index, elements, as_equal_elements(matrix), "trace", rows, held))
    return points


def _coarse_first(sizes: Sequence[int]) -> list[int]:
    """Smallest, middle, largest, then the middles of what lies between, and so on."""
    n = len(sizes)
    order: list[int] = [0, n // 2, n - 1]
    gaps = [(0, n // 2), (n // 2, n - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [sizes[i] for i in dict.fromkeys(order)]
