"""Predicted against measured, as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from moesim.report import palette
from moesim.report.figures import Figure, base_layout
from moesim.report.page import Page, write_page

__all__ = ["Compared", "write_scatter_report"]


@dataclass(frozen=True)
class Compared:
    """Figures of one group that were predicted and measured."""

    name: str
    """Legend."""
    measured: Sequence[float]
    predicted: Sequence[float]
    labels: Sequence[str]
    """What each point is, shown when pointed at."""


def write_scatter_report(
    path: Path | str,
    title: str,
    figures: Mapping[str, Sequence[Compared]],
    tables: Mapping[str, Sequence[Sequence[str]]],
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
    """
    page = Page()
    page.add(f"<header><h1>{escape(title)}</h1></header><main>")
    for name, groups in figures.items():
        page.add(
            f"<section><h2>{escape(name)}</h2><p>Each point is one measurement. The line is a perfect "
            "prediction, the dashes are 20% to either side.</p>"
        )
        page.figure(_scatter(name, groups), f"predicted against measured {name}")
        page.add(_error_table(groups) + "</section>")
    for heading, rows in tables.items():
        page.add(f"<section><h2>{escape(heading)}</h2>{_table(rows)}</section>")
    page.add("</main><footer></footer>")
    return write_page(path, page, title)


def errors(group: Compared) -> tuple[float, float, float]:
    """Median and 90th percentile of the absolute relative error, and the median signed one."""
    ratio = np.asarray(group.predicted) / np.asarray(group.measured) - 1.0
    return float(np.median(np.abs(ratio))), float(np.quantile(np.abs(ratio), 0.9)), float(np.median(ratio))


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
                "name": escape(one.name),
                "x": [float(f"{value:.4g}") for value in one.measured],
                "y": [float(f"{value:.4g}") for value in one.predicted],
                "text": [escape(text) for text in one.labels],
                "hovertemplate": "%{text}<br>measured %{x}, predicted %{y}<extra></extra>",
                "marker": {
                    "size": 7,
                    "opacity": 0.75,
                    "color": palette.SERIES[number % len(palette.SERIES)],
                    "symbol": ("circle", "square", "diamond", "cross")[number // len(palette.SERIES) % 4],
                },
            }
        )
    for axis in ("xaxis", "yaxis"):
        layout[axis] |= {"type": "log", "range": [float(np.log10(low)), float(np.log10(high))], "dtick": "D2"}
    layout["legend"] |= {"orientation": "v", "x": 1.02, "y": 1, "yanchor": "top"}
    return {"data": data, "layout": layout}


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
        rows.append([one.name, str(len(one.measured)), f"{median:.1%}", f"{p90:.1%}", f"{bias:+.1%}"])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[escape(cell) for cell in row] for row in rows]
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'
