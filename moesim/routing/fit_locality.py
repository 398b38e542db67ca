"""Locality, layer dependence and drift of a trace, and the parameters of a generator that has them too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.banks import RUN, decode_bank, prefill_bank
from moesim.routing.batches import inclusion
from moesim.routing.sampling import systematic_draw
from moesim.routing.synthetic import RoutingShape, SyntheticRouting, spread_layers
from moesim.routing.trace import RoutingTrace

__all__ = ["Locality", "fit_locality", "layer_dependence", "measure_locality"]

FloatArray = NDArray[np.float64]
_STRAYS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
_LAYERS = 24
"""Layers that locality is fitted on, evenly spaced."""
_IN_A_ROW = 192
_MOST_SEQUENCES = 1024
_LARGEST_SPREAD = 0.5


@dataclass(frozen=True)
class Locality:
    """Share of experts that two tokens have in common, averaged over layers."""

    independent: float
    same_request: float
    consecutive: float
    two_apart: float


def measure_locality(ids: NDArray[Any], offsets: NDArray[np.int64], *, n_pairs: int = 12000) -> Locality:
    """Measure what tokens share: any two, two of one request, two in a row, two with one between.

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
    n = ids.shape[0]
    one, other = rng.integers(0, n, n_pairs), rng.integers(0, n, n_pairs)
    request = np.searchsorted(offsets, one, side="right") - 1
    length = np.diff(offsets)[request]
    mate = offsets[request] + (rng.random(n_pairs) * length).astype(np.int64)

    def behind(distance: int) -> float:
        first = one[one + distance < offsets[request + 1]]
        return _shared(ids[first], ids[first + distance]) if first.size else 0.0

    apart = mate != one
    return Locality(
        _shared(ids[one], ids[other]),
        _shared(ids[one[apart]], ids[mate[apart]]) if apart.any() else 0.0,
        behind(1),
        behind(2),
    )


def _shared(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Share of experts that tokens a and b (n, layers, top_k) have in common."""
    return float((a[..., :, None] == b[..., None, :]).any(-1).mean())


def fit_locality(trace: RoutingTrace) -> dict[str, float]:
    """Parameters that give a token-level trace's locality.

    Parameters
    ----------
    trace
        Token level; without sequences it is one.

    Returns
    -------
    dict
        `request_spread` from what two tokens of one request share; `token_keep` and `token_step` from two in a
        row and two with one between; `request_stray` from the active experts of 192 tokens in a row;
        `layer_link` from how far an expert moves the choice in the next layer; `drift_share` and
        `drift_sequences` from how alike sequences are that ran soon after each other.
    """
    ids, offsets = np.asarray(trace.expert_ids), trace.offsets
    shape = RoutingShape(min(_LAYERS, trace.n_layers), trace.n_experts, trace.top_k or 1)
    layers = spread_layers(trace.n_layers, shape.n_layers)
    p = np.asarray(inclusion(trace, RoutingShape(trace.n_layers, shape.n_experts, shape.top_k)))[layers]
    found = measure_locality(ids, offsets)
    common = _Common(p, shape)
    above = found.consecutive - found.same_request
    keep = float(np.clip((found.two_apart - found.same_request) / max(above, 1e-9), 0.0, 0.95))
    keep = keep if above > 0.01 else 0.0
    target = (_active(ids, offsets, layers, shape.n_experts), np.inf)
    best: dict[str, float] = {}
    for stray in _STRAYS:
        step, spread = 0.5, 0.1
        for _ in range(3):
            if keep:
                kept = min(found.same_request + above / keep, 0.98)
                step = _bisect(lambda v: -common.kept(v), -kept, 0.01, 20.0)
            spread = _bisect(
                partial(common.less_requested, stray, step), -found.same_request, 1e-3, _LARGEST_SPREAD
            )
        given = {"request_spread": spread, "request_stray": stray, "token_keep": keep, "token_step": step}
        if spread > 0.98 * _LARGEST_SPREAD:
            given = {**given, "request_spread": float("inf"), "request_stray": 0.0}
        gap = abs(_active_made(p, shape, given, trace) - target[0])
        if gap < target[1]:
            target, best = (target[0], gap), given
    best["layer_link"] = _fit_link(ids, layers, p, shape)
    best |= _fit_drift(trace, best, common)
    return {key: round(value, 4) for key, value in best.items()}


class _Common:
    """What two tokens of a generator share, by the distance of their starts."""

    def __init__(self, p: FloatArray, shape: RoutingShape, n_orders: int = 60) -> None:
        rng = np.random.default_rng(5)
        self.distance = np.concatenate([[0.0], np.geomspace(1e-4, 0.5, 47)])
        rows = np.repeat(p, n_orders, axis=0)
        u = np.mod(rng.random((len(rows), 1)) + self.distance, 1.0)
        ids = systematic_draw(rows, u, shape.top_k, rng)
        same = (ids[:, :1, :, None] == ids[:, :, None, :]).any(-1)
        self.share = same.mean(axis=(0, 2))
        self.unit = shape.top_k / shape.n_experts
        self.normal = rng.standard_normal(8192) * np.sqrt(2.0)
        self.steps = rng.laplace(size=8192) - rng.laplace(size=8192)
        self.anywhere = float(self._at(rng.random(8192)))

    def _at(self, distance: FloatArray) -> float:
        far = np.mod(np.abs(distance), 1.0)
        return float(np.interp(np.minimum(far, 1.0 - far), self.distance, self.share).mean())

    def kept(self, step: float) -> float:
        """Two tokens of one start, each with its own step."""
        return self._at(self.steps * step * self.unit)

    def less_requested(self, stray: float, step: float, spread: float) -> float:
        """Minus `requested`, which rises with the spread."""
        return -self.requested(spread, stray, step)

    def requested(self, spread: float, stray: float, step: float, gap: float = 0.0) -> float:
        """Any two tokens of a request, or of two whose centres are a gap apart."""
        near = self._at(gap + self.normal * spread + self.steps * step * self.unit)
        both = (1.0 - stray) ** 2
        return both * near + (1.0 - both) * self.anywhere


def _bisect(function: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Root of a rising function minus target, on a logarithmic scale."""
    for _ in range(16):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if function(middle) < target else (low, middle)
    return float(np.sqrt(low * high))


def _run(offsets: NDArray[np.int64]) -> int:
    """Tokens in a row that a fair share of the requests has."""
    return int(min(_IN_A_ROW, np.quantile(np.diff(offsets), 0.75)))


def _active(
    ids: NDArray[Any], offsets: NDArray[np.int64], layers: NDArray[np.int64], n_experts: int
) -> float:
    """Share of experts with a token, of runs of one request each."""
    run, rng = _run(offsets), np.random.default_rng(2)
    first = offsets[:-1][np.diff(offsets) >= run]
    room = np.diff(offsets)[np.diff(offsets) >= run] - run + 1
    chosen = rng.integers(0, first.size, 64)
    starts = first[chosen] + (rng.random(64) * room[chosen]).astype(np.int64)
    blocks = np.stack([np.asarray(ids[s : s + run][:, layers]) for s in starts])
    return _share_active(np.moveaxis(blocks, 1, 2), n_experts)


def _active_made(p: FloatArray, shape: RoutingShape, given: dict[str, float], trace: RoutingTrace) -> float:
    source = SyntheticRouting("fit", **given)  # type: ignore[arg-type]
    rng = np.random.default_rng(3)
    run = _run(trace.offsets)
    whole = -(-run // RUN) * RUN
    drawn = prefill_bank(p, shape, source, rng, n_sequences=64, sequence_length=whole)
    tokens = drawn.reshape(shape.top_k, shape.n_layers, 64, whole)[..., :run]
    return _share_active(tokens.transpose(2, 1, 3, 0), shape.n_experts)


def _share_active(ids: NDArray[Any], n_experts: int) -> float:
    """Of (n_runs, n_layers, run, top_k)."""
    seen = np.zeros((*ids.shape[:2], n_experts), dtype=bool)
    np.put_along_axis(seen, ids.reshape(*ids.shape[:2], -1).astype(np.int64), True, -1)
    return float(seen.mean())


def _fit_link(ids: NDArray[Any], layers: NDArray[np.int64], p: FloatArray, shape: RoutingShape) -> float:
    """Share of tokens to be linked: dependence on the next layer over that of a generator linked throughout."""
    if ids.shape[1] < 2:
        return 0.0
    most = min(32768, 2**22 // shape.n_experts)
    own = ids[:: max(1, ids.shape[0] // most)]
    source = replace(SyntheticRouting("fit"), layer_link=1.0)
    bank = decode_bank(p, shape, source, np.random.default_rng(1), n_tokens=own.shape[0])
    made = bank.transpose(2, 1, 0)[: own.shape[0]]
    strongest = layer_dependence(made, shape.n_experts)
    return float(np.clip(layer_dependence(own, shape.n_experts) / max(strongest, 1e-9), 0.0, 1.0))


def layer_dependence(ids: NDArray[Any], n_experts: int) -> float:
    """How far one expert of a token moves its choice in the next layer, as total variation in 0..1.

    Parameters
    ----------
    ids : (n_tokens, n_layers, top_k)
        Chosen experts.
    n_experts
        Experts per layer.

    Notes
    -----
    What as many tokens show of layers that know nothing of each other is taken off.
    """
    pairs = range(0, ids.shape[1] - 1, max(1, ids.shape[1] // 8))
    other = np.random.default_rng(4).permutation(ids.shape[0])
    moved = [
        _moved(ids[:, layer], ids[:, layer + 1], n_experts) - _moved(ids[:, layer], ids[other, layer + 1], n_experts)
        for layer in pairs
    ]  # fmt: skip
    return float(np.mean(moved))


def _moved(one: NDArray[Any], other: NDArray[Any], n_experts: int) -> float:
    chosen = np.zeros((2, one.shape[0], n_experts), dtype=np.float32)
    for side, ids in enumerate((one, other)):
        np.put_along_axis(chosen[side], ids.astype(np.int64), 1.0, -1)
    load = chosen[0].sum(0)
    given = chosen[0].T @ chosen[1] / np.maximum(load, 1.0)[:, None]
    gap = np.abs(given - chosen[1].mean(0)).sum(-1) / (2 * one.shape[1])
    return float((gap * load).sum() / load.sum())


def _fit_drift(trace: RoutingTrace, local: Mapping[str, float], common: _Common) -> dict[str, float]:
    """How much of what requests prefer changes slowly from one to the next.

    From the covariance between what two sequences leave over from the popularity, over the variance of one's, by
    their distance. 0 where it does not stand out from that of distant ones. Linked requests alone drift: what is
    beyond their share is lost.
    """
    none = {"drift_share": 0.0, "drift_sequences": 16.0}
    halves, stride = _loads_in_time(trace)
    n_steps = halves.shape[1]
    if n_steps < 32 or not local["layer_link"] or np.isinf(local["request_spread"]):
        return none
    p = np.clip(halves.mean((0, 1)), 1e-6, 1.0 - 1e-6)
    left = ((halves - p) / np.sqrt(p * (1.0 - p))).reshape(2, n_steps, -1)
    own = float((left[0] * left[1]).mean())
    both = left.mean(0)
    product = both @ both.T / both.shape[1]
    lags = np.arange(1, n_steps // 2)
    covariance = np.array([np.diagonal(product, lag).mean() for lag in lags])
    seen = covariance / max(own, 1e-12) / local["layer_link"] ** 2
    noise = float(np.sqrt((seen[lags > n_steps // 4] ** 2).mean()))
    near = lags <= n_steps // 4
    best = (float((seen[near] ** 2).sum()), 0.0, 16.0)
    tried, alike = _alike(local, common)
    for decay in np.geomspace(1.0, n_steps / 2, 40):
        for share in tried[1:]:
            made = np.interp(share * np.exp(-lags[near] / decay), tried, alike)
            best = min(best, (float(((seen[near] - made) ** 2).sum()), float(share), float(decay)))
    if own <= 0 or float(np.interp(best[1], tried, alike)) <= 2.0 * noise:
        return none
    return {"drift_share": best[1], "drift_sequences": best[2] * stride}


def _alike(local: Mapping[str, float], common: _Common) -> tuple[FloatArray, FloatArray]:
    """How alike requests are (1: the same) whose centres are ranks of normal values of a correlation."""
    from scipy.special import ndtr  # slow to import, and fitting alone needs it

    one, other = np.random.default_rng(6).standard_normal((2, 20000))
    gaps = np.linspace(0.0, 0.5, 33)
    spread, step = local["request_spread"], local["token_step"]
    shared = np.array([common.requested(spread, 0.0, step, gap=float(gap)) for gap in gaps])
    by_gap = (shared - common.anywhere) / (shared[0] - common.anywhere)
    tried = np.linspace(0.0, 1.0, 41)
    found = []
    for share in tried:
        gap = np.abs(ndtr(one) - ndtr(share * one + np.sqrt(1.0 - share**2) * other))
        found.append(float(np.interp(np.minimum(gap, 1.0 - gap), gaps, by_gap).mean()))
    return tried, np.maximum.accumulate(found)


def _loads_in_time(trace: RoutingTrace) -> tuple[FloatArray, int]:
    """Share of every other token of each sequence to each expert, (2, n_steps, n_layers, n_experts), and the stride."""
    ids, offsets = trace.expert_ids, trace.offsets
    if ids is None or offsets.size < 3:
        return np.empty((2, 0, 1, 1)), 1
    stride = -(-(offsets.size - 1) // _MOST_SEQUENCES)
    base = np.arange(trace.n_layers)[:, None] * trace.n_experts
    size = trace.n_layers * trace.n_experts
    found = np.zeros((2, -(-(offsets.size - 1) // stride), trace.n_layers, trace.n_experts))
    for at, (first, end) in enumerate(zip(offsets[:-1][::stride], offsets[1:][::stride], strict=True)):
        tokens = np.asarray(ids[first : end : max(1, (end - first) // 128)], dtype=np.int64) + base
        for half in range(2):
            mine = tokens[half % len(tokens) :: 2]
            counts = np.bincount(mine.ravel(), minlength=size) / len(mine)
            found[half, at] = counts.reshape(trace.n_layers, -1)
    return found, stride
