"""``--set key.path=value``: what replaces, or adds to, a scenario file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moesim.errors import ScenarioError
from moesim.scenario.schema import ClusterChoice, RoutingChoice
from moesim.scenario.source import Source

__all__ = ["apply_overrides"]


OBJECTIVES = {"maximise": "minimise", "minimise": "maximise"}
"""An objective given as an override replaces the file's, whichever way that one goes."""


def apply_overrides(source: Source, overrides: Sequence[str]) -> None:
    """Put each ``key.path=value`` into the contents of `source`; the value is read as YAML.

    Raises
    ------
    ScenarioError
        If an override has no ``=``, an empty key, a value that is not YAML, or goes through a value
        that is no mapping.
    """
    for override in overrides:
        place = f"--set {override}"
        key, sign, text = override.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not sign or not all(path):
            raise ScenarioError("an override is key.path=value", place=place, fix="write layout.ep=8")
        _set(source, path, _value(text, place), place)
        other = OBJECTIVES.get(path[0]) if len(path) == 1 else None
        if other is not None and (other,) not in source.overridden:
            source.data.pop(other, None)


def _value(text: str, place: str) -> Any:
    # YAML takes a leading > for the start of a folded text.
    if text.lstrip()[:1] in ("<", ">"):
        return text.strip()
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, RecursionError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ScenarioError("the value is not YAML", value=text, place=place, fix="quote it") from error


def _set(source: Source, path: tuple[str, ...], value: Any, place: str) -> None:
    if len(path) > 1:
        _expand_shorthand(source, path[0])
    inner: Any = source.data
    for at, step in enumerate(path[:-1]):
        if inner.get(step) is None:
            inner[step] = {}
            source.overridden[path[: at + 1]] = place
        inner = inner[step]
        if not isinstance(inner, dict):
            raise ScenarioError(
                f"{'.'.join(path[: at + 1])} is a value and has no keys of its own", value=inner, place=place
            )
    inner[path[-1]] = value
    for known in [known for known in source.overridden if known[: len(path)] == path]:
        del source.overridden[known]
    source.overridden[path] = place


def _expand_shorthand(source: Source, key: str) -> None:
    """Turn a text that stands for a mapping into that mapping, so that it can take more keys."""
    text = source.data.get(key)
    if isinstance(text, str) and key in ("cluster", "routing"):
        part = ClusterChoice.from_text(text) if key == "cluster" else RoutingChoice.from_text(text)
        source.data[key] = part
