"""vLLM's routed experts: .npy arrays, or base64 of them inside HTTP responses.

Layouts: ``vllm/outputs.py`` and ``vllm/entrypoints/openai`` of vLLM 0.33.0: a response has the experts of all its
tokens but the last as ``routed_experts``; since 0.21 some builds give ``prompt_routed_experts`` apart. SGLang's
``meta_info.routed_experts`` is the same as bare int32, without a header.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.importers.files import NpyStream, json_lines, json_whole, map_npy, reading, rows_at_once
from moesim.routing.importers.incoming import Block, Incoming, Told, refuse

__all__ = ["from_sequences", "incoming"]

_RULE = "is (tokens, layers, top_k) of whole numbers"


def incoming(files: list[Path], told: Told) -> Incoming:
    """Read .npy files, each of them one sequence; or responses, one in a .json or one a line in a .jsonl.

    Raises
    ------
    TraceError
        If the files are no such arrays or responses, or do not agree in layers and top_k.
    """
    notes: list[str] = []
    place = str(files[0] if len(files) == 1 else files[0].parent)
    if files[0].suffix.lower() == ".npy":
        sequences = ((str(file), map_npy(file)) for file in files)
        return from_sequences(place, sequences, told, notes)
    return from_sequences(place, _responses(files, told, notes), told, notes)


def from_sequences(
    place: str, sequences: Iterator[tuple[str, NDArray[Any]]], told: Told, notes: list[str]
) -> Incoming:
    """Take sequences of (tokens, layers, top_k) one after the other, each with its place.

    Raises
    ------
    TraceError
        If there is none, or an array is not of whole numbers and three axes.
    """
    first = next(sequences, None)
    if first is None:
        rule = "holds routed_experts in at least one response"
        raise refuse(place, rule, fix="start vLLM with --enable-return-routed-experts")
    shape = first[1].shape[1:]
    if first[1].ndim != 3 or first[1].dtype.kind not in "ui" or 0 in shape:
        raise refuse(first[0], _RULE, value=(first[1].shape, str(first[1].dtype)))
    if told.layer_ids is not None and len(told.layer_ids) != shape[0]:
        rule = f"has the {len(told.layer_ids)} MoE layers of the model"
        raise refuse(place, rule, value=shape[0], fix="name the model that was recorded")
    return Incoming(
        place=place,
        source=f"{Path(place).name} (vLLM routed_experts)",
        layer_ids=told.layer_ids or tuple(range(shape[0])),
        top_k=shape[1],
        n_experts=told.n_experts,
        tokens=_blocks(itertools.chain([first], sequences), shape),
        phase="mixed",
        notes=notes,
    )


def _blocks(sequences: Iterator[tuple[str, NDArray[Any]]], shape: tuple[int, ...]) -> Iterator[Block]:
    step = rows_at_once(shape[0] * shape[1])
    for place, ids in sequences:
        if ids.ndim != 3 or ids.shape[1:] != shape or ids.dtype.kind not in "ui":
            rule = f"is (tokens, {shape[0]} layers, top_k {shape[1]}) as the first sequence is"
            raise refuse(place, rule, value=(ids.shape, str(ids.dtype)))
        for at in range(0, len(ids), step):
            part = np.asarray(ids[at : at + step])
            if part.dtype.kind == "u" and part.dtype.itemsize < 8 and part.size:
                part = _unset(part)
            last = at + step >= len(ids)
            yield Block(part, ends=(len(part),) if last else (), whole=last and at == 0)


def _unset(ids: NDArray[Any]) -> NDArray[Any]:
    """Undo -1 stored without a sign: tokens whose every id is the type's largest value."""
    largest = np.iinfo(ids.dtype).max
    rows = (ids == largest).all((1, 2))
    if not rows.any() or ids.shape[2] < 2:  # one largest id a token can be a real expert
        return ids
    signed = ids.astype(np.int64)
    signed[rows] = -1
    return signed


def _responses(files: list[Path], told: Told, notes: list[str]) -> Iterator[tuple[str, NDArray[Any]]]:
    for file in files:
        if file.suffix.lower() == ".jsonl":
            for number, response in json_lines(file, notes):
                yield from _sequences(f"{file}:{number}", response, told)
        else:
            data = json_whole(file)
            for number, response in enumerate(data if isinstance(data, list) else [data]):
                yield from _sequences(f"{file}: response {number}", response, told)


def _sequences(place: str, response: Any, told: Told) -> Iterator[tuple[str, NDArray[Any]]]:
    """One sequence a choice: its prompt, where that is apart, before its answer."""
    if not isinstance(response, dict):
        raise refuse(place, "is the JSON object of a response", value=type(response).__name__)
    choices = response.get("choices", [response])
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise refuse(f"{place}: choices", "is a list of objects")
    for number, choice in enumerate(choices):
        meta = choice.get("meta_info") if isinstance(choice.get("meta_info"), dict) else {}
        told_apart = choice.get("prompt_routed_experts", response.get("prompt_routed_experts"))
        parts = [told_apart, choice.get("routed_experts", (meta or {}).get("routed_experts"))]
        arrays = [
            _array(f"{place}: choices[{number}]: {name}", part, told)
            for name, part in zip(("prompt_routed_experts", "routed_experts"), parts, strict=True)
            if part is not None
        ]
        if arrays:
            if any(one.ndim != 3 or one.shape[1:] != arrays[0].shape[1:] for one in arrays):
                raise refuse(f"{place}: choices[{number}]", _RULE, value=[one.shape for one in arrays])
            yield f"{place}: choices[{number}]", np.concatenate(arrays)


def _array(place: str, told: Any, model: Told) -> NDArray[Any]:
    if isinstance(told, list):
        with reading(place, _RULE):
            return _whole(np.asarray(told))
    if not isinstance(told, str):
        raise refuse(place, "is base64 or nested lists", value=type(told).__name__)
    try:
        raw = base64.b64decode(told, validate=True)
    except (binascii.Error, ValueError):
        raise refuse(place, "is base64", value=told[:20]) from None
    if raw[:6] == b"\x93NUMPY":
        head = NpyStream(io.BytesIO(raw), place)
        if len(head.shape) != 3 or head.dtype.kind not in "ui":
            raise refuse(place, _RULE, value=(head.shape, str(head.dtype)))
        return head.take(head.shape[0])
    if model.layer_ids is None or model.top_k is None:
        rule = "without a header (SGLang) its layers and top_k must be known"
        raise refuse(place, rule, fix="add --model")
    with reading(place, f"is int32 (tokens, {len(model.layer_ids)}, {model.top_k})"):
        return np.frombuffer(raw, "<i4").reshape(-1, len(model.layer_ids), model.top_k)


def _whole(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "ui" or array.ndim != 3:
        raise ValueError(f"{array.dtype} {array.shape}")
    return array
