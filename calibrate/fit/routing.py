"""Fit the generators of the catalog to real routing and write them.

Run as ``python -m calibrate.fit.routing --data ../shared/data/routing``. Figures go into the catalog, never
the data. Fits are those of :func:`moesim.routing.fit_generator`; what is added here is several files in one
generator, whose locality is used where, and the quality that stands in each file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing import (
    RoutingShape,
    RoutingSource,
    RoutingTrace,
    SyntheticRouting,
    contiguous,
    eplb,
    fit_generator,
    generate_trace,
    popularity,
    read_npz,
    read_sglang_counts,
    write_generator,
)
from moesim.routing.batches import draw_batch
from moesim.routing.describe import gini
from moesim.routing.fit_generator import fit_curves, skew_rows
from moesim.routing.fit_locality import layer_dependence, measure_locality
from moesim.routing.load_curves import LoadCurve

__all__ = ["batch_figures", "catalog_generators", "load_figures"]

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
OSS_SHAPE = RoutingShape(24, 32, 4)
N_CURVES = 16
"""Curves of a catalog entry, from the least to the most uneven layer."""
_LOCALITY = ("request_spread", "request_stray", "token_keep", "token_step", "layer_link")
_DEEPSEEK_DATA = "attachment of sglang issue 6017 as kept in GeneratedRandomly/SGLang-reproduce @c79682c"
_OSS_DATA = (
    "gpt-oss-20b decode, 352 sequences (AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting @72b368f, Apache-2.0)"
)


def load_figures(load: FloatArray) -> dict[str, float]:
    """What a layout feels of a load (n_layers, n_experts), mean over layers; Gini and busiest expert: median.

    Busiest rank over mean is given for contiguous experts as numbered, for experts renamed at random, and for EPLB.
    """
    load = load / load.mean(-1, keepdims=True)
    figures = {"busiest_over_mean": float(np.median(load.max(-1))), "gini": float(np.median(gini(load)))}
    rng = np.random.default_rng(0)
    renamed = np.concatenate([rng.permuted(load, axis=-1) for _ in range(4)])
    n = load.shape[-1]
    for ep in (8, 16, 32, 64):
        if n % ep == 0:
            for name, given in (("", load), ("_renamed", renamed)):
                ranks = contiguous(n, ep).rank_load(given)
                figures[f"ep{ep}{name}"] = float((ranks.max(-1) / ranks.mean(-1)).mean())
    if n == 256:
        ranks = eplb(load, n_slots=288, n_ranks=32).rank_load(load)
        figures["ep32_eplb"] = float((ranks.max(-1) / ranks.mean(-1)).mean())
    return figures


def _quality(real: FloatArray, source: SyntheticRouting, shape: RoutingShape) -> dict[str, Any]:
    """Figures of real load beside the mean over 5 generated ones."""
    figures = load_figures(real)
    made = [load_figures(popularity(replace(source, seed=100 + seed), shape)) for seed in range(5)]
    return {
        key: {"real": round(value, 3), "generated": round(float(np.mean([m[key] for m in made])), 3)}
        for key, value in figures.items()
    }


def batch_figures(source: RoutingSource, shape: RoutingShape, n_tokens: int, phase: Any) -> dict[str, float]:
    """Busiest expert over mean, and share of experts with a token, of one rank's batch."""
    rng = np.random.default_rng(3)
    ids = draw_batch(source, shape, n_ranks=60, n_tokens=n_tokens, phase=phase, rng=rng)
    counts = np.eye(shape.n_experts, dtype=np.int32)[ids].sum((2, 3))
    return {
        "busiest_over_mean": float((counts.max(-1) / counts.mean(-1)).mean()),
        "active": float((counts > 0).mean()),
    }


def _locality_quality(trace: RoutingTrace, source: SyntheticRouting) -> dict[str, Any]:
    """Locality of a trace beside that of one generated from it; drift as likeness of sequences a distance apart."""
    length = int(np.diff(trace.offsets).mean())
    made = generate_trace(source, OSS_SHAPE, n_sequences=352, sequence_length=length)
    both = {"real": trace, "generated": made}
    found: dict[str, Any] = {}
    for name, one in both.items():
        ids = np.asarray(one.expert_ids)
        shares = vars(measure_locality(ids, one.offsets))
        shares["layer_dependence"] = layer_dependence(ids, one.n_experts)
        for key, value in shares.items():
            key = key if key == "layer_dependence" else f"shared_{key}"
            found.setdefault(key, {})[name] = round(float(value), 3)
    sources: dict[str, RoutingSource] = {"real": trace, "generated": source}
    for phase in ("decode", "prefill"):
        for n_tokens in (16, 64, 256):
            for name, drawn in sources.items():
                figures = batch_figures(drawn, OSS_SHAPE, n_tokens, phase)
                rounded = {key: round(value, 3) for key, value in figures.items()}
                found.setdefault(f"{phase}_batch_{n_tokens}", {})[name] = rounded
    return found


def _few(curves: Sequence[LoadCurve], n_experts: int) -> tuple[LoadCurve, ...]:
    return skew_rows(tuple(curves), N_CURVES, n_experts)


def catalog_generators(data: Path) -> list[tuple[SyntheticRouting, dict[str, Any]]]:
    """Every fitted generator of the catalog and its quality.

    Parameters
    ----------
    data
        Folder of `deepseek_v3_sglang` and `gpt_oss_20b`.
    """
    oss = read_npz(data / "gpt_oss_20b" / "tokens.npz", model="gpt-oss-20b", n_experts=32)
    fitted = replace(
        fit_generator(oss),
        name="gpt-oss-20b-decode",
        phase="decode",
        provenance=f"popularity, locality, layer dependence, drift: {_OSS_DATA}",
    )
    load = oss.counts.astype(np.float64)
    found = [(fitted, {**_quality(load, fitted, OSS_SHAPE), **_locality_quality(oss, fitted)})]
    local = {key: getattr(fitted, key) for key in _LOCALITY}
    pooled = list(fit_curves(oss.counts))
    for name, files in DEEPSEEK_FILES.items():
        traces = [
            read_sglang_counts(data / "deepseek_v3_sglang" / file, model="deepseek-v3", top_k=8)
            for file in files
        ]
        found.append(_deepseek(name, files, traces, local))
        pooled += [curve for trace in traces for curve in fit_curves(trace.counts)]
    # Numbers of blocks depend on the model, and other models' experts need not fall with their index.
    curves = _few([LoadCurve(curve.log_load) for curve in pooled], DEEPSEEK_SHAPE.n_experts)
    default = SyntheticRouting(
        "default",
        curves=curves,
        keep_index=False,
        **local,
        provenance="popularity: all layers of the seven files behind the other fitted entries; locality and layer "
        f"dependence: {_OSS_DATA}; no place among the experts is kept",
    )
    found.append(
        (default, {"of_deepseek_v3_size": load_figures_rounded(popularity(default, DEEPSEEK_SHAPE))})
    )
    return found


def load_figures_rounded(load: FloatArray) -> dict[str, float]:
    """As `load_figures`, for a file."""
    return {key: round(value, 3) for key, value in load_figures(load).items()}


def _deepseek(
    name: str, files: Sequence[str], traces: Sequence[RoutingTrace], local: dict[str, float]
) -> tuple[SyntheticRouting, dict[str, Any]]:
    """One generator for several count files, and its quality in sample and on the layers left out."""
    loads = [trace.counts / trace.counts.mean(-1, keepdims=True) for trace in traces]
    curves = [fit_curves(trace.counts) for trace in traces]
    source = SyntheticRouting(
        name,
        phase=name.rsplit("-", 1)[1],
        curves=_few([curve for one in curves for curve in one], 256),
        curve_experts=256,
        **local,  # type: ignore[arg-type]
        provenance=f"popularity: DeepSeek-V3 logical_count {', '.join(files)} ({_DEEPSEEK_DATA}); locality and layer "
        f"dependence: {_OSS_DATA}; that these carry over to DeepSeek-V3 is assumed",
    )
    quality = _quality(np.concatenate(loads), source, DEEPSEEK_SHAPE)
    half = replace(source, curves=_few([curve for one in curves for curve in one[1::2]], 256))
    even = np.concatenate([load[0::2] for load in loads])
    odd = load_figures_rounded(np.concatenate([load[1::2] for load in loads]))
    held_out = _quality(even, half, DEEPSEEK_SHAPE)
    quality["held_out_layers"] = {
        key: {**pair, "real_other_half": odd[key]} for key, pair in held_out.items()
    }
    return source, quality


def main() -> None:
    """Fit everything and write the catalog files."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("moesim/catalog/routing"))
    options = parser.parse_args()
    for generator, quality in catalog_generators(options.data):
        write_generator(generator, options.out / f"{generator.name}.yaml", quality=quality)


if __name__ == "__main__":
    main()
