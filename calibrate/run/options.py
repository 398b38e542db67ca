"""Options that several commands of ``calibrate run`` share: times to spend, and where files go."""

from __future__ import annotations

import os
from pathlib import Path

from moesim.errors import MeasurementError, UnitError
from moesim.units import parse_seconds

__all__ = ["check_file", "check_folder", "jobs_here", "parse_budget"]

_MINUTES = {"m": "min", "h": "h", "s": "s"}


def parse_budget(text: str, place: str = "--budget") -> float:
    """Read a time such as ``6m``, ``90s`` or ``1.5 h`` [s]; ``6 min`` too.

    Raises
    ------
    UnitError
        If it is no time.
    MeasurementError
        If it is nothing, or less.
    """
    number, unit = text.rstrip("mhs "), text[len(text.rstrip("mhs ")) :].strip()
    fix = f"write a number and s, m or h, as {place} 6m"
    if text.strip().startswith("-"):
        raise MeasurementError("must be above 0", value=text, place=place, fix=fix)
    try:
        seconds = parse_seconds(f"{number} {_MINUTES[unit]}" if unit in _MINUTES else text)
    except UnitError as error:
        raise UnitError(error.rule, value=text, place=place, fix=fix) from None
    if seconds <= 0:
        raise MeasurementError("must be above 0", value=text, place=place, fix=fix)
    return seconds


def jobs_here() -> int:
    """Processes that may compile at once: a core each that this process may use, one left to others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


def check_folder(path: Path, place: str = "-o") -> None:
    """Refuse a folder that cannot be written or made, before any work is done for it; nothing is made here.

    Raises
    ------
    MeasurementError
        If it is a file, lies below one, or the system does not let us write there.
    """
    if path.exists() and not path.is_dir():
        raise MeasurementError(
            "is a file, and a folder is due", value=str(path), place=place, fix="name a folder"
        )
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise MeasurementError(
            f"cannot be made: {there} is a file", value=str(path), place=place, fix="name another folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise MeasurementError(
            f"cannot be written: no permission in {there}",
            value=str(path),
            place=place,
            fix="name another folder",
        )


def check_file(path: Path, place: str = "-o") -> None:
    """Refuse a CSV file that cannot be written; nothing is made here.

    Raises
    ------
    MeasurementError
        If it is a folder, is not called .csv, or its folder cannot be written or made.
    """
    if path.is_dir():
        raise MeasurementError("is a folder", value=str(path), place=place, fix="add the name of a CSV file")
    if path.suffix.lower() != ".csv":
        raise MeasurementError(
            "must end in .csv", value=str(path), place=place, fix=f"{place} {path.with_suffix('.csv')}"
        )
    check_folder(path.parent, place)
    if path.exists() and not os.access(path, os.W_OK):
        raise MeasurementError(
            "cannot be written: no permission", value=str(path), place=place, fix="name another file"
        )
