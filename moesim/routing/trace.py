"""Routing traces: which experts real tokens chose, in one memory-mapped safetensors file.

A file holds ``expert_ids`` (tokens, moe_layers, top_k) with optional ``expert_weights``,
``sequence_offsets`` and ``sequence_domains``, or ``expert_counts`` (steps, moe_layers, n_experts) alone;
the header says the rest.
Nothing in it is code, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.routing.mapped import blocks, count_ids

__all__ = ["RoutingTrace", "check_ids", "check_weights", "map_trace", "read_trace"]

_DTYPES = {"U8": "<u1", "U16": "<u2", "I32": "<i4", "I64": "<i8", "F16": "<f2"}
_ARRAYS = ("expert_ids", "expert_weights", "sequence_offsets", "sequence_domains", "expert_counts")
_PAIRED_TOP_K = 16
"""Experts of a token up to which comparing all pairs is faster than sorting."""
_CHECKED_AT_ONCE = 2**25
"""Ids that opening a file checks [count]; a longer trace is checked at 64 places, and whole by `check`."""


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing of one model over many tokens, token by token or as counts.

    Parameters
    ----------
    model
        Name of the model the routing is from.
    n_experts
        Routed experts per MoE layer.
    top_k
        Experts per token; None where a count file does not say.
    layer_ids
        Index in the model of each MoE layer of the trace, ascending.
    phase
        ``decode``, ``prefill``, ``mixed`` or ``unknown``.
    source, licence
        Where the data are from and on what terms.
    expert_ids : (n_tokens, n_layers, top_k), uint8 or uint16
        Chosen experts; None for a counts-only trace.
    expert_weights : (n_tokens, n_layers, top_k), float16
        Router weights in the same order; optional.
    sequence_offsets : (n_sequences + 1,), int64
        First token of each sequence, and the end; optional.
    sequence_domains : (n_sequences,), uint8
        Which of `domains` each sequence is from; optional, only beside `sequence_offsets`.
    domains
        Names of the domains, as `sequence_domains` numbers them.
    expert_counts : (n_steps, n_layers, n_experts), int64
        Tokens per expert; None for a token-level trace.
    notes
        Warnings of the reader, for people.
    """

    model: str
    n_experts: int
    top_k: int | None
    layer_ids: tuple[int, ...]
    phase: str = "unknown"
    source: str = "unknown"
    licence: str = "unknown"
    expert_ids: NDArray[Any] | None = None
    expert_weights: NDArray[np.float16] | None = None
    sequence_offsets: NDArray[np.int64] | None = None
    sequence_domains: NDArray[np.uint8] | None = None
    domains: tuple[str, ...] = ()
    expert_counts: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        _check_shapes(self)

    @property
    def n_layers(self) -> int:
        """MoE layers in the trace."""
        return len(self.layer_ids)

    @property
    def is_token_level(self) -> bool:
        """Whether single tokens are known, not only counts."""
        return self.expert_ids is not None

    @property
    def n_tokens(self) -> int:
        """Tokens that the trace covers (0 where a count file does not state top_k)."""
        if self.expert_ids is not None:
            return int(self.expert_ids.shape[0])
        return int(self.counts[0].sum()) // self.top_k if self.top_k else 0

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Sequence bounds (n_sequences + 1,); one sequence where the trace has none."""
        if self.sequence_offsets is not None:
            return np.asarray(self.sequence_offsets, dtype=np.int64)
        return np.array([0, self.n_tokens], dtype=np.int64)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Tokens per (layer, expert) over the whole trace: (n_layers, n_experts)."""
        total = np.zeros((self.n_layers, self.n_experts), dtype=np.int64)
        if self.expert_counts is not None:
            for _, steps in blocks(self.expert_counts):
                total += steps.sum(0)
            return total
        for _, block in blocks(np.asanyarray(self.expert_ids)):
            total += count_ids(block, self.n_experts)
        return total

    def permuted(self, seed: int = 0) -> RoutingTrace:
        """Return the same routing with the experts of each layer renamed at random.

        Some files have load fall with the expert's id; a claim about placement is made on renamed ids.

        Parameters
        ----------
        seed
            Seed of the names.
        """
        rng = np.random.default_rng(seed)
        name = rng.permuted(np.tile(np.arange(self.n_experts), (self.n_layers, 1)), axis=-1)
        note = (*self.notes, "experts renamed at random per layer")
        if self.expert_counts is not None:
            counts = np.take_along_axis(self.expert_counts, np.argsort(name, axis=-1)[None], -1)
            return replace(self, expert_counts=counts, notes=note)
        ids = np.asarray(self.expert_ids)
        layers = np.arange(self.n_layers)[None, :, None]
        return replace(self, expert_ids=name.astype(ids.dtype)[layers, ids], notes=note)

    def check(self, *, sampled: bool = False) -> None:
        """Refuse ids out of range, repeated experts and bad weights, streaming over the tokens.

        Parameters
        ----------
        sampled
            Look at 64 places only (a very long trace, on opening).

        Raises
        ------
        TraceError
            At the first token that breaks a rule.
        """
        if self.expert_ids is not None:
            for start, block in blocks(self.expert_ids, sampled=sampled):
                check_ids(block, start, self.n_experts)
        if self.expert_weights is not None:
            for start, block in blocks(self.expert_weights, sampled=sampled):
                check_weights(block, start)


def _refuse(what: str, rule: str, *, value: object = None, fix: str | None = None) -> TraceError:
    return TraceError(rule, value=value, fix=fix, place=what)


def _check_shapes(t: RoutingTrace) -> None:
    if (t.expert_ids is None) == (t.expert_counts is None):
        raise _refuse("trace", "holds either expert_ids or expert_counts", fix="give exactly one of them")
    if t.n_experts < 1:
        raise _refuse("n_experts", "is at least 1", value=t.n_experts)
    if t.top_k is not None and not 1 <= t.top_k <= t.n_experts:
        raise _refuse("top_k", f"lies in 1..{t.n_experts} (n_experts)", value=t.top_k)
    if not t.layer_ids or any(b <= a for a, b in zip(t.layer_ids, t.layer_ids[1:], strict=False)):
        raise _refuse(
            "layer_ids", "ascend, one per MoE layer", value=t.layer_ids, fix="sort and drop repeats"
        )
    _check_domains(t)
    if t.expert_counts is not None:
        _check_counts(t, t.expert_counts)
        return
    ids = t.expert_ids
    if ids is None or ids.ndim != 3 or ids.dtype.kind not in "ui":
        shape = None if ids is None else (ids.shape, str(ids.dtype))
        raise _refuse("expert_ids", "are whole numbers (tokens, moe_layers, top_k)", value=shape)
    if ids.shape[0] == 0:
        raise _refuse("expert_ids", "hold at least one token", value=ids.shape)
    if ids.shape[1:] != (t.n_layers, t.top_k):
        raise _refuse(
            "expert_ids",
            f"have shape (tokens, {t.n_layers} layers, top_k {t.top_k}) as the header says",
            value=ids.shape,
            fix="make layer_ids and top_k agree with the array",
        )
    if t.expert_weights is not None and t.expert_weights.shape != ids.shape:
        raise _refuse(
            "expert_weights", f"have the shape of expert_ids {ids.shape}", value=t.expert_weights.shape
        )
    if t.sequence_offsets is not None:
        _check_offsets(np.asarray(t.sequence_offsets), ids.shape[0])


def _check_domains(t: RoutingTrace) -> None:
    if t.sequence_domains is None:
        if t.domains:
            raise _refuse("domains", "stand beside sequence_domains", value=t.domains, fix="give both")
        return
    if t.sequence_offsets is None:
        raise _refuse("sequence_domains", "need sequence_offsets", fix="say where each sequence begins")
    domains = np.asarray(t.sequence_domains)
    n_sequences = np.asarray(t.sequence_offsets).size - 1
    if domains.shape != (n_sequences,) or domains.dtype.kind not in "ui":
        value = (domains.shape, str(domains.dtype))
        raise _refuse("sequence_domains", f"are {n_sequences} whole numbers, one a sequence", value=value)
    if len(set(t.domains)) != len(t.domains) or not 1 <= len(t.domains) <= 256:
        raise _refuse("domains", "are 1 to 256 distinct names", value=t.domains)
    outside = np.flatnonzero((domains < 0) | (domains >= len(t.domains)))
    if outside.size:
        at = int(outside[0])
        rule = f"number one of the {len(t.domains)} domains"
        raise _refuse(f"sequence_domains[{at}]", rule, value=int(domains[at]))


def _check_counts(t: RoutingTrace, counts: NDArray[np.int64]) -> None:
    if counts.ndim != 3 or counts.shape[0] == 0 or counts.shape[1:] != (t.n_layers, t.n_experts):
        rule = f"have shape (steps, {t.n_layers} layers, {t.n_experts} experts) as the header says"
        raise _refuse("expert_counts", rule, value=counts.shape)
    if counts.dtype.kind not in "ui":
        raise _refuse("expert_counts", "are whole numbers", value=str(counts.dtype), fix="store int64")
    if (least := min(int(steps.min()) for _, steps in blocks(counts))) < 0:
        raise _refuse("expert_counts", "are not negative", value=least)


def _check_offsets(offsets: NDArray[Any], n_tokens: int) -> None:
    if offsets.ndim != 1 or offsets.size < 2 or offsets.dtype.kind not in "ui":
        raise _refuse("sequence_offsets", "are one row of at least two whole numbers", value=offsets.shape)
    if offsets[0] != 0 or offsets[-1] != n_tokens:
        ends = (int(offsets[0]), int(offsets[-1]))
        raise _refuse("sequence_offsets", f"run from 0 to the {n_tokens} tokens", value=ends)
    falls = np.flatnonzero(np.diff(offsets.astype(np.int64)) <= 0)
    if falls.size:
        at = int(falls[0])
        pair = (int(offsets[at]), int(offsets[at + 1]))
        raise _refuse(f"sequence_offsets[{at + 1}]", "offsets ascend", value=pair, fix="drop empty sequences")


def check_ids(block: NDArray[Any], start: int, n_experts: int) -> None:
    """Refuse expert ids that are out of range or repeat within a token.

    Parameters
    ----------
    block : (n_tokens, n_layers, top_k)
        Expert ids.
    start
        Index of the block's first token, for the message.
    n_experts
        Experts per layer.

    Raises
    ------
    TraceError
        At the first token that breaks a rule.
    """
    if block.size and (int(block.max()) >= n_experts or int(block.min()) < 0):
        bad = np.argwhere((block >= n_experts) | (block < 0))[0]
        value = int(block[tuple(bad)])
        place = f"expert_ids[{start + int(bad[0])}, {int(bad[1])}, {int(bad[2])}]"
        raise _refuse(
            place, f"expert ids lie in 0..{n_experts - 1}", value=value, fix="undo padding and remapping"
        )
    twice = _repeated(block)
    if twice.any():
        token, layer = (int(v) for v in np.argwhere(twice)[0])
        place = f"expert_ids[{start + token}, {layer}]"
        value = block[token, layer].tolist()
        raise _refuse(place, "the experts of one token are distinct", value=value, fix="drop padded tokens")


def _repeated(block: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a token has an expert twice in a layer: (n_tokens, n_layers)."""
    twice = np.zeros(block.shape[:2], dtype=np.bool_)
    if block.shape[2] > _PAIRED_TOP_K:
        ordered = np.sort(block, axis=-1)
        return np.asarray((ordered[:, :, 1:] == ordered[:, :, :-1]).any(-1))
    planes = [np.ascontiguousarray(block[:, :, j]) for j in range(block.shape[2])]
    for j, later in enumerate(planes):
        for earlier in planes[:j]:
            twice |= later == earlier
    return twice


def check_weights(block: NDArray[Any], start: int) -> None:
    """Refuse router weights that are not finite: `block` as in :func:`check_ids`."""
    bad = np.argwhere(~np.isfinite(block))
    if bad.size:
        token, layer, j = (int(v) for v in bad[0])
        value = str(block[token, layer, j])
        place = f"expert_weights[{start + token}, {layer}, {j}]"
        raise _refuse(place, "weights are finite", value=value, fix="leave expert_weights out or repair them")


def read_trace(path: str | Path) -> RoutingTrace:
    """Open a trace without reading its tokens: arrays stay mapped to the file.

    Parameters
    ----------
    path
        A safetensors file written by :func:`moesim.routing.write_trace`, or by anyone in that format.

    Returns
    -------
    RoutingTrace
        With memory-mapped, read-only arrays.

    Raises
    ------
    TraceError
        If the file is absent, truncated, not a safetensors file, or breaks a rule of the format.
    """
    file = Path(path)
    try:
        trace = map_trace(file)
        big = trace.expert_ids is not None and trace.expert_ids.size > _CHECKED_AT_ONCE
        trace.check(sampled=big)
    except TraceError as error:
        place = str(file) if error.place is None else f"{file}: {error.place}"
        raise error.at(place) from None
    return trace


def map_trace(file: Path) -> RoutingTrace:
    """Open a trace as :func:`read_trace` does, but look at shapes and bounds only, not at its ids."""
    header, tensors, data_at = _read_header(file)
    arrays: dict[str, Any] = {name: _mapped(file, name, info, data_at) for name, info in tensors.items()}
    return RoutingTrace(**_fields(header), **arrays)


def _read_header(file: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]], int]:
    if not file.is_file():
        raise TraceError("no such trace file", fix="check the path")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, 100_000_000):
            raise TraceError(
                "is not a whole safetensors file", fix="write it again with `moesim trace import`"
            )
        try:
            parsed = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise TraceError("is not a safetensors file", fix="use `moesim trace import`") from None
    if not isinstance(parsed, dict):
        raise TraceError("is not a safetensors file", fix="use `moesim trace import`")
    header = parsed.pop("__metadata__", {})
    tensors = {name: parsed[name] for name in _ARRAYS if name in parsed}
    if not isinstance(header, dict) or not {"expert_ids", "expert_counts"} & set(tensors):
        raise TraceError("holds neither expert_ids nor expert_counts", fix="use `moesim trace import`")
    spans = [info.get("data_offsets") for info in parsed.values() if isinstance(info, dict)]
    ends = [span[-1] for span in spans if isinstance(span, list) and span and isinstance(span[-1], int)]
    if 8 + length + max(ends, default=0) > size:
        missing = 8 + length + max(ends) - size
        raise TraceError(f"is truncated: {missing} bytes are missing", fix="copy or import it again")
    return header, tensors, 8 + length


def _mapped(file: Path, name: str, info: dict[str, Any], data_at: int) -> NDArray[Any]:
    try:
        dtype = np.dtype(_DTYPES[info["dtype"]])
        shape = tuple(int(n) for n in info["shape"])
        begin, end = (int(n) for n in info["data_offsets"])
        if min(shape, default=0) < 0:
            raise ValueError("a side below 0")
    except (KeyError, TypeError, ValueError):
        rule = f"has dtype, shape and data_offsets, dtype one of {', '.join(_DTYPES)}"
        raise TraceError(rule, value=info, place=name) from None
    n_bytes = math.prod(shape) * dtype.itemsize
    if begin < 0 or end - begin != n_bytes:
        raise TraceError(f"spans {n_bytes} bytes by its shape", value=end - begin, place=name)
    if n_bytes == 0:
        return np.zeros(shape, dtype)
    return np.memmap(file, dtype=dtype, mode="r", offset=data_at + begin, shape=shape)


def _fields(header: dict[str, str]) -> dict[str, Any]:
    try:
        top_k = header.get("top_k", "")
        return {
            "model": header.get("model", "unknown"),
            "n_experts": int(header["n_experts"]),
            "top_k": int(top_k) if top_k else None,
            "layer_ids": tuple(int(i) for i in json.loads(header["layer_ids"])),
            "phase": header.get("phase", "unknown"),
            "source": header.get("source", "unknown"),
            "licence": header.get("licence", "unknown"),
            "domains": tuple(str(n) for n in json.loads(header.get("domains", "[]"))),
            "notes": tuple(str(n) for n in json.loads(header.get("notes", "[]"))),
        }
    except (KeyError, TypeError, ValueError) as error:
        rule = "the header states n_experts, top_k and layer_ids"
        raise TraceError(rule, value=str(error), fix="write it with `moesim trace import`") from None
