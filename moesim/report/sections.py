"""Sections of a page: each appends its heading, its words, its table or figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from moesim.report import figures, maps
from moesim.report.detail import LayoutDetail
from moesim.report.headline import (
    KINDS,
    certainty,
    close_rivals,
    limits,
    near_misses,
    ruled_out_groups,
    tiles,
)
from moesim.report.page import Page
from moesim.report.palette import is_exposed
from moesim.report.text import (
    ABSENT,
    Record,
    band_text,
    cluster_name,
    count,
    layout_name,
    number,
    plural,
    seconds,
    share,
    size_name,
    step_parts,
    total_and_capacity,
    usd_column,
)
from moesim.units import format_bytes

__all__ = [
    "add_details",
    "add_header",
    "add_memory",
    "add_pareto",
    "add_provenance",
    "add_ranking",
    "add_ruled_out",
    "add_time",
]

N_RANKED = 25
N_BARS = 8
N_DETAILS = 4


@dataclass(frozen=True)
class Column:
    """One column of the ranking."""

    title: str
    text: Callable[[Record], str]
    key: Callable[[Record], float | str | None]
    """What it is sorted by."""
    is_number: bool = True


def _of(key: str, outer: str | None = None) -> Callable[[Record], float | None]:
    return lambda row: number(row.get(outer) if outer else row, key)


def _batch(row: Record) -> float | None:
    workload = row.get("workload") or {}
    return number(workload, "batch_per_rank") or number(workload, "tokens_per_rank")


COLUMNS = (
    Column("#", lambda row: count(number(row, "rank")), _of("rank")),
    Column("layout", layout_name, layout_name, False),
    Column("GPUs", cluster_name, cluster_name, False),
    Column("batch", lambda row: count(_batch(row)), _batch),
    Column("USD/Mtok", lambda row: usd_column(number(row, "usd_per_mtok")), _of("usd_per_mtok")),
    Column("TPOT", lambda row: band_text(row, "tpot_s"), _of("tpot_s")),
    Column("TTFT", lambda row: seconds(number(row, "ttft_s")), _of("ttft_s")),
    Column("step", lambda row: band_text(row, "step_s"), _of("step_s")),
    Column(
        "tokens/s/GPU",
        lambda row: count(_three(number(row, "tokens_per_s_per_gpu"))),
        _of("tokens_per_s_per_gpu"),
    ),
    Column("memory", total_and_capacity, _of("total", "memory_bytes")),
    Column("FLOP/s use", lambda row: share(number(row, "mfu")), _of("mfu")),
    Column("imbalance", lambda row: count(_three(number(row, "imbalance"))), _of("imbalance")),
    Column(
        "dispatch",
        lambda row: str((row.get("choice") or {}).get("dispatch") or ABSENT),
        lambda row: None,
        False,
    ),
)

ONCE = {"GPUs": "on ", "dispatch": "with dispatch "}
"""Columns that are said above the table where all rows have the same."""


def _three(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table; cells are escaped here."""
    tops = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{tops}</tr></thead><tbody>{body}</tbody></table></div>'


def _notes(lines: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines if line)


def add_header(page: Page, eyebrow: str, answer: str, record: Record, best: Record | None) -> None:
    """The answer: one sentence, the figures behind it, what limits it and how sure it is."""
    page.add(f'<header><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(answer)}</h1>')
    if best is not None:
        page.add('<div class="tiles">')
        for name, value, remark in tiles(best):
            page.add(
                f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span>'
                f"<small>{escape(remark)}</small></div>"
            )
        page.add("</div>")
        said = {
            "What limits it": limits(best),
            "How sure": certainty(best),
            "What comes close": close_rivals(record),
        }
        lines = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in said.items() if text)
        page.add(f'<dl class="why">{lines}</dl>' if lines else "")
    elif near := near_misses(record):
        page.add(f'<dl class="why"><dt>How close</dt><dd>{escape(near)}</dd></dl>')
    warnings = "".join(f"<li>{escape(str(line))}</li>" for line in record.get("warnings") or ())
    page.add(f'<ul class="warnings">{warnings}</ul>' if warnings else "")
    page.add("</header>")


def add_ranking(page: Page, rows: Sequence[Record]) -> None:
    """Table of the best layouts, sorted by a click on a column's head."""
    if not rows:
        return
    shown = rows[:N_RANKED]
    columns = [column for column in COLUMNS if _is_worth_showing(column, shown)]
    same = {column.title: column.text(shown[0]) for column in COLUMNS if column not in columns}
    said = [words + same[title] for title, words in ONCE.items() if same.get(title, ABSENT) != ABSENT]
    on = f"All {', '.join(said)}. " if said else ""
    more = f" The first {N_RANKED} of {len(rows):,}." if len(rows) > N_RANKED else ""
    page.add(f'<section id="ranking"><h2>Ranking</h2>{_notes([f"{on}Click a heading to sort.{more}"])}')
    head = "".join(
        f'<th{_n(column)} scope="col"><button type="button">{escape(column.title)}</button></th>'
        for column in columns
    )
    body = "".join(_row(row, columns, "first" if i == 0 else "") for i, row in enumerate(shown))
    page.add(
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _is_worth_showing(column: Column, rows: Sequence[Record]) -> bool:
    """Leave out what no row has, what all rows share, and the step where TPOT says it."""
    texts = {column.text(row) for row in rows}
    if column.title == "step" and any(number(row, "tpot_s") is not None for row in rows):
        return False
    return texts != {ABSENT} and not (column.title in ONCE and len(texts) == 1)


def _n(column: Column) -> str:
    return ' class="n"' if column.is_number else ' class="k"'


def _row(row: Record, columns: Sequence[Column], kind: str) -> str:
    cells = []
    for column in columns:
        key = column.key(row)
        sorted_by = (
            column.text(row) if key is None and not column.is_number else "" if key is None else str(key)
        )
        cells.append(f'<td{_n(column)} data-v="{escape(sorted_by)}">{escape(column.text(row))}</td>')
    start = f'<tr class="{kind}">' if kind else "<tr>"
    return f"{start}{''.join(cells)}</tr>"


def add_pareto(page: Page, plan: Record) -> None:
    """Latency against throughput."""
    rows: Sequence[Record] = plan.get("layouts") or []
    figure = figures.pareto(rows, plan.get("layouts_all") or (), plan.get("targets"))
    if figure is None:
        return
    page.add('<section id="pareto"><h2>Latency against throughput</h2>')
    note = (
        "Each point is one layout at one batch size. Nothing beats those on the line in both; "
        "up and to the left is better. Point at one to see what it is."
    )
    page.add(_notes([note]))
    page.figure(figure, "Throughput per GPU over latency of every layout, with the Pareto front")
    page.add("</section>")


def add_time(page: Page, rows: Sequence[Record]) -> None:
    """Bars of where a step's time goes."""
    figure = figures.time_bars(rows[:N_BARS])
    if figure is None:
        return
    page.add('<section id="time"><h2>Where the time of a step goes</h2>')
    note = (
        "The parts of one step. The upright mark is the step itself: bars beyond it overlap with one "
        "another, a gap before it is waiting."
    )
    if any(is_exposed(kind) for row in rows[:N_BARS] for kind in step_parts(row)):
        note += " Hatched parts are communication that no computation hides."
    page.add(_notes([note]))
    page.figure(figure, "Time of a step by kind of work, for the best layouts")
    page.add("</section>")


def add_memory(page: Page, rows: Sequence[Record]) -> None:
    """Bars of memory against capacity."""
    figure = figures.memory_bars(rows[:N_BARS])
    if figure is None:
        return
    page.add('<section id="memory"><h2>Memory</h2>')
    page.add(_notes(["Of the fullest GPU; the upright mark is what a GPU has."]))
    page.figure(figure, "Memory of the fullest GPU by item, against its capacity")
    page.add("</section>")


def add_details(page: Page, details: Sequence[LayoutDetail]) -> None:
    """Loads, traffic and timeline of the best layouts; the first is open."""
    shown = [detail for detail in details[:N_DETAILS] if _has_figures(detail)]
    if not shown:
        return
    page.add(
        '<section id="routing"><h2>Inside the best layout</h2>'
        if len(shown) == 1
        else '<section id="routing"><h2>Inside the best layouts</h2>'
    )
    for i, detail in enumerate(shown):
        if len(shown) > 1:
            page.add(f"<details{' open' if i == 0 else ''}><summary>{escape(detail.title)}</summary>")
        else:
            page.add(_notes([detail.title]))
        page.add(_notes(list(detail.notes)))
        _add_loads(page, detail)
        _add_traffic(page, detail)
        _add_timeline(page, detail)
        page.add("</details>" if len(shown) > 1 else "")
    page.add("</section>")


def _has_figures(detail: LayoutDetail) -> bool:
    parts = (detail.expert_load, detail.rank_load, detail.traffic, detail.timeline)
    return any(part is not None for part in parts)


def _add_loads(page: Page, detail: LayoutDetail) -> None:
    by_expert, by_layer = maps.expert_map(detail), maps.load_by_layer(detail)
    if by_expert is not None:
        page.add(f"<h3>Load of each {escape(detail.expert_axis)}</h3>")
        page.add(_notes(["Tokens over the layer's mean: 1 is balanced."]))
        page.figure(by_expert, "Tokens over the mean by layer and expert")
    if by_layer is not None:
        page.add("<h3>Busiest against the mean, layer by layer</h3>")
        page.add(_notes(["A step waits for its busiest rank in every layer; the dotted line is balance."]))
        page.figure(by_layer, "Load of the busiest expert and rank over the mean, by layer")


def _add_traffic(page: Page, detail: LayoutDetail) -> None:
    figure = maps.traffic_map(detail)
    if figure is None or detail.traffic is None:
        return
    traffic = detail.traffic.astype(float).copy()
    for i in range(len(traffic)):
        traffic[i, i] = 0.0
    sent, received = traffic.sum(axis=1), traffic.sum(axis=0)
    page.add("<h3>Traffic from rank to rank</h3>")
    page.add(
        _notes(
            [
                f"{format_bytes(float(traffic.sum()))} in all; the busiest sender has "
                f"{format_bytes(float(sent.max()))}, the busiest receiver {format_bytes(float(received.max()))}. "
                "What stays on its rank is left out."
            ]
        )
    )
    page.figure(figure, "Bytes sent from each rank to each rank", max_width=640)


def _add_timeline(page: Page, detail: LayoutDetail) -> None:
    if detail.timeline is None:
        return
    window = maps.timeline_window(detail.timeline)
    if window is None:
        return
    begin_s, end_s = maps.window_s(detail.timeline)
    page.add("<h3>Timeline of one step</h3>")
    note = (
        f"From {seconds(begin_s)} to {seconds(end_s)} of a step of {seconds(detail.timeline.makespan_s)}: its "
        "first MoE layers, on the rank that computes longest and on the median one. "
        "Drag to zoom, double-click to go back."
    )
    page.add(_notes([note]))
    page.figure(window, "What two ranks run during the first layers")
    page.add("<h3>Every layer on the busiest rank</h3>")
    page.add(
        _notes(
            [
                "Time that each layer holds each stream. Communication that runs beside computation counts here too."
            ]
        )
    )
    page.figure(maps.step_overview(detail.timeline), "Time of each layer on each stream by kind of work")


def add_ruled_out(page: Page, plan: Record) -> None:
    """Counts by reason, with examples and what would help."""
    groups = ruled_out_groups(plan)
    if not groups:
        return
    total = sum(n for _, n, _ in groups)
    page.add(
        f'<section id="ruled-out"><h2>What was ruled out</h2>{_notes([plural(total, "candidate") + " in all."])}'
    )
    rows = []
    for kind, n, examples in groups:
        why, fix = KINDS.get(kind, (kind, ""))
        help_ = f"<small>{escape(fix)} would help</small>" if fix else ""
        lines = "<br>".join(escape(_example(item, reason)) for item, reason in examples)
        rows.append(
            f'<tr><td class="n">{n:,}</td><td class="words">{escape(why)}{help_}</td>'
            f'<td class="words">{lines}</td></tr>'
        )
    page.add(
        '<div class="wide"><table><thead><tr><th class="n">count</th><th>because it</th><th>for example</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _example(item: Record, reason: str) -> str:
    batch = number(item, "batch_per_rank")
    size = size_name(item) if batch is None else f"batch {count(batch)} a rank"
    return f"{', '.join(part for part in (layout_name(item), size) if part)}: {reason}"


def add_provenance(page: Page, record: Record) -> None:
    """Where the figures come from."""
    rows: Sequence[Mapping[str, object]] = record.get("provenance") or ()
    if not rows:
        return
    page.add('<section id="provenance"><h2>Where the numbers come from</h2>')
    page.add(_notes(["Error on shapes that the fit did not see, where something was fitted."]))
    body = "".join(_provenance_row(row) for row in rows)
    page.add(
        '<div class="wide"><table><thead><tr><th>what</th><th>kind</th><th>from</th><th>held-out error</th>'
        f"</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _provenance_row(row: Mapping[str, object]) -> str:
    kind = str(row.get("kind") or ABSENT)
    tag = kind.split()[0].split("-")[0].lower()
    mark = tag if tag in ("fitted", "assumed", "carried") else "other"
    cells = [str(row.get(key) or ABSENT) for key in ("what", "data", "held_out")]
    return (
        f'<tr><td>{escape(cells[0])}</td><td class="k"><span class="tag {mark}">{escape(kind)}</span></td>'
        f"<td>{escape(cells[1])}</td><td>{escape(cells[2])}</td></tr>"
    )
