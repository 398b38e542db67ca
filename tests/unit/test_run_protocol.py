"""The timing protocol, on a machine whose times are known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from calibrate.run.device import Clocks
from calibrate.run.protocol import (
    MIN_SAMPLES,
    DoesNotFitError,
    WrongResultError,
    measure,
    n_sets_for,
    summarise,
)
from tests.run_fakes import FakeCase, FakeDevice


def timed_calls(device: FakeDevice) -> list[list[Any]]:
    """Calls between each pair of events, those of the first rough timings left out."""
    found: list[list[Any]] = []
    inside = False
    for event in device.events:
        if event == "timed":
            found.append([])
            inside = True
        elif event == "end":
            inside = False
        elif inside:
            found[-1].append(event)
    return found[3:]


def test_cold_and_warm_come_out_as_they_are() -> None:
    device = FakeDevice()
    cold, warm = measure(FakeCase(device, cold_s=30e-6, warm_s=10e-6), device)
    assert (cold.cache, warm.cache) == ("cold", "warm")
    assert cold.latency_s == pytest.approx(30e-6)
    assert warm.latency_s == pytest.approx(10e-6)
    assert cold.n_samples == warm.n_samples == MIN_SAMPLES == 30


@pytest.mark.parametrize("n_kernels", [1, 6])
@pytest.mark.parametrize("warm_s", [2e-6, 100e-6, 2e-3])
def test_what_can_be_captured_is_timed_in_a_graph_short_or_long(warm_s: float, n_kernels: int) -> None:
    """The host needs 20 us a launch: six kernels of 100 us in all would show it."""
    device = FakeDevice()
    found = measure(FakeCase(device, cold_s=1.1 * warm_s, warm_s=warm_s, n_kernels=n_kernels), device)
    assert [one.graph for one in found] == [1, 1]
    assert [one.latency_s for one in found] == pytest.approx([1.1 * warm_s, warm_s])


@pytest.mark.parametrize("lacks", ["graphs", "capture"])
def test_without_a_graph_the_host_shows(lacks: str) -> None:
    device = FakeDevice(has_graphs=lacks != "graphs")
    case = FakeCase(device, cold_s=4e-6, warm_s=2e-6, capturable=lacks != "capture")
    found = measure(case, device)
    assert device.captures == 0
    assert [one.graph for one in found] == [0, 0]
    assert found[1].latency_s == pytest.approx(FakeCase.launch_s)


def test_every_sample_has_data_and_routing_of_its_own() -> None:
    device = FakeDevice()
    measure(FakeCase(device, caches=("cold",)), device)
    data = [{sample for _, _, sample in calls} for calls in timed_calls(device)]
    assert data == [{i} for i in range(1, MIN_SAMPLES + 1)]


def test_cold_calls_of_one_timing_share_no_buffers_and_follow_a_flush() -> None:
    device = FakeDevice()
    measure(FakeCase(device, cold_s=10e-6, n_sets=4, caches=("cold",)), device)
    for calls in timed_calls(device):
        sets = [index for _, index, _ in calls]
        assert len(sets) == len(set(sets)) == 4
    before = [device.events[i - 1] for i, event in enumerate(device.events) if event == "timed"][3:]
    assert set(before) == {"flush"}


def test_calls_that_no_graph_holds_rotate_through_all_buffers() -> None:
    device = FakeDevice()
    case = FakeCase(device, cold_s=1e-3, warm_s=1e-3, n_sets=3, caches=("cold",), capturable=False)
    measure(case, device)
    used = [index for calls in timed_calls(device) for _, index, _ in calls]
    assert used == list(itertools.islice(itertools.cycle(range(3)), MIN_SAMPLES))


def test_warm_calls_are_never_preceded_by_a_flush() -> None:
    device = FakeDevice()
    measure(FakeCase(device, caches=("warm",)), device)
    assert "flush" not in device.events


def test_samples_become_median_and_percentiles() -> None:
    device = FakeDevice()
    case = FakeCase(device, cold_s=1e-3, n_sets=1, caches=("cold",), noise=lambda sample: 1.0 + sample / 100)
    (found,) = measure(case, device)
    times_s = 1e-3 * (1 + np.arange(1, 31) / 100)
    assert found.latency_s == pytest.approx(np.median(times_s))
    assert found.latency_p10_s == pytest.approx(np.quantile(times_s, 0.1))
    assert found.latency_p90_s == pytest.approx(np.quantile(times_s, 0.9))
    assert (
        found.latency_p10_s
        < found.latency_low_s
        <= found.latency_s
        <= found.latency_high_s
        < found.latency_p90_s
    )


def test_the_interval_holds_the_true_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    draws = [
        summarise(rng.lognormal(0, 0.2, 30), cache=None, graph=False, clocks=Clocks(), seed=i)
        for i in range(100)
    ]
    inside = np.mean([one.latency_low_s <= 1.0 <= one.latency_high_s for one in draws])
    assert 0.88 <= inside <= 0.99


def test_columns_are_those_of_the_tables_with_the_clocks() -> None:
    found = summarise(
        np.full(30, 1.23456789e-5), cache="warm", graph=True, clocks=Clocks(1.9e9, None, 50.0), seed=0
    )
    columns = found.columns()
    assert columns["latency_s"] == 1.2346e-5
    assert columns["sm_clock_hz"] == 1.9e9
    assert columns["memory_clock_hz"] is None
    assert columns["graph"] == 1


def test_a_wrong_kernel_is_refused_before_it_is_timed() -> None:
    device = FakeDevice()
    with pytest.raises(WrongResultError):
        measure(FakeCase(device, wrong=WrongResultError("differs")), device)
    assert "timed" not in device.events


def test_a_launch_test_gives_the_time_of_one_kernel() -> None:
    device = FakeDevice()
    case = FakeCase(device, warm_s=200e-6, cold_s=200e-6, n_kernels=100, caches=())
    case.n_units = 100
    case.repeats = False  # type: ignore[misc]
    (found,) = measure(case, device)
    assert found.cache is None
    assert found.latency_s == pytest.approx(2e-6)
    assert {len(calls) for calls in timed_calls(device)} == {1}


@pytest.mark.parametrize(("set_bytes", "expected"), [(100, 16), (400, 5), (5000, 1)])
def test_sets_of_buffers_outweigh_the_cache_twice(set_bytes: int, expected: int) -> None:
    assert n_sets_for(set_bytes, FakeDevice()) == expected


def test_sets_are_as_many_as_memory_allows() -> None:
    device = FakeDevice(free_bytes=1000)
    assert n_sets_for(300, device) == 2
    assert n_sets_for(300, device, shared_bytes=200) == 1
    with pytest.raises(DoesNotFitError, match="needs 800 bytes of the 1e\\+03 that are free"):
        n_sets_for(800, device)
