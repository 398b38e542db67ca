"""Buffers of one point and the call that is timed, with a check of what arrived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from calibrate.collectives.groups import Group
from calibrate.collectives.points import Point
from moesim.errors import MeasurementError

__all__ = ["Call", "Payload", "payload_of"]

Call = Callable[[], None]
_WORDS = 251
"""Values in a pattern: whole numbers that every payload format holds exactly."""
_NOTHING_YET = 255.0
"""What a buffer holds before anything arrives."""
_ADDING = 128
"""Ranks that add one in a sum: every format holds the result, in whatever order it is added."""


@dataclass(frozen=True)
class Payload:
    """One collective, ready to be called again and again."""

    call: Call
    """Start it, and wait for it where the backend is the host's."""
    is_right: Callable[[], bool]
    """Whether the first call delivered what it should."""
    settle: Call
    """Make the buffers fit for repetition: sums of sums would leave the format's range."""

    def check(self, what: str) -> None:
        """Call once and compare; MeasurementError if anything else arrived."""
        self.call()
        right = self.is_right()
        self.settle()
        if not right:
            raise MeasurementError(
                f"{what} delivered other data than was sent", fix="do not use these figures"
            )


def payload_of(
    point: Point,
    group: Group,
    rank: int,
    *,
    dist: Any,
    torch: Any,
    process_group: Any,
    dtype: Any,
    device: str,
) -> Payload:
    """Buffers and call of a point on one of its ranks.

    Parameters
    ----------
    point, group
        What, and between whom.
    rank
        This rank, of the whole job.
    dist, torch, process_group
        torch.distributed, torch, and the group's handle.
    dtype, device
        Of the elements, and where they lie.
    """
    me, n = group.ranks.index(rank), group.size

    def filled(size: int, value: float) -> Any:
        return torch.full((size,), value, dtype=dtype, device=device)

    def same(buffer: Any, value: float) -> bool:
        return bool((buffer == value).all())

    options = {"group": process_group}
    if point.op == "send_recv":
        return _ping_pong(point, group, me, dist, filled, same, options)
    if point.op == "all_to_all":
        return _all_to_all(point, me, n, dist, torch, filled, same, options)
    if point.op == "broadcast":
        buffer = filled(point.elements, 3.0 if me == 0 else 0.0)
        return Payload(
            lambda: dist.broadcast(buffer, src=group.ranks[0], **options), lambda: same(buffer, 3.0), _nothing
        )
    if point.op == "all_reduce":
        ones, total = filled(point.elements, float(me < _ADDING)), float(min(n, _ADDING))
        return Payload(lambda: dist.all_reduce(ones, **options), lambda: same(ones, total), ones.zero_)
    part = point.elements // n
    if point.op == "all_gather":
        gather = (
            getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        )  # its name before torch 2.13
        mine, all_of_them = filled(part, float(me % _WORDS)), filled(point.elements, _NOTHING_YET)
        return Payload(
            lambda: gather(all_of_them, mine, **options),
            lambda: all(same(all_of_them[s * part : (s + 1) * part], float(s % _WORDS)) for s in range(n)),
            _nothing,
        )
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    whole, sums = filled(point.elements, 0.0), filled(part, -1.0)
    for d in range(n):
        whole[d * part : (d + 1) * part] = float(me < _ADDING and d % 2)
    return Payload(
        lambda: scatter(sums, whole, **options),
        lambda: same(sums, float(min(n, _ADDING) * (me % 2))),
        whole.zero_,
    )


def _nothing() -> None:
    pass


def _ping_pong(
    point: Point, group: Group, me: int, dist: Any, filled: Any, same: Any, options: dict[str, Any]
) -> Payload:
    mine, theirs = filled(point.elements, float(5 + me)), filled(point.elements, 0.0)
    peer = group.ranks[1 - me]

    def call() -> None:
        if me == 0:
            dist.send(mine, dst=peer, **options)
            dist.recv(theirs, src=peer, **options)
        else:
            dist.recv(theirs, src=peer, **options)
            dist.send(mine, dst=peer, **options)

    return Payload(call, lambda: same(theirs, float(6 - me)), _nothing)


def _all_to_all(
    point: Point, me: int, n: int, dist: Any, torch: Any, filled: Any, same: Any, options: dict[str, Any]
) -> Payload:
    even = point.elements // n
    sent = list(point.matrix[me]) if point.matrix else [even] * n
    received = [row[me] for row in point.matrix] if point.matrix else [even] * n
    outgoing, incoming = filled(sum(sent), 0.0), filled(sum(received), _NOTHING_YET)
    for d, part in enumerate(torch.split(outgoing, sent)):
        part.fill_(float((me * n + d) % _WORDS))
    ends = list(accumulate(received))

    def is_right() -> bool:
        starts = [0, *ends[:-1]]
        return all(
            same(incoming[low:high], float((s * n + me) % _WORDS))
            for s, (low, high) in enumerate(zip(starts, ends, strict=True))
        )

    def call() -> None:
        if point.matrix:
            dist.all_to_all_single(incoming, outgoing, received, sent, **options)
        else:
            dist.all_to_all_single(incoming, outgoing, **options)

    return Payload(call, is_right, _nothing)
