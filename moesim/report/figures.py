"""Figures of the ranking: Pareto front, where the time goes, memory. As plain Plotly JSON, with no import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from moesim.errors import UnitError
from moesim.report import palette
from moesim.report.text import (
    Record,
    band_of,
    band_text,
    cluster_name,
    count,
    layout_name,
    number,
    parts_of,
    share,
    size_name,
    step_parts,
    total_and_capacity,
    usd,
)
from moesim.units import format_bytes, format_seconds, parse_bound

__all__ = ["Figure", "base_layout", "memory_bars", "pareto", "pareto_front", "row_label", "time_bars"]

Figure = dict[str, Any]
"""``{"data": [...], "layout": {...}}``, as Plotly.newPlot takes them."""

MAX_POINTS = 1200
"""Markers of one figure; more are thinned, so that the page stays light."""

MS = 1e3
GB = 1e-9

LATENCIES = (("tpot_s", "time per output token"), ("step_s", "step time"), ("ttft_s", "time to first token"))


def base_layout(height: int, x_title: str, y_title: str = "", **more: Any) -> dict[str, Any]:
    """What all figures share: type, grid, margins, legend above the plot."""
    axis = {"gridcolor": "#e8ecef", "zeroline": False, "linecolor": "#c8ced3", "automargin": True}
    layout = {
        "height": height,
        "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 13},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 16, "t": 16, "b": 48},
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": "#c8ced3", "font": {"color": palette.INK}},
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "xaxis": {**axis, "title": {"text": x_title, "font": {"size": 13}}},
        "yaxis": {**axis, "title": {"text": y_title, "font": {"size": 13}}},
    }
    layout["font"] = {**layout["font"], "color": palette.INK}  # type: ignore[dict-item]
    return {**layout, **more}


def row_label(row: Record) -> str:
    """Two short lines for an axis: rank, where it has one, and layout; then size."""
    rank = number(row, "rank")
    name = (f"<b>{int(rank)}</b>  " if rank is not None else "") + escape(layout_name(row))
    size = size_name(row)
    return f"{name}<br><span style='color:#6b7680'>{escape(size)}</span>" if size else name


def _hover(row: Record) -> str:
    """All that one point stands for."""
    lines = [f"<b>{escape(layout_name(row))}</b>", escape(f"{cluster_name(row)}  {size_name(row)}")]
    for key, name in LATENCIES:
        if number(row, key) is not None:
            lines.append(f"{name} {band_text(row, key)}")
    per_gpu = number(row, "tokens_per_s_per_gpu")
    lines.append(f"{count(per_gpu)} tokens/s per GPU")
    if number(row, "usd_per_mtok") is not None:
        lines.append(f"{usd(number(row, 'usd_per_mtok'))} per million tokens")
    lines.append(f"memory {total_and_capacity(row)}")
    if row.get("why_not"):
        lines.append(escape(str(row["why_not"])))
    return "<br>".join(lines)


def pareto_front(latency: Sequence[float], throughput: Sequence[float]) -> list[int]:
    """Points that no other beats in both, from the lowest latency up.

    Parameters
    ----------
    latency : (n,)
        Less is better; any unit.
    throughput : (n,)
        More is better; any unit.
    """
    order = sorted(range(len(latency)), key=lambda i: (latency[i], -throughput[i]))
    front: list[int] = []
    for i in order:
        if not front or throughput[i] > throughput[front[-1]]:
            front.append(i)
    return front


def pareto(rows: Sequence[Record], others: Sequence[Record], targets: Record | None) -> Figure | None:
    """Latency against throughput per GPU; None where no row has both.

    Parameters
    ----------
    rows
        Layouts of the ranking, each at its best size.
    others
        Every other size of every layout that fits: those that miss a target in grey.
    targets
        A bound on the latency shown is drawn.
    """
    latency = next((pair for pair in LATENCIES if any(_has(row, pair[0]) for row in rows)), None)
    if latency is None:
        latency = next((pair for pair in LATENCIES if any(_has(row, pair[0]) for row in others)), None)
    if latency is None:
        return None
    key, title = latency
    met = [row for row in others if row.get("feasible") is not False]
    ranked = [row for row in (*rows, *met) if _has(row, key)]
    missed = _thin([row for row in others if _has(row, key) and row.get("feasible") is False])
    data = [_points(missed, key, "misses a target", palette.GREY, 6)] if missed else []
    front = pareto_front([_x(row, key) for row in ranked], [_y(row) for row in ranked])
    on_front = [ranked[i] for i in front]
    if len(on_front) > 1:
        data.append(_front_line(on_front, key))
    chosen = set(front)
    kept = on_front + _thin([row for i, row in enumerate(ranked) if i not in chosen])
    clusters = sorted({cluster_name(row) for row in kept})
    for i, name in enumerate(clusters):
        mine = [row for row in kept if cluster_name(row) == name]
        data.append(_points(mine, key, name, palette.SERIES[i % len(palette.SERIES)], 9))
    if ranked:
        data.append(_best_mark(ranked[0], key))
    layout = base_layout(460, f"{title} [ms]", "tokens/s per GPU", hovermode="closest")
    layout["yaxis"]["rangemode"] = "tozero"
    xs = [_x(row, key) for row in [*ranked, *missed]]
    if min(xs) > 0 and max(xs) > 20 * min(xs):
        layout["xaxis"] |= {"type": "log", "dtick": "D2", "minor": {"showgrid": False}}
    _draw_target(layout, targets, key)
    return {"data": data, "layout": layout}


def _has(row: Record, key: str) -> bool:
    return number(row, key) is not None and number(row, "tokens_per_s_per_gpu") is not None


def _x(row: Record, key: str) -> float:
    return (number(row, key) or 0.0) * MS


def _y(row: Record) -> float:
    return number(row, "tokens_per_s_per_gpu") or 0.0


def _thin(rows: list[Record]) -> list[Record]:
    """At most `MAX_POINTS` rows, evenly spaced in their order."""
    if len(rows) <= MAX_POINTS:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int)]


def _points(rows: Sequence[Record], key: str, name: str, color: str, size: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": [_digits(_x(row, key)) for row in rows],
        "y": [_digits(_y(row)) for row in rows],
        "text": [_hover(row) for row in rows],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"size": size, "color": color, "opacity": 0.75, "line": {"width": 0.5, "color": "#ffffff"}},
    }


def _front_line(rows: Sequence[Record], key: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [_digits(_x(row, key)) for row in rows],
        "y": [_digits(_y(row)) for row in rows],
        "line": {"shape": "hv", "color": palette.INK, "width": 1.5},
        "hoverinfo": "skip",
    }


def _best_mark(row: Record, key: str) -> dict[str, Any]:
    """A ring around the layout ranked first, with its band."""
    mark = {
        "type": "scatter",
        "mode": "markers",
        "name": "ranked first, with its band",
        "x": [_digits(_x(row, key))],
        "y": [_digits(_y(row))],
        "marker": {"size": 17, "symbol": "circle-open", "color": palette.INK, "line": {"width": 2}},
        "hoverinfo": "skip",
    }
    band = band_of(row)
    if band is None or band[0] != key:
        return {**mark, "name": "ranked first"}
    value, low, high = _x(row, key), band[1] * MS, band[2] * MS
    error = {"type": "data", "symmetric": False, "array": [high - value], "arrayminus": [value - low]}
    return {**mark, "error_x": {**error, "thickness": 1.5, "width": 5, "color": palette.INK}}


def _draw_target(layout: dict[str, Any], targets: Record | None, key: str) -> None:
    """A dashed line at the bound on the latency of the x axis."""
    text = next(
        (
            bound
            for name, bound in (targets or {}).items()
            if name.startswith(key.removesuffix("_s")) and bound
        ),
        None,
    )
    if text is None:
        return
    try:
        bound = parse_bound(str(text))
    except UnitError:
        return
    line = {"color": "#882255", "width": 1.5, "dash": "dash"}
    at = {"x0": bound.value * MS, "x1": bound.value * MS, "y0": 0, "y1": 1}
    layout["shapes"] = [{"type": "line", "xref": "x", "yref": "paper", "line": line, **at}]
    is_log = layout["xaxis"].get("type") == "log"
    note = {
        "x": float(np.log10(bound.value * MS)) if is_log else bound.value * MS,
        "text": f"target {escape(str(text).replace('<=', '≤'))}",
        "xref": "x",
        "yref": "paper",
        "y": 0.99,
        "yanchor": "top",
        "xanchor": "left",
        "showarrow": False,
        "font": {"color": "#882255", "size": 12},
        "bgcolor": "rgba(255,255,255,0.8)",
    }
    layout["annotations"] = [note]


def time_bars(rows: Sequence[Record]) -> Figure | None:
    """Where a step's time goes in each of some rows; None where no row has a breakdown."""
    shown = [{**row, "breakdown_s": step_parts(row)} for row in rows if step_parts(row)]
    kinds = _kinds([step_parts(row) for row in shown])
    figure = _bars(shown, kinds, "breakdown_s", MS, "time [ms]", format_seconds)
    if figure is not None and any(number(row, "step_s") is not None for row in shown):
        figure["data"].append(
            _ticks(shown, [number(row, "step_s") for row in shown], MS, "step, overlap taken off")
        )
    return figure


def memory_bars(rows: Sequence[Record]) -> Figure | None:
    """Memory of the fullest GPU by item, with the capacity marked; None where no row has it."""
    shown = [row for row in rows if parts_of(row, "memory_bytes")]
    items = [parts_of(row, "memory_bytes") for row in shown]
    kinds = [kind for kind in _kinds(items) if kind not in ("total", "capacity")]
    figure = _bars(shown, kinds, "memory_bytes", GB, "memory [GB]", format_bytes)
    if figure is not None:
        capacities = [one.get("capacity") for one in items]
        figure["data"].append(_ticks(shown, capacities, GB, "capacity"))
    return figure


def _kinds(parts: Sequence[Mapping[str, float]]) -> list[str]:
    """Kinds in the palette's order: computation, communication, waiting; unknown ones before waiting."""
    seen = {kind for one in parts for kind in one}
    known = list(palette.KINDS)
    place = {kind: i for i, kind in enumerate(known)}

    def order(kind: str) -> tuple[float, str]:
        bare = kind.removeprefix(palette.EXPOSED)
        return place.get(bare, place["wait"] - 0.5), kind

    return sorted(seen, key=order)


def _bars(
    rows: Sequence[Record], kinds: Sequence[str], key: str, scale: float, title: str, write: Any
) -> Figure | None:
    if not rows or not kinds:
        return None
    labels = [row_label(row) for row in rows]
    data = [_bar(rows, labels, kind, key, scale, write) for kind in kinds]
    layout = base_layout(130 + 46 * len(rows), title, barmode="stack", bargap=0.35)
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False}
    layout["legend"] |= {"traceorder": "normal"}
    return {"data": data, "layout": layout}


def _bar(
    rows: Sequence[Record], labels: list[str], kind: str, key: str, scale: float, write: Any
) -> dict[str, Any]:
    values = [parts_of(row, key).get(kind, 0.0) for row in rows]
    sums = [
        sum(value for name, value in parts_of(row, key).items() if name not in ("total", "capacity"))
        for row in rows
    ]
    name = escape(palette.label(kind))
    marker: dict[str, Any] = {"color": palette.color(kind), "line": {"width": 0.5, "color": "#ffffff"}}
    if palette.is_exposed(kind):
        marker["pattern"] = {
            "shape": "/",
            "size": 6,
            "solidity": 0.25,
            "fgcolor": "#ffffff",
            "fillmode": "overlay",
        }
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": labels,
        "x": [_digits(value * scale) for value in values],
        "text": [
            f"{write(value)}, {share(value / whole)}" for value, whole in zip(values, sums, strict=True)
        ],
        "textposition": "none",
        "hovertemplate": f"<b>{name}</b> %{{text}}<extra></extra>",
        "marker": marker,
    }


def _ticks(rows: Sequence[Record], values: Sequence[float | None], scale: float, name: str) -> dict[str, Any]:
    """An upright mark across each bar."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "y": [row_label(row) for row in rows],
        "x": [None if value is None else _digits(value * scale) for value in values],
        "marker": {"symbol": "line-ns", "size": 26, "line": {"width": 2.5, "color": palette.INK}},
        "hovertemplate": f"{name} %{{x}}<extra></extra>",
    }


def _digits(value: float) -> float:
    """Four digits are more than a screen shows, and keep the page small."""
    return float(f"{value:.4g}")
