"""Which experts held-out text chose, byte by byte, as a routing trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from calibrate.routing.corpus import Corpus, find_corpus, read_text
from calibrate.routing.model import MoeModel
from calibrate.routing.training import load_checkpoint
from moesim.errors import ModelError, MoesimError, TraceError
from moesim.routing import RoutingTrace, write_trace

__all__ = ["main", "parse_texts", "provenance", "record", "run"]


@torch.no_grad()
def record(
    model: MoeModel, corpus: Corpus, *, n_sequences: int, context: int, name: str, batch: int = 16
) -> RoutingTrace:
    """Run held-out text through a model and keep what its routers chose.

    Parameters
    ----------
    model, corpus
        What is run on what; every domain gets the same number of sequences.
    n_sequences, context
        Sequences, and bytes of each.
    name
        Name of the model in the trace.
    batch
        Sequences at once; without capacity it changes nothing.

    Returns
    -------
    RoutingTrace
        ``expert_ids`` by falling score, ``expert_weights``, sequence bounds and domains. What a capacity
        would drop is kept: it is what tokens chose, and the simulator drops by itself.

    Raises
    ------
    ModelError
        If the model is dense, or its experts choose tokens.
    """
    config = model.config
    if not config.n_experts or config.router.expert_choice:
        raise ModelError("has routers in which tokens choose experts", fix="train one with token choice")
    model.eval()
    windows, domains = corpus.held_out(n_sequences, context)
    ids, weights = [], []
    for begin in range(0, len(windows), batch):
        _, routed = model(torch.from_numpy(windows[begin : begin + batch]))
        ids.append(torch.stack([a.ids for a in routed.assignments if a.ids is not None], 1))
        weights.append(torch.stack([a.ids_weight for a in routed.assignments if a.ids_weight is not None], 1))
    source, licence = provenance(corpus)
    small = np.uint8 if config.n_experts <= 256 else np.uint16
    return RoutingTrace(
        model=name,
        n_experts=config.n_experts,
        top_k=config.top_k,
        layer_ids=tuple(range(config.n_layers)),
        phase="mixed",
        source=f"trained from scratch on bytes and recorded on held-out text, {source}",
        licence=f"of the text that was routed, which is not in here: {licence}",
        expert_ids=torch.cat(ids).numpy().astype(small),
        expert_weights=torch.cat(weights).float().numpy().astype(np.float16),
        sequence_offsets=np.arange(len(windows) + 1, dtype=np.int64) * context,
        sequence_domains=domains,
        domains=corpus.names,
    )


def provenance(corpus: Corpus) -> tuple[str, str]:
    """Sources and licences of a corpus, a line each."""
    source = "; ".join(f"{domain.name}: {domain.source}" for domain in corpus.domains)
    return source, "; ".join(f"{domain.name}: {domain.licence}" for domain in corpus.domains)


def parse_texts(texts: list[str], domains: str | None = None) -> Corpus:
    """Corpus of ``DOMAIN=PATH`` options, else what the machine has of `domains` (comma-separated)."""
    if not texts:
        return find_corpus(only=domains.split(",") if domains else None)
    named: dict[str, str] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path or name in named:
            raise TraceError(
                "is DOMAIN=PATH, each domain once", value=text, place="--text", fix="--text python=src/"
            )
        named[name] = path
    return read_text(named)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="What python -m calibrate.routing.train wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Trace to write (.safetensors).")],
    text: Annotated[list[str] | None, typer.Option(metavar="DOMAIN=PATH", help="Text; repeatable.")] = None,
    domains: Annotated[
        str | None, typer.Option(help="Domains of this machine's text, comma-separated.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences, the same number of each domain.")] = 64,
    name: Annotated[str, typer.Option(help="Name of the model in the trace.")] = "own",
) -> None:
    """Record the routing of held-out text."""
    at = load_checkpoint(checkpoint)
    corpus = parse_texts(text or [], domains)
    trace = record(at.model.cpu(), corpus, n_sequences=sequences, context=at.recipe.context, name=name)
    print(
        f"{write_trace(trace, output)}: {trace.n_tokens} tokens x {trace.n_layers} layers x top-{trace.top_k}"
    )


def run(command: object) -> None:
    """Run a Typer command; what moesim refuses is one line on standard error and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)  # type: ignore[type-var]
    try:
        app()
    except MoesimError as error:
        typer.echo(f"moesim: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    run(main)
