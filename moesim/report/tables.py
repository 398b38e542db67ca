"""Tables for the terminal, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from moesim.report.headline import KINDS, ruled_out_groups
from moesim.report.palette import label
from moesim.report.text import (
    ABSENT,
    Record,
    band_text,
    cluster_name,
    count,
    layout_name,
    number,
    objective_words,
    parts_of,
    plural,
    seconds,
    share,
    step_parts,
    total_and_capacity,
    usd,
    usd_column,
)
from moesim.units import format_bytes

__all__ = [
    "fit_table", "plan_table", "ruled_out_table", "run_table", "unpredicted_reasons", "unpredicted_table",
    "validation_table",
]  # fmt: skip

WIDTH = 100


def _table(title: str = "") -> Table:
    return Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        min_width=min(len(title), WIDTH),  # a table narrower than its title would break it
    )


def plan_table(plan: Record, limit: int = 15) -> Table:
    """Best layouts of a plan; columns that no row fills are left out.

    Parameters
    ----------
    plan
        The object of ``moesim plan --json``.
    limit
        Rows at most.
    """
    rows: Sequence[Record] = (plan.get("layouts") or [])[:limit]
    clusters = {cluster_name(row) for row in rows}
    scenario = plan.get("scenario") or {}
    on = f" on {clusters.pop()}" if len(clusters) == 1 else ""
    title = f"{scenario.get('model') or 'Layouts'}{on}, by {objective_words(plan.get('objective'))}"
    columns: list[tuple[str, list[str]]] = [
        ("layout", [layout_name(row) for row in rows]),
        ("GPUs", [cluster_name(row) if clusters else ABSENT for row in rows]),
        ("batch", [_size(row) for row in rows]),
        ("USD/Mtok", [usd_column(number(row, "usd_per_mtok")) for row in rows]),
        ("TPOT", [band_text(row, "tpot_s") for row in rows]),
        ("TTFT", [seconds(number(row, "ttft_s")) for row in rows]),
        ("tok/s/GPU", [count(_whole(number(row, "tokens_per_s_per_gpu"))) for row in rows]),
        ("memory", [_fill(row) for row in rows]),
    ]
    if all(number(row, "tpot_s") is None for row in rows):
        columns.insert(4, ("step", [band_text(row, "step_s") for row in rows]))
    shown = [(name, cells) for name, cells in columns if any(cell != ABSENT for cell in cells)]
    table = _table(title)
    table.add_column("#", justify="right", no_wrap=True)
    for name, _ in shown:
        table.add_column(name, justify="left" if name in ("layout", "GPUs") else "right")
    for i, row in enumerate(rows):
        rank = number(row, "rank")
        mark = "" if row.get("calibrated") is not False else "*"
        cells = [Text(cells[i]) for _, cells in shown]
        table.add_row(f"{int(rank) if rank is not None else i + 1}{mark}", *cells)
    if any(row.get("calibrated") is False for row in rows):
        table.caption = "* efficiencies carried over from another GPU"
        table.caption_justify = "left"
    return table


def _whole(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _size(row: Record) -> str:
    workload = row.get("workload") or {}
    keys = ("batch_per_rank", "concurrency", "tokens_per_rank", "micro_batch", "global_batch")
    values = [number(workload, key) for key in keys]
    return next((count(value) for value in values if value is not None), ABSENT)


def _fill(row: Record) -> str:
    memory = row.get("memory_bytes") or {}
    total, capacity = number(memory, "total"), number(memory, "capacity")
    return ABSENT if total is None or not capacity else share(total / capacity)


def run_table(result: Record) -> Table:
    """One simulated scenario: its figures, then its step and its memory part by part.

    Parameters
    ----------
    result
        The object of ``moesim run --json``.
    """
    table = _table(f"{layout_name(result)} on {cluster_name(result)}")
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.show_header = False
    if result.get("feasible") is False:
        table.add_row("not feasible", Text(str(result.get("why_not") or "")), "", style="bold")
    for name, value in _figures(result):
        if value != ABSENT:
            table.add_row(name, value, "")
    parts = step_parts(result)
    _add_parts(table, "time in one step", {kind: (v, seconds(v)) for kind, v in parts.items()})
    memory = parts_of(result, "memory_bytes")
    items = {k: (v, format_bytes(v)) for k, v in memory.items() if k not in ("total", "capacity")}
    _add_parts(table, "memory of the fullest GPU", items)
    return table


def _figures(row: Record) -> list[tuple[str, str]]:
    return [
        ("step", band_text(row, "step_s")),
        ("time per output token", band_text(row, "tpot_s")),
        ("time to first token", band_text(row, "ttft_s")),
        ("tokens/s", count(_whole(number(row, "tokens_per_s")))),
        ("tokens/s per GPU", count(_whole(number(row, "tokens_per_s_per_gpu")))),
        ("cost per million tokens", usd(number(row, "usd_per_mtok"))),
        ("days of the whole run", count(_whole(number(row, "days")))),
        ("cost of the whole run", usd(number(row, "usd"))),
        ("model FLOP/s use", share(number(row, "mfu"))),
        ("imbalance, busiest over mean", count(_whole(number(row, "imbalance")))),
        ("copies dropped", _some(row, "dropped_fraction")),
        ("copies rerouted", _some(row, "rerouted_fraction")),
        ("tokens without an expert", _some(row, "tokens_without_expert_fraction")),
        ("rows of padding", _some(row, "padding_fraction")),
        ("moving experts, of the time", _some(row.get("rebalance") or {}, "step_share")),
        ("memory", total_and_capacity(row)),
    ]


def _some(row: Record, key: str) -> str:
    """A share that is worth a line: absent where nothing is lost."""
    value = number(row, key)
    return ABSENT if not value else share(value)


def _add_parts(table: Table, title: str, parts: dict[str, tuple[float, str]]) -> None:
    """Parts of a whole, the largest first, with their shares."""
    whole = sum(value for value, _ in parts.values())
    if whole <= 0:
        return
    table.add_section()
    table.add_row(Text(title, style="bold"), "", "")
    for kind, (value, text) in sorted(parts.items(), key=lambda part: -part[1][0]):
        table.add_row(Text(f"  {label(kind)}"), text, share(value / whole))


def ruled_out_table(plan: Record) -> Table:
    """What was ruled out and why: one line a kind, with an example.

    Parameters
    ----------
    plan
        The object of ``moesim plan --json``.
    """
    groups = ruled_out_groups(plan)
    table = _table(f"{plural(sum(n for _, n, _ in groups), 'candidate')} ruled out")
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("because it", max_width=26)
    table.add_column("for example", max_width=WIDTH - 40)
    for kind, n, examples in groups:
        item, why = examples[0]
        table.add_row(f"{n:,}", Text(KINDS[kind][0] if kind in KINDS else kind), Text(_example(item, why)))
    return table


def _example(item: Record, why: str) -> str:
    batch = number(item, "batch_per_rank")
    size = f", batch {count(batch)}" if batch is not None else ""
    return f"{layout_name(item)}{size}: {why}"


def fit_table(told: Record) -> Table:
    """Families that were fitted, with their error on what was held out; those kept from a base are left out.

    Parameters
    ----------
    told
        The object of ``moesim calibrate fit --json``.
    """
    table = _kernels(
        f"{told['device']}: error on rows that the fit did not see", ("median", "p90", "bias"), "from"
    )
    shown = [one for one in told["families"] if one.get("refitted", True)]
    for one in shown:
        held = one["held_out"] or {}
        mark = "*" if one.get("doubts") else ""
        table.add_row(
            *_kernel(one),
            str(one["kind"]) + mark,
            f"{one['n_points']:,}",
            *(_percent(held, key) for key in ("median_ape", "p90_ape", "bias")),
        )
    if any(one.get("doubts") for one in shown):
        table.caption = "* doubtful: the notes above and --json say why"
        table.caption_justify = "left"
    return table


def validation_table(told: Record) -> Table:
    """Error of a profile on measured rows, by kernel.

    Parameters
    ----------
    told
        The object of ``moesim calibrate validate --json``.
    """
    table = _kernels(f"{told['device']}: error of the predicted time", ("median", "mean", "p90", "bias"))
    for one in told["groups"]:
        errors = [_percent(one, key) for key in ("median_ape", "mean_ape", "p90_ape", "bias")]
        table.add_row(*_kernel(one), f"{one['n']:,}", *errors)
    return table


def _kernels(title: str, errors: Sequence[str], *words: str) -> Table:
    """Columns that name a kernel, then words about it, its rows and its errors."""
    table = _table(title)
    table.add_column("op", no_wrap=True)
    table.add_column("implementation", overflow="fold")
    for name in ("format", *words):
        table.add_column(name, no_wrap=True)
    for name in ("rows", *errors):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _kernel(one: Record) -> list[Text]:
    return [Text(str(one[key])) for key in ("op", "implementation", "dtype")]


def _percent(one: Record, key: str) -> str:
    value = number(one, key)
    return ABSENT if value is None else f"{value:+.1%}" if key == "bias" else f"{value:.1%}"


def unpredicted_table(told: Record) -> Table:
    """Measured rows without a prediction: one line a reason, with the kernels that it holds for.

    Parameters
    ----------
    told
        The object of ``moesim calibrate validate --json``.
    """
    table = _table(f"{told['n_unpredicted']:,} rows without a prediction")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("because", overflow="fold", ratio=1)
    table.add_column("kernels", overflow="fold", ratio=1)
    for n, reason, kernels in unpredicted_reasons(told):
        table.add_row(f"{n:,}", Text(reason), Text(kernels))
    return table


def unpredicted_reasons(told: Record) -> list[tuple[int, str, str]]:
    """Rows without a prediction by reason: how many, why, of which kernels.

    Parameters
    ----------
    told
        The object of ``moesim calibrate validate --json``.
    """
    found = []
    for reason in dict.fromkeys(one["reason"] for one in told["unpredicted"]):
        mine = [one for one in told["unpredicted"] if one["reason"] == reason]
        names = list(dict.fromkeys(f"{one['op']} {one['implementation']} {one['dtype']}" for one in mine))
        shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        found.append((sum(one["n"] for one in mine), str(reason), shown))
    return found
