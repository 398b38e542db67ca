"""Fit a generator to any trace or count file: popularity, its place among the experts, locality, drift."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.routing.catalog import default_routing
from moesim.routing.fit_locality import fit_locality
from moesim.routing.load_curves import KNOTS, LoadCurve, block_peaks, curve_load, falling, hats, scores, table
from moesim.routing.synthetic import SyntheticRouting
from moesim.routing.trace import RoutingTrace

__all__ = ["fit_curves", "fit_generator", "skew_rows"]

FloatArray = NDArray[np.float64]
_LAYERS_PER_CURVE = 3.5
"""Of the few curves that stand for all layers of a model."""
_STIFFNESS = 0.005
"""Weight of a curve's bend against the experts' loads: decides only where no expert stands near a knot."""


def fit_generator(trace: RoutingTrace, *, per_layer: bool = False) -> SyntheticRouting:
    """Fit a generator to what a router did.

    Parameters
    ----------
    trace
        Token level or counts. Of counts, locality and layer dependence are those of `default`.
    per_layer
        Keep a curve for each layer, so that layer by layer the busiest expert comes out; else a few that
        stand for all layers, from the least to the most uneven.

    Returns
    -------
    SyntheticRouting
        Generates for any model; :func:`moesim.routing.write_generator` keeps it.
    """
    curves = fit_curves(trace.counts)
    if not per_layer:
        curves = skew_rows(curves, max(1, int(trace.n_layers / _LAYERS_PER_CURVE)), trace.n_experts)
    return SyntheticRouting(
        name=f"fitted to {trace.model}",
        phase=trace.phase,
        curves=curves,
        curve_order="depth" if per_layer else "skew",
        curve_experts=trace.n_experts,
        provenance=_provenance(trace),
        **_locality(trace),  # type: ignore[arg-type]
    )


def _provenance(trace: RoutingTrace) -> str:
    what = "popularity, locality, layer dependence, drift" if trace.is_token_level else "popularity"
    rest = "" if trace.is_token_level else "; the rest carried over from default.yaml"
    return f"{what}: {trace.model}, {trace.source}{rest}"


def _locality(trace: RoutingTrace) -> dict[str, float]:
    """Fitted where single tokens are known, else what `default` has."""
    if trace.is_token_level:
        return fit_locality(trace)
    base = default_routing()
    names = ("request_spread", "request_stray", "token_keep", "token_step", "layer_link")
    return {name: getattr(base, name) for name in names}


def fit_curves(counts: NDArray[np.integer] | FloatArray) -> tuple[LoadCurve, ...]:
    """One curve per layer, by least squares weighted with load ** 1.5: the busiest experts set the pace.

    Parameters
    ----------
    counts : (n_layers, n_experts)
        Tokens per expert.

    Notes
    -----
    Of a short trace, the spread that drawing tokens alone makes is taken out (its variance, as of independent
    tokens); requests that lean one way are not.
    """
    from scipy.optimize import nnls  # slow to import, and fitting alone needs it

    load = _without_noise(np.asarray(counts, dtype=np.float64))
    n_experts = load.shape[-1]
    # A curve is its lowest point, of either sign, and steps that are not negative.
    steps = np.tri(KNOTS.size)
    steps = np.concatenate([-steps[:, :1], steps], axis=1)
    to_load = hats(scores(n_experts)) @ steps
    bend = np.diff(steps, 2, axis=0) * _STIFFNESS * np.sqrt(n_experts)
    found = []
    for row, trend, peaks in zip(np.sort(load, axis=-1), _index_trends(load), block_peaks(load), strict=True):
        weight = row**0.75
        left = np.concatenate([to_load * weight[:, None], bend])
        right = np.concatenate([np.log(row) * weight, np.zeros(len(bend))])
        found.append(_curve(np.array([*(steps @ nnls(left, right)[0]), trend, *peaks])))
    return tuple(found)


def skew_rows(curves: tuple[LoadCurve, ...], n_rows: int, n_experts: int) -> tuple[LoadCurve, ...]:
    """Fewer curves that stand for all: layers ordered by their busiest expert, evenly spaced, least squares.

    Parameters
    ----------
    curves
        One per layer.
    n_rows
        Curves wanted; row i stands at the share i / (n_rows - 1) of the layers.
    n_experts
        Experts per layer.
    """
    n_layers, n_rows = len(curves), min(n_rows, len(curves))
    rows = table(curves)
    order = np.argsort(curve_load(rows[:, : KNOTS.size], n_experts)[:, -1], kind="stable")
    if n_rows == 1:
        return (_curve(rows.mean(0)),)
    at = (np.arange(n_layers) + 0.5) / n_layers * (n_rows - 1)
    weights = hats(at, np.arange(n_rows, dtype=np.float64))
    return tuple(_curve(row) for row in np.linalg.lstsq(weights, rows[order], rcond=None)[0])


def _index_trends(load: FloatArray) -> FloatArray:
    """Correlation of each layer's normal scores with the falling log of the index: (n_layers,)."""
    own = scores(load.shape[-1])[np.argsort(np.argsort(load, axis=-1, kind="stable"), axis=-1)]
    return np.asarray((own * falling(load.shape[-1])).mean(-1) / max(float(own.std()), 1e-12))


def _without_noise(counts: FloatArray) -> FloatArray:
    """Load over mean with the variance of drawing taken out, nothing at zero."""
    mean = np.maximum(counts.mean(-1, keepdims=True), 1e-300)
    load = np.maximum(counts, 0.25) / mean
    variance = np.maximum(load.var(-1, keepdims=True), 1e-300)
    kept = np.sqrt(np.clip(1.0 - 1.0 / mean / variance, 0.0, 1.0))
    load = np.maximum(1.0 + kept * (load - 1.0), 0.25 / mean)
    return np.asarray(load / load.mean(-1, keepdims=True))


def _curve(row: FloatArray) -> LoadCurve:
    """A row of a table as a curve, rounded."""
    n = KNOTS.size
    trend = float(np.clip(row[n], -1.0, 1.0))
    return LoadCurve(_plain(np.sort(row[:n])), round(trend, 4), _plain(np.maximum(row[n + 1 :], 1.0)))


def _plain(values: FloatArray) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)
