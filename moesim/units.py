"""Quantities with units: the only place that reads or writes them.

Inside moesim every number is in SI units. Text from a person or a catalog file carries its unit
(``"141 GB"``, ``"400 Gb/s"``, ``"2.5 us"``) and is turned into a float here, once.
``GB`` is 1e9 bytes and ``GiB`` 2**30; ``b`` is a bit and ``B`` a byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema
from pydantic_core import PydanticCustomError

from moesim.errors import UnitError

__all__ = [
    "Bound",
    "Bytes",
    "BytesPerSecond",
    "FlopsPerSecond",
    "Hertz",
    "Seconds",
    "ThroughputBound",
    "TimeBound",
    "UsdBound",
    "UsdPerGpuHour",
    "format_bytes",
    "format_bytes_per_s",
    "format_flops_per_s",
    "format_seconds",
    "format_usd",
    "parse_bound",
    "parse_bytes",
    "parse_bytes_per_s",
    "parse_flops_per_s",
    "parse_hertz",
    "parse_seconds",
    "parse_usd_per_gpu_hour",
]

_DECIMAL = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}

_BYTES = {f"{p}B": f for p, f in (_DECIMAL | _BINARY).items()}
_RATES = {f"{p}B/s": f for p, f in (_DECIMAL | _BINARY).items()}
_RATES |= {f"{p}b/s": f / 8 for p, f in _DECIMAL.items()}
_FLOP_RATES = {f"{p}FLOP/s": f for p, f in _DECIMAL.items()} | {f"{p}FLOPS": f for p, f in _DECIMAL.items()}
_TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_PRICES = {"USD/gpu-hour": 1.0, "USD/gpu-h": 1.0}
_CLOCKS = {f"{p}Hz": f for p, f in _DECIMAL.items()}
_TOKEN_RATES = {"tokens/s": 1.0}
_COSTS = {"USD/Mtok": 1.0}

_NUMBER = r"[+-]?(?:\d+(?:_\d+)*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_QUANTITY = re.compile(rf"\s*({_NUMBER})\s*(\S*)\s*")
_BOUND = re.compile(r"\s*(<=|>=|<|>|≤|≥|=+)?\s*(.*?)\s*", re.DOTALL)
_SIGNS: dict[str, Literal["<=", ">="]] = {"<=": "<=", "≤": "<=", ">=": ">=", "≥": ">="}


@dataclass(frozen=True)
class _Kind:
    """One kind of quantity: its units, by name, and how an example of it is written."""

    name: str
    units: dict[str, float]
    base: str
    usual: str


_KINDS = {
    kind.name: kind
    for kind in (
        _Kind("size in bytes", _BYTES, "B", "GB"),
        _Kind("data rate", _RATES, "B/s", "GB/s"),
        _Kind("FLOP rate", _FLOP_RATES, "FLOP/s", "TFLOP/s"),
        _Kind("time", _TIMES, "s", "ms"),
        _Kind("price", _PRICES, "USD/gpu-hour", "USD/gpu-hour"),
        _Kind("frequency", _CLOCKS, "Hz", "GHz"),
        _Kind("throughput", _TOKEN_RATES, "tokens/s", "tokens/s"),
        _Kind("cost of a million tokens", _COSTS, "USD/Mtok", "USD/Mtok"),
    )
}
_SIZE, _RATE, _FLOP_RATE, _TIME, _PRICE, _CLOCK, _TOKEN_RATE, _COST = _KINDS.values()


def _parse(text: object, kind: _Kind) -> float:
    """Turn ``"<number> <unit>"`` into a float in SI units."""
    fix = f'write a number and a unit, as "80 {kind.usual}"'
    if isinstance(text, bool) or not isinstance(text, int | float | str):
        rule = f"a {kind.name} is due, nothing is given" if text is None else f"is not a {kind.name}"
        raise UnitError(rule, value=text, fix=fix)
    if not isinstance(text, str):
        raise UnitError(f"a {kind.name} needs a unit", value=text, fix=f'write "{text} {kind.usual}"')
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise UnitError(f"is not a {kind.name}", value=text, fix=fix)
    number, unit = match.groups()
    if not unit:
        raise UnitError(f"a {kind.name} needs a unit", value=text, fix=f'write "{number} {kind.usual}"')
    if unit not in kind.units:
        raise _wrong_unit(text, number, unit, kind)
    value = float(number) * kind.units[unit]
    if not math.isfinite(value) or value < 0:
        raise UnitError(f"a {kind.name} is finite and not negative", value=text)
    return value


def _wrong_unit(text: str, number: str, unit: str, kind: _Kind) -> UnitError:
    """Say what a unit measures instead, or which unit of the right kind was probably meant."""
    of_other = [other.name for other in _KINDS.values() if unit in other.units]
    known = {name.lower(): name for name in reversed(kind.units)} | {unit: unit for unit in kind.units}
    if of_other:
        rule = f"{unit} is a unit of {of_other[0]}, and a {kind.name} is due"
    else:
        rule = f"unknown unit {unit} for a {kind.name}"
    guess = known.get(f"{unit}/s") or known.get(unit.lower())
    fix = f'write "{number} {guess}"' if guess else f'write it in {kind.usual}, as "80 {kind.usual}"'
    return UnitError(rule, value=text, fix=fix)


def parse_bytes(text: object) -> float:
    """Read a size such as ``"141 GB"`` or ``"80 GiB"`` [bytes]."""
    return _parse(text, _SIZE)


def parse_bytes_per_s(text: object) -> float:
    """Read a data rate such as ``"400 Gb/s"`` or ``"900 GB/s"`` [bytes/s]."""
    return _parse(text, _RATE)


def parse_flops_per_s(text: object) -> float:
    """Read a compute rate such as ``"989 TFLOP/s"`` [FLOP/s]."""
    return _parse(text, _FLOP_RATE)


def parse_seconds(text: object) -> float:
    """Read a time such as ``"2.5 us"`` or ``"50 ms"`` [s]."""
    return _parse(text, _TIME)


def parse_hertz(text: object) -> float:
    """Read a frequency such as ``"1.98 GHz"`` [Hz]."""
    return _parse(text, _CLOCK)


def parse_usd_per_gpu_hour(text: object) -> float:
    """Read a price such as ``"2.80 USD/gpu-hour"`` [USD/h]."""
    return _parse(text, _PRICE)


@dataclass(frozen=True)
class Bound:
    """One side of a target: a metric at most, or at least, a value."""

    op: Literal["<=", ">="]
    """Which side is allowed."""
    value: float
    """The limit, in the metric's SI unit."""
    text: str
    """The bound as it was written."""

    @property
    def value_s(self) -> float:
        """The limit of a time [s]."""
        return self.value

    def allows(self, value: float) -> bool:
        """Tell whether a metric's value meets the target."""
        return value <= self.value if self.op == "<=" else value >= self.value


def parse_bound(text: object, kind: str = "time") -> Bound:
    """Read a target such as ``"<= 50 ms"``.

    Parameters
    ----------
    text
        Operator and quantity.
    kind
        What the quantity measures: ``time``, ``throughput`` or ``cost of a million tokens``.

    Raises
    ------
    UnitError
        If there is no operator, or the quantity is not of that kind.
    """
    wanted = _KINDS[kind]
    usual = ">=" if kind == "throughput" else "<="
    if isinstance(text, Bound):
        return text
    if not isinstance(text, str):
        example = f"{usual} {text if isinstance(text, int | float) else 50} {wanted.usual}"
        raise UnitError("a target needs an operator and a unit", value=text, fix=f'write "{example}"')
    match = _BOUND.fullmatch(text)
    sign, quantity = match.groups() if match else ("", text)
    op = _SIGNS.get(sign or "")
    if op is None:
        raise UnitError("a target is <= or >= a value", value=text, fix=f'write "{usual} {quantity}"')
    try:
        value = _parse(quantity, wanted)
    except UnitError as error:
        fix = (error.fix or "").replace('write "', f'write "{op} ')
        raise UnitError(error.rule, value=text, fix=fix or None) from None
    return Bound(op, value, f"{op} {quantity}")


def _format(value: float, scales: tuple[tuple[float, str], ...]) -> str:
    """Three significant digits in the largest unit that keeps the number at 1 or above."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {scales[-1][1]}"
    # 999.7 us is written 1.00 ms: the last digit kept rounds up to the larger unit.
    factor, unit = next((scale for scale in scales if abs(value) >= 0.9995 * scale[0]), scales[-1])
    return f"{_three_digits(value / factor)} {unit}"


def _three_digits(value: float) -> str:
    """Three significant digits, without an exponent where the number is of a usual size."""
    rounded = float(f"{value:.3g}")
    if not 1e-3 <= abs(rounded) < 1e6:
        return f"{rounded:.3g}"
    decimals = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(decimals, 0)}f}"


def format_seconds(value_s: float) -> str:
    """Write a time for people: ``41.2 ms``."""
    return _format(value_s, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")))


def format_bytes(value_bytes: float) -> str:
    """Write a size for people: ``671 GB``."""
    scales = ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
    return _format(value_bytes, scales)


def format_bytes_per_s(value_bytes_per_s: float) -> str:
    """Write a data rate for people: ``900 GB/s``."""
    return format_bytes(value_bytes_per_s) + "/s"


def format_flops_per_s(value_flops_per_s: float) -> str:
    """Write a compute rate for people: ``989 TFLOP/s``."""
    scales = ((1e15, "PFLOP/s"), (1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s"), (1.0, "FLOP/s"))
    return _format(value_flops_per_s, scales)


def format_usd(value_usd: float) -> str:
    """Write an amount of money for people: ``0.231 USD``."""
    return f"{value_usd:.3g} USD" if abs(value_usd) < 100 else f"{value_usd:,.0f} USD"


def _before(parse: Callable[[object], object]) -> BeforeValidator:
    """Let pydantic report a `UnitError` at its field, with value, rule and fix kept apart."""

    def read(text: object) -> object:
        try:
            return parse(text)
        except UnitError as error:
            context = {"rule": error.rule, "fix": error.fix or "", "unit_value": error.value}
            raise PydanticCustomError("unit", "{rule}", context) from error

    return BeforeValidator(read)


def _field(parse: Callable[[object], float], base: str, example: str) -> tuple[object, ...]:
    """Pydantic's view of a quantity: read from text, written back exactly, text in the JSON schema."""
    schema = {"type": "string", "examples": [example]}
    return (_before(parse), PlainSerializer(lambda value: f"{value!r} {base}"), WithJsonSchema(schema))


Seconds = Annotated[float, *_field(parse_seconds, "s", "2.5 us")]
"""A time in a pydantic model: text with a unit outside, [s] inside."""
Bytes = Annotated[float, *_field(parse_bytes, "B", "141 GB")]
"""A size in a pydantic model: text with a unit outside, [bytes] inside."""
BytesPerSecond = Annotated[float, *_field(parse_bytes_per_s, "B/s", "400 Gb/s")]
"""A data rate in a pydantic model: text with a unit outside, [bytes/s] inside."""
FlopsPerSecond = Annotated[float, *_field(parse_flops_per_s, "FLOP/s", "989 TFLOP/s")]
"""A compute rate in a pydantic model: text with a unit outside, [FLOP/s] inside."""
Hertz = Annotated[float, *_field(parse_hertz, "Hz", "1.98 GHz")]
"""A frequency in a pydantic model: text with a unit outside, [Hz] inside."""
UsdPerGpuHour = Annotated[float, *_field(parse_usd_per_gpu_hour, "USD/gpu-hour", "2.80 USD/gpu-hour")]
"""A price in a pydantic model: text with a unit outside, [USD/h] inside."""


def _bound_field(kind: str, example: str) -> tuple[object, ...]:
    schema = {"type": "string", "examples": [example]}
    return (
        _before(lambda text: parse_bound(text, kind)),
        PlainSerializer(lambda bound: bound.text),
        WithJsonSchema(schema),
    )


TimeBound = Annotated[Bound, *_bound_field("time", "<= 50 ms")]
"""A target for a latency."""
ThroughputBound = Annotated[Bound, *_bound_field("throughput", ">= 50000 tokens/s")]
"""A target for a throughput."""
UsdBound = Annotated[Bound, *_bound_field("cost of a million tokens", "<= 0.50 USD/Mtok")]
"""A target for the cost of a million tokens."""
