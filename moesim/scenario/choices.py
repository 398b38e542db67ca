"""One value, or several to choose from: lists and ranges wherever a scalar stands."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from moesim.errors import ScenarioError
from moesim.scenario.ranges import MOST, stepped

__all__ = ["Choices", "counts", "factors_or_none", "names", "refuse"]

T = TypeVar("T")


@dataclass(frozen=True)
class Choices(Generic[T]):
    """The values that a key may take, in the order they were given."""

    values: tuple[T, ...]

    def __iter__(self) -> Iterator[T]:
        """Go through the values."""
        return iter(self.values)

    def __len__(self) -> int:
        """How many values there are."""
        return len(self.values)

    @property
    def is_single(self) -> bool:
        """Nothing is left to choose."""
        return len(self.values) == 1

    @property
    def value(self) -> T:
        """The only value.

        Raises
        ------
        ScenarioError
            If there are several.
        """
        if not self.is_single:
            raise ScenarioError("several values where one is due", value=self.plain(), fix="keep one of them")
        return self.values[0]

    def plain(self) -> T | list[T]:
        """As it stands in YAML: the value, or a list of them."""
        return self.values[0] if self.is_single else list(self.values)


def refuse(rule: str, fix: str = "", value: object = None) -> PydanticCustomError:
    """Error of a validator, with rule and fix kept apart for the reader of the scenario."""
    return PydanticCustomError("scenario", "{rule}", {"rule": rule, "fix": fix, "bad_value": value})


def counts(minimum: int = 1) -> tuple[Any, ...]:
    """Make the pydantic annotations of whole numbers, at least `minimum`, as lists and ranges too."""

    def one(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse("is not a whole number", f"write a number, as {max(minimum, 8)}", value)
        if not abs(value) < 1e18 or value != int(value):
            fix = f"write {max(round(value), minimum)}" if abs(value) < 1e18 else "write a number"
            raise refuse("is not a whole number", fix, value)
        if value < minimum:
            raise refuse(f"is below {minimum}", f"write {minimum} or more", value)
        return int(value)

    item = {"type": "integer", "minimum": minimum}
    return _parts(one, item, "8, [8, 16], 1..16 or 1..512*2")


def factors_or_none(minimum: float) -> tuple[Any, ...]:
    """Make the pydantic annotations of numbers above `minimum`, or ``none``; ``1.0:2.0:0.25`` too."""

    def one(value: object) -> float | None:
        if value is None or value == "none":
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse("is neither a number nor none", "write 1.25 or none", value)
        if not minimum < value < float("inf"):
            raise refuse(f"is not above {minimum:g} and finite", "write 1.25 or none", value)
        return float(value)

    number = {"type": "number", "exclusiveMinimum": minimum}
    item = {"anyOf": [number, {"const": "none"}, {"type": "null"}]}
    example = "none, 1.25 or 1.0:2.0:0.25"
    return _parts(one, item, example, write=lambda value: "none" if value is None else value)


def names(*allowed: str, files: tuple[str, ...] = ()) -> tuple[Any, ...]:
    """Make the pydantic annotations of words out of `allowed`, and of paths that end as one of `files`.

    Any word where `allowed` is empty.
    """

    def one(value: object) -> str:
        if isinstance(value, str) and (value in allowed or (not allowed and value)):
            return value
        if isinstance(value, str) and value.lower().endswith(files):
            return value
        if not allowed:
            raise refuse("is not a name", "write a name from moesim list", value)
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? known: " if near else "use one of "
        more = f", or a file ending in {', '.join(files)}" if files else ""
        raise refuse("is unknown", hint + ", ".join(allowed) + more, value)

    item: dict[str, Any] = {"enum": list(allowed)} if allowed else {"type": "string"}
    if files:
        ends = "|".join(end.removeprefix(".") for end in files)
        item = {"anyOf": [item, {"type": "string", "pattern": rf"\.({ends})$"}]}
    return _parts(one, item, "one name or a list of names", ranges=False)


def _parts(
    one: Callable[[object], Any],
    item: dict[str, Any],
    example: str,
    *,
    ranges: bool = True,
    write: Callable[[Any], Any] = lambda value: value,
) -> tuple[Any, ...]:
    def read(value: object) -> object:
        if isinstance(value, Choices):
            return Choices(tuple(dict.fromkeys(one(each) for each in value)))
        found = tuple(dict.fromkeys(one(each) for each in _spread(value, example, ranges)))
        return Choices(found)

    schema: dict[str, Any] = {"anyOf": [item, {"type": "array", "items": item, "minItems": 1}]}
    if ranges:
        schema["anyOf"].append({"type": "string", "examples": ["1..16", "1..512*2"]})
    return (
        BeforeValidator(read),
        PlainSerializer(lambda choices: Choices(tuple(map(write, choices))).plain()),
        WithJsonSchema(schema),
    )


def _spread(value: object, example: str, ranges: bool) -> list[object]:
    """Write a list, a range or a comma-separated text out as its values."""
    if isinstance(value, list | tuple):
        if not value:
            raise refuse("is empty", f"write {example}", value)
        if len(value) > MOST:
            raise refuse(f"has {len(value)} values, more than {MOST}", "write fewer")
        return list(value)
    if isinstance(value, dict):
        raise refuse("is a mapping where a value is due", f"write {example}", value)
    if not isinstance(value, str):
        return [value]
    if "," in value:
        return [_scalar(part.strip(), ranges) for part in value.split(",")]
    if ranges and (numbers := _range(value)):
        return numbers
    if ranges and value != "none":
        raise refuse("is neither a number nor a range", f"write {example}", value)
    return [value]


def _scalar(text: str, ranges: bool) -> object:
    if not ranges or text == "none":
        return text
    try:
        number = float(text)
    except ValueError:
        raise refuse("is not a number", "write numbers between the commas", text) from None
    return int(number) if number == number and abs(number) < 1e18 and number == int(number) else number


def _range(text: str) -> list[object]:
    """Numbers of a range; none where the text is no range."""
    try:
        found = stepped(text)
    except ScenarioError as error:
        raise refuse(error.rule, error.fix or "", error.value) from None
    if found is None or found[1]:
        return []
    return [int(number) if number == int(number) else float(number) for number in found[0]]
