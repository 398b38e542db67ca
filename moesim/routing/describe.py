"""What a trace or a generator looks like: skew, balance, active experts, locality."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.routing.batches import RoutingSource, draw_batch, inclusion
from moesim.routing.placement import contiguous
from moesim.routing.synthetic import RoutingShape, SyntheticRouting
from moesim.routing.trace import RoutingTrace

__all__ = ["describe", "entropy", "gini"]

FloatArray = NDArray[np.float64]
_BATCHES = (1, 8, 32, 128, 512)
_EP_SIZES = (8, 16, 32, 64)
_PAIRS = 4000


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


def describe(source: RoutingSource, shape: RoutingShape | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Summarise routing in plain numbers.

    Parameters
    ----------
    source
        Trace or generator.
    shape
        Model to show a generator for, or a counts-only trace that does not state top_k (8 is assumed);
        a trace's own otherwise.
    seed
        Seed of the batches behind `active_experts`.

    Returns
    -------
    dict
        JSON-able. ``layers``: busiest over mean, Gini, entropy per layer. ``active_experts``: share of
        experts with a token, by batch size. ``balancedness``: mean over busiest rank, averaged over
        layers, by EP size, for contiguous placement of the ids as they are and permuted at random
        (where ids fall with load the two differ, and only the second says what placement must expect).
        ``locality``: shares of experts in common, token-level traces only.
    """
    shape = shape or _own_shape(source)
    load = np.asarray(inclusion(source, shape))
    busiest = load.max(-1) / load.mean(-1)
    out: dict[str, Any] = _header(source, shape)
    layer_ids = source.layer_ids if isinstance(source, RoutingTrace) else range(shape.n_layers)
    out["layers"] = [
        {"layer": int(i), "busiest_over_mean": float(b), "gini": float(g), "entropy": float(h)}
        for i, b, g, h in zip(layer_ids, busiest, gini(load), entropy(load), strict=False)
    ]
    for name, values in (("busiest_over_mean", busiest), ("gini", gini(load)), ("entropy", entropy(load))):
        low, mid, high = (float(v) for v in np.quantile(values, (0.0, 0.5, 1.0)))
        out[name] = {"min": low, "median": mid, "max": high}
    out["active_experts"] = _active(source, shape, seed)
    permuted = np.random.default_rng(seed).permuted(load, axis=-1)
    sizes = [ep for ep in _EP_SIZES if shape.n_experts % ep == 0]
    out["balancedness"] = {
        f"ep{ep}": {"as_is": _balancedness(load, ep), "permuted": _balancedness(permuted, ep)} for ep in sizes
    }
    if isinstance(source, RoutingTrace) and source.is_token_level:
        out["locality"] = _locality(source, seed)
    return out


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


def _active(source: RoutingSource, shape: RoutingShape, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    ids = draw_batch(source, shape, n_ranks=1, n_tokens=max(_BATCHES), phase="decode", rng=rng)
    shares = {}
    for n in _BATCHES:
        seen = np.zeros((shape.n_layers, shape.n_experts), dtype=bool)
        np.put_along_axis(seen, ids[:, 0, :n].reshape(shape.n_layers, -1).astype(np.int64), True, -1)
        shares[str(n)] = float(seen.mean())
    return shares


def _balancedness(load: FloatArray, ep: int) -> float:
    ranks = contiguous(load.shape[-1], ep).rank_load(load)
    return float((ranks.mean(-1) / ranks.max(-1)).mean())


def _locality(trace: RoutingTrace, seed: int) -> dict[str, float]:
    ids = trace.expert_ids
    if ids is None or trace.n_tokens < 2:
        return {}
    rng = np.random.default_rng(seed)
    offsets = trace.offsets
    one = np.sort(rng.integers(0, trace.n_tokens - 1, _PAIRS))
    request = np.searchsorted(offsets, one, side="right") - 1
    inside = one + 1 < offsets[request + 1]
    other = rng.integers(0, trace.n_tokens, _PAIRS)
    here = np.asarray(ids[one])
    follows = (here[inside][..., :, None] == np.asarray(ids[one[inside] + 1])[..., None, :]).any(-1)
    apart = (here[..., :, None] == np.asarray(ids[other])[..., None, :]).any(-1)
    return {
        "shared_with_next_token": float(follows.mean()) if inside.any() else 0.0,
        "shared_with_any_token": float(apart.mean()),
    }
