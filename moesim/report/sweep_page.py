"""The page of ``moesim sweep``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moesim.report.page import Page, write_page
from moesim.report.sweep_figures import (
    MOST_CURVES,
    Curve,
    axis_of,
    curves_of,
    hover_texts,
    metric_figure,
    tradeoff_figure,
)
from moesim.report.sweep_words import (
    Metric,
    by_name,
    heading,
    key_names,
    knee_lines,
    refused_groups,
    shown_metrics,
    value_text,
    values_text,
)
from moesim.report.text import Record, plural, seconds

__all__ = ["write_sweep_report"]

MOST_ROWS = 2000
"""Points in the table; all are in the CSV."""


def write_sweep_report(path: Path | str, told: Record) -> Path:
    """Write one HTML file about a sweep.

    Parameters
    ----------
    path
        Where to; an older file there is replaced at once.
    told
        The object of ``moesim sweep --json``.

    Returns
    -------
    Path
        The file, complete.
    """
    page = Page()
    named = heading(told)
    page.add(f'<header><p class="eyebrow">Sweep: {escape(named)}</p><h1>{escape(_answer(told))}</h1>')
    warnings = "".join(f"<li>{escape(str(line))}</li>" for line in told.get("warnings") or ())
    page.add((f'<ul class="warnings">{warnings}</ul>' if warnings else "") + "</header><main>")
    hovers = hover_texts(told)
    _add_tradeoff(page, told, hovers)
    _add_figures(page, told, hovers)
    _add_refused(page, told)
    _add_points(page, told)
    page.add(f"</main><footer><p>{escape(_effort(told))}</p></footer>")
    return write_page(path, page, f"moesim sweep: {named}")


def _answer(told: Record) -> str:
    """The fastest point and the slowest."""
    done = [point for point in told["points"] if "result" in point]
    if not done:
        return f"All {plural(len(told['points']), 'point')} are refused."
    time = by_name("tpot_s" if by_name("tpot_s").of(done[0]["result"]) is not None else "step_s")
    names = key_names(told["swept"])
    ranked = sorted(done, key=lambda point: time.of(point["result"]) or 0.0)
    low, high = ranked[0], ranked[-1]
    fast, slow = time.of(low["result"]) or 0.0, time.of(high["result"]) or 0.0
    if slow - fast <= 1e-3 * fast:
        return f"{time.title} is {seconds(fast)} at every point."
    return (
        f"{time.title} runs from {seconds(fast)} ({values_text(low['set'], names)}) "
        f"to {seconds(slow)} ({values_text(high['set'], names)}), {slow / fast:.2f} times as long."
    )


def _add_tradeoff(page: Page, told: Record, hovers: Sequence[str]) -> None:
    trade = told.get("tradeoff")
    if not trade:
        return
    x, y = by_name(trade["x"]), by_name(trade["y"])
    name = key_names(told["swept"])[trade["along"]]
    page.add(
        f"<section><h2>{escape(y.title)} against {escape(x.words)}</h2>"
        f'<p class="note">Each point is a {escape(name)}; lower and further left is better. '
        f"Knee: {escape(trade['definition'])}.</p>"
    )
    page.figure(tradeoff_figure(told, hovers), f"{y.title} against {x.title}, knees marked")
    page.add(_chosen(len(trade["curves"])))
    said = "".join(f"<li>{escape(line)}</li>" for line in knee_lines(told, MOST_CURVES))
    page.add(f"<ul>{said}</ul></section>")


def _add_figures(page: Page, told: Record, hovers: Sequence[str]) -> None:
    along, names = axis_of(told), key_names(told["swept"])
    curves = curves_of(told, along)
    shown = shown_metrics(told["points"])
    drawn = [metric for metric in shown if _varies(told, metric)]
    same = [metric for metric in shown if metric not in drawn]
    if not drawn:
        return
    page.add(f"<section><h2>Against {escape(names[along])}</h2>{_legend(curves)}")
    n_all = len({tuple(v for k, v in point["set"].items() if k != along) for point in told["points"]})
    page.add(_chosen(n_all))
    page.add('<div class="figures">')
    for metric in drawn:
        page.add(f"<div><h3>{escape(metric.title)}</h3>")
        figure = metric_figure(told, metric, along, curves, hovers)
        page.figure(figure, f"{metric.title} against {names[along]}")
        page.add("</div>")
    page.add("</div>")
    result = next(point["result"] for point in told["points"] if "result" in point)
    lines = [f"{metric.words} {metric.text(metric.of(result))}" for metric in same]
    page.add(f'<p class="note">The same at all points: {escape(", ".join(lines))}.</p>' if same else "")
    page.add("</section>")


def _chosen(n_curves: int) -> str:
    if n_curves <= MOST_CURVES:
        return ""
    return f'<p class="note">{MOST_CURVES} of {n_curves:,} curves, evenly chosen; all points are in the table.</p>'


def _varies(told: Record, metric: Metric) -> bool:
    values = [metric.of(point["result"]) for point in told["points"] if "result" in point]
    return len({None if value is None else float(f"{value:.3g}") for value in values}) > 1


def _legend(curves: list[Curve]) -> str:
    """One legend for all figures below it."""
    if len(curves) < 2:
        return ""
    style = {"solid": "solid", "dash": "dashed", "dot": "dotted"}
    keys = "".join(
        f'<li><i style="border-top:3px {style[curve.dash]} {curve.color}"></i>{escape(curve.name)}</li>'
        for curve in curves
    )
    return f'<ul class="keys">{keys}</ul>'


def _add_refused(page: Page, told: Record) -> None:
    groups = refused_groups(told)
    if not groups:
        return
    n = sum(count for _, count, _ in groups)
    rows = "".join(
        f'<tr><td class="n">{count:,}</td><td>{escape(shared)}</td><td class="words">{escape(reason)}</td></tr>'
        for shared, count, reason in groups
    )
    head = '<tr><th class="n">points</th><th>with</th><th>why</th></tr>'
    page.add(
        f'<section><h2>{plural(n, "point")} refused</h2><div class="wide"><table><thead>{head}</thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _add_points(page: Page, told: Record) -> None:
    """Every point, sorted by a click on a column's head."""
    done = [(number, point) for number, point in enumerate(told["points"]) if "result" in point]
    if not done:
        return
    names, metrics = key_names(told["swept"]), shown_metrics(told["points"])
    knees = {curve["knee"] for curve in (told.get("tradeoff") or {}).get("curves", ())}
    titles = [*names.values(), *(metric.short for metric in metrics)]
    head = "".join(f'<th class="n"><button>{escape(title)}</button></th>' for title in titles)
    rows = [
        _row(point["set"], told["swept"], metrics, point["result"], number in knees) for number, point in done
    ]
    page.add(
        f'<section><h2>{plural(len(done), "point")}</h2><p class="note">Click on a head to sort'
        f'{"; knees are shaded" if knees - {None} else ""}.</p><div class="wide"><table class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows[:MOST_ROWS])}</tbody></table></div></section>"
    )


def _row(
    values: Mapping[str, Any], keys: list[str], metrics: list[Metric], result: Record, is_knee: bool
) -> str:
    cells = [(value_text(values[key]), values[key]) for key in keys]
    cells += [
        (metric.text(metric.of(result)), "" if (v := metric.of(result)) is None else v) for metric in metrics
    ]
    tds = "".join(f'<td class="n" data-v="{escape(str(key))}">{escape(text)}</td>' for text, key in cells)
    return f'<tr class="first">{tds}</tr>' if is_knee else f"<tr>{tds}</tr>"


def _effort(told: Record) -> str:
    text = f"{plural(told['n_points'], 'point')} in {seconds(told['elapsed_s'])}"
    if told.get("n_resumed"):
        text += f", {told['n_resumed']:,} of them from the file"
    if told.get("points_per_cpu_s"):
        text += f"; {told['points_per_cpu_s']:.0f} priced per second of processor time"
    return text + "."
