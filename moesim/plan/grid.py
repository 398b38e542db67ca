"""The points of a sweep: a scenario at every combination of some keys' values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from moesim.errors import MoesimError, ScenarioError
from moesim.plan.answer import scenario_row
from moesim.plan.context import Context
from moesim.plan.planner import warnings_of
from moesim.scenario import Choices, LayoutSizes, Scenario, ScenarioFile, SweptKey, load_variants, split_sets

__all__ = ["Grid", "Point", "inputs", "read_grid"]

MOST_POINTS = 100_000
"""Combinations of one sweep; more is a slip of the pen."""
APART = ("cluster", "workload", "policy", "minimise", "maximise", "subject_to")
"""Keys of a scenario that its context is not made of; and the sizes of a layout."""


@dataclass(frozen=True)
class Point:
    """One combination of values."""

    set: dict[str, Any]
    """Value of each swept key."""
    scenario: Scenario | None
    """None where the values make no scenario."""
    refused: str = ""
    """Why they make none."""


@dataclass(frozen=True)
class Grid:
    """All combinations of the swept keys' values, the last key running fastest."""

    keys: tuple[SweptKey, ...]
    points: tuple[Point, ...]
    scenario: dict[str, Any]
    """What all points share, in short."""
    warnings: tuple[str, ...]
    """What a reader has to know of the inputs."""


def read_grid(path: str | Path, sets: Sequence[str]) -> Grid:
    """Read a scenario and the keys that are swept: those given several values, and those it leaves open.

    Parameters
    ----------
    path
        Scenario file.
    sets
        ``key.path=values`` each: a range ``low:high:step``, a list, or one value for all points.

    Raises
    ------
    MoesimError
        If the scenario or a value is none that any combination takes, or no key has several values.
    """
    fixed, given = split_sets(sets)
    keys = (*given, *_open_keys(_first(path, fixed, given)))
    if not keys:
        raise ScenarioError(
            "every key has one value and a sweep takes several of one",
            place="--set",
            fix="write --set layout.ep=8,16,32, or use moesim run",
        )
    if (n := math.prod(len(key.texts) for key in keys)) > MOST_POINTS:
        raise ScenarioError(f"has {n:,} combinations, more than {MOST_POINTS:,}", fix="write fewer values")
    combinations = list(product(*(key.texts for key in keys)))
    variants = load_variants(path, (_overrides(fixed, keys, texts) for texts in combinations))
    loaded, warnings = _with_inputs(variants)
    _refuse_values(keys, combinations, loaded)
    points = tuple(
        Point(dict(zip((key.key for key in keys), map(_value, texts), strict=True)), *_read(one))
        for texts, one in zip(combinations, loaded, strict=True)
    )
    first = next(one.scenario for one in loaded if isinstance(one, ScenarioFile))
    return Grid(keys, points, scenario_row(first, [key.key for key in keys]), tuple(warnings))


def _overrides(fixed: Sequence[str], keys: Sequence[SweptKey], texts: Sequence[str]) -> list[str]:
    return [*fixed, *(f"{key.key}={text}" for key, text in zip(keys, texts, strict=True))]


def _first(path: str | Path, fixed: Sequence[str], keys: Sequence[SweptKey]) -> ScenarioFile:
    """The first combination that makes a scenario; raises the first error where none does."""
    error: MoesimError | None = None
    combinations = product(*(key.texts for key in keys))
    for one in load_variants(path, (_overrides(fixed, keys, texts) for texts in combinations)):
        if isinstance(one, ScenarioFile):
            return one
        error = error or _at_sweep(one, keys)
    raise error or ScenarioError("holds no scenario", place=str(path))


def _open_keys(file: ScenarioFile) -> Iterator[SweptKey]:
    for dotted in file.scenario.open_keys():
        choices: Any = file.scenario
        for step in dotted.split("."):
            choices = getattr(choices, step)
        if isinstance(choices, Choices):
            texts = ("none" if value is None else str(value) for value in choices)
            yield SweptKey(dotted, tuple(texts), file.place(dotted))


_WARNED_OF = {"cluster", "workload", "policy", "subject_to"}
"""What warnings depend on beside a scenario's inputs."""


def _with_inputs(
    variants: Iterable[ScenarioFile | MoesimError],
) -> tuple[list[ScenarioFile | MoesimError], dict[str, None]]:
    """Load what the scenarios name once each, with warnings; those whose model or routing is none become errors."""
    warnings: dict[str, None] = {}
    seen: dict[str, Context | MoesimError] = {}
    told: set[tuple[str, str]] = set()
    found: list[ScenarioFile | MoesimError] = []
    for one in variants:
        if isinstance(one, MoesimError):
            found.append(one)
            continue
        key = inputs(one.scenario)
        if key not in seen:
            try:
                seen[key] = Context.of(one.scenario)
            except MoesimError as error:
                seen[key] = one.placed(error)
        context = seen[key]
        if isinstance(context, MoesimError):
            found.append(context)
            continue
        asked = (key, one.scenario.model_dump_json(include=_WARNED_OF))
        if asked not in told:
            told.add(asked)
            warnings |= dict.fromkeys(warnings_of(one.scenario, context))
        found.append(one)
    return found, warnings


def _refuse_values(
    keys: Sequence[SweptKey],
    combinations: Sequence[Sequence[str]],
    loaded: Sequence[ScenarioFile | MoesimError],
) -> None:
    """Raise the error of a value that no combination takes: it is a slip, not an answer."""
    for number in range(len(keys)):
        errors: dict[str, MoesimError | None] = {}
        for texts, one in zip(combinations, loaded, strict=True):
            if isinstance(one, ScenarioFile):
                errors[texts[number]] = None
            else:
                errors.setdefault(texts[number], one)
        if error := next((one for one in errors.values() if one is not None), None):
            raise _at_sweep(error, keys)


def _at_sweep(error: MoesimError, keys: Sequence[SweptKey]) -> MoesimError:
    """The same error, at the text that was given in place of the one value of it."""
    for key in keys:
        if error.place in [f"--set {key.key}={text}" for text in key.texts]:
            return error.at(key.place)
    return error


def _read(one: ScenarioFile | MoesimError) -> tuple[Scenario | None, str]:
    return (one.scenario, "") if isinstance(one, ScenarioFile) else (None, str(one.at("")))


def _value(text: str) -> Any:
    """A number where the text is one; else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def inputs(scenario: Scenario) -> str:
    """What its context is made of; the cluster's GPU decides where parameters are the user's own."""
    needs_gpu = scenario.profile is not None or scenario.backend == "moesim"
    apart: dict[str, Any] = {key: True for key in APART if key != "cluster" or not needs_gpu}
    sizes = {one.name: True for one in fields(LayoutSizes)}
    return scenario.model_dump_json(exclude={**apart, "layout": sizes})
