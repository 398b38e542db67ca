"""Megatron-LM's router trace: one JSONL file a rank, one line a step and layer.

Layout: ``megatron/core/transformer/moe/router_trace.py``. A step of training runs several micro-batches, so a layer
comes up several times in it; pipeline stages hold different layers, and their files are joined rank by rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.importers.files import json_lines, whole_numbers
from moesim.routing.importers.incoming import Block, Incoming, Told, refuse

__all__ = ["incoming"]

_Pass = tuple[int, int, NDArray[np.int64]]
"""Step, number of the micro-batch in it, ids (tokens, layers, top_k)."""


def incoming(files: list[Path], told: Told) -> Incoming:
    """Read the files of one or many ranks.

    Raises
    ------
    TraceError
        If a line is no such record, or ranks do not fit together.
    """
    notes: list[str] = []
    place = str(files[0] if len(files) == 1 else files[0].parent)
    heads = [(_Layers(file), file) for file in files]
    stages: dict[tuple[int, ...], list[Path]] = {}
    for head, file in heads:
        stages.setdefault(head.layers, []).append(file)
    layers = sorted(layer for stage in stages for layer in stage)
    if len(set(layers)) < len(layers) or len({len(stage) for stage in stages.values()}) > 1:
        rule = "ranks hold the same layers, or as pipeline stages different ones in equal numbers"
        raise refuse(
            place, rule, value={str(k): len(v) for k, v in stages.items()}, fix="give every rank's file"
        )
    widths = {head.top_k for head, _ in heads}
    if len(widths) > 1:
        raise refuse(place, "all ranks have one top_k", value=sorted(widths))
    if len(stages) > 1:
        notes.append(f"{len(stages)} pipeline stages joined, rank by rank in order")
    n_mtp = sum(head.n_mtp for head, _ in heads)
    if n_mtp:
        notes.append(f"records of multi-token prediction (mtp_idx) dropped, {n_mtp} in the first step")
    notes.append("which tokens form a sequence is not recorded: all stand in one")
    return Incoming(
        place=place,
        source=f"{Path(place).name} (Megatron-LM router trace)",
        layer_ids=tuple(layers),
        top_k=widths.pop(),
        n_experts=told.n_experts,
        tokens=_joined(place, stages, notes),
        phase="unknown",
        notes=notes,
    )


class _Layers:
    """Layers and top_k of a rank, from its first step."""

    def __init__(self, file: Path) -> None:
        first: int | None = None
        layers: set[int] = set()
        self.top_k, self.n_mtp = 0, 0
        for number, record in json_lines(file, []):
            if "mtp_idx" in record:
                self.n_mtp += 1
                continue
            step, layer, ids = _record(f"{file}:{number}", record)
            if first is not None and step != first:
                break
            first = step
            layers.add(layer)
            self.top_k = ids.shape[1]
        if not layers:
            raise refuse(file, "holds at least one record", fix="run it with --moe-routing-trace-path")
        self.layers = tuple(sorted(layers))


def _record(place: str, record: dict[str, Any]) -> tuple[int, int, NDArray[np.int64]]:
    try:
        step, layer, rows = record["step"], record["layer"], record["top_indices"]
    except KeyError as error:
        raise refuse(place, "has step, layer and top_indices", value=f"no {error}") from None
    ids = whole_numbers(rows, f"{place}: top_indices")
    if not ids.size and isinstance(record.get("topk"), int):
        ids = ids.reshape(0, min(max(record["topk"], 0), 1024))
    if not isinstance(step, int) or not isinstance(layer, int) or layer < 0:
        raise refuse(place, "step and layer are whole numbers", value=(step, layer))
    if ids.ndim != 2 or not ids.shape[1] or record.get("num_tokens", len(ids)) != len(ids):
        rule = f"is (num_tokens {record.get('num_tokens')}, topk) of expert ids"
        raise refuse(f"{place}: top_indices", rule, value=ids.shape)
    return step, layer, ids


def _passes(file: Path, layers: tuple[int, ...], notes: list[str]) -> Iterator[_Pass]:
    """Passes of one rank; a step is held until the next one begins."""
    waiting: dict[int, list[NDArray[np.int64]]] = {}
    current = None
    for number, record in json_lines(file, notes):
        if "mtp_idx" in record:
            continue
        step, layer, ids = _record(f"{file}:{number}", record)
        if layer not in layers:
            raise refuse(
                f"{file}:{number}: layer", f"is one of those of the first step {layers}", value=layer
            )
        if step != current:
            yield from _step(file, current, waiting, layers, notes)
            current, waiting = step, {}
        waiting.setdefault(layer, []).append(ids)
    yield from _step(file, current, waiting, layers, notes)


def _step(
    file: Path,
    step: int | None,
    waiting: dict[int, list[NDArray[np.int64]]],
    layers: tuple[int, ...],
    notes: list[str],
) -> Iterator[_Pass]:
    if step is None:
        return
    found = [waiting.get(layer, []) for layer in layers]
    whole = min(len(one) for one in found)
    for number in range(whole):
        planes = [one[number] for one in found]
        if len({plane.shape for plane in planes}) > 1:
            value = sorted({plane.shape for plane in planes})
            raise refuse(f"{file}: step {step}", "has as many tokens and experts in every layer", value=value)
        yield step, number, np.stack(planes, axis=1)
    if max(len(one) for one in found) > whole:
        notes.append(f"warning: step {step} of {file.name} lacks layers and its unfinished pass is left out")


def _joined(place: str, stages: dict[tuple[int, ...], list[Path]], notes: list[str]) -> Iterator[Block]:
    ordered = sorted(stages.items())
    columns = np.argsort([layer for layers, _ in ordered for layer in layers])
    ranks = [[_passes(file, layers, notes) for file in files] for layers, files in ordered]
    seen: set[bytes] = set()
    n_twice, current = 0, None
    for parts in _in_step(list(zip(*ranks, strict=True))):
        if len({(step, number, len(ids)) for step, number, ids in parts}) > 1:
            value = [(step, number, len(ids)) for step, number, ids in parts]
            raise refuse(
                place, "pipeline stages have the same passes", value=value, fix="give one run's files"
            )
        ids = np.concatenate([one for _, _, one in parts], axis=1)[:, columns]
        if parts[0][:2] != current:
            current, seen = parts[0][:2], set()
        digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        if digest in seen:
            n_twice += len(ids)
            continue
        seen.add(digest)
        yield Block(ids, whole=True)
    if n_twice:
        notes.append(f"{n_twice} tokens counted once: several ranks recorded the same ones")


def _in_step(ranks: list[tuple[Iterator[_Pass], ...]]) -> Iterator[list[_Pass]]:
    """Passes of all ranks in turn, one of each, until the first that has no more stages."""
    open_ranks = list(ranks)
    while open_ranks:
        left = []
        for stages in open_ranks:
            parts = [one for one in (next(stage, None) for stage in stages) if one is not None]
            if len(parts) == len(stages):
                yield parts
                left.append(stages)
        open_ranks = left
