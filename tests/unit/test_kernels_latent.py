"""Attention on a cached latent: against the reference, and compiled for sm_90."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from calibrate.kernels import KernelError, latent, latent_parts, reference
from tests.kernel_tools import DryRun, Interpreter, compile_sm90, faults


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


def decoded(q: np.ndarray, cache: np.ndarray, width: int, n_sms: int) -> np.ndarray:
    out = latent.latent_decode(
        torch.from_numpy(q), torch.from_numpy(cache), scale=0.2, latent=width, n_sms=n_sms
    )
    return out.numpy()


def operands(
    batch: int, n_heads: int, n_context: int, width: int, rotary: int
) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(n_context)
    shape = (width + rotary,)
    return (
        torch.randn(batch, n_heads, *shape, generator=draw).half(),
        torch.randn(batch, n_context, *shape, generator=draw).half(),
    )


@pytest.mark.parametrize(
    ("batch", "n_heads", "n_context", "n_sms"),
    [
        (1, 1, 1, 1),
        (2, 5, 63, 1),  # heads and keys beyond the last
        (1, 16, 300, 4),  # a few parts
        (3, 16, 257, 132),  # as many parts as steps allow, the last of one key
        (1, 17, 200, 1),  # 64 heads a program
        (2, 70, 130, 132),
    ],
)
def test_latent_attention_agrees_with_the_reference(
    interpreter: Interpreter, batch: int, n_heads: int, n_context: int, n_sms: int
) -> None:
    q, cache = operands(batch, n_heads, n_context, 64, 16)
    found = interpreter(decoded, q.numpy(), cache.numpy(), 64, n_sms)
    expected = reference.latent_decode(q, cache, scale=0.2, latent=64).numpy()
    assert np.abs(found - expected).max() < 4e-3


def test_scores_far_apart_overflow_nothing(interpreter: Interpreter) -> None:
    q, cache = operands(1, 4, 150, 32, 16)
    q *= 40.0
    cache[0, 120] *= 3.0
    found = interpreter(decoded, q.numpy(), cache.numpy(), 32, 132)
    expected = reference.latent_decode(q, cache, scale=0.2, latent=32).numpy()
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() < 2e-2


def test_reference_is_torchs_attention_with_values_cut_from_the_keys() -> None:
    q, cache = operands(2, 3, 9, 32, 16)
    keys = cache.double()[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double()[:, :, None], keys.expand(-1, 3, -1, -1), keys[..., :32].expand(-1, 3, -1, -1), scale=0.2
    )[:, :, 0]
    assert torch.allclose(
        reference.latent_decode(q, cache, scale=0.2, latent=32).double(), expected, atol=2e-3
    )


@pytest.mark.parametrize("n_context", [1, 127, 128, 1000, 4097, 131072])
@pytest.mark.parametrize(("batch", "n_heads"), [(1, 16), (1, 128), (7, 128), (256, 8)])
def test_parts_cover_every_key_once_and_none_is_empty(batch: int, n_heads: int, n_context: int) -> None:
    cut = latent_parts.parts_for(batch, n_heads, n_context, 132)
    assert cut.n_parts * cut.part_keys >= n_context
    assert (cut.n_parts - 1) * cut.part_keys < n_context


def test_keys_are_cut_where_sms_would_stand_idle() -> None:
    one, half, full, long = (latent_parts.parts_for(b, 128, s, 132) for b, s in
                             ((1, 8192), (33, 8192), (66, 8192), (66, 131072)))  # fmt: skip
    assert one.n_parts > 16
    assert half.n_parts == 2  # 66 programs on 132 multiprocessors
    assert full.n_parts == long.n_parts == 1  # one wave as it is
    assert latent_parts.parts_for(67, 128, 8192, 132).n_parts > 1  # two programs more would take a second one


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("block_h", latent_parts.HEADS)
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_latent_attention_compiles_for_hopper(kind: str, block_h: int, whole: bool) -> None:
    unused = f"*{kind}" if whole else "*fp32"
    signature = {
        **dict.fromkeys(("q_ptr", "cache_ptr", "out_ptr"), f"*{kind}"), "sum_ptr": unused, "lse_ptr": unused,
        "scale": "fp32", **dict.fromkeys(("n_heads", "n_context", "part_keys"), "i32"),
    }  # fmt: skip
    constants = {
        "C": 512, "R": 64, "BLOCK_H": block_h, "BLOCK_S": latent_parts.KEYS[block_h], "WHOLE": whole,
    }  # fmt: skip
    made = compile_sm90(
        latent.latent_kernel, signature, constants, num_warps=latent_parts.WARPS[block_h],
        num_stages=latent_parts.STAGES[block_h], divisible=("part_keys",),
    )  # fmt: skip
    assert faults(made, matrix=block_h == 64) == []
    assert made.blocks_per_sm >= latent_parts.PROGRAMS[block_h]
    assert any(form.startswith("LDGSTS.E.BYPASS.128") for form in made.forms), "keys are copied ahead"


@pytest.mark.parametrize("parts", [2, 64])
def test_sum_of_parts_compiles_for_hopper(parts: int) -> None:
    signature = {"sum_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16", "n_parts": "i32"}
    assert faults(compile_sm90(latent.join_kernel, signature, {"C": 512, "PARTS": parts}), matrix=False) == []


def call_of(batch: int, n_heads: int, n_context: int) -> None:
    where = {"dtype": torch.bfloat16, "device": "cpu"}
    latent.latent_decode(
        torch.zeros(batch, n_heads, 576, **where),
        torch.zeros(batch, n_context, 576, **where),
        scale=0.07,
        n_sms=132,
    )


def test_a_call_is_one_launch_or_two() -> None:
    with DryRun() as process:
        alone = process(call_of, 2, 128, 30)
        cut = process(call_of, 2, 128, 4096)
    assert [(one.kernel, one.grid) for one in alone] == [("latent_kernel", (1, 2, 2))]
    assert [(one.kernel, one.grid) for one in cut] == [("latent_kernel", (32, 2, 2)), ("join_kernel", (256,))]


@pytest.mark.parametrize(
    ("q", "cache", "said"),
    [
        ((2, 4, 80), (3, 9, 80), "cache is"),
        ((2, 4, 80), (2, 9, 64), "cache is"),
        ((2, 4, 80), (2, 0, 80), "cache is"),
        ((2, 4, 84), (2, 9, 84), "powers of two"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(q: tuple[int, ...], cache: tuple[int, ...], said: str) -> None:
    with pytest.raises(KernelError, match=said):
        latent.latent_decode(torch.zeros(q).half(), torch.zeros(cache).half(), scale=1.0, latent=64)


def test_types_that_do_not_fit_are_refused() -> None:
    q, cache = torch.zeros(1, 2, 80), torch.zeros(1, 3, 80)
    with pytest.raises(KernelError, match="bfloat16"):
        latent.latent_decode(q, cache, scale=1.0, latent=64)
    with pytest.raises(KernelError, match="contiguous"):
        latent.latent_decode(q.half(), cache.half().mT.contiguous().mT, scale=1.0, latent=64)
