"""A sweep as a table for the terminal and as a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from moesim.errors import UnitError
from moesim.report.sweep_words import by_name, heading, key_names, refused_groups, shown_metrics, value_text
from moesim.report.text import Record, plural
from moesim.units import parse_bytes, parse_bytes_per_s, parse_seconds, parse_usd_per_gpu_hour

__all__ = ["refused_table", "sweep_columns", "sweep_table", "write_sweep_csv"]

UNITS: tuple[tuple[str, Callable[[object], float]], ...] = (
    ("_bytes_per_s", parse_bytes_per_s),
    ("_s", parse_seconds),
    ("_bytes", parse_bytes),
    ("_usd_per_gpu_hour", parse_usd_per_gpu_hour),
)
"""End of a column's name, and how the texts of its kind are read."""
DISPENSABLE = (
    "imbalance_before_capacity", "dropped_weight_fraction", "tokens_without_expert_fraction", "memory_bytes.total",
    "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "usd_per_mtok",
)  # fmt: skip
"""Figures that the terminal goes without where it is too narrow."""
BETWEEN = 3
"""Characters between two columns."""
NAMED = {"band.low": "band.low_s", "band.high": "band.high_s"}


def sweep_table(told: Record, limit: int = 200, width: int = 110) -> Table:
    """Points of a sweep, one a row: what was set, and the figures that tell them apart.

    Parameters
    ----------
    told
        The object of ``moesim sweep --json``.
    limit
        Rows at most.
    width
        Characters of a line; some figures are left out where there is no room for them.
    """
    done = [(number, point) for number, point in enumerate(told["points"]) if "result" in point]
    if not done:
        return _table(heading(told))
    knees = {curve["knee"] for curve in (told.get("tradeoff") or {}).get("curves", ())}
    names = key_names(told["swept"])
    sets, results = zip(*((point["set"], point["result"]) for _, point in done[:limit]), strict=True)
    columns = [(names[key], [value_text(one[key]) for one in sets]) for key in told["swept"]]
    for metric in shown_metrics(told["points"]):
        columns.append((metric.short, [metric.text(metric.of(result)) for result in results]))
    if knees - {None}:
        columns.append(("", ["knee" if number in knees else "" for number, _ in done[:limit]]))
    least = [
        max(map(len, [*([name] if at < len(told["swept"]) else name.split()), *cells]), default=0)
        for at, (name, cells) in enumerate(columns)
    ]
    kept, dropped = _fitted(columns, least, width, {by_name(name).short for name in DISPENSABLE})
    table = _table(heading(told))
    for at, (name, _) in enumerate(kept):
        longest = max(map(len, name.split()), default=0)
        is_key = at < len(told["swept"])
        table.add_column(name, justify="right" if name else "left", no_wrap=is_key, min_width=longest)
    for row in zip(*(cells for _, cells in kept), strict=True):
        table.add_row(*map(Text, row))
    said = [f"{len(done) - limit:,} more points"] if len(done) > limit else []
    said += [f"no room for {', '.join(dropped)}"] if dropped else []
    if said:
        table.caption, table.caption_justify = f"{'; '.join(said)}: see --csv, --json or --report", "left"
    return table


Column = tuple[str, list[str]]


def _fitted(
    columns: Sequence[Column], least: Sequence[int], width: int, dispensable: set[str]
) -> tuple[list[Column], list[str]]:
    """Columns that fit a width, given what each needs at least, and the names of those that had to go."""
    needed = sum(least) + BETWEEN * len(columns) + 1
    kept = list(columns)
    dropped: list[str] = []
    for column, size in zip(reversed(columns), reversed(least), strict=True):
        if column[0] in dispensable and needed > width:
            kept.remove(column)
            dropped.insert(0, column[0])
            needed -= size + BETWEEN
    return kept, dropped


def refused_table(told: Record) -> Table:
    """Points that are out, by reason."""
    table = _table(f"{plural(told['n_refused'], 'point')} refused")
    for name in ("points", "with", "why"):
        table.add_column(name, justify="right" if name == "points" else "left")
    for shared, n, reason in refused_groups(told):
        table.add_row(f"{n:,}", Text(shared), Text(reason))
    return table


def _table(title: str) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.pad_edge = False
    table.padding = (0, 1)
    return table


def sweep_columns(told: Record) -> list[dict[str, Any]]:
    """Points as flat rows, all with the same columns: swept keys, ``refused``, then figures by dotted name.

    A swept quantity is in SI units and its column's name ends in them: ``cluster.nic_bytes_per_s``.
    """
    points: Sequence[Record] = told["points"]
    swept = {key: _in_si([point["set"][key] for point in points]) for key in told["swept"]}
    flat = [_flat(point.get("result") or {}) for point in points]
    columns = dict.fromkeys(
        name for row in flat for name, value in row.items() if value is not None and name not in swept
    )
    rows = []
    for number, point in enumerate(points):
        row = {f"{key}{end}": values[number] for key, (end, values) in swept.items()}
        rows.append(
            row | {"refused": point.get("refused")} | {name: flat[number].get(name) for name in columns}
        )
    return rows


def write_sweep_csv(path: Path, told: Record) -> Path:
    """Write a sweep as CSV, one point a row; an older file there is replaced at once."""
    rows = sweep_columns(told)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name; lists are left out."""
    found: dict[str, Any] = {}
    for key, one in value.items():
        if isinstance(one, Mapping):
            found |= _flat(one, f"{prefix}{key}.")
        elif not isinstance(one, list | tuple):
            name = f"{prefix}{key}"
            found[NAMED.get(name, name)] = one
    return found


def _in_si(values: Sequence[Any]) -> tuple[str, list[Any]]:
    """Values of a key with the end of its column's name; as they are where they are no quantities."""
    if any(isinstance(value, str) for value in values):
        for end, parse in UNITS:
            try:
                return end, [parse(value) for value in values]
            except UnitError:
                continue
    return "", list(values)
