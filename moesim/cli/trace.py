"""Commands of `moesim trace`: show what a router did, bring it in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli import show
from moesim.cli.trace_import import import_line, imported
from moesim.cli.trace_make import register
from moesim.cli.trace_show import page_path, routing, routing_tables

__all__ = ["app"]

app = typer.Typer(
    help="Look at routing traces and bring them in.", no_args_is_help=True, rich_markup_mode=None
)

register(app)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.command("show")
def show_(
    trace: Annotated[str, typer.Argument(help="Trace file, or a name of `moesim list routing`.")],
    model: Annotated[str | None, typer.Option(help="Model to show a generator or bare counts for.")] = None,
    ep: Annotated[
        str | None,
        typer.Option(help="Ranks of expert-parallel groups, as 8,16,32; what divides where left out."),
    ] = None,
    placement: Annotated[
        str,
        typer.Option(
            help="Placements: contiguous, permuted, round-robin, balanced, eplb, or a FILE; by comma."
        ),
    ] = "contiguous,permuted,eplb",
    redundant: Annotated[int, typer.Option(min=0, help="Spare expert slots.")] = 0,
    json: Json = False,
    html: Annotated[Path | None, typer.Option(metavar="PAGE", help="Where an HTML page goes.")] = None,
) -> None:
    """Show how a router loads its experts, and how it stands among known models."""
    page = page_path(html)
    told = routing(trace, model, ep, placement, redundant)
    if page is not None:
        from moesim.report.routing_page import write_routing_report

        told["report"] = str(write_routing_report(page, told))
    if json:
        show.json_text(told)
        return
    routing_tables(trace, told)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="SGLang count JSON, token-level npz, or a moesim trace.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Trace to write (.safetensors).")],
    format_: Annotated[str, typer.Option("--format", help="auto, sglang or npz.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Model the routing is of; its experts are checked.")
    ] = None,
    json: Json = False,
) -> None:
    """Bring routing of another tool into moesim's format."""
    told = imported(source, output, format_, model)
    if json:
        show.json_text(told)
        return
    import_line(told)
