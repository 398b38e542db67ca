"""Measured tables: CSV or Parquet files of one kind, read with every rule checked.

A row is one measured point in SI units. `calibrate.schema` says which columns each kind has; every refusal names the
file and the line (CSV; the header is line 1) or the row (Parquet; the first is row 1).
"""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from calibrate.floors import SLOW, check_units, far_rows
from calibrate.recorder import Recorder
from calibrate.schema import SCHEMAS, Column, Schema, kind_of
from moesim.errors import MeasurementError
from moesim.hardware import Gpu

__all__ = ["Recorder", "Table", "devices_of", "read_table", "read_tables"]

MAGIC = b"PAR1"
"""First and last bytes of a Parquet file."""
INDEX = re.compile(r"__index_level_\d+__")
"""What pandas calls the numbers of a frame's rows in a Parquet file: no column of the table."""


@dataclass(frozen=True, eq=False)
class Table:
    """One measured file."""

    kind: str
    """Name of its schema."""
    path: Path
    frame: pd.DataFrame
    """Rows, numbered from 0; whole numbers int64 (Int64 where some are blank), times and rates float64."""
    lines: Sequence[int] = field(repr=False)
    """Line of each row in a CSV file, its number from 1 in a Parquet file."""

    def line(self, i: int) -> str:
        """Where row `i` stands, for messages."""
        return _place(self.path, self.lines[i])


def _place(path: Path, line: int) -> str:
    return f"{path}:{line}" if path.suffix.lower() == ".csv" else f"{path}: row {line}"


def read_table(path: Path | str, *, gpu: Gpu | None = None) -> Table:
    """Read one file of measurements.

    Parameters
    ----------
    path
        CSV (``.csv``) or Parquet (``.parquet``) file.
    gpu
        Datasheet of the device, where it is not one of the catalog.

    Raises
    ------
    MeasurementError
        If it is no such file, or any row breaks a rule of its kind, or its times are in another unit.
    """
    path = Path(path)
    raw = _READERS[_suffix(path)](path)
    kind = _kind(raw)
    _check_columns(raw, kind)
    if not raw.lines:
        raise MeasurementError("holds no rows", place=str(path), fix="measure first, or leave the file out")
    columns: dict[str, pd.Series] = {}
    for name in (name for name in kind.columns if name in raw.cells):
        series = _column(raw, kind.columns[name])
        if series.notna().any():
            columns[name] = series
    table = Table(kind.kind, path, pd.DataFrame(columns), raw.lines)
    _check_rows(table)
    check_units(table.kind, table.frame, str(path), gpu)
    return table


def read_tables(
    paths: Iterable[Path | str], *, gpu: Gpu | None = None, note: Callable[[str], None] | None = None
) -> list[Table]:
    """Read several files; see `read_table`.

    Parameters
    ----------
    paths
        Each file once: its rows would count twice.
    gpu
        As of `read_table`.
    note
        Takes a line on rows so slow that part of a file may be in another unit.
    """
    tables: list[Table] = []
    known: set[Path] = set()
    for path in paths:
        if (whole := Path(path).resolve()) in known:
            raise MeasurementError("is given twice", place=str(path), fix="name every file once")
        known.add(whole)
        tables.append(read_table(path, gpu=gpu))
        if note is not None:
            _note_far(tables[-1], gpu, note)
    return tables


def _note_far(table: Table, gpu: Gpu | None, note: Callable[[str], None]) -> None:
    """Say which single rows are as far from what the datasheet allows as another unit would be, or stand twice."""
    twice = np.flatnonzero(table.frame.duplicated())
    if twice.size:
        note(f"{table.line(int(twice[0]))}: {twice.size:,} rows stand in the file twice, this the first")
    far = np.flatnonzero(far_rows(table.kind, table.frame, gpu))
    if far.size:
        note(
            f"{table.line(int(far[0]))}: {far.size:,} of {len(table.frame):,} rows take at least {SLOW:.0f} times "
            "what the datasheet asks for, this the first: another unit, or outliers?"
        )


def devices_of(tables: Iterable[Table]) -> list[str]:
    """Devices that the rows of some tables were measured on."""
    return sorted({str(device) for table in tables for device in table.frame["device"].unique()})


# ---------------------------------------------------------------- files


@dataclass(frozen=True, eq=False)
class _Raw:
    """A file's cells before any is judged."""

    path: Path
    cells: dict[str, Sequence[Any]]
    """Text (CSV) or values (Parquet) by column."""
    lines: Sequence[int]

    def refuse(self, i: int, column: Column) -> MeasurementError:
        """Error that row `i` breaks the rule of a column."""
        value = self.cells[column.name][i]
        blank = value is None or value == ""
        # pandas writes NaN to Parquet as a cell without a value
        absent = "is NaN or blank: " if value is None and column.type == "number" else "is blank: "
        return MeasurementError(
            absent * blank + column.rule,
            value=None if blank else value,
            place=_place(self.path, self.lines[i]),
            fix=_nearest(str(value), column.choices) or (MEASURE_AGAIN if column.unit == "s" else CORRECT),
        )


MEASURE_AGAIN = "measure the point again or delete the line"
CORRECT = "correct the cell or delete the line"
_ALSO = {
    "bf16": "bfloat16", "half": "float16", "float": "float32", "fp32": "float32", "e4m3": "fp8", "fp8_e4m3": "fp8",
    "fp8_w8a8": "fp8", "mxfp4": "w4a16_mxfp4",
}  # fmt: skip
"""Other words for formats."""


def _nearest(word: str, known: Iterable[str]) -> str | None:
    choices = list(known)
    also = _ALSO.get(word.lower())
    near = [also] if also in choices else difflib.get_close_matches(word.lower(), choices, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else None


def _suffix(path: Path) -> str:
    if path.is_dir():
        raise MeasurementError("is a folder", place=str(path), fix="name the files in it")
    if not path.exists():
        raise MeasurementError("there is no such file", place=str(path), fix="check its name and folder")
    if not path.is_file():
        raise MeasurementError("is no regular file", place=str(path))
    suffix = {".pq": ".parquet"}.get(path.suffix.lower(), path.suffix.lower())
    if suffix not in _READERS:
        raise MeasurementError(
            "is neither CSV nor Parquet", value=path.suffix, place=str(path), fix="name it .csv or .parquet"
        )
    return suffix


def _read_csv(path: Path) -> _Raw:
    content = path.read_bytes()
    if content[:4] == MAGIC:
        raise MeasurementError("is a Parquet file named .csv", place=str(path), fix="name it .parquet")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise MeasurementError("is not UTF-8 text", place=f"{path}:{line}", fix="save it as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise MeasurementError(
            "is not text: it holds zero bytes", place=f"{path}:{line}", fix="save it as UTF-8 text"
        )
    if not text.strip():
        raise MeasurementError("is empty", place=str(path), fix="measure first, or leave the file out")
    _check_end(path, text)
    lines, rows = _csv_rows(path, text)
    header = [name.strip() for name in rows[0]]
    _check_header(header, f"{path}:1")
    for number, row in zip(lines[1:], rows[1:], strict=True):
        if len(row) != len(header):
            raise MeasurementError(
                f"has {len(row)} of {len(header)} cells",
                place=f"{path}:{number}",
                fix="one cell a column, commas between",
            )
    cells = [list(map(str.strip, column)) for column in zip(*rows[1:], strict=True)] or [[] for _ in header]
    return _Raw(path, dict(zip(header, cells, strict=True)), lines[1:])


LINE_ENDS = ("\n", "\r")


def _check_end(path: Path, text: str) -> None:
    """Refuse a last line without an end: cut inside its last cell it would be read, with another value."""
    start = max(text.rfind(end) for end in LINE_ENDS) + 1
    if text[start:].strip():
        raise MeasurementError(
            "the last line has no end: it was cut short",
            place=f"{path}:{max(text.count(end) for end in LINE_ENDS) + 1}",
            fix="measure the point again or delete the line (if it is whole, end it with a newline)",
        )


def _csv_rows(path: Path, text: str) -> tuple[list[int], list[list[str]]]:
    """Lines and cells of every row, blank lines at the end left out."""
    reader = csv.reader(io.StringIO(text.rstrip() + "\n", newline=""), strict=True)
    lines: list[int] = []
    rows: list[list[str]] = []
    last = 0
    try:
        for row in reader:
            lines.append(last + 1)
            rows.append(row)
            last = reader.line_num
    except csv.Error as error:
        raise MeasurementError(f"is not CSV: {error}", place=f"{path}:{last + 1}") from error
    return lines, rows


def _check_header(header: Sequence[str], place: str) -> None:
    for i, name in enumerate(header):
        if not name:
            raise MeasurementError(
                f"column {i + 1} has no name", place=place, fix="name it or delete it (pandas: index=False)"
            )
        if name in header[:i]:
            raise MeasurementError("column is there twice", value=name, place=place, fix="delete one of them")


def _read_parquet(path: Path) -> _Raw:
    with path.open("rb") as stream:
        head = stream.read(4)
        if not head:
            raise MeasurementError("is empty", place=str(path), fix="measure first, or leave the file out")
        if head != MAGIC:
            raise MeasurementError("is not a Parquet file", place=str(path), fix="name a CSV file .csv")
        stream.seek(-4, 2)
        if stream.read(4) != MAGIC:
            raise MeasurementError(
                "is cut off: a Parquet file ends in PAR1", place=str(path), fix="copy it again"
            )
    try:
        table = pq.ParquetFile(path).read()
        values = [column.to_pylist() for column in table.columns]
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MeasurementError(
            f"is a damaged Parquet file: {reason}", place=str(path), fix="copy it again"
        ) from error
    found = [(n, v) for n, v in zip(table.column_names, values, strict=True) if not INDEX.fullmatch(n)]
    _check_header([name for name, _ in found], str(path))
    cells = dict(found)
    return _Raw(path, cells, range(1, table.num_rows + 1))


_READERS: dict[str, Callable[[Path], _Raw]] = {".csv": _read_csv, ".parquet": _read_parquet}


# ---------------------------------------------------------------- rules


def _kind(raw: _Raw) -> Schema:
    """Kind of a file, by its operations and columns."""
    place = _place(raw.path, 1) if raw.path.suffix.lower() == ".csv" else str(raw.path)
    if "op" not in raw.cells:
        raise _without_op(raw.cells, place)
    ops = list(dict.fromkeys(raw.cells["op"]))
    if not ops:
        raise MeasurementError(
            "holds no rows", place=str(raw.path), fix="measure first, or leave the file out"
        )
    found = kind_of(ops, raw.cells, dict.fromkeys(raw.cells.get("implementation", ())))
    known = [op for one in SCHEMAS.values() for op in one.ops]
    for op in ops:
        if found is None or op not in found.ops:
            at = raw.cells["op"].index(op)
            here = _place(raw.path, raw.lines[at])
            if found is not None and op in known:
                raise MeasurementError(
                    f"is no {found.kind} measurement like the rows above",
                    value=op,
                    place=here,
                    fix="one kind a file",
                )
            raise MeasurementError(
                ("" if op else "is blank: ") + f"op must be one of {', '.join(dict.fromkeys(known))}",
                value=op or None,
                place=here,
                fix=_nearest(str(op), known),
            )
    return found  # type: ignore[return-value]  # every op was found in it


SERVING = {"isl", "osl", "concurrency", "tpot_s"}
"""Columns that only a table of serving benchmarks has."""


def _without_op(columns: Iterable[str], place: str) -> MeasurementError:
    """Error that a file does not say what was measured."""
    names = list(columns)
    if len(names) == 1:  # another separator makes one column of all
        for mark, word in ((";", "semicolons"), ("\t", "tabs")):
            if names[0].count(mark) > 1:
                return MeasurementError(
                    f"cells are parted by {word}, not by commas", place=place, fix="save it with commas"
                )
    if set(names) >= SERVING:
        return MeasurementError(
            "is a table of serving benchmarks, not of kernels",
            place=place,
            fix="python -m calibrate.validate.serving FOLDER, which holds measured/serving.csv",
        )
    nearest = max(SCHEMAS.values(), key=lambda one: len(set(names) & set(one.columns)))
    if len(set(names) & set(nearest.columns)) > len(names) / 2:
        fix = _wanted(nearest)
    else:
        fix = "the first line names the columns; docs/calibration.md has those of every kind"
    return MeasurementError("column op is missing", place=place, fix=fix)


def _wanted(kind: Schema) -> str:
    """Header that a kind needs."""
    return f"the header of {kind.kind} is {','.join(column.name for column in kind.required)}"


def _check_columns(raw: _Raw, kind: Schema) -> None:
    place = f"{raw.path}:1" if raw.path.suffix.lower() == ".csv" else str(raw.path)
    missing = [column.name for column in kind.required if column.name not in raw.cells]
    extra = [name for name in raw.cells if name not in kind.columns]
    if missing:
        near = {name: difflib.get_close_matches(name, extra, n=1, cutoff=0.6) for name in missing}
        fixes = [f"rename {found[0]} to {name}" for name, found in near.items() if found]
        raise MeasurementError(
            f"{kind.kind} measurements need the column{'s' * (len(missing) > 1)} {', '.join(missing)}",
            place=place,
            fix=", ".join(fixes) if len(fixes) == len(missing) else _wanted(kind),
        )
    if extra:
        free = [name for name in kind.columns if name not in raw.cells]
        near = {name: difflib.get_close_matches(name, free, n=1, cutoff=0.6) for name in extra}
        fixes = [f"rename {name} to {found[0]}" for name, found in near.items() if found]
        raise MeasurementError(
            f"{kind.kind} measurements have no column{'s' * (len(extra) > 1)} {', '.join(extra)}",
            place=place,
            fix=" or ".join(
                [", ".join(fixes)] * bool(fixes) + [f"delete {'it' if len(extra) == 1 else 'them'}"]
            ),
        )


def _column(raw: _Raw, column: Column) -> pd.Series:
    """One column in its type; the first cell that breaks its rule is refused."""
    cells = raw.cells[column.name]
    parsed: dict[Any, Any] = {}  # shapes repeat: few cells of a column differ
    out: list[Any] = []
    from_text = raw.path.suffix.lower() == ".csv"
    for i, cell in enumerate(cells):
        # 1, 1.0 and True are one key, so a type that is refused must not meet an equal value that is not
        key = (type(cell), cell)
        if key not in parsed:
            try:
                if column.type != "text" and isinstance(cell, str) and not from_text:
                    raise ValueError(column.rule)
                parsed[key] = column.parse(cell)
            except (TypeError, ValueError, OverflowError):
                raise raw.refuse(i, column) from None
        out.append(parsed[key])
    if column.type == "text":
        return pd.Series(out, dtype=object)
    if column.type == "number":
        return pd.Series([float("nan") if one is None else one for one in out], dtype="float64")
    return pd.Series(out, dtype="Int64" if None in out else "int64")


def _check_rows(table: Table) -> None:
    """Rules over several columns of a row."""
    frame = table.frame
    rules: list[tuple[str, Any]] = []
    if {"top_k", "n_experts"} <= set(frame):
        rules.append(("top_k must be at most n_experts", frame.top_k > frame.n_experts))
    if {"ep", "n_experts"} <= set(frame):
        rules.append(("n_experts must be a multiple of ep", frame.n_experts % frame.ep != 0))
    if table.kind == "attention":
        gqa = frame.kind == "gqa"
        for name in ("n_kv_heads", "head_dim"):
            blank = frame[name].isna() if name in frame else True
            rules.append((f"{name} may be blank only where kind is mla", gqa & blank))
    if {"latency_p10_s", "latency_p90_s"} <= set(frame):
        rules.append(
            ("latency_p10_s must be at most latency_p90_s", frame.latency_p10_s > frame.latency_p90_s)
        )
    for rule, broken in rules:
        broken = pd.Series(broken).fillna(False).astype(bool)
        if broken.any():
            raise MeasurementError(rule, place=table.line(int(broken.to_numpy().argmax())))
