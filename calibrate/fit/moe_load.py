"""Rows and tokens behind one line of the measured table, from the table's description of its loads.

The collecting scripts draw a load, put the busiest rank first and time that rank; the table keeps only the name of
the load. Equal draws are made here from the description, so a fit sees the tiles that were timed. Three ways of
timing are told apart, because the rank multiplies different rows in each; see `Timing`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from calibrate.loads import TRACE, trace_counts

__all__ = [
    "UPCAST", "UPCAST_MULTIPLE", "Draw", "IntArray", "Timing", "draws_of_row", "timing_of", "tokens_per_expert_of_row",
]  # fmt: skip

IntArray = NDArray[np.int64]
Shape = tuple[int, int, int, int]
"""(hidden, intermediate, top_k, n_experts)."""


@dataclass(frozen=True)
class Timing:
    """What entered the timed call on the busiest rank."""

    rank_tokens_only: bool = False
    """With more than one rank, only tokens with an expert on the rank enter, and their pairs with other ranks'
    experts are multiplied too, by the rank's first expert (ids of -1 raised to 0)."""
    n_groups: int = 1
    """Groups of experts, of which a token may use `kept_groups`."""
    kept_groups: int = 1


@dataclass(frozen=True, eq=False)
class Draw:
    """One call."""

    tokens: IntArray
    """[slots] rows of each expert on the rank."""
    n_entered: int
    """Tokens in the call."""
    remote_pairs: int
    """(token, expert) pairs of those that the rank does not multiply."""


WHOLE = Timing()
UPCAST = ("sglang:sglang_fused_moe_triton", "w4a16_mxfp4")
"""MXFP4 rows of SGLang's fused kernel ran in bfloat16: without a runner named, SGLang 0.5.14 pads the width to 64 and
widens the weights when it loads them (``mxfp4.py``, ``upcast_from_mxfp``). The times show it: their tiles change where
the bfloat16 rule changes, at as many tokens as experts, and weights stream at 4.2 TB/s if they have two bytes."""
UPCAST_MULTIPLE = 64
_BARE = frozenset({(2816, 704, 8, 128), (6144, 16384, 2, 8), (4096, 14336, 2, 8)})
"""Gemma 4 26B and the two Mixtrals: their routers are a plain softmax with renormalised top-k, so the collector calls
SGLang's fused kernel by itself, on the rank's tokens; every other model goes through SGLang's whole layer."""
_GROUPED = {(7168, 2048, 8, 256): (8, 4)}
"""DeepSeek-V3 limits a token to 4 of 8 groups of experts, and the collector's drawn scores are all ties: of the
drawn experts only those of the first 4 groups are kept, the rest of the top-8 falls on the lowest numbers."""


def timing_of(table_name: str, dtype: str, shape: Shape) -> Timing:
    """How the collector timed a library's kernel for a shape.

    References
    ----------
    NVIDIA AIConfigurator (Apache-2.0), ``collector/sglang/collect_moe.py`` (``build_rank0_workloads``, the clamp of
    ``topk_ids``), ``collector/vllm/collect_moe.py`` and ``collector/helper.py``; confirmed in the table: at 16,384
    balanced tokens Gemma's time does not fall from ep = 2 to 8, DeepSeek-V3's is equal at ep = 1 and 2.
    """
    if table_name == "sglang:sglang_fused_moe_triton" and dtype != "w4a16_mxfp4" and shape in _BARE:
        return Timing(rank_tokens_only=True)
    if table_name.startswith(("sglang:sglang", "vllm:")) and shape in _GROUPED:
        return Timing(False, *_GROUPED[shape])
    return WHOLE


@lru_cache(maxsize=65536)
def draws_of_row(
    n_tokens: int, top_k: int, n_experts: int, ep: int, load: str, timing: Timing = WHOLE, n_draws: int = 5
) -> tuple[Draw, ...]:
    """Draw the calls on the busiest rank.

    Parameters
    ----------
    n_tokens
        Tokens of the whole expert-parallel group.
    top_k, n_experts, ep
        Experts a token, experts in all, ranks that share them in contiguous blocks.
    load
        ``balanced`` and ``uniform`` (every expert the same: one draw), ``power_law_<a>``, or ``trace:<name>``, the
        draws of `calibrate.loads` that our own measurements are routed by.
    timing
        What of it entered.
    n_draws
        Draws of a power law; always the same ones for the same row.

    Notes
    -----
    Expert weights follow p(x) ~ x^-a on [1, 0.8 n_tokens], or on [0.01, 2] where no more pairs than experts
    enter; they are scaled to n_tokens * top_k, rounded, and cut at n_tokens an expert. Experts are then laid out
    one after the other, the fullest first, over tokens and choices: a token's choices lie n_tokens apart.
    """
    if load.startswith(TRACE):
        slots = trace_counts(
            load, n_tokens=n_tokens, top_k=top_k, n_experts=n_experts, ep=ep, n_draws=n_draws
        )
        return tuple(Draw(one, n_tokens, n_tokens * top_k - int(one.sum())) for one in slots)
    if load.startswith("power_law_"):
        exponent = float(load.removeprefix("power_law_"))
        rng = np.random.default_rng([n_tokens, top_k, n_experts, ep, round(exponent * 100)])
        drawn = [_power_law(n_tokens, top_k, n_experts, ep, exponent, rng) for _ in range(n_draws)]
        counts = [_busiest_first(one).ravel() for one in drawn]
    else:
        counts = [_balanced(n_tokens, top_k, n_experts)]
    plain = timing.n_groups == 1 and not (timing.rank_tokens_only and ep > 1)
    n_slots, n_pairs = n_experts // ep, n_tokens * top_k
    if plain:
        return tuple(Draw(c[:n_slots], n_tokens, n_pairs - int(c[:n_slots].sum())) for c in counts)
    if load.startswith("power_law_"):
        chosen = [_chosen(c, n_tokens, top_k) for c in counts]
    else:
        chosen = [_chosen_balanced(n_tokens, top_k, n_experts)]
    if timing.n_groups > 1:
        return tuple(_limited(*c, n_tokens, n_experts, n_slots, timing) for c in chosen)
    return tuple(_rank_only(*c, n_slots) for c in chosen)


def tokens_per_expert_of_row(
    n_tokens: int, top_k: int, n_experts: int, ep: int, load: str, n_draws: int = 5
) -> tuple[IntArray, ...]:
    """Tokens of each expert slot on the busiest rank, one array [n_experts / ep] a draw."""
    return tuple(d.tokens for d in draws_of_row(n_tokens, top_k, n_experts, ep, load, WHOLE, n_draws))


def _busiest_first(counts: IntArray) -> IntArray:
    """[ep, slots] with the fullest rank changed into the first place."""
    busiest = int(np.argmax(counts.sum(axis=1)))
    counts[[0, busiest]] = counts[[busiest, 0]]
    return counts


def _balanced(n_tokens: int, top_k: int, n_experts: int) -> IntArray:
    """Rows of each expert where each token's choices are laid evenly over the experts."""
    chosen, n_alike = _chosen_balanced(n_tokens, top_k, n_experts)
    return _rows(chosen, n_alike, n_experts)


def _chosen_balanced(n_tokens: int, top_k: int, n_experts: int) -> tuple[IntArray, IntArray]:
    """Kinds of tokens: experts chosen [kinds, top_k] and tokens alike [kinds]; the next token starts one further."""
    stride = -(-n_experts // top_k)
    n_kinds = min(n_tokens, n_experts) if n_tokens >= stride else n_tokens
    token = np.arange(n_kinds, dtype=np.int64)[:, None]
    start = token if n_tokens >= stride else token * stride // n_tokens
    n_alike = np.full(n_kinds, n_tokens // n_kinds, dtype=np.int64)
    n_alike[: n_tokens % n_kinds] += 1
    return (start + np.arange(top_k)[None, :] * stride) % n_experts, n_alike


def _chosen(counts: IntArray, n_tokens: int, top_k: int) -> tuple[IntArray, IntArray]:
    """Kinds of tokens where experts, the fullest first, fill one choice of all tokens after the other."""
    order = np.argsort(-counts, kind="stable")
    ends = np.cumsum(counts[order])
    starts = np.unique(np.append(ends % n_tokens, 0))
    place = starts[:, None] + np.arange(top_k)[None, :] * n_tokens
    return order[np.searchsorted(ends, place, side="right")], np.diff(np.append(starts, n_tokens))


def _rows(chosen: IntArray, n_alike: IntArray, n_experts: int) -> IntArray:
    weights = np.repeat(n_alike, chosen.shape[1])
    return np.bincount(chosen.ravel(), weights=weights, minlength=n_experts).astype(np.int64)


def _rank_only(chosen: IntArray, n_alike: IntArray, n_slots: int) -> Draw:
    """Keep tokens with a choice on the first rank; give their other choices to its first expert."""
    enters = (chosen < n_slots).any(axis=1)
    local = np.where(chosen[enters] < n_slots, chosen[enters], 0)
    return Draw(_rows(local, n_alike[enters], n_slots), int(n_alike[enters].sum()), 0)


def _limited(
    chosen: IntArray, n_alike: IntArray, n_tokens: int, n_experts: int, n_slots: int, timing: Timing
) -> Draw:
    """Top-k of tied scores within the groups kept: groups by their two best scores, ties by the lower number."""
    kinds, top_k = chosen.shape
    each = np.arange(kinds)[:, None]
    drawn = np.zeros((kinds, n_experts))
    drawn[each, chosen] = 1.0
    score = np.minimum(drawn.reshape(kinds, timing.n_groups, -1).sum(axis=2), 2.0)
    kept = np.zeros_like(score)
    kept[each, np.argsort(-score, axis=1, kind="stable")[:, : timing.kept_groups]] = 1.0
    allowed = np.repeat(kept, n_experts // timing.n_groups, axis=1)
    again = np.argsort(-np.where(allowed > 0, drawn, -1.0), axis=1, kind="stable")[:, :top_k]
    tokens = _rows(again, n_alike, n_experts)[:n_slots]
    return Draw(tokens, n_tokens, n_tokens * top_k - int(tokens.sum()))


def _power_law(
    n_tokens: int, top_k: int, n_experts: int, ep: int, exponent: float, rng: np.random.Generator
) -> IntArray:
    """[ep, n_experts / ep] tokens of one draw."""
    total = n_tokens * top_k
    low, high = (1.0, max(0.8 * n_tokens, 1.0)) if total > n_experts else (0.01, 2.0)
    power = 1.0 - exponent
    weight = ((high**power - low**power) * rng.random(n_experts) + low**power) ** (1.0 / power)
    counts = np.minimum(np.rint(weight / weight.sum() * total).astype(np.int64), n_tokens)
    counts = counts.reshape(ep, n_experts // ep)
    surplus = total - int(counts.sum())
    if surplus < 0:
        return n_tokens - _spread(n_tokens - counts, -surplus, n_tokens)
    return _spread(counts, surplus, n_tokens)


def _spread(counts: IntArray, surplus: int, cap: int) -> IntArray:
    """Hand out tokens rank after rank, each to the rank's least loaded expert, none above `cap`."""
    counts = counts.copy()
    while surplus > 0:
        room = (cap - counts).sum(axis=1)
        ranks = np.flatnonzero(room)
        if not ranks.size:
            break
        share = np.zeros(len(counts), dtype=np.int64)
        share[ranks] = surplus // ranks.size
        share[ranks[: surplus % ranks.size]] += 1
        share = np.minimum(share, room)
        for rank in np.flatnonzero(share):
            counts[rank] = _pour(counts[rank], int(share[rank]))
        surplus -= int(share.sum())
    return counts


def _pour(counts: IntArray, amount: int) -> IntArray:
    """Raise the lowest counts to one level with `amount` more tokens."""
    order = np.argsort(counts, kind="stable")
    level_counts = counts[order]
    cost_to_reach = np.arange(1, counts.size + 1) * level_counts - np.cumsum(level_counts)
    n_low = int(np.searchsorted(cost_to_reach, amount, side="right"))
    level, rest = divmod(int(level_counts[:n_low].sum()) + amount, n_low)
    level_counts[:n_low] = level
    level_counts[:rest] += 1
    poured = np.empty_like(counts)
    poured[order] = level_counts
    return poured
