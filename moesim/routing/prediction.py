"""How well the experts of one layer tell those of the next."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.runs import TokenRuns

__all__ = ["layer_prediction"]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

_LEARNED = 16384
"""Tokens that pairs of experts are counted on, at most."""
_TOLD, _LEAST_TOLD, _MOST_TOLD = 2**16, 1024, 8192
"""Tokens that are predicted over all layers, and least and most in one."""
_SIGMAS = 2.0


def layer_prediction(runs: TokenRuns, *, seed: int = 0) -> dict[str, Any] | None:
    """Predict each layer's experts from the previous layer's; None where there is one layer or one token.

    Half of the runs teach how often expert b of layer l + 1 goes with expert a of layer l, the other half
    is predicted; then the other way round.

    Parameters
    ----------
    runs
        Tokens.
    seed
        Seed of the choice of tokens.

    Returns
    -------
    dict
        Means over pairs of layers, and per pair under ``by_layer``: ``hit_rate``, share of the next
        layer's experts among the top_k that are most likely given the previous layer's;
        ``popularity_hit_rate``, the same for the top_k most popular ones; ``total_variation``, how far
        one expert moves the choice of the next layer; ``total_variation_noise``, the same with the next
        layer's experts from tokens of other runs, so what so few tokens show where there is no link.

    Notes
    -----
    Experts b are ranked by naive Bayes: log odds of b, and for every expert a of layer l the log ratio of a's
    frequency (or of its absence, where the token lacks it) with b and without. Each ratio is
    weighed with max(0, 1 - 4 / z**2), z being by how many standard deviations the count of the pair differs from
    chance (positive-part James and Stein shrinkage beyond two of them), taken from how much halves of the runs
    differ, so that layers which know nothing of each other predict as popularity does.
    Total variation is sum_a p(a) sum_b |p(b | a) - p(b)| / (2 top_k).
    """
    n_layers = runs.ids.shape[1]
    if n_layers < 2 or runs.n_tokens < 2:
        return None
    rng = np.random.default_rng(seed)
    halves = _halves(runs)
    n_told = int(np.clip(_TOLD // (n_layers - 1), _LEAST_TOLD, _MOST_TOLD))
    found = np.zeros((4, n_layers - 1))
    for known, asked in (halves, halves[::-1]):
        learned, told = _some(known, _LEARNED, rng), _some(asked, n_told, rng)
        for layer in range(n_layers - 1):
            found[:, layer] += _one_pair(runs, layer, learned, told)
    found /= 2.0
    names = ("hit_rate", "popularity_hit_rate", "total_variation", "total_variation_noise")
    rounded = [[float(f"{v:.4g}") for v in row] for row in found]
    return {
        **{name: float(row.mean()) for name, row in zip(names, found, strict=True)},
        "by_layer": dict(zip(names, rounded, strict=True)),
    }


def _halves(runs: TokenRuns) -> tuple[IndexArray, IndexArray]:
    """Tokens of every other run; of one run, its first and its second half."""
    if runs.n_runs == 1:
        middle = runs.n_tokens // 2
        return np.arange(middle), np.arange(middle, runs.n_tokens)
    even = runs.run_of % 2 == 0
    return np.flatnonzero(even), np.flatnonzero(~even)


def _some(tokens: IndexArray, n: int, rng: np.random.Generator) -> IndexArray:
    return np.sort(rng.choice(tokens, n, replace=False)) if tokens.size > n else tokens


def _one_pair(
    runs: TokenRuns, layer: int, learned: IndexArray, told: IndexArray
) -> tuple[float, float, float, float]:
    n, n_experts, top_k = learned.size, runs.n_experts, runs.ids.shape[2]
    now = runs.ids[learned, layer].astype(np.int64)
    after = runs.ids[learned, layer + 1].astype(np.int64)
    odd = _odd_units(runs.run_of[learned])
    parts = [_pair_counts(now[some], after[some], n_experts) for some in (odd, ~odd)]
    pairs = parts[0] + parts[1]
    # The next layer's experts of another run's tokens: no link, but runs that lean one way as they do.
    chance = _pair_counts(now, np.roll(after, n // 2, axis=0), n_experts)
    load, next_load = (np.bincount(ids.ravel(), minlength=n_experts) for ids in (now, after))
    gain, base = _evidence(pairs, parts[0] - parts[1], load, next_load, n)
    score = np.broadcast_to(base, (told.size, n_experts)).copy()
    for plane in runs.ids[told, layer].T:
        score += gain[plane]
    actual = runs.ids[told, layer + 1]
    return (
        _hits(score, actual),
        _hits(next_load[None, :].astype(np.float64), actual),
        _moved(pairs, load, next_load, n, top_k),
        _moved(chance, load, next_load, n, top_k),
    )


def _pair_counts(now: IndexArray, after: IndexArray, n_experts: int) -> FloatArray:
    """Tokens with expert a now and b after: (n_experts, n_experts)."""
    total = np.zeros(n_experts * n_experts, dtype=np.int64)
    for plane in after.T:
        total += np.bincount((now * n_experts + plane[:, None]).ravel(), minlength=total.size)
    return total.reshape(n_experts, n_experts).astype(np.float64)


def _odd_units(run: IndexArray) -> NDArray[np.bool_]:
    """Every other run of some tokens (n), or of one run's tokens every other 64."""
    number = np.cumsum(np.diff(run, prepend=run[:1]) != 0)
    if number[-1] == 0:
        number = np.arange(run.size) // 64
    return np.asarray(number % 2 == 1)


def _evidence(
    pairs: FloatArray, difference: FloatArray, load: IndexArray, next_load: IndexArray, n: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What each expert a says for each b, (n_experts, n_experts), and what stands without any, (n_experts,).

    Parameters
    ----------
    pairs, difference : (n_experts, n_experts)
        Tokens with a and then b, and by how much two halves of the runs differ in that.
    load, next_load : (n_experts,)
        Tokens with a, and with b.
    n
        Tokens.
    """
    expected = load[:, None] * (next_load / n)[None, :]
    # Tokens of one run are not independent: variance is what halves of the runs differ by.
    spread = max(1.0, float((difference**2).sum() / max(pairs.sum(), 1.0)))
    surprise = (pairs - expected) ** 2 / (np.maximum(expected, 1e-12) * spread)
    kept = np.maximum(0.0, 1.0 - _SIGMAS**2 / np.maximum(surprise, 1e-300))
    p = np.clip(load / n, 0.5 / n, 1.0 - 0.5 / n)[:, None]
    given = (pairs + p) / (next_load + 1.0)
    otherwise = (load[:, None] - pairs + p) / (n - next_load + 1.0)
    has = kept * np.log(given / otherwise)
    lacks = kept * np.log((1.0 - given) / (1.0 - otherwise))
    popular = (next_load + 0.5) / (n + 1.0)
    base = np.log(popular / (1.0 - popular)) + lacks.sum(0)
    return (has - lacks).astype(np.float32), base.astype(np.float32)


def _hits(score: NDArray[np.floating], actual: NDArray[Any]) -> float:
    """Share of the actual experts (n, top_k) among the top_k of highest score, (n, n_experts) or (1, ...)."""
    top_k = actual.shape[1]
    best = np.argpartition(-score, top_k - 1, axis=-1)[:, :top_k]
    return float((actual[:, :, None] == best[:, None, :].astype(actual.dtype)).any(-1).mean())


def _moved(pairs: FloatArray, load: IndexArray, next_load: IndexArray, n: int, top_k: int) -> float:
    given = pairs / np.maximum(load, 1)[:, None]
    gap = np.abs(given - next_load / n).sum(-1) / (2 * top_k)
    return float((gap * load).sum() / load.sum())
