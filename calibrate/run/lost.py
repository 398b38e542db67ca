"""Points that ended a run: an illegal access or a hang takes the whole process, and would take the next one too.

The log says ``begin`` before each point and how it ended after it; a point whose end is missing is not tried again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from calibrate.schema import Value

__all__ = ["LOG", "Key", "key_of", "lost_points"]

LOG = "log.jsonl"
_ENDS = frozenset({"done", "skipped", "wrong", "end"})
"""Events after which the point that began last is not at fault: ``end`` is also that of an interrupted run."""

Key = tuple[tuple[str, Value], ...]
"""Columns of a point, in order of their names: equal for the same point of two runs."""


def key_of(columns: Mapping[str, Value]) -> Key:
    """Key of a point."""
    return tuple(sorted(columns.items()))


def lost_points(folder: Path, *, device: str = "", software: str = "") -> set[Key]:
    """Points that began and never ended, of all runs into a folder; of one device and software if they are given."""
    found: set[Key] = set()
    open_point: Mapping[str, Value] | None = None
    wanted = True
    for line in _lines(folder / LOG):
        event = line.get("event")
        if event in _ENDS:
            open_point = None
            continue
        if open_point is not None and wanted:
            found.add(key_of(open_point))
        open_point = line["point"] if event == "begin" else None
        if event == "start":
            asked = {"device": device, "software": software}
            wanted = all(value in ("", line.get(name)) for name, value in asked.items())
    if open_point is not None and wanted:
        found.add(key_of(open_point))
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Events of a log; a line that a crash cut off is left out."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue
