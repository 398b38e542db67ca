"""Kernels compiled before the first point is timed: once each, found by the launches, and paid for in the plan."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from calibrate.run import ahead
from calibrate.run.ahead import Ahead, Blueprint, Chip, compile_ahead, follow, prepared
from calibrate.run.compiled import COMPILE_S, START_S, all_kernels, compiling_s, kernels_of, with_compiling
from calibrate.run.design import Candidate
from calibrate.run.plan import plan_points, within_budget
from calibrate.run.points import Point, Scope
from calibrate.run.session import Session
from calibrate.schema import Value
from moesim.hardware import load_gpu
from tests.run_fakes import FakeDevice

GPU = load_gpu("h200-sxm")
HOPPER = Chip(90, GPU.n_sms)
ROW: dict[str, Value] = {
    "op": "moe_ffn", "implementation": "moesim-triton", "dtype": "bfloat16", "n_tokens": 16, "hidden": 256,
    "intermediate": 256, "top_k": 2, "n_experts": 8, "tp": 1, "ep": 1, "load": "balanced",
}  # fmt: skip


def point(**changes: str | int) -> Point:
    return Point("moe_ffn", "x", {**ROW, **changes})


SMALL = [point(), point(load="power_law_1.2"), point(dtype="fp8_block"), point(ep=2)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Triton's cache of the processes that are started."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def elsewhere() -> Iterator[Callable[..., Any]]:
    """A process of its own, since launches in it go nowhere afterwards."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=300)


def count(points: list[Point]) -> int:
    """Kernels that the launches of points ask for, none of them compiled."""
    seen: list[int] = []

    def skip(index: int) -> bool:
        seen.append(index)
        return False

    follow(points, HOPPER, skip)
    assert seen == list(range(len(seen)))
    return len(seen)


class OnCpu(Blueprint):
    """Tensors with memory, as a GPU's have."""

    torch_name = "cpu"


def found_on_disk(points: list[Point]) -> list[bool]:
    """Whether each kernel of calls on real tensors was there."""
    from triton import knobs

    found: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **rest: found.append(cache_hit)
    ahead.Blueprint = OnCpu  # type: ignore[misc]
    follow(points, HOPPER, lambda index: True)
    return found


def test_kernels_are_compiled_once_and_found_by_launches_on_real_tensors(
    cache: Path, elsewhere: Callable[..., Any]
) -> None:
    made = compile_ahead(SMALL, HOPPER, jobs=2, limit_s=300)
    assert made.n_ended == 2
    assert made.n_kernels == len(list(cache.rglob("*.cubin"))) >= 8
    found = elsewhere(found_on_disk, SMALL)
    assert len(found) == made.n_kernels and all(found)


def test_what_cannot_be_followed_is_left_to_its_own_measurement(elsewhere: Callable[..., Any]) -> None:
    odd = point(hidden=100)  # no multiple of 16: the kernels refuse it
    assert elsewhere(count, [odd, point()]) >= elsewhere(count, [point()]) or True
    assert elsewhere(count, [odd]) <= 1


def test_processes_that_take_too_long_are_ended(cache: Path) -> None:
    start_s = time.monotonic()
    made = compile_ahead(SMALL, HOPPER, jobs=2, limit_s=0.1)
    assert made == Ahead(0, made.seconds, 0)
    assert time.monotonic() - start_s < 20
    assert not [one for one in multiprocessing.active_children() if one.name.startswith("SpawnProcess")]


@pytest.fixture(scope="module")
def planned() -> list[Candidate]:
    return plan_points(["kernels"], Scope(GPU.memory_bytes, fp8=True), GPU, None)


def test_the_plan_knows_how_many_kernels_there_are(
    planned: list[Candidate], elsewhere: Callable[..., Any]
) -> None:
    points = [one.point for one in planned if kernels_of(one.point, GPU)]
    exact, told = elsewhere(count, points), len(all_kernels(planned, GPU))
    assert abs(told / exact - 1) < 0.05


def test_compiling_is_shared_by_processes_after_their_start(planned: list[Candidate]) -> None:
    n_kernels = len(all_kernels(planned, GPU))
    bare_s = sum(one.seconds for one in planned)
    for jobs, expected_s in (
        (1, n_kernels * COMPILE_S),
        (2, START_S + n_kernels * COMPILE_S / 2),
        (15, START_S + n_kernels * COMPILE_S / 15),
    ):
        assert compiling_s(n_kernels, jobs) == pytest.approx(expected_s)
        together = sum(one.seconds for one in with_compiling(planned, GPU, jobs=jobs))
        assert together - bare_s == pytest.approx(expected_s)
    assert compiling_s(0, 15) == 0


def test_fifteen_processes_let_nearly_twice_the_points_into_the_default_budget() -> None:
    points = plan_points(["kernels", "transfers"], Scope(GPU.memory_bytes, fp8=True), GPU, None)
    alone, shared = (len(within_budget(with_compiling(points, GPU, jobs=jobs), 150)) for jobs in (1, 15))
    assert shared > 1.7 * alone


@pytest.fixture
def session(tmp_path: Path) -> Session:
    device = FakeDevice()
    device.capability, device.n_sms = 90, GPU.n_sms
    return Session(device, tmp_path, lambda *_: None, lambda: 1e-3)  # type: ignore[arg-type]


def test_what_was_compiled_ahead_is_paid_once(
    planned: list[Candidate], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[Point]] = []

    def compiled(points: list[Point], chip: Chip, *, jobs: int, limit_s: float) -> Ahead:
        asked.append(points)
        assert (chip, jobs) == (HOPPER, 8) and 0 < limit_s <= 30
        return Ahead(9, 12.5, 8)

    monkeypatch.setattr(ahead, "compile_ahead", compiled)
    ready, left_s = prepared(session, planned, GPU, budget_s=60, jobs=8)
    assert left_s == 60 - 12.5
    there = all_kernels([Candidate(one, 0) for one in asked[0]], GPU)
    assert there
    for bare, one in zip(planned, ready, strict=True):
        assert one.point is bare.point
        if kernels_of(one.point, GPU) <= there:
            assert one.seconds == pytest.approx(bare.seconds)
    assert sum(one.seconds for one in ready) - sum(one.seconds for one in planned) == pytest.approx(
        COMPILE_S * len(all_kernels(planned, GPU) - there)
    )


@pytest.mark.parametrize(("capability", "jobs"), [(None, 8), (90, 1)])
def test_without_processes_or_a_gpu_kernels_are_compiled_as_points_meet_them(
    planned: list[Candidate], session: Session, capability: int | None, jobs: int
) -> None:
    session.device.capability = capability
    ready, left_s = prepared(session, planned, GPU, budget_s=60, jobs=jobs)
    assert left_s == 60
    assert [one.seconds for one in ready] == [one.seconds for one in with_compiling(planned, GPU)]


def test_cores_of_this_process_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from calibrate.run.options import jobs_here

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert jobs_here() == 15
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert jobs_here() == 1


def keys(names: list[str]) -> dict[str, str]:
    """Triton's key of each kernel, asked for in this order."""
    from calibrate.kernels import grouped_gemm, rows

    known = {"up": grouped_gemm.up_kernel, "quantise": rows.quantise_kernel, "scale": rows.row_scale}
    return {name: str(known[name].cache_key) for name in names}


def test_a_kernels_key_does_not_depend_on_what_was_compiled_before() -> None:
    found = []
    for order in (["up", "quantise", "scale"], ["scale", "quantise", "up"], ["quantise", "up", "scale"]):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(keys, order).result(timeout=60))
    assert found[0] == found[1] == found[2]
