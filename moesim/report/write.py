"""The pages of ``moesim plan`` and ``moesim run``."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from moesim.report import sections
from moesim.report.detail import LayoutDetail
from moesim.report.headline import answer
from moesim.report.page import Page, write_page
from moesim.report.text import (
    Record,
    band_text,
    cluster_name,
    count,
    layout_name,
    number,
    objective_words,
    plural,
    seconds,
    size_name,
    targets_text,
)

__all__ = ["write_plan_report", "write_run_report"]


def write_plan_report(path: Path | str, plan: Record, details: Sequence[LayoutDetail]) -> Path:
    """Write one HTML file about a plan.

    Parameters
    ----------
    path
        Where to; an older file there is replaced at once.
    plan
        The object of ``moesim plan --json``, with ``layouts_all`` (rows that miss a target, for the Pareto
        figure) and ``provenance`` where there are.
    details
        Loads, traffic and timeline of the best layouts, best first; four at most are shown.

    Returns
    -------
    Path
        The file, complete.
    """
    page = Page()
    rows: Sequence[Record] = plan.get("layouts") or []
    named = _scenario_line(plan.get("scenario") or {})
    sections.add_header(page, f"Plan: {named}", answer(plan), plan, rows[0] if rows else None)
    page.add("<main>")
    if not rows:
        sections.add_ruled_out(page, plan)
    sections.add_ranking(page, rows)
    sections.add_pareto(page, plan)
    sections.add_time(page, rows)
    sections.add_memory(page, rows)
    sections.add_details(page, details)
    if rows:
        sections.add_ruled_out(page, plan)
    sections.add_provenance(page, plan)
    page.add(f"</main><footer><p>{_effort(plan)}</p></footer>")
    return write_page(path, page, f"moesim plan: {named}")


def write_run_report(path: Path | str, result: Record, detail: LayoutDetail) -> Path:
    """Write one HTML file about one simulated scenario.

    Parameters
    ----------
    path
        Where to; an older file there is replaced at once.
    result
        The object of ``moesim run --json``, with ``scenario`` and ``provenance`` where there are.
    detail
        Loads, traffic and timeline of the run.

    Returns
    -------
    Path
        The file, complete.
    """
    page = Page()
    named = _scenario_line(result.get("scenario") or {}) or detail.title
    sections.add_header(page, f"Run: {named}", _run_answer(result), result, result)
    page.add("<main>")
    sections.add_time(page, [result])
    sections.add_memory(page, [result])
    sections.add_details(page, [detail])
    sections.add_provenance(page, result)
    page.add("</main><footer></footer>")
    return write_page(path, page, f"moesim run: {named}")


def _scenario_line(scenario: Record) -> str:
    """Name, model and workload of a scenario, each once."""
    said: list[str] = []
    for key in ("name", "model", "workload"):
        value = scenario.get(key)
        if isinstance(value, str) and value and value not in said:
            said.append(value)
    return ", ".join(said)


def _run_answer(result: Record) -> str:
    """The sentence that a run is made for."""
    where = ", ".join(
        part for part in (f"{layout_name(result)} on {cluster_name(result)}", size_name(result)) if part
    )
    if result.get("feasible") is False:
        return f"{where}: not feasible, {result.get('why_not') or 'no reason given'}."
    key = "step_s" if number(result, "tpot_s") is None else "tpot_s"
    rate = number(result, "tokens_per_s")
    speed = f", {count(float(f'{rate:.3g}'))} tokens/s in all" if rate is not None else ""
    return f"{where}: {objective_words(key)} {band_text(result, key)}{speed}."


def _effort(plan: Record) -> str:
    """What the answer took."""
    said = []
    for key, one in (("n_layouts", "layout"), ("n_points", "point"), ("n_evaluated", "candidate")):
        if (n := number(plan, key)) is not None:
            said.append(plural(int(n), one) + (" evaluated" if key == "n_evaluated" else ""))
    text = ", ".join(said)
    if (elapsed_s := number(plan, "elapsed_s")) is not None:
        text += f" in {seconds(elapsed_s)}"
    if (cpu_s := number(plan, "cpu_s")) is not None:
        text += f" ({seconds(cpu_s)} of processor time)"
    wanted = targets_text(plan.get("targets"))
    return escape(text + (f". Targets: {wanted}." if wanted else "."))
