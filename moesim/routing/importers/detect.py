"""Which program wrote a file or a folder, told by its names and its first bytes; nothing is unpickled."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from moesim.errors import TraceError
from moesim.routing.importers.files import DAMAGE, map_npy, map_safetensors
from moesim.routing.importers.incoming import refuse

__all__ = ["PICKLED", "detect_format", "files_of", "is_pickled"]

PICKLED = (".pt", ".pth", ".pkl", ".pickle")

_FOLDERS = (
    ("trtllm", "meta_info.json"),
    ("megatron", "router_trace_rank*.jsonl"),
    ("sglang", "expert_distribution_recorder_*.pt"),
    ("vllm", "*.npy"),
    ("vllm", "*.jsonl"),
)
"""What a folder of each format has in it, the surest first."""

_READ_BYTES = 2**20


def files_of(source: str | Path, format_: str) -> list[Path]:
    """Find the files of a recording: itself, those of a folder, or those that a pattern matches.

    Parameters
    ----------
    source
        File, folder, or pattern with ``*``.
    format_
        A format, or ``auto``: it says which files of a folder count.

    Raises
    ------
    TraceError
        If there is no such file, or the folder has none of the format.
    """
    path = Path(source)
    if path.is_dir():
        wanted = [pattern for name, pattern in _FOLDERS if format_ in ("auto", name)]
        for pattern in wanted:
            found = sorted(path.glob(pattern), key=_natural)
            if found:
                return [path] if pattern == "meta_info.json" else found
        fix = f"one with {', '.join(wanted)}" if wanted else f"name a file of format {format_}"
        raise refuse(path, "is not a folder that a known program wrote", fix=fix)
    if path.exists():
        return [path]
    pattern = str(path.relative_to(path.anchor))
    files = [one for one in sorted(Path(path.anchor).glob(pattern), key=_natural) if one.is_file()]
    if not files:
        raise TraceError("there is no such file", value=str(source))
    return files


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Order in which rank 10 comes after rank 9."""
    parts = []
    for part in "".join(c if c.isdigit() else f"\0{c}\0" for c in path.name).split("\0"):
        parts.append((part.isdigit(), int(part) if part.isdigit() else 0, part))
    return parts


def is_pickled(path: Path) -> bool:
    """Whether a file holds a pickle, by its name or its first bytes."""
    if path.is_dir():
        return False
    suffix = path.suffix.lower()
    if suffix in PICKLED:
        return True
    with path.open("rb") as stream:
        return suffix != ".safetensors" and stream.read(1) == b"\x80"


def detect_format(files: list[Path]) -> str:
    """Tell the format: trtllm, megatron, sglang, vllm, hf, imatrix, npz, or moesim's own.

    Parameters
    ----------
    files
        As `files_of` gives them; the first decides.

    Raises
    ------
    TraceError
        If it is none of them.
    """
    file = files[0]
    if file.is_dir():
        return "trtllm"
    suffix = file.suffix.lower()
    with file.open("rb") as stream:
        start = stream.read(_READ_BYTES)
    if start[:4] == b"GGUF" or suffix == ".gguf":
        return "imatrix"
    if start[:6] == b"\x93NUMPY" or suffix == ".npy":
        return "hf" if map_npy(file).dtype.kind == "f" else "vllm"
    if start[:4] == b"PK\x03\x04" or suffix == ".npz":
        return "npz" if "expert_ids.npy" in _members(file) else _logits(file)
    if suffix == ".jsonl":
        return _of_line(file, start.split(b"\n", 1)[0])
    if suffix == ".json" or (suffix != ".safetensors" and start[:1] in (b"{", b"[")):
        return "vllm" if b"routed_experts" in start and b'"logical_count"' not in start[:4096] else "sglang"
    return _of_tensors(file)


def _members(file: Path) -> list[str]:
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except DAMAGE:
        return []


def _logits(file: Path) -> str:
    names = _members(file)
    return "hf" if any("logits" in name or name.startswith("arr_") for name in names) else "npz"


def _of_line(file: Path, line: bytes) -> str:
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return "megatron" if b'"top_indices"' in line else "vllm"
    if isinstance(first, dict) and ("top_indices" in first or "stage" in first):
        return "megatron"
    if isinstance(first, dict) and (
        "choices" in first or "routed_experts" in line.decode("utf-8", "replace")
    ):
        return "vllm"
    rule = "each line is a record of Megatron (top_indices) or a response of vLLM (choices)"
    raise refuse(file, rule, fix="name its --format")


def _of_tensors(file: Path) -> str:
    names = set(map_safetensors(file)) if file.suffix.lower() == ".safetensors" else set()
    if names & {"expert_ids", "expert_counts"} or not names:
        return "moesim"
    if all(name.replace("_", "").isdigit() and "_" in name for name in names):
        raise refuse(file, "is one rank of TensorRT-LLM's statistics", fix=f"name its folder {file.parent}")
    return "hf"
