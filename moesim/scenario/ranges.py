"""Several values in one text: ``1.0:2.0:0.125``, ``1..512*2``, ``8,16,none``, ``200 Gb/s,400 Gb/s``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from moesim.errors import ScenarioError

__all__ = ["MOST", "SweptKey", "split_sets", "spread", "stepped"]

MOST = 4096
"""Values that one key may take; more is a slip of the pen (``1..1000000``)."""

_N = r"\s*([+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*"
_SPAN = re.compile(rf"{_N}\.\.{_N}(?:([*+]){_N})?")
_SLICE = re.compile(rf"{_N}:{_N}:{_N}(\S.*?)?\s*")
_BEGUN = re.compile(rf"{_N}(:|\.\.).*", re.DOTALL)
_OPEN, _CLOSED, _QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True)
class SweptKey:
    """A key of a scenario and the values that it takes in turn."""

    key: str
    """Dotted, as ``layout.ep``."""
    texts: tuple[str, ...]
    """Values, each as an override has it."""
    place: str
    """Where they were given."""


def split_sets(sets: Sequence[str]) -> tuple[list[str], list[SweptKey]]:
    """Part overrides with one value from those with several.

    Parameters
    ----------
    sets
        ``key.path=values`` each: a range, a list, or one value.

    Returns
    -------
    fixed
        Overrides as `moesim run` takes them.
    swept
        Keys with several values, in the order given.

    Raises
    ------
    ScenarioError
        If a range or a list says nothing sensible, or two overrides are of one key.
    """
    fixed: list[str] = []
    swept: list[SweptKey] = []
    seen: set[str] = set()
    for one in sets:
        key, sign, text = one.partition("=")
        place = f"--set {one}"
        if not sign or not key.strip():
            raise ScenarioError("an override is key.path=values", place=place, fix="write layout.ep=8,16")
        key = ".".join(part.strip() for part in key.split("."))
        if key in seen:
            raise ScenarioError("the key is given twice", value=key, place=place, fix="keep one of them")
        seen.add(key)
        try:
            texts = spread(text)
        except ScenarioError as error:
            raise error.at(place) from None
        if len(texts) > 1:
            swept.append(SweptKey(key, texts, place))
        else:
            fixed.append(f"{key}={texts[0]}")
    return fixed, swept


def spread(text: str) -> tuple[str, ...]:
    """Write a text with a range or a list out as the texts of its values, each once.

    Raises
    ------
    ScenarioError
        If a range is incomplete, never ends or is too long, or a list has an empty place.
    """
    bare = text.strip()
    if bare[:1] == "[" and bare[-1:] == "]":
        bare = bare[1:-1]
    found: dict[str, None] = {}
    parts = _parts(bare)
    for part in parts:
        if not part and len(parts) > 1:
            raise ScenarioError("a value of the list is empty", value=text, fix="write 8,16,32")
        found.update(dict.fromkeys(_spread_one(part)))
    if len(found) > MOST:
        raise ScenarioError(f"has {len(found)} values, more than {MOST}", fix="write fewer")
    return tuple(found)


def _parts(text: str) -> list[str]:
    """Cut at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPEN or letter in _CLOSED:
            depth += 1 if letter in _OPEN else -1
        elif letter == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def _spread_one(text: str) -> list[str]:
    """One entry of a list: a range, or a value as it is."""
    if found := stepped(text):
        numbers, unit = found
        return [f"{_plain(number)} {unit}".strip() for number in numbers]
    if _BEGUN.fullmatch(text):
        raise ScenarioError(
            "is no range: from, to and step are due", value=text, fix="write 1.0:2.0:0.25 or 1..16"
        )
    return [text]


def stepped(text: str) -> tuple[list[Decimal], str] | None:
    """Numbers of a range, exactly, and the unit behind it; None where the text is no range.

    Parameters
    ----------
    text
        ``low:high:step`` with a unit or without, ``low..high``, ``low..high+step`` or ``low..high*factor``.
        The high end belongs to it where a step falls on it.

    Raises
    ------
    ScenarioError
        If the range ends before it starts, never ends, or has more than `MOST` values.
    """
    if match := _SPAN.fullmatch(text):
        low, high, sign, by, unit = *match.groups(), ""
    elif match := _SLICE.fullmatch(text):
        low, high, by, unit, sign = *match.groups(), "+"
    else:
        return None
    return _range(text, Decimal(low), Decimal(high), sign or "+", Decimal(by or 1)), unit or ""


def _range(text: str, low: Decimal, high: Decimal, sign: str, by: Decimal) -> list[Decimal]:
    if high < low:
        example = f"{high}..{low}" if ".." in text else f"{high}:{low}:{abs(by) or 1}"
        raise ScenarioError("ends before it starts", value=text, fix=f"write {example}")
    if (sign == "+" and by <= 0) or (sign == "*" and (by <= 1 or low <= 0)):
        raise ScenarioError(
            "never reaches its end", value=text, fix="step by more than 0, or from 1 or more by *2"
        )
    found = [low]
    while (value := low + by * len(found) if sign == "+" else found[-1] * by) <= high:
        found.append(value)
        if len(found) > MOST:
            raise ScenarioError(f"has more than {MOST} values", value=text, fix="step by more, as 1..512*2")
    return found


def _plain(number: Decimal) -> str:
    """Without an exponent or zeros that say nothing."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
