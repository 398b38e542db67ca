"""Commands of `moesim trace` that make routing: sample batches, fit a generator, draw from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from moesim.cli import show
from moesim.cli.trace_show import model_shape, named, page_path
from moesim.errors import TraceError
from moesim.routing import (
    Phase,
    RoutingShape,
    RoutingTrace,
    SyntheticRouting,
    describe,
    draw_trace,
    fit_generator,
    generate_trace,
    open_trace,
    write_generator,
    write_trace,
)

__all__ = ["register"]

Output = Annotated[Path, typer.Option("-o", "--output", help="File to write.")]
PhaseOption = Annotated[str, typer.Option(help="decode or prefill.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same tokens.")]
Model = Annotated[str | None, typer.Option(help="Model to draw for.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_LARGEST_IDS = 2**32
_JUDGED = ("busiest_over_mean", "gini", "balancedness_ep8", "balancedness_ep32", "shared_with_next_token")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("sample")(sample)
    app.command("fit")(fit)
    app.command("synth")(synth)


def sample(
    trace: Annotated[str, typer.Argument(help="Trace file, or a name of `moesim list routing`.")],
    output: Output,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that hold tokens.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens on each rank.")],
    phase: PhaseOption = "decode",
    seed: Seed = 0,
    model: Model = None,
    json: Json = False,
) -> None:
    """Draw the tokens that the ranks of a group hold in one step."""
    target, kind = _trace_file(output), _phase(phase)
    shape = model_shape(model)
    source = open_trace(trace, n_experts=shape.n_experts if shape else None)
    if shape is None:
        if isinstance(source, SyntheticRouting):
            raise TraceError("a generator draws for any model", value=trace, fix="add --model NAME")
        if source.top_k is None:
            raise TraceError("the trace does not say its top_k", value=trace, fix="add --model NAME")
        shape = RoutingShape(source.n_layers, source.n_experts, source.top_k)
    if isinstance(source, RoutingTrace):
        source = named(source, model)
    drawn = draw_trace(source, shape, n_ranks=ranks, n_tokens=tokens, phase=kind, seed=seed)
    _told(_written(drawn, target) | {"ranks": ranks, "tokens_per_rank": tokens}, json)


def fit(
    trace: Annotated[str, typer.Argument(metavar="IN", help="Trace or count file.")],
    output: Output,
    model: Annotated[str | None, typer.Option(help="Model of counts that do not say their top_k.")] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Keep a curve for each layer.")] = False,
    json: Json = False,
) -> None:
    """Fit a generator to a trace or to counts, and say how near it comes."""
    page_path(output, "-o")
    if output.suffix not in (".yaml", ".yml"):
        raise TraceError("a generator is a .yaml file", value=str(output), fix=f"{output.stem}.yaml")
    shape = model_shape(model)
    source = open_trace(trace, n_experts=shape.n_experts if shape else None)
    if not isinstance(source, RoutingTrace):
        raise TraceError("is a generator already", value=trace, fix="give a trace or a count file")
    source.check()
    source = named(source, model)
    shape = shape or RoutingShape(source.n_layers, source.n_experts, source.top_k or min(8, source.n_experts))
    generator = fit_generator(source, per_layer=per_layer)
    quality = _quality(source, generator, shape)
    write_generator(generator, output, quality=quality)
    told = {"output": str(output), "name": generator.name, "phase": generator.phase, "quality": quality}
    if json:
        show.json_text(told)
        return
    out = show.console()
    out.print(f"{output}: {generator.name}", highlight=False)
    for key, one in quality.items():
        line = f"{key.replace('_', ' ')}: {one['real']:.3f} real, {one['generated']:.3f} generated"
        out.print(line, highlight=False)


def synth(
    generator: Annotated[str, typer.Argument(help="Generator file, or a name of `moesim list routing`.")],
    output: Output,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences to draw.")],
    length: Annotated[int, typer.Option(min=1, help="Tokens of each.")],
    model: Model = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts a layer, without --model.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts a token, without --model.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="MoE layers, without --model.")] = None,
    phase: PhaseOption = "decode",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Draw a whole trace from a generator, for a model of any size."""
    target, kind = _trace_file(output), _phase(phase)
    shape = _asked_shape(model, experts, top_k, layers)
    source = open_trace(generator)
    if not isinstance(source, SyntheticRouting):
        fix = f"moesim trace fit {generator} -o generator.yaml, then draw from that"
        raise TraceError("is a recording, not a generator", value=generator, fix=fix)
    if sequences * length * shape.n_layers * shape.top_k > _LARGEST_IDS:
        size = (sequences, length, shape.n_layers, shape.top_k)
        raise TraceError(
            "a drawn trace has at most 2**32 expert ids", value=size, fix="fewer or shorter ones"
        )
    drawn = generate_trace(
        source, shape, n_sequences=sequences, sequence_length=length, phase=kind, seed=seed
    )
    _told(_written(drawn, target), json)


def _asked_shape(
    model: str | None, experts: int | None, top_k: int | None, layers: int | None
) -> RoutingShape:
    sizes = (experts, top_k, layers)
    shape = model_shape(model)
    if shape is not None:
        if any(one is not None for one in sizes):
            raise TraceError("a model has its own sizes", value=model, fix="--model, or the three sizes")
        return shape
    if experts is None or top_k is None or layers is None:
        fix = "--model NAME, or all of --experts, --top-k and --layers"
        raise TraceError("a trace is drawn for a model", value=sizes, fix=fix)
    return RoutingShape(layers, experts, top_k)


def _trace_file(output: Path) -> Path:
    page_path(output, "-o")
    if output.suffix != ".safetensors":
        fix = f"{output.stem}.safetensors"
        raise TraceError("a trace is a .safetensors file", value=str(output), fix=fix)
    return output


def _phase(phase: str) -> Phase:
    if phase not in ("decode", "prefill"):
        raise TraceError("is decode or prefill", value=phase, place="--phase")
    return cast("Phase", phase)


def _written(trace: RoutingTrace, target: Path) -> dict[str, Any]:
    write_trace(trace, target)
    return {
        "output": str(target), "model": trace.model, "n_experts": trace.n_experts, "top_k": trace.top_k,
        "n_layers": trace.n_layers, "n_tokens": trace.n_tokens, "n_sequences": int(trace.offsets.size - 1),
        "phase": trace.phase, "source": trace.source,
    }  # fmt: skip


def _told(told: Mapping[str, Any], json: bool) -> None:
    if json:
        show.json_text(told)
        return
    show.console().print(
        f"{told['output']}: {told['n_tokens']:,} tokens in {told['n_sequences']:,} sequences, "
        f"{told['n_layers']} layers x {told['n_experts']} experts, top {told['top_k']}",
        highlight=False,
    )


def _quality(
    trace: RoutingTrace, generator: SyntheticRouting, shape: RoutingShape
) -> dict[str, dict[str, float]]:
    """Figures of the trace beside those of what the generator gives, as `moesim trace show` tells them."""
    sizes = [ep for ep in (8, 32) if shape.n_experts % ep == 0]
    real, made = (
        describe(one, shape, ep_sizes=sizes or [1], placements=["contiguous"])["known"]["own"]
        for one in (trace, generator)
    )
    return {
        key: {"real": round(real[key], 4), "generated": round(made[key], 4)}
        for key in _JUDGED
        if key in real and key in made
    }
