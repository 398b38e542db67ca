"""How one point is timed: fresh data each sample, cold and warm apart, graphs where launches would show, medians.

The rules and why they are so: docs/calibration.md, "Measure one node".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from calibrate.run.device import Clocks, Device
from moesim.errors import MeasurementError

__all__ = [
    "MIN_SAMPLES", "TIMED_S", "Cache", "Case", "DoesNotFitError", "Measured", "WrongResultError", "check_close",
    "measure", "n_sets_for", "summarise",
]  # fmt: skip

Cache = Literal["cold", "warm"]

MIN_SAMPLES = 30
TIMED_S = 100e-6
"""Shorter calls are repeated within one timing, so that the events' own half microsecond does not show."""
MAX_CALLS = 16
"""Calls within one timing at most."""
N_RESAMPLES = 999
"""Bootstrap resamples behind a 95% interval."""
MEMORY_SHARE = 0.7
"""Part of the free memory that a point's buffers may take; outputs and scratch need some as well."""


class DoesNotFitError(MeasurementError):
    """A point larger than the memory that is free; skipped, and said so in the log."""


class WrongResultError(MeasurementError):
    """A kernel whose result is not its reference's; never timed."""


class Case(Protocol):
    """One point, ready to be run again and again."""

    n_kernels: int
    """Kernels of one call, launches that the host makes."""
    n_units: int
    """What a call's time is divided by: 1, or the kernels of a launch test."""
    repeats: bool
    """Whether short calls may follow each other within one timing."""
    capturable: bool
    """Whether a call can be captured: it asks the host for nothing."""
    caches: tuple[Cache, ...]
    """States of the cache that mean something for it; none where only one does."""
    n_sets: int
    """Sets of buffers, each with its own data; together larger than the cache where memory allows."""

    def refresh(self, index: int, sample: int) -> None:
        """Put new random data, and the routing of sample `sample`, in set `index`."""

    def call(self, index: int) -> None:
        """Run once on set `index`."""

    def check(self) -> None:
        """Compare one call with the reference; MeasurementError if it is wrong."""


@dataclass(frozen=True)
class Measured:
    """One row's worth of samples."""

    latency_s: float
    """Median."""
    latency_p10_s: float
    latency_p90_s: float
    latency_low_s: float
    """Lower end of the 95% bootstrap interval of the median."""
    latency_high_s: float
    """Upper end."""
    n_samples: int
    cache: Cache | None
    graph: int
    clocks: Clocks

    def columns(self) -> dict[str, float | int | str | None]:
        """As columns of a measured table, times to five digits."""
        values = {key: value for key, value in vars(self).items() if key != "clocks"}
        rounded = {key: float(f"{value:.5g}") for key, value in values.items() if isinstance(value, float)}
        return values | rounded | vars(self.clocks)


def measure(case: Case, device: Device, *, n_samples: int = MIN_SAMPLES, seed: int = 0) -> list[Measured]:
    """Check a point against its reference, then time it.

    Parameters
    ----------
    case
        The point.
    device
        Where it runs.
    n_samples
        Timings per state of the cache, each on fresh data.
    seed
        Of the bootstrap.

    Returns
    -------
    One entry a state of the cache.

    Raises
    ------
    MeasurementError
        If the kernel's result is wrong.
    """
    case.refresh(0, 0)
    case.check()
    graph = case.capturable and device.has_graphs
    rough_s = _rough_s(case, device, graph=graph)
    found = []
    for cache in case.caches or (None,):
        n_calls = _calls_per_timing(rough_s, case.n_sets, cache) if case.repeats else 1
        times_s = _times_s(case, device, cache, n_calls, n_samples, graph=graph) / case.n_units
        found.append(summarise(times_s, cache=cache, graph=graph, clocks=device.clocks(), seed=seed))
    return found


def _rough_s(case: Case, device: Device, *, graph: bool) -> float:
    """First timing, the best of three after a warm-up.

    Whatever can be captured is timed in a graph, long or short: a call of several kernels after a flush finds an idle
    device, and the host's launches would be what is measured.
    """
    call = _calls(case, [0])
    run = device.capture(call) if graph else call
    run()
    device.synchronize()
    return min(device.elapsed_s(run) for _ in range(3))


def _times_s(
    case: Case, device: Device, cache: Cache | None, n_calls: int, n_samples: int, *, graph: bool
) -> NDArray[np.float64]:
    """Time of a call in each sample; (n_samples,) [s]. Its graph, and the memory that holds, end with it."""
    sample = _sampler(case, device, cache, n_calls, graph=graph)
    return np.asarray([sample(i) for i in range(n_samples)]) / n_calls


def _calls_per_timing(rough_s: float, n_sets: int, cache: Cache | None) -> int:
    """Calls between two events: cold ones need a set of buffers each."""
    wanted = math.ceil(TIMED_S / max(rough_s, 1e-9))
    return max(1, min(wanted, MAX_CALLS, n_sets if cache == "cold" else MAX_CALLS))


def _sampler(
    case: Case, device: Device, cache: Cache | None, n_calls: int, *, graph: bool
) -> Callable[[int], float]:
    """Make the function that takes sample number i, in seconds for all its calls."""
    captured = device.capture(_calls(case, _sets(case, cache, n_calls, 0))) if graph else None

    def sample(i: int) -> float:
        # a graph holds the addresses that it was captured with: its sets stay, their data changes
        sets = _sets(case, cache, n_calls, 0 if captured else i)
        for index in dict.fromkeys(sets):
            case.refresh(index, i + 1)
        run = captured or _calls(case, sets)
        if cache == "cold":
            device.flush_cache()
        else:
            run()  # fills the cache, and keeps the device busy while the timed calls are queued
        return device.elapsed_s(run)

    return sample


def _sets(case: Case, cache: Cache | None, n_calls: int, sample: int) -> list[int]:
    """Set of each call of one timing: another one each where the cache is to be cold, else the same."""
    if cache == "cold":
        return [(sample * n_calls + j) % case.n_sets for j in range(n_calls)]
    return [sample % case.n_sets] * n_calls


def _calls(case: Case, sets: list[int]) -> Callable[[], None]:
    def run() -> None:
        for index in sets:
            case.call(index)

    return run


def n_sets_for(set_bytes: float, device: Device, *, shared_bytes: float = 0.0) -> int:
    """Sets of buffers that together are twice the cache, as far as memory allows.

    Parameters
    ----------
    set_bytes
        One set.
    device
        Gives cache and free memory.
    shared_bytes
        Buffers that all sets share.

    Raises
    ------
    DoesNotFitError
        If not even one set fits.
    """
    free_bytes = MEMORY_SHARE * device.free_bytes() - shared_bytes
    if set_bytes > free_bytes:
        rule = f"needs {set_bytes + shared_bytes:.3g} bytes of the {device.free_bytes():.3g} that are free"
        raise DoesNotFitError(rule)
    wanted = math.ceil(2 * device.cache_bytes / max(set_bytes, 1.0))
    return max(1, min(wanted, MAX_CALLS, int(free_bytes / max(set_bytes, 1.0))))


def check_close(found: Any, expected: Any, *, tolerance: float) -> None:
    """Compare two tensors by the size of their difference over that of the expected one.

    Raises
    ------
    WrongResultError
        If it is above `tolerance`, or is no number.
    """
    found, expected = found.double(), expected.double()
    error = float((found - expected).norm() / expected.norm())
    if not error <= tolerance:
        raise WrongResultError(
            f"differs from its reference by more than {tolerance:g}", value=round(error, 4)
        )


def summarise(
    times_s: NDArray[np.float64], *, cache: Cache | None, graph: bool, clocks: Clocks, seed: int
) -> Measured:
    """Median, its bootstrap interval, and the spread of the samples."""
    low_s, high_s = _median_interval(times_s, seed)
    p10_s, median_s, p90_s = (float(q) for q in np.quantile(times_s, (0.1, 0.5, 0.9)))
    return Measured(median_s, p10_s, p90_s, low_s, high_s, int(times_s.size), cache, int(graph), clocks)


def _median_interval(times_s: NDArray[np.float64], seed: int) -> tuple[float, float]:
    found = bootstrap(
        (times_s,), np.median, n_resamples=N_RESAMPLES, method="percentile", random_state=np.random.default_rng(seed)
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
