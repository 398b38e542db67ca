"""The order of points: any prefix must be a good design."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from calibrate.run.compiled import COMPILE_S, kernels_of, with_compiling
from calibrate.run.design import Candidate, informative_order, interleave, log_sizes, rounds, with_held_out
from calibrate.run.estimate import measuring_s, predicted_s, sensitivity
from calibrate.run.plan import LONGEST_S, family_order, plan_points
from calibrate.run.points import FAMILIES, Point, Scope, candidates
from moesim.hardware import load_gpu
from moesim.hardware.profile import load_profile

H200 = load_gpu("h200-sxm")
PROFILE = load_profile("h200-sxm")
SCOPE = Scope(H200.memory_bytes, fp8=True)
Array = NDArray[np.float64]


def points_of(name: str) -> list[Point]:
    return candidates(next(one for one in FAMILIES if one.name == name), SCOPE)


def test_a_family_without_a_held_out_point_has_an_order() -> None:
    assert log_sizes([]).shape == (0, 0)


def worst_error(sensitivity: Array, chosen: NDArray[np.int_], noise: float = 0.05) -> float:
    """Largest standard error of a predicted log time over all candidates, after a fit to those chosen."""
    x = sensitivity[chosen]
    information = x.T @ x / noise**2 + np.eye(x.shape[1]) * 1e-2
    return float(
        np.sqrt(np.einsum("ij,jk,ik->i", sensitivity, np.linalg.inv(information), sensitivity).max())
    )


@pytest.mark.parametrize(
    "name",
    [
        "moe_ffn bfloat16",
        "moe_ffn fp8_block",
        "gemm bfloat16",
        "gemm fp8",
        "attention prefill",
        "attention decode",
    ],
)
def test_a_fit_on_the_first_points_is_better_determined_than_on_random_ones(name: str) -> None:
    points = points_of(name)
    slopes = sensitivity(points, H200, PROFILE)
    assert slopes.shape[1] >= 5, "the cost model has parameters to learn"
    order = np.asarray(informative_order(slopes, log_sizes([p.columns for p in points]), 40))
    rng = np.random.default_rng(0)
    for k in (12, 20, 40):
        at_random = [worst_error(slopes, rng.choice(len(points), k, replace=False)) for _ in range(40)]
        assert worst_error(slopes, order[:k]) < np.quantile(at_random, 0.1)


@pytest.mark.parametrize("k", [6, 12, 24])
def test_without_a_cost_model_the_first_points_fill_the_space(k: int) -> None:
    points = points_of("transfers")
    z = log_sizes([p.columns for p in points])
    order = informative_order(np.zeros((len(points), 0)), z, k)

    def emptiest(chosen: list[int]) -> float:
        """Largest distance of a candidate to its nearest measured one."""
        return float(np.linalg.norm(z[:, None] - z[None, chosen], axis=2).min(axis=1).max())

    rng = np.random.default_rng(0)
    at_random = [emptiest(rng.choice(len(points), k, replace=False).tolist()) for _ in range(40)]
    assert emptiest(order) <= np.quantile(at_random, 0.25)


def test_no_point_is_taken_twice_and_a_longer_order_only_adds() -> None:
    z = np.random.default_rng(1).normal(size=(50, 3))
    long = informative_order(np.zeros((50, 0)), z, 50)
    assert sorted(long) == list(range(50))
    assert informative_order(np.zeros((50, 0)), z, 10) == long[:10]


def test_slopes_are_those_of_the_cost_model() -> None:
    """A product bound by memory follows the memory's rate; one bound by arithmetic does not."""
    columns = {"op": "gemm", "implementation": "torch:linear", "dtype": "bfloat16"}
    small = Point("gemm", "x", {**columns, "m": 1, "n": 36864, "k": 7168})
    large = Point("gemm", "x", {**columns, "m": 16384, "n": 36864, "k": 7168})
    slopes = sensitivity([small, large], H200, PROFILE)
    by_memory, by_arithmetic = slopes
    follows_memory = int(np.argmin(by_memory))
    assert by_memory[follows_memory] < -0.7
    assert abs(by_arithmetic[follows_memory]) < 0.2


def test_estimates_follow_the_base_profile_and_fall_back_on_the_roofline() -> None:
    columns = {
        "op": "gemm",
        "implementation": "torch:linear",
        "dtype": "bfloat16",
        "m": 8192,
        "n": 8192,
        "k": 8192,
    }
    points = [Point("gemm", "x", columns)]
    floor_s = 2 * 8192**3 / 989.4e12
    known_s = predicted_s(points, H200, PROFILE)[0]
    assert floor_s < known_s < 2 * floor_s
    assert predicted_s(points, H200, None)[0] == pytest.approx(2 * floor_s + 1e-5)
    assert measuring_s(points, np.asarray([known_s]))[0] > 30 * known_s


def test_a_fifth_of_any_prefix_is_held_out() -> None:
    merged = with_held_out([f"f{i}" for i in range(80)], [f"h{i}" for i in range(20)])
    assert [one for one in merged if one[0] == "f"] == [f"f{i}" for i in range(80)]
    for n in range(10, 101):
        assert abs(sum(one[0] == "h" for one in merged[:n]) - n / 5) <= 1


def test_families_get_their_share_of_the_time() -> None:
    queues = {"cheap": [("c", 1.0)] * 100, "dear": [("d", 5.0)] * 100}
    served = interleave(queues, {"cheap": 0.5, "dear": 0.5})
    assert len(served) == 200
    first = served[:60]
    assert abs(first.count("c") * 1.0 - first.count("d") * 5.0) <= 5.0


def test_rounds_keep_every_point_in_its_round_in_an_order_that_the_seed_decides() -> None:
    parts = rounds(list(range(50)), 20, seed=3)
    assert [sorted(part) for part in parts] == [list(range(20)), list(range(20, 40)), list(range(40, 50))]
    assert parts == rounds(list(range(50)), 20, seed=3)
    assert parts != rounds(list(range(50)), 20, seed=4)
    assert list(itertools.chain(*parts)) != list(range(50))


def test_a_family_has_as_many_points_as_it_is_given_and_a_fifth_held_out() -> None:
    for family in FAMILIES:
        order = family_order(family, SCOPE, H200, None)
        assert len(order) == min(family.quota, len(candidates(family, SCOPE)))
        assert max(one.seconds for one in order) <= LONGEST_S
        if family.kind != "launch":
            assert sum(one.point.held_out for one in order) == pytest.approx(0.2 * family.quota, abs=1)


def test_the_first_two_minutes_of_a_run_have_points_of_every_family() -> None:
    planned = plan_points(["kernels", "transfers"], SCOPE, H200, None)
    spent_s = np.cumsum([one.seconds for one in planned])
    first = {one.point.family for one, at_s in zip(planned, spent_s, strict=True) if at_s <= 120}
    assert first == {family.name for family in FAMILIES}
    compiled_s = COMPILE_S * len(frozenset.union(*(kernels_of(one.point, H200) for one in planned)))
    assert spent_s[-1] - compiled_s < 6 * 60
    assert 100 <= compiled_s <= 200


def test_a_kernel_is_compiled_for_the_first_point_that_needs_it() -> None:
    columns = {
        "op": "moe_ffn", "implementation": "moesim-triton", "dtype": "bfloat16", "n_tokens": 1024, "hidden": 2048,
        "intermediate": 768, "top_k": 8, "n_experts": 128, "tp": 1, "ep": 1, "load": "balanced",
    }  # fmt: skip

    def told(*changes: dict[str, str | int]) -> list[float]:
        points = [Point("moe_ffn", "x", {**columns, **change}) for change in changes]
        return [one.seconds - 1.0 for one in with_compiling([Candidate(p, 1.0) for p in points], H200)]

    first, again = told({}, {"load": "power_law_1.2"})
    assert first == 6 * COMPILE_S, "three of the sort, two products, a sum"
    assert again == 0
    _, other_tile, other_format = told({}, {"n_tokens": 16384}, {"dtype": "fp8_block"})
    assert other_tile >= 2 * COMPILE_S and other_format >= 3 * COMPILE_S
    assert told({"implementation": "moesim-naive"}) == [0.0], "torch's own kernels come compiled"
    assert told({"op": "moe_permute"}) == [3 * COMPILE_S]


def test_sort_kernels_are_counted_by_the_sizes_that_they_are_compiled_for() -> None:
    from calibrate.kernels import permute
    from calibrate.run import compiled

    assert (compiled._ONE_PROGRAM, compiled._CHUNK) == (permute.ONE_PROGRAM, permute.CHUNK)
    for n in (1, 16, 17, 64, 65, 1000, 2048):
        assert compiled._power_of_4(n) == permute._power_of_4(n)


def test_filling_four_gigabytes_anew_each_sample_takes_time() -> None:
    row = {"op": "hbm_copy", "implementation": "torch", "dtype": "any"}
    points = [Point("memory", "x", {**row, "n_bytes": 2**power}) for power in (20, 32)]
    small_s, large_s = measuring_s(points, np.asarray([1e-5, 1e-5]))
    assert large_s - small_s > 0.7, "60 fills of 4 GiB at some hundred gigabytes a second"
