"""Links that tasks in flight share: fluid, equal shares, re-solved when a flow starts or ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

import simpy

__all__ = ["Flow", "SharedLinks"]

Port = tuple[int, str]
"""One rank's link of one class."""


class Flow:
    """One task, or one collective, in flight over its members' links.

    Its progress is time as if alone; a member whose duration has been reached leaves, the others go on.
    """

    def __init__(
        self, env: simpy.Environment, link: str, ranks: Sequence[int], works_s: Sequence[float]
    ) -> None:
        pairs = sorted(zip(works_s, ranks, strict=True), reverse=True)
        self.stages: list[tuple[float, list[Port], simpy.Event]] = [
            (work_s, [(rank, link) for _, rank in members], env.event())
            for work_s, members in groupby(pairs, key=lambda pair: pair[0])
        ]
        """(progress at which they leave [s], their ports, event), the next to leave last."""
        self.done = {rank: event for _, ports, event in self.stages for rank, _ in ports}
        """Fires when a member has ended."""
        self.crowd = 1
        """Flows on the most crowded of its ports, itself included; progress per second is 1 / crowd."""
        self.progress_s = 0.0
        self.since_s = env.now
        """When `progress_s` was true."""
        self.plan = 0
        """Counts plans, so that the timer of an earlier one is recognised as stale."""

    def ports(self) -> Iterator[Port]:
        """Ports of the members still in flight."""
        return (port for _, ports, _ in self.stages for port in ports)


class SharedLinks:
    """Every rank's link of every class; flows on one of them share it equally.

    Notes
    -----
    A flow advances at the pace of the most crowded link of its members: ``1 / (flows on it)``. The
    share that it cannot use elsewhere is not handed to others, so crowded collectives come out slow
    rather than fast. Equal to processor sharing for tasks on one rank. Crowds are kept up to date port
    by port, so that a start or an end costs no more than the ports that it touches.
    """

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._flows: dict[Port, dict[Flow, None]] = {}  # a dict as a set that keeps its order

    def start(self, link: str, ranks: Sequence[int], works_s: Sequence[float]) -> Flow:
        """Put a flow on the links of `ranks`.

        Parameters
        ----------
        link
            Class of link.
        ranks
            Members.
        works_s
            Time that each member needs alone [s].
        """
        flow = Flow(self._env, link, ranks, works_s)
        crowds = {flow: 1}
        for port in flow.ports():
            flows = self._flows.setdefault(port, {})
            flows[flow] = None
            for one in flows:
                crowds[one] = max(len(flows), crowds.get(one, one.crowd))
        for one, crowd in crowds.items():
            if crowd != one.crowd or one is flow:
                self._plan(one, crowd)
        return flow

    def _leave(self, flow: Flow, ports: Iterable[Port]) -> None:
        """Take members off their ports and speed up whatever they held back."""
        held_back: dict[Flow, None] = {flow: None} if flow.stages else {}
        for port in ports:
            flows = self._flows[port]
            held_back |= {one: None for one in flows if one is not flow and one.crowd == len(flows)}
            del flows[flow]
        for one in held_back:
            # a flow alone on every port stays so: nothing to look up, however many members it has
            crowd = max(len(self._flows[port]) for port in one.ports()) if one.crowd > 1 else 1
            if crowd != one.crowd or one is flow:
                self._plan(one, crowd)

    def _plan(self, flow: Flow, crowd: int) -> None:
        """Book progress so far, then set the timer of the next member to leave."""
        now_s = self._env.now
        flow.progress_s += (now_s - flow.since_s) / flow.crowd
        flow.since_s, flow.crowd = now_s, crowd
        flow.plan += 1
        left_s = max(flow.stages[-1][0] - flow.progress_s, 0.0) * crowd
        timer = self._env.timeout(left_s)
        timer.callbacks.append(partial(self._on_timer, flow, flow.plan))

    def _on_timer(self, flow: Flow, plan: int, _: simpy.Event) -> None:
        if plan != flow.plan:
            return
        work_s, ports, ended = flow.stages.pop()
        flow.progress_s, flow.since_s = work_s, self._env.now  # known exactly: no rounding builds up
        ended.succeed()
        self._leave(flow, ports)
