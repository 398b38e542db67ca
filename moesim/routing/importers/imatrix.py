"""llama.cpp's importance matrix (llama-imatrix, GGUF): tokens that each expert saw.

Layout: ``tools/imatrix/imatrix.cpp``: per weight a tensor ``{name}.in_sum2`` and one ``{name}.counts``, float32, with
one count an expert for the merged ``*_exps`` weights. GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.

Only the header and the counts are read, with bounds checked, in place of the ``gguf`` package: that one is made for
trusted files, and brings an HTTP client and a YAML parser with it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.routing.importers.files import reading
from moesim.routing.importers.incoming import Incoming, Told, refuse

__all__ = ["incoming"]

_COUNTS = re.compile(r"blk\.(\d{1,6})\.ffn_(down|up|gate|gate_up)_exps\.weight\.counts")
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _F32 = 8, 9, 0
_LARGEST_HEADER_BYTES = 64 * 10**6
_PREFERRED = ("down", "up", "gate", "gate_up")


def incoming(files: list[Path], told: Told) -> Incoming:
    """Read the counts of every MoE layer; `ffn_down_exps` where a layer has several.

    Raises
    ------
    TraceError
        If the file is no whole GGUF, or has no counts of merged experts.
    """
    if len(files) != 1:
        raise refuse(
            files[0].parent, "one importance matrix at a time", value=len(files), fix="name one file"
        )
    file = files[0]
    with file.open("rb") as stream:
        head = stream.read(_LARGEST_HEADER_BYTES)
    if head[:4] != b"GGUF":
        rule = "is a GGUF file"
        raise refuse(file, rule, value=head[:4], fix="write it with `llama-imatrix --output-format gguf`")
    with reading(file, "is not a whole GGUF file", fix="copy or write it again"):
        found = _Header(head, file.stat().st_size).counts()
    if not found:
        rule = "holds counts of merged experts (blk.N.ffn_down_exps.weight.counts)"
        raise refuse(file, rule, fix="run llama-imatrix on a MoE model, and keep its GGUF output")
    layers = sorted(found)
    counts = [_read(file, layer, found[layer]) for layer in layers]
    sizes = sorted({len(one) for one in counts})
    if len(sizes) > 1:
        raise refuse(file, "every layer has as many experts", value=sizes)
    kept = [number for number, one in enumerate(counts) if one.any()]
    if not kept:
        raise refuse(file, "at least one layer has tokens")
    notes = [] if len(kept) == len(layers) else [f"{len(layers) - len(kept)} layers without counts dropped"]
    return Incoming(
        place=str(file),
        source=f"{file.name} (llama.cpp importance matrix)",
        layer_ids=tuple(layers[number] for number in kept),
        top_k=told.top_k,
        n_experts=sizes[0],
        counts=iter([np.stack([counts[number] for number in kept])[None]]),
        phase="prefill",
        notes=notes,
    )


def _read(file: Path, layer: int, where: tuple[int, int]) -> NDArray[np.int64]:
    at, n = where
    with file.open("rb") as stream:
        stream.seek(at)
        counts = np.frombuffer(stream.read(4 * n), "<f4").astype(np.float64)
    bad = ~np.isfinite(counts) | (counts < 0) | (counts != np.floor(counts)) | (counts > 2.0**53)
    if bad.any():
        expert = int(bad.argmax())
        place = f"{file}: counts of layer {layer}, expert {expert}"
        raise refuse(place, "counts are whole numbers, 0 or more", value=float(counts[expert]))
    return counts.astype(np.int64)


class _Header:
    """A GGUF header, walked once; struct.error and ValueError where it runs out or contradicts itself."""

    def __init__(self, data: bytes, size: int) -> None:
        self._data, self._size, self._at = data, size, 4
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}, not 2 or 3")
        self._n_tensors, self._n_keys = self._number("<Q"), self._number("<Q")
        if max(self._n_tensors, self._n_keys) > len(data):
            raise ValueError(f"{self._n_tensors} tensors in {size} bytes")

    def counts(self) -> dict[int, tuple[int, int]]:
        """Place in the file and length of the counts of each layer."""
        alignment = 32
        for _ in range(self._n_keys):
            key = self._text()
            kind = self._number("<I")
            if key == b"general.alignment" and kind == 4:
                alignment = self._number("<I")
            else:
                self._skip(kind)
        tensors = list(self._tensors())
        if not 1 <= alignment <= 2**20:
            raise ValueError(f"alignment of {alignment} bytes")
        data_at = self._at + -self._at % alignment
        best: dict[int, tuple[int, int, int]] = {}
        for name, kind, n, offset in tensors:
            match = _COUNTS.fullmatch(name)
            if match is None:
                continue
            if kind != _F32 or data_at + offset + 4 * n > self._size or not n:
                raise ValueError(
                    f"{name}: type {kind}, {n} values at {data_at + offset} of {self._size} bytes"
                )
            rank = _PREFERRED.index(match[2])
            layer = int(match[1])
            best[layer] = min(best.get(layer, (len(_PREFERRED), 0, 0)), (rank, data_at + offset, n))
        return {layer: (at, n) for layer, (_, at, n) in best.items()}

    def _tensors(self) -> Iterator[tuple[str, int, int, int]]:
        for _ in range(self._n_tensors):
            name = self._text().decode("utf-8", "replace")
            n_axes = self._number("<I")
            if n_axes > 4:
                raise ValueError(f"{name} has {n_axes} axes")
            n = 1
            for _ in range(n_axes):
                n *= self._number("<Q")
            yield name, self._number("<I"), n, self._number("<Q")

    def _number(self, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return int(value)

    def _text(self) -> bytes:
        n = self._number("<Q")
        if n > len(self._data) - self._at:
            raise ValueError("truncated: a name runs past the end")
        self._at += n
        return self._data[self._at - n : self._at]

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            self._text()
        elif kind == _ARRAY:
            inner, n = self._number("<I"), self._number("<Q")
            if inner == _ARRAY or n > len(self._data):
                raise ValueError(f"an array of {n} values of type {inner}")
            if inner == _STRING:
                for _ in range(n):
                    self._text()
            else:
                self._at += n * _SCALAR_BYTES[inner]
        else:
            self._at += _SCALAR_BYTES[kind]
