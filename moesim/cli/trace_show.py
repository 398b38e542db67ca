"""What `moesim trace show` tells and prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from moesim.cli.show import console
from moesim.errors import TraceError
from moesim.model import load_model
from moesim.routing import RoutingShape, RoutingTrace, describe, open_trace

__all__ = ["routing", "routing_tables"]


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
    out = console()
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
