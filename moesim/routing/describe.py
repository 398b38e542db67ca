"""What a trace or a generator looks like: skew, balance, active experts, locality, layers, drift, domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.routing.balance import balance, batch_figures, even_load, evenness
from moesim.routing.batches import Phase, RoutingSource, inclusion, layer_map
from moesim.routing.drift import domain_specialisation, drift
from moesim.routing.generate import generate_trace
from moesim.routing.known import compared_with_known
from moesim.routing.locality import locality
from moesim.routing.placement import contiguous
from moesim.routing.prediction import layer_prediction
from moesim.routing.runs import TokenRuns, token_runs
from moesim.routing.synthetic import RoutingShape, SyntheticRouting
from moesim.routing.trace import RoutingTrace

__all__ = ["describe", "entropy", "gini"]

FloatArray = NDArray[np.float64]
_ACTIVE = (1, 8, 32, 128, 512)
_EP_SIZES = (8, 16, 32, 64)
_KNOWN_EP_SIZES = (8, 16, 32)
_PLACEMENTS = ("contiguous", "permuted", "eplb")
_GENERATED = (64, 128)
"""Sequences, and tokens of each, that a generator is shown by."""


def gini(load: ArrayLike) -> FloatArray:
    """Gini coefficient over the last axis: 0 all equal, near 1 all on one."""
    x = np.sort(np.asarray(load, dtype=np.float64), axis=-1)
    n = x.shape[-1]
    weighted = (np.arange(1, n + 1) * x).sum(-1)
    return np.asarray((2.0 * weighted / np.maximum(x.sum(-1), 1e-300) - (n + 1)) / n)


def entropy(load: ArrayLike) -> FloatArray:
    """Entropy of the load over the last axis, as a fraction of a uniform one's."""
    x = np.asarray(load, dtype=np.float64)
    p = x / np.maximum(x.sum(-1, keepdims=True), 1e-300)
    h = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return np.asarray(h / np.log(x.shape[-1])) if x.shape[-1] > 1 else np.ones(x.shape[:-1])


def describe(
    source: RoutingSource,
    shape: RoutingShape | None = None,
    *,
    ep_sizes: Sequence[int] | None = None,
    placements: Sequence[str] = _PLACEMENTS,
    n_redundant: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Summarise routing in plain numbers.

    Parameters
    ----------
    source
        Trace or generator.
    shape
        Model to show a generator for, or a counts-only trace that does not state top_k (8 is assumed);
        a trace's own otherwise.
    ep_sizes
        Ranks of the groups that ``balance`` is shown for; those of 8, 16, 32 and 64 that divide the expert
        slots where None, or others that do.
    placements
        Placements by name (:data:`moesim.routing.PLACEMENTS`) or file.
    n_redundant
        Spare expert slots.
    seed
        Seed of all that is drawn.

    Returns
    -------
    dict
        JSON-able. ``layers``: busiest expert, busiest over mean, Gini, entropy and load over the mean of each
        expert, per layer; least, median and most of the first ones beside. ``even``: busiest over mean and
        Gini that equally popular experts would show for as many tokens, by chance. ``active_experts``: share
        of experts with a token, by batch size, and ``by_batch``, see
        :func:`moesim.routing.balance.batch_figures`. ``balancedness``: mean over busiest rank, averaged over
        layers, by EP size, for contiguous placement of the ids as they are and permuted at random
        (where ids fall with load the two differ, and only the second says what placement must expect);
        ``balance``: by EP size and placement, over all and in batches. Of token-level traces, and of
        generators by a trace drawn from them: ``locality``, ``layer_prediction``, ``drift`` (also of counts of
        several steps), ``domains`` (where the trace names them), and ``looked_at``, the tokens behind
        these. ``known``: the trace among known models.

    Raises
    ------
    TraceError
        If the trace is of a model with other experts.
    LayoutError
        If a placement or EP size does not fit.
    """
    shape = shape or _own_shape(source)
    load = np.asarray(inclusion(source, shape))
    out: dict[str, Any] = _header(source, shape) | _skew(source, shape, load, seed)
    tokens, runs = _tokens(source, shape, seed)
    out["by_batch"] = batch_figures(source, shape, runs, seed=seed)
    out["active_experts"] = {
        str(row["n_tokens"]): row["active"] for row in out["by_batch"] if row["n_tokens"] in _ACTIVE
    }
    permuted = np.random.default_rng(seed).permuted(load, axis=-1)
    out["balancedness"] = {
        f"ep{ep}": {
            name: evenness(contiguous(shape.n_experts, ep).rank_load(one))["balancedness"]
            for name, one in (("as_is", load), ("permuted", permuted))
        }
        for ep in _EP_SIZES
        if shape.n_experts % ep == 0
    }
    sizes = ep_sizes or _usual_sizes(shape.n_experts + n_redundant)
    phase: Phase = "prefill" if source.phase == "prefill" else "decode"
    out["balance"] = balance(
        source, shape, ep_sizes=sizes, placements=placements, n_redundant=n_redundant, phase=phase, seed=seed
    )
    if runs is not None:
        out["locality"] = locality(runs, runs_load(runs), seed=seed)
        out["layer_prediction"] = layer_prediction(runs, seed=seed)
        out["looked_at"] = {"tokens": runs.n_tokens, "of": tokens.n_tokens, "runs": runs.n_runs}
    out["drift"] = drift(tokens, runs, seed=seed)
    out["domains"] = _domains(tokens, runs, seed)
    out["known"] = compared_with_known(_own_figures(out, load))
    return out


def _usual_sizes(n_slots: int) -> list[int]:
    """Usual group sizes that divide the slots; where none does, the four largest up to 64 that do."""
    usual = [ep for ep in _EP_SIZES if n_slots % ep == 0]
    return usual or [ep for ep in range(2, 65) if n_slots % ep == 0][-4:]


def runs_load(runs: TokenRuns) -> FloatArray:
    """Share of tokens that go to each expert: (n_layers, n_experts), rows adding up to top_k."""
    label = np.zeros(runs.n_tokens, dtype=np.int64)
    return np.asarray(runs.counts_by(label, 1)[0] / runs.n_tokens)


def _tokens(source: RoutingSource, shape: RoutingShape, seed: int) -> tuple[RoutingTrace, TokenRuns | None]:
    """Trace behind the figures of single tokens: of a generator, one that is drawn from it."""
    if isinstance(source, SyntheticRouting):
        n, length = _GENERATED
        source = generate_trace(source, shape, n_sequences=n, sequence_length=length, seed=seed)
    return source, token_runs(source) if source.is_token_level else None


def _skew(source: RoutingSource, shape: RoutingShape, load: FloatArray, seed: int) -> dict[str, Any]:
    mean = load.mean(-1)
    figures = {"busiest_over_mean": load.max(-1) / mean, "gini": gini(load), "entropy": entropy(load)}
    layer_ids: Sequence[int] = range(shape.n_layers)
    if isinstance(source, RoutingTrace):
        layer_ids = [source.layer_ids[i] for i in layer_map(source, shape.n_layers)]
    layers = [
        {
            "layer": int(layer),
            "busiest_expert": int(load[i].argmax()),
            **{name: float(values[i]) for name, values in figures.items()},
            "load": [float(f"{v:.4g}") for v in load[i] / mean[i]],
        }
        for i, layer in enumerate(layer_ids)
    ]
    out: dict[str, Any] = {"layers": layers}
    for name, values in figures.items():
        low, mid, high = (float(v) for v in np.quantile(values, (0.0, 0.5, 1.0)))
        out[name] = {"min": low, "median": mid, "max": high}
    if isinstance(source, RoutingTrace):
        n_tokens = int(source.counts[0].sum()) // shape.top_k
        even = even_load(shape, n_tokens, seed=seed)
        busiest = even.max(-1) / np.maximum(even.mean(-1), 1e-300)
        out["even"] = {"busiest_over_mean": float(np.median(busiest)), "gini": float(np.median(gini(even)))}
    return out


def _domains(trace: RoutingTrace, runs: TokenRuns | None, seed: int) -> dict[str, Any] | None:
    if runs is None or trace.sequence_domains is None:
        return None
    return domain_specialisation(runs, trace.sequence_domains, trace.domains, seed=seed)


def _own_figures(out: Mapping[str, Any], load: FloatArray) -> dict[str, float]:
    """Those of `moesim.routing.known.COMPARED` that are known of this trace."""
    own = {key: float(out[key]["median"]) for key in ("busiest_over_mean", "gini", "entropy")}
    for ep in _KNOWN_EP_SIZES:
        if load.shape[-1] % ep == 0:
            ranks = evenness(contiguous(load.shape[-1], ep).rank_load(load))
            own |= {f"{name}_ep{ep}": value for name, value in ranks.items()}
    if out.get("locality") and out["locality"]["by_lag"]:
        own["shared_with_next_token"] = out["locality"]["shared_with_next_token"]
    return own | {"active_128": out["active_experts"]["128"]}


def _own_shape(source: RoutingSource) -> RoutingShape:
    if isinstance(source, SyntheticRouting):
        return RoutingShape(58, 256, 8)
    return RoutingShape(source.n_layers, source.n_experts, source.top_k or min(8, source.n_experts))


def _header(source: RoutingSource, shape: RoutingShape) -> dict[str, Any]:
    base = {"n_layers": shape.n_layers, "n_experts": shape.n_experts, "top_k": shape.top_k}
    if isinstance(source, SyntheticRouting):
        text = {"name": source.name, "synthetic": True, "source": source.provenance, "phase": source.phase}
        return {**text, **base, "notes": []}
    text = {"name": source.model, "synthetic": False, "source": source.source, "phase": source.phase}
    more: dict[str, Any] = {"licence": source.licence, "token_level": source.is_token_level}
    more["n_tokens"] = source.n_tokens or int(source.counts[0].sum()) // shape.top_k
    more["n_sequences"] = int(source.offsets.size - 1) if source.is_token_level else None
    return {**text, **base, **more, "notes": list(source.notes)}
