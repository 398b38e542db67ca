"""How popularity moves from one part of a trace to another: over time, and between domains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.mapped import blocks
from moesim.routing.runs import TokenRuns
from moesim.routing.trace import RoutingTrace

__all__ = ["domain_specialisation", "drift", "jensen_shannon", "total_variation"]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]
Counter = Callable[[IndexArray, int], IndexArray]

_WINDOWS = 24
_UNITS_A_WINDOW = 4
_CHUNK_TOKENS = 64
"""Units of a trace that is one sequence: tokens in a row, since tokens one by one are not independent."""
_SHUFFLES = 2


def total_variation(p: FloatArray, q: FloatArray) -> FloatArray:
    """Half the sum of |p - q| over the last axis: 0 alike, 1 nothing in common."""
    return np.asarray(np.abs(p - q).sum(-1) / 2.0)


def jensen_shannon(p: FloatArray, q: FloatArray) -> FloatArray:
    """Jensen-Shannon distance over the last axis, root of the divergence in bits: 0 alike, 1 disjoint.

    References
    ----------
    J. Lin, "Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991).
    """
    mean = (p + q) / 2.0
    bits = _entropy_bits(mean) - (_entropy_bits(p) + _entropy_bits(q)) / 2.0
    return np.asarray(np.sqrt(np.maximum(bits, 0.0)))


def _entropy_bits(p: FloatArray) -> FloatArray:
    return np.asarray(-(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1))


def _shares(counts: NDArray[Any]) -> FloatArray:
    return np.asarray(counts / np.maximum(counts.sum(-1, keepdims=True), 1))


def drift(trace: RoutingTrace, runs: TokenRuns | None, *, seed: int = 0) -> dict[str, Any] | None:
    """Distance of popularity between windows of a trace against how far apart they are.

    Parameters
    ----------
    trace
        Token level, or counts of several steps.
    runs
        Its tokens, where it has single ones.
    seed
        Seed of the shuffles behind the noise.

    Returns
    -------
    dict or None
        ``n_windows``, ``unit`` (what windows are made of), ``units_per_window``, ``tokens_per_window``,
        ``total_variation`` and ``jensen_shannon`` by lag in windows, means over layers and windows, and
        ``noise``, both with the units shuffled over the windows: what windows of that size differ by where
        nothing drifts. None where there are fewer than eight units.
    """
    units = _units(trace, runs)
    if units is None:
        return None
    unit, weights, counter = units
    n_windows = min(_WINDOWS, weights.size // _UNITS_A_WINDOW)
    if n_windows < 2:
        return None
    # Windows of about as many tokens each, cut between units.
    middle = np.cumsum(weights) - weights / 2.0
    window = np.minimum((middle * (n_windows / weights.sum())).astype(np.int64), n_windows - 1)
    moved = _by_lag(counter(window, n_windows))
    rng = np.random.default_rng(seed)
    shuffles = [_by_lag(counter(rng.permutation(window), n_windows)) for _ in range(_SHUFFLES)]
    noise = np.mean([[_mean_pair(d, n_windows) for d in one] for one in shuffles], axis=0)
    return {
        "n_windows": n_windows,
        "unit": unit,
        "units_per_window": weights.size / n_windows,
        "tokens_per_window": float(weights.sum() / n_windows),
        "total_variation": {str(lag + 1): float(v) for lag, v in enumerate(moved[0])},
        "jensen_shannon": {str(lag + 1): float(v) for lag, v in enumerate(moved[1])},
        "noise": {"total_variation": float(noise[0]), "jensen_shannon": float(noise[1])},
    }


def _units(trace: RoutingTrace, runs: TokenRuns | None) -> tuple[str, FloatArray, Counter] | None:
    """What stays together when windows are shuffled: name, tokens of each, and how to count by label."""
    if runs is not None:
        of_token, unit = runs.run_of, "sequence"
        if runs.n_runs < 2 * _UNITS_A_WINDOW:
            of_token, unit = np.arange(runs.n_tokens) // _CHUNK_TOKENS, f"{_CHUNK_TOKENS} tokens in a row"
        weights = np.bincount(of_token).astype(np.float64)
        return unit, weights, lambda label, n: runs.counts_by(label[of_token], n)
    steps = trace.expert_counts
    if steps is None or steps.shape[0] < 2 * _UNITS_A_WINDOW:
        return None
    per_step = np.concatenate([some.sum(-1).mean(-1) for _, some in blocks(steps)]) / (trace.top_k or 1)

    def by_label(label: IndexArray, n: int) -> IndexArray:
        total = np.zeros((n, *steps.shape[1:]), dtype=np.int64)
        for start, some in blocks(steps):
            for step, to in zip(some, label[start:], strict=False):
                total[to] += step
        return total

    return "step", np.maximum(per_step, 1e-9), by_label


def _by_lag(counts: IndexArray) -> tuple[list[float], list[float]]:
    """Mean total variation and Jensen-Shannon distance of windows 1, 2, ... apart."""
    p = _shares(counts)
    lags = range(1, len(p))
    moved = [float(total_variation(p[lag:], p[:-lag]).mean()) for lag in lags]
    return moved, [float(jensen_shannon(p[lag:], p[:-lag]).mean()) for lag in lags]


def _mean_pair(by_lag: Sequence[float], n_windows: int) -> float:
    n_pairs = np.arange(n_windows - 1, 0, -1)
    return float((np.asarray(by_lag) * n_pairs).sum() / n_pairs.sum())


def domain_specialisation(
    runs: TokenRuns, sequence_domains: NDArray[Any], names: Sequence[str], *, seed: int = 0
) -> dict[str, Any] | None:
    """How differently domains use the experts.

    Parameters
    ----------
    runs
        Tokens.
    sequence_domains : (n_sequences,)
        Index in `names` of each sequence of the trace.
    names
        Domains.
    seed
        Seed of the halves and shuffles.

    Returns
    -------
    dict or None
        ``names`` of domains with at least two runs and ``n_tokens`` of each; ``total_variation``
        (domains, domains), mean over layers, between half of the runs of one and half of those of the other:
        on the diagonal between the two halves of one domain, so what is noise;
        ``mutual_information_bits`` of domain and expert, domains of equal weight, mean over layers and
        ``by_layer``, and ``mutual_information_noise_bits`` with the domains shuffled over the runs;
        ``specialists``: per domain the expert whose share there is most above its mean over domains.
        None where fewer than two domains are left.
    """
    domain = np.asarray(sequence_domains, dtype=np.int64)[runs.sequences]
    size = np.bincount(domain, minlength=len(names))
    kept = np.flatnonzero(size >= 2)
    if kept.size < 2:
        return None
    kept_names = [str(names[int(i)]) for i in kept]
    rng = np.random.default_rng(seed)
    place = np.full(len(names), -1)
    place[kept] = np.arange(kept.size)
    label = place[domain]
    halves = runs.counts_by(_halved(label, rng)[runs.run_of], 2 * kept.size)
    p = _shares(halves).reshape(kept.size, 2, *halves.shape[1:])
    apart = total_variation(p[:, None, 0], p[None, :, 1]).mean(-1)
    whole = halves.reshape(kept.size, 2, *halves.shape[1:]).sum(1)
    by_layer = _information_bits(whole)
    shuffled = [
        _information_bits(runs.counts_by(_shuffled(label, rng)[runs.run_of], kept.size))
        for _ in range(_SHUFFLES)
    ]
    return {
        "names": kept_names,
        "n_tokens": [int(n) for n in whole[:, 0].sum(-1) // runs.ids.shape[2]],
        "total_variation": [[float(v) for v in row] for row in (apart + apart.T) / 2.0],
        "mutual_information_bits": float(by_layer.mean()),
        "mutual_information_noise_bits": float(np.mean(shuffled)),
        "by_layer": [float(f"{v:.4g}") for v in by_layer],
        "specialists": _specialists(whole, kept_names),
    }


def _halved(label: IndexArray, rng: np.random.Generator) -> IndexArray:
    """Label 2 d or 2 d + 1 of each run of domain d, half of its runs each at random; -1 stays."""
    out = np.full(label.size, -1)
    for one in range(int(label.max()) + 1):
        mine = rng.permutation(np.flatnonzero(label == one))
        out[mine] = 2 * one + np.arange(mine.size) % 2
    return out


def _shuffled(label: IndexArray, rng: np.random.Generator) -> IndexArray:
    out = label.copy()
    kept = label >= 0
    out[kept] = rng.permutation(label[kept])
    return out


def _information_bits(counts: IndexArray) -> FloatArray:
    """Mutual information of domain and expert per layer, domains of equal weight: (n_layers,) [bits]."""
    p = _shares(counts)
    return np.asarray(_entropy_bits(p.mean(0)) - _entropy_bits(p).mean(0))


def _specialists(counts: IndexArray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Per domain the expert that stands out most, among those with at least 0.2 of an even share overall."""
    p = _shares(counts)
    mean = p.mean(0)
    known = mean >= 0.2 / p.shape[-1]
    lift = np.where(known[None], p / np.maximum(mean, 1e-300), 0.0)
    told = []
    for one, name in enumerate(names):
        layer, expert = (int(v) for v in np.unravel_index(int(lift[one].argmax()), lift[one].shape))
        told.append(
            {
                "domain": name,
                "layer": layer,
                "expert": expert,
                "share": float(p[one, layer, expert]),
                "over_mean": float(lift[one, layer, expert]),
            }
        )
    return told
