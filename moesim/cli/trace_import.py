"""What `moesim trace import` reads, writes and prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesim.cli.show import console
from moesim.errors import TraceError
from moesim.model import load_model
from moesim.routing import RoutingTrace, open_trace, read_npz, read_sglang_counts, write_trace

__all__ = ["import_line", "imported"]


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
    out = console()
    kind = f"{told['n_tokens']:,} tokens" if told["token_level"] else "counts"
    out.print(
        f"{told['output']}: {told['model']}, {told['n_layers']} layers x {told['n_experts']} experts, {kind}",
        highlight=False,
    )
    for note in told["notes"]:
        out.print(f"Note: {note}", highlight=False)
