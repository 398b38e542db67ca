"""Shared links against an obvious reference that works every share out again at every event."""

from __future__ import annotations

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.links import SharedLinks

Started = list[tuple[float, dict[int, float]]]
"""For each flow its start [s] and, by rank, the time that it needs there alone [s]."""


def reference_ends_s(flows: Started) -> list[dict[int, float]]:
    """Step from event to event; at each, count who is on every rank's link from scratch."""
    now_s, ends_s = 0.0, [dict[int, float]() for _ in flows]
    progress_s = [0.0] * len(flows)
    while any(len(end) < len(works) for end, (_, works) in zip(ends_s, flows, strict=True)):
        active = {
            i: [rank for rank in works if rank not in ends_s[i]]
            for i, (start_s, works) in enumerate(flows)
            if start_s <= now_s and len(ends_s[i]) < len(works)
        }
        crowd = {rank: sum(rank in ranks for ranks in active.values()) for rank in range(9)}
        pace = {i: 1 / max(crowd[rank] for rank in ranks) for i, ranks in active.items()}
        ends = [
            (now_s + (flows[i][1][rank] - progress_s[i]) / pace[i], i, rank)
            for i, ranks in active.items()
            for rank in ranks
        ]
        starts = [start_s for start_s, _ in flows if start_s > now_s]
        next_s = min([end_s for end_s, _, _ in ends] + starts)
        for i in active:
            progress_s[i] += (next_s - now_s) * pace[i]
        for end_s, i, rank in ends:
            if end_s <= next_s * (1 + 1e-12):
                ends_s[i][rank] = end_s
        now_s = next_s
    return ends_s


def simulated_ends_s(flows: Started) -> list[dict[int, float]]:
    env = simpy.Environment()
    links = SharedLinks(env)
    ends_s = [dict[int, float]() for _ in flows]

    def run(i: int, start_s: float, works_s: dict[int, float]) -> object:
        yield env.timeout(start_s)
        flow = links.start("nic", list(works_s), list(works_s.values()))
        for rank, event in flow.done.items():
            event.callbacks.append(lambda _, rank=rank: ends_s[i].__setitem__(rank, env.now))

    for i, (start_s, works_s) in enumerate(flows):
        env.process(run(i, start_s, works_s))
    env.run()
    return ends_s


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_shares_are_those_of_the_reference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_ranks = int(rng.integers(1, 7))
    flows: Started = []
    for _ in range(int(rng.integers(1, 7))):
        ranks = rng.choice(n_ranks, int(rng.integers(1, n_ranks + 1)), replace=False).tolist()
        draw = rng.uniform(0.1, 2, n_ranks) if rng.random() < 0.5 else np.full(n_ranks, rng.uniform(0.1, 2))
        start_s = float(rng.choice([0.0, 0.5, rng.uniform(0, 3)]))
        flows.append((start_s, {rank: float(draw[rank]) for rank in ranks}))
    for ours, theirs in zip(simulated_ends_s(flows), reference_ends_s(flows), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
