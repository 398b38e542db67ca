"""Dense products: floors, growth, small shapes, launches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from moesim.cost.gemm import dense_gemm_s, gemm_floor_s, launched_s
from moesim.errors import HardwareError
from moesim.hardware.catalog import load_gpu
from moesim.hardware.profile import load_profile
from moesim.work.ops import DenseGemm

GPU = load_gpu("h200-sxm")
FAMILIES = [
    ("torch-cublas", "bfloat16"), ("torch-cublas", "w4a16_mxfp4"), ("vllm-cutlass", "fp8"),
    ("vllm-cutlass", "fp8_block"), ("vllm-deepgemm", "fp8_block"), ("vllm-flashinfer", "fp8_block"),
]  # fmt: skip
LADDER = ("vllm-cutlass", "fp8")
ROWS = np.array([1.0, 7, 16, 17, 64, 65, 128, 129, 256, 300, 1024, 4097, 32768, 1e6])


def params_of(implementation: str, dtype: str, device: str = "h200-sxm") -> dict[str, float]:
    return load_profile(device).family("gemm", implementation, dtype).values()


def seconds(m, n=4096, k=7168, implementation="torch-cublas", dtype="bfloat16", **more):
    in_graph = more.pop("in_graph", True)
    op = DenseGemm(np.asarray(m, dtype=float), n, k, dtype, **more)
    return dense_gemm_s(op, gpu=GPU, params=params_of(implementation, dtype), in_graph=in_graph)


@pytest.mark.parametrize(("implementation", "dtype"), FAMILIES)
@pytest.mark.parametrize(("n", "k"), [(32, 32), (576, 7168), (65536, 128), (128, 65536), (100_000, 100_000)])
def test_never_faster_than_the_roofline(implementation, dtype, n, k):
    floor = gemm_floor_s(ROWS, n, k, gpu=GPU, dtype=dtype)
    assert np.all(seconds(ROWS, n, k, implementation, dtype) >= floor)


@pytest.mark.parametrize(("implementation", "dtype"), [one for one in FAMILIES if one != LADDER])
def test_more_rows_never_cost_much_less(implementation, dtype):
    rows = np.unique(np.geomspace(1, 1e5, 400).round())
    for n, k in [(512, 7168), (7168, 2048), (129280, 7168)]:
        times = seconds(rows, n, k, implementation, dtype)
        assert np.all(times[1:] >= 0.93 * np.maximum.accumulate(times)[:-1])


def test_floor_is_the_slower_of_compute_and_memory():
    few, many = gemm_floor_s(np.array([1.0, 16384.0]), 8192, 8192, gpu=GPU, dtype="bfloat16")
    assert few == pytest.approx(2 * 8192 * 8194 / 4.8e12, rel=1e-6)
    assert many == pytest.approx(2 * 16384 * 8192**2 / 989.4e12, rel=1e-6)


def test_one_row_is_bound_by_reading_the_weights():
    times = seconds([1.0, 8.0, 32.0], 16384, 16384)
    weights_s = 2 * 16384**2 / GPU.hbm_bytes_per_s
    assert np.all(times < 1.4 * weights_s)
    assert times[2] < 1.1 * times[0]


def test_many_rows_are_bound_by_multiplying():
    flops = 2.0 * 8192**3
    assert 0.6 < flops / seconds(8192.0, 8192, 8192) / GPU.peak_flops_per_s("bfloat16") < 0.9
    assert seconds(8192.0, 8192, 8192, "vllm-cutlass", "fp8") < 0.75 * seconds(8192.0, 8192, 8192)


def test_four_bit_weights_help_only_where_weights_are_read():
    few, many = np.array([4.0, 8192.0])
    assert seconds(few, 16384, 16384, dtype="w4a16_mxfp4") < 0.5 * seconds(few, 16384, 16384)
    assert seconds(many, 8192, 8192, dtype="w4a16_mxfp4") == pytest.approx(
        seconds(many, 8192, 8192), rel=0.05
    )


def test_a_cut_reduction_fills_the_gpu():
    """A narrow product with a long reduction has too few tiles; cutting the reduction must pay."""
    params = params_of("torch-cublas", "bfloat16")
    op = DenseGemm(np.array([16.0]), 128, 65536, "bfloat16")
    whole = dense_gemm_s(op, gpu=GPU, params={**params, "max_split": 1.0})
    assert dense_gemm_s(op, gpu=GPU, params=params) < 0.5 * whole


def test_no_rows_cost_nothing_and_shape_is_kept():
    rows = np.zeros((3, 1, 4))
    rows[1] = 5
    times = seconds(rows)
    assert times.shape == rows.shape
    assert np.all(times[0] == 0) and np.all(times[1] > 0)


def test_many_points_are_priced_as_few_are():
    rows = np.random.default_rng(0).integers(0, 300, (30, 61, 4)).astype(float)
    times = seconds(rows)
    assert times.shape == rows.shape
    assert np.allclose(times[:2, :3], seconds(rows[:2, :3]))


def test_separate_kernels_add_and_batched_products_share_one_launch():
    one = seconds([8.0], 512, 128)
    assert seconds([8.0], 512, 128, n_gemms=3) == pytest.approx(3 * one)
    batched = seconds([8.0], 512, 128, batched=128)
    assert one < batched < 20 * one
    assert batched > 128 * gemm_floor_s(np.array([8.0]), 512, 128, gpu=GPU, dtype="bfloat16")


def test_the_host_is_waited_for_only_outside_a_graph():
    eager = seconds([32.0, 32768.0], 7168, 7168, "vllm-deepgemm", "fp8_block", in_graph=False)
    graph = seconds([32.0, 32768.0], 7168, 7168, "vllm-deepgemm", "fp8_block")
    assert eager[0] > 70e-6 > 3 * graph[0]
    assert eager[1] == pytest.approx(graph[1], rel=0.01)
    kernel_s = np.array([1e-6])
    assert launched_s(np.array([1.0]), kernel_s, {}, in_graph=False) is kernel_s


def test_the_host_pads_the_scales_of_rows_that_are_no_multiple_of_4():
    waited = seconds([64.0, 65, 66, 68], 512, 1024, "vllm-deepgemm", "fp8_block", in_graph=False)
    assert waited[0] == pytest.approx(waited[3], rel=0.01)
    assert np.all(waited[1:3] > waited[0] + 4e-6)
    graph = seconds([64.0, 65], 512, 1024, "vllm-deepgemm", "fp8_block")
    assert graph[1] < graph[0] + 1e-6


@pytest.mark.parametrize(("full", "over"), [(128.0, 65.0), (256.0, 129.0), (512.0, 257.0)])
def test_rows_beyond_the_matrix_are_loaded_dearly(full, over):
    """A tile partly filled takes longer than a full one: 333 against 193 us are measured for 129 and 256 rows."""
    times = seconds([over, full], 65536, 8192, *LADDER)
    assert 1.05 < times[0] / times[1] < 2.5
    narrow = seconds([over, full], 1024, 8192, *LADDER)
    assert narrow[0] < 1.1 * narrow[1]


def test_the_ladder_changes_kernel_with_rows_and_columns():
    """129 rows run two tiles of 128 rows where 128 run two of 64, so a product bound by multiplying doubles."""
    times = seconds([128.0, 129.0], 16384, 16384, *LADDER)
    assert times[1] > 1.5 * times[0]
    params = params_of(*LADDER) | {"slim_fraction": 0.01}
    slow, fast = (
        dense_gemm_s(DenseGemm(np.array([32.0]), n, 8192, "fp8"), gpu=GPU, params=params)
        for n in (1280, 1536)
    )
    assert slow > 3 * fast


def test_the_cast_walks_rows_in_steps_of_2048():
    params = params_of(*LADDER) | {
        "compute_fraction": 1.0,
        "l2_ratio": 1e6,
        "hbm_fraction": 1e6,
        "write_fraction": 1e6,
    }
    op = [DenseGemm(np.array([32768.0]), 16, k, "fp8") for k in (1920, 2048, 2176)]
    one, same, more = (dense_gemm_s(each, gpu=GPU, params=params) for each in op)
    assert same - one < 0.2 * (more - same)


def test_casting_activations_costs_by_the_row():
    """From 1 to 32768 rows of a narrow fp8 product, the cast is what grows."""
    params = params_of("vllm-cutlass", "fp8")
    op = DenseGemm(np.array([32768.0]), 64, 128, "fp8")
    without = {name: value for name, value in params.items() if not name.startswith("quantise")}
    assert dense_gemm_s(op, gpu=GPU, params=params) > 2e-4 > 5 * dense_gemm_s(op, gpu=GPU, params=without)


def test_rates_scale_with_the_gpu():
    faster = GPU.model_copy(update={"hbm_bytes_per_s": 2 * GPU.hbm_bytes_per_s})
    op = DenseGemm(np.array([1.0]), 65536, 8192, "bfloat16")
    params = params_of("torch-cublas", "bfloat16")
    ratio = dense_gemm_s(op, gpu=GPU, params=params) / dense_gemm_s(op, gpu=faster, params=params)
    assert 1.9 < ratio < 2.0


def test_unknown_format_is_refused():
    op = dataclasses.replace(DenseGemm(np.array([1.0]), 64, 64, "bfloat16"), dtype="ternary")
    with pytest.raises(HardwareError, match="ternary"):
        dense_gemm_s(op, gpu=GPU, params=params_of("torch-cublas", "bfloat16"))
