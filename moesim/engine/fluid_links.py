"""Links that the flows of several collectives share while they are in flight: fluid, max-min fair."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import simpy

from moesim.engine.program import FloatArray, Flows, IntArray
from moesim.network import FluidNetwork

__all__ = ["FluidLinks"]


@dataclass(frozen=True, eq=False)
class _Flying:
    """One collective in flight."""

    source: IntArray
    target: IntArray
    left: IntArray
    """[n_ranks] flows that a rank still sends or receives."""
    done: dict[int, simpy.Event]


class FluidLinks:
    """The network of a program as one process: rates are solved again when a collective starts or flows end.

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
        self._network = FluidNetwork(link_bytes_per_s, tolerance=tolerance)
        self._flying: list[_Flying] = []
        self._first: list[int] = []  # number of each collective's first flow
        self._starting: list[tuple[Flows, _Flying]] = []
        self._plan = 0

    def start(self, flows: Flows, ranks: list[int]) -> dict[int, simpy.Event]:
        """Put a collective's flows on the links; each rank's event fires when its last flow has ended.

        What starts at one instant is solved together.
        """
        n_ranks = max(int(flows.target.max(initial=0)), int(flows.source.max(initial=0)), *ranks) + 1
        counts = np.bincount(flows.source, minlength=n_ranks) + np.bincount(flows.target, minlength=n_ranks)
        done = {rank: self._env.event() for rank in ranks}
        for rank in ranks:
            if counts[rank] == 0:
                done[rank].succeed()
        if not self._starting:
            self._env.timeout(0).callbacks.append(lambda _: self._launch())
        self._starting.append((flows, _Flying(flows.source, flows.target, counts, done)))
        return done

    def _launch(self) -> None:
        """Add everything that starts now."""
        self._tell(self._network.advance(self._env.now))
        starting, self._starting = self._starting, []
        now_s = max(self._env.now, self._network.now_s)
        width = max(flows.routes.shape[1] for flows, _ in starting)
        routes = [
            np.pad(flows.routes, ((0, 0), (0, width - flows.routes.shape[1])), constant_values=-1)
            for flows, _ in starting
        ]
        numbers = self._network.add(
            np.concatenate(routes),
            np.concatenate([flows.n_bytes for flows, _ in starting]),
            now_s + np.concatenate([flows.latency_s for flows, _ in starting]),
        )
        first = int(numbers[0]) if numbers.size else 0
        for flows, flying in starting:
            self._flying.append(flying)
            self._first.append(first)
            first += flows.n_bytes.size
        self._set_timer()

    def _set_timer(self) -> None:
        """Wake up when flows next end or begin; an earlier timer is then stale."""
        self._plan += 1
        next_s = self._network.next_s
        if next_s < np.inf:
            timer = self._env.timeout(max(next_s - self._env.now, 0.0))
            timer.callbacks.append(partial(self._on_timer, self._plan, next_s))

    def _on_timer(self, plan: int, next_s: float, _: simpy.Event) -> None:
        if plan != self._plan:
            return
        # the clock may have rounded just below the instant that was asked for
        self._tell(self._network.advance(max(self._env.now, next_s)))
        self._set_timer()

    def _tell(self, ended: IntArray) -> None:
        """Count ended flows off their ranks."""
        owner = np.searchsorted(self._first, ended, side="right") - 1
        for index in np.unique(owner):
            flying = self._flying[index]
            local = ended[owner == index] - self._first[index]
            ranks = np.concatenate([flying.source[local], flying.target[local]])
            np.subtract.at(flying.left, ranks, 1)
            for rank in np.unique(ranks[flying.left[ranks] == 0]).tolist():
                flying.done[rank].succeed()
