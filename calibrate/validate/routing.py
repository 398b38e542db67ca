"""Generated routing against the real routing it was fitted to: what dispatch, experts and steps take.

    python -m calibrate.validate.routing DATA_DIR [--json]

DATA_DIR holds `deepseek_v3_sglang` and `gpt_oss_20b`. Each real file is drawn and priced on H200 nodes as any scenario
is, and so are two generators fitted to it (a curve for each layer; a few curves for all layers), Zipf popularity of
the same Gini coefficient, and uniform routing. Held out: fitted on every other layer (of gpt-oss-20b: sequence) and
shown on the rest, beside the half it was fitted on itself.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from moesim.cost.backend import backend_of
from moesim.hardware.catalog import load_cluster
from moesim.model import load_model
from moesim.plan.context import Choice, Context
from moesim.plan.workloads import decode_outcome
from moesim.routing import (
    RoutingShape,
    RoutingSource,
    RoutingTrace,
    SyntheticRouting,
    fit_generator,
    inclusion,
    popularity,
    read_npz,
    read_sglang_counts,
)
from moesim.routing.describe import gini
from moesim.work.case import Layout
from moesim.work.ops import Combine, Dispatch, ExpertFfn

__all__ = ["BATCHES", "PARTS", "Case", "Row", "cases", "compare", "priced", "routing_table", "zipf_of"]

FloatArray = NDArray[np.float64]

BATCHES = (32, 64, 128, 256)
"""Tokens per rank in a decode step."""
PARTS = ("dispatch", "combine", "experts", "step")
CONTEXT_TOKENS = 2048
N_SEEDS = 3
"""Draws of a generator (and renamings of a real file) that a figure is the mean of."""
DEEPSEEK_EPS = (8, 16, 32, 64)
GPT_OSS_EPS = (8, 16, 32)
"""gpt-oss-20b has 32 experts."""


@dataclass(frozen=True, eq=False)
class Case:
    """What a generator is fitted to, and what it is compared with."""

    name: str
    how: str
    fitted_to: RoutingTrace
    shown_on: RoutingTrace
    renamed: bool
    """Experts renamed at random in each layer, so that their place tells nothing."""
    eps: tuple[int, ...]
    per_layer: bool = True
    """Whether layers of the two are the same, so that a fit layer by layer can be compared."""

    @property
    def shape(self) -> RoutingShape:
        """Of the routing shown, without expert groups."""
        return RoutingShape(self.shown_on.n_layers, self.shown_on.n_experts, self.shown_on.top_k or 8)


@dataclass(frozen=True)
class Row:
    """Errors of one kind of routing at one width of expert parallelism; generated over real, minus 1."""

    case: str
    how: str
    placed: str
    routing: str
    ep: int
    errors: Mapping[str, tuple[float, ...]]
    """By part, for each of `BATCHES`; mean over draws."""
    worst: Mapping[str, float]
    """By part, the largest over batches of any single draw, with its sign."""
    real_s: Mapping[str, tuple[float, ...]]
    layer_busiest_mean: float
    """Error of busiest over mean expert: mean over layers of its size."""
    layer_busiest_worst: float


def cases(data: Path, *, quick: bool = False) -> list[Case]:
    """Every real file, as numbered and renamed, in sample and held out.

    Parameters
    ----------
    data
        Folder of `deepseek_v3_sglang` and `gpt_oss_20b`.
    quick
        One DeepSeek file and gpt-oss, as numbered, in sample.
    """
    found: list[Case] = []
    files = sorted((data / "deepseek_v3_sglang").glob("*.json"))
    for file in files[:1] if quick else files:
        trace = read_sglang_counts(file, model="deepseek-v3", top_k=8)
        name = f"deepseek-v3 {file.stem}"
        found.append(Case(name, "fitted", trace, trace, False, DEEPSEEK_EPS))
        if not quick:
            found.append(Case(name, "fitted", trace, trace, True, DEEPSEEK_EPS))
            halves = _layers(trace, 0), _layers(trace, 1)
            found.append(Case(name, "held out", *halves, True, DEEPSEEK_EPS, per_layer=False))
    oss = read_npz(data / "gpt_oss_20b" / "tokens.npz", model="gpt-oss-20b", n_experts=32)
    found.append(Case("gpt-oss-20b", "fitted", oss, oss, False, GPT_OSS_EPS))
    if not quick:
        found.append(Case("gpt-oss-20b", "fitted", oss, oss, True, GPT_OSS_EPS))
        found.append(
            Case("gpt-oss-20b", "held out", _sequences(oss, 0), _sequences(oss, 1), False, GPT_OSS_EPS)
        )
    return found


def _layers(trace: RoutingTrace, first: int) -> RoutingTrace:
    """Every other layer of a count file."""
    if trace.expert_counts is None:
        return trace
    return replace(trace, layer_ids=trace.layer_ids[first::2], expert_counts=trace.expert_counts[:, first::2])


def _sequences(trace: RoutingTrace, first: int) -> RoutingTrace:
    """Every other sequence of a token-level trace."""
    spans = list(zip(trace.offsets[:-1], trace.offsets[1:], strict=True))[first::2]
    ids = np.concatenate([np.asarray(trace.expert_ids)[a:b] for a, b in spans])
    offsets = np.cumsum([0, *(int(b - a) for a, b in spans)])
    return replace(trace, expert_ids=ids, expert_weights=None, sequence_offsets=offsets)


def zipf_of(load: FloatArray) -> SyntheticRouting:
    """Zipf routing whose Gini coefficient is the median one of a load (n_layers, n_experts)."""
    target, shape = float(np.median(gini(load))), RoutingShape(1, load.shape[1], 1)

    def skew(exponent: float) -> float:
        return float(gini(popularity(SyntheticRouting.zipf(exponent), shape))[0])

    return SyntheticRouting.zipf(brentq(lambda exponent: skew(exponent) - target, 0.01, 4.0))


def priced(
    source: RoutingSource, model: str, ep: int, batches: Sequence[int] = BATCHES
) -> dict[str, FloatArray]:
    """Seconds of a decode step and of its parts: the slowest rank's, added up over layers; (n_batches,) each."""
    spec = load_model(model)
    context = Context(
        spec,
        source,
        backend_of("sglang"),
        spec.weight_dtype,
        spec.expert_dtype,
        "bfloat16",
        max_drawn_tokens=16384,
    )
    cluster = load_cluster(gpu="h200-sxm", nodes=-(-ep // 8))
    sizes = {
        "batch_per_rank": np.array(batches, dtype=float),
        "context": np.full(len(batches), float(CONTEXT_TOKENS)),
    }
    layout = Layout(tp=1, dp=ep, ep=ep)
    outcome = decode_outcome(context, cluster, layout, Choice("low-latency"), sizes)
    timed = outcome.passes["decode"].timed
    found = {part: np.zeros(len(batches)) for part in PARTS}
    names = {Dispatch: "dispatch", Combine: "combine", ExpertFfn: "experts"}
    for block, seconds in zip(timed.step.blocks, timed.seconds, strict=True):
        for node, one in zip(block.nodes, seconds, strict=True):
            if type(node.op) in names:
                slowest = np.broadcast_to(one.max(axis=2), (len(batches), len(block.layers)))
                found[names[type(node.op)]] += slowest.sum(axis=1)
    found["step"] = np.asarray(outcome.step_s)
    return found


def _priced_each(sources: Sequence[RoutingSource], model: str, ep: int) -> dict[str, FloatArray]:
    """As `priced`, (n_sources, n_batches) each."""
    every = [priced(source, model, ep) for source in sources]
    return {part: np.stack([one[part] for one in every]) for part in PARTS}


def compare(case: Case) -> list[Row]:
    """Price the real routing of a case and what stands in for it."""
    real = case.shown_on
    shape = case.shape
    load = np.asarray(inclusion(real, shape))
    shown = _drawn_as(real, case.renamed)
    kinds: dict[str, RoutingSource] = {
        "per layer": fit_generator(case.fitted_to, per_layer=True),
        "few curves": fit_generator(case.fitted_to),
        "zipf": zipf_of(np.asarray(case.fitted_to.counts, dtype=float)),
        "uniform": SyntheticRouting.uniform(),
        "other half": case.fitted_to,
    }
    if case.fitted_to is case.shown_on:
        del kinds["other half"]
    if not case.per_layer:
        del kinds["per layer"]
    rows = []
    for ep in case.eps:
        truth = {part: each.mean(axis=0) for part, each in _priced_each(shown, real.model, ep).items()}
        for name, source in kinds.items():
            made = _drawn_as(source, case.renamed)
            off = {
                part: each / truth[part] - 1.0 for part, each in _priced_each(made, real.model, ep).items()
            }
            busiest = _busiest_errors(load, made, shape, by_layer=name == "per layer")
            rows.append(
                Row(
                    case.name,
                    case.how,
                    "renamed" if case.renamed else "as numbered",
                    name,
                    ep,
                    {part: tuple(off[part].mean(axis=0).tolist()) for part in PARTS},
                    {part: max(off[part].ravel().tolist(), key=abs) for part in PARTS},
                    {part: tuple(truth[part].tolist()) for part in PARTS},
                    *busiest,
                )
            )
    return rows


def _drawn_as(source: RoutingSource, renamed: bool) -> list[RoutingSource]:
    """Draws of a generator, or a real file; renamed where experts' places are to tell nothing."""
    if isinstance(source, SyntheticRouting):
        return [replace(source, seed=seed, keep_index=not renamed) for seed in range(N_SEEDS)]
    return [source.permuted(seed) for seed in range(N_SEEDS)] if renamed else [source]


def _busiest_errors(
    load: FloatArray, made: Sequence[RoutingSource], shape: RoutingShape, *, by_layer: bool
) -> tuple[float, float]:
    """Size of the error of busiest over mean, mean and largest over layers; sorted layers where none is named."""
    real = load.max(-1) / load.mean(-1)
    generated = np.mean([_busiest(one, shape, by_layer=by_layer) for one in made], axis=0)
    errors = np.abs(generated / (real if by_layer else np.sort(real)) - 1.0)
    return float(errors.mean()), float(errors.max())


def _busiest(source: RoutingSource, shape: RoutingShape, *, by_layer: bool) -> FloatArray:
    p = np.asarray(inclusion(source, shape))
    busiest = np.asarray(p.max(-1) / p.mean(-1))
    return busiest if by_layer else np.sort(busiest)


def routing_table(rows: Sequence[Row]) -> str:
    """The largest error of each part over batches and draws, as text."""
    lines = []
    head = f"{'routing':12}{'EP':>4}" + "".join(f"{part:>10}" for part in PARTS)
    head += f"{'layer busiest':>15}{'worst':>8}"
    last = ""
    for row in rows:
        title = f"{row.case}, {row.placed}, {row.how}"
        if title != last:
            lines += ["", title, head]
            last = title
        parts = "".join(f"{row.worst[part]:+10.1%}" for part in PARTS)
        lines.append(
            f"{row.routing:12}{row.ep:4}{parts}{row.layer_busiest_mean:15.1%}{row.layer_busiest_worst:8.1%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of deepseek_v3_sglang and gpt_oss_20b")
    parser.add_argument("--quick", action="store_true", help="one file of each model, as numbered")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    given = parser.parse_args(arguments)
    rows = [row for case in cases(given.data, quick=given.quick) for row in compare(case)]
    if given.json:
        told: list[dict[str, Any]] = [asdict(row) for row in rows]
        print(json.dumps({"batches": BATCHES, "rows": told}, indent=1))
        return
    print(routing_table(rows))


if __name__ == "__main__":
    main()
