"""Shipped expert feed-forward parameters against NVIDIA AIConfigurator's measurements (Apache-2.0)."""

from __future__ import annotations

import numpy as np
import pytest

from calibrate.fit.common import fit_log_least_squares, grouped_folds
from calibrate.fit.moe_ffn import FAMILIES, MeasuredRows, main, rows_of, sample_rows, tokens_per_expert_of_row
from calibrate.statistics import ape_stats
from moesim.hardware.catalog import load_gpu
from moesim.hardware.profile import load_profile

pd = pytest.importorskip("pandas")

CASES = [(device, family) for device in ("h200-sxm", "h100-sxm") for family in FAMILIES]


@pytest.fixture(scope="module")
def table(shared_data):
    """Every measured row."""
    return pd.read_parquet(shared_data / "measured" / "moe_ffn.parquet")


@pytest.mark.parametrize(
    ("device", "family"), CASES, ids=[f"{d}-{f.implementation}-{f.dtype}" for d, f in CASES]
)
def test_shipped_parameters_are_as_good_as_they_say(table, device, family):
    shipped = load_profile(device).family("moe_ffn", family.implementation, family.dtype)
    sample = MeasuredRows.of(sample_rows(rows_of(table, family, device), 400, seed=11))
    predicted = sample.predict(shipped.values(), gpu=load_gpu(device), family=family)
    error = ape_stats(predicted, sample.latency_s)
    assert shipped.held_out is not None
    assert error["median_ape"] <= 1.3 * shipped.held_out.median_ape
    assert abs(error["bias"]) <= 0.06


@pytest.mark.parametrize("implementation", ["sglang-triton", "vllm-triton", "trtllm-cutlass"])
def test_one_gpu_predicts_the_other(table, implementation):
    """Rates are shares of datasheet peaks, so H200's parameters must do for H100."""
    family = next(f for f in FAMILIES if f.implementation == implementation and f.dtype == "fp8_block")
    carried = load_profile("h200-sxm").family("moe_ffn", implementation, "fp8_block")
    sample = MeasuredRows.of(sample_rows(rows_of(table, family, "h100-sxm"), 400, seed=12))
    predicted = sample.predict(carried.values(), gpu=load_gpu("h100-sxm"), family=family)
    assert ape_stats(predicted, sample.latency_s)["median_ape"] < 0.13


def test_fitting_writes_profiles_that_load(table, tmp_path, monkeypatch):
    few = table[table["implementation"] == "sglang:wideep_generation"]
    folder = tmp_path / "data" / "measured"
    folder.mkdir(parents=True)
    few.to_parquet(folder / "moe_ffn.parquet")
    main([str(tmp_path / "data"), "-o", str(tmp_path)])
    for device in ("h200-sxm", "h100-sxm"):
        family = load_profile(device, tmp_path).family("moe_ffn", "sglang-deepep-decode", "fp8_block")
        assert family.held_out is not None
        assert family.held_out.median_ape < 0.12
        assert 0.5 < family.values()["hbm_fraction"] <= 0.96
        assert "0.5.10" in family.provenance.data


@pytest.mark.parametrize("load", ["balanced", "power_law_1.01", "power_law_1.2", "power_law_0.6"])
@pytest.mark.parametrize("n_tokens", [1, 5, 64, 3000])
def test_every_pair_lands_somewhere(load, n_tokens):
    for counts in tokens_per_expert_of_row(n_tokens, 8, 64, 1, load):
        assert counts.sum() == 8 * n_tokens
        assert counts.min() >= 0
        assert counts.max() <= n_tokens


def test_the_busiest_rank_is_the_one_timed():
    for counts in tokens_per_expert_of_row(4096, 8, 64, 8, "power_law_1.2"):
        assert counts.size == 8
        assert counts.sum() > 4096 * 8 / 8
    (balanced,) = tokens_per_expert_of_row(4096, 8, 64, 8, "balanced")
    assert set(balanced.tolist()) == {512}


def test_draws_are_the_same_every_time():
    first = tokens_per_expert_of_row(300, 6, 160, 4, "power_law_1.01")
    tokens_per_expert_of_row.cache_clear()
    again = tokens_per_expert_of_row(300, 6, 160, 4, "power_law_1.01")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])


def test_log_fit_recovers_what_made_the_data():
    x = np.linspace(1, 100, 200)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.02, x.size))
    noise[::20] *= 3  # outliers
    fit = fit_log_least_squares(
        lambda v: v["launch_s"] + v["each_s"] * x + v["fixed"],
        (5.0 + 0.7 * x + 2.0) * noise,
        {"launch_s": 1.0, "each_s": 1.0, "fixed": 2.0},
        {"launch_s": (0.1, 100), "each_s": (0.01, 10), "fixed": (2.0, 2.0)},
    )
    assert fit.values["launch_s"] == pytest.approx(5.0, rel=0.05)
    assert fit.values["each_s"] == pytest.approx(0.7, rel=0.02)
    assert fit.values["fixed"] == 2.0
    assert fit.stderr["fixed"] == 0.0
    assert 0 < fit.stderr["launch_s"] < 0.5


def test_prior_holds_what_the_rows_do_not_tell():
    x = np.linspace(1, 10, 50)
    start, bounds = {"a": 1.0, "b": 1.0}, {"a": (0.01, 100), "b": (0.01, 100)}
    fit = fit_log_least_squares(lambda v: v["a"] * x, 3.0 * x, start, bounds, prior={"a": 9.0, "b": 7.0})
    assert fit.values["a"] == pytest.approx(3.0, rel=0.3)
    assert fit.values["b"] == pytest.approx(7.0, rel=1e-3)


def test_folds_never_part_a_group():
    groups = np.repeat(np.arange(12), 5)
    folds = grouped_folds(groups, 5, seed=3)
    assert len(folds) == 5
    assert np.array_equal(np.sum(folds, axis=0), np.ones(60))
    for fold in folds:
        assert not set(groups[fold]) & set(groups[~fold])
    assert len(grouped_folds(np.zeros(4), 5, seed=3)) == 1
