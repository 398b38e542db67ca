"""Figures of a router: skew, balance, batches, locality, layers, drift, domains, known models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moesim.report import palette
from moesim.report.figures import Figure, base_layout
from moesim.report.text import Record

__all__ = [
    "active_lines",
    "balance_bars",
    "busiest_lines",
    "domain_map",
    "drift_lines",
    "gini_by_layer",
    "hit_lines",
    "known_scatter",
    "link_lines",
    "locality_lines",
    "skew_by_layer",
]

_HEIGHT = 300
_MARKS = ("circle-open", "diamond-open", "line-ew")
_LOG_TICKS = (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
_INDIGO, _ROSE, _GREEN, _CYAN, _PURPLE, _OLIVE = palette.SERIES


def _digits(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.4g}") for value in values]


def _line(name: str, x: Sequence[Any], y: Sequence[float | None], color: str, **more: Any) -> dict[str, Any]:
    line = {"color": color, "width": 2, **more.pop("line", {})}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": escape(name),
        "x": list(x),
        "y": _digits(y),
        "line": line,
        "marker": {"size": 5},
        "hovertemplate": f"{escape(name)}, %{{x}}: <b>%{{y:.3g}}</b><extra></extra>",
        **more,
    }


def _level(name: str, x: Sequence[Any], value: float, color: str = "#7d8790") -> dict[str, Any]:
    """A dotted level across the figure, with its name in the legend."""
    ends = [x[0], x[-1]]
    return _line(name, ends, [value, value], color, mode="lines", line={"dash": "dot", "width": 1.5})


def _lines(data: list[dict[str, Any]], x_title: str, y_title: str, *, log2: bool = False) -> Figure:
    layout = base_layout(_HEIGHT, x_title, y_title)
    layout["yaxis"]["rangemode"] = "tozero"
    if log2:
        ticks = list(dict.fromkeys(x for one in data for x in one["x"]))
        layout["xaxis"] |= {"type": "log", "tickvals": ticks, "ticktext": [str(x) for x in ticks]}
    return {"data": data, "layout": layout}


def skew_by_layer(layers: Sequence[Record], even: Record | None) -> Figure:
    """Busiest expert over mean by layer, beside what chance makes of an even router."""
    x = [one["layer"] for one in layers]
    data = [_line("busiest expert", x, [one["busiest_over_mean"] for one in layers], _INDIGO)]
    if even:
        data.append(_level("equally popular experts", x, even["busiest_over_mean"]))
    return _lines(data, "MoE layer", "load over the mean")


def gini_by_layer(layers: Sequence[Record]) -> Figure:
    """Gini and entropy by layer."""
    x = [one["layer"] for one in layers]
    return _lines(
        [
            _line("Gini", x, [one["gini"] for one in layers], _ROSE),
            _line("entropy, of a uniform one", x, [one["entropy"] for one in layers], _GREEN),
        ],
        "MoE layer",
        "",
    )


def balance_bars(rows: Sequence[Record]) -> Figure:
    """Mean over busiest rank by EP size, a bar for each placement and a mark for each size of batch."""
    names = list(dict.fromkeys(str(row["placement"]) for row in rows))
    sizes = list(dict.fromkeys(int(row["ep"]) for row in rows))
    width = 0.8 / len(names)
    bars: list[dict[str, Any]] = []
    marks: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        mine = [row for row in rows if row["placement"] == name]
        shift = (i - (len(names) - 1) / 2) * width
        x = [sizes.index(row["ep"]) + shift for row in mine]
        bars.append(
            {
                "type": "bar",
                "name": escape(_short(name)),
                "x": x,
                "y": _digits([row["balancedness"] for row in mine]),
                "width": width * 0.92,
                "marker": {"color": palette.SERIES[i % len(palette.SERIES)], "opacity": 0.75},
                "hovertemplate": f"{escape(name)}, whole load: <b>%{{y:.3f}}</b><extra></extra>",
            }
        )
        marks += [
            _batch_marks(mine, n, x, _MARKS[k % len(_MARKS)], i == 0)
            for k, n in enumerate(mine[0]["batches"])
        ]
    layout = base_layout(380, "ranks of the expert-parallel group", "mean over busiest rank", bargap=0.1)
    layout["xaxis"] |= {"tickvals": list(range(len(sizes))), "ticktext": [f"EP{ep}" for ep in sizes]}
    layout["xaxis"]["showgrid"] = False
    layout["yaxis"]["range"] = [0, 1.02]
    return {"data": bars + marks, "layout": layout}


def _batch_marks(rows: Sequence[Record], n: str, x: list[float], symbol: str, named: bool) -> dict[str, Any]:
    """Marks of one placement for batches of one size."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"batches of {n} tokens a rank",
        "showlegend": named,
        "legendgroup": f"batch {n}",
        "x": x,
        "y": _digits([row["batches"][n]["balancedness"] for row in rows]),
        "marker": {"symbol": symbol, "size": 9, "color": palette.INK, "line": {"width": 2}},
        "hovertemplate": f"{n} tokens a rank: <b>%{{y:.3f}}</b><extra></extra>",
    }


def _short(name: str) -> str:
    return name.replace("\\", "/").rsplit("/", maxsplit=1)[-1]


def active_lines(rows: Sequence[Record]) -> Figure:
    """Share of experts with a token against the batch."""
    series = (
        ("mixed requests", "active", _INDIGO), ("one request, tokens in a row", "active_in_a_row", _ROSE),
        ("equally popular experts", "even_active", "#7d8790"),
    )  # fmt: skip
    return _lines(_by_batch(rows, series), "tokens in the batch", "share of experts with a token", log2=True)


def busiest_lines(rows: Sequence[Record]) -> Figure:
    """Busiest expert over mean against the batch."""
    series = (
        ("mixed requests", "busiest_over_mean", _INDIGO),
        ("one request, tokens in a row", "busiest_in_a_row", _ROSE),
    )
    return _lines(_by_batch(rows, series), "tokens in the batch", "busiest expert over mean", log2=True)


def _by_batch(rows: Sequence[Record], series: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    data = []
    for name, key, color in series:
        mine = [row for row in rows if key in row]
        if len(mine) > 1:
            dash = {"dash": "dot"} if key == "even_active" else {}
            data.append(
                _line(name, [row["n_tokens"] for row in mine], [row[key] for row in mine], color, line=dash)
            )
    return data


def locality_lines(found: Record) -> Figure:
    """Experts shared against the distance of tokens."""
    x = [int(lag) for lag in found["by_lag"]]
    data = [_line("tokens of one request", x, list(found["by_lag"].values()), _INDIGO)]
    if len(x) > 1:
        data.append(_level("any two tokens", x, found["shared_with_any_token"], _ROSE))
        data.append(_level("popularity alone", x, found["chance"], _GREEN))
        data.append(_level("equally popular experts", x, found["even"]))
    return _lines(data, "tokens apart", "share of experts in common", log2=True)


def hit_lines(by_layer: Mapping[str, Sequence[float]], layers: Sequence[int]) -> Figure:
    """Experts of the next layer told, against popularity."""
    return _lines(
        [
            _line("given this layer's experts", layers, by_layer["hit_rate"], _INDIGO),
            _line("by popularity alone", layers, by_layer["popularity_hit_rate"], _ROSE),
        ],
        "MoE layer whose experts are known",
        "share of the next layer's told",
    )


def link_lines(by_layer: Mapping[str, Sequence[float]], layers: Sequence[int]) -> Figure:
    """Total variation of the next layer's choice, beside its noise."""
    dotted = {"dash": "dot"}
    return _lines(
        [
            _line("measured", layers, by_layer["total_variation"], _INDIGO),
            _line("without a link", layers, by_layer["total_variation_noise"], "#7d8790", line=dotted),
        ],
        "MoE layer whose expert is known",
        "total variation",
    )


def drift_lines(found: Record) -> Figure:
    """Distance of popularity against the distance of windows, each with its noise."""
    data = []
    for key, name, color in (
        ("total_variation", "total variation", _INDIGO),
        ("jensen_shannon", "Jensen-Shannon distance", _ROSE),
    ):
        x = [int(lag) for lag in found[key]]
        data.append(_line(name, x, list(found[key].values()), color))
        if len(x) > 1:
            data.append(_level(f"{name}, shuffled", x, found["noise"][key], color))
    return _lines(data, "windows apart", "distance of popularity")


def domain_map(found: Record) -> Figure:
    """Total variation between domains; the diagonal is noise."""
    names = [escape(name) for name in found["names"]]
    layout = base_layout(max(260, 90 + 44 * len(names)), "", "")
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "type": "category"}
    layout["xaxis"] |= {"showgrid": False, "type": "category"}
    heat = {
        "type": "heatmap",
        "z": [_digits(row) for row in found["total_variation"]],
        "x": names,
        "y": names,
        "zmin": 0,
        "zmax": float(f"{max(max(row) for row in found['total_variation']):.3g}"),
        "colorscale": [list(stop) for stop in palette.SCALE],
        "texttemplate": "%{z:.2f}",
        "colorbar": {"title": {"text": "total<br>variation", "font": {"size": 11}}, "thickness": 12},
        "hovertemplate": "%{y} against %{x}: <b>%{z:.3f}</b><extra></extra>",
    }
    return {"data": [heat], "layout": layout}


def known_scatter(known: Record, name: str) -> Figure:
    """Gini against busiest over mean of known models, by experts per layer, and the trace among them."""
    models: Sequence[Record] = known["models"]
    sizes = sorted({int(one["n_experts"]) for one in models})
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"{size} experts",
            "x": _digits([one["busiest_over_mean"] for one in mine]),
            "y": _digits([one["gini"] for one in mine]),
            "text": [escape(str(one["name"])) for one in mine],
            "hovertemplate": "%{text}<br>busiest over mean %{x:.2f}, Gini %{y:.2f}<extra></extra>",
            "marker": {"size": 10, "color": palette.SERIES[i % len(palette.SERIES)], "opacity": 0.8},
        }
        for i, size in enumerate(sizes)
        if (mine := [one for one in models if one["n_experts"] == size])
    ]
    own = known["own"]
    data.append(
        {
            "type": "scatter",
            "mode": "markers+text",
            "name": escape(name),
            "x": _digits([own["busiest_over_mean"]]),
            "y": _digits([own["gini"]]),
            "text": [escape(name)],
            "textposition": "middle right",
            "textfont": {"size": 13, "color": palette.INK},
            "hovertemplate": "%{text}<br>busiest over mean %{x:.2f}, Gini %{y:.2f}<extra></extra>",
            "marker": {
                "size": 16,
                "symbol": "star",
                "color": "#ddaa33",
                "line": {"width": 1, "color": palette.INK},
            },
        }
    )
    layout = base_layout(380, "busiest expert over mean (log)", "Gini", hovermode="closest")
    layout["xaxis"] |= {
        "type": "log",
        "tickvals": list(_LOG_TICKS),
        "ticktext": [f"{x:g}" for x in _LOG_TICKS],
    }
    layout["yaxis"]["rangemode"] = "tozero"
    return {"data": data, "layout": layout}
