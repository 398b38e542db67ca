"""What is timed computes what it should: every case's own check, on real kernels; and the checks can fail.

Triton kernels run in the interpreter, in float16, because it multiplies the raw bits of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from calibrate.run.points import Point
from calibrate.schema import Value
from tests.kernel_tools import Interpreter

EXPERTS: dict[str, Value] = {
    "dtype": "float16", "n_tokens": 24, "hidden": 128, "intermediate": 64, "top_k": 2, "n_experts": 8, "tp": 1,
    "ep": 2, "load": "power_law_1.2",
}  # fmt: skip
GEMM: dict[str, Value] = {
    "op": "gemm", "implementation": "torch:linear", "dtype": "bfloat16", "m": 48, "n": 128, "k": 96,
}  # fmt: skip
ATTENTION: dict[str, Value] = {
    "op": "attention_prefill", "implementation": "torch:sdpa", "dtype": "bfloat16", "kind": "gqa",
    "kv_dtype": "bfloat16", "batch": 2, "n_query": 40, "n_context": 40, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32,
    "window": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as process:
        yield process


def built(kind: str, columns: dict[str, Value], cache_bytes: int = 2**18) -> Any:
    from calibrate.run.cases import build_case
    from calibrate.run.device import CpuDevice

    device = CpuDevice()
    device.cache_bytes = cache_bytes
    return build_case(Point(kind, "test", columns), device)


def run_and_spoil(kind: str, columns: dict[str, Value]) -> tuple[int, bool]:
    """Check on several batches, then with one matrix changed behind the check's back."""
    import torch

    from calibrate.run.protocol import WrongResultError

    case = built(kind, columns)
    for sample in range(2):
        case.refresh(0, sample)
        case.check()
        case.call(case.n_sets - 1)
    layer = case._layer
    right, layer.w_up = layer.w_up, [torch.roll(w, 1, dims=1) for w in layer.w_up]
    kept = layer._values
    layer._values = lambda matrices, scales, used: kept(
        right if matrices is layer.w_up else matrices, scales, used
    )
    try:
        case.check()
    except WrongResultError:
        return case.n_sets, True
    return case.n_sets, False


@pytest.mark.parametrize(
    ("kind", "op", "implementation"),
    [
        ("moe_ffn", "moe_ffn", "moesim-triton"),
        ("moe_ffn", "moe_ffn", "moesim-padded"),
        ("moe_ffn", "moe_ffn", "moesim-naive"),
        ("moe_step", "moe_permute", "moesim-triton"),
        ("moe_step", "moe_up", "moesim-triton"),
        ("moe_step", "moe_down", "moesim-triton"),
        ("moe_step", "moe_combine", "moesim-triton"),
    ],
)
def test_expert_kernels_pass_their_check_and_a_changed_weight_does_not(
    interpreter: Interpreter, kind: str, op: str, implementation: str
) -> None:
    columns = {"op": op, "implementation": implementation, **EXPERTS}
    n_sets, refused = interpreter(run_and_spoil, kind, columns)
    assert n_sets > 1
    assert refused


LATENT: dict[str, Value] = {
    "op": "attention_decode", "implementation": "moesim-triton", "dtype": "float16", "kind": "mla",
    "kv_dtype": "float16", "batch": 2, "n_query": 1, "n_context": 150, "n_heads": 5, "n_kv_heads": 1,
    "head_dim": 576, "window": 0,
}  # fmt: skip


def latent_and_spoilt() -> tuple[int, bool]:
    """Check on two sets of queries, then against a cache that is not the one attended to."""
    from calibrate.run.protocol import WrongResultError

    case = built("attention", LATENT)
    for sample in range(2):
        case.refresh(0, sample)
        case.check()
        case.call(case.n_sets - 1)
    decode, other = case._decode, case._cache[0].roll(1, dims=2)
    case._decode = lambda q, cache, **how: decode(q, other, **how)
    try:
        case.check()
    except WrongResultError:
        return case.n_sets, True
    return case.n_sets, False


def test_latent_attention_passes_its_check_and_another_cache_does_not(interpreter: Interpreter) -> None:
    n_sets, refused = interpreter(latent_and_spoilt)
    assert n_sets > 1
    assert refused


def sorted_anew(columns: dict[str, Value]) -> bool:
    """Whether new routing reaches the buffers that a graph holds."""
    case = built("moe_step", columns)
    before = [one.clone() for one in case._tokens[0]]
    addresses = [one.data_ptr() for one in case._tokens[0]]
    case.refresh(0, 5)
    changed = any((old != new).any() for old, new in zip(before, case._tokens[0], strict=True))
    return bool(changed) and addresses == [one.data_ptr() for one in case._tokens[0]]


def test_fresh_routing_goes_into_the_same_buffers(interpreter: Interpreter) -> None:
    assert interpreter(sorted_anew, {"op": "moe_up", "implementation": "moesim-triton", **EXPERTS})


def scratch_of(columns: dict[str, Value]) -> tuple[int, int, int, bool]:
    """Sets, and distinct inputs and outputs of the step among them; whether the inputs are numbers."""
    case = built("moe_step", columns)
    spaces = case._pipeline._spaces
    read = [space.rows if columns["op"] == "moe_combine" else space.h for space in spaces]
    inputs, outputs = ({one.data_ptr() for one in ones} for ones in (read, [space.out for space in spaces]))
    used = [rows[rows.abs().sum(dim=1) > 0] for rows in read]
    return case.n_sets, len(inputs), len(outputs), all(bool(one.isfinite().any()) for one in used)


@pytest.mark.parametrize("op", ["moe_down", "moe_combine"])
def test_sets_of_a_step_share_nothing_that_it_reads(interpreter: Interpreter, op: str) -> None:
    columns = {"op": op, "implementation": "moesim-triton", **EXPERTS}
    n_sets, n_inputs, n_outputs, filled = interpreter(scratch_of, columns)
    assert n_sets > 1
    assert n_inputs == n_outputs == n_sets
    assert filled


def router_checked(scoring: str) -> int:
    import torch

    case = built(
        "router",
        {"op": "router", "implementation": "moesim-triton", "dtype": "bfloat16", "n_tokens": 20, "n_experts": 16,
         "top_k": 4, "hidden": 64, "scoring": scoring},
    )  # fmt: skip
    case._x = [x.to(torch.float16) for x in case._x]
    case._w = [w.to(torch.float16) for w in case._w]
    case.refresh(0, 1)
    case.check()
    return int(case.n_sets)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_router_passes_its_check(interpreter: Interpreter, scoring: str) -> None:
    assert interpreter(router_checked, scoring) > 1


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("gemm", GEMM),
        ("attention", ATTENTION),
        ("attention", {**ATTENTION, "op": "attention_decode", "n_query": 1, "n_context": 70}),
        ("attention", {**ATTENTION, "n_kv_heads": 4}),
        ("memory", {"op": "hbm_read", "implementation": "torch", "dtype": "any", "n_bytes": 2**16}),
        ("memory", {"op": "hbm_copy", "implementation": "torch", "dtype": "any", "n_bytes": 2**16}),
        (
            "launch",
            {"op": "launch", "implementation": "torch", "dtype": "any", "mode": "eager", "n_kernels": 10},
        ),
    ],
)
def test_kernels_of_torch_pass_their_checks_on_every_set(kind: str, columns: dict[str, Value]) -> None:
    case = built(kind, columns)
    for index in range(case.n_sets):
        case.refresh(index, index + 1)
        case.call(index)
    case.check()
    assert case.n_sets > 1 or kind == "launch"


def test_checks_of_products_and_attention_can_fail() -> None:
    import torch

    from calibrate.run.protocol import WrongResultError

    product = built("gemm", GEMM)
    product.call = lambda index: product._y[index].normal_()
    with pytest.raises(WrongResultError):
        product.check()
    attention = built("attention", ATTENTION)
    attention._causal = False
    good = attention._attend
    attention._attend = lambda index: good(index) + 0.1
    with pytest.raises(WrongResultError):
        attention.check()
    launches = built(
        "launch",
        {"op": "launch", "implementation": "torch", "dtype": "any", "mode": "eager", "n_kernels": 10},
    )
    launches.call = lambda index: None
    with pytest.raises(WrongResultError):
        launches.check()
    memory = built("memory", {"op": "hbm_copy", "implementation": "torch", "dtype": "any", "n_bytes": 2**12})
    memory.call = lambda index: None
    memory._to = [torch.full_like(one, torch.nan) for one in memory._to]
    with pytest.raises(WrongResultError):
        memory.check()


def test_new_data_every_sample() -> None:
    for kind, columns, name in (("gemm", GEMM, "_x"), ("attention", ATTENTION, "_q")):
        case = built(kind, columns)
        before = getattr(case, name)[0].clone()
        case.refresh(0, 1)
        assert (before != getattr(case, name)[0]).float().mean() > 0.9
