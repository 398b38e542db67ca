"""Tasks that run beside one another on one GPU: they share its memory, and exchanges and compute slow one another."""

from __future__ import annotations

from functools import partial

import numpy as np
import simpy

from moesim.engine.program import FloatArray, Sharing

__all__ = ["SharedGpus", "Work", "even_stretches", "paces"]


class Work:
    """One task on one GPU; its progress is time as if alone."""

    def __init__(self, env: simpy.Environment, memory: float, by_sms: bool) -> None:
        self.memory = memory
        """Share of the memory's rate that it needs alone."""
        self.by_sms = by_sms
        """Whether it is an exchange that SMs copy."""
        self.total_s: float | None = None
        """What it takes alone; None until it is known [s]."""
        self.progress_s = 0.0
        self.since_s = env.now
        """When `progress_s` was true."""
        self.pace = 1.0
        """Progress per second."""
        self.plan = 0
        """Counts plans, so that the timer of an earlier one is recognised as stale."""
        self.done = env.event()


class SharedGpus:
    """Every GPU and what runs on it.

    Notes
    -----
    Memory is shared max-min fairly by rate: where tasks together need more than there is, those that need least have
    all they need. A task that is given a share of what it needs advances at that share. An exchange that SMs copy and
    compute beside it are slower by a factor each on top; the SMs that it keeps are missing in compute's own time.
    Alone, a task takes its own time to the last bit.
    """

    def __init__(self, env: simpy.Environment, sharing: Sharing) -> None:
        self._env = env
        self._sharing = sharing
        self._running: dict[int, list[Work]] = {}
        self._left: set[int] = set()
        """GPUs that a task has just left: what follows it may begin at the same instant."""

    def enter(self, rank: int, memory: float, by_sms: bool) -> Work:
        """Begin a task on a GPU; it stays until `finish` tells how much there was to do."""
        work = Work(self._env, memory, by_sms)
        works = self._running.setdefault(rank, [])
        works.append(work)
        if len(works) > 1:
            self._pace(rank)
        return work

    def finish(self, rank: int, work: Work, total_s: float) -> simpy.Event:
        """Event at the end of a task that takes `total_s` alone, counted from when it entered."""
        work.total_s = total_s
        self._plan(rank, work)
        return work.done

    def _pace(self, rank: int) -> None:
        self._left.discard(rank)
        works = self._running[rank]
        for work, pace in zip(works, paces(works, self._sharing), strict=True):
            if pace != work.pace:
                work.progress_s += (self._env.now - work.since_s) * work.pace
                work.since_s, work.pace = self._env.now, pace
                if work.total_s is not None:
                    self._plan(rank, work)

    def _plan(self, rank: int, work: Work) -> None:
        """Set the timer of a task's end."""
        work.plan += 1
        gone_s = work.progress_s + (self._env.now - work.since_s) * work.pace
        left_s = max((work.total_s or 0.0) - gone_s, 0.0) / work.pace
        timer = self._env.timeout(left_s)
        timer.callbacks.append(partial(self._on_timer, rank, work, work.plan))

    def _on_timer(self, rank: int, work: Work, plan: int, _: simpy.Event) -> None:
        if plan == work.plan:
            self._running[rank].remove(work)
            work.done.succeed()
            if self._running[rank]:
                self._left.add(rank)
                self._env.timeout(0).callbacks.append(partial(self._after, rank))

    def _after(self, rank: int, _: simpy.Event) -> None:
        """Once whatever follows at the same instant has begun: the others go on without the task that left."""
        if rank in self._left:
            self._pace(rank)


def paces(works: list[Work], sharing: Sharing) -> list[float]:
    """Progress per second of tasks that run at once on one GPU; 1 alone, never more."""
    if len(works) == 1:
        return [1.0]
    by_sms = any(work.by_sms for work in works)
    computes = any(not work.by_sms for work in works)
    found = []
    for work, share in zip(works, _memory_shares([work.memory for work in works]), strict=True):
        stretch = 1.0
        if by_sms and computes:
            stretch = sharing.exchange_stretch if work.by_sms else sharing.compute_stretch
        found.append((share / work.memory if share < work.memory else 1.0) / stretch)
    return found


def even_stretches(
    compute_s: FloatArray, exchange_s: FloatArray, sharing: Sharing
) -> tuple[FloatArray, FloatArray]:
    """What compute and exchanges take, over that alone, where halves take turns without end: for the recurrence.

    Parameters
    ----------
    compute_s, exchange_s
        What a rank computes, and exchanges by SMs, alone [s]; any one shape.
    sharing
        How they slow one another.

    Notes
    -----
    The shorter of the two, stretched, is beside the other all the time; the longer for as long as that takes. Memory is
    left out.
    """
    compute, exchange = sharing.compute_stretch, sharing.exchange_stretch
    hidden = exchange_s * exchange <= compute_s + exchange_s * exchange * (1 - 1 / compute)
    longer_s = np.where(
        hidden,
        compute_s + exchange * exchange_s * (1 - 1 / compute),
        exchange_s + compute * compute_s * (1 - 1 / exchange),
    )
    alone_s = np.where(hidden, compute_s, exchange_s)
    longer = np.divide(longer_s, alone_s, out=np.ones_like(longer_s), where=alone_s > 0)
    return np.where(hidden, longer, compute), np.where(hidden, exchange, longer)


def _memory_shares(needs: list[float]) -> list[float]:
    """What each is given of a memory of rate 1, max-min fairly."""
    if sum(needs) <= 1.0:
        return needs
    shares = [0.0] * len(needs)
    left, waiting = 1.0, len(needs)
    for at in sorted(range(len(needs)), key=lambda one: needs[one]):
        shares[at] = min(needs[at], left / waiting)
        left -= shares[at]
        waiting -= 1
    return shares
