"""``moesim sweep``: one scenario at every combination of some keys' values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moesim.cli import show
from moesim.cli.paths import page_path, writable

__all__ = ["sweep"]

MOST_KNEES = 6
"""Curves whose knee is told, evenly chosen."""


def sweep(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="Scenario file (YAML).")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUES",
            help="Values of a key: 1.0:2.0:0.125, 1..512*2, 8,16,none, or one for all points; repeatable.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one row a point as CSV.")] = None,
    report: Annotated[str | None, typer.Option(metavar="PAGE", help="Where an HTML page goes.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Append each point (JSON lines); a rerun skips those it has."),
    ] = None,
    engine: Annotated[bool, typer.Option("--engine", help="Play every point event by event.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Price a scenario at every combination of some keys' values."""
    from moesim.plan import read_grid
    from moesim.plan import sweep as price

    page = page_path(report, None, quiet=json)
    csv, out = writable(csv, "--csv"), writable(out, "--out")
    grid = read_grid(scenario, set_ or ())
    log = out or (csv.with_name(f"{csv.name}.part") if csv else None)
    with show.bar(f"pricing {len(grid.points):,} points", quiet=json) as progress:
        told = price(grid, engine=engine, jobs=jobs, log=log, progress=progress)
    if csv is not None:
        from moesim.report.sweep_table import write_sweep_csv

        told["csv"] = str(write_sweep_csv(csv, told))
        if out is None and log is not None:
            log.unlink(missing_ok=True)  # all of it is in the CSV
    if page is not None:
        from moesim.report.sweep_page import write_sweep_report

        told["report"] = str(write_sweep_report(page, told))
    if json:
        show.json_text(told)
    else:
        _tell(told)


def _tell(told: Mapping[str, Any]) -> None:
    """Print the points, the knee of each curve, and what the sweep took."""
    from moesim.report.sweep_table import refused_table, sweep_table
    from moesim.report.sweep_words import knee_lines

    out = show.console()
    if told["n_refused"] < told["n_points"]:
        out.print(sweep_table(told, width=out.width))
    if told["n_refused"]:
        out.print(refused_table(told))
    for line in knee_lines(told, MOST_KNEES):
        out.print(escape(line), highlight=False)
    n_curves = len((told["tradeoff"] or {}).get("curves", ()))
    if n_curves > MOST_KNEES:
        out.print(f"{MOST_KNEES} of {n_curves} curves: see --json for the others.", highlight=False)
    for line in told["warnings"]:
        out.print(f"[yellow]Warning:[/yellow] {escape(line)}", highlight=False)
    rate = told["points_per_cpu_s"]
    taken = f", {told['n_resumed']:,} of them from the file" if told["n_resumed"] else ""
    speed = f" in {told['elapsed_s']:.1f} s ({rate:.0f} per CPU second)" if rate else ""
    out.print(f"{told['n_points']:,} points{taken}, {told['n_refused']:,} refused{speed}.", highlight=False)
    for key in ("csv", "report"):
        if key in told:
            out.print(f"{key.upper() if key == 'csv' else key.capitalize()}: {told[key]}", highlight=False)
