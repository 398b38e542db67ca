"""TensorRT-LLM's expert statistics: a folder with meta_info.json and one safetensors file a rank.

Layouts: ``tensorrt_llm/_torch/expert_statistic.py`` and ``examples/wide_ep/ep_load_balancer/utils.py``: tensors
``{iteration}_{layer}``, either tokens per expert or, in ``rank{r}_raw.safetensors``, the experts of each token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.importers.files import Entry, Rows, json_whole, safetensors_entries, whole_numbers
from moesim.routing.importers.incoming import Block, Incoming, Told, refuse

__all__ = ["incoming"]

_KEY = re.compile(r"(\d{1,9})_(\d{1,9})")
_RANK = re.compile(r"rank(\d{1,6})(_raw)?\.safetensors")
_FIX = "give the folder that EXPERT_STATISTIC_PATH named"


class _Rank:
    """One rank's tensors, found by iteration and layer; a few bytes are held of each, however many there are."""

    def __init__(self, file: Path) -> None:
        self.place = str(file)
        entries, self._data = safetensors_entries(file)
        self.keys = np.empty((len(entries), 2), dtype=np.int64)
        self._spans = np.empty((len(entries), 3), dtype=np.int64)
        kinds = {(entry.dtype, *entry.shape[1:], len(entry.shape)) for entry in entries.values()}
        if len(kinds) > 1:
            raise refuse(
                file, "tensors are all counts, or all experts of tokens", value=sorted(map(str, kinds))
            )
        for number, (name, entry) in enumerate(entries.items()):
            match = _KEY.fullmatch(name)
            if match is None:
                raise refuse(file, "names tensors {iteration}_{layer}", value=name, fix=_FIX)
            self.keys[number] = int(match[1]), int(match[2])
            self._spans[number] = entry.begin, entry.end, entry.shape[0] if entry.shape else 0
        self._kind = next(iter(entries.values()), None)
        flat = self.keys[:, 0] << 32 | self.keys[:, 1]
        self._order = np.argsort(flat, kind="stable")
        self._flat = flat[self._order]

    def get(self, step: int, layer: int) -> Rows | None:
        """Map the tensor of an iteration and layer."""
        key = step << 32 | layer
        at = int(np.searchsorted(self._flat, key))
        if self._kind is None or at == len(self._flat) or self._flat[at] != key:
            return None
        begin, end, rows = (int(n) for n in self._spans[self._order[at]])
        shape = (rows, *self._kind.shape[1:]) if self._kind.shape else ()
        return Entry(self._kind.dtype, shape, begin, end).mapped(self._data)


def incoming(files: list[Path], told: Told) -> Incoming:
    """Read a folder; the experts of each token where they are there, else counts.

    Raises
    ------
    TraceError
        If files are missing or damaged, or layers differ between iterations.
    """
    folder = files[0] if len(files) == 1 and files[0].is_dir() else files[0].parent
    meta = folder / "meta_info.json"
    if not meta.is_file():
        raise refuse(folder, "has meta_info.json and rank*.safetensors", fix=_FIX)
    info = json_whole(meta)
    if not isinstance(info, dict):
        raise refuse(meta, "is a JSON object with num_experts and num_experts_per_token")
    n_experts, top_k = (_size(meta, info, key) for key in ("num_experts", "num_experts_per_token"))
    ranks = {match: file for file in sorted(folder.iterdir()) if (match := _RANK.fullmatch(file.name))}
    raw = [(int(match[1]), file) for match, file in ranks.items() if match[2]]
    counted = [(int(match[1]), file) for match, file in ranks.items() if not match[2]]
    if not raw and not counted:
        raise refuse(folder, "has meta_info.json and rank*.safetensors", fix=_FIX)
    opened = [_Rank(file) for _, file in sorted(raw or counted)]
    steps, layers = _steps_and_layers(folder, opened)
    notes = [] if raw or len(opened) == 1 else [f"counts of {len(opened)} ranks summed"]
    one = Incoming(
        place=str(folder),
        source=f"{folder.name} (TensorRT-LLM expert statistics)",
        layer_ids=tuple(layers),
        top_k=top_k,
        n_experts=n_experts,
        passes=True,
        notes=notes,
    )
    if raw:
        notes.append("which tokens form a sequence is not recorded: all stand in one")
        one.tokens = _blocks(opened, steps, layers, top_k)
    else:
        one.counts = _counts(opened, steps, layers, n_experts)
    return one


def _size(meta: Path, info: dict[str, Any], key: str) -> int:
    value = info.get(key)
    if not isinstance(value, int) or value < 1:
        raise refuse(f"{meta}: {key}", "is a whole number, at least 1", value=value, fix=_FIX)
    return value


def _steps_and_layers(folder: Path, opened: list[_Rank]) -> tuple[list[int], list[int]]:
    keys = np.unique(np.concatenate([rank.keys for rank in opened]), axis=0)
    steps, layers = np.unique(keys[:, 0]).tolist(), np.unique(keys[:, 1]).tolist()
    if not steps:
        raise refuse(folder, "holds at least one iteration", fix="check EXPERT_STATISTIC_ITER_RANGE")
    if len(keys) != len(steps) * len(layers):
        found, counts = np.unique(keys[:, 0], return_counts=True)
        step = int(found[counts.argmin()])
        value = f"iteration {step} has {int(counts.min())} of {len(layers)}"
        raise refuse(folder, "every iteration has every layer", value=value)
    return steps, layers


def _counts(
    opened: list[_Rank], steps: list[int], layers: list[int], n_experts: int
) -> Iterator[NDArray[np.int64]]:
    for step in steps:
        total = np.zeros((1, len(layers), n_experts), dtype=np.int64)
        for rank in opened:
            for number, layer in enumerate(layers):
                tensor = rank.get(step, layer)
                if tensor is not None:
                    where = f"{rank.place}: {step}_{layer}"
                    counts = whole_numbers(tensor, where, n_experts)
                    if counts.min() < 0:
                        raise refuse(where, "counts are not negative", value=int(counts.min()))
                    total[0, number] += counts
        yield total


def _blocks(opened: list[_Rank], steps: list[int], layers: list[int], top_k: int) -> Iterator[Block]:
    for step in steps:
        for rank in opened:
            tensors = [tensor for layer in layers if (tensor := rank.get(step, layer)) is not None]
            if not tensors:
                continue
            place = f"{rank.place}: iteration {step}"
            if len(tensors) < len(layers):
                raise refuse(place, f"has all {len(layers)} layers", value=len(tensors))
            planes = [
                _plane(f"{rank.place}: {step}_{n}", one, top_k)
                for n, one in zip(layers, tensors, strict=True)
            ]
            if len({len(plane) for plane in planes}) > 1:
                value = sorted({len(plane) for plane in planes})
                raise refuse(place, "has as many tokens in every layer", value=value)
            yield Block(np.stack(planes, axis=1), whole=True)


def _plane(place: str, rows: Rows, top_k: int) -> NDArray[Any]:
    if isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.shape[1] == top_k and rows.dtype.kind in "ui":
        return rows
    raise refuse(place, f"is (tokens, top_k {top_k}) of whole numbers", value=rows.shape)
