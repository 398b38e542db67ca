"""What `calibrate run` measures reaches the plans that ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibrate.app import app
from calibrate.fit.common import write_fragment
from calibrate.run.plan import plan_points
from calibrate.run.points import Scope
from moesim.cost.backend import BACKENDS
from moesim.errors import ProfileError
from moesim.hardware import Profile, load_gpu, load_profile
from moesim.plan.answer import run_answer
from moesim.plan.run import price_one, run
from moesim.scenario import Scenario, read_scenario

pd = pytest.importorskip("pandas")

GPU = load_gpu("h200-sxm")
SLOWER = 2.0
LIKE = {
    ("attention_prefill", "gqa-fa3"): "torch:sdpa",
    ("attention_decode", "gqa-fa3"): "torch:sdpa",
    ("moe_ffn", "sglang-triton"): "moesim-triton",
}
LATENT = ("attention_decode", "mla-fa3", "moesim-triton")
"""The same of attention on a latent cache."""
"""Families of the catalog's profile that stand for ours until ours are measured, and what ours are called."""
OURS = ("torch:linear", "torch:sdpa", "moesim-triton")
TEXT = """\
model: {model}
cluster: {{gpu: {gpu}, nodes: 1}}
layout: {{tp: 8, ep: {ep}}}
workload: {{kind: {workload}}}
"""
DECODE = "decode, batch_per_rank: 32, context: 2048"
PREFILL = "prefill, prompt: 2048, tokens_per_rank: 8192"


def scenario(folder: Path, *more: str, model: str = "mixtral-8x7b", gpu: str = "h200-sxm", workload: str = DECODE,
             ep: int = 1) -> Scenario:  # fmt: skip
    file = folder / "scenario.yaml"
    file.write_text(TEXT.format(model=model, gpu=gpu, workload=workload, ep=ep), encoding="utf-8")
    return read_scenario(file, list(more))


def as_if_measured() -> Profile:
    """The catalog's profile with other libraries' bfloat16 kernels under the names of ours."""
    base = load_profile("h200-sxm")
    ours = [
        one.model_copy(update={"implementation": LIKE[one.op, one.implementation]})
        for one in base.families
        if (one.op, one.implementation) in LIKE and one.dtype == "bfloat16"
    ]
    return Profile(device=base.device, families=(*base.families, *ours))


def slow_rows(kind: str, n: int) -> Any:
    """Rows as `calibrate run` writes them, with twice the time that `as_if_measured` gives them."""
    from calibrate.fit.registry import predict_rows

    rows = [
        {**one.point.columns, "device": GPU.name, "software": "test 1"}
        for one in plan_points(["kernels"], Scope(GPU.memory_bytes, fp8=True), GPU, None)
        if one.point.kind == kind and one.point.columns["implementation"] in OURS
        and one.point.columns["dtype"] == "bfloat16" and one.point.columns.get("kind") != "mla"
    ][:n]  # fmt: skip
    frame = pd.DataFrame(rows)
    told = predict_rows(frame.assign(latency_s=1.0), kind, gpu=GPU, profile=as_if_measured())
    assert np.isfinite(told.time_s).all()
    return frame.assign(latency_s=SLOWER * told.time_s)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """`as_if_measured` as a file."""
    write_fragment(
        folder / "plain.yaml", GPU.name, as_if_measured().model_dump(exclude_none=True)["families"]
    )
    return folder / "plain.yaml"


@pytest.fixture(scope="module")
def mine(folder: Path) -> Path:
    """Profile fitted to the slow rows by the command."""
    files = []
    for kind, n in (("gemm", 60), ("attention", 100), ("moe_ffn", 120)):
        rows = slow_rows(kind, n)
        if kind != "moe_ffn":  # whose model knows of the cache
            warm = rows.assign(latency_s=rows["latency_s"] / 10)
            rows = pd.concat([rows.assign(cache="cold"), warm.assign(cache="warm")])
        rows.to_csv(folder / f"{kind}.csv", index=False)
        files.append(str(folder / f"{kind}.csv"))
    line = ["fit", *files, "--device", "h200-sxm", "--base", "h200-sxm", "-o", str(folder / "mine.yaml")]
    app(line, standalone_mode=False)
    return folder / "mine.yaml"


def kernel_s(asked: Scenario) -> dict[str, float]:
    outcome = price_one(asked)
    return {name: float(values[0]) for name, values in outcome.category_s.items()}


def answer_to(asked: Scenario) -> dict[str, Any]:
    return run_answer(run(asked), asked)[0]


def implementations(asked: Scenario) -> dict[str, set[str]]:
    """Implementation, and format, that prices each operator."""
    found: dict[str, set[str]] = {}
    for one in answer_to(asked)["provenance"]:
        op, *kernel = one["what"].split(" / ")
        found.setdefault(op, set()).add(" ".join(kernel))
    return found


@pytest.mark.parametrize("workload", [DECODE, PREFILL], ids=["decode", "prefill"])
def test_kernels_measured_twice_as_slow_take_twice_as_long_in_a_plan(
    workload: str, plain: Path, mine: Path, tmp_path: Path
) -> None:
    usual = kernel_s(scenario(tmp_path, f"profile={plain}", "backend=moesim", workload=workload))
    slow = kernel_s(scenario(tmp_path, f"profile={mine}", "backend=moesim", workload=workload))
    for name in ("expert_ffn", "attention_gemm", "attention"):
        assert slow[name] / usual[name] == pytest.approx(SLOWER, rel=0.2), name
    assert slow["all_reduce"] == usual["all_reduce"]


def test_other_engines_take_only_the_dense_product_that_is_theirs_too(mine: Path, tmp_path: Path) -> None:
    usual = kernel_s(scenario(tmp_path))
    slow = kernel_s(scenario(tmp_path, f"profile={mine}"))
    assert slow["attention_gemm"] / usual["attention_gemm"] == pytest.approx(SLOWER, rel=0.2)
    assert slow["expert_ffn"] == usual["expert_ffn"] and slow["attention"] == usual["attention"]


def test_an_answer_names_the_kernels_that_price_it(mine: Path, tmp_path: Path) -> None:
    found = implementations(scenario(tmp_path, f"profile={mine}", "backend=moesim"))
    assert found["moe_ffn"] == {"moesim-triton bfloat16"}
    assert found["attention_decode"] == {"torch:sdpa bfloat16"}
    assert found["gemm"] == {"torch-cublas bfloat16"}
    assert found["host"] == {"sglang any"}


def test_experts_behind_deepep_are_ours_as_well(plain: Path, tmp_path: Path) -> None:
    asked = scenario(
        tmp_path, f"profile={plain}", "backend=moesim", "layout={tp: 1, ep: 8}", "policy.dispatch=low-latency"
    )
    assert implementations(asked)["moe_ffn"] == {"moesim-triton bfloat16"}
    lacking = scenario(
        tmp_path, f"profile={plain}", "backend=moesim", "layout={tp: 1, ep: 8}", "policy.dispatch=low-latency",
        "dtype=fp8_block",
    )  # fmt: skip
    assert implementations(lacking)["moe_ffn"] == {"sglang-deepep-decode fp8_block"}


@pytest.mark.parametrize(
    ("model", "gpu", "lacking"),
    [
        ("mixtral-8x7b", "h200-sxm", "no moe_ffn by moesim-triton in bfloat16 is in the profile of h200-sxm"),
        ("deepseek-v3", "h100-sxm", "no moe_ffn by moesim-triton in fp8_block is in the profile of h100-sxm"),
        ("llama-3.1-8b", "h200-sxm", "no attention_prefill by torch:sdpa in bfloat16"),
    ],
)
def test_what_nobody_measured_yet_is_refused_with_what_to_do(
    model: str, gpu: str, lacking: str, tmp_path: Path
) -> None:
    asked = scenario(tmp_path, "backend=moesim", model=model, gpu=gpu)
    with pytest.raises(ProfileError, match=lacking) as refused:
        run(asked)
    said = str(refused.value)
    assert said.startswith("backend: 'moesim': ") and "\n" not in said
    assert "fix: moesim calibrate run, then moesim calibrate fit" in said


def test_a_format_that_was_not_measured_is_sglangs_and_that_is_said(plain: Path, tmp_path: Path) -> None:
    asked = scenario(tmp_path, f"profile={plain}", "backend=moesim", "dtype=fp8", "kv_dtype=fp8")
    answer = answer_to(asked)
    for line in (
        "gemm by torch:scaled_mm in fp8 was not measured: vllm-cutlass in fp8 stands in for it",
        "moe_ffn by moesim-triton in fp8 was not measured: vllm-cutlass in fp8 stands in for it",
        "attention_decode by torch:sdpa in fp8 was not measured: gqa-fa3 in fp8 stands in for it",
    ):
        assert line in answer["warnings"]
    assert implementations(asked)["moe_ffn"] == {"vllm-cutlass fp8"}
    measured = scenario(tmp_path, f"profile={plain}", "backend=moesim")
    assert not [line for line in answer_to(measured)["warnings"] if "stands in" in line]


def test_latent_attention_that_was_not_measured_is_flash_attention_3s_and_that_is_said(
    plain: Path, tmp_path: Path
) -> None:
    asked = scenario(tmp_path, f"profile={plain}", "backend=moesim", model="deepseek-v3")
    assert implementations(asked)["attention_decode"] == {"mla-fa3 bfloat16"}
    said = answer_to(asked)["warnings"]
    assert (
        "attention_decode by moesim-triton in bfloat16 was not measured: mla-fa3 in bfloat16 stands in for it"
        in said
    )
    assert any(line.startswith("prompts of latent attention are priced as FlashAttention 3") for line in said)
    assert any(line.startswith("moe_ffn by moesim-triton in fp8_block was not measured") for line in said)


def test_latent_attention_that_was_measured_prices_decoding(plain: Path, tmp_path: Path) -> None:
    known = as_if_measured()
    op, like, ours = LATENT
    measured = [
        one.model_copy(update={"implementation": ours})
        for one in known.families
        if (one.op, one.implementation, one.dtype) == (op, like, "bfloat16")
    ]
    families = [*known.families, *measured]
    told = Profile(device=known.device, families=tuple(families)).model_dump(exclude_none=True)["families"]
    write_fragment(tmp_path / "latent.yaml", GPU.name, told)
    asked = scenario(tmp_path, f"profile={tmp_path / 'latent.yaml'}", "backend=moesim", model="deepseek-v3")
    assert implementations(asked)["attention_decode"] == {"moesim-triton bfloat16"}
    assert not [line for line in answer_to(asked)["warnings"] if line.startswith("attention_decode by")]


def test_training_takes_the_kernels_that_were_measured(plain: Path, tmp_path: Path) -> None:
    workload = "train, global_batch: 64, sequence: 2048"
    ours = implementations(scenario(tmp_path, f"profile={plain}", "backend=moesim", workload=workload))
    assert ours["moe_ffn"] == {"moesim-triton bfloat16"}
    assert implementations(scenario(tmp_path, workload=workload))["moe_ffn"] == {"trtllm-cutlass bfloat16"}


@pytest.mark.parametrize("op", ["gemm", "attention_prefill", "attention_decode", "moe_ffn"])
def test_every_other_engine_needs_its_kernels(op: str) -> None:
    bare = Profile(device="h200-sxm", families=load_profile("h200-sxm").families[-1:])
    for name, backend in BACKENDS.items():
        if name != "moesim":
            with pytest.raises(ProfileError, match=f"no parameters for {op}"):
                backend.family(bare, op, "bfloat16", "gqa")
