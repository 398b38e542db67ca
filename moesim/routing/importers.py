"""Routing in other programs' files, and `open_trace` for any of them.

Nothing here unpickles: ``.pt`` and ``.pkl`` files are refused.
"""

from __future__ import annotations

import difflib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.routing.batches import RoutingSource
from moesim.routing.catalog import catalog_names, catalog_routing, read_generator
from moesim.routing.trace import RoutingTrace, read_trace

__all__ = ["open_trace", "read_npz", "read_sglang_counts"]

_LARGEST_JSON_BYTES = 256 * 10**6
"""Parsed whole, a file takes some ten times its size in memory."""

_UNEQUAL_FRACTION = 0.01


def open_trace(name_or_path: str | Path, *, n_experts: int | None = None) -> RoutingSource:
    """Open routing by catalog name or file, of whichever format the file is.

    Parameters
    ----------
    name_or_path
        Name in the catalog; or a ``.safetensors`` trace, an SGLang count ``.json``, a token-level
        ``.npz``, a generator ``.yaml``.
    n_experts
        Experts of the model, for the formats that do not state them; the largest id + 1 where None.

    Returns
    -------
    RoutingSource
        A trace, or a generator.

    Raises
    ------
    TraceError
        If there is neither such a name nor such a file, or the file breaks a rule.
    """
    if str(name_or_path) in catalog_names():
        return catalog_routing(str(name_or_path))
    file = Path(name_or_path)
    if not file.is_file():
        names = catalog_names()
        near = difflib.get_close_matches(str(name_or_path), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        fix = f"{hint}catalog: {', '.join(names)}; or give a .safetensors, .json, .npz or .yaml file"
        raise TraceError("neither a routing in the catalog nor a file", value=str(name_or_path), fix=fix)
    suffix = file.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return read_generator(file)
    with file.open("rb") as stream:
        start = stream.read(9)
    if suffix in (".pt", ".pth", ".pkl", ".pickle") or (start[:1] == b"\x80" and suffix != ".safetensors"):
        fix = "export it as .safetensors, .npz or count .json"
        raise TraceError("pickled files are not opened, they can hold code", place=str(file), fix=fix)
    if suffix == ".npz" or start[:4] == b"PK\x03\x04":
        return read_npz(file, n_experts=n_experts)
    if suffix == ".json" or (suffix != ".safetensors" and start[:1] == b"{"):
        return read_sglang_counts(file)
    return read_trace(file)


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
    file = Path(path)
    if file.stat().st_size > _LARGEST_JSON_BYTES:
        raise TraceError(
            f"a count file has at most {_LARGEST_JSON_BYTES // 10**6} MB, since it is parsed whole",
            value=file.stat().st_size,
            place=str(file),
            fix="sum its steps up, as the recorder's `stat` mode does, or give token-level .npz",
        )
    try:
        data: Any = json.loads(file.read_bytes())
        counts = np.asarray(data["logical_count"], dtype=np.float64)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise TraceError("is not JSON", place=str(file)) from None
    except (KeyError, TypeError, ValueError):
        rule = "states logical_count: one list of tokens per expert for each layer, all of one length"
        raise TraceError(rule, place=str(file), fix="use the recorder's `stat` mode") from None
    if counts.ndim == 2:
        counts = counts[None]
    if counts.ndim != 3 or counts.size == 0:
        raise TraceError(
            "is (layers, experts) or (steps, layers, experts)",
            value=counts.shape,
            place=f"{file}: logical_count",
        )
    bad = ~np.isfinite(counts) | (counts < 0) | (counts != np.floor(counts))
    if bad.any():
        step, layer, expert = (int(v) for v in np.argwhere(bad)[0])
        value = float(counts[step, layer, expert])
        place = f"{file}: logical_count[{layer}][{expert}]"
        raise TraceError("counts are whole numbers, 0 or more", value=value, place=place)
    totals = counts.sum((0, 2))
    layers = np.flatnonzero(totals > 0)
    if layers.size == 0:
        raise TraceError("at least one layer has tokens", place=f"{file}: logical_count")
    try:
        return RoutingTrace(
            model=model,
            n_experts=counts.shape[2],
            top_k=top_k,
            layer_ids=tuple(int(i) for i in layers),
            phase=_phase_of(file),
            source=f"{file.name} (SGLang logical_count)",
            expert_counts=counts[:, layers].astype(np.int64),
            notes=_count_notes(totals, layers),
        )
    except TraceError as error:
        raise error.at(f"{file}: {error.place}") from None


def _count_notes(totals: NDArray[np.float64], layers: NDArray[np.int64]) -> tuple[str, ...]:
    notes = []
    if layers.size < totals.size:
        notes.append(f"{totals.size - layers.size} layers without counts taken as dense and dropped")
    kept = totals[layers]
    spread = float(kept.max() / kept.min() - 1)
    if spread > _UNEQUAL_FRACTION:
        lowest, highest = int(layers[kept.argmin()]), int(layers[kept.argmax()])
        notes.append(
            f"warning: layer totals differ by {spread:.1%} (layer {lowest}: {kept.min():.0f}, "
            f"layer {highest}: {kept.max():.0f}); each layer is scaled to its own total"
        )
    return tuple(notes)


def _phase_of(file: Path) -> str:
    for phase in ("decode", "prefill"):
        if phase in file.stem.lower():
            return phase
    return "unknown"


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
    file = Path(path)
    try:
        # Opened here, because np.load leaves a file open that turns out not to be an archive.
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive of named ones")
            names = ("expert_ids", "expert_weights", "sequence_offsets", "n_experts", "layer_ids")
            arrays = {name: archive[name] for name in names if name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        rule = "is an .npz of plain arrays (nothing is unpickled)"
        first = (str(error).splitlines() or ["unreadable"])[0]
        raise TraceError(rule, value=first, place=str(file)) from None
    ids = arrays.get("expert_ids")
    if ids is None or ids.ndim != 3 or ids.dtype.kind not in "ui" or ids.size == 0:
        value = None if ids is None else (ids.shape, str(ids.dtype))
        raise TraceError(
            "expert_ids are whole numbers (tokens, moe_layers, top_k)", value=value, place=str(file)
        )
    stated = int(arrays["n_experts"]) if "n_experts" in arrays else n_experts
    notes = () if stated else (f"n_experts taken as the largest id + 1 = {int(ids.max()) + 1}",)
    layer_ids = arrays.get("layer_ids", np.arange(ids.shape[1]))
    weights = arrays.get("expert_weights")
    try:
        trace = RoutingTrace(
            model=model,
            n_experts=stated or int(ids.max()) + 1,
            top_k=int(ids.shape[2]),
            layer_ids=tuple(int(i) for i in layer_ids.ravel()),
            phase=_phase_of(file),
            source=file.name,
            expert_ids=ids,
            expert_weights=weights,
            sequence_offsets=arrays.get("sequence_offsets"),
            notes=notes,
        )
        trace.check()
    except TraceError as error:
        raise error.at(f"{file}: {error.place}") from None
    return trace
