"""SGLang's expert-distribution recorder, and the JSON that --init-expert-location takes.

Layouts: ``sglang/srt/eplb/expert_distribution.py`` and ``expert_location.py`` of SGLang 0.5.23. A ``.pt`` is
opened elsewhere (``calibrate.routing``), since that needs PyTorch; what it holds is read here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.importers.files import json_whole, reading, rows_at_once, whole_numbers
from moesim.routing.importers.incoming import Block, Incoming, Told, gathered, refuse
from moesim.routing.trace import RoutingTrace

__all__ = ["from_counts", "from_recordings", "incoming", "read_sglang_counts"]

_EXTEND, _DECODE = 1, 2
"""`ForwardMode` of a pass: prompts, one token a request."""


def read_sglang_counts(path: str | Path, *, model: str = "unknown", top_k: int | None = None) -> RoutingTrace:
    """Read ``logical_count`` as SGLang's expert-distribution recorder and --init-expert-location have it.

    Layers without any count are dense: they are dropped, and `layer_ids` says which remain. Layer totals
    that differ by more than 1% are noted in `notes`. Ids stay as in the file.

    Parameters
    ----------
    path
        JSON with ``logical_count``, (n_layers, n_experts) or (n_steps, n_layers, n_experts).
    model, top_k
        What the file does not say.

    Raises
    ------
    TraceError
        If the file is no such JSON, or counts are not whole and non-negative.
    """
    return gathered(incoming([Path(path)], Told(top_k=top_k)), model=model)


def incoming(files: list[Path], told: Told) -> Incoming:
    """Read one count JSON.

    Raises
    ------
    TraceError
        If there are several, or the file is no such JSON.
    """
    if len(files) != 1:
        raise refuse(files[0].parent, "one count JSON at a time", value=len(files), fix="name one file")
    file = files[0]
    data = json_whole(file)
    if isinstance(data, dict) and "physical_to_logical_map" in data and "logical_count" not in data:
        rule = "is a placement (physical_to_logical_map) without routing (logical_count)"
        raise refuse(file, rule, fix="give it as the placement of a scenario")
    rule = "states logical_count: one list of tokens per expert for each layer, all of one length"
    with reading(file, rule, fix="use the recorder's `stat` mode"):
        counts = np.asarray(data["logical_count"], dtype=np.float64)
    return from_counts(file, counts, told)


def from_counts(file: Path, counts: NDArray[Any], told: Told) -> Incoming:
    """Take counts per expert, (layers, experts) or (steps, layers, experts), of any numeric type.

    Raises
    ------
    TraceError
        If they are of another shape, not whole, negative, or all zero.
    """
    place = f"{file}: logical_count"
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or counts.size == 0:
        raise refuse(place, "is (layers, experts) or (steps, layers, experts)", value=counts.shape)
    totals = np.zeros(counts.shape[1])
    for _, part in _steps(counts):
        _check_counts(place, part)
        totals += part.sum((0, 2), dtype=np.float64)
    layers = np.flatnonzero(totals > 0)
    if layers.size == 0:
        raise refuse(place, "at least one layer has tokens")
    notes = []
    if layers.size < totals.size:
        notes.append(f"{totals.size - layers.size} layers without counts taken as dense and dropped")
    return Incoming(
        place=str(file),
        source=f"{file.name} (SGLang logical_count)",
        layer_ids=tuple(int(layer) for layer in layers),
        top_k=told.top_k,
        n_experts=counts.shape[2],
        counts=(part[:, layers].astype(np.int64) for _, part in _steps(counts)),
        passes=len(counts) > 1,
        phase=_phase_of(file),
        notes=notes,
    )


def _steps(counts: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    n = rows_at_once(counts.shape[1] * counts.shape[2])
    return ((at, counts[at : at + n]) for at in range(0, len(counts), n))


def _check_counts(place: str, counts: NDArray[Any]) -> None:
    bad = counts < 0
    if counts.dtype.kind == "f":
        bad |= ~np.isfinite(counts) | (counts != np.floor(counts)) | (counts > 2.0**53)
    if bad.any():
        step, layer, expert = (int(v) for v in np.argwhere(bad)[0])
        value = counts[step, layer, expert].item()
        raise refuse(f"{place}[{layer}][{expert}]", "counts are whole numbers, 0 or more", value=value)


def _phase_of(file: Path) -> str:
    for phase in ("decode", "prefill"):
        if phase in file.stem.lower():
            return phase
    return "unknown"


def from_recordings(recordings: list[tuple[Path, Any]], told: Told) -> Incoming:
    """Take what the recorder's .pt files hold: one of `stat`, or one a rank of `per_pass` and `per_token`.

    Parameters
    ----------
    recordings
        File and content, tensors being NumPy arrays.
    told
        What the user says of the model.

    Raises
    ------
    TraceError
        If they are no such recordings, or do not belong together.
    """
    file, first = recordings[0]
    if isinstance(first, dict) and "logical_count" in first:
        if len(recordings) > 1:
            raise refuse(
                file.parent, "one `stat` recording at a time", value=len(recordings), fix="name a file"
            )
        counts = first["logical_count"]
        if not isinstance(counts, np.ndarray) or counts.dtype.kind not in "uif":
            raise refuse(f"{file}: logical_count", "is a tensor of counts", value=type(counts).__name__)
        return from_counts(file, counts, told)
    passes = sorted(_records(recordings), key=lambda one: one[:2])
    if not passes:
        raise refuse(file, "holds at least one record", fix="send requests between start and dump")
    place = str(file if len(recordings) == 1 else file.parent)
    maps = [_map_of(path, content) for path, content in recordings]
    if any(not np.array_equal(one, maps[0]) for one in maps):
        raise refuse(place, "all ranks have one last_physical_to_logical_map", fix="give files of one dump")
    detailed = ["topk_ids_of_layer" in record for _, _, _, record in passes]
    if any(detailed) != all(detailed):
        raise refuse(
            place, "records are all of one mode, per_pass or per_token", fix="give files of one dump"
        )
    if detailed[0]:
        return _per_token(place, passes, maps[0], told)
    return _per_pass(place, passes, maps[0], told)


_Pass = tuple[int, int, str, dict[str, Any]]
"""Forward pass, rank, place for messages, record."""


def _records(recordings: list[tuple[Path, Any]]) -> Iterator[_Pass]:
    rule = "is a recording of SGLang: logical_count, or records and last_physical_to_logical_map"
    for path, content in recordings:
        if not isinstance(content, dict) or not isinstance(content.get("records"), list | tuple):
            raise refuse(path, rule, value=type(content).__name__, fix="give files of the recorder")
        for number, record in enumerate(content["records"]):
            place = f"{path}: records[{number}]"
            try:
                yield int(record["forward_pass_id"]), int(record["rank"]), place, record
            except (KeyError, TypeError, ValueError):
                raise refuse(
                    place, "has forward_pass_id and rank", fix="give files of the recorder"
                ) from None


def _map_of(path: Path, content: dict[str, Any]) -> NDArray[np.int64]:
    place = f"{path}: last_physical_to_logical_map"
    mapped = whole_numbers(content.get("last_physical_to_logical_map", ()), place)
    if mapped.ndim != 2 or mapped.size == 0 or mapped.min() < 0:
        raise refuse(place, "is (layers, physical experts) of ids from 0 on", value=mapped.shape)
    return mapped


_MAP_NOTE = "physical experts mapped to logical ones by the last map, which may have changed while recording"


def _map_notes(mapped: NDArray[np.int64]) -> list[str]:
    return [] if (mapped == np.arange(mapped.shape[1])).all() else [_MAP_NOTE]


def _per_pass(place: str, passes: list[_Pass], mapped: NDArray[np.int64], told: Told) -> Incoming:
    n_experts = told.n_experts or int(mapped.max()) + 1
    if int(mapped.max()) >= n_experts:
        raise refuse(
            f"{place}: last_physical_to_logical_map",
            f"names experts below {n_experts}",
            value=int(mapped.max()),
        )
    notes = _map_notes(mapped)
    totals = np.zeros(len(mapped))
    for step in _logical_steps(passes, mapped, n_experts, []):
        totals += step.sum((0, 2))
    layers = np.flatnonzero(totals)
    if not layers.size:
        raise refuse(place, "at least one layer has tokens")
    if layers.size < totals.size:
        notes.append(f"{totals.size - layers.size} layers without counts taken as dense and dropped")
    return Incoming(
        place=place,
        source=f"{Path(place).name} (SGLang recorder, per_pass)",
        layer_ids=tuple(int(layer) for layer in layers),
        top_k=told.top_k,
        n_experts=n_experts,
        counts=(step[:, layers] for step in _logical_steps(passes, mapped, n_experts, notes)),
        passes=True,
        notes=notes,
    )


def _logical_steps(
    passes: list[_Pass], mapped: NDArray[np.int64], n_experts: int, notes: list[str]
) -> Iterator[NDArray[np.int64]]:
    """Tokens per logical expert of each forward pass, (1, layers, experts), summed over ranks."""
    at, n_same = 0, 0
    layers = np.broadcast_to(np.arange(len(mapped))[:, None], mapped.shape)
    while at < len(passes):
        end = at
        while end < len(passes) and passes[end][0] == passes[at][0]:
            end += 1
        ranks = [_physical(one, mapped.shape) for one in passes[at:end]]
        same = len(ranks) > 1 and ranks[0].any() and all(np.array_equal(one, ranks[0]) for one in ranks)
        n_same += bool(same)
        logical = np.zeros((1, len(mapped), n_experts), dtype=np.int64)
        np.add.at(logical[0], (layers, mapped), ranks[0] if same else sum(ranks))
        yield logical
        at = end
    if n_same:
        notes.append(f"{n_same} passes counted once: every rank recorded the same tokens")


def _physical(one: _Pass, shape: tuple[int, ...]) -> NDArray[np.int64]:
    place = f"{one[2]}: global_physical_count"
    counts = whole_numbers(one[3].get("global_physical_count", ()), place)
    if counts.shape != shape or counts.min() < 0:
        raise refuse(place, f"has counts of the map's shape {shape}", value=counts.shape)
    return counts


def _per_token(place: str, passes: list[_Pass], mapped: NDArray[np.int64], told: Told) -> Incoming:
    layers, top_k = _layers_and_top_k(place, passes, mapped, told)
    notes = _map_notes(mapped)
    dense = len(mapped) - len(layers)
    if dense:
        notes.append(f"{dense} layers without choices taken as dense and dropped")
    modes = {one[3].get("forward_mode") for one in passes if len(one[3].get("input_ids") or ())}
    kinds = {str(_EXTEND): "prefill", str(_DECODE): "decode"}
    phase = kinds.get(str(modes.pop()), "mixed") if len(modes) == 1 else "mixed"
    if phase != "prefill":
        notes.append(
            "decode passes do not name their requests: each of their tokens is a sequence of its own"
        )
    incoming = Incoming(
        place=place,
        source=f"{Path(place).name} (SGLang recorder, per_token)",
        layer_ids=tuple(int(layer) for layer in layers),
        top_k=top_k,
        n_experts=told.n_experts or int(mapped.max()) + 1,
        phase=phase,
        notes=notes,
    )
    incoming.tokens = _token_blocks(passes, mapped, layers, top_k, notes)
    return incoming


def _chosen(one: _Pass, mapped: NDArray[np.int64]) -> NDArray[Any]:
    """Physical ids of one record: (layers, tokens, width)."""
    place = f"{one[2]}: topk_ids_of_layer"
    ids = one[3].get("topk_ids_of_layer")
    if (
        not isinstance(ids, np.ndarray)
        or ids.ndim != 3
        or ids.dtype.kind not in "iu"
        or len(ids) != len(mapped)
    ):
        shape = ids.shape if isinstance(ids, np.ndarray) else type(ids).__name__
        raise refuse(place, f"is ({len(mapped)} layers, tokens, width) of whole numbers", value=shape)
    if ids.size and not -1 <= int(ids.min()) <= int(ids.max()) < mapped.shape[1]:
        value = int(ids.min()) if int(ids.min()) < -1 else int(ids.max())
        raise refuse(
            place, f"ids of physical experts lie in 0..{mapped.shape[1] - 1}, or are -1", value=value
        )
    return ids


def _layers_and_top_k(
    place: str, passes: list[_Pass], mapped: NDArray[np.int64], told: Told
) -> tuple[NDArray[np.int64], int]:
    """MoE layers and width of the choice, from the first pass that has tokens."""
    for one in passes:
        ids = _chosen(one, mapped)
        layers = np.flatnonzero((ids >= 0).any((1, 2)))
        if layers.size:
            return layers, told.top_k or int(np.flatnonzero((ids >= 0).any((0, 1)))[-1]) + 1
    raise refuse(place, "at least one pass has tokens")


def _token_blocks(
    passes: list[_Pass], mapped: NDArray[np.int64], layers: NDArray[np.int64], top_k: int, notes: list[str]
) -> Iterator[Block]:
    seen: set[bytes] = set()
    current, n_twice = None, 0
    for one in passes:
        if one[0] != current:
            current, seen = one[0], set()
        ids = _chosen(one, mapped)
        if not ids.shape[1]:
            continue
        if ids.shape[2] < top_k or (ids[:, :, top_k:] >= 0).any():
            rule = f"has choices of top_k={top_k} experts"
            raise refuse(f"{one[2]}: topk_ids_of_layer", rule, fix="name the model that was recorded")
        raw = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        if raw in seen:
            n_twice += ids.shape[1]
            continue
        seen.add(raw)
        chosen = ids[layers, :, :top_k]
        at = np.maximum(chosen, 0).reshape(len(layers), -1)
        logical = np.take_along_axis(mapped[layers], at, axis=1).reshape(chosen.shape)
        logical[chosen < 0] = -1
        yield Block(logical.transpose(1, 0, 2), ends=_ends(one), whole=True)
    if n_twice:
        notes.append(f"{n_twice} tokens counted once: several ranks recorded the same ones")


def _ends(one: _Pass) -> tuple[int, ...]:
    """Rows before which a sequence of the pass ends."""
    n = int(one[3]["topk_ids_of_layer"].shape[1])
    lengths = one[3].get("extend_seq_lens")
    if lengths is not None:
        bounds = np.cumsum(whole_numbers(lengths, f"{one[2]}: extend_seq_lens"))
        if bounds.size and bounds[-1] == n and np.diff(bounds, prepend=0).min() >= 0:
            return tuple(int(end) for end in bounds)
    return tuple(range(1, n + 1)) if one[3].get("forward_mode") == _DECODE else (n,)
