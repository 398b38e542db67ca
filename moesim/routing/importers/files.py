"""Reading other programs' files without trusting them: bounded JSON, mapped safetensors, streamed npy."""

from __future__ import annotations

import json
import struct
import tokenize
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.importers.incoming import refuse

__all__ = [
    "DAMAGE",
    "Bfloat16",
    "Entry",
    "LazyRows",
    "NpyStream",
    "Rows",
    "json_lines",
    "json_whole",
    "map_npy",
    "map_safetensors",
    "reading",
    "rows_at_once",
    "safetensors_entries",
    "whole_numbers",
]

_LARGEST_JSON_BYTES = 256 * 10**6
"""Parsed whole, a file takes some ten times its size in memory."""

_BLOCK_VALUES = 2**21
"""Numbers that an importer holds at once [count]."""

DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError, struct.error, tokenize.TokenError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What readers of NumPy, JSON and zip raise on damaged bytes."""

_DTYPES = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
}  # fmt: skip


class LazyRows(ABC):
    """An array whose rows come into being where they are taken."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Take rows."""

    @abstractmethod
    def reshape(self, *shape: int) -> LazyRows:
        """Return the same numbers in another shape; the first axis may be -1."""


class Bfloat16(LazyRows):
    """Rows of bfloat16, which NumPy lacks, widened to float32 where they are taken.

    Parameters
    ----------
    bits
        The numbers' upper halves, as uint16.
    """

    def __init__(self, bits: NDArray[np.uint16]) -> None:
        self.bits = bits
        self.shape = bits.shape
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        """Take rows as float32."""
        wide = self.bits[rows].astype(np.uint32) << 16
        numbers: NDArray[np.float32] = wide.view(np.float32)
        return numbers

    def reshape(self, *shape: int) -> Bfloat16:
        """Return the same numbers in another shape."""
        return Bfloat16(self.bits.reshape(*shape))


Rows = NDArray[Any] | LazyRows
"""Rows of a file: mapped, or lazy."""


@contextmanager
def reading(place: object, rule: str, *, fix: str | None = None) -> Iterator[None]:
    """Turn what damaged bytes make a reader raise into one line."""
    try:
        yield
    except DAMAGE as error:
        said = (str(error).splitlines() or [""])[0]
        raise refuse(place, rule, value=said or type(error).__name__, fix=fix) from None


def rows_at_once(row_values: int) -> int:
    """Rows of so many numbers that one block holds."""
    return max(1, _BLOCK_VALUES // max(1, row_values))


def whole_numbers(value: Any, place: object, n: int | None = None) -> NDArray[np.int64]:
    """Read a list, or an array, of whole numbers of 64 bits.

    Raises
    ------
    TraceError
        If it holds anything else, or not `n` of them.
    """
    with reading(place, "are whole numbers"):
        array = np.asarray(value)
        if array.dtype.kind not in "ui" and array.size:
            raise ValueError(f"{array.dtype} {array.shape}")
        array = array.astype(np.int64)
    if n is not None and array.shape != (n,):
        raise refuse(place, f"are {n} whole numbers", value=array.shape)
    return array


def json_whole(path: Path) -> Any:
    """Parse a JSON file of bounded size.

    Raises
    ------
    TraceError
        If it is larger, or not JSON.
    """
    size = path.stat().st_size
    if size > _LARGEST_JSON_BYTES:
        raise refuse(
            path,
            f"a JSON file has at most {_LARGEST_JSON_BYTES // 10**6} MB, since it is parsed whole",
            value=size,
            fix="sum its steps up, as SGLang's `stat` mode does, or write one response a line (.jsonl)",
        )
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise refuse(path, "is not JSON") from None


def json_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of each line; a last line that was cut off is noted.

    Raises
    ------
    TraceError
        At a line that is longer than a JSON file may be, or is no JSON object.
    """
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(_LARGEST_JSON_BYTES):
            number += 1
            if not line.strip():
                continue
            try:
                one = json.loads(line)
            except (ValueError, RecursionError):
                if not line.endswith(b"\n") and len(line) < _LARGEST_JSON_BYTES and number > 1:
                    notes.append(f"warning: line {number} of {path.name} is cut off and left out")
                    return
                raise refuse(f"{path}:{number}", "each line is one JSON object") from None
            if not isinstance(one, dict):
                raise refuse(f"{path}:{number}", "each line is one JSON object")
            yield number, one


class NpyStream:
    """One .npy read from front to back, from a file or out of a zip, without its being held.

    Parameters
    ----------
    stream
        Open at the magic number.
    place
        For messages.
    """

    def __init__(self, stream: IO[bytes], place: str) -> None:
        self._stream, self._place = stream, place
        with reading(place, "is an .npy array (nothing is unpickled)"):
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(stream)
            if dtype.hasobject or dtype.kind not in "buif" or fortran or min(shape, default=0) < 0:
                raise ValueError(f"{dtype} {shape}{' in Fortran order' if fortran else ''}")
        self.shape: tuple[int, ...] = tuple(int(n) for n in shape)
        self.dtype = dtype

    def take(self, rows: int, row: tuple[int, ...] | None = None) -> NDArray[Any]:
        """Read the next `rows` along the first axis, or as many of another shape."""
        shape = (rows, *(self.shape[1:] if row is None else row))
        n_bytes = int(np.prod(shape, dtype=object)) * self.dtype.itemsize
        parts = []
        while n_bytes:
            with reading(self._place, "is a whole array"):
                part = self._stream.read(min(n_bytes, 2**24))
            if not part:
                raise refuse(self._place, "is truncated: bytes are missing", value=n_bytes)
            parts.append(part)
            n_bytes -= len(part)
        return np.frombuffer(b"".join(parts), self.dtype).reshape(shape)


def map_npy(path: Path) -> NDArray[Any]:
    """Map an .npy file without reading its data.

    Raises
    ------
    TraceError
        If it is no whole array of numbers.
    """
    with path.open("rb") as stream:
        head = NpyStream(stream, str(path))
        begin = stream.tell()
    needed = int(np.prod(head.shape, dtype=object)) * head.dtype.itemsize
    if begin + needed > path.stat().st_size:
        rule = f"is truncated: {begin + needed - path.stat().st_size} bytes are missing"
        raise refuse(path, rule, fix="copy it again")
    if not needed:
        raise refuse(path, "holds at least one number", value=head.shape)
    return np.memmap(path, dtype=head.dtype, mode="r", offset=begin, shape=head.shape)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor of a safetensors file stands.

    Parameters
    ----------
    dtype, shape
        As the header names them.
    begin, end
        Of its bytes, from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    def mapped(self, data: NDArray[np.uint8]) -> Rows:
        """Give the tensor as a view of the file's mapped bytes."""
        array: NDArray[Any] = np.asarray(data[self.begin : self.end]).view(_DTYPES[self.dtype])
        shaped = array.reshape(self.shape)
        return Bfloat16(shaped) if self.dtype == "BF16" else shaped


def map_safetensors(path: Path) -> dict[str, Rows]:
    """Map every tensor of a safetensors file without reading their data.

    Raises
    ------
    TraceError
        If the file is truncated, or its header breaks a rule of the format.
    """
    entries, data = safetensors_entries(path)
    return {name: entry.mapped(data) for name, entry in entries.items()}


def safetensors_entries(path: Path) -> tuple[dict[str, Entry], NDArray[np.uint8]]:
    """Read a safetensors header: where each tensor stands, and the mapped bytes that it stands in.

    Raises
    ------
    TraceError
        If the file is truncated, or its header breaks a rule of the format.
    """
    size = path.stat().st_size
    rule = "is not a whole safetensors file"
    with path.open("rb") as stream, reading(path, rule, fix="copy or write it again"):
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {str(name): _entry(info, size - 8 - length) for name, info in header.items()}
    # one mapping for all: a system grants a process some 65,000, and a recording can have more tensors
    return entries, np.memmap(path, dtype=np.uint8, mode="r")[8 + length :]


def _entry(info: dict[str, Any], data_bytes: int) -> Entry:
    shape = tuple(int(n) for n in info["shape"])
    begin, end = (int(n) for n in info["data_offsets"])
    dtype = str(info["dtype"])
    needed = int(np.prod(shape, dtype=object)) * np.dtype(_DTYPES[dtype]).itemsize
    if min(shape, default=0) < 0 or not 0 <= begin <= end or end - begin != needed:
        raise ValueError(f"a tensor of {needed} bytes at {begin}..{end}")
    if end > data_bytes:
        raise ValueError(f"truncated: {end - data_bytes} bytes are missing")
    return Entry(dtype, shape, begin, end)
