"""How evenly ranks are loaded, and how many experts work: over a whole trace, and in batches drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import LayoutError
from moesim.routing.batches import Phase, RoutingSource, draw_batch, inclusion
from moesim.routing.load import count_batch
from moesim.routing.placement import Placement, balanced, contiguous, eplb, read_placement, round_robin
from moesim.routing.runs import TokenRuns
from moesim.routing.synthetic import RoutingShape

__all__ = ["PLACEMENTS", "balance", "batch_figures", "even_load", "evenness", "named_placement"]

FloatArray = NDArray[np.float64]

PLACEMENTS = ("contiguous", "permuted", "round-robin", "balanced", "eplb")
"""Placements known by name; any other name is a file."""
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_RANK_BATCHES = (8, 32, 128)
_DRAWS = 3
_GROUPS = 64
"""Batches of one size that are averaged, at most."""


def named_placement(name: str, load: FloatArray, n_ranks: int, n_redundant: int = 0) -> Placement:
    """Make a placement by name, or read it from a file.

    Parameters
    ----------
    name
        One of `PLACEMENTS`, or a file as :func:`moesim.routing.read_placement` takes it. ``permuted`` is
        contiguous with the experts of each layer in random order, ``eplb`` DeepSeek's balancer, global policy.
    load : (n_layers, n_experts)
        Load that ``balanced`` and ``eplb`` see.
    n_ranks, n_redundant
        Ranks of the group, and slots beyond one per expert; a file brings its own slots, and ``balanced``
        has none to spare.

    Raises
    ------
    LayoutError
        If there is no such placement, or slots do not divide over ranks.
    """
    n_layers, n_experts = load.shape
    if name == "contiguous":
        return contiguous(n_experts, n_ranks, n_redundant)
    if name == "permuted":
        order = np.argsort(np.random.default_rng(0).random((n_layers, n_experts)), axis=-1)
        first = contiguous(n_experts, n_ranks, n_redundant).slot_to_expert
        return Placement(n_ranks, n_experts, order[:, first[0]], name)
    if name in ("round-robin", "round_robin"):
        return round_robin(n_experts, n_ranks, n_redundant)
    if name == "balanced":
        return balanced(load, n_ranks)
    if name == "eplb":
        return eplb(load, n_slots=n_experts + n_redundant, n_ranks=n_ranks)
    if not Path(name).is_file():
        fix = f"one of {', '.join(PLACEMENTS)}, or a file with physical_to_logical_map"
        raise LayoutError("no such placement", value=name, fix=fix, place="--placement")
    placement = read_placement(name, n_experts=n_experts, n_ranks=n_ranks)
    if placement.slot_to_expert.shape[0] not in (1, n_layers):
        rule = f"a map has one row, or one for each of the {n_layers} layers shown"
        raise LayoutError(rule, value=placement.slot_to_expert.shape[0], place=name)
    return placement


def balance(
    source: RoutingSource,
    shape: RoutingShape,
    *,
    ep_sizes: Sequence[int],
    placements: Sequence[str],
    n_redundant: int = 0,
    phase: Phase = "decode",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Balance of ranks at several EP sizes and placements.

    Parameters
    ----------
    source, shape
        Routing, and the model to draw for.
    ep_sizes
        Ranks of the expert-parallel group.
    placements
        Names or files, as for :func:`named_placement`.
    n_redundant
        Spare slots, where a placement takes them.
    phase
        How batches are drawn.
    seed
        Seed of the batches.

    Returns
    -------
    list of dict
        One for each size and placement: ``ep``, ``placement``, ``n_redundant``; ``balancedness``, mean over
        busiest rank, and ``imbalance``, busiest over mean less 1, both means over layers of the whole load;
        ``batches``: both by tokens per rank, in batches drawn (mean over layers and draws).

    Raises
    ------
    LayoutError
        If a placement does not fit.

    Notes
    -----
    ``balanced`` and ``eplb`` are made from the load that they are judged on: what a balancer reaches at best.
    """
    load = np.asarray(inclusion(source, shape))
    rows = []
    for ep in ep_sizes:
        made = [named_placement(name, load, ep, n_redundant) for name in placements]
        drawn = [_drawn(source, shape, ep, phase, [seed, ep, draw]) for draw in range(_DRAWS)]
        for name, placement in zip(placements, made, strict=True):
            rows.append(
                {
                    "ep": ep,
                    "placement": name,
                    "n_redundant": placement.n_redundant,
                    **evenness(placement.rank_load(load)),
                    "batches": _in_batches(drawn, placement),
                }
            )
    return rows


def _drawn(
    source: RoutingSource, shape: RoutingShape, ep: int, phase: Phase, seed: list[int]
) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    return draw_batch(source, shape, n_ranks=ep, n_tokens=max(_RANK_BATCHES), phase=phase, rng=rng)


def evenness(ranks: NDArray[Any]) -> dict[str, float]:
    """Balancedness (mean over busiest) and imbalance (busiest over mean, less 1) of loads (..., n_ranks), averaged."""
    mean, busiest = ranks.mean(-1), ranks.max(-1)
    return {
        "balancedness": float((mean / np.maximum(busiest, 1e-300)).mean()),
        "imbalance": float((busiest / np.maximum(mean, 1e-300)).mean() - 1.0),
    }


def _in_batches(drawn: Sequence[NDArray[Any]], placement: Placement) -> dict[str, dict[str, float]]:
    loads = [count_batch(ids, placement, n_tokens=_RANK_BATCHES).tokens_per_rank for ids in drawn]
    return {str(n): evenness(np.stack([one[i] for one in loads])) for i, n in enumerate(_RANK_BATCHES)}


@dataclass(frozen=True)
class _Seen:
    active: float
    busiest: float


def batch_figures(
    source: RoutingSource, shape: RoutingShape, runs: TokenRuns | None = None, *, seed: int = 0
) -> list[dict[str, Any]]:
    """Experts with a token, and busiest expert over mean, against the tokens of a batch.

    Parameters
    ----------
    source, shape
        Routing, and the model to draw for.
    runs
        Tokens in a row, where there are any.
    seed
        Seed of the batches.

    Returns
    -------
    list of dict
        One a batch size: ``n_tokens``; ``active``, share of experts with a token, and
        ``busiest_over_mean`` in decode batches, every token of another request; the same ``_in_a_row`` for
        consecutive tokens of a request; ``even_active``, what equally popular experts give,
        1 - (1 - top_k / n_experts)**n. Means over layers and batches.
    """
    n_most = max(BATCHES)
    rng = np.random.default_rng(seed)
    ids = draw_batch(source, shape, n_ranks=4, n_tokens=n_most, phase="decode", rng=rng)
    rows = []
    for n in BATCHES:
        mixed = np.moveaxis(ids, 0, 2).reshape(-1, n, shape.n_layers, shape.top_k)
        seen = _seen(mixed, shape.n_experts)
        row: dict[str, Any] = {
            "n_tokens": n,
            "active": seen.active,
            "busiest_over_mean": seen.busiest,
            "even_active": 1.0 - (1.0 - shape.top_k / shape.n_experts) ** n,
        }
        if runs is not None:
            ends = np.repeat(runs.bounds[1:], np.diff(runs.bounds))
            begin = np.flatnonzero(np.arange(runs.n_tokens) + n <= ends)
            if begin.size:
                begin = rng.choice(begin, min(begin.size, _GROUPS), replace=False)
                in_row = _seen(runs.ids[begin[:, None] + np.arange(n)], shape.n_experts)
                row |= {"active_in_a_row": in_row.active, "busiest_in_a_row": in_row.busiest}
        rows.append(row)
    return rows


def _seen(batches: NDArray[Any], n_experts: int) -> _Seen:
    """Figures of batches (n_batches, n_tokens, n_layers, top_k), of `_GROUPS` at most."""
    some = batches[np.linspace(0, len(batches) - 1, min(len(batches), _GROUPS)).astype(int)]
    n, _, n_layers, _ = some.shape
    row = np.arange(n)[:, None, None, None] * n_layers + np.arange(n_layers)[None, None, :, None]
    counts = np.bincount((row * n_experts + some).ravel(), minlength=n * n_layers * n_experts)
    counts = counts.reshape(n * n_layers, n_experts)
    return _Seen(float((counts > 0).mean()), float((counts.max(-1) / counts.mean(-1)).mean()))


def even_load(shape: RoutingShape, n_tokens: int, *, seed: int = 0) -> FloatArray:
    """Load that equally popular experts get from `n_tokens`, by chance alone: counts (n_layers, n_experts).

    Parameters
    ----------
    shape
        Model.
    n_tokens
        Tokens counted.
    seed
        Seed of the draw.

    Notes
    -----
    Independent (token, expert) pairs, so without the rule that a token's experts differ, which makes the true
    load of an even router a little more even: by top_k / n_experts of its variance.
    """
    rng = np.random.default_rng(seed)
    even = np.full(shape.n_experts, 1.0 / shape.n_experts)
    return rng.multinomial(n_tokens * shape.top_k, even, size=shape.n_layers).astype(np.float64)
