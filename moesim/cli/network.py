"""What ``moesim network`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from moesim.cli import show
from moesim.report.topology_page import network_rows

__all__ = ["network"]

NEXT_KIND = 6
"""Column that a terminal has no room for; the page has it."""


def network(told: Mapping[str, Any]) -> None:
    """One layer's collectives."""
    dispatch, cluster = told["dispatch"], told["cluster"]
    layer = "" if told["layer"] is None else f", layer {told['layer']}"
    title = f"{told['model']} on {cluster['n_gpus']} {cluster['gpu']}, {told['phase']}{layer}"
    head, *rows = [[cell for at, cell in enumerate(row) if at != NEXT_KIND] for row in network_rows(told)]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(name, justify="right" if name in ("time", "by ports") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    said = [
        f"Dispatch: {dispatch['kind']} ({dispatch['library']}): {dispatch['why']}.",
        f"{told['tokens_per_rank']:,.0f} tokens a rank; {told['routing']}. "
        "By ports: each rank's own ports alone; time: links shared.",
    ]
    kept = [one for one in told["collectives"] if one["n_sms"]]
    if kept:
        longer = kept[0]["beside_compute_s"] / kept[0]["time_s"] if kept[0]["time_s"] else 1.0
        said.append(
            f"Beside compute: {longer:.2f} times as long; compute {kept[0]['compute_stretch']:.2f} times, "
            f"on {kept[0]['n_sms']} SMs fewer."
        )
    if "report" in told:
        said.append(f"Report: {told['report']}")
    show.tables(table, last="\n".join(said))
