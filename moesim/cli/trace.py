"""Commands of `moesim trace`: show what a router did, bring it in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli import show
from moesim.cli.trace_import import import_line, imported
from moesim.cli.trace_show import routing, routing_tables
from moesim.routing.importers import FORMATS

__all__ = ["app"]

app = typer.Typer(
    help="Look at routing traces and bring them in.", no_args_is_help=True, rich_markup_mode=None
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.command("show")
def show_(
    trace: Annotated[str, typer.Argument(help="Trace file, or a name of `moesim list routing`.")],
    model: Annotated[str | None, typer.Option(help="Model to show a generator or bare counts for.")] = None,
    json: Json = False,
) -> None:
    """Show how a router loads its experts."""
    told = routing(trace, model)
    if json:
        show.json_text(told)
        return
    routing_tables(trace, told)


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="Recording of another program: file, folder, or quoted pattern with *."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Trace to write (.safetensors).")],
    format_: Annotated[str, typer.Option("--format", help=", ".join(FORMATS) + ".")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Model the routing is of; its experts are checked.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Experts per token, where neither file nor model says.")
    ] = None,
    json: Json = False,
) -> None:
    """Bring routing of another program into moesim's format."""
    told = imported(source, output, format_, model, top_k)
    if json:
        show.json_text(told)
        return
    import_line(told)
