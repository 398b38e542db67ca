"""Train a small MoE language model on text: ``python -m calibrate.routing.train -o own.safetensors``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from calibrate.routing.corpus import Corpus
from calibrate.routing.model import ModelConfig, fine_grained
from calibrate.routing.record import parse_texts, run
from calibrate.routing.router import RouterConfig
from calibrate.routing.training import (
    Recipe,
    Step,
    Trained,
    evaluate,
    load_checkpoint,
    save_checkpoint,
    train,
)
from moesim.errors import ModelError

__all__ = ["main"]

_DEFAULT = ModelConfig()
_SAID_EVERY_S = 10.0


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="Checkpoint to write (.safetensors).")],
    text: Annotated[
        list[str] | None, typer.Option(metavar="DOMAIN=PATH", help="Text, file or folder; repeatable.")
    ] = None,
    domains: Annotated[
        str | None, typer.Option(help="Domains of this machine's text, comma-separated.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Decoder layers, each with experts.")] = _DEFAULT.n_layers,
    hidden: Annotated[int, typer.Option(help="Width.")] = _DEFAULT.hidden,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = _DEFAULT.n_heads,
    experts: Annotated[int, typer.Option(help="Routed experts per layer; 0: dense.")] = _DEFAULT.n_experts,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = _DEFAULT.top_k,
    expert_width: Annotated[int, typer.Option(help="Inner width of an expert.")] = _DEFAULT.expert_width,
    shared: Annotated[int, typer.Option(help="Shared experts beside the routed ones.")] = 0,
    granularity: Annotated[int, typer.Option(help="Cut each expert in so many, choose so many more.")] = 1,
    scoring: Annotated[str, typer.Option(help="softmax or sigmoid.")] = "softmax",
    aux_weight: Annotated[float, typer.Option(help="Weight of the balance loss (Switch, GShard).")] = 0.01,
    z_weight: Annotated[float, typer.Option(help="Weight of the router z-loss (ST-MoE).")] = 0.0,
    bias_rate: Annotated[
        float, typer.Option(help="Balance by bias (DeepSeek-V3): gamma, 0.001 there.")
    ] = 0.0,
    jitter: Annotated[float, typer.Option(help="Noise on the router's input (Switch): 0.01.")] = 0.0,
    capacity_factor: Annotated[
        float | None, typer.Option(help="Drop tokens beyond; dropless if absent.")
    ] = None,
    drop: Annotated[str, typer.Option(help="Which are dropped: by position or by weight.")] = "position",
    expert_choice: Annotated[bool, typer.Option("--expert-choice", help="Experts choose tokens.")] = False,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 500,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    context: Annotated[int, typer.Option(help="Bytes per sequence.")] = 128,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    dtype: Annotated[
        str, typer.Option(help="float32, or bfloat16 where the CPU has AMX, or a GPU.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and jitter.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads; sums in another order with another number.")
    ] = 1,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUTPUT, whose options then hold.")
    ] = False,
) -> None:
    """Train a small MoE language model from scratch on text, byte by byte."""
    torch.set_num_threads(threads)
    if output.suffix != ".safetensors":
        raise ModelError("is a .safetensors file", value=str(output), place="--output")
    before = load_checkpoint(output) if resume else None
    if before is not None:
        config, recipe = before.model.config, before.recipe
    else:
        router = RouterConfig(
            scoring=scoring,  # type: ignore[arg-type]
            aux_weight=aux_weight,
            z_weight=z_weight,
            bias_rate=bias_rate,
            jitter=jitter,
            capacity_factor=capacity_factor,
            drop=drop,  # type: ignore[arg-type]
            expert_choice=expert_choice,
        )
        config = ModelConfig(layers, hidden, heads, experts, top_k, expert_width, shared, router)
        config = fine_grained(config, granularity)
        recipe = Recipe(steps, batch, context, learning_rate, dtype=dtype, seed=seed)
    corpus = parse_texts(text or [], domains)
    _say_start(config, corpus)
    say = _Progress(output, save_every)
    done = train(config, recipe, corpus, resume=before, after=say)
    save_checkpoint(done, output)
    _say_end(done, corpus)


class _Progress:
    """A line every ten seconds, a checkpoint every so many steps."""

    def __init__(self, output: Path, save_every: int) -> None:
        self.output, self.save_every = output, save_every
        self.said_s = time.monotonic()
        self.bits: list[float] = []

    def __call__(self, step: Step, at: Trained) -> bool:
        self.bits.append(step.bits_per_byte)
        if at.done % self.save_every == 0:
            save_checkpoint(at, self.output)
        if time.monotonic() - self.said_s > _SAID_EVERY_S:
            self.said_s = time.monotonic()
            busiest = _busiest(step.chosen)
            mean = sum(self.bits) / len(self.bits)
            dropped = f"  dropped {step.dropped_fraction:.1%}" if step.dropped_fraction else ""
            print(
                f"step {at.done}/{at.recipe.steps}  {mean:.3f} bits/byte  busiest/mean {busiest:.2f}{dropped}",
                flush=True,
            )
            self.bits.clear()
        return False


def _busiest(chosen: NDArray[np.int64]) -> float:
    """Busiest expert over the mean, averaged over layers; 1 where there are no experts."""
    return float((chosen.max(1) / chosen.mean(1)).mean()) if chosen.size else 1.0


def _say_start(config: ModelConfig, corpus: Corpus) -> None:
    total, active = config.n_parameters / 1e6, config.n_active / 1e6
    print(f"{total:.2f} M parameters, {active:.2f} M active per token")
    for domain in corpus.domains:
        n = domain.train.size, domain.held_out.size
        print(f"  {domain.name}: {n[0]} bytes, {n[1]} held out; {domain.source} ({domain.licence})")


def _say_end(done: Trained, corpus: Corpus) -> None:
    found = evaluate(done.model, corpus, context=done.recipe.context, dtype=done.recipe.dtype)
    each = ", ".join(f"{name} {bits:.2f}" for name, bits in found.by_domain.items())
    print(f"held out: {found.bits_per_byte:.3f} bits/byte ({each})")
    if found.chosen.size:
        print(f"busiest/mean {_busiest(found.chosen):.2f}, dropped {found.dropped_fraction:.1%}")


if __name__ == "__main__":
    run(main)
