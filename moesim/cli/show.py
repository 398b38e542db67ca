"""What the commands print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn
from rich.table import Table

from moesim.errors import ScenarioError, TraceError
from moesim.hardware import list_clusters, list_gpus
from moesim.model import list_models, load_model
from moesim.plan import Maps
from moesim.report import LayoutDetail, plan_table, ruled_out_table, run_table
from moesim.routing import (
    RoutingShape,
    RoutingTrace,
    catalog_names,
    catalog_routing,
    describe,
    open_trace,
    read_npz,
    read_sglang_counts,
    write_trace,
)
from moesim.scenario import DEFAULT_SCENARIO
from moesim.units import format_bytes, format_bytes_per_s, format_flops_per_s, format_seconds

__all__ = [
    "bar",
    "catalog",
    "detail",
    "explanation",
    "import_line",
    "imported",
    "json_text",
    "plan",
    "routing",
    "routing_tables",
    "rows",
    "run",
    "tables",
]

_CATALOGS = ("models", "gpus", "clusters", "scenarios", "routing")


PIPE_COLUMNS = 110
"""Width of what goes to a file or a pipe, where there is no terminal to ask."""


def _console() -> Console:
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
    out = _console()
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
    out = _console()
    out.print(run_table(told))
    _warn(out, told)
    for key in ("report", "timeline"):
        if key in told:
            out.print(f"{key.capitalize()}: {told[key]}")


def explanation(told: Mapping[str, Any], every: bool) -> None:
    """Terms of a result, step by step, then the families and the memory behind them."""
    out = _console()
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
        return [
            {"name": name, "phase": catalog_routing(name).phase, "source": catalog_routing(name).provenance}
            for name in catalog_names()
        ]
    raise ScenarioError("is no part of the catalog", value=what, fix=f"one of {', '.join(_CATALOGS)}")


def tables(*found: Table, last: str = "") -> None:
    """Tables made elsewhere, and a line below them."""
    out = _console()
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
    _console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, int) and value >= 10**6:
        return f"{value / 1e9:.2f}B"
    return str(value)


def routing(name: str, model: str | None) -> dict[str, Any]:
    """How a router loads its experts, as `moesim.routing.describe` tells it."""
    shape = None
    if model is not None:
        spec = load_model(model)
        if spec.moe is None:
            raise TraceError("is a dense model and has no router", value=model, place="--model")
        moe = spec.moe
        shape = RoutingShape(len(spec.moe_layers), moe.n_experts, moe.top_k, moe.n_groups, moe.top_groups)
    source = open_trace(name, n_experts=shape.n_experts if shape else None)
    if isinstance(source, RoutingTrace):
        source.check()
    return describe(source, shape)


def routing_tables(name: str, told: Mapping[str, Any]) -> None:
    """A trace's skew, balance, active experts and locality."""
    out = _console()
    facts = ", ".join(
        f"{key} {told[key]}" for key in ("phase", "n_layers", "n_experts", "top_k", "n_tokens", "n_sequences")
        if told.get(key) is not None
    )  # fmt: skip
    out.print(f"[bold]{told['name']}[/bold] ({name}): {facts}", highlight=False)
    out.print(f"Source: {told['source']}", highlight=False)
    for note in told["notes"]:
        out.print(f"Note: {note}", highlight=False)
    spread = Table(title="Over layers", title_justify="left")
    for column in ("", "least", "median", "most"):
        spread.add_column(column, justify="right" if column else "left")
    for key, label in (
        ("busiest_over_mean", "busiest expert over mean"),
        ("gini", "Gini"),
        ("entropy", "entropy"),
    ):
        one = told[key]
        spread.add_row(label, *(f"{one[part]:.2f}" for part in ("min", "median", "max")))
    out.print(spread)
    active = ", ".join(f"{batch}: {share:.2f}" for batch, share in told["active_experts"].items())
    out.print(f"Share of experts with a token, by batch: {active}", highlight=False)
    for ep, one in told["balancedness"].items():
        out.print(
            f"Mean over busiest rank at {ep}: {one['as_is']:.2f} as numbered, {one['permuted']:.2f} permuted",
            highlight=False,
        )
    if "locality" in told:
        shared = ", ".join(f"{key.replace('_', ' ')} {share:.2f}" for key, share in told["locality"].items())
        out.print(f"Locality: {shared}", highlight=False)


def imported(source: Path, output: Path, format_: str, model: str | None) -> dict[str, Any]:
    """Read routing of another tool and write it as a trace.

    Raises
    ------
    TraceError
        If the format is unknown, or the file breaks a rule.
    """
    if not source.is_file():
        raise TraceError("there is no such file", value=str(source))
    if output.suffix != ".safetensors":
        raise TraceError(
            "a trace is a .safetensors file", value=str(output), fix=f"{output.stem}.safetensors"
        )
    spec = load_model(model) if model else None
    moe = spec.moe if spec else None
    if format_ == "auto":
        trace = open_trace(source, n_experts=moe.n_experts if moe else None)
    elif format_ == "sglang":
        trace = read_sglang_counts(source, model=model or "unknown", top_k=moe.top_k if moe else None)
    elif format_ == "npz":
        trace = read_npz(source, model=model or "unknown", n_experts=moe.n_experts if moe else None)
    else:
        raise TraceError("is no known format", value=format_, place="--format", fix="auto, sglang or npz")
    if not isinstance(trace, RoutingTrace):
        raise TraceError(
            "is a generator, not a recording", value=str(source), fix="use it as routing.trace as it is"
        )
    if spec is not None and moe is not None:
        if trace.n_experts != moe.n_experts:
            raise TraceError(
                f"{spec.name} has {moe.n_experts} experts", value=trace.n_experts, place=str(source)
            )
        if trace.is_token_level and trace.n_layers != len(spec.moe_layers):
            raise TraceError(
                f"{spec.name} has {len(spec.moe_layers)} MoE layers",
                value=trace.n_layers,
                place=str(source),
                fix="name the model that was recorded",
            )
        trace = replace(trace, model=spec.name, top_k=moe.top_k if trace.top_k is None else trace.top_k)
    trace.check()
    write_trace(trace, output)
    return {
        "output": str(output), "model": trace.model, "n_experts": trace.n_experts, "top_k": trace.top_k,
        "n_layers": trace.n_layers, "n_tokens": trace.n_tokens, "token_level": trace.is_token_level,
        "phase": trace.phase, "notes": list(trace.notes),
    }  # fmt: skip


def import_line(told: Mapping[str, Any]) -> None:
    """What was written."""
    out = _console()
    kind = f"{told['n_tokens']:,} tokens" if told["token_level"] else "counts"
    out.print(
        f"{told['output']}: {told['model']}, {told['n_layers']} layers x {told['n_experts']} experts, {kind}",
        highlight=False,
    )
    for note in told["notes"]:
        out.print(f"Note: {note}", highlight=False)
