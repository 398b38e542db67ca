"""Files that a command is to write, checked before any work is done for them."""

from __future__ import annotations

from pathlib import Path

from moesim.errors import ScenarioError

__all__ = ["page_path", "writable"]


def page_path(
    wanted: str | None, default: str | None, *, quiet: bool, place: str = "--report"
) -> Path | None:
    """Where an HTML page goes; None for no page."""
    if wanted == "none" or (wanted is None and (quiet or default is None)):
        return None
    return writable(Path(wanted or default or ""), place)


def writable(path: Path | None, place: str) -> Path | None:
    """Refuse a file that cannot be written."""
    if path is None:
        return None
    if path.is_dir():
        raise ScenarioError("is a folder", value=str(path), place=place, fix="add the name of a file")
    if not path.resolve().parent.is_dir():
        raise ScenarioError("its folder does not exist", value=str(path), place=place, fix="make the folder")
    return path
