"""Routing on its way in: what an importer yields, what is cleaned from it, what of that is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.model import MoeSpec
from moesim.routing.trace import RoutingTrace, check_ids
from moesim.routing.writing import TraceHeader, TraceWriter

__all__ = ["Block", "Incoming", "Told", "gathered", "refuse", "written"]

_DUMMY_TOKENS = 8
"""Tokens that a pass has at least to be taken for a warm-up when all of them choose the same experts."""
_UNEQUAL_FRACTION = 0.01
_TWIN_TOKENS = 16
"""Tokens that two layers have in common at least to be called one layer recorded twice."""
_LARGEST = {"layers": 4096, "top_k": 1024, "n_experts": 2**16}
_GATHERED_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Told:
    """What the user says of the model, for formats that do not state it.

    Parameters
    ----------
    n_experts, top_k, layer_ids
        As in a trace.
    router
        How the model's router scores and chooses, for files of logits.
    """

    n_experts: int | None = None
    top_k: int | None = None
    layer_ids: tuple[int, ...] | None = None
    router: MoeSpec | None = None


@dataclass(frozen=True)
class Block:
    """Tokens in a row.

    Parameters
    ----------
    ids : (n_tokens, n_layers, top_k)
        Signed whole numbers; negative where a token has no expert, as padding has it.
    weights
        Router weights of the same shape.
    ends
        Rows, ascending, before which a sequence ends.
    whole
        The block is one whole pass or sequence: all alike, it is a warm-up.
    """

    ids: NDArray[Any]
    weights: NDArray[Any] | None = None
    ends: tuple[int, ...] = ()
    whole: bool = False


@dataclass
class Incoming:
    """One recording: its header, and either blocks of tokens or steps of counts.

    Parameters
    ----------
    place
        File or folder, for messages.
    source
        Who wrote it, in words.
    layer_ids, top_k
        As in a trace.
    n_experts
        None where neither file nor user says: the largest id + 1 then.
    tokens
        Blocks of tokens.
    counts
        Arrays (n_steps, n_layers, n_experts).
    passes
        Each step of counts is one forward pass, so it can be a warm-up.
    notes
        What the importer met; it may add to them while it yields.
    """

    place: str
    source: str
    layer_ids: tuple[int, ...]
    top_k: int | None
    n_experts: int | None
    tokens: Iterator[Block] | None = None
    counts: Iterator[NDArray[Any]] | None = None
    passes: bool = False
    phase: str = "unknown"
    notes: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse sizes that no router has, before anything is allocated for them."""
        sizes = {"layers": len(self.layer_ids), "top_k": self.top_k, "n_experts": self.n_experts}
        for name, largest in _LARGEST.items():
            size = sizes[name]
            if size is not None and not 1 <= size <= largest:
                raise TraceError(f"lies in 1..{largest}", value=size, place=f"{self.place}: {name}")
        if self.top_k and self.n_experts and self.top_k > self.n_experts:
            rule = f"lies in 1..{self.n_experts} (n_experts)"
            raise TraceError(rule, value=self.top_k, place=f"{self.place}: top_k")


def refuse(place: object, rule: str, *, value: object = None, fix: str | None = None) -> TraceError:
    """Make the error that an importer raises."""
    return TraceError(rule, value=value, fix=fix, place=str(place))


class _Twins:
    """Layers whose data have been the same so far; a layer recorded twice stays to the end."""

    def __init__(self, n_layers: int) -> None:
        self.groups = [list(range(n_layers))] if n_layers > 1 else []

    def see(self, block: NDArray[Any]) -> None:
        """Part layers that differ in a block (rows, n_layers, columns)."""
        parted: list[list[int]] = []
        for group in self.groups:
            alike: dict[bytes, list[int]] = {}
            for layer in group:
                alike.setdefault(block[:, layer].tobytes(), []).append(layer)
            parted += [one for one in alike.values() if len(one) > 1]
        self.groups = parted


class _Cleaner:
    """Drops what no request asked for, and remembers how much."""

    def __init__(self, incoming: Incoming) -> None:
        self._in = incoming
        self._twins = _Twins(len(incoming.layer_ids))
        self._n = {"padded": 0, "partial": 0, "dummy_passes": 0, "dummy_tokens": 0, "empty": 0, "steps": 0}
        self._rows = 0
        self._totals = np.zeros(len(incoming.layer_ids), dtype=np.int64)

    def tokens(self) -> Iterator[Block]:
        for block in self._in.tokens or ():
            kept = self._kept(block)
            if len(kept.ids):
                self._twins.see(kept.ids)
                self._rows += len(kept.ids)
            yield kept

    def _kept(self, block: Block) -> Block:
        ids, rows = block.ids, None
        if ids.dtype.kind == "i" and ids.size and int(ids.min()) < 0:
            unset = (ids < 0).sum((1, 2))
            rows = unset == 0
            full = int((unset == ids.shape[1] * ids.shape[2]).sum())
            self._n["padded"] += full
            self._n["partial"] += int((~rows).sum()) - full
            ids = ids[rows]
        if block.whole and len(ids) >= _DUMMY_TOKENS and ids.shape[1] > 1 and not (ids != ids[:1]).any():
            self._n["dummy_passes"] += 1
            self._n["dummy_tokens"] += len(ids)
            return Block(ids[:0], None, tuple(0 for _ in block.ends))
        if rows is None:
            return block
        kept = np.concatenate([[0], np.cumsum(rows)])
        weights = None if block.weights is None else block.weights[rows]
        return Block(ids, weights, tuple(int(kept[end]) for end in block.ends), block.whole)

    def counts(self) -> Iterator[NDArray[Any]]:
        for steps in self._in.counts or ():
            kept = steps
            if self._in.passes:
                empty = ~steps.any((1, 2))
                dummy = np.array([_is_dummy(step) for step in steps], dtype=bool) & ~empty
                self._n["empty"] += int(empty.sum())
                self._n["dummy_passes"] += int(dummy.sum())
                kept = steps[~empty & ~dummy]
            if len(kept):
                self._n["steps"] += len(kept)
                self._twins.see(kept)
                self._totals += kept.sum((0, 2), dtype=np.int64)
                yield kept

    def notes(self) -> tuple[str, ...]:
        """What was met, in sentences; a warning begins with that word."""
        n, told = self._n, list(self._in.notes)
        if n["padded"]:
            told.append(f"{n['padded']} padding tokens (ids -1) dropped")
        if n["partial"]:
            told.append(f"warning: {n['partial']} tokens without an expert in some layer or place dropped")
        if n["dummy_passes"]:
            tokens = f" with {n['dummy_tokens']} tokens" if n["dummy_tokens"] else ""
            told.append(
                f"{n['dummy_passes']} warm-up passes{tokens} dropped: all tokens chose the same experts"
            )
        if n["empty"]:
            told.append(f"{n['empty']} steps without any token dropped")
        if self._rows >= _TWIN_TOKENS or self._totals.sum():
            for group in self._twins.groups:
                names = ", ".join(str(self._in.layer_ids[layer]) for layer in group)
                told.append(f"warning: layers {names} are identical, as if one layer were recorded twice")
        return (*told, *self._unequal())

    def _unequal(self) -> Iterator[str]:
        totals, layers = self._totals, self._in.layer_ids
        if totals.sum() and totals.min() and totals.max() / totals.min() - 1 > _UNEQUAL_FRACTION:
            low, high = int(totals.argmin()), int(totals.argmax())
            yield (
                f"warning: layer totals differ by {totals[high] / totals[low] - 1:.1%} (layer {layers[low]}: "
                f"{totals[low]}, layer {layers[high]}: {totals[high]}); each layer is scaled to its own total"
            )


def _is_dummy(step: NDArray[Any]) -> bool:
    """Whether in every layer (n_layers, n_experts) the same few experts have all the tokens alike."""
    most = step.max(1, keepdims=True)
    chosen = (step > 0).sum(1)
    alike = ((step == 0) | (step == most)).all() and (most == most[0]).all() and (chosen == chosen[0]).all()
    return bool(alike and len(step) > 1 and most[0] >= _DUMMY_TOKENS and 2 * chosen[0] <= step.shape[1])


def written(incoming: Incoming, path: str | Path, *, model: str = "unknown") -> TraceHeader:
    """Clean a recording and write it as a trace, in bounded memory, whole or not at all.

    Parameters
    ----------
    incoming
        The recording.
    path
        Target.
    model
        Name of the model for the header.

    Returns
    -------
    TraceHeader
        What was written.

    Raises
    ------
    TraceError
        If the recording breaks a rule of a trace; nothing is written then.
    """
    cleaner = _Cleaner(incoming)
    try:
        incoming.check()
        with TraceWriter(path, n_experts=incoming.n_experts) as writer:
            for block in cleaner.tokens():
                writer.tokens(block.ids, block.weights, ends=block.ends)
            for counts in cleaner.counts():
                writer.counts(counts)
            _nothing(writer.n_tokens + writer.n_steps, cleaner)
            header = _header(incoming, cleaner, writer.largest_id, model)
            writer.finish(header)
    except TraceError as error:
        raise _placed(error, incoming.place) from None
    return header


def gathered(incoming: Incoming, *, model: str = "unknown") -> RoutingTrace:
    """Clean a recording and hold it in memory as a trace.

    Raises
    ------
    TraceError
        If the recording breaks a rule of a trace, or is too large to hold.
    """
    cleaner = _Cleaner(incoming)
    blocks: list[Block] = []
    n_bytes = n_tokens = largest = 0
    ends: list[int] = []
    try:
        incoming.check()
        for block in cleaner.tokens():
            check_ids(block.ids, n_tokens, incoming.n_experts or _LARGEST["n_experts"])
            stored = block.ids.astype(np.uint8 if (incoming.n_experts or 999) <= 256 else np.uint16)
            ends += [n_tokens + end for end in block.ends]
            if len(stored):
                blocks.append(Block(stored, block.weights))
                largest = max(largest, int(stored.max()))
            n_tokens += len(stored)
            n_bytes += stored.nbytes
            if n_bytes > _GATHERED_BYTES:
                rule = f"has at most {_GATHERED_BYTES // 10**9} GB of ids to be opened as it is"
                raise refuse(incoming.place, rule, fix="write it as a trace with `moesim trace import`")
        counts = list(cleaner.counts())
        _nothing(n_tokens + len(counts), cleaner)
        header = _header(incoming, cleaner, largest, model)
        fields = {name: getattr(header, name) for name in header.__dataclass_fields__}
        if counts:
            trace = RoutingTrace(**fields, expert_counts=np.concatenate(counts).astype(np.int64))
        else:
            trace = RoutingTrace(**fields, **_joined(blocks, ends, n_tokens, header.n_experts))
        trace.check()
    except TraceError as error:
        raise _placed(error, incoming.place) from None
    return trace


def _joined(blocks: list[Block], ends: list[int], n_tokens: int, n_experts: int) -> dict[str, Any]:
    ids = np.concatenate([block.ids for block in blocks])
    weights = [block.weights for block in blocks if block.weights is not None]
    return {
        "expert_ids": ids.astype(np.uint8 if n_experts <= 256 else np.uint16, copy=False),
        "expert_weights": np.concatenate(weights).astype(np.float16) if weights else None,
        "sequence_offsets": np.unique([0, *ends, n_tokens]) if ends else None,
    }


def _nothing(n: int, cleaner: _Cleaner) -> None:
    if not n:
        why = "; ".join(cleaner.notes())
        raise TraceError("holds at least one token", fix=f"record real requests ({why})" if why else None)


def _header(incoming: Incoming, cleaner: _Cleaner, largest: int, model: str) -> TraceHeader:
    n_experts = incoming.n_experts or largest + 1
    taken = () if incoming.n_experts else (f"n_experts taken as the largest id + 1 = {n_experts}",)
    return TraceHeader(
        n_experts=n_experts,
        top_k=incoming.top_k,
        layer_ids=incoming.layer_ids,
        model=model,
        phase=incoming.phase,
        source=incoming.source,
        notes=(*taken, *cleaner.notes()),
    )


def _placed(error: TraceError, place: str) -> TraceError:
    if error.place is not None and error.place.startswith(place):
        return error
    moved = error.at(place if error.place is None else f"{place}: {error.place}")
    return moved if isinstance(moved, TraceError) else error
