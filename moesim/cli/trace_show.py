"""What `moesim trace show` tells and prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moesim.cli.show import console
from moesim.errors import LayoutError, TraceError
from moesim.model import load_model
from moesim.routing import RoutingShape, RoutingTrace, describe, open_trace

__all__ = ["model_shape", "named", "page_path", "routing", "routing_tables"]

_N_LAYERS = 3
"""Most skewed layers that are named."""
_N_LAGS = 8


def model_shape(model: str | None) -> RoutingShape | None:
    """What a router of a model draws; None for no model.

    Raises
    ------
    TraceError
        If the model has no router.
    """
    if model is None:
        return None
    spec = load_model(model)
    if spec.moe is None:
        raise TraceError("is a dense model and has no router", value=model, place="--model")
    moe = spec.moe
    return RoutingShape(len(spec.moe_layers), moe.n_experts, moe.top_k, moe.n_groups, moe.top_groups)


def page_path(path: Path | None, place: str = "--html") -> Path | None:
    """Refuse an output that cannot be written, before any work is done for it."""
    if path is None:
        return None
    if path.is_dir():
        raise TraceError("is a folder", value=str(path), place=place, fix="add the name of a file")
    if not path.resolve().parent.is_dir():
        raise TraceError("its folder does not exist", value=str(path), place=place, fix="make the folder")
    return path


def routing(
    name: str,
    model: str | None,
    ep: str | None = None,
    placement: str = "contiguous,permuted,eplb",
    n_redundant: int = 0,
) -> dict[str, Any]:
    """How a router loads its experts, as `moesim.routing.describe` tells it."""
    shape = model_shape(model)
    source = open_trace(name, n_experts=shape.n_experts if shape else None)
    if isinstance(source, RoutingTrace):
        source.check()
        source = named(source, model)
    placements = [one.strip() for one in placement.split(",") if one.strip()]
    if not placements:
        raise LayoutError("names at least one placement", value=placement, place="--placement")
    return describe(source, shape, ep_sizes=_sizes(ep), placements=placements, n_redundant=n_redundant)


def named(trace: RoutingTrace, model: str | None) -> RoutingTrace:
    """The trace under the model's name, where it does not say of which it is."""
    unnamed = model is not None and trace.model == "unknown"
    return replace(trace, model=str(model)) if unnamed else trace


def _sizes(ep: str | None) -> list[int] | None:
    if ep is None:
        return None
    try:
        sizes = [int(one) for one in ep.split(",") if one.strip()]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > 4096:
        raise LayoutError(
            "lists numbers of ranks in 1..4096", value=ep, place="--ep", fix="as in --ep 8,16,32"
        )
    return sizes


def routing_tables(name: str, told: Mapping[str, Any]) -> None:
    """A trace's skew, balance, active experts, locality, layers, drift, domains, and known models."""
    out = console()
    facts = ", ".join(
        f"{key} {told[key]}" for key in ("phase", "n_layers", "n_experts", "top_k", "n_tokens", "n_sequences")
        if told.get(key) is not None
    )  # fmt: skip
    out.print(f"[bold]{escape(told['name'])}[/bold] ({escape(name)}): {facts}", highlight=False)
    out.print(f"Source: {escape(told['source'])}", highlight=False)
    for note in told["notes"]:
        out.print(f"Note: {escape(note)}", highlight=False)
    _skew(out, told)
    _batches(out, told["by_batch"])
    _balance(out, told["balance"])
    _locality(out, told)
    _moving(out, told)
    _known(out, told)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*row)
    return table


def _skew(out: Console, told: Mapping[str, Any]) -> None:
    names = (("busiest_over_mean", "busiest expert over mean"), ("gini", "Gini"), ("entropy", "entropy"))
    rows = [[label, *(f"{told[key][part]:.2f}" for part in ("min", "median", "max"))] for key, label in names]
    out.print(_table("Over layers", ("", "least", "median", "most"), rows))
    order = sorted(told["layers"], key=lambda one: -one["busiest_over_mean"])[:_N_LAYERS]
    named = ", ".join(
        f"layer {one['layer']} (expert {one['busiest_expert']}: {one['busiest_over_mean']:.2f} x)"
        for one in order
    )
    out.print(f"Most skewed: {named}", highlight=False)
    if "even" in told:
        even = told["even"]
        out.print(
            f"Equally popular experts would show {even['busiest_over_mean']:.2f} x and Gini {even['gini']:.3f} "
            "over as many tokens.", highlight=False,
        )  # fmt: skip


def _batches(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    shown = [row for row in rows if row["n_tokens"] in (1, 8, 32, 128, 512)]
    lines = (
        ("of mixed requests", "active", ".2f"), ("of one request in a row", "active_in_a_row", ".2f"),
        ("equally popular", "even_active", ".2f"), ("busiest over mean, mixed", "busiest_over_mean", ".1f"),
        ("busiest over mean, in a row", "busiest_in_a_row", ".1f"),
    )  # fmt: skip
    cells = [
        [label, *(f"{row[key]:{style}}" if key in row else "-" for row in shown)]
        for label, key, style in lines
        if any(key in row for row in shown)
    ]
    out.print(
        _table("Share of experts with a token, by batch", ("", *(str(r["n_tokens"]) for r in shown)), cells)
    )


def _balance(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    sizes = list(rows[0]["batches"])
    cells = [
        [
            str(row["ep"]),
            escape(row["placement"]) + (f" +{row['n_redundant']}" if row["n_redundant"] else ""),
            f"{row['balancedness']:.2f}",
            f"{row['imbalance']:.2f}",
            *(f"{row['batches'][n]['balancedness']:.2f}" for n in sizes),
        ]
        for row in rows
    ]
    columns = ("EP", "placement", "mean/busiest", "busiest/mean - 1", *(f"{n} a rank" for n in sizes))
    out.print(
        _table("Balance of ranks: whole load, and mean/busiest in batches of tokens a rank", columns, cells)
    )


def _locality(out: Console, told: Mapping[str, Any]) -> None:
    found = told.get("locality")
    if found:
        by_lag = list(found["by_lag"].items())[:_N_LAGS]
        cells = [["share of experts in common", *(f"{value:.2f}" for _, value in by_lag)]]
        if by_lag:
            title = "Locality: tokens apart in one request"
            out.print(_table(title, ("", *(lag for lag, _ in by_lag)), cells))
        within = found["shared_in_request"]
        out.print(
            f"Any two tokens share {found['shared_with_any_token']:.2f} (popularity alone {found['chance']:.2f}, "
            f"equally popular {found['even']:.2f})"
            + ("" if within is None else f"; any two of one request {within:.2f}"), highlight=False,
        )  # fmt: skip
    one = told.get("layer_prediction")
    if one:
        out.print(
            f"Next layer's experts told by this layer's: {one['hit_rate']:.2f} right, by popularity alone "
            f"{one['popularity_hit_rate']:.2f}; one expert moves the next choice by "
            f"{one['total_variation']:.2f} (noise {one['total_variation_noise']:.2f}).", highlight=False,
        )  # fmt: skip
    looked = told.get("looked_at")
    if looked and looked["tokens"] < looked["of"]:
        out.print(
            f"Locality, layers, drift and domains are from {looked['tokens']:,} of {looked['of']:,} tokens, "
            f"{looked['runs']:,} runs spread over the trace; load and checks are from all.", highlight=False,
        )  # fmt: skip
    elif looked and told["synthetic"]:
        out.print(f"Locality, layers and drift are from {looked['tokens']:,} tokens drawn.", highlight=False)


def _moving(out: Console, told: Mapping[str, Any]) -> None:
    found = told.get("drift")
    if found:
        values = list(found["total_variation"].values())
        out.print(
            f"Drift over {found['n_windows']} windows of {found['tokens_per_window']:,.0f} tokens: neighbours differ "
            f"by {values[0]:.2f}, the furthest by {values[-1]:.2f} (total variation; "
            f"{found['noise']['total_variation']:.2f} with time shuffled).", highlight=False,
        )  # fmt: skip
    domains = told.get("domains")
    if domains:
        names = [escape(name) for name in domains["names"]]
        out.print(
            f"Domains: knowing one tells {domains['mutual_information_bits']:.3f} bits of the expert "
            f"({domains['mutual_information_noise_bits']:.3f} by chance).", highlight=False,
        )  # fmt: skip
        cells = [
            [name, f"{n:,}", *(f"{value:.2f}" for value in row)]
            for name, n, row in zip(names, domains["n_tokens"], domains["total_variation"], strict=True)
        ]
        title = "Total variation between domains (diagonal: halves of one domain, noise)"
        out.print(_table(title, ("", "tokens", *names), cells))


def _known(out: Console, told: Mapping[str, Any]) -> None:
    known = told["known"]
    columns = (
        ("busiest", "busiest_over_mean"), ("Gini", "gini"), ("entr.", "entropy"), ("EP8", "balancedness_ep8"),
        ("EP16", "balancedness_ep16"), ("EP32", "balancedness_ep32"), ("next", "shared_with_next_token"),
    )  # fmt: skip

    def cells(label: str, one: Mapping[str, Any], sizes: str) -> list[str]:
        return [
            label,
            sizes,
            *(f"{one[key]:.2f}" if one.get(key) is not None else "-" for _, key in columns),
        ]

    own = cells(
        f"[bold]> {escape(told['name'])}[/bold]", known["own"], f"{told['n_experts']}/{told['top_k']}"
    )
    rows = [(known["own"]["busiest_over_mean"], own)]
    rows += [
        (
            one["busiest_over_mean"],
            cells(escape(one["name"]), one, f"{one['n_experts']}/{one['top_k'] or '?'}"),
        )
        for one in known["models"]
    ]
    rows.sort(key=lambda row: -row[0])
    heads = ("", "E/k", *(name for name, _ in columns))
    out.print(_table("Among known models", heads, [row for _, row in rows]))
    out.print(
        "E/k: experts and top-k; busiest over mean, Gini, entropy: medians over layers; EP: mean over busiest rank, "
        "experts as numbered; next: share of experts that the next token keeps.", highlight=False,
    )  # fmt: skip
    out.print(f"Most alike in skew: {escape(known['nearest'])}.", highlight=False)
