"""One point of a measurement, and what the command line says of points."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import MeasurementError, UnitError
from moesim.units import parse_bytes

__all__ = ["DTYPE_BYTES", "OPS", "Point", "parse_sizes"]

OPS = ("send_recv", "all_to_all", "all_reduce", "all_gather", "reduce_scatter", "broadcast")
"""Collectives by the names of the measured tables; `send_recv` is a ping-pong between two ranks."""
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}
"""Payload formats; NCCL and gloo add all of them."""


@dataclass(frozen=True)
class Point:
    """One row to be."""

    op: str
    group: int
    """Index of the group, or for `send_recv` of the pair, among those of the job."""
    elements: int
    """Of the buffer that nccl-tests counts; of one rank's send buffer where the split is uneven."""
    message_elements: int
    """As the table says it: `elements`, or the equal split with ports as busy."""
    split: str
    """``equal`` or ``trace``."""
    matrix: tuple[tuple[int, ...], ...] = ()
    """[source][destination] elements of an uneven all-to-all."""
    held_out: bool = False
    """Whether fits leave it out."""


def parse_sizes(text: str) -> list[int]:
    """Message sizes of ``"1KiB..1GiB"`` in powers of two, or of ``"1KiB,64KiB,1MiB"`` [bytes].

    Raises
    ------
    MeasurementError
        If the text says something else, or a size below one byte.
    """
    ends = [part.strip() for part in text.split("..")]
    words = ends if len(ends) == 2 else text.split(",")
    if len(ends) > 2 or not all(word.strip() for word in words):
        fix = "write 1KiB..1GiB, or sizes with commas between"
        raise MeasurementError("is no range of sizes", value=text, fix=fix, place="--sizes")
    try:
        sizes = [int(parse_bytes(word)) for word in words]
    except UnitError as error:
        fix = "write 1KiB..1GiB, or sizes with commas between"
        raise UnitError(error.rule, value=text, fix=fix, place="--sizes") from None
    if min(sizes) < 1 or (len(ends) == 2 and sizes[0] > sizes[1]):
        raise MeasurementError("sizes ascend from one byte", value=text, place="--sizes")
    if len(ends) < 2:
        return sorted(set(sizes))
    low, high = sizes
    return [size for size in (low * 2**k for k in range(64)) if size <= high]
