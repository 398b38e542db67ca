"""Commands of `moesim trace`: show what a router did, bring it in, record it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli import show
from moesim.cli.trace_capture import PHASES, captured
from moesim.cli.trace_import import import_line, imported
from moesim.cli.trace_make import register
from moesim.cli.trace_show import page_path, routing, routing_tables
from moesim.routing.importers import FORMATS

__all__ = ["app"]

app = typer.Typer(
    help="Look at routing traces, bring them in, record and make them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

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


@app.command("capture")
def capture(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="transformers model: name, folder, or config.json.")
    ],
    prompts: Annotated[Path, typer.Option(help="Text file, one prompt a line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Trace to write (.safetensors).")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to continue each prompt by.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Prompts in one batch.")] = 8,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens that a prompt is cut to.")] = 2048,
    phase: Annotated[str, typer.Option(help=", ".join(PHASES) + ": passes that are recorded.")] = "both",
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Draw weights at random; config.json is enough.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights.")] = 0,
    json: Json = False,
) -> None:
    """Run prompts through a Hugging Face transformers MoE model and record its routing."""
    told = captured(
        model,
        prompts,
        output,
        phase=phase,
        n_new=max_new_tokens,
        batch=batch,
        n_prompt=max_prompt_tokens,
        random_weights=random_weights,
        seed=seed,
    )
    if json:
        show.json_text(told)
        return
    import_line(told)


register(app)
