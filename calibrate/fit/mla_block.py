"""DeepSeek-V3's whole attention block as the sum of its products and its attention.

Nothing is fitted here: the block's table checks that its parts add up. docs/fits/attention.md has the figures.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray
from calibrate.fit.family import Key, known_family
from moesim.cost.attention import attention_decode_s
from moesim.cost.gemm import dense_gemm_s
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Profile
from moesim.work.ops import AttentionDecode, DenseGemm

__all__ = ["decode_block_s", "missing_family"]

_HIDDEN, _QUERY_RANK, _LATENT, _ROTARY, _HEAD = 7168, 1536, 512, 64, 128
"""DeepSeek-V3 report, section 4.2: hidden, rank of queries, rank and rotary part of the cache, head dimension."""
_BLOCK: Key = ("gemm", "vllm-deepgemm", "fp8_block")
_PLAIN: Key = ("gemm", "torch-cublas", "bfloat16")
_ATTENTION: Key = ("attention_decode", "mla-fa3", "bfloat16")
"""The fp8 latent's own family widens the whole cache first, which the block does not show."""


def missing_family(profile: Profile) -> str | None:
    """Name of a family that the block needs and the profile lacks."""
    return next(
        (" ".join(key) for key in (_BLOCK, _PLAIN, _ATTENTION) if known_family(profile, key) is None), None
    )


def decode_block_s(rows: pd.DataFrame, gpu: Gpu, profile: Profile) -> FloatArray:
    """Time of the block for one token a sequence, from a CUDA graph [s]; columns batch, n_context, n_heads.

    Three fp8_block products, two batched ones into and out of the latent, and absorbed attention.
    """
    time_s = np.zeros(len(rows))
    heads = rows["n_heads"].to_numpy()
    for n_heads in np.unique(heads):
        here = heads == n_heads
        batch, context = (rows[name].to_numpy(dtype=float)[here] for name in ("batch", "n_context"))
        time_s[here] = _one_layout_s(batch, context, int(n_heads), gpu, profile)
    return time_s


def _one_layout_s(
    batch: FloatArray, context: FloatArray, n_heads: int, gpu: Gpu, profile: Profile
) -> FloatArray:
    block, plain = (profile.family(*key).values() for key in (_BLOCK, _PLAIN))
    products = (
        (_QUERY_RANK + _LATENT + _ROTARY, _HIDDEN),
        (n_heads * (_HEAD + _ROTARY), _QUERY_RANK),
        (_HIDDEN, n_heads * _HEAD),
    )
    time_s = np.zeros_like(batch)
    for n, k in products:
        time_s = time_s + dense_gemm_s(DenseGemm(batch, n, k, "fp8_block"), gpu=gpu, params=block)
    for n, k in ((_LATENT, _HEAD), (_HEAD, _LATENT)):
        product = DenseGemm(batch, n, k, "bfloat16", batched=n_heads)
        time_s = time_s + dense_gemm_s(product, gpu=gpu, params=plain)
    attention = AttentionDecode(
        "mla", batch, context + 1, n_heads, 1, _LATENT + _ROTARY, _LATENT, 0, "bfloat16"
    )
    return time_s + attention_decode_s(attention, gpu=gpu, params=profile.family(*_ATTENTION).values())
