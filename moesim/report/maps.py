"""Figures of one layout: load of experts and ranks, traffic, timeline. As plain Plotly JSON."""

from __future__ import annotations

import re
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.program import STREAMS
from moesim.engine.timeline import Span, Timeline
from moesim.report import palette
from moesim.report.detail import LayoutDetail
from moesim.report.figures import Figure, base_layout

__all__ = [
    "expert_map",
    "load_by_layer",
    "shown_ranks",
    "step_overview",
    "timeline_window",
    "traffic_map",
    "window_s",
]

MAX_COLUMNS = 512
MAX_ROWS = 128
MAX_RANKS = 96
MAX_SPANS = 900
N_WINDOW_LAYERS = 4

MS = 1e3

LAYER = re.compile(r"(\w+)\.(\d+)\.")
"""How a task's name begins: kind of block and layer."""

Array = NDArray[Any]


def _rounded(values: Array) -> list[Any]:
    """Nested lists with three digits; NaN becomes null."""
    flat = [None if value != value else float(f"{value:.3g}") for value in values.ravel().tolist()]
    return np.array(flat, dtype=object).reshape(values.shape).tolist()  # type: ignore[no-any-return]


def _labels(detail: LayoutDetail, n_layers: int) -> list[str]:
    return [str(layer) for layer in (detail.layers if detail.layers is not None else range(n_layers))]


def _blocks(values: Array, n_groups: int, axis: int) -> tuple[Array, int]:
    """Join neighbours along an axis into groups of equal size; the most loaded stands for its group."""
    size = -(-values.shape[axis] // n_groups)
    if size == 1:
        return values, 1
    starts = np.arange(0, values.shape[axis], size)
    return np.maximum.reduceat(values, starts, axis=axis), size


def expert_map(detail: LayoutDetail) -> Figure | None:
    """Tokens of each expert over the layer's mean; None where it is not known.

    More than 512 experts, or 128 layers, are joined with their neighbours; the busiest is shown.
    """
    if detail.expert_load is None or detail.expert_load.ndim != 2 or not detail.expert_load.size:
        return None
    load = np.asarray(detail.expert_load, dtype=float)
    names = _labels(detail, len(load))
    load, per_row = _blocks(load, MAX_ROWS, 0)
    load, per_column = _blocks(load, MAX_COLUMNS, 1)
    # a few very hot experts would leave all others pale: the scale ends where 99.5% of the map is
    top = max(float(np.nanpercentile(load, 99.5)), 1.5)
    axis = detail.expert_axis if per_column == 1 else f"{detail.expert_axis}, {per_column} to a column"
    height = int(np.clip(120 + 9 * len(load), 220, 640))
    layout = base_layout(height, escape(axis), "MoE layer")
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "type": "category", "nticks": 12}
    layout["xaxis"] |= {"showgrid": False}
    heat = {
        "type": "heatmap",
        "z": _rounded(load),
        "x": [i * per_column for i in range(load.shape[1])],
        "y": names[::per_row],
        "zmin": 0,
        "zmax": float(f"{top:.3g}"),
        "colorscale": [list(stop) for stop in palette.SCALE],
        "colorbar": _colorbar("tokens<br>over mean"),
        "hovertemplate": f"layer %{{y}}, {escape(detail.expert_axis)} %{{x}}<br>"
        "<b>%{z:.2f}</b> x the mean<extra></extra>",
    }
    return {"data": [heat], "layout": layout}


def _colorbar(title: str) -> dict[str, Any]:
    return {
        "title": {"text": title, "font": {"size": 11}},
        "thickness": 12,
        "outlinewidth": 0,
        "tickfont": {"size": 11},
    }


def load_by_layer(detail: LayoutDetail) -> Figure | None:
    """Busiest expert and busiest rank over the mean, layer by layer; None where neither is known."""
    data = []
    for load, name, color in (
        (detail.expert_load, f"busiest {detail.expert_axis}", palette.color("expert_ffn")),
        (detail.rank_load, "busiest rank", palette.color("dispatch")),
    ):
        if load is None or load.ndim != 2 or not load.size:
            continue
        values = np.asarray(load, dtype=float)
        mean = values.mean(axis=1)
        peak = np.divide(values.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(name),
                "x": [int(layer) for layer in _labels(detail, len(values))],
                "y": _rounded(peak),
                "line": {"color": color, "width": 2},
                "marker": {"size": 5},
                "hovertemplate": "layer %{x}: <b>%{y:.2f}</b> x the mean<extra></extra>",
            }
        )
    if not data:
        return None
    layout = base_layout(280, "MoE layer", "load over the mean")
    layout["yaxis"]["rangemode"] = "tozero"
    level = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": 1, "y1": 1}
    layout["shapes"] = [{**level, "line": {"color": palette.GREY, "dash": "dot", "width": 1.5}}]
    return {"data": data, "layout": layout}


def traffic_map(detail: LayoutDetail) -> Figure | None:
    """Bytes from rank to rank; None where they are not known or nothing leaves a rank.

    More than 96 ranks are summed in blocks of neighbours.
    """
    if detail.traffic is None or detail.traffic.ndim != 2 or detail.traffic.shape[0] < 2:
        return None
    traffic = np.array(detail.traffic, dtype=float)
    np.fill_diagonal(traffic, 0.0)
    if not traffic.any():
        return None
    size = -(-len(traffic) // MAX_RANKS)
    if size > 1:
        starts = np.arange(0, len(traffic), size)
        traffic = np.add.reduceat(np.add.reduceat(traffic, starts, axis=0), starts, axis=1)
    else:
        np.fill_diagonal(traffic, np.nan)
    peak = float(np.nanmax(traffic))
    factor, unit = next(((f, u) for f, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if peak >= f), (1.0, "B"))
    ranks = [i * size for i in range(len(traffic))]
    who = "rank" if size == 1 else f"rank, {size} to a cell"
    layout = base_layout(460, f"to {who}", f"from {who}")
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "constrain": "domain", "scaleanchor": "x"}
    layout["xaxis"] |= {"showgrid": False, "constrain": "domain"}
    heat = {
        "type": "heatmap",
        "z": _rounded(traffic / factor),
        "x": ranks,
        "y": ranks,
        "zmin": 0,
        "zmax": float(f"{peak / factor:.3g}"),  # Plotly ignores zmin alone
        "colorscale": [list(stop) for stop in palette.SCALE],
        "colorbar": _colorbar(unit),
        "hovertemplate": f"rank %{{y}} to rank %{{x}}: <b>%{{z:.3g}} {unit}</b><extra></extra>",
    }
    return {"data": [heat], "layout": layout}


def shown_ranks(timeline: Timeline) -> dict[int, str]:
    """Ranks worth a look: the one that computes longest and the median one, and why."""
    held_s = np.nan_to_num(timeline.end_s - timeline.start_s)
    computes = np.array([task.stream == "compute" for task in timeline.program.tasks], dtype=bool)
    load_s = held_s[computes].sum(axis=0)
    order = np.argsort(load_s, kind="stable")
    busiest, median = int(order[-1]), int(order[(len(order) - 1) // 2])
    if busiest == median:
        return {busiest: "the only rank"} if len(order) == 1 else {busiest: "busiest"}
    return {busiest: "busiest", median: "median"}


def window_s(timeline: Timeline) -> tuple[float, float]:
    """Start and end of the first MoE layers, or of the first layers, or of the whole step [s]."""
    layers: dict[tuple[str, int], list[int]] = {}
    for position, task in enumerate(timeline.program.tasks):
        if match := LAYER.match(task.name):
            layers.setdefault((match[1], int(match[2])), []).append(position)
    moe = [layer for layer in layers if layer[0] == "moe"] or list(layers)
    chosen = [position for layer in moe[:N_WINDOW_LAYERS] for position in layers[layer]]
    if not chosen:
        return 0.0, timeline.makespan_s
    return float(np.nanmin(timeline.ready_s[chosen])), float(np.nanmax(timeline.end_s[chosen]))


def timeline_window(timeline: Timeline) -> Figure | None:
    """Bars of what two ranks run during the first MoE layers; None where nothing runs."""
    begin_s, end_s = window_s(timeline)
    spans = [
        span
        for rank in shown_ranks(timeline)
        for span in timeline.spans(rank)
        if span.end_s > begin_s and span.ready_s < end_s and span.end_s > span.ready_s
    ]
    if not spans:
        return None
    spans = sorted(spans, key=lambda span: span.start_s)[:MAX_SPANS]
    scale, unit = (MS, "ms") if end_s - begin_s >= 2e-3 else (1e6, "us")
    rows = _stream_rows(timeline, spans)
    waits = [span for span in spans if span.start_s - span.ready_s > 1e-3 * (end_s - begin_s) / 10]
    data = [_wait_bars(waits, rows, scale, begin_s)] if waits else []
    for kind in dict.fromkeys(span.category or span.stream for span in spans):
        data.append(
            _span_bars([s for s in spans if (s.category or s.stream) == kind], rows, kind, scale, begin_s)
        )
    layout = base_layout(150 + 44 * len(rows), f"time since the window's start [{unit}]", barmode="overlay")
    names = list(rows.values())
    layout["yaxis"] |= {"categoryorder": "array", "categoryarray": names[::-1], "showgrid": False}
    layout["xaxis"] |= {"range": [0, (end_s - begin_s) * scale]}
    return {"data": data, "layout": {**layout, "bargap": 0.25}}


def _stream_rows(timeline: Timeline, spans: list[Span]) -> dict[tuple[int, str], str]:
    """Axis label of each rank and stream in use, ranks together."""
    why = shown_ranks(timeline)
    used = {(span.rank, span.stream) for span in spans}
    labels = timeline.program.labels or tuple(f"rank {rank}" for rank in range(timeline.program.n_ranks))
    return {
        (rank, stream): f"{escape(labels[rank])} ({why[rank]})<br>{stream}"
        for rank in why
        for stream in STREAMS
        if (rank, stream) in used
    }


def _span_bars(
    spans: list[Span], rows: dict[tuple[int, str], str], kind: str, scale: float, begin_s: float
) -> dict[str, Any]:
    name = escape(palette.label(kind))
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "y": [rows[span.rank, span.stream] for span in spans],
        "base": [_digits((span.start_s - begin_s) * scale) for span in spans],
        "x": [_digits((span.end_s - span.start_s) * scale) for span in spans],
        "text": [escape(span.name) for span in spans],
        "textposition": "none",
        "marker": {"color": palette.color(kind), "line": {"width": 0.5, "color": "#ffffff"}},
        "hovertemplate": f"<b>%{{text}}</b><br>{name}, %{{x}}<extra></extra>",
    }


def _wait_bars(
    spans: list[Span], rows: dict[tuple[int, str], str], scale: float, begin_s: float
) -> dict[str, Any]:
    """From ready to the last member's arrival."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": "waiting for peers",
        "y": [rows[span.rank, span.stream] for span in spans],
        "base": [_digits((span.ready_s - begin_s) * scale) for span in spans],
        "x": [_digits((span.start_s - span.ready_s) * scale) for span in spans],
        "text": [escape(span.name) for span in spans],
        "textposition": "none",
        "marker": _wait_marker(),
        "hovertemplate": "<b>%{text}</b> waits %{x}<extra></extra>",
    }


def step_overview(timeline: Timeline) -> Figure | None:
    """Time that each layer holds each stream of the busiest rank, by kind of work; None where nothing runs.

    Layers in program order; tasks of no layer stand under the first part of their name. Waiting for peers
    is drawn on top of the stream that waits.
    """
    rank = next(iter(shown_ranks(timeline)), None)
    held_s: dict[tuple[str, str], dict[str, float]] = {}
    places: dict[str, None] = {}
    for span in timeline.spans(rank):
        match = LAYER.match(span.name)
        place = match[2] if match else span.name.split(".")[0]
        places[place] = None
        for kind, part_s in (
            (span.category or span.stream, span.end_s - span.start_s),
            ("wait", span.start_s - span.ready_s),
        ):
            if part_s > 0:
                per_place = held_s.setdefault((span.stream, kind), {})
                per_place[place] = per_place.get(place, 0.0) + part_s
    streams = [stream for stream in STREAMS if any(key[0] == stream for key in held_s)]
    if not streams:
        return None
    layout = base_layout(110 + 110 * len(streams), "layer", barmode="stack", bargap=0.15)
    axis = layout.pop("yaxis")
    layout["xaxis"] |= {"type": "category", "nticks": 14, "anchor": _axis(len(streams) - 1)}
    for i, stream in enumerate(streams):
        top = 1 - i / len(streams)
        domain = [top - 1 / len(streams) + (0.08 if i < len(streams) - 1 else 0.0), top]
        layout[_axis(i).replace("y", "yaxis")] = {
            **axis,
            "domain": domain,
            "nticks": 4,
            "title": {"text": f"{stream} [us]", "font": {"size": 12}},
        }
    data: list[dict[str, Any]] = []
    named: set[str] = set()
    for (stream, kind), per_place in sorted(held_s.items(), key=lambda item: item[0][1] == "wait"):
        data.append(_overview_bars(kind, list(places), per_place, _axis(streams.index(stream))))
        data[-1]["showlegend"] = kind not in named
        named.add(kind)
    return {"data": data, "layout": layout}


def _axis(position: int) -> str:
    """Plotly's name of the first, second... vertical axis."""
    return "y" if position == 0 else f"y{position + 1}"


def _overview_bars(kind: str, places: list[str], held_s: dict[str, float], axis: str) -> dict[str, Any]:
    name = "waiting for peers" if kind == "wait" else escape(palette.label(kind))
    return {
        "type": "bar",
        "name": name,
        "legendgroup": name,
        "x": [escape(place) for place in places],
        "y": [_digits(held_s.get(place, 0.0) * 1e6) for place in places],
        "yaxis": axis,
        "marker": _wait_marker() if kind == "wait" else {"color": palette.color(kind)},
        "hovertemplate": f"{name} %{{y:.3g}} us<extra></extra>",
    }


def _wait_marker() -> dict[str, Any]:
    return {
        "color": palette.PALE,
        "pattern": {"shape": ".", "size": 5, "solidity": 0.2, "fgcolor": "#7d8790", "fillmode": "overlay"},
    }


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
