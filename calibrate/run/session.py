"""One run: rounds of points, a sentinel before each, rows on disk as they come, and the log of what was left out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.recorder import Recorder
from calibrate.run.design import Candidate, rounds
from calibrate.run.device import Device
from calibrate.run.points import Point
from calibrate.run.protocol import Case, Measured, WrongResultError, measure
from moesim.errors import MoesimError

__all__ = ["DRIFT_LIMIT", "Build", "Outcome", "Session"]

Build = Callable[[Point, Device], Case]
"""Makes a point ready to run."""

ROUND = 20
"""Points between two sentinels."""
REPEATED_SHARE = 0.05
DRIFT_LIMIT = 0.03
"""Change of the sentinel's time that is called out."""
LOG = "log.jsonl"
_PACE_AFTER = 5
"""Points after which the time left is judged by what points took rather than by the estimate alone."""


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
        return self.n_measured + self.n_before + len(self.skipped) + len(self.wrong)


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
    ) -> None:
        self.device = device
        self.folder = folder
        self.outcome = Outcome()
        self._build = build
        self._sentinel = sentinel
        self._seed = seed
        self._clock = clock
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
        KeyboardInterrupt
            As it came; every row measured is on disk, and a new run goes on from there.
        """
        began_s = self._clock()
        self.outcome = Outcome(n_points=len(candidates))
        self.log("start", **self.device.facts(), n_points=len(candidates), seed=self._seed, budget_s=budget_s)
        try:
            for part in self._rounds(candidates):
                self._watch()
                for candidate, again in part:
                    progress(self.outcome.n_done, str(candidate.point))
                    left_s = np.inf if budget_s is None else budget_s - (self._clock() - began_s)
                    self._one(candidate, again=again, left_s=left_s)
            self._watch()
        finally:
            for recorder in self._recorders.values():
                recorder.close()
            self._recorders.clear()
            told = {key: value for key, value in vars(self.outcome).items() if isinstance(value, int)}
            self.log("end", **told, drift=round(self.outcome.drift, 4), elapsed_s=self._clock() - began_s)
        return self.outcome

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
        try:
            found = self._measured(point)
        except WrongResultError as error:
            self._leave_out("wrong", self.outcome.wrong, point, error)
        except (
            Exception
        ) as error:  # out of memory, a compiler's refusal: the other points are still worth having
            self._leave_out("skipped", self.outcome.skipped, point, error)
        else:
            for one in found:
                self._recorder(point.kind).append(self._row(point, one, again=again))
            self.outcome.n_measured += not again
            self._paces.append((candidate.seconds, self._clock() - start_s))

    def _measured(self, point: Point) -> list[Measured]:
        """Build, check and time a point; its memory is free again afterwards."""
        try:
            return measure(self._build(point, self.device), self.device, seed=self._seed)
        finally:
            self.device.release()

    def _leave_out(self, event: str, into: list[str], point: Point, error: BaseException) -> None:
        kind = "" if isinstance(error, MoesimError) else f"{type(error).__name__}: "
        reason = kind + (str(error).splitlines() or ["no reason given"])[0]
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
        time_s = self._sentinel()
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

    def _is_done(self, point: Point) -> bool:
        """Whether the file has the point."""
        return self._recorder(point.kind).seen(self._key(point))

    def _wants_repeating(self, point: Point) -> bool:
        """Whether the file has the point, and has it once."""
        key = self._key(point)
        rows = self._recorder(point.kind).rows
        return self._is_done(point) and not any(row.get("repeat") and _agrees(row, key) for row in rows)

    def _recorder(self, kind: str) -> Recorder:
        if kind not in self._recorders:
            self._recorders[kind] = Recorder(self.folder / f"{kind}.csv", kind)
        return self._recorders[kind]


def _agrees(row: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in key.items())


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
