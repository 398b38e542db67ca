"""Writing a trace, whole or block by block: bounded memory, and nothing half-written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import TraceError
from moesim.routing.trace import RoutingTrace, check_ids, check_weights, map_trace
from moesim.routing.whole import whole_file

__all__ = ["TraceHeader", "TraceWriter", "write_trace"]

_COPIED_AT_ONCE_BYTES = 2**22
_LARGEST_ID = 2**16 - 1
_NAMES = {"<i8": "I64", "<f2": "F16", "<u2": "U16", "|u1": "U8"}


@dataclass(frozen=True)
class TraceHeader:
    """What a trace says of itself beside its arrays, as in `RoutingTrace`."""

    n_experts: int
    top_k: int | None
    layer_ids: tuple[int, ...]
    model: str = "unknown"
    phase: str = "unknown"
    source: str = "unknown"
    licence: str = "unknown"
    notes: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()

    def metadata(self) -> dict[str, str]:
        """Give the strings of a safetensors header."""
        named = {"domains": json.dumps(list(self.domains))} if self.domains else {}
        return named | {
            "format": "moesim-routing-1",
            "model": self.model,
            "n_experts": str(self.n_experts),
            "top_k": "" if self.top_k is None else str(self.top_k),
            "layer_ids": json.dumps(list(self.layer_ids)),
            "phase": self.phase,
            "source": self.source,
            "licence": self.licence,
            "notes": json.dumps(list(self.notes)),
        }


class TraceWriter:
    """A trace written block by block, in memory that does not depend on its length.

    Blocks go to nameless temporary files in the target's folder; `finish` puts them together under a
    temporary name and renames it. Without `finish` nothing is left.

    Parameters
    ----------
    path
        Target; a file there is replaced in one step.
    n_experts
        Experts per layer, which ids are checked against; None where only the end of the data tells.
    """

    def __init__(self, path: str | Path, *, n_experts: int | None = None) -> None:
        self.n_tokens = 0
        self.n_steps = 0
        self.largest_id = -1
        self._path = Path(path)
        self._n_experts = n_experts
        self._stack = ExitStack()
        self._spools: dict[str, IO[bytes]] = {}
        self._last_end = 0

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trail: TracebackType | None
    ) -> None:
        self._stack.close()

    def tokens(self, ids: NDArray[Any], weights: NDArray[Any] | None = None, *, ends: ArrayLike = ()) -> None:
        """Append tokens.

        Parameters
        ----------
        ids : (n_tokens, n_layers, top_k)
            Whole numbers.
        weights
            Router weights of the same shape; with every block or with none.
        ends
            Rows of this block, ascending in 0..n_tokens, before which a sequence ends.

        Raises
        ------
        TraceError
            If an id is out of range or repeats within a token, or a weight is not finite.
        """
        if len(ids):
            self._append_tokens(ids, weights)
        bounds = self.n_tokens - len(ids) + np.asarray(ends, dtype=np.int64).ravel()
        bounds = bounds[np.diff(bounds, prepend=self._last_end) > 0]
        if bounds.size:
            self._spool("sequence_offsets").write(bounds.astype("<i8").tobytes())
            self._last_end = int(bounds[-1])

    def _append_tokens(self, ids: NDArray[Any], weights: NDArray[Any] | None) -> None:
        check_ids(ids, self.n_tokens, self._n_experts or _LARGEST_ID + 1)
        if (weights is not None) != ("expert_weights" in self._spools) and self.n_tokens:
            raise TraceError("are there for every token or for none", place="expert_weights")
        self.largest_id = max(self.largest_id, int(ids.max()))
        self._spool("expert_ids").write(np.ascontiguousarray(ids, self._stored()).tobytes())
        if weights is not None:
            if weights.shape != ids.shape:
                rule = f"have the shape of expert_ids {ids.shape}"
                raise TraceError(rule, value=weights.shape, place="expert_weights")
            with np.errstate(over="ignore"):  # what float16 cannot hold is refused as infinite
                half = np.ascontiguousarray(weights, "<f2")
            check_weights(half, self.n_tokens)
            self._spool("expert_weights").write(half.tobytes())
        self.n_tokens += len(ids)

    def domains(self, sequence_domains: NDArray[Any]) -> None:
        """Append the domain of each of some sequences, as the header's `domains` are numbered."""
        self._spool("sequence_domains").write(np.ascontiguousarray(sequence_domains, "|u1").tobytes())

    def counts(self, counts: NDArray[Any]) -> None:
        """Append steps of counts, (n_steps, n_layers, n_experts)."""
        self._spool("expert_counts").write(np.ascontiguousarray(counts, "<i8").tobytes())
        self.n_steps += len(counts)

    def finish(self, header: TraceHeader) -> Path:
        """Put the file together, check its shapes, and give it its name.

        Raises
        ------
        TraceError
            If nothing was appended, or header and arrays do not agree.
        """
        layers = len(header.layer_ids)
        ids_shape = (self.n_tokens, layers, header.top_k or 0)
        if self.n_tokens and self._last_end and self._last_end < self.n_tokens:
            self._spool("sequence_offsets").write(np.array([self.n_tokens], "<i8").tobytes())
        id_type = np.dtype("|u1" if header.n_experts <= 256 else "<u2")
        layouts: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = []  # widest type first: all stand aligned
        if "expert_counts" in self._spools:
            layouts = [("expert_counts", (self.n_steps, layers, header.n_experts), np.dtype("<i8"))]
        if "sequence_offsets" in self._spools:
            n_offsets = self._spools["sequence_offsets"].tell() // 8 + 1
            layouts.append(("sequence_offsets", (n_offsets,), np.dtype("<i8")))
        if "expert_weights" in self._spools:
            layouts.append(("expert_weights", ids_shape, np.dtype("<f2")))
        if "expert_ids" in self._spools:
            layouts.append(("expert_ids", ids_shape, id_type))
        if "sequence_domains" in self._spools:
            n_sequences = self._spools["sequence_domains"].tell()
            layouts.append(("sequence_domains", (n_sequences,), np.dtype("|u1")))
        if not layouts:
            raise TraceError("holds at least one token", value=0, place="trace")
        with whole_file(self._path) as temporary:
            with temporary.open("wb") as out:
                out.write(_header_bytes(header, layouts))
                for name, _, dtype in layouts:
                    for part in self._parts(name, dtype):
                        out.write(part)
            map_trace(temporary)
        return self._path

    def _parts(self, name: str, dtype: np.dtype[Any]) -> Iterator[bytes]:
        spool = self._spools[name]
        spool.seek(0)
        if name == "sequence_offsets":
            yield bytes(8)  # the first sequence begins at token 0
        narrow = name == "expert_ids" and self._stored() != dtype
        while part := spool.read(_COPIED_AT_ONCE_BYTES):
            yield np.frombuffer(part, self._stored()).astype(dtype).tobytes() if narrow else part

    def _stored(self) -> np.dtype[Any]:
        return np.dtype("|u1" if self._n_experts is not None and self._n_experts <= 256 else "<u2")

    def _spool(self, name: str) -> IO[bytes]:
        if name not in self._spools:
            folder, prefix = self._path.parent, f".{self._path.name}."
            file = tempfile.TemporaryFile(dir=folder, prefix=prefix)  # noqa: SIM115 (the stack closes it)
            self._spools[name] = self._stack.enter_context(file)
        return self._spools[name]


def _header_bytes(header: TraceHeader, layouts: list[tuple[str, tuple[int, ...], np.dtype[Any]]]) -> bytes:
    """Length and JSON header of a safetensors file, padded so that its data stand aligned."""
    entries: dict[str, Any] = {"__metadata__": header.metadata()}
    at = 0
    for name, shape, dtype in layouts:
        end = at + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype.str], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_trace(trace: RoutingTrace, path: str | Path) -> Path:
    """Check a trace and write it, whole or not at all, a block at a time.

    Parameters
    ----------
    trace
        What to write.
    path
        Target; a file there is replaced in one step.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    TraceError
        If the trace breaks a rule; nothing is written then.
    """
    header = TraceHeader(
        n_experts=trace.n_experts,
        top_k=trace.top_k,
        layer_ids=trace.layer_ids,
        model=trace.model,
        phase=trace.phase,
        source=trace.source,
        licence=trace.licence,
        notes=trace.notes,
        domains=trace.domains,
    )
    with TraceWriter(path, n_experts=trace.n_experts) as writer:
        if trace.sequence_domains is not None:
            writer.domains(trace.sequence_domains)
        if trace.expert_counts is not None:
            step = max(1, 2**21 // max(1, trace.n_layers * trace.n_experts))
            for at in range(0, len(trace.expert_counts), step):
                writer.counts(trace.expert_counts[at : at + step])
        if trace.expert_ids is not None:
            step = max(1, 2**22 // (trace.n_layers * trace.expert_ids.shape[2]))
            for at in range(0, trace.n_tokens, step):
                weights = trace.expert_weights
                part = None if weights is None else weights[at : at + step]
                writer.tokens(trace.expert_ids[at : at + step], part)
        if trace.sequence_offsets is not None:
            writer.tokens(
                np.empty((0, trace.n_layers, trace.top_k or 1), np.uint8), ends=trace.offsets - trace.n_tokens
            )
        return writer.finish(header)
