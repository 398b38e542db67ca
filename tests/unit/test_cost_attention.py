"""Attention: floors, masks, windows, packing of grouped heads, splits, backward."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.attention import Heads, attention_decode_s, attention_prefill_s
from moesim.hardware.catalog import load_gpu
from moesim.hardware.profile import load_profile
from moesim.work.ops import AttentionDecode, AttentionPrefill

GPU = load_gpu("h200-sxm")
PROFILE = load_profile("h200-sxm")


def prefill(
    batch, n_query, n_context=None, heads=(64, 8, 128, 128), window=0, kind="gqa", kv="bfloat16",
    passes="forward",
):  # fmt: skip
    n_query = np.asarray(n_query, dtype=float)
    context = n_query if n_context is None else np.asarray(n_context, dtype=float)
    op = AttentionPrefill(kind, np.asarray(batch, dtype=float), n_query, context, *heads, window, kv, passes)
    family = PROFILE.family("attention_prefill", f"{kind}-fa3", kv)
    return attention_prefill_s(op, gpu=GPU, params=family.values())


def decode(batch, context, heads=(64, 8, 128, 128), window=0, kind="gqa", kv="bfloat16"):
    op = AttentionDecode(
        kind, np.asarray(batch, dtype=float), np.asarray(context, dtype=float), *heads, window, kv
    )
    family = PROFILE.family("attention_decode", f"{kind}-fa3", kv)
    return attention_decode_s(op, gpu=GPU, params=family.values())


LATENT = (128, 1, 576, 512)


@pytest.mark.parametrize("window", [0, 3, 8])
@pytest.mark.parametrize(("n_query", "n_context"), [(1, 1), (6, 6), (4, 9), (1, 12), (9, 9)])
def test_pairs_are_those_of_the_mask(n_query, n_context, window):
    query = np.arange(n_context - n_query, n_context)[:, None]
    key = np.arange(n_context)[None, :]
    mask = key <= query
    if window:
        mask &= key > query - window
    heads = Heads(1, 1, 64, 64, window, 2.0, "gqa")
    assert heads.pairs(np.array([float(n_query)]), np.array([float(n_context)]))[0] == mask.sum()


@pytest.mark.parametrize("kv", ["bfloat16", "fp8"])
@pytest.mark.parametrize("heads", [(64, 8, 128, 128), (1, 1, 64, 64), (40, 40, 256, 256), (96, 8, 128, 128)])
def test_prefill_is_never_faster_than_its_products(heads, kv):
    length = np.array([1.0, 100, 4096, 131072, 1e6])
    pairs = length * (length + 1) / 2
    floor = 2 * 4 * heads[0] * pairs * (heads[2] + heads[3]) / GPU.peak_flops_per_s("bfloat16")
    assert np.all(prefill(4, length, heads=heads, kv=kv) >= floor)


@pytest.mark.parametrize(("kv", "width"), [("bfloat16", 2), ("fp8", 1)])
def test_decode_is_never_faster_than_reading_the_cache(kv, width):
    batch, context = np.array([[1.0], [64.0], [4096.0]]), np.array([1.0, 500, 131072])
    for heads, kind, dims in [((64, 8, 128, 128), "gqa", 8 * 256), (LATENT, "mla", 576)]:
        floor = batch * context * dims * width / GPU.hbm_bytes_per_s
        times = decode(batch, context, heads, kind=kind, kv=kv)
        assert times.shape == (3, 3)
        assert np.all(times >= floor)


def test_more_work_never_costs_less():
    length = np.unique(np.geomspace(1, 2e5, 200).round())
    for call in (lambda x: prefill(2, x), lambda x: decode(8, x), lambda x: decode(x, 900.0)):
        times = call(length)
        assert np.all(times[1:] >= 0.93 * np.maximum.accumulate(times)[:-1])


def test_long_decode_nears_memory_and_long_prefill_nears_compute():
    cache_s = 64 * 32768 * 8 * 256 * 2 / GPU.hbm_bytes_per_s
    assert cache_s < decode(64, 32768) < 1.3 * cache_s
    flops = 4 * 64 * 128 * 16384**2 / 2 * 4
    assert 0.5 < flops / prefill(4, 16384) / GPU.peak_flops_per_s("bfloat16") < 0.8


def test_a_causal_mask_halves_the_work_of_a_whole_one():
    fresh, cached = prefill(8, 8192), prefill(8, 8192, 1_000_000)
    assert cached > 50 * fresh
    assert prefill(8, 1024, 8192) < 0.4 * fresh


def test_a_window_bounds_decode_and_makes_prefill_linear():
    narrow = decode(32, [4096.0, 131072.0], window=128)
    assert narrow[1] == pytest.approx(narrow[0])
    assert narrow[1] < 0.2 * decode(32, 131072)
    short, long = prefill(4, [8192.0, 16384.0], window=128)
    assert long / short == pytest.approx(2, rel=0.05)
    assert prefill(4, 512, window=100_000) == pytest.approx(prefill(4, 512))
    assert decode(4, 512, window=100_000) == pytest.approx(decode(4, 512))


def test_heads_of_a_group_share_one_read_of_the_cache():
    one, eight, many = (decode(64, 16384, (n, 1, 128, 128)) for n in (1, 8, 64))
    assert eight < 1.2 * one
    assert many < 2 * one
    assert decode(64, 16384, (8, 8, 128, 128)) > 4 * eight


def test_a_short_batch_is_split_over_the_sms():
    """One sequence on one KV head would use one SM of 132; split, it must beat 20 of them."""
    cache_s = 131072 * 512 / GPU.hbm_bytes_per_s
    assert decode(1, 131072, (8, 1, 128, 128)) < 132 / 20 * cache_s
    assert prefill(1, 128, 131072, (8, 1, 128, 128)) < 0.4 * prefill(8, 128, 131072, (8, 1, 128, 128))


def test_absorbed_mla_reads_the_latent_once():
    latent = decode(128, 8192, LATENT, kind="mla")
    cache_s = 128 * 8192 * 576 * 2 / GPU.hbm_bytes_per_s
    assert cache_s < latent < 2.2 * cache_s
    assert latent < 0.2 * decode(128, 8192, (128, 128, 192, 128))


def test_the_measured_fp8_latent_pays_for_widening_its_cache():
    assert decode(128, 8192, LATENT, kind="mla", kv="fp8") > 3 * decode(128, 8192, LATENT, kind="mla")


def test_plain_mla_prefill_multiplies_less_than_absorbed():
    assert prefill(1, 8192, heads=(128, 128, 192, 128), kind="mla") < 0.5 * prefill(
        1, 8192, heads=LATENT, kind="mla"
    )


def test_backward_costs_five_products_for_two():
    forward, backward = prefill(1, 8192), prefill(1, 8192, passes="backward")
    assert 2.5 * forward < backward < 4 * forward


def test_nothing_costs_nothing():
    assert np.all(prefill([0.0, 4.0], [16.0, 0.0]) == 0)
    assert np.all(decode([0.0], [100.0]) == 0)
    assert np.isfinite(decode(4, 0)) and decode(4, 0) > 0
