"""Figures of a sweep: each quantity against the key with most values, and the trade-off with its knees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from moesim.report import palette
from moesim.report.figures import Figure, base_layout
from moesim.report.sweep_words import (
    Metric,
    by_name,
    key_names,
    shown_metrics,
    spaced,
    value_text,
    values_text,
)
from moesim.report.text import Record

__all__ = ["Curve", "axis_of", "curves_of", "hover_texts", "metric_figure", "tradeoff_figure"]

COLORS = (*palette.SERIES, "#ddcc77", "#44aa99", "#882255")
DASHES = ("solid", "dash", "dot")
MOST_CURVES = 12
"""Curves of one figure that an eye tells apart."""
MOST_TOLD = 3000
"""Points of a page up to which each is told in full where it is pointed at."""
LOG_FROM = 20.0
"""Largest over smallest value from which an axis is logarithmic."""


@dataclass(frozen=True)
class Curve:
    """Points that differ only in the key of the x axis."""

    name: str
    """What the other keys are."""
    numbers: tuple[int, ...]
    """Of its points."""
    color: str
    dash: str


def axis_of(told: Record) -> str:
    """Key of the x axis: the one with most values, a number's before a name's."""
    keys: list[str] = list(told["swept"])
    values: dict[str, dict[Any, None]] = {key: {} for key in keys}
    for point in told["points"]:
        for key, value in point["set"].items():
            values[key][value] = None

    def rank(key: str) -> tuple[int, bool]:
        return len(values[key]), all(isinstance(value, int | float) for value in values[key])

    return max(keys, key=rank)


def curves_of(told: Record, along: str) -> list[Curve]:
    """Curves along one key, one for each setting of the others, as many as can be told apart."""
    names = key_names(told["swept"])
    found: dict[str, list[int]] = {}
    for number, point in enumerate(told["points"]):
        others = {key: value for key, value in point["set"].items() if key != along}
        found.setdefault(values_text(others, names) if others else "", []).append(number)
    drawn = [
        (name, numbers)
        for name, numbers in found.items()
        if any("result" in told["points"][number] for number in numbers)
    ]
    return [
        Curve(name, tuple(numbers), *_color_and_dash(at))
        for at, (name, numbers) in enumerate(drawn[one] for one in spaced(len(drawn), MOST_CURVES))
    ]


def metric_figure(
    told: Record, metric: Metric, along: str, curves: Sequence[Curve], hovers: Sequence[str]
) -> Figure:
    """One quantity against the key of the x axis; refused points leave gaps."""
    scale, unit = metric.axis([metric.of(point.get("result") or {}) for point in told["points"]])
    layout = base_layout(290, key_names(told["swept"])[along], unit, hovermode="closest")
    places, quantity = _places([point["set"][along] for point in told["points"]])
    values = [place for place in places if not isinstance(place, str)]
    if quantity:
        layout["xaxis"]["title"]["text"] += f" [{quantity}]"
    if len(values) < len(places):
        _name_ticks(layout, list(dict.fromkeys(map(str, places))))
    elif min(values) > 0 and max(values) >= LOG_FROM * min(values):
        ticks = sorted(set(values))
        layout["xaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [value_text(one) for one in ticks]}
    data = [_line(told, metric, scale, places, curve, hovers) for curve in curves]
    drawn = [y for line in data for y in line["y"] if y is not None]
    if drawn and min(drawn) < 0.4 * max(drawn):
        layout["yaxis"]["rangemode"] = "tozero"
    _draw_capacity(layout, told, metric, drawn)
    return {"data": data, "layout": layout}


Place = float | str


def _places(values: Sequence[Any]) -> tuple[list[Place], str]:
    """Where values stand on an axis: all as numbers, with the unit that all have, or else as texts."""
    if all(isinstance(value, int | float) for value in values):
        return list(values), ""
    parts = [str(value).split(" ", 1) for value in values]
    units = {part[1] for part in parts if len(part) == 2}
    try:
        if len(units) == 1 and all(len(part) == 2 for part in parts):
            return [float(part[0]) for part in parts], units.pop()
    except ValueError:
        pass
    return [value_text(value) for value in values], ""


def _name_ticks(layout: dict[str, Any], texts: Sequence[str]) -> None:
    """One tick a name, in the order given; what all begin with is said once, in the axis' title."""
    axis = layout["xaxis"]
    begin = texts[0][: texts[0].rfind("-") + 1]
    if len(texts) < 2 or not all(text.startswith(begin) for text in texts):
        begin = ""
    axis |= {"type": "category", "categoryorder": "array", "categoryarray": list(texts)}
    if begin:
        axis |= {"tickvals": list(texts), "ticktext": [text.removeprefix(begin) for text in texts]}
        axis["title"]["text"] += f": {begin}..."


def _line(
    told: Record, metric: Metric, scale: float, places: Sequence[Place], curve: Curve, hovers: Sequence[str]
) -> dict[str, Any]:
    numbers = list(curve.numbers)
    if not any(isinstance(place, str) for place in places):
        numbers.sort(key=lambda number: places[number])
    values = [metric.of(told["points"][number].get("result") or {}) for number in numbers]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(curve.name or metric.title),
        "showlegend": False,
        "x": [places[number] for number in numbers],
        "y": [None if value is None else _digits(value * scale) for value in values],
        "text": [hovers[number] for number in numbers],
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": curve.color, "dash": curve.dash, "width": 2},
        "marker": {"size": 6, "color": curve.color},
    }


def _draw_capacity(layout: dict[str, Any], told: Record, metric: Metric, drawn: Sequence[float]) -> None:
    """A dashed line at what a GPU holds, where the memory used comes near it."""
    if metric.name != "memory_bytes.total" or not drawn:
        return
    held = {point["result"]["memory_bytes"]["capacity"] for point in told["points"] if "result" in point}
    if len(held) == 1 and (most := held.pop() * metric.scale) < 1.6 * max(drawn):
        line = {"color": "#882255", "width": 1.5, "dash": "dash"}
        at = {"x0": 0, "x1": 1, "y0": most, "y1": most}
        layout["shapes"] = [{"type": "line", "xref": "paper", "yref": "y", "line": line, **at}]
        note = {"x": 0.01, "y": most, "xref": "paper", "yref": "y", "text": "what a GPU holds"}
        note |= {"xanchor": "left", "yanchor": "bottom", "showarrow": False}
        layout["annotations"] = [note | {"font": {"color": "#882255", "size": 12}}]
        layout["yaxis"]["range"] = [0, 1.12 * most]


def tradeoff_figure(told: Record, hovers: Sequence[str]) -> Figure | None:
    """What is given up against the time that it buys, knees marked; None where nothing is traded."""
    trade = told.get("tradeoff")
    if not trade:
        return None
    x, y = by_name(trade["x"]), by_name(trade["y"])
    drawn = [told["points"][number]["result"] for curve in trade["curves"] for number in curve["points"]]
    scale, unit = x.axis([x.of(result) for result in drawn])
    layout = base_layout(430, f"{x.title} [{unit}]", f"{y.title} [{y.unit}]", hovermode="closest")
    layout["yaxis"]["rangemode"] = "tozero"
    data: list[dict[str, Any]] = []
    shown = spaced(len(trade["curves"]), MOST_CURVES)
    for at, curve in enumerate(trade["curves"][one] for one in shown):
        points = [told["points"][number] for number in curve["points"]]
        xs = [_digits((x.of(point["result"]) or 0.0) * scale) for point in points]
        ys = [_digits((y.of(point["result"]) or 0.0) * y.scale) for point in points]
        data.append(_traded(told, curve, hovers, xs, ys) | _stroke(at))
        if curve["knee"] is not None:
            knee = curve["points"].index(curve["knee"])
            data.append(_ring(xs[knee], ys[knee]))
            if len(trade["curves"]) <= 4:
                note = values_text(
                    {trade["along"]: points[knee]["set"][trade["along"]]}, key_names(told["swept"])
                )
                layout.setdefault("annotations", []).append(_knee(xs[knee], ys[knee], note))
    return {"data": data, "layout": layout}


def _traded(
    told: Record, curve: Record, hovers: Sequence[str], xs: list[float], ys: list[float]
) -> dict[str, Any]:
    """One curve of the trade-off; of a single one, points far enough apart are named."""
    trade, names = told["tradeoff"], key_names(told["swept"])
    texts = [value_text(told["points"][number]["set"][trade["along"]]) for number in curve["points"]]
    is_alone = len(trade["curves"]) == 1
    hidden = None if curve["knee"] is None else curve["points"].index(curve["knee"])
    return {
        "type": "scatter",
        "mode": "lines+markers+text" if is_alone else "lines+markers",
        "name": escape(values_text(curve["set"], names)) if curve["set"] else "points",
        "showlegend": not is_alone,
        "x": xs,
        "y": ys,
        "text": ["" if at == hidden else text for at, text in enumerate(_apart(texts, xs, ys))],
        "textposition": "top right",
        "textfont": {"size": 11, "color": "#5d6973"},
        "customdata": [hovers[number] for number in curve["points"]],
        "hovertemplate": "%{customdata}<extra></extra>",
    }


def _apart(texts: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> list[str]:
    """Texts of points, less those that would lie on one before."""
    width, height = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    kept: list[tuple[float, float]] = []
    found = []
    for text, x, y in zip(texts, xs, ys, strict=True):
        free = all(abs(x - at) > 0.05 * width or abs(y - up) > 0.05 * height for at, up in kept)
        kept += [(x, y)] * free
        found.append(text if free else "")
    return found


def _color_and_dash(at: int) -> tuple[str, str]:
    """Of a curve by its number; neighbours differ in both, so that one shows on top of the other."""
    return COLORS[at % len(COLORS)], DASHES[(at + at // len(COLORS)) % len(DASHES)]


def _stroke(at: int) -> dict[str, Any]:
    color, dash = _color_and_dash(at)
    return {"line": {"color": color, "dash": dash, "width": 2}, "marker": {"size": 7, "color": color}}


def _ring(x: float, y: float) -> dict[str, Any]:
    marker = {"size": 17, "symbol": "circle-open", "color": palette.INK, "line": {"width": 2}}
    ring = {"type": "scatter", "mode": "markers", "name": "knee", "x": [x], "y": [y], "marker": marker}
    return ring | {"hoverinfo": "skip", "showlegend": False}


def _knee(x: float, y: float, words: str) -> dict[str, Any]:
    text = f"<b>knee</b>: {escape(words)}"
    note = {"x": x, "y": y, "text": text, "showarrow": True, "arrowhead": 0, "arrowcolor": palette.INK}
    return note | {"ax": 60, "ay": -46, "standoff": 9, "bgcolor": "rgba(255,255,255,0.85)"}


def hover_texts(told: Record) -> list[str]:
    """All that each point stands for; of very many, what was set alone."""
    points, names = told["points"], key_names(told["swept"])
    metrics = shown_metrics(points) if len(points) <= MOST_TOLD else []
    found = []
    for point in points:
        lines = [f"<b>{escape(values_text(point['set'], names))}</b>"]
        if "result" in point:
            lines += [f"{metric.words} {metric.text(metric.of(point['result']))}" for metric in metrics]
        found.append("<br>".join(lines))
    return found


def _digits(value: float) -> float:
    """Five digits are more than a screen shows, and keep the page small."""
    return float(f"{value:.5g}")
