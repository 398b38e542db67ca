"""Fits of measured tables: what they recover, what they hold out, borrow, refuse and name."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

from calibrate.fit import attention, collectives, elementwise, exchange, gemm, router, transfers
from calibrate.fit.assumed import merged
from calibrate.fit.exchange_rows import exchange_rows, predict_exchange
from calibrate.fit.family import carried_family, known_family
from moesim.hardware.catalog import load_gpu
from moesim.hardware.profile import Profile, load_profile

GPU = load_gpu("h200-sxm")
SHIPPED = load_profile("h200-sxm")
LINKS = ("inter_node", "pcie", "send_recv")
RNG = np.random.default_rng(0)


def fitted(module: ModuleType, rows: pd.DataFrame, base: Profile | None = None) -> tuple[Profile, list[str]]:
    """Profile of what a module makes of rows, and its notes."""
    notes: list[str] = []
    families = module.fit_table(rows, gpu=GPU, base=base, note=notes.append)
    return Profile.model_validate({"device": GPU.name, "families": merged(families)}), notes


def named(op: str, implementation: str, dtype: str = "any", **columns: Any) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    head = {
        "op": op,
        "device": GPU.name,
        "implementation": implementation,
        "software": "test 1.0",
        "dtype": dtype,
    }
    return pd.DataFrame({**head, **frame}, index=frame.index)


def with_times(module: ModuleType, rows: pd.DataFrame, profile: Profile, noise: float = 0.0) -> pd.DataFrame:
    """Rows with the times that a profile gives them."""
    told = module.predict_table(rows, gpu=GPU, profile=profile)
    assert told.why_not == [None] * len(rows)
    return rows.assign(latency_s=told.time_s * np.exp(noise * RNG.standard_normal(len(rows))))


def products(dtype: str = "bfloat16", implementation: str = "vllm:torch.nn.functional.linear", n: int = 150):
    sizes = [256, 512, 1024, 2048, 4096, 8192, 16384]
    m = RNG.choice([1, 8, 16, 64, 128, 256, 1024, 4096], n)
    rows = {"m": m, "n": RNG.choice(sizes, n), "k": RNG.choice(sizes, n)}
    return named("gemm", implementation, dtype, **rows)


def values(profile: Profile, *key: str) -> dict[str, float]:
    return profile.family(*key).values()


def test_a_fit_recovers_the_model_that_made_its_rows() -> None:
    rows = with_times(gemm, products(), SHIPPED, noise=0.02)
    profile, _ = fitted(gemm, rows)
    family = profile.family("gemm", "torch-cublas", "bfloat16")
    assert family.held_out is not None and family.held_out.median_ape < 0.03
    assert family.held_out.split == "5-fold by (n, k)"
    truth = values(SHIPPED, "gemm", "torch-cublas", "bfloat16")
    for name in ("launch_s", "compute_fraction", "hbm_fraction"):
        assert family.values()[name] == pytest.approx(truth[name], rel=0.12)
        assert family.parameters[name].stderr is not None


def test_provenance_is_that_of_the_rows() -> None:
    rows = with_times(gemm, products(n=80), SHIPPED).assign(software="vllm 9.9")
    families = gemm.fit_table(rows, gpu=GPU, base=None, note=lambda line: None, source="a bench")
    told = families[0]["provenance"]
    assert told["kind"] == "fitted" and told["n_points"] == 80
    for word in ("a bench: ", "gemm", "h200-sxm", "vllm 9.9", "vllm:torch.nn.functional.linear"):
        assert word in told["data"]


def test_marked_rows_are_held_out_and_never_fitted() -> None:
    rows = with_times(gemm, products(), SHIPPED)
    marked = np.arange(len(rows)) % 5 == 0
    wrong = rows.assign(held_out=marked.astype(int), latency_s=np.where(marked, 2.0, 1.0) * rows.latency_s)
    profile, _ = fitted(gemm, wrong)
    family = profile.family("gemm", "torch-cublas", "bfloat16")
    assert family.provenance.n_points == int((~marked).sum())
    assert family.held_out is not None and family.held_out.n == int(marked.sum())
    assert family.held_out.median_ape == pytest.approx(0.5, abs=0.03)
    assert "held out" in family.held_out.split


def test_few_rows_borrow_the_base() -> None:
    base = Profile(device="h100-sxm", families=SHIPPED.families)
    few = with_times(gemm, products(n=6), SHIPPED, noise=0.05)
    truth = values(SHIPPED, "gemm", "torch-cublas", "bfloat16")
    profile, _ = fitted(gemm, few, base)
    family = profile.family("gemm", "torch-cublas", "bfloat16")
    assert "h100-sxm" in family.provenance.data
    many = products(n=300)
    measured = with_times(gemm, many, SHIPPED).latency_s
    error = np.abs(gemm.predict_table(many, gpu=GPU, profile=profile).time_s / measured - 1)
    assert np.median(error) < 0.05
    assert family.values()["l2_ratio"] == pytest.approx(truth["l2_ratio"], rel=0.3)


def test_many_rows_outweigh_the_base() -> None:
    truth = values(SHIPPED, "gemm", "torch-cublas", "bfloat16")
    rows = with_times(gemm, products(n=300), SHIPPED, noise=0.02)
    slow = SHIPPED.family("gemm", "torch-cublas", "bfloat16").model_dump(exclude_none=True)
    slow["parameters"]["compute_fraction"]["value"] = 0.45
    base = Profile.model_validate({"device": "h100-sxm", "families": [slow]})
    profile, _ = fitted(gemm, rows, base)
    found = values(profile, "gemm", "torch-cublas", "bfloat16")["compute_fraction"]
    assert found == pytest.approx(truth["compute_fraction"], rel=0.1)


def test_one_software_is_fitted_and_the_others_are_named() -> None:
    rows = with_times(gemm, products(n=100), SHIPPED)
    older = rows.iloc[:60].assign(software="test 0.9", latency_s=3 * rows.latency_s.iloc[:60])
    profile, notes = fitted(gemm, pd.concat([rows, older], ignore_index=True))
    family = profile.family("gemm", "torch-cublas", "bfloat16")
    assert family.provenance.n_points == 100
    assert family.held_out is not None and family.held_out.median_ape < 0.02
    assert any("60 rows of other software than test 1.0" in line for line in notes)


def test_of_as_many_rows_the_software_measured_last_is_fitted() -> None:
    rows = with_times(gemm, products(n=100), SHIPPED)
    january = rows.assign(software="torch 2.9.1", date="2026-01-05", latency_s=3 * rows.latency_s)
    september = rows.assign(software="torch 2.11.0", date="2026-09-05")
    profile, notes = fitted(gemm, pd.concat([january, september], ignore_index=True))
    family = profile.family("gemm", "torch-cublas", "bfloat16")
    assert family.held_out is not None and family.held_out.median_ape < 0.02
    assert any("100 rows of other software than torch 2.11.0" in line for line in notes)


def test_rows_held_out_do_not_choose_the_software() -> None:
    rows = with_times(gemm, products(n=100), SHIPPED)
    hidden = rows.assign(software="test 2.0", held_out=1)
    profile, _ = fitted(gemm, pd.concat([rows.iloc[:60].assign(held_out=0), hidden], ignore_index=True))
    assert profile.family("gemm", "torch-cublas", "bfloat16").provenance.n_points == 60


def test_an_unknown_library_keeps_its_name() -> None:
    rows = with_times(gemm, products(), SHIPPED).assign(implementation="my:kernel", dtype="fp8")
    profile, _ = fitted(gemm, rows)
    family = profile.family("gemm", "my:kernel", "fp8")
    assert family.held_out is not None and family.held_out.median_ape < 0.5
    assert np.isfinite(gemm.predict_table(rows, gpu=GPU, profile=profile).time_s).all()


def test_rows_without_a_model_say_why() -> None:
    rows = pd.concat(
        [products(n=3), products("int8", n=2), products(implementation="other:kernel", n=1)],
        ignore_index=True,
    )
    told = gemm.predict_table(rows, gpu=GPU, profile=SHIPPED)
    assert np.isfinite(told.time_s).tolist() == [True] * 3 + [False] * 3
    assert told.why_not[:3] == [None] * 3
    assert "int8" in str(told.why_not[3])
    assert "no family gemm other:kernel bfloat16" in str(told.why_not[5])
    _, notes = fitted(gemm, rows.assign(latency_s=1e-4))
    assert any("int8" in line for line in notes)


def test_a_profile_of_an_older_model_is_named_not_broken() -> None:
    family = SHIPPED.family("gemm", "vllm-cutlass", "fp8")
    older = {name: one for name, one in family.parameters.items() if name != "fill_s"}
    profile = Profile(device=GPU.name, families=(family.model_copy(update={"parameters": older}),))
    rows = products("fp8", "vllm:CutlassFP8ScaledMMLinearKernel", n=2)
    told = gemm.predict_table(rows, gpu=GPU, profile=profile)
    assert np.isnan(told.time_s).all()
    assert "fill_s" in str(told.why_not[0])


def test_measured_families_replace_assumed_ones() -> None:
    dense = gemm.fit_table(
        with_times(gemm, products(n=60), SHIPPED), gpu=GPU, base=None, note=lambda line: None
    )
    kinds = {one["op"]: one["provenance"]["kind"] for one in dense if one["op"] != "gemm"}
    assert kinds == {"elementwise": "assumed", "router": "assumed"}
    measured = elementwise.fit_table(memory_rows(), gpu=GPU, base=None, note=lambda line: None)
    for order in ([*dense, *measured], [*measured, *dense]):
        both = merged(order)
        element = [one for one in both if one["op"] == "elementwise"]
        assert [one["provenance"]["kind"] for one in element] == ["fitted"]


def test_carried_families_say_from_where_and_claim_no_error() -> None:
    family = known_family(SHIPPED, ("gemm", "torch-cublas", "bfloat16"))
    assert family is not None
    carried = carried_family(family, "h200-sxm")
    assert carried["provenance"]["kind"] == "carried-over" and "h200-sxm" in carried["provenance"]["data"]
    assert "held_out" not in carried
    again = Profile.model_validate({"device": "h100-sxm", "families": [carried]}).families[0]
    assert carried_family(again, "h100-sxm")["provenance"] == carried["provenance"]


def memory_rows() -> pd.DataFrame:
    n_bytes = np.repeat(2.0 ** np.arange(14, 33), 2)
    cache = np.tile(["cold", "warm"], 19)
    parts = []
    for op, moved in (("hbm_read", 1), ("hbm_copy", 2)):
        part = named(op, "torch", n_bytes=n_bytes, cache=cache)
        rate = (
            np.where((cache == "warm") & (moved * n_bytes < GPU.l2_bytes / 2), 3.0, 1.0)
            * 0.9
            * GPU.hbm_bytes_per_s
        )
        parts.append(part.assign(latency_s=2e-6 + moved * n_bytes / rate))
    n_kernels = np.array([1, 4, 16, 64, 256] * 2)
    mode = np.repeat(["eager", "graph"], 5)
    launch = named("launch", "cuda", n_kernels=n_kernels, mode=mode)
    each = np.where(mode == "graph", 1.5e-6, 4e-6) + np.where(mode == "graph", 8e-6, 3e-6) / n_kernels
    parts.append(launch.assign(latency_s=each))
    return pd.concat(parts, ignore_index=True)


def test_launches_and_memory_make_the_elementwise_family() -> None:
    rows = memory_rows()
    profile, _ = fitted(elementwise, rows)
    element = values(profile, "elementwise", "fused")
    assert element["launch_s"] == pytest.approx(1.5e-6, rel=0.05)
    assert element["hbm_fraction"] == pytest.approx(0.9, rel=0.05)
    assert values(profile, "launch", "eager")["launch_s"] == pytest.approx(4e-6, rel=0.05)
    assert values(profile, "hbm_read", "cuda")["l2_ratio"] == pytest.approx(3.0, rel=0.3)
    held = {one.op: one.held_out for one in profile.families}
    assert held["launch"] is not None and held["hbm_copy"] is not None and held["elementwise"] is not None
    graph = profile.family("launch", "graph").held_out
    assert graph is not None
    assert held["elementwise"].median_ape == max(graph.median_ape, held["hbm_copy"].median_ape)
    assert held["elementwise"].split.startswith(("launch: ", "hbm_copy: "))
    told = elementwise.predict_table(rows, gpu=GPU, profile=profile)
    assert np.median(np.abs(told.time_s / rows.latency_s - 1)) < 0.03
    one_launch = rows[(rows.op != "launch") | ((rows["mode"] == "graph") & (rows.n_kernels == 1))]
    few, _ = fitted(elementwise, one_launch.reset_index(drop=True))
    assert {one.op for one in few.families} == {
        "launch",
        "hbm_read",
        "hbm_copy",
    }  # a launch is two parameters
    part, _ = fitted(elementwise, rows[rows.op == "hbm_read"].reset_index(drop=True))
    assert {one.op for one in part.families} == {"hbm_read"}
    assert "no family launch eager" in str(
        elementwise.predict_table(rows, gpu=GPU, profile=part).why_not[-10]
    )


def transfer_rows() -> pd.DataFrame:
    cells = [
        (op, size, pinned, streams, busy)
        for op in ("h2d", "d2h", "d2d") for size in 2 ** np.arange(12, 31, 2)
        for pinned in (0, 1) for streams in (1, 4) for busy in (0, 1)
    ]  # fmt: skip
    rows = pd.DataFrame(cells, columns=["op", "n_bytes", "pinned", "n_streams", "busy"])
    head = named("h2d", "torch", n_bytes=rows.n_bytes)
    rows = head.drop(columns="op").assign(**{name: rows[name] for name in rows})
    host = np.where(rows.pinned == 1, 0.85, 0.1) * GPU.pcie_bytes_per_s
    rate = np.where(rows.op == "d2d", 0.4 * GPU.hbm_bytes_per_s, host)
    slow = np.where(rows.busy == 1, 1.2, 1.0)
    return rows.assign(latency_s=1e-5 + 2e-6 * (rows.n_streams - 1) + slow * rows.n_bytes / rate)


def test_transfers_are_fitted_by_direction_and_kind_of_host_memory() -> None:
    rows = transfer_rows()
    profile, _ = fitted(transfers, rows)
    pinned, pageable = (values(profile, "h2d", f"cuda-{kind}") for kind in ("pinned", "pageable"))
    assert pinned["rate_fraction"] == pytest.approx(0.85, rel=0.02)
    assert pageable["rate_fraction"] == pytest.approx(0.1, rel=0.02)
    assert pinned["busy_ratio"] == pytest.approx(1.2, rel=0.02)
    assert pinned["latency_s"] == pytest.approx(1e-5, rel=0.05)
    assert values(profile, "d2d", "cuda")["rate_fraction"] == pytest.approx(0.8, rel=0.02)
    told = transfers.predict_table(rows, gpu=GPU, profile=profile)
    assert np.max(np.abs(told.time_s / rows.latency_s - 1)) < 0.02
    alone = rows[(rows.busy == 0) & (rows.n_streams == 1)].reset_index(drop=True)
    assert values(fitted(transfers, alone)[0], "h2d", "cuda-pinned")["busy_ratio"] == 1.0


def router_rows() -> pd.DataFrame:
    cells = [
        (t, e, k, h)
        for t in (1, 64, 1024, 16384)
        for e, k in ((64, 6), (128, 8), (256, 8))
        for h in (2048, 7168)
    ]
    rows = pd.DataFrame(cells, columns=["n_tokens", "n_experts", "top_k", "hidden"])
    return named("router", "moesim", **{name: rows[name] for name in rows}).assign(scoring="softmax")


def test_the_router_is_what_the_gate_product_leaves() -> None:
    rows = router_rows()
    truth = SHIPPED.family("router", "fused-topk").model_copy(update={"implementation": "moesim"})
    rows = with_times(router, rows, Profile(device=GPU.name, families=(*SHIPPED.families, truth)), noise=0.01)
    profile, _ = fitted(router, rows, SHIPPED)
    assert values(profile, "router", "moesim")["topk_s"] == pytest.approx(truth.values()["topk_s"], rel=0.1)
    assert values(profile, "router", "fused-topk") == values(profile, "router", "moesim")
    notes: list[str] = []
    assert router.fit_table(rows, gpu=GPU, base=None, note=notes.append) == []
    assert "gemm torch-cublas bfloat16" in notes[0]
    assert "gemm" in str(router.predict_table(rows, gpu=GPU, profile=profile).why_not[0])


def test_routers_on_a_warm_cache_are_not_fitted_nor_predicted() -> None:
    rows = router_rows()
    truth = SHIPPED.family("router", "fused-topk").model_copy(update={"implementation": "moesim"})
    cold = with_times(router, rows, Profile(device=GPU.name, families=(*SHIPPED.families, truth))).assign(
        cache="cold"
    )
    warm = cold.assign(cache="warm", latency_s=0.6 * cold.latency_s)
    both = pd.concat([cold, warm], ignore_index=True)
    profile, notes = fitted(router, both, SHIPPED)
    assert values(profile, "router", "moesim")["topk_s"] == pytest.approx(truth.values()["topk_s"], rel=0.1)
    assert any("level-2 cache" in line for line in notes)
    whole = Profile(device=GPU.name, families=(*SHIPPED.families, profile.family("router", "moesim")))
    told = router.predict_table(both, gpu=GPU, profile=whole)
    assert np.isfinite(told.time_s[: len(cold)]).all() and np.isnan(told.time_s[len(cold) :]).all()


def collective_rows(op: str = "all_gather", implementation: str = "nccl", ranks=(2, 4, 8)) -> pd.DataFrame:
    cells = [(n, 2**power) for n in ranks for power in range(9, 29)]
    rows = named(
        op, implementation, "fp16", n_ranks=[n for n, _ in cells], message_bytes=[b for _, b in cells]
    )
    return rows.assign(message_elements=rows.message_bytes // 2)


@pytest.mark.parametrize("op", ["all_gather", "all_to_all", "all_reduce", "send_recv"])
def test_collectives_are_recovered(op: str) -> None:
    rows = with_times(collectives, collective_rows(op), SHIPPED, noise=0.02)
    profile, _ = fitted(collectives, rows)
    family = profile.family(op, "nccl")
    assert family.held_out is not None and family.held_out.median_ape < 0.06
    told = collectives.predict_table(rows, gpu=GPU, profile=profile)
    assert np.median(np.abs(told.time_s / rows.latency_s - 1)) < 0.04
    links = {one.op: one.provenance.kind for one in profile.families if one.op in LINKS}
    assert links == {**dict.fromkeys(LINKS, "assumed"), **({op: "fitted"} if op in LINKS else {})}


def test_collectives_without_a_model_are_named() -> None:
    rows = pd.concat(
        [
            collective_rows("all_gather"),
            collective_rows("broadcast"),
            collective_rows("all_gather", "gloo"),
            collective_rows("all_gather").assign(n_nodes=2),
            collective_rows("all_to_all").assign(split="trace"),
        ],
        ignore_index=True,
    ).assign(latency_s=1e-4)
    told = collectives.predict_table(rows, gpu=GPU, profile=SHIPPED)
    reasons = [told.why_not[60 * i] for i in range(5)]
    assert reasons[0] is None
    for reason, word in zip(reasons[1:], ("no model", "gloo", "between nodes", "uneven"), strict=True):
        assert word in str(reason)
    _, notes = fitted(collectives, rows)
    assert sum("not fitted" in line for line in notes) == 4
    box = GPU.model_copy(update={"nvlink_bytes_per_s": 0.0})
    assert "no NVLink" in str(collectives.predict_table(rows, gpu=box, profile=SHIPPED).why_not[0])


def test_without_eight_ranks_there_is_no_sum_in_the_switch() -> None:
    rows = with_times(collectives, collective_rows("all_reduce", ranks=(2, 4)), SHIPPED)
    profile, _ = fitted(collectives, rows)
    assert "nvls_latency_s" not in values(profile, "all_reduce", "nccl")


def test_an_engines_large_sums_are_those_of_nccl() -> None:
    rows = collective_rows("all_reduce", "vllm:vLLM_custom_graph").drop(columns="message_bytes")
    told = collectives.predict_table(rows, gpu=GPU, profile=SHIPPED).time_s
    library = collectives.predict_table(rows.assign(implementation="nccl"), gpu=GPU, profile=SHIPPED).time_s
    beyond, small = (rows.message_elements > 4 * 2**20).to_numpy(), (rows.message_elements < 1e5).to_numpy()
    assert np.allclose(told[beyond], library[beyond])
    assert np.all(told[small] < library[small])


def deepep_rows(kind: str, n_nodes: int, sms: int | None) -> pd.DataFrame:
    cells = [
        (op, t, h)
        for op in ("ep_dispatch", "ep_combine")
        for t in (8, 64, 256, 1024)
        for h in (2048, 4096, 7168)
    ]
    rows = named(
        "ep_dispatch", f"deepep-{kind}", n_tokens=[t for _, t, _ in cells], hidden=[h for *_, h in cells]
    )
    return rows.assign(
        op=[op for op, *_ in cells], n_nodes=n_nodes, n_ranks=8 * n_nodes, top_k=8, n_experts=256,
        n_sms=pd.array([sms] * len(cells), dtype="Int64"), latency_s=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "sms"), [("low-latency", None), ("normal", 20)])
def test_exchanges_take_what_they_did_not_see_from_the_base(kind: str, sms: int | None) -> None:
    near, far = deepep_rows(kind, 1, sms), deepep_rows(kind, 2, sms)
    near = with_times(exchange, near, SHIPPED)
    profile, _ = fitted(exchange, near, load_profile("h100-sxm"))
    family = profile.family("ep_dispatch", f"deepep-{kind}")
    assert "h100-sxm" in family.provenance.data
    assert family.values()["nic_contention"] == 0
    told = exchange.predict_table(far, gpu=GPU, profile=profile).time_s
    expected = exchange.predict_table(far, gpu=GPU, profile=SHIPPED).time_s
    assert np.median(np.abs(told / expected - 1)) < 0.1
    alone, _ = fitted(exchange, near)
    assert "between nodes: assumed" in alone.family("ep_dispatch", f"deepep-{kind}").provenance.data


def test_exchanges_across_nodes_alone_are_fitted_on_top_of_the_base() -> None:
    rows = with_times(exchange, deepep_rows("low-latency", 2, None), SHIPPED, noise=0.01)
    marked = rows.assign(held_out=(np.arange(len(rows)) % 4 == 0).astype(int))
    profile, _ = fitted(exchange, marked, SHIPPED)
    family = profile.family("ep_combine", "deepep-low-latency")
    assert family.held_out is not None and family.held_out.split == "rows measured to be held out"
    assert family.held_out.median_ape < 0.05
    assert family.provenance.n_points == 9


def test_strange_exchanges_are_named() -> None:
    rows = deepep_rows("low-latency", 1, None)
    rows = pd.concat([rows, rows.assign(n_ranks=4), rows.assign(implementation="nccl-ep")], ignore_index=True)
    told = exchange.predict_table(rows, gpu=GPU, profile=SHIPPED)
    assert np.isfinite(told.time_s).sum() == 24
    assert "nodes of 8" in str(told.why_not[24]) and "library" in str(told.why_not[48])
    _, notes = fitted(exchange, rows.assign(latency_s=1e-4))
    assert any("nodes of 8" in line for line in notes) and any("nccl-ep" in line for line in notes)
    seen = exchange_rows(rows, "low-latency", "dispatch", GPU)
    assert predict_exchange(seen, values(SHIPPED, "ep_dispatch", "deepep-low-latency")).size == 12


def attention_rows(op: str, kind: str, cache: str = "bfloat16", head_dim: int = 128) -> pd.DataFrame:
    cells = [(b, c, h) for b in (1, 8, 64) for c in (128, 2048, 16384) for h in (8, 16, 32)]
    name = "vllm:vllm_flash_attn_fa3" if kind == "gqa" else "sglang:flash_attention"
    rows = named(op, name, "bfloat16", batch=[b for b, *_ in cells], n_context=[c for _, c, _ in cells])
    heads = [h for *_, h in cells]
    blank = pd.array([pd.NA] * len(cells), dtype="Int64")
    return rows.assign(
        kind=kind, kv_dtype=cache, n_query=1 if op == "attention_decode" else rows.n_context, n_heads=heads, window=0,
        n_kv_heads=[h // 4 for h in heads] if kind == "gqa" else blank, head_dim=head_dim if kind == "gqa" else blank,
    )  # fmt: skip


@pytest.mark.parametrize("op", ["attention_prefill", "attention_decode"])
@pytest.mark.parametrize(("kind", "cache"), [("gqa", "bfloat16"), ("gqa", "fp8"), ("mla", "fp8")])
def test_attention_is_recovered_also_where_mla_leaves_columns_blank(op: str, kind: str, cache: str) -> None:
    rows = with_times(attention, attention_rows(op, kind, cache), SHIPPED, noise=0.01)
    profile, _ = fitted(attention, rows)
    told = attention.predict_table(rows, gpu=GPU, profile=profile)
    assert np.median(np.abs(told.time_s / rows.latency_s - 1)) < 0.05
    assert profile.families[0].held_out is not None


def test_heads_too_wide_are_named() -> None:
    rows = attention_rows("attention_decode", "gqa", head_dim=512)
    told = attention.predict_table(rows, gpu=GPU, profile=SHIPPED)
    assert np.isnan(told.time_s).all() and "wider than 256" in str(told.why_not[0])
    notes: list[str] = []
    assert attention.fit_table(rows.assign(latency_s=1e-4), gpu=GPU, base=None, note=notes.append) == []
    assert "wider than 256" in notes[0]
