"""Token-level routing in NumPy's zip format, with the names of moesim's own trace."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.routing.importers.files import NpyStream, reading, rows_at_once, whole_numbers
from moesim.routing.importers.incoming import Block, Incoming, Told, gathered, refuse
from moesim.routing.trace import RoutingTrace

__all__ = ["incoming", "read_npz"]

_RULE = "is an .npz of plain arrays (nothing is unpickled)"
_LARGEST_SMALL_VALUES = 10**8
"""Sequence offsets that are held at once [count]."""


def read_npz(path: str | Path, *, model: str = "unknown", n_experts: int | None = None) -> RoutingTrace:
    """Read token-level routing from NumPy's zip format, never unpickling.

    Parameters
    ----------
    path
        ``expert_ids`` (tokens, moe_layers, top_k); optionally ``expert_weights`` of the same shape,
        ``sequence_offsets``, and scalars ``n_experts`` and ``layer_ids``.
    model
        What the file does not say.
    n_experts
        Experts of the model; where None the file's, else the largest id + 1 (noted).

    Raises
    ------
    TraceError
        If the file is no such archive, holds objects, or breaks a rule of a trace.
    """
    return gathered(incoming([Path(path)], Told(n_experts=n_experts)), model=model)


def incoming(files: list[Path], told: Told) -> Incoming:
    """Read one archive; its tokens stream out of it, compressed or not.

    Raises
    ------
    TraceError
        If there are several files, or the file is no such archive.
    """
    if len(files) != 1:
        raise refuse(files[0].parent, "one .npz at a time", value=len(files), fix="name one file")
    file = files[0]
    with reading(file, _RULE), zipfile.ZipFile(file) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        heads = {}
        for name in sorted(names & {"expert_ids", "expert_weights"}):
            with archive.open(f"{name}.npy") as stream:
                heads[name] = NpyStream(stream, f"{file}: {name} {_RULE}")
        small = {
            name: _whole(archive, file, name)
            for name in sorted(names & {"sequence_offsets", "n_experts", "layer_ids"})
        }
    ids = heads.get("expert_ids")
    if ids is None or len(ids.shape) != 3 or ids.dtype.kind not in "ui" or 0 in ids.shape:
        value = None if ids is None else (ids.shape, str(ids.dtype))
        raise refuse(file, "expert_ids are whole numbers (tokens, moe_layers, top_k)", value=value)
    weights = heads.get("expert_weights")
    if weights is not None and (weights.shape != ids.shape or weights.dtype.kind != "f"):
        raise refuse(f"{file}: expert_weights", f"are numbers of shape {ids.shape}", value=weights.shape)
    layers = small.get("layer_ids", np.arange(ids.shape[1])).ravel()
    if layers.size != ids.shape[1]:
        raise refuse(f"{file}: layer_ids", f"name the {ids.shape[1]} layers of expert_ids", value=layers.size)
    stated = int(small["n_experts"].ravel()[0]) if small.get("n_experts", layers[:0]).size == 1 else None
    return Incoming(
        place=str(file),
        source=file.name,
        layer_ids=tuple(int(layer) for layer in layers),
        top_k=ids.shape[2],
        n_experts=stated or told.n_experts,
        tokens=_blocks(file, ids.shape, weights is not None, _offsets(file, small, ids.shape[0])),
        phase=next((phase for phase in ("decode", "prefill") if phase in file.stem.lower()), "unknown"),
    )


def _whole(archive: zipfile.ZipFile, file: Path, name: str) -> NDArray[np.int64]:
    with archive.open(f"{name}.npy") as stream:
        head = NpyStream(stream, f"{file}: {name}")
        n = int(np.prod(head.shape, dtype=object))
        if n > _LARGEST_SMALL_VALUES:
            raise refuse(f"{file}: {name}", f"has at most {_LARGEST_SMALL_VALUES} numbers", value=n)
        flat = head.take(head.shape[0] if head.shape else 1)
    return whole_numbers(flat, f"{file}: {name}")


def _offsets(file: Path, small: dict[str, NDArray[np.int64]], n_tokens: int) -> NDArray[np.int64] | None:
    offsets = small.get("sequence_offsets")
    if offsets is None:
        return None
    place = f"{file}: sequence_offsets"
    if offsets.ndim != 1 or offsets.size < 2 or offsets[0] != 0 or offsets[-1] != n_tokens:
        value = (
            offsets.shape if offsets.ndim != 1 or offsets.size < 2 else (int(offsets[0]), int(offsets[-1]))
        )
        raise refuse(place, f"run from 0 to the {n_tokens} tokens", value=value)
    falls = np.flatnonzero(np.diff(offsets) <= 0)
    if falls.size:
        at = int(falls[0])
        pair = (int(offsets[at]), int(offsets[at + 1]))
        raise refuse(f"{place}[{at + 1}]", "offsets ascend", value=pair, fix="drop empty sequences")
    return offsets


def _blocks(
    file: Path, shape: tuple[int, ...], weighted: bool, offsets: NDArray[np.int64] | None
) -> Iterator[Block]:
    step = rows_at_once(shape[1] * shape[2])
    with ExitStack() as stack, reading(file, _RULE):
        archive = stack.enter_context(zipfile.ZipFile(file))
        streams = [
            NpyStream(stack.enter_context(archive.open(f"{name}.npy")), f"{file}: {name}")
            for name in ("expert_ids", *(("expert_weights",) if weighted else ()))
        ]
        for at in range(0, shape[0], step):
            n = min(step, shape[0] - at)
            ids = streams[0].take(n)
            weights = streams[1].take(n) if weighted else None
            ends: tuple[int, ...] = ()
            if offsets is not None:
                first, last = np.searchsorted(offsets, (at, at + n), side="right")
                ends = tuple(int(end) - at for end in offsets[first:last])
            yield Block(ids, weights, ends)
