"""Predicted against measured, as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from moesim.report import palette
from moesim.report.figures import Figure, base_layout
from moesim.report.page import Page, write_page

__all__ = ["Compared", "Panels", "write_scatter_report"]

SIZE_BINS = 12
"""Bins of the error by size, equal in the logarithm of the measured value."""
_FEW_DECADES = 1e3
"""Largest over smallest value from which powers of ten alone are ticks enough."""
ERROR_BIN = 0.05
"""Width of a bar of the histogram of errors."""
COLORS = (*palette.SERIES, "#ddcc77", "#44aa99", "#882255")
"""All of the scheme that the palette is of."""
LEGEND_LINE = 20
"""Height of a line of a legend [px]."""
LEGEND_COLUMNS = 2
"""Groups that a line of a legend holds at least, on a page of usual width."""
ERROR_END = 1.0
"""Errors beyond are counted in the last bar of their side."""


@dataclass(frozen=True)
class Compared:
    """Figures of one group that were predicted and measured."""

    name: str
    """Legend."""
    measured: Sequence[float]
    predicted: Sequence[float]
    labels: Sequence[str]
    """What each point is, shown when pointed at."""
    short: str = ""
    """Legend in its place, where the name is long; the name is shown when pointed at."""

    @property
    def legend(self) -> str:
        """What the legends of the figures say."""
        return self.short or self.name


@dataclass(frozen=True)
class Panels:
    """What a page of many rows shows besides one scatter a quantity."""

    lead: str
    """First paragraph."""
    max_points: int
    """Markers of one scatter; the errors are of all rows."""
    summary: Sequence[Sequence[str]] = ()
    """Table under it: rows of text, the first of them the head."""


def write_scatter_report(
    path: Path | str,
    title: str,
    figures: Mapping[str, Sequence[Compared]],
    tables: Mapping[str, Sequence[Sequence[str]]],
    *,
    panels: Panels | None = None,
) -> Path:
    """Write one HTML file with a log-log scatter and an error table for each quantity.

    Parameters
    ----------
    path
        Where to; an older file there is replaced at once.
    title
        Heading.
    figures
        By axis title with its unit: the groups compared, in the same unit.
    tables
        By heading: rows of text, the first of them the head.
    panels
        Adds how errors spread, and how they go with size, to each quantity, and thins its scatter.
    """
    page = Page()
    lead = f"<p>{escape(panels.lead)}</p>" if panels else ""
    page.add(f"<header><h1>{escape(title)}</h1>{lead}</header><main>")
    if panels and panels.summary:
        page.add(f"<section><h2>Summary</h2>{_table(panels.summary)}</section>")
    for name, groups in figures.items():
        page.add(
            f"<section><h2>{escape(name)}</h2><p>Each point is one measurement. The line is a perfect "
            "prediction, the dashes are 20% to either side.</p>"
        )
        shown = _thinned(groups, panels.max_points) if panels else groups
        page.figure(_scatter(name, shown), f"predicted against measured {name}")
        page.add(_error_table(groups))
        if panels:
            page.figure(_by_size(name, groups), f"error by measured {name}")
            page.figure(_histogram(groups), f"spread of the error of {name}")
        page.add("</section>")
    for heading, rows in tables.items():
        page.add(f"<section><h2>{escape(heading)}</h2>{_table(rows)}</section>")
    page.add("</main><footer></footer>")
    return write_page(path, page, title)


def errors(group: Compared) -> tuple[float, float, float]:
    """Median and 90th percentile of the absolute relative error, and the median signed one."""
    ratio = np.asarray(group.predicted) / np.asarray(group.measured) - 1.0
    return float(np.median(np.abs(ratio))), float(np.quantile(np.abs(ratio), 0.9)), float(np.median(ratio))


def _thinned(groups: Sequence[Compared], limit: int) -> list[Compared]:
    """Every n-th point of every group, so that all together are about `limit`."""
    step = max(1, -(-sum(len(one.measured) for one in groups) // limit))
    return [
        replace(
            one, measured=one.measured[::step], predicted=one.predicted[::step], labels=one.labels[::step]
        )
        for one in groups
    ]


def _by_size(name: str, groups: Sequence[Compared]) -> Figure:
    """Median signed error of each group over bins of the measured value."""
    layout = base_layout(340, f"measured {name}", "median signed error", hovermode="closest")
    everything = np.concatenate([np.asarray(one.measured, dtype=float) for one in groups])
    layout["xaxis"] |= _log_axis(float(everything.min()), float(everything.max()))
    layout["yaxis"] |= {"tickformat": "+.0%"}
    _legend_below(layout, len(groups))
    data = []
    for number, one in enumerate(groups):
        measured = np.asarray(one.measured, dtype=float)
        error = np.asarray(one.predicted) / measured - 1.0
        size = np.log(measured)
        spread = float(size.max() - size.min()) or 1.0
        bins = np.minimum(((size - size.min()) / spread * SIZE_BINS).astype(int), SIZE_BINS - 1)
        used = np.unique(bins)
        x = [float(f"{np.exp(np.median(size[bins == b])):.4g}") for b in used]
        y = [float(f"{np.median(error[bins == b]):.4g}") for b in used]
        n = [int(np.sum(bins == b)) for b in used]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(one.legend),
                "x": x,
                "y": y,
                "text": [f"{count} rows" for count in n],
                "hovertemplate": f"{_hover(one)}<br>about %{{x}}: median signed error %{{y}}, %{{text}}<extra></extra>",
                "line": _stroke(number) | {"width": 1.5},
            }
        )
    return {"data": data, "layout": layout}


def _histogram(groups: Sequence[Compared]) -> Figure:
    """Share of each group's rows by their signed error."""
    layout = base_layout(300, "predicted over measured, minus 1", "share of rows", hovermode="closest")
    layout["xaxis"] |= {"tickformat": "+.0%", "range": [-ERROR_END, ERROR_END]}
    layout["yaxis"] |= {"tickformat": ".0%"}
    _legend_below(layout, len(groups))
    edges = np.linspace(-ERROR_END, ERROR_END, round(2 * ERROR_END / ERROR_BIN) + 1)
    middle = [float(f"{value:.4g}") for value in (edges[:-1] + edges[1:]) / 2]
    data = []
    for number, one in enumerate(groups):
        error = np.asarray(one.predicted, dtype=float) / np.asarray(one.measured, dtype=float) - 1.0
        counts, _ = np.histogram(np.clip(error, -ERROR_END, ERROR_END), bins=edges)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": escape(one.legend),
                "x": middle,
                "y": [float(f"{value:.4g}") for value in counts / error.size],
                "hovertemplate": f"{_hover(one)}<br>error %{{x}}: %{{y}} of the rows<extra></extra>",
                "line": _stroke(number) | {"width": 1.5, "shape": "hvh"},
            }
        )
    return {"data": data, "layout": layout}


def _hover(one: Compared) -> str:
    """A group's whole name; a percent sign would begin a value of plotly's."""
    return escape(one.name).replace("%{", "% {")


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _stroke(number: int) -> dict[str, Any]:
    """Colour of a line, and dashes once the colours are used up."""
    dashes = ("solid", "dash", "dot", "dashdot")
    return {"color": _color(number), "dash": dashes[number // len(COLORS) % len(dashes)]}


def _scatter(name: str, groups: Sequence[Compared]) -> Figure:
    layout = base_layout(620, f"measured {name}", f"predicted {name}", hovermode="closest")
    values = np.concatenate([np.asarray([*one.measured, *one.predicted], dtype=float) for one in groups])
    low, high = float(values.min()) * 0.8, float(values.max()) * 1.25
    data: list[dict[str, Any]] = [
        _line([low, high], factor, "solid" if factor == 1 else "dot") for factor in (1.0, 1.2, 0.8)
    ]
    for number, one in enumerate(groups):
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape(one.legend),
                "x": [float(f"{value:.4g}") for value in one.measured],
                "y": [float(f"{value:.4g}") for value in one.predicted],
                "text": [escape(text) for text in one.labels],
                "hovertemplate": f"{_hover(one)}<br>%{{text}}<br>measured %{{x}}, predicted %{{y}}<extra></extra>",
                "marker": {
                    "size": 7,
                    "opacity": 0.75,
                    "color": _color(number),
                    "symbol": ("circle", "square", "diamond", "cross")[number // len(COLORS) % 4],
                },
            }
        )
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"range": [float(np.log10(low)), float(np.log10(high))]} | _log_axis(low, high)
    _legend_below(layout, len(groups))
    return {"data": data, "layout": layout}


def _log_axis(low: float, high: float) -> dict[str, Any]:
    """Ticks at powers of ten; also at 2 and 5 times them where there would be few."""
    return {"type": "log", "dtick": 1 if high > _FEW_DECADES * low else "D2", "exponentformat": "power"}


def _legend_below(layout: dict[str, Any], n_groups: int) -> None:
    """Put the legend under the plot, and leave the plot its height."""
    height = LEGEND_LINE * -(-n_groups // LEGEND_COLUMNS)
    layout["legend"] |= {"yref": "container", "y": 0, "yanchor": "bottom"}
    layout["margin"] |= {"b": layout["margin"]["b"] + height}
    layout["height"] += height


def _line(ends: list[float], factor: float, dash: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": ends,
        "y": [end * factor for end in ends],
        "line": {"color": palette.GREY, "width": 1.5, "dash": dash},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _error_table(groups: Sequence[Compared]) -> str:
    rows = [["group", "n", "median error", "90th percentile", "bias"]]
    for one in groups:
        median, p90, bias = errors(one)
        rows.append([one.name, f"{len(one.measured):,}", f"{median:.1%}", f"{p90:.1%}", f"{bias:+.1%}"])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[escape(cell) for cell in row] for row in rows]
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
