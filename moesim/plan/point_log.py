"""Points of a sweep on disk, one a line, so that one that was stopped goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moesim.errors import ScenarioError

__all__ = ["PointLog"]

_START = b'{"point": '


class PointLog:
    """A file of JSON lines ``{"point": identity, "result": ... or "refused": ...}``, appended to.

    Parameters
    ----------
    path
        File; begun where there is none. A line cut short by whatever stopped the last sweep is taken off.

    Raises
    ------
    ScenarioError
        If the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: dict[str, dict[str, Any]] = {}
        """What is known, by identity."""
        data = path.read_bytes() if path.exists() else b""
        *lines, rest = data.split(b"\n")
        for number, line in enumerate(lines):
            self._take(line, number + 1)
        if rest:
            if not (_START.startswith(rest[: len(_START)]) or rest.startswith(_START)):
                raise self._other(len(lines) + 1)
            with path.open("r+b") as file:
                file.truncate(len(data) - len(rest))

    def append(self, name: str, told: dict[str, Any]) -> None:
        """Add one point; it is on disk when this returns."""
        line = json.dumps({"point": name, **told})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        self.told[name] = told

    def _take(self, line: bytes, number: int) -> None:
        try:
            told = json.loads(line) if line.startswith(_START) else {}
            name = told.pop("point")
        except (ValueError, KeyError):
            raise self._other(number) from None
        self.told[name] = told

    def _other(self, number: int) -> ScenarioError:
        return ScenarioError(
            "is no point of a sweep", place=f"{self.path}:{number}", fix="name a new file, or delete this one"
        )
