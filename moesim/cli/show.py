"""What the commands print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table

from moesim.errors import ScenarioError
from moesim.hardware import list_clusters, list_gpus
from moesim.model import list_models
from moesim.plan import Maps
from moesim.report import LayoutDetail, plan_table, ruled_out_table, run_table
from moesim.routing import RoutingTrace, catalog_names, catalog_routing
from moesim.scenario import DEFAULT_SCENARIO
from moesim.units import format_bytes, format_bytes_per_s, format_flops_per_s, format_seconds

__all__ = [
    "bar",
    "catalog",
    "console",
    "detail",
    "explanation",
    "json_text",
    "plan",
    "rows",
    "run",
    "tables",
]

_CATALOGS = ("models", "gpus", "clusters", "scenarios", "routing")


PIPE_COLUMNS = 110
"""Width of what goes to a file or a pipe, where there is no terminal to ask."""


def console() -> Console:
    """Standard output, as wide as the terminal."""
    asked = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(soft_wrap=False, width=None if asked else PIPE_COLUMNS)


@contextmanager
def bar(what: str, *, quiet: bool) -> Iterator[Callable[[float], None] | None]:
    """Progress bar on standard error, where somebody watches; gone when done."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with Progress(
        *Progress.get_default_columns(), TextColumn(what), console=Console(stderr=True), transient=True
    ) as it:
        task = it.add_task("", total=1.0)
        yield lambda fraction: it.update(task, completed=fraction)


def json_text(value: Mapping[str, Any]) -> None:
    """One JSON object on standard output; a number that is none is null."""
    sys.stdout.write(json.dumps(_finite(value), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def detail(maps: Maps) -> LayoutDetail:
    """Maps as the report takes them."""
    return LayoutDetail(
        title=maps.title,
        row=maps.row,
        expert_load=maps.expert_load,
        rank_load=maps.rank_load,
        traffic=maps.traffic,
        timeline=maps.timeline,
        notes=maps.notes,
        layers=maps.layers or None,
        expert_axis="expert slot",
    )


def plan(told: Mapping[str, Any], top: int) -> None:
    """Ranking, what is out and why, and what it took."""
    out = console()
    if told["layouts"]:
        out.print(plan_table(told, limit=top))
        out.print("[dim]+n: redundant experts a layer; the band is in brackets[/dim]", highlight=False)
    else:
        out.print("No layout fits the scenario.")
    if told["ruled_out"]:
        out.print(ruled_out_table(told))
    _warn(out, told)
    out.print(
        f"{told['n_evaluated']:,} points of {told['n_layouts']} layouts in {told['elapsed_s']:.1f} s "
        f"({told['points_per_cpu_s']:.0f} per CPU second)."
    )
    if "report" in told:
        out.print(f"Report: {told['report']}")


def _warn(out: Console, told: Mapping[str, Any]) -> None:
    for line in told.get("warnings") or ():
        out.print(f"[yellow]Warning:[/yellow] {escape(line)}", highlight=False)


def run(told: Mapping[str, Any]) -> None:
    """One result."""
    out = console()
    out.print(run_table(told))
    _warn(out, told)
    for key in ("report", "timeline"):
        if key in told:
            out.print(f"{key.capitalize()}: {told[key]}")


def explanation(told: Mapping[str, Any], every: bool) -> None:
    """Terms of a result, step by step, then the families and the memory behind them."""
    out = console()
    out.print(f"[bold]{told['device']}[/bold]: {told['profile']}. {told['summary']}.", highlight=False)
    for one in told["passes"]:
        out.print(_terms_table(one, every))
    out.print(_families_table(told["families"]))
    memory = Table(title="Memory of the fullest rank", title_justify="left")
    memory.add_column("item")
    memory.add_column("size", justify="right")
    for name, size in told["memory_bytes"].items():
        memory.add_row(name, format_bytes(size))
    out.print(memory)
    out.print("Datasheet: " + "; ".join(f"{key}: {text}" for key, text in told["gpu_sources"].items()))


def _terms_table(one: Mapping[str, Any], every: bool) -> Table:
    table = Table(title=f"{one['name']}: {format_seconds(one['step_s'])}", title_justify="left")
    for column in ("term", "runs", "mean rank", "busiest", "share", "priced by"):
        table.add_column(column, justify="left" if column in ("term", "priced by") else "right")
    terms = sorted(one["terms"], key=lambda term: -term["seconds"])
    for term in terms if every else [term for term in terms if term["share"] >= 0.005]:
        table.add_row(
            term["name"],
            str(term["times"]),
            format_seconds(term["seconds"]),
            format_seconds(term["seconds_busiest_rank"]),
            f"{term['share']:.1%}",
            "\n".join(term["families"]),
        )
    return table


def _families_table(families: Mapping[str, Any]) -> Table:
    table = Table(title="Parameters", title_justify="left", show_lines=True)
    for column in ("family", "values", "from", "held-out error"):
        table.add_column(column, overflow="fold")
    for name, family in families.items():
        values = "\n".join(
            f"{key} = {one['value']:.4g}" + (f" ± {one['stderr']:.1g}" if one["stderr"] else "")
            for key, one in family["parameters"].items()
        )
        origin = family["provenance"]
        error = family["held_out"]
        shown = (
            f"{error['median_ape']:.1%} median, {error['p90_ape']:.1%} p90\n{error['split']}"
            if error
            else "none"
        )
        table.add_row(name, values, f"{origin['kind']}: {origin['data']}", shown)
    return table


def catalog(what: str) -> list[dict[str, Any]]:
    """Rows of one part of the catalog.

    Raises
    ------
    ScenarioError
        If there is no such part.
    """
    if what == "models":
        return [
            {
                "name": row.name, "total": row.total, "active": row.active, "layers": row.n_layers,
                "experts": row.n_experts, "top_k": row.top_k, "source": row.source,
            }
            for row in list_models()
        ]  # fmt: skip
    if what == "gpus":
        return [
            {
                "name": gpu.name, "memory": format_bytes(gpu.memory_bytes),
                "hbm": format_bytes_per_s(gpu.hbm_bytes_per_s),
                "bfloat16": format_flops_per_s(gpu.peak_flops_per_s("bfloat16")),
                "fp8": format_flops_per_s(gpu.flops_per_s["fp8"]) if "fp8" in gpu.flops_per_s else "-",
                "nvlink": format_bytes_per_s(gpu.nvlink_bytes_per_s) if gpu.nvlink_bytes_per_s else "-",
                "usd_per_gpu_hour": gpu.usd_per_gpu_hour,
            }
            for gpu in list_gpus()
        ]  # fmt: skip
    if what == "clusters":
        from moesim.hardware import cluster_names

        return [
            {
                "name": name, "gpu": one.gpu.name, "nodes": one.nodes, "gpus_per_node": one.gpus_per_node,
                "nvlink_domain": one.scale_up_ranks, "nic_per_gpu": format_bytes_per_s(one.nic_bytes_per_s),
            }
            for name, one in zip(cluster_names(), list_clusters(), strict=True)
        ]  # fmt: skip
    if what == "scenarios":
        return [
            {"name": path.stem, "file": str(path)} for path in sorted(DEFAULT_SCENARIO.parent.glob("*.yaml"))
        ]
    if what == "routing":
        return [_routing_row(name) for name in catalog_names()]
    raise ScenarioError("is no part of the catalog", value=what, fix=f"one of {', '.join(_CATALOGS)}")


def _routing_row(name: str) -> dict[str, Any]:
    found = catalog_routing(name)
    if isinstance(found, RoutingTrace):
        source = f"real, {found.n_tokens} tokens of {found.model}: {found.source}"
    else:
        source = found.provenance
    return {"name": name, "phase": found.phase, "source": source}


def tables(*found: Table, last: str = "") -> None:
    """Tables made elsewhere, and a line below them."""
    out = console()
    for table in found:
        out.print(table)
    if last:
        out.print(last, highlight=False, markup=False)


def rows(title: str, told: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a table."""
    table = Table(title=title, title_justify="left")
    for column in told[0] if told else ():
        table.add_column(column, overflow="fold")
    for row in told:
        table.add_row(*(_cell(value) for value in row.values()))
    console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, int) and value >= 10**6:
        return f"{value / 1e9:.2f}B"
    return str(value)
