"""What `moesim trace import` reads, writes and prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesim.cli.show import console
from moesim.errors import TraceError
from moesim.model import ModelSpec, load_model
from moesim.routing import RoutingTrace, read_trace, write_trace
from moesim.routing.importers import Incoming, Told, incoming_routing, written

__all__ = ["facts", "import_line", "imported", "trace_file"]


def trace_file(output: Path) -> Path:
    """Refuse a target that cannot become a trace, before any work is done for it.

    Raises
    ------
    TraceError
        If it is no .safetensors file, or its folder does not exist.
    """
    if output.suffix != ".safetensors":
        fix = str(output.with_suffix(".safetensors")) if output.name else "trace.safetensors"
        raise TraceError("a trace is a .safetensors file", value=str(output), place="--output", fix=fix)
    if output.is_dir():
        raise TraceError("is a folder", value=str(output), place="--output", fix="add the name of a file")
    if not output.resolve().parent.is_dir():
        rule = "its folder does not exist"
        raise TraceError(rule, value=str(output), place="--output", fix="make the folder")
    return output


def imported(
    source: str, output: Path, format_: str, model: str | None, top_k: int | None = None
) -> dict[str, Any]:
    """Read routing of another program and write it as a trace, in bounded memory.

    Raises
    ------
    TraceError
        If the format is unknown, or the file breaks a rule; nothing is written then.
    """
    trace_file(output)
    spec = load_model(model) if model else None
    one = incoming_routing(source, format_, told=_told(spec, model, top_k), load=_load_torch)
    if spec is not None:
        _check_model(one, spec, source)
    if isinstance(one, RoutingTrace):
        one.check()
        known = spec.moe.top_k if spec is not None and spec.moe is not None else top_k
        write_trace(replace(one, model=spec.name if spec else one.model, top_k=one.top_k or known), output)
    else:
        written(one, output, model=spec.name if spec else "unknown")
    return facts(output)


def facts(output: Path) -> dict[str, Any]:
    """What a trace that was just written holds."""
    trace = read_trace(output)
    return {
        "output": str(output), "source": trace.source, "model": trace.model, "n_experts": trace.n_experts,
        "top_k": trace.top_k, "n_layers": trace.n_layers, "n_tokens": trace.n_tokens,
        "n_sequences": None if trace.sequence_offsets is None else len(trace.sequence_offsets) - 1,
        "token_level": trace.is_token_level, "weights": trace.expert_weights is not None,
        "phase": trace.phase, "notes": list(trace.notes),
    }  # fmt: skip


def _told(spec: ModelSpec | None, model: str | None, top_k: int | None) -> Told:
    if spec is None:
        return Told(top_k=top_k)
    moe = spec.moe
    if moe is None:
        raise TraceError("is a dense model and has no router", value=model, place="--model")
    if top_k not in (None, moe.top_k):
        raise TraceError(
            f"{spec.name} has top_k={moe.top_k}", value=top_k, place="--top-k", fix="leave it out"
        )
    return Told(n_experts=moe.n_experts, top_k=moe.top_k, layer_ids=tuple(spec.moe_layers), router=moe)


def _check_model(one: Incoming | RoutingTrace, spec: ModelSpec, source: str) -> None:
    moe = spec.moe
    if moe is None:
        return
    if one.n_experts is not None and one.n_experts != moe.n_experts:
        raise TraceError(f"{spec.name} has {moe.n_experts} experts", value=one.n_experts, place=source)
    if one.top_k is not None and one.top_k != moe.top_k:
        raise TraceError(f"{spec.name} has top_k={moe.top_k}", value=one.top_k, place=source)
    token_level = one.is_token_level if isinstance(one, RoutingTrace) else one.tokens is not None
    if token_level and len(one.layer_ids) != len(spec.moe_layers):
        raise TraceError(
            f"{spec.name} has {len(spec.moe_layers)} MoE layers",
            value=len(one.layer_ids),
            place=source,
            fix="name the model that was recorded",
        )


def _load_torch(path: Path) -> Any:
    from calibrate.routing.torch_files import load_plain

    return load_plain(path)


def import_line(told: Mapping[str, Any]) -> None:
    """What was written, and what was met on the way."""
    out = console()
    kind = f"{told['n_tokens']:,} tokens" if told["token_level"] else "counts"
    if told["n_sequences"]:
        kind += f" in {told['n_sequences']:,} sequences"
    out.print(
        f"{told['output']}: {told['model']}, {told['n_layers']} layers x {told['n_experts']} experts, {kind}",
        highlight=False,
    )
    for note in told["notes"]:
        warning = note.startswith("warning: ")
        text = f"Warning: {note.removeprefix('warning: ')}" if warning else f"Note: {note}"
        out.print(text, highlight=False, markup=False)
