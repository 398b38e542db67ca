"""What the figures of a sweep are called, how they are written, and what its points are named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.report.text import ABSENT, Record, count, number, seconds, share, usd
from moesim.units import format_bytes

__all__ = [
    "METRICS",
    "Metric",
    "by_name",
    "heading",
    "key_names",
    "knee_lines",
    "refused_groups",
    "shown_metrics",
    "spaced",
    "value_text",
    "values_text",
]


@dataclass(frozen=True)
class Metric:
    """A figure of a result, and how people read it."""

    name: str
    """Dotted, as in ``--json``."""
    title: str
    """Over a figure."""
    short: str
    """Over a column."""
    text: Callable[[float | None], str]
    scale: float = 1.0
    """From SI to the unit of an axis."""
    unit: str = ""
    """Of an axis."""

    @property
    def words(self) -> str:
        """The title inside of a sentence."""
        return self.title if self.title[1].isupper() else f"{self.title[0].lower()}{self.title[1:]}"

    def axis(self, values: Sequence[float | None]) -> tuple[float, str]:
        """Scale and unit of an axis for some values: seconds where milliseconds would be thousands."""
        if self.unit == "ms" and max((value or 0.0 for value in values), default=0.0) >= 2.0:
            return 1.0, "s"
        return self.scale, self.unit

    def of(self, result: Record) -> float | None:
        """Its value in a result; None where there is none."""
        *outer, last = self.name.split(".")
        for step in outer:
            result = result.get(step) or {}
        return number(result, last)


def _ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _whole(value: float | None) -> str:
    if value is not None and value >= 999_500:
        return f"{value / 1e6:.3g}M"
    return ABSENT if value is None else count(float(f"{value:.3g}"))


def _bytes(value: float | None) -> str:
    return ABSENT if value is None else format_bytes(value)


def _share(value: float | None) -> str:
    return share(value).replace("less than ", "<")


METRICS = (
    Metric("tpot_s", "Time per output token", "TPOT", seconds, 1e3, "ms"),
    Metric("ttft_s", "Time to first token", "TTFT", seconds, 1e3, "ms"),
    Metric("step_s", "Step time", "step", seconds, 1e3, "ms"),
    Metric("engine.step_s", "Step time, played event by event", "played", seconds, 1e3, "ms"),
    Metric("tokens_per_s", "Throughput", "tok/s", _whole, 1.0, "tokens/s"),
    Metric("tokens_per_s_per_gpu", "Throughput of one GPU", "tok/s/GPU", _whole, 1.0, "tokens/s"),
    Metric("memory_bytes.total", "Memory of the fullest GPU", "memory", _bytes, 1e-9, "GB"),
    Metric("imbalance", "Busiest rank over mean", "imbalance", _ratio),
    Metric("imbalance_before_capacity", "Busiest rank over mean, as routed", "as routed", _ratio),
    Metric("dropped_fraction", "Choices dropped", "dropped", _share, 100.0, "%"),
    Metric("dropped_weight_fraction", "Router weight dropped", "weight", _share, 100.0, "%"),
    Metric("tokens_without_expert_fraction", "Tokens left without an expert", "left out", _share, 100.0, "%"),
    Metric("rerouted_fraction", "Choices sent to another expert", "rerouted", _share, 100.0, "%"),
    Metric("padding_fraction", "Rows that are padding", "padded", _share, 100.0, "%"),
    Metric("mfu", "FLOP/s use", "FLOP/s use", _share, 100.0, "%"),
    Metric("usd_per_mtok", "Cost of a million tokens", "USD/Mtok", usd, 1.0, "USD"),
)
"""Figures in the order they are shown; what a result has besides is in the JSON and the CSV."""

LASTING = ("tpot_s", "step_s", "engine.step_s", "tokens_per_s", "memory_bytes.total")
"""Shown even where they are the same at all points."""
SAME = {
    "step_s": ("tpot_s", "ttft_s"),
    "imbalance_before_capacity": ("imbalance",),
    "tokens_per_s_per_gpu": ("tokens_per_s",),
    "mfu": ("tokens_per_s",),
    "usd_per_mtok": ("tokens_per_s",),
}
"""Left out where it goes with one of these, or with its inverse, at all points."""


def by_name(name: str) -> Metric:
    """A figure by its dotted name."""
    return next(one for one in METRICS if one.name == name)


def shown_metrics(points: Sequence[Record]) -> list[Metric]:
    """Figures that tell the points apart, and those that are always asked for."""
    results = [point["result"] for point in points if "result" in point]
    columns = {one.name: [one.of(result) for result in results] for one in METRICS}
    found = []
    for one in METRICS:
        values = columns[one.name]
        told = {_rounded(value) for value in values if value is not None}
        if not told or not (len(told) > 1 or one.name in LASTING):
            continue
        if any(_in_step(values, columns[other]) for other in SAME.get(one.name, ())):
            continue
        found.append(one)
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _in_step(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    """One column is the other, or its inverse, times a number."""
    pairs = [(value, of) for value, of in zip(one, other, strict=True) if value and of]
    if len(pairs) < len(one):
        return False
    ratios, products = [value / of for value, of in pairs], [value * of for value, of in pairs]
    return any(max(column) - min(column) <= 1e-9 * max(column) for column in (ratios, products))


def heading(told: Record) -> str:
    """What all points share: model and workload."""
    scenario = told.get("scenario") or {}
    return ", ".join(str(scenario[key]) for key in ("model", "workload") if key in scenario)


def key_names(keys: Sequence[str]) -> dict[str, str]:
    """Short names of swept keys: the last part, where no two share it."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {
        key: (name if last.count(name) == 1 else key).replace("_", " ")
        for key, name in zip(keys, last, strict=True)
    }


def value_text(value: Any) -> str:
    """A value of a key, as it was written."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def values_text(values: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """``ep 8, placement eplb``."""
    said = [f"{names.get(key, key)} {value_text(value)}" for key, value in values.items()]
    return ", ".join(said) or "different values"


def spaced(n: int, most: int) -> list[int]:
    """Places of at most `most` of n things, evenly chosen, both ends among them."""
    return sorted({round(at * (n - 1) / max(min(n, most) - 1, 1)) for at in range(min(n, most))})


def knee_lines(told: Record, most: int) -> list[str]:
    """What the knees of a trade-off mean, curves of which the same is said in one line.

    Parameters
    ----------
    told
        The object of ``moesim sweep --json``.
    most
        Curves at most, evenly chosen.
    """
    trade, names = told.get("tradeoff"), key_names(told["swept"])
    if not trade:
        return []
    lines: dict[str, list[str]] = {}
    for curve in (trade["curves"][at] for at in spaced(len(trade["curves"]), most)):
        lines.setdefault(_knee_words(told, curve), []).append(values_text(curve["set"], names))
    is_one = len(trade["curves"]) == 1
    return [
        f"There {said}" if is_one else f"With {'; or with '.join(sets)}, there {said}"
        for said, sets in lines.items()
    ]


def _knee_words(told: Record, curve: Record) -> str:
    trade, names = told["tradeoff"], key_names(told["swept"])
    if curve.get("knee") is None:
        return f"is no knee: {curve['why_not']}."
    x, y = by_name(trade["x"]), by_name(trade["y"])
    point = told["points"][curve["knee"]]
    at = values_text({trade["along"]: point["set"][trade["along"]]}, names)
    costs, (step, one) = curve["costs"], _unit_of(y)
    before, beyond = (seconds(costs[name] * step) for name in ("before", "beyond"))
    return (
        f"is a knee at {at}: {y.words} {y.text(y.of(point['result']))}, "
        f"{x.words} {x.text(x.of(point['result']))}. "
        f"Up to there {one} less costs {before}, beyond it {beyond}: {costs['beyond'] / costs['before']:.3g} "
        "times as much."
    )


def refused_groups(told: Record) -> list[tuple[str, int, str]]:
    """Refused points by reason: what their points have in common, how many, why."""
    names = key_names(told["swept"])
    groups: dict[str, list[Record]] = {}
    for point in told["points"]:
        if "refused" in point:
            groups.setdefault(point["refused"], []).append(point["set"])
    found = []
    for reason, sets in groups.items():
        shared = {key: one for key, one in sets[0].items() if all(other[key] == one for other in sets)}
        found.append((values_text(shared, names), len(sets), reason))
    return found


def _unit_of(metric: Metric) -> tuple[float, str]:
    """A step of a figure that people count in."""
    return (0.01, "a percentage point") if metric.unit == "%" else (0.01, "a cent a million tokens")
