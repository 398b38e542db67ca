"""Links that the flows of several collectives share while they are in flight: fluid, max-min fair."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import simpy

from moesim.engine.program import FloatArray, Flows
from moesim.network import FluidNetwork

__all__ = ["FluidLinks"]


@dataclass(eq=False)
class _Flying:
    """One collective in flight."""

    flows: Flows
    start_s: float
    end_s: FloatArray
    """(n_ranks,) when each rank's last flow ends, if nothing else starts."""
    done: dict[int, simpy.Event]
    """Of the ranks that have not ended."""
    first: int = -1
    """Number of its first flow in the network; -1 = alone so far, so that its times are known."""


class FluidLinks:
    """The network of a program: solved ahead as if nothing else would start, and again when something does.

    A collective that has the links to itself takes the time that it has alone, and nothing is solved.

    Parameters
    ----------
    env
        The clock.
    link_bytes_per_s : (n_links,)
        Capacities [bytes/s].
    tolerance
        As in `moesim.network.solve_flows`.
    """

    def __init__(self, env: simpy.Environment, link_bytes_per_s: FloatArray, tolerance: float) -> None:
        self._env = env
        self._capacity = link_bytes_per_s
        self._tolerance = tolerance
        self._network = FluidNetwork(link_bytes_per_s, tolerance=tolerance)
        self._flying: list[_Flying] = []
        self._starting: list[_Flying] = []
        self._plan = 0

    def start(self, flows: Flows, ranks: list[int]) -> dict[int, simpy.Event]:
        """Put a collective's flows on the links; each rank's event fires when its last flow has ended.

        What starts at one instant is solved together.
        """
        done = {rank: self._env.event() for rank in ranks}
        if not self._starting:
            self._env.timeout(0).callbacks.append(lambda _: self._launch())
        now_s = self._env.now
        self._starting.append(_Flying(flows.among(ranks), now_s, now_s + flows.alone_s, dict(done)))
        return done

    def _launch(self) -> None:
        """Add everything that starts now."""
        self._tell()
        if not self._flying:
            self._network = FluidNetwork(self._capacity, tolerance=self._tolerance)
        self._flying += self._starting
        self._starting = []
        if len(self._flying) > 1:
            self._solve()
        self._tell()
        self._set_timer()

    def _solve(self) -> None:
        """Play the network up to now, add what it does not hold yet, and look ahead."""
        for start_s in sorted({one.start_s for one in self._flying if one.first < 0}):
            self._network.advance(start_s)
            self._add([one for one in self._flying if one.first < 0 and one.start_s == start_s])
        numbers, finish_s = self._network.ahead()
        for one in self._flying:
            local = numbers - one.first
            mine = (local >= 0) & (local < one.flows.n_bytes.size)
            if not mine.any():
                continue
            one.end_s = np.full_like(one.end_s, self._env.now)
            for end in (one.flows.source, one.flows.target):
                np.maximum.at(one.end_s, end[local[mine]], finish_s[mine])

    def _add(self, new: list[_Flying]) -> None:
        from_s = max(new[0].start_s, self._network.now_s)
        width = max(one.flows.routes.shape[1] for one in new)
        routes = [
            np.pad(one.flows.routes, ((0, 0), (0, width - one.flows.routes.shape[1])), constant_values=-1)
            for one in new
        ]
        numbers = self._network.add(
            np.concatenate(routes),
            np.concatenate([one.flows.n_bytes for one in new]),
            from_s + np.concatenate([one.flows.latency_s for one in new]),
        )
        first = int(numbers[0]) if numbers.size else 0
        for one in new:
            one.first = first
            first += one.flows.n_bytes.size

    def _tell(self) -> None:
        """Let every rank go on whose last flow has ended."""
        now_s = self._env.now
        for one in self._flying:
            for rank in [rank for rank in one.done if one.end_s[rank] <= now_s]:
                one.done.pop(rank).succeed()
        self._flying = [one for one in self._flying if one.done]

    def _set_timer(self) -> None:
        """Wake up when a rank next ends; an earlier timer is then stale."""
        self._plan += 1
        ends_s = [one.end_s[rank] for one in self._flying for rank in one.done]
        if ends_s:
            next_s = float(min(ends_s))
            timer = self._env.timeout(max(next_s - self._env.now, 0.0))
            timer.callbacks.append(partial(self._on_timer, self._plan, next_s))

    def _on_timer(self, plan: int, next_s: float, _: simpy.Event) -> None:
        if plan != self._plan:
            return
        if self._env.now < next_s:  # the clock rounded just below the instant that was asked for
            for one in self._flying:
                one.end_s = np.where(one.end_s <= next_s, self._env.now, one.end_s)
        self._tell()
        self._set_timer()
