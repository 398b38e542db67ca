"""Measurements written as they come: one CSV row each, on disk before the next, resumable after a kill."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calibrate.schema import KEY_OPTIONAL, Schema, Value, schema
from moesim.errors import MeasurementError

try:
    import fcntl
except ImportError:  # not a POSIX system: files are not locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["Recorder"]


class Recorder:
    """A CSV file of one kind that grows row by row.

    Parameters
    ----------
    path
        CSV file; made with its header where there is none. An older one of the same kind is continued: a last
        line that a kill cut off is removed first.
    kind
        Name of the schema.

    Raises
    ------
    MeasurementError
        If the file is of another kind, or holds a row that breaks a rule, or another process writes it.

    Notes
    -----
    One process writes a file, which an advisory lock sees to where the system has one: two would each miss the
    other's rows in `seen`. Ranks of a cluster let rank 0 write.
    """

    def __init__(self, path: Path | str, kind: str) -> None:
        self.path = Path(path)
        self.schema: Schema = schema(kind)
        if self.path.suffix.lower() != ".csv":
            raise MeasurementError("measurements are recorded as CSV", value=str(path), fix="name it .csv")
        self._header = [column.name for column in self.schema.required] + list(self.schema.recorded)
        self._rows: list[dict[str, Value | None]] = []
        self._seen: dict[tuple[str, ...], set[tuple[Value | None, ...]]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self.path.open("a", encoding="utf-8", newline="")
        try:
            self._lock()
            if not self._continue():
                self._write(self._header)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, Value | None]]:
        """Rows on disk, those of earlier runs first; blank cells are None."""
        return list(self._rows)

    def close(self) -> None:
        """Close the file; every row is on disk already."""
        self._stream.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and wait until it is on disk.

        Raises
        ------
        MeasurementError
            If the row breaks a rule of its kind.
        """
        parsed = self._parsed(row, place=None)
        self._write(["" if parsed.get(name) is None else parsed[name] for name in self._header])
        self._remember(parsed)

    def seen(self, key: Mapping[str, Any]) -> bool:
        """Tell whether a point was measured before.

        Parameters
        ----------
        key
            Every column of the kind but ``latency_s``; of the optional ones ``cache``, ``graph``, ``split`` and
            ``n_nodes`` are compared where they are given. Other columns are not looked at.
        """
        names = tuple(n for n in self.schema.key if n in key or n not in KEY_OPTIONAL)
        if names not in self._seen:
            self._seen[names] = {tuple(row.get(name) for name in names) for row in self._rows}
        return self._key(key, names) in self._seen[names]

    def _key(self, key: Mapping[str, Any], names: tuple[str, ...]) -> tuple[Value | None, ...]:
        return tuple(self._cell(name, key.get(name), None) for name in names)

    def _remember(self, row: dict[str, Value | None]) -> None:
        self._rows.append(row)
        for names, found in self._seen.items():
            found.add(tuple(row.get(name) for name in names))

    def _parsed(self, row: Mapping[str, Any], place: str | None) -> dict[str, Value | None]:
        unknown = [name for name in row if name not in self._header]
        if unknown:
            raise MeasurementError(
                f"this file of {self.schema.kind} measurements has no column {unknown[0]}",
                place=place or str(self.path),
                fix="start a new file" if unknown[0] in self.schema.columns else None,
            )
        return {name: self._cell(name, row.get(name), place) for name in self._header}

    def _cell(self, name: str, value: object, place: str | None) -> Value | None:
        if hasattr(value, "item"):  # a NumPy number
            value = value.item()
        try:
            return self.schema.columns[name].parse(value)
        except (TypeError, ValueError, OverflowError):
            rule = self.schema.columns[name].rule
            blank = value is None or value == ""
            raise MeasurementError(
                "is blank: " * blank + rule, value=None if blank else value, place=place or str(self.path)
            ) from None

    def _write(self, cells: list[Any]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        self._stream.write(line.getvalue())
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _lock(self) -> None:
        """Keep other processes from writing the file until it is closed."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MeasurementError(
                "another process is writing this file",
                place=str(self.path),
                fix="wait for its end, or write elsewhere",
            ) from None
        except OSError:  # a network file system without locks
            return

    def _continue(self) -> bool:
        """Take up an older file; whether it has a header."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            lines = list(csv.reader(io.StringIO(whole.decode("utf-8"), newline=""), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise MeasurementError(f"is not CSV: {error}", place=str(self.path)) from error
        if lines:
            self._check_header(lines[0])
        elif len(content) > MAX_HEADER:
            raise MeasurementError(
                "is not a file of measurements", place=str(self.path), fix="start a new file"
            )
        for number, cells in enumerate(lines[1:], start=2):
            place = f"{self.path}:{number}"
            if len(cells) != len(self._header):
                raise MeasurementError(f"has {len(cells)} of {len(self._header)} cells", place=place)
            self._remember(self._parsed(dict(zip(self._header, cells, strict=True)), place))
        if len(whole) < len(content):  # only now: a file of another kind is left as it is
            os.truncate(self.path, len(whole))
        return bool(lines)

    def _check_header(self, header: list[str]) -> None:
        required = [column.name for column in self.schema.required]
        other = [name for name in header if name not in self.schema.columns]
        missing = [name for name in required if name not in header]
        if other or missing or len(set(header)) < len(header):
            raise MeasurementError(
                f"is no file of {self.schema.kind} measurements: "
                + (f"it lacks {', '.join(missing)}" if missing else f"it has {', '.join(other or header)}"),
                place=f"{self.path}:1",
                fix="start a new file",
            )
        self._header = header


MAX_HEADER = 2000
"""Bytes of a first line; a longer one without an end was no header of ours."""
