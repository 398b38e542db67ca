"""Fit the parameters of synthetic routing to traces and write the generators of the catalog.

Run as ``python -m calibrate.fit.routing --data ../shared/data/routing``. Figures go into the catalog, never
the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ruamel.yaml import YAML
from scipy.special import erfinv

from moesim.errors import TraceError
from moesim.routing import (
    Phase,
    RoutingShape,
    RoutingTrace,
    SyntheticRouting,
    contiguous,
    draw_batch,
    eplb,
    inclusion,
    popularity,
    read_npz,
    read_sglang_counts,
)
from moesim.routing.describe import gini
from moesim.routing.synthetic import decode_bank, prefill_bank

__all__ = ["Locality", "fit_locality", "fit_skew", "measure_locality", "skew_figures"]

FloatArray = NDArray[np.float64]
DEEPSEEK_FILES = {
    "deepseek-v3-decode": ("decode_in1000out1000.json", "decode_in1800out100.json"),
    "deepseek-v3-prefill": (
        "prefill_in512.json",
        "prefill_in1024.json",
        "prefill_in4096.json",
        "prefill_in500out1500.json",
    ),
}
DEEPSEEK_SHAPE = RoutingShape(58, 256, 8, 8, 4)


@dataclass(frozen=True)
class Locality:
    """Share of experts that two tokens have in common, averaged over layers."""

    independent: float
    same_request: float
    consecutive: float


def fit_skew(counts: FloatArray, shape: RoutingShape) -> dict[str, Any]:
    """Spread, its spread over layers, and lopsidedness of log popularity.

    Parameters
    ----------
    counts : (n_layers, n_experts)
        Tokens per expert.
    shape
        Its experts and top_k are used.

    Returns
    -------
    dict
        `log_sigma` and `log_skew`, which reproduce the medians over layers of the Gini coefficient and of
        busiest over mean; `log_sigma_spread`, from how the Gini coefficients of layers scatter (a
        log-normal's is erf(sigma / 2)).
    """
    spread = float(np.log(2.0 * erfinv(gini(counts))).std())
    load = counts / counts.sum(-1, keepdims=True)
    target_gini = float(np.median(gini(load)))
    target_busiest = float(np.median(load.max(-1))) * shape.n_experts
    many = replace(shape, n_layers=200)

    def made(sigma: float, skew: float) -> FloatArray:
        source = SyntheticRouting("fit", log_sigma=sigma, log_sigma_spread=spread, log_skew=skew)
        return popularity(source, many)

    def made_gini(skew: float, sigma: float) -> float:
        return float(np.median(gini(made(sigma, skew))))

    best = (np.inf, 0.0, 0.0)
    for skew in np.linspace(-0.28, 0.28, 15):
        sigma = _bisect(partial(made_gini, float(skew)), target_gini, 0.05, 5.0)
        p = made(sigma, float(skew))
        busiest = float(np.median(p.max(-1) / p.mean(-1)))
        best = min(best, (abs(np.log(busiest / target_busiest)), sigma, float(skew)))
    return {"log_sigma": best[1], "log_sigma_spread": spread, "log_skew": best[2]}


def skew_figures(counts: FloatArray) -> dict[str, float]:
    """Median over layers of what a layout feels: busiest over mean, Gini, imbalance at EP8 and EP32."""
    load = counts / counts.sum(-1, keepdims=True) * counts.shape[-1]
    figures = {"busiest_over_mean": float(np.median(load.max(-1))), "gini": float(np.median(gini(load)))}
    rng = np.random.default_rng(0)
    shuffled = rng.permuted(load, axis=-1)
    for ep in (8, 32):
        if counts.shape[-1] % ep == 0:
            ranks = contiguous(counts.shape[-1], ep).rank_load(shuffled)
            figures[f"ep{ep}_busiest_over_mean"] = float((ranks.max(-1) / ranks.mean(-1)).mean())
    if counts.shape[-1] == 256:
        ranks = eplb(shuffled, n_slots=288, n_ranks=32).rank_load(shuffled)
        figures["eplb32_busiest_over_mean"] = float((ranks.max(-1) / ranks.mean(-1)).mean())
    return figures


def _shared(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Share of experts that tokens a and b (n, layers, top_k) have in common."""
    return float((a[..., :, None] == b[..., None, :]).any(-1).mean())


def measure_locality(ids: NDArray[Any], offsets: NDArray[np.int64], *, n_pairs: int = 12000) -> Locality:
    """Measure what tokens share: any two, two of one request, two in a row.

    Parameters
    ----------
    ids : (n_tokens, n_layers, top_k)
        Chosen experts.
    offsets : (n_sequences + 1,)
        Bounds of requests.
    n_pairs
        Pairs looked at for each figure.
    """
    rng = np.random.default_rng(0)
    lengths = np.diff(offsets)
    request = np.repeat(np.arange(lengths.size), lengths)
    one = rng.integers(0, ids.shape[0], n_pairs)
    other = rng.integers(0, ids.shape[0], n_pairs)
    mate = offsets[request[one]] + (rng.random(n_pairs) * lengths[request[one]]).astype(np.int64)
    apart = mate != one
    first = one[one < ids.shape[0] - 1]
    first = first[request[first] == request[first + 1]]
    return Locality(
        _shared(ids[one], ids[other]),
        _shared(ids[one[apart]], ids[mate[apart]]),
        _shared(ids[first], ids[first + 1]),
    )


def _bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Root of a rising function minus target, on a logarithmic scale."""
    for _ in range(12):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return float(np.sqrt(low * high))


def generated_ids(
    p: FloatArray, shape: RoutingShape, source: SyntheticRouting, n: int = 48, length: int = 192
) -> NDArray[Any]:
    """Tokens of `n` generated requests: (n * length, n_layers, top_k)."""
    rng = np.random.default_rng(1)
    bank = prefill_bank(p, shape, source, rng, n_sequences=n, sequence_length=length)
    return np.ascontiguousarray(bank.transpose(2, 1, 0))


def decode_ids(p: FloatArray, shape: RoutingShape, source: SyntheticRouting) -> NDArray[Any]:
    """Tokens of 32768 different generated requests: (32768, n_layers, top_k)."""
    bank = decode_bank(p, shape, source, np.random.default_rng(1), n_tokens=32768)
    return np.ascontiguousarray(bank.transpose(2, 1, 0))


def fit_locality(trace: RoutingTrace) -> dict[str, Any]:
    """Request preference and token step that give a trace's shared experts.

    Parameters
    ----------
    trace
        Token level, with sequences.

    Returns
    -------
    dict
        `request_sigma` matches what two tokens of one request share, `token_step` what two in a row
        share, `request_skew` the active experts of 192 tokens in a row, `layer_link` how far an expert
        moves the choice in the next layer.
    """
    shape = RoutingShape(trace.n_layers, trace.n_experts, trace.top_k or 1)
    p = np.asarray(inclusion(trace, shape))
    ids = trace.expert_ids
    if ids is None:
        raise TraceError("locality is fitted on token-level traces", value=trace.source)
    target = measure_locality(ids, trace.offsets)
    active = batch_figures(trace, None, 192)["prefill"]["real_active"]
    best = (np.inf, SyntheticRouting("fit"))
    for skew in (0.0, -0.1, -0.2, -0.25, -0.3):
        source = replace(SyntheticRouting.uniform(), kind="fitted", request_skew=skew)
        share = partial(_share_made, p, shape, source, "same_request", "request_sigma")
        source = replace(source, request_sigma=_bisect(share, target.same_request, 0.05, 4.0))
        share = partial(_share_made, p, shape, source, "consecutive", "token_step")
        # A longer step shares less, so the search runs over its inverse.
        step = 1.0 / _bisect(lambda v, f=share: f(1.0 / v), target.consecutive, 0.02, 50.0)  # type: ignore[misc]
        source = replace(source, token_step=step)
        gap = abs(batch_figures(trace, source, 192)["prefill"]["generated_active"] - active)
        if gap < best[0]:
            best = (gap, source)
    fitted = {key: float(getattr(best[1], key)) for key in ("request_sigma", "request_skew", "token_step")}
    linked = replace(best[1], layer_link=1.0)
    strongest = layer_dependence(decode_ids(p, shape, linked), trace.n_experts)
    return {**fitted, "layer_link": layer_dependence(ids, trace.n_experts) / strongest}


def _share_made(
    p: FloatArray, shape: RoutingShape, source: SyntheticRouting, share: str, figure: str, value: float
) -> float:
    """Share of experts in common that a generator gives with one of its figures set to `value`."""
    changed: dict[str, Any] = {figure: value}
    made = generated_ids(p, shape, replace(source, **changed))
    return float(getattr(measure_locality(made, np.arange(0, made.shape[0] + 1, 192)), share))


def layer_dependence(ids: NDArray[Any], n_experts: int) -> float:
    """How far one expert of a token moves its choice in the next layer, as total variation in 0..1.

    Parameters
    ----------
    ids : (n_tokens, n_layers, top_k)
        Chosen experts.
    n_experts
        Experts per layer.
    """
    moved = []
    chosen = np.zeros((2, ids.shape[0], n_experts), dtype=np.float32)
    for layer in range(0, ids.shape[1] - 1, 3):
        chosen[:] = 0
        for side in (0, 1):
            np.put_along_axis(chosen[side], ids[:, layer + side].astype(np.int64), 1.0, -1)
        load = chosen[0].sum(0)
        given = chosen[0].T @ chosen[1] / np.maximum(load, 1.0)[:, None]
        gap = np.abs(given - chosen[1].mean(0)).sum(-1) / (2 * ids.shape[2])
        moved.append(float((gap * load).sum() / load.sum()))
    return float(np.mean(moved))


def _quality(counts: FloatArray, source: SyntheticRouting, shape: RoutingShape) -> dict[str, Any]:
    """Real figures against the mean over 5 generated popularities."""
    real = skew_figures(counts)
    made = [skew_figures(popularity(replace(source, seed=100 + s), shape)) for s in range(5)]
    return {
        k: {"real": round(v, 3), "generated": round(float(np.mean([m[k] for m in made])), 3)}
        for k, v in real.items()
    }


def batch_figures(
    trace: RoutingTrace, source: SyntheticRouting | None, n_tokens: int
) -> dict[str, dict[str, float]]:
    """Busiest over mean and active experts of one rank's batch, real and generated, for both phases.

    The generator gets the trace's popularity, so that the difference is locality alone.
    """
    shape = RoutingShape(trace.n_layers, trace.n_experts, trace.top_k or 1)
    p = np.asarray(inclusion(trace, shape))
    out: dict[str, dict[str, float]] = {}
    sources = {"real": trace}
    if source is not None:
        made = generated_ids(p, shape, source)
        bounds = np.arange(0, made.shape[0] + 1, 192)
        sources["generated"] = replace(trace, expert_ids=made, expert_weights=None, sequence_offsets=bounds)
    phases: tuple[Phase, ...] = ("decode", "prefill")
    for phase in phases:
        for name, ids_of in sources.items():
            rng = np.random.default_rng(3)
            ids = draw_batch(ids_of, shape, n_ranks=60, n_tokens=n_tokens, phase=phase, rng=rng)
            eye = np.eye(trace.n_experts, dtype=np.int32)
            counts = eye[ids].sum((2, 3))
            entry = out.setdefault(phase, {})
            entry[f"{name}_busiest"] = float((counts.max(-1) / counts.mean(-1)).mean())
            entry[f"{name}_active"] = float((counts > 0).mean())
    return out


def _write(
    path: Path, source: SyntheticRouting, data: str, quality: dict[str, Any], meaning: dict[str, str]
) -> None:
    body = {
        "name": source.name,
        "kind": source.kind,
        "phase": source.phase,
        "synthetic": True,
        "parameters": {
            key: {"value": round(float(getattr(source, key)), 4), "meaning": text}
            for key, text in meaning.items()
        },
        "provenance": {"kind": "fitted", "data": data},
        "quality": quality,
    }
    yaml = YAML()
    yaml.width = 110
    with path.open("w", encoding="utf-8") as stream:
        stream.write(
            "# Synthetic routing. Written by calibrate/fit/routing.py: figures fitted to the data, not the data.\n"
        )
        yaml.dump(body, stream)


MEANING = {
    "log_sigma": "standard deviation of log popularity over the experts of a layer, median over layers",
    "log_sigma_spread": "standard deviation over layers of log(log_sigma)",
    "log_skew": "weight of a quadratic term in log popularity; above 0 a heavier upper tail than log-normal",
    "request_skew": "the same for a request's preferences",
    "request_sigma": "standard deviation of one request's log preference for an expert",
    "layer_link": "share of tokens whose choices in all layers hang together",
    "token_step": "scale of the Laplace step between consecutive tokens, in units of top_k / n_experts",
}


def main() -> None:
    """Fit everything and write the catalog files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("moesim/catalog/routing"))
    options = parser.parse_args()
    oss = read_npz(options.data / "gpt_oss_20b" / "tokens.npz", model="gpt-oss-20b", n_experts=32)
    local = fit_locality(oss)
    locality_data = (
        "locality: gpt-oss-20b decode, 352 sequences (AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting @72b368f, "
        "Apache-2.0)"
    )
    oss_counts = oss.counts.astype(np.float64)
    oss_shape = RoutingShape(24, 32, 4)
    skews = [fit_skew(oss_counts, oss_shape)]
    source = SyntheticRouting("gpt-oss-20b-decode", phase="decode", **skews[0], **local)
    quality = _quality(oss_counts, source, oss_shape)
    for n in (16, 64, 256):
        for phase, figures in batch_figures(oss, source, n).items():
            quality[f"{phase}_batch_{n}"] = {k: round(v, 3) for k, v in figures.items()}
    real = measure_locality(np.asarray(oss.expert_ids), oss.offsets)
    made = measure_locality(
        generated_ids(np.asarray(inclusion(oss, oss_shape)), oss_shape, source),
        np.arange(0, 48 * 192 + 1, 192),
    )
    for key in ("independent", "same_request", "consecutive"):
        quality[f"shared_{key}"] = {
            "real": round(getattr(real, key), 3),
            "generated": round(getattr(made, key), 3),
        }
    p = np.asarray(inclusion(oss, oss_shape))
    quality["layer_dependence"] = {
        "real": round(layer_dependence(np.asarray(oss.expert_ids), 32), 3),
        "generated_decode": round(layer_dependence(decode_ids(p, oss_shape, source), 32), 3),
        "generated_prefill": round(layer_dependence(generated_ids(p, oss_shape, source, n=200), 32), 3),
    }
    _write(options.out / "gpt-oss-20b-decode.yaml", source, f"skew and {locality_data}", quality, MEANING)
    for name, files in DEEPSEEK_FILES.items():
        every = []
        for file in files:
            trace = read_sglang_counts(
                options.data / "deepseek_v3_sglang" / file, model="deepseek-v3", top_k=8
            )
            every.append(trace.counts / trace.counts.sum(-1, keepdims=True))
        counts = np.concatenate(every)
        skews += [fit_skew(c, DEEPSEEK_SHAPE) for c in every]
        phase = name.rsplit("-", 1)[1]
        source = SyntheticRouting(name, phase=phase, **fit_skew(counts, DEEPSEEK_SHAPE), **local)
        quality = _quality(counts, source, DEEPSEEK_SHAPE)
        held = replace(source, **fit_skew(counts[1::2], DEEPSEEK_SHAPE))
        quality["held_out_layers"] = _quality(counts[0::2], held, DEEPSEEK_SHAPE)
        data = (
            f"skew: DeepSeek-V3 logical_count {', '.join(files)} (attachment of sglang issue 6017 as kept in "
            f"GeneratedRandomly/SGLang-reproduce @c79682c); {locality_data}; that locality carries over to "
            "DeepSeek-V3 is assumed"
        )
        _write(options.out / f"{name}.yaml", source, data, quality, MEANING)
    middle: dict[str, Any] = {key: float(np.median([s[key] for s in skews])) for key in skews[0]}
    source = SyntheticRouting("default", **middle, **local)
    data = f"skew: median over the seven files behind the other catalog entries; {locality_data}"
    quality = {f"{key}_by_file": [round(s[key], 3) for s in skews] for key in middle}
    _write(options.out / "default.yaml", source, data, quality, MEANING)


if __name__ == "__main__":
    main()
