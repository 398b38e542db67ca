"""The timing protocol on a real device: every case right, clocks read, times between what physics allows."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from calibrate.run.ahead import Chip, compile_ahead
from calibrate.run.cases import build_case, sentinel
from calibrate.run.device import CudaDevice
from calibrate.run.plan import plan_points
from calibrate.run.points import FAMILIES, Plan, Point, Scope, candidates
from calibrate.run.protocol import measure
from calibrate.run.session import Session
from calibrate.schema import Value
from calibrate.tables import read_table
from moesim.hardware import gpu_names, load_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice(0)


@pytest.fixture(scope="module")
def scope(device: CudaDevice) -> Scope:
    return Scope(device.free_bytes(), fp8=torch.cuda.get_device_capability() >= (8, 9))


def middle(plan: Plan, scope: Scope) -> Point:
    """A point of moderate size."""
    points = candidates(plan, scope)
    return points[len(points) // 2]


@pytest.mark.parametrize("plan", FAMILIES, ids=lambda plan: plan.name)
def test_every_family_passes_its_check_and_is_timed(plan: Plan, device: CudaDevice, scope: Scope) -> None:
    if not candidates(plan, scope):
        pytest.skip("not on this device")
    case = build_case(middle(plan, scope), device)
    found = measure(case, device)
    assert [one.cache for one in found] == list(case.caches or (None,))
    for one in found:
        assert 0 < one.latency_p10_s <= one.latency_s <= one.latency_p90_s < 5.0
    if len(found) == 2:
        cold, warm = found
        assert warm.latency_s < 1.2 * cold.latency_s
    device.release()


def timed(device: CudaDevice, kind: str, **columns: Any) -> float:
    row = {"implementation": "torch", "dtype": "bfloat16", **columns}
    found = measure(build_case(Point(kind, "test", row), device), device)[0].latency_s
    device.release()
    return found


def test_rates_are_between_half_and_all_of_the_datasheet(device: CudaDevice) -> None:
    if device.name not in gpu_names():
        pytest.skip("a GPU that the catalog does not have")
    gpu = load_gpu(device.name)
    copied_bytes = 2 * 2**31
    copy_s = timed(device, "memory", op="hbm_copy", n_bytes=2**31)
    assert 0.5 < copied_bytes / copy_s / gpu.hbm_bytes_per_s < 1.0
    product_s = timed(device, "gemm", op="gemm", m=8192, n=8192, k=8192)
    assert 0.5 < 2 * 8192**3 / product_s / gpu.flops_per_s["bfloat16"] < 1.0


def test_a_flush_empties_the_cache(device: CudaDevice) -> None:
    row = {"op": "hbm_read", "implementation": "torch", "dtype": "any", "n_bytes": 2**24}
    cold, warm = measure(build_case(Point("memory", "test", row), device), device)
    assert cold.graph == warm.graph == 1
    assert cold.latency_s > 1.1 * warm.latency_s


def test_pinned_memory_is_faster_than_pageable(device: CudaDevice) -> None:
    pinned_s, pageable_s = (
        timed(device, "transfer", op="h2d", n_bytes=2**28, pinned=pinned, n_streams=1, busy=0)
        for pinned in (1, 0)
    )
    assert 2**28 / pinned_s > 5e9
    assert pinned_s < pageable_s


def test_a_graph_launches_faster_than_the_host(device: CudaDevice) -> None:
    eager_s, graph_s = (
        timed(device, "launch", op="launch", mode=mode, n_kernels=100) for mode in ("eager", "graph")
    )
    assert 2e-7 < graph_s < eager_s < 1e-4


def test_clocks_and_versions_are_known(device: CudaDevice) -> None:
    assert all(word in device.software for word in ("moesim ", "torch ", "triton ", "cuda ", "driver "))
    clocks = device.clocks()
    if clocks.sm_clock_hz is not None:
        assert 1e8 < clocks.sm_clock_hz < 4e9


def found_on_disk(points: list[Point]) -> list[bool]:
    """Whether each kernel that a GPU's launches asked for was there."""
    from triton import knobs

    found: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **rest: found.append(cache_hit)
    for point in points:
        build_case(point, CudaDevice(0)).call(0)
    return found


def test_kernels_compiled_ahead_are_found_by_the_gpu(
    device: CudaDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    row: dict[str, Value] = {
        "op": "moe_ffn", "implementation": "moesim-triton", "n_tokens": 64, "hidden": 256, "intermediate": 256,
        "top_k": 2, "n_experts": 8, "tp": 1, "ep": 2, "load": "balanced",
    }  # fmt: skip
    formats = ("bfloat16", "fp8_block") if torch.cuda.get_device_capability() >= (8, 9) else ("bfloat16",)
    points = [Point("moe_ffn", "x", {**row, "dtype": dtype}) for dtype in formats]
    made = compile_ahead(points, Chip(device.capability or 0, device.n_sms), jobs=2, limit_s=120)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(found_on_disk, points).result(timeout=120)
    assert len(found) == made.n_kernels > 0 and all(found)


def test_a_short_run_is_written_and_read_back(device: CudaDevice, scope: Scope, tmp_path: Path) -> None:
    gpu = load_gpu(device.name if device.name in gpu_names() else "h200-sxm")
    planned = plan_points(["transfers"], scope, gpu, None)  # nothing to compile
    outcome = Session(device, tmp_path, build_case, sentinel(device)).run(planned, budget_s=15.0)
    assert outcome.n_measured > 5
    assert outcome.wrong == [] and outcome.skipped == []
    for path in tmp_path.glob("*.csv"):
        frame = read_table(path).frame
        assert set(frame.device) == {device.name}
