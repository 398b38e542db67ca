"""Commands: plan, run, sweep, explain, network, list, trace, schema; calibrate loads only when it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from moesim.cli import show
from moesim.cli.guard import guarded
from moesim.cli.paths import page_path, writable
from moesim.cli.sweep import sweep
from moesim.cli.trace import app as trace_app
from moesim.errors import MoesimError
from moesim.scenario import DEFAULT_SCENARIO, ScenarioFile, json_schema, load_scenario

__all__ = ["app", "main"]

app = typer.Typer(
    name="moesim",
    help="Plan and simulate Mixture-of-Experts models on GPU clusters, driven by real routing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(trace_app, name="trace")
app.command()(sweep)

T = TypeVar("T")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as layout.ep=16; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
ScenarioPath = Annotated[str, typer.Argument(metavar="SCENARIO", help="Scenario file (YAML).")]
Report = Annotated[str | None, typer.Option(help="Where the HTML page goes; `none` for no page.")]


@app.command()
def plan(
    scenario: Annotated[
        str | None,
        typer.Argument(metavar="[SCENARIO]", help="Scenario file; an embedded one where left out."),
    ] = None,
    set_: Set = None,
    json: Json = False,
    report: Report = None,
    top: Annotated[int, typer.Option(min=1, help="Layouts in the table.")] = 10,
    engine: Annotated[int, typer.Option(min=0, help="Best layouts to run event by event.")] = 3,
) -> None:
    """Rank every layout of a model on a cluster by cost, latency or throughput."""
    from moesim.plan import plan as search
    from moesim.plan import plan_answer

    page = page_path(report, "moesim-plan.html", quiet=json)
    file = load_scenario(scenario or DEFAULT_SCENARIO, set_ or ())
    with show.bar("pricing layouts", quiet=json) as progress:
        found = _located(file, lambda: search(file.scenario, progress=progress))
    with show.bar("running the best event by event", quiet=json) as progress:
        answer = plan_answer(found, n_engine=engine, progress=progress)
    if page is not None:
        from moesim.report import write_plan_report

        answer.plan["report"] = str(
            write_plan_report(page, answer.plan, [show.detail(one) for one in answer.maps])
        )
    if json:
        show.json_text(answer.plan)
        return
    show.plan(answer.plan, top)


@app.command()
def run(
    scenario: ScenarioPath,
    set_: Set = None,
    json: Json = False,
    report: Report = None,
    timeline: Annotated[
        Path | None,
        typer.Option(help="Write the step as a Perfetto (Chrome trace) JSON file; .gz compresses."),
    ] = None,
) -> None:
    """Simulate one layout event by event."""
    from moesim.plan import run as simulate
    from moesim.plan import run_answer

    page = page_path(report, None, quiet=json)
    timeline = writable(timeline, "--timeline")
    file = load_scenario(scenario, set_ or ())
    single = file.single()
    found = _located(file, lambda: simulate(single))
    result, maps = run_answer(found, single)
    if timeline is not None and found.timelines:
        from moesim.metrics import write_perfetto

        result["timeline"] = str(write_perfetto(found.timelines[0], timeline))
    if page is not None:
        from moesim.report import write_run_report

        result["report"] = str(write_run_report(page, result, show.detail(maps)))
    if json:
        show.json_text(result)
        return
    show.run(result)


@app.command()
def explain(
    scenario: ScenarioPath,
    set_: Set = None,
    json: Json = False,
    all_terms: Annotated[bool, typer.Option("--all", help="Every term, small ones too.")] = False,
) -> None:
    """Show every term of a result: formula, inputs, parameters and where they are from."""
    from moesim.plan import explain as terms
    from moesim.plan import price_one

    file = load_scenario(scenario, set_ or ())
    single = file.single()
    outcome = _located(file, lambda: price_one(single))
    told = terms(outcome)
    if json:
        show.json_text(told)
        return
    show.explanation(told, all_terms)


@app.command()
def network(
    scenario: ScenarioPath,
    set_: Set = None,
    json: Json = False,
    html: Annotated[str | None, typer.Option(metavar="PAGE", help="Where an HTML page goes.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer; that of median imbalance where left out.")] = None,
) -> None:
    """Solve one layer's collectives over the cluster's links: what bounds them, what faster ones buy."""
    from moesim.plan.network import network_answer

    page = page_path(html, None, quiet=json)
    file = load_scenario(scenario, set_ or ())
    single = file.single()
    answer = _located(file, lambda: network_answer(single, layer=layer))
    if page is not None:
        from moesim.report.topology_page import write_network_report

        views = [(one.title, one.played, one.pair_bytes) for one in answer.views]
        answer.told["report"] = str(write_network_report(page, answer.told, views))
    if json:
        show.json_text(answer.told)
        return
    from moesim.cli.network import network as tell

    tell(answer.told)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="models, gpus, clusters, scenarios or routing.")],
    json: Json = False,
) -> None:
    """List what the catalog holds."""
    rows = show.catalog(what)
    if json:
        show.json_text({what: rows})
        return
    show.rows(what, [{key: row[key] for key in row if what != "models" or key != "source"} for row in rows])


@app.command()
def schema() -> None:
    """Print the JSON schema of a scenario, for editors."""
    show.json_text(json_schema())


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def calibrate(context: typer.Context) -> None:
    """Measure kernels and links, fit a profile, show its error: run | fit | validate."""
    from calibrate.app import app as commands

    code = commands(args=context.args, prog_name=context.command_path, standalone_mode=False)
    if code:
        raise typer.Exit(int(code))


def _located(file: ScenarioFile, work: Callable[[], T]) -> T:
    """Run something of a scenario; an error without a place, or with only a key, gets the file's."""
    try:
        return work()
    except MoesimError as error:
        raise file.placed(error) from None


def main() -> None:
    """Run the command line; an input that is refused is told in one line, exit code 2."""
    # the code of an Exit, which is not raised in this mode
    guarded(lambda: app(prog_name="moesim", standalone_mode=False))
