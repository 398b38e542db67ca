"""Traffic and topologies that several test files of the fluid solver share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from moesim.network import fluid

SOLVERS = {"numpy": fluid._NumpySolver, "compiled": fluid._CompiledSolver}


@contextmanager
def solver(name: str) -> Iterator[None]:
    """Solve with one of the two solvers, whatever is installed."""
    with patch.object(fluid, "_solver_type", lambda: SOLVERS[name]):
        yield


class Case(NamedTuple):
    """Arguments of `solve_flows`, and the ranks of an all-to-all."""

    link_bytes_per_s: np.ndarray
    routes: np.ndarray
    flow_bytes: np.ndarray
    flow_latency_s: np.ndarray
    source: np.ndarray | None = None
    target: np.ndarray | None = None

    def solve(self, **options: Any) -> np.ndarray:
        return fluid.solve_flows(*self[:4], **options)


def random_case(seed: int, n_links: int = 8, n_flows: int = 30, n_hops: int = 3) -> Case:
    """Links and routes without structure; some flows share begins, sizes and links."""
    rng = np.random.default_rng(seed)
    routes = np.full((n_flows, n_hops), -1)
    for route in routes:
        used = rng.choice(n_links, rng.integers(1, min(n_hops, n_links) + 1), replace=False)
        route[rng.choice(n_hops, used.size, replace=False)] = used
    return Case(
        rng.choice([1.0, 2.0, 2.5, 7.0], n_links) * 1e9,
        routes,
        rng.choice([1e6, 3e6, 5e7], n_flows) * rng.choice([1.0, rng.uniform(0.5, 2)], n_flows),
        rng.choice([0.0, 1e-6, 2e-3], n_flows),
    )


def all_to_all(n_ranks: int, seed: int = 0, tokens: int = 512) -> Case:
    """Skewed all-to-all on nodes of 8: NVLink ports and NICs, forwarded over NVLink to the target's rail (PXN)."""
    rng = np.random.default_rng(seed)
    popularity = rng.permutation(np.arange(1, n_ranks + 1) ** -0.8)
    pairs = rng.poisson(tokens * 8 * popularity / popularity.sum(), (n_ranks, n_ranks)) * 7168.0
    source, target = np.nonzero(pairs * (1 - np.eye(n_ranks)))
    ports = np.arange(4)[:, None] * n_ranks + np.arange(n_ranks)  # NVLink out, in; NIC out, in
    near = source // 8 == target // 8
    forward = source // 8 * 8 + target % 8  # the neighbour on the target's rail
    moves = ~near & (forward != source)
    routes = np.stack(
        [
            np.where(near | moves, ports[0, source], -1),
            np.where(near, ports[1, target], np.where(moves, ports[1, forward], -1)),
            np.where(near, -1, ports[2, forward]),
            np.where(near, -1, ports[3, target]),
        ],
        axis=1,
    )
    links = np.repeat([450e9, 450e9, 50e9, 50e9], n_ranks)
    latency_s = np.where(near, 1e-6, np.where(moves, 6e-6, 5e-6))
    return Case(links, routes, pairs[source, target], latency_s, source, target)
