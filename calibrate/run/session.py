"""One run: rounds of points, a sentinel before each, rows on disk as they come, and the log of what was left out."""

from __future__ import annotations

import faulthandler
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.recorder import Recorder
from calibrate.run.design import Candidate, rounds
from calibrate.run.device import Device
from calibrate.run.lost import LOG, Key, key_of, lost_points
from calibrate.run.points import Point
from calibrate.run.protocol import Case, Measured, WrongResultError, measure
from moesim.errors import MeasurementError, MoesimError

__all__ = ["DRIFT_LIMIT", "HANG_S", "Build", "DeviceLostError", "Outcome", "Session"]

Build = Callable[[Point, Device], Case]
"""Makes a point ready to run."""

ROUND = 20
"""Points between two sentinels."""
REPEATED_SHARE = 0.05
DRIFT_LIMIT = 0.03
"""Change of the sentinel's time that is called out."""
HANG_S = 60.0
"""A point that takes longer, and 20 times its estimate, hangs: the process ends, since nothing else ends a kernel."""
_HANG_FACTOR = 20.0
_PACE_AFTER = 5
"""Points after which the time left is judged by what points took rather than by the estimate alone."""


class DeviceLostError(MeasurementError):
    """A kernel left the device in a state in which nothing more runs in this process."""


@dataclass
class Outcome:
    """What came of a run."""

    n_points: int = 0
    """Points planned."""
    n_measured: int = 0
    n_before: int = 0
    """Points that the files held already."""
    skipped: list[str] = field(default_factory=list)
    """Points that could not be measured, with the reason."""
    wrong: list[str] = field(default_factory=list)
    """Points whose kernel gave a wrong result."""
    lost: list[str] = field(default_factory=list)
    """Points that an earlier run of the same software went down in: not tried again."""
    n_left: int = 0
    """Points that time did not suffice for."""
    sentinel_s: list[float] = field(default_factory=list)

    @property
    def drift(self) -> float:
        """Largest change of the sentinel from its median, as a fraction."""
        times = np.asarray(self.sentinel_s)
        return float(np.max(np.abs(times / np.median(times) - 1.0))) if times.size else 0.0

    @property
    def n_done(self) -> int:
        """Points that need no more work."""
        return self.n_measured + self.n_before + len(self.skipped) + len(self.wrong) + len(self.lost)


class Session:
    """Measures points on one device into one folder.

    Parameters
    ----------
    device
        What is measured.
    folder
        One CSV file a kind of table, and the log.
    build
        Makes a point ready to run.
    sentinel
        Time of a fixed product [s]; the same work before every round.
    seed
        Of data, routing, the order within rounds and what is repeated.
    clock
        Seconds since some moment, for the budget.
    hang_s
        Time of one point after which the process ends itself; never without it.
    """

    def __init__(
        self,
        device: Device,
        folder: Path,
        build: Build,
        sentinel: Callable[[], float],
        *,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
        hang_s: float | None = None,
    ) -> None:
        self.device = device
        self.folder = folder
        self.outcome = Outcome()
        self._build = build
        self._sentinel = sentinel
        self._seed = seed
        self._clock = clock
        self._hang_s = hang_s
        self._lost: set[Key] = set()
        self._recorders: dict[str, Recorder] = {}
        self._paces: list[tuple[float, float]] = []  # estimated and real seconds
        folder.mkdir(parents=True, exist_ok=True)

    def run(
        self,
        candidates: Sequence[Candidate],
        *,
        budget_s: float | None = None,
        progress: Callable[[int, str], None] = lambda done, what: None,
    ) -> Outcome:
        """Measure what the files do not hold yet.

        Parameters
        ----------
        candidates
            Most informative first.
        budget_s
            Time after which no further point begins [s].
        progress
            Told the number of points done, and the one that comes.

        Raises
        ------
        DeviceLostError
            If a kernel broke the device; the same run again leaves that point out.
        KeyboardInterrupt
            As it came; every row measured is on disk, and a new run goes on from there.
        """
        began_s = self._clock()
        self.outcome = Outcome(n_points=len(candidates))
        self._lost = lost_points(self.folder, device=self.device.name, software=self.device.software)
        facts = {**self.device.facts(), "device": self.device.name, "software": self.device.software}
        self.log("start", **facts, n_points=len(candidates), seed=self._seed, budget_s=budget_s)
        try:
            for part in self._rounds(candidates):
                self._watch()
                for candidate, again in part:
                    progress(self.outcome.n_done, str(candidate.point))
                    left_s = np.inf if budget_s is None else budget_s - (self._clock() - began_s)
                    self._one(candidate, again=again, left_s=left_s)
            self._watch()
        finally:
            self._close()
            told = {key: value for key, value in vars(self.outcome).items() if isinstance(value, int)}
            self.log("end", **told, drift=round(self.outcome.drift, 4), elapsed_s=self._clock() - began_s)
        return self.outcome

    def to_do(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Points that the files do not hold yet."""
        try:
            return [one for one in candidates if not self._is_done(one.point)]
        finally:
            self._close()

    def log(self, event: str, **values: Any) -> None:
        """Add one line to the log."""
        line = {"event": event, "time": _now(), **values}
        with (self.folder / LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _rounds(self, candidates: Sequence[Candidate]) -> Iterator[list[tuple[Candidate, bool]]]:
        """Rounds in which something is left to do; one point in twenty comes again a round later."""
        rng = np.random.default_rng(self._seed)
        due: list[tuple[Candidate, bool]] = []
        for part in rounds(candidates, ROUND, self._seed):
            part = [one for one in part if not self._is_lost(one.point)]
            todo = [(one, False) for one in part if not self._is_done(one.point)]
            self.outcome.n_before += len(part) - len(todo)
            chosen = [one for one in part if rng.random() < REPEATED_SHARE]
            if todo + due:
                yield todo + due
            due = [(one, True) for one in chosen if self._wants_repeating(one.point)]
        if due:
            yield due

    def _one(self, candidate: Candidate, *, again: bool, left_s: float) -> None:
        if candidate.seconds * self._pace() > left_s:
            self.outcome.n_left += not again
            return
        point = candidate.point
        start_s = self._clock()
        self.log("begin", point=dict(point.columns))
        try:
            with self._hang_watched(candidate.seconds):
                found = self._measured(point)
        except WrongResultError as error:
            self._leave_out("wrong", self.outcome.wrong, point, error)
        except (
            Exception
        ) as error:  # out of memory, a compiler's refusal: the other points are still worth having
            self._stop_if_lost(point, error)
            self._leave_out("skipped", self.outcome.skipped, point, error)
        else:
            took_s = self._clock() - start_s
            self.log("done", seconds=round(took_s, 3), estimated_s=round(candidate.seconds, 3))
            there = self._caches(point, again=again)  # of a run that was killed between two rows of a point
            for one in found:
                if one.cache not in there:
                    self._recorder(point.kind).append(self._row(point, one, again=again))
            self.outcome.n_measured += not again
            self._paces.append((candidate.seconds, took_s))

    def _measured(self, point: Point) -> list[Measured]:
        """Build, check and time a point; its memory is free again afterwards."""
        try:
            return measure(self._build(point, self.device), self.device, seed=self._seed)
        finally:
            self.device.release()

    def _stop_if_lost(self, point: Point, error: Exception) -> None:
        """An illegal access stays: every later call would fail alike, and be taken for its own point's fault."""
        try:
            self.device.synchronize()
        except Exception:
            reason = _reason(error)
            self.log("fatal", point=dict(point.columns), reason=reason)
            rule = f"broke the device ({reason}), nothing more can be measured in this process"
            fix = "the same command leaves this point out and goes on"
            raise DeviceLostError(rule, place=str(point), fix=fix) from error

    @contextmanager
    def _hang_watched(self, estimated_s: float) -> Iterator[None]:
        """End the process, with a traceback, if the point hangs: by a thread that needs no interpreter."""
        if self._hang_s is None:
            yield
            return
        limit_s = max(self._hang_s, _HANG_FACTOR * estimated_s)
        faulthandler.dump_traceback_later(limit_s, exit=True, file=sys.__stderr__ or sys.stderr)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _leave_out(self, event: str, into: list[str], point: Point, error: BaseException) -> None:
        reason = _reason(error)
        into.append(f"{point}: {reason}")
        self.log(event, point=dict(point.columns), reason=reason)

    def _pace(self) -> float:
        """How much longer than estimated the last points took."""
        if len(self._paces) < _PACE_AFTER:
            return 1.0
        estimated_s, real_s = np.sum(self._paces[-ROUND:], axis=0)
        return float(real_s / estimated_s)

    def _watch(self) -> None:
        """Time the sentinel."""
        try:
            time_s = self._sentinel()
        except Exception as error:
            self.log("fatal", reason=_reason(error))
            rule, fix = f"does not run any more ({_reason(error)})", "the same command goes on"
            raise DeviceLostError(rule, place="sentinel", fix=fix) from error
        self.outcome.sentinel_s.append(time_s)
        self.log("sentinel", latency_s=time_s, **vars(self.device.clocks()))

    # ------------------------------------------------------------ rows

    def _row(self, point: Point, found: Measured, *, again: bool) -> dict[str, Any]:
        return {
            **self._key(point), **found.columns(), "date": _now(), "seed": self._seed,
            "held_out": int(point.held_out), "repeat": int(again),
        }  # fmt: skip

    def _key(self, point: Point) -> dict[str, Any]:
        return {"device": self.device.name, "software": self.device.software, **point.columns}

    def _is_lost(self, point: Point) -> bool:
        """Whether an earlier run went down in the point; told once a run."""
        if key_of(point.columns) not in self._lost:
            return False
        self.outcome.lost.append(str(point))
        self.log("lost", point=dict(point.columns), reason="an earlier run ended in it")
        return True

    def _is_done(self, point: Point) -> bool:
        """Whether the file has all rows of the point: one, or one a state of the cache."""
        if not self._recorder(point.kind).seen(self._key(point)):
            return False
        return self._is_whole(self._caches(point, again=False))

    def _wants_repeating(self, point: Point) -> bool:
        """Whether the file has the point, and has not all of it a second time."""
        return self._is_done(point) and not self._is_whole(self._caches(point, again=True))

    def _caches(self, point: Point, *, again: bool) -> set[object]:
        """States of the cache that the file has a point in; None where a row names no state."""
        key = self._key(point)
        rows = self._recorder(point.kind).rows
        return {row.get("cache") for row in rows if bool(row.get("repeat")) is again and _agrees(row, key)}

    @staticmethod
    def _is_whole(found: set[object]) -> bool:
        return None in found or len(found) == 2

    def _close(self) -> None:
        for recorder in self._recorders.values():
            recorder.close()
        self._recorders.clear()

    def _recorder(self, kind: str) -> Recorder:
        if kind not in self._recorders:
            self._recorders[kind] = Recorder(self.folder / f"{kind}.csv", kind)
        return self._recorders[kind]


def _agrees(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


def _reason(error: BaseException) -> str:
    """First line of what an error says."""
    kind = "" if isinstance(error, MoesimError) else f"{type(error).__name__}: "
    return kind + (str(error).splitlines() or ["no reason given"])[0]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def totals(candidates: Iterable[Candidate]) -> dict[str, dict[str, float]]:
    """Points, held-out points and estimated seconds of each family."""
    found: dict[str, dict[str, float]] = {}
    for one in candidates:
        row = found.setdefault(one.point.family, {"points": 0, "held_out": 0, "seconds": 0.0})
        row["points"] += 1
        row["held_out"] += one.point.held_out
        row["seconds"] += one.seconds
    return found
