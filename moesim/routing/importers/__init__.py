"""Routing in other programs' files, and `open_trace` for any of them.

Nothing here unpickles. A ``.pt`` is refused unless the caller brings a loader for it, as `moesim trace import` does.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesim.errors import TraceError
from moesim.routing.batches import RoutingSource
from moesim.routing.catalog import catalog_names, catalog_routing, read_generator
from moesim.routing.importers import huggingface, imatrix, megatron, npz, sglang, tensorrt_llm, vllm
from moesim.routing.importers.detect import detect_format, files_of, is_pickled
from moesim.routing.importers.incoming import Block, Incoming, Told, gathered, written
from moesim.routing.importers.npz import read_npz
from moesim.routing.importers.sglang import read_sglang_counts
from moesim.routing.trace import RoutingTrace, read_trace

__all__ = [
    "FORMATS",
    "Block",
    "Incoming",
    "Told",
    "gathered",
    "incoming_routing",
    "open_trace",
    "read_npz",
    "read_sglang_counts",
    "written",
]

_READERS: dict[str, Callable[[list[Path], Told], Incoming]] = {
    "sglang": sglang.incoming,
    "vllm": vllm.incoming,
    "trtllm": tensorrt_llm.incoming,
    "megatron": megatron.incoming,
    "hf": huggingface.incoming,
    "imatrix": imatrix.incoming,
    "npz": npz.incoming,
}

FORMATS = ("auto", *_READERS)
"""What `moesim trace import --format` takes."""

_SUFFIXES = ".safetensors, .json, .jsonl, .npz, .npy, .gguf or .yaml"


def open_trace(name_or_path: str | Path, *, n_experts: int | None = None) -> RoutingSource:
    """Open routing by catalog name or file, of whichever format the file is.

    Parameters
    ----------
    name_or_path
        Name in the catalog; a generator ``.yaml``; a moesim trace, which stays mapped to its file; or any
        recording that `moesim trace import` reads without an extra package, which is held in memory.
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
    if not file.exists():
        names = catalog_names()
        near = difflib.get_close_matches(str(name_or_path), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        fix = f"{hint}catalog: {', '.join(names)}; or give a {_SUFFIXES} file"
        raise TraceError("neither a routing in the catalog nor a file", value=str(name_or_path), fix=fix)
    if file.suffix.lower() in (".yaml", ".yml"):
        return read_generator(file)
    one = incoming_routing(file, told=Told(n_experts=n_experts))
    return one if isinstance(one, RoutingTrace) else gathered(one)


def incoming_routing(
    source: str | Path,
    format_: str = "auto",
    *,
    told: Told | None = None,
    load: Callable[[Path], Any] | None = None,
) -> Incoming | RoutingTrace:
    """Open another program's recording, without reading it through.

    Parameters
    ----------
    source
        File, folder, or pattern with ``*``.
    format_
        One of `FORMATS`.
    told
        What the user says of the model.
    load
        Opens a ``.pt`` without running code in it, and gives its content with NumPy arrays for tensors.

    Returns
    -------
    Incoming or RoutingTrace
        To be `written` or `gathered`; a trace where the file is moesim's own.

    Raises
    ------
    TraceError
        If there is no such file, or it is not of that format.
    """
    told = told or Told()
    if format_ not in FORMATS:
        fix = ", ".join(FORMATS)
        raise TraceError("is no known format", value=format_, place="--format", fix=fix)
    files = files_of(source, format_)
    if any(is_pickled(file) for file in files):
        return _pickled(files, format_, told, load)
    name = detect_format(files) if format_ == "auto" else format_
    if name == "moesim":
        return read_trace(files[0])
    try:
        return _READERS[name](files, told)
    except TraceError as error:
        if format_ == "auto" or error.fix is not None:
            raise
        raise TraceError(error.rule, value=error.value, place=error.place, fix="check --format") from None


def _pickled(files: list[Path], format_: str, told: Told, load: Callable[[Path], Any] | None) -> Incoming:
    if load is None or format_ not in ("auto", "sglang", "hf"):
        fix = "bring a .pt of SGLang or transformers in with `moesim trace import`"
        raise TraceError("pickled files are not opened, they can hold code", place=str(files[0]), fix=fix)
    contents = [(file, load(file)) for file in files]
    first = contents[0][1]
    of_sglang = isinstance(first, dict) and bool({"records", "logical_count"} & set(first))
    if format_ == "sglang" or (format_ == "auto" and of_sglang):
        return sglang.from_recordings(contents, told)
    if len(files) != 1:
        raise TraceError(
            "one file of logits at a time", value=len(files), place=str(files[0]), fix="name one file"
        )
    return huggingface.from_tensors(files[0], huggingface.named(files[0], first), told)
