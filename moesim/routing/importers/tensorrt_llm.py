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

from moesim.routing.importers.files import Rows, json_whole, map_safetensors, whole_numbers
from moesim.routing.importers.incoming import Block, Incoming, Told, refuse

__all__ = ["incoming"]

_KEY = re.compile(r"(\d{1,9})_(\d{1,9})")
_RANK = re.compile(r"rank(\d{1,6})(_raw)?\.safetensors")
_FIX = "give the folder that EXPERT_STATISTIC_PATH named"

_Tensors = dict[tuple[int, int], Rows]
"""Tensors by iteration and layer."""


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
    opened = [(str(file), _tensors(file)) for _, file in sorted(raw or counted)]
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


def _tensors(file: Path) -> _Tensors:
    tensors: _Tensors = {}
    for name, rows in map_safetensors(file).items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise refuse(file, "names tensors {iteration}_{layer}", value=name, fix=_FIX)
        tensors[int(match[1]), int(match[2])] = rows
    return tensors


def _steps_and_layers(folder: Path, opened: list[tuple[str, _Tensors]]) -> tuple[list[int], list[int]]:
    keys = {key for _, tensors in opened for key in tensors}
    steps, layers = sorted({step for step, _ in keys}), sorted({layer for _, layer in keys})
    if not keys:
        raise refuse(folder, "holds at least one iteration", fix="check EXPERT_STATISTIC_ITER_RANGE")
    if len(keys) != len(steps) * len(layers):
        step, layer = next((s, n) for s in steps for n in layers if (s, n) not in keys)
        raise refuse(folder, "every iteration has every layer", value=f"{step}_{layer} is missing")
    return steps, layers


def _counts(
    opened: list[tuple[str, _Tensors]], steps: list[int], layers: list[int], n_experts: int
) -> Iterator[NDArray[np.int64]]:
    for step in steps:
        total = np.zeros((1, len(layers), n_experts), dtype=np.int64)
        for place, tensors in opened:
            for number, layer in enumerate(layers):
                if (step, layer) in tensors:
                    where = f"{place}: {step}_{layer}"
                    counts = whole_numbers(tensors[step, layer], where, n_experts)
                    if counts.min() < 0:
                        raise refuse(where, "counts are not negative", value=int(counts.min()))
                    total[0, number] += counts
        yield total


def _blocks(
    opened: list[tuple[str, _Tensors]], steps: list[int], layers: list[int], top_k: int
) -> Iterator[Block]:
    for step in steps:
        for place, tensors in opened:
            present = [layer for layer in layers if (step, layer) in tensors]
            if not present:
                continue
            if len(present) < len(layers):
                raise refuse(f"{place}: iteration {step}", "has every layer", value=len(present))
            planes = [_plane(f"{place}: {step}_{layer}", tensors[step, layer], top_k) for layer in layers]
            if len({len(plane) for plane in planes}) > 1:
                value = sorted({len(plane) for plane in planes})
                raise refuse(f"{place}: iteration {step}", "has as many tokens in every layer", value=value)
            yield Block(np.stack(planes, axis=1), whole=True)


def _plane(place: str, rows: Rows, top_k: int) -> NDArray[Any]:
    if isinstance(rows, np.ndarray) and rows.ndim == 2 and rows.shape[1] == top_k and rows.dtype.kind in "ui":
        return rows
    raise refuse(place, f"is (tokens, top_k {top_k}) of whole numbers", value=rows.shape)
