"""YAML text with the place of every key and value."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from moesim.errors import ScenarioError

__all__ = ["Source", "parse_text", "read_source"]

Key = str | int


@dataclass
class Source:
    """What a YAML file says, and where it says it."""

    name: str
    """File, as it was given."""
    data: dict[Any, Any]
    """Contents."""
    root: Node | None = None
    """Parsed tree, with marks."""
    overridden: dict[tuple[Key, ...], str] = field(default_factory=dict)
    """Place of each value that an override has set."""

    def place(self, path: Sequence[Key] = (), *, of_key: bool = False) -> str:
        """Where a value stands, or the key in front of it: ``file:line:column`` or the override.

        Parameters
        ----------
        path
            Keys and indices from the root; what the file does not have is the place of its parent.
        of_key
            Point at the key instead of the value.
        """
        for length in range(len(path), 0, -1):
            if tuple(path[:length]) in self.overridden:
                return self.overridden[tuple(path[:length])]
        mark_of = self.root
        node = self.root
        for at, step in enumerate(path):
            key, value = _child(node, step)
            if value is None:
                return self._at(mark_of)
            # What is wrong with a mapping, as a key it lacks, is reported at the key in front of it.
            at_key = _is_unmarked(value) or (of_key and at == len(path) - 1)
            mark_of, node = (key if at_key and key is not None else value), value
        return self._at(mark_of)

    def _at(self, node: Node | None) -> str:
        if node is None or node.start_mark is None:
            return self.name
        return f"{self.name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _is_unmarked(node: Node) -> bool:
    """Tell whether a node's own mark misleads: a mapping's and an empty value's may be on a later line."""
    return isinstance(node, MappingNode) or (
        isinstance(node, ScalarNode) and node.start_mark.index == node.end_mark.index
    )


def _child(node: Node | None, step: Key) -> tuple[Node | None, Node | None]:
    """Nodes of a key and its value; None where there is no such key."""
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return key, value
    if isinstance(node, SequenceNode) and isinstance(step, int) and 0 <= step < len(node.value):
        return None, node.value[step]
    return None, None


def read_source(path: Path) -> Source:
    """Read a file that holds one YAML mapping.

    Raises
    ------
    ScenarioError
        If it is missing, a folder, not UTF-8, not YAML, empty, or not a mapping.
    """
    name = str(path)
    if not path.exists():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        fix = f"its folder has {', '.join(near[:8])}" if near else "give the path of a scenario file"
        raise ScenarioError("there is no such file", place=name, fix=fix)
    if path.is_dir():
        fix = f"give {name}/<scenario>.yaml"
        raise ScenarioError("is a folder, not a scenario file", place=name, fix=fix)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ScenarioError(f"cannot be read: {error.strerror}", place=name) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        column = error.start - error.object.rfind(b"\n", 0, error.start)
        place = f"{name}:{line}:{column}"
        raise ScenarioError("is not UTF-8 text", place=place, fix="save it as UTF-8") from error
    return parse_text(text, name)


def parse_text(text: str, name: str) -> Source:
    """Read the text of one YAML mapping; `name` stands in the places of errors."""
    try:
        root = YAML(typ="safe", pure=True).compose(io.StringIO(text))
        data = YAML(typ="safe", pure=True).load(text)
    except RecursionError as error:
        raise ScenarioError("is nested too deep", place=name) from error
    except YAMLError as error:
        raise _syntax(error, text, name) from error
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError, IndexError) as error:
        # ruamel lets Python's own errors through, as for the date 2026-99-99.
        raise ScenarioError(f"holds a value that YAML cannot read: {error}", place=name) from error
    source = Source(name, data if isinstance(data, dict) else {}, root)
    if data is None:
        raise ScenarioError("is empty", place=f"{name}:1:1", fix="write at least model, cluster and workload")
    if not isinstance(data, dict):
        raise ScenarioError(
            "is not a mapping of keys to values",
            value=data,
            place=source.place(),
            fix="write key: value lines, as model: mixtral-8x7b",
        )
    return source


def _syntax(error: YAMLError, text: str, name: str) -> ScenarioError:
    """Say in one line what YAML has against a text, and where."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"
    if isinstance(error, DuplicateKeyError):
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else None
        return ScenarioError("the key is given twice", value=key, place=place, fix="keep one of them")
    problem = str(error.problem) if isinstance(error, MarkedYAMLError) else str(error).splitlines()[0]
    line = text.splitlines()[mark.line] if mark is not None and mark.line < len(text.splitlines()) else ""
    fix = None
    if "\t" in line[: len(line) - len(line.lstrip())]:
        fix = "indent with spaces, not tabs"
    elif ": >" in line or ": %" in line or ": @" in line:
        fix = "put the value in quotes"
    return ScenarioError(f"is not YAML: {problem}", place=place, fix=fix)
