"""Draws of distinct experts with given inclusion probabilities, many rows at once.

Systematic (Madow) sampling lays the inclusion probabilities of a row end to end on ``[0, top_k)`` and
reads the experts off at ``u, u + 1, ...``: exactly ``top_k`` distinct experts, each included with exactly
its probability, for any joint law of ``u`` over tokens whose marginal is uniform. A random order of the
experts per row breaks up the pairs that one fixed order would favour.

References
----------
W. G. Madow, "On the theory of systematic sampling, II", Annals of Mathematical Statistics 20 (1949).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError

__all__ = ["group_limited_draw", "inclusion_probabilities", "systematic_draw"]

FloatArray = NDArray[np.float64]
IdArray = NDArray[np.uint16]

_CERTAIN = 1.0 - 1e-6
"""Largest inclusion: a hair below 1, so that rounding never puts two points into one expert's arc."""


def inclusion_probabilities(
    weights: NDArray[np.floating] | NDArray[np.integer], n_drawn: float
) -> FloatArray:
    """Scale weights to inclusion probabilities that add up to `n_drawn`, none above 1.

    Parameters
    ----------
    weights : (..., n_items)
        Non-negative weights; a row of zeros counts as uniform.
    n_drawn
        Items drawn without replacement from each row.

    Returns
    -------
    (..., n_items)
        Probabilities; what the cap takes from one item goes to the others in proportion.

    Raises
    ------
    TraceError
        If fewer than `n_drawn` items stand in a row.
    """
    p = np.array(weights, dtype=np.float64)
    n_items = p.shape[-1]
    if n_drawn > n_items:
        raise TraceError("top_k is at most n_experts", value=n_drawn, fix=f"top_k <= {n_items}")
    if n_drawn > n_items * _CERTAIN:
        return np.ones_like(p)
    p[p.sum(-1) <= 0] = 1.0
    # A floor keeps enough items positive to be drawn; it is far below any count.
    p = np.maximum(p, p.sum(-1, keepdims=True) * 1e-12)
    p *= n_drawn / p.sum(-1, keepdims=True)
    for _ in range(n_items):
        capped = p >= _CERTAIN
        excess = n_drawn - np.where(capped, _CERTAIN, p).sum(-1, keepdims=True)
        if np.all(np.abs(excess) < 1e-9 * n_drawn):
            break
        free = np.where(capped, 0.0, p).sum(-1, keepdims=True)
        p = np.where(capped, _CERTAIN, p * (1.0 + excess / np.maximum(free, 1e-300)))
    return np.minimum(p, _CERTAIN)


def systematic_draw(
    inclusion: FloatArray,
    u: FloatArray,
    n_drawn: int,
    rng: np.random.Generator,
    keys: NDArray[np.float32] | None = None,
) -> IdArray:
    """Draw `n_drawn` distinct items per token; all tokens of a row share a random order of the items.

    Parameters
    ----------
    inclusion : (n_rows, n_items)
        Inclusion probabilities, each row adding up to `n_drawn`.
    u : (n_rows, n_tokens)
        Start of each token in [0, 1), uniform at the margin; near starts share experts.
    n_drawn
        Items per token.
    rng
        Source of the orders.
    keys : (n_rows, n_items), optional
        Sort keys that give the order of each row; random where None. Rows with the same keys and starts
        choose alike.

    Returns
    -------
    (n_rows, n_tokens, n_drawn)
        Distinct item indices.
    """
    n_rows, n_items = inclusion.shape
    if keys is None:
        keys = rng.random((n_rows, n_items), dtype=np.float32)
    order = np.argsort(keys, axis=-1).astype(np.uint16)
    if n_drawn == n_items:
        return np.repeat(order[:, None, :], u.shape[1], axis=1)
    edges = np.cumsum(np.take_along_axis(inclusion, order, -1), axis=-1)
    edges *= n_drawn / edges[:, -1:]
    # One search for all rows: row r lives on [r * n_drawn, (r + 1) * n_drawn).
    start = np.arange(n_rows, dtype=np.float64)[:, None] * n_drawn
    points = (start + u)[:, :, None] + np.arange(n_drawn)
    at = np.searchsorted((start + edges).ravel(), points.ravel(), side="right").reshape(points.shape)
    first = np.arange(n_rows)[:, None, None] * n_items
    np.clip(at, first, first + n_items - 1, out=at)
    return np.asarray(order.ravel()[at])


def group_limited_draw(
    inclusion: FloatArray,
    u: FloatArray,
    n_drawn: int,
    n_groups: int,
    n_top_groups: int,
    rng: np.random.Generator,
    *,
    group_u: FloatArray,
    group_keys: NDArray[np.float32] | None = None,
    keys: NDArray[np.float32] | None = None,
) -> IdArray:
    """Draw as :func:`systematic_draw`, with all experts of a row's tokens in `n_top_groups` groups.

    Groups are drawn first, with inclusion in proportion to their load; experts then have their inclusion
    divided by their group's, so every expert keeps its overall probability (unless one expert's exceeds
    its group's, where the cap holds it down). Tokens of one row share their groups.

    Parameters
    ----------
    inclusion : (n_rows, n_experts)
        Inclusion probabilities, each row adding up to `n_drawn`.
    u : (n_rows, n_tokens)
        Starts, as in :func:`systematic_draw`.
    n_drawn
        Experts per token.
    n_groups, n_top_groups
        Groups of consecutive experts, and how many of them a token may use (DeepSeek-V3: 8 and 4).
    rng
        Source of randomness.
    group_u : (n_rows,)
        Starts of the draw of groups, uniform at the margin; near starts share groups where keys are shared.
    group_keys : (n_rows, n_groups), optional
        As `keys`, of the groups.
    keys : (n_rows, n_experts), optional
        As in :func:`systematic_draw`.
    """
    n_rows, n_experts = inclusion.shape
    per_group = n_experts // n_groups
    by_group = inclusion.reshape(n_rows, n_groups, per_group)
    # A group is met at least as often as its busiest expert.
    need = np.maximum(by_group.sum(-1) * (n_top_groups / n_drawn), by_group.max(-1) * 1.02)
    p_group = inclusion_probabilities(need, n_top_groups)
    chosen = systematic_draw(p_group, group_u[:, None], n_top_groups, rng, group_keys)[:, 0]
    rows = np.arange(n_rows)[:, None]
    within = by_group[rows, chosen] / p_group[rows, chosen][:, :, None]
    within = inclusion_probabilities(within.reshape(n_rows, -1), n_drawn)
    if keys is not None:
        keys = keys.reshape(n_rows, n_groups, per_group)[rows, chosen].reshape(n_rows, -1)
    at = systematic_draw(within, u, n_drawn, rng, keys).astype(np.int64)
    group = np.take_along_axis(chosen[:, None, :], at // per_group, -1)
    return np.asarray(group * np.uint16(per_group) + (at % per_group).astype(np.uint16), dtype=np.uint16)
