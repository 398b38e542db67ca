"""Loads named ``trace:NAME``: experts drawn from a generator of the routing catalog, alike on every machine.

Measuring routes tokens by them, and a fit counts the tokens that each expert slot got in those same draws.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moesim.routing.batches import draw_batch
from moesim.routing.catalog import catalog_routing
from moesim.routing.synthetic import RoutingShape

__all__ = ["TRACE", "trace_counts", "trace_ids"]

IntArray = NDArray[np.int64]

TRACE = "trace:"
"""How the name of such a load begins."""
_MANY_TOKENS = 4096
_DRAWS, _DRAWS_OF_MANY = 30, 6
"""Different draws before they come round again; a large batch is nearly its own mean, so few say it all."""


def trace_ids(load: str, *, n_tokens: int, top_k: int, n_experts: int, ep: int, draw: int) -> IntArray:
    """Draw the experts of one batch.

    Parameters
    ----------
    load
        ``trace:NAME``, a name of the routing catalog.
    n_tokens
        Tokens that enter the whole expert-parallel group.
    top_k, n_experts, ep
        Experts a token, experts in all, ranks that share them in contiguous blocks.
    draw
        Number of the draw: each is another layer of the model, with its own popular experts.

    Returns
    -------
    [n_tokens, top_k], experts numbered so that the busiest rank's come first.

    Raises
    ------
    TraceError
        If the catalog has no such routing.
    """
    layers = _layers(load.removeprefix(TRACE), n_tokens, top_k, n_experts)
    ids = np.asarray(layers[draw % len(layers)], dtype=np.int64)
    per_rank = np.bincount(ids.ravel(), minlength=n_experts).reshape(ep, -1).sum(axis=1)
    first = int(np.argmax(per_rank)) * (n_experts // ep)
    return np.asarray((ids - first) % n_experts)


@lru_cache(maxsize=4096)
def trace_counts(
    load: str, *, n_tokens: int, top_k: int, n_experts: int, ep: int, n_draws: int = 5
) -> tuple[IntArray, ...]:
    """Tokens of each expert slot on the busiest rank, [n_experts / ep], one array a draw; see `trace_ids`."""
    draws = (
        trace_ids(load, n_tokens=n_tokens, top_k=top_k, n_experts=n_experts, ep=ep, draw=draw)
        for draw in range(n_draws)
    )
    return tuple(np.bincount(ids.ravel(), minlength=n_experts)[: n_experts // ep] for ids in draws)


@lru_cache(maxsize=4)
def _layers(name: str, n_tokens: int, top_k: int, n_experts: int) -> NDArray[np.uint16]:
    """[n_draws, n_tokens, top_k]."""
    n_layers = _DRAWS if n_tokens <= _MANY_TOKENS else _DRAWS_OF_MANY
    shape = RoutingShape(n_layers=n_layers, n_experts=n_experts, top_k=top_k)
    rng = np.random.default_rng([n_tokens, top_k, n_experts])
    batch = draw_batch(catalog_routing(name), shape, n_ranks=1, n_tokens=n_tokens, phase="decode", rng=rng)
    return np.asarray(batch[:, 0])
