"""Fits of links find what synthetic rows were made of, and price as plans do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from calibrate.fit.measured_links import fit_table, predict_table, serves
from calibrate.fit.registry import fit_tables, predict_rows
from calibrate.recorder import Recorder
from calibrate.tables import read_table
from moesim.hardware import Profile, load_cluster, load_gpu, load_profile
from moesim.network import (
    NetworkParams,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    reduce_scatter_s,
    send_recv_s,
)

H200 = load_gpu("h200-sxm")
SIZES = 2.0 ** np.arange(10, 27)
ALPHA_S, RATE = 80e-6, 3e9


def rows_of(op: str, n_ranks: int, time_s: Any, **columns: Any) -> pd.DataFrame:
    fixed = {
        "op": op, "device": H200.name, "implementation": "gloo", "software": "gloo 1", "dtype": "bfloat16",
        "n_ranks": n_ranks, "message_elements": (SIZES / 2).astype(int), "message_bytes": SIZES.astype(int),
        "latency_s": time_s, "n_nodes": 1,
    }  # fmt: skip
    return pd.DataFrame({**fixed, **columns})


def noisy(time_s: Any, seed: int = 0) -> Any:
    return time_s * np.exp(np.random.default_rng(seed).normal(0, 0.01, np.shape(time_s)))


def fitted(rows: pd.DataFrame, base: Profile | None = None) -> list[dict[str, Any]]:
    return fit_table(rows, gpu=H200, base=base, note=lambda line: None)


def values_of(families: Sequence[Mapping[str, Any]], op: str, implementation: str) -> dict[str, float]:
    found = [one for one in families if (one["op"], one["implementation"]) == (op, implementation)]
    assert len(found) == 1, [(one["op"], one["implementation"]) for one in families]
    return {name: item["value"] for name, item in found[0]["parameters"].items()}


def profile_of(families: Sequence[Mapping[str, Any]]) -> Profile:
    return Profile.model_validate({"device": H200.name, "families": list(families)})


def test_a_line_is_found_with_its_standard_errors() -> None:
    families = fitted(rows_of("send_recv", 2, noisy(ALPHA_S + SIZES / RATE)))
    found = families[0]["parameters"]
    assert set(found) == {"latency_s", "rate_bytes_per_s"}  # no step where the data want none
    assert found["latency_s"]["value"] == pytest.approx(ALPHA_S, rel=0.02)
    assert found["rate_bytes_per_s"]["value"] == pytest.approx(RATE, rel=0.02)
    assert abs(found["latency_s"]["value"] - ALPHA_S) < 5 * found["latency_s"]["stderr"] < 0.1 * ALPHA_S
    assert families[0]["held_out"]["median_ape"] < 0.03
    assert families[0]["provenance"]["kind"] == "fitted"


def test_a_change_of_protocol_is_found() -> None:
    truth = ALPHA_S + SIZES / RATE + 200e-6 * (SIZES > 100_000)
    found = values_of(fitted(rows_of("send_recv", 2, noisy(truth))), "send_recv", "gloo")
    assert 2**16 < found["step_bytes"] < 2**17
    assert found["step_s"] == pytest.approx(200e-6, rel=0.1)
    assert found["latency_s"] == pytest.approx(ALPHA_S, rel=0.03)


def test_a_ping_pong_is_fitted_to_its_quiet_samples() -> None:
    truth = ALPHA_S + SIZES / RATE
    busy = rows_of("send_recv", 2, 2.5 * truth, latency_p10_s=truth)
    assert values_of(fitted(busy), "send_recv", "gloo")["rate_bytes_per_s"] == pytest.approx(RATE, rel=0.01)
    assert "10th percentiles" in fitted(busy)[0]["provenance"]["data"]


def exchange(n: int, efficiency: float) -> Any:
    return 30e-6 + 20e-6 * (n - 1) + (n - 1) / n * SIZES / (efficiency * RATE)


def test_the_efficiency_of_a_collective_is_apart_from_the_rate_of_the_link() -> None:
    rows = pd.concat([
        rows_of("send_recv", 2, ALPHA_S + SIZES / RATE),
        *(rows_of("all_to_all", n, noisy(exchange(n, 0.6 * (n / 8) ** -0.2), n)) for n in (2, 4, 8)),
    ])  # fmt: skip
    families = fitted(rows)
    found = values_of(families, "all_to_all", "gloo")
    assert found["rate_bytes_per_s"] == pytest.approx(RATE, rel=0.01)
    assert found["efficiency"] == pytest.approx(0.6, rel=0.03)
    assert found["fade"] == pytest.approx(0.2, abs=0.03)
    assert found["peer_s"] == pytest.approx(20e-6, rel=0.1)
    told = predict_table(rows, gpu=H200, profile=profile_of(families))
    assert told.why_not == [None] * len(rows)
    assert told.time_s == pytest.approx(rows["latency_s"].to_numpy(), rel=0.08)


def test_ranks_that_share_a_nodes_port_are_told_from_ranks_that_do_not() -> None:
    parts = [rows_of("send_recv", 2, ALPHA_S + SIZES / RATE, n_nodes=2)]
    for n, nodes in ((2, 2), (4, 4), (8, 4), (16, 4)):
        parts.append(rows_of("all_to_all", n, exchange(n, 0.5 * nodes / n), n_nodes=nodes))
    found = values_of(fitted(pd.concat(parts)), "all_to_all", "gloo-internode")
    assert found["crowd"] == pytest.approx(1.0, abs=0.05)


def test_one_group_size_holds_what_it_cannot_tell() -> None:
    rows = pd.concat(
        [rows_of("send_recv", 2, ALPHA_S + SIZES / RATE), rows_of("all_reduce", 4, exchange(4, 0.5))]
    )
    family = next(one for one in fitted(rows) if one["op"] == "all_reduce")
    assert family["parameters"]["peer_s"]["meaning"].endswith("held, one value measured")
    assert family["parameters"]["fade"]["stderr"] == 0
    # of a ring, which moves the buffer twice
    assert family["parameters"]["efficiency"]["value"] == pytest.approx(1.0, rel=0.02)


def test_without_a_ping_pong_a_collective_has_its_own_rate() -> None:
    said: list[str] = []
    rows = rows_of("broadcast", 4, ALPHA_S + SIZES / RATE)
    families = fit_table(rows, gpu=H200, base=None, note=said.append)
    assert values_of(families, "broadcast", "gloo")["rate_bytes_per_s"] == pytest.approx(RATE, rel=0.02)
    assert any("no send_recv measured" in line for line in said)
    assert families[0]["parameters"]["efficiency"]["value"] == 1.0


def test_rows_held_out_judge_and_are_never_fitted() -> None:
    rows = rows_of("send_recv", 2, ALPHA_S + SIZES / RATE, held_out=0)
    rows.loc[[3, 9], ["held_out", "latency_s"]] = [1, 1.0]
    family = fitted(rows)[0]
    assert family["parameters"]["latency_s"]["value"] == pytest.approx(ALPHA_S, rel=0.01)
    assert family["held_out"]["n"] == 2
    assert family["held_out"]["median_ape"] > 0.9


def test_too_few_rows_are_said_and_left() -> None:
    said: list[str] = []
    assert fit_table(rows_of("all_gather", 2, 1e-3)[:2], gpu=H200, base=None, note=said.append) == []
    assert said == ["all_gather gloo: 2 rows are too few to fit"]


def test_a_row_that_no_family_covers_is_named() -> None:
    profile = profile_of(fitted(rows_of("send_recv", 2, ALPHA_S + SIZES / RATE)))
    told = predict_table(rows_of("all_gather", 2, 1e-3), gpu=H200, profile=profile)
    assert np.isnan(told.time_s).all()
    assert told.why_not[0] == "the profile has no family all_gather gloo any"


def test_nccl_within_a_node_is_left_to_its_own_model() -> None:
    rows = pd.concat([
        rows_of("all_to_all", 8, 1e-3, implementation="nccl"),
        rows_of("all_to_all", 16, 1e-3, implementation="nccl", n_nodes=2),
        rows_of("send_recv", 2, 1e-3, implementation="nccl"),
        rows_of("all_to_all", 8, 1e-3),
        rows_of("all_to_all", 8, 1e-3, implementation="nccl-sockets-one-gpu"),
    ], ignore_index=True)  # fmt: skip
    assert serves(rows)[:: len(SIZES)].tolist() == [False, True, True, True, True]
    assert not serves(rows.drop(columns="n_nodes"))[len(SIZES)]


# ---------------------------------------------------------------- what plans are priced with

TRUTH = {"nic_rate_fraction": 0.7, "start_s": 4e-5, "hop_s": 1e-5, "peer_s": 2e-6}


def nccl_rows() -> pd.DataFrame:
    """Rows of a cluster whose network is worse than the catalog assumes, as the network model gives them."""
    known = NetworkParams.from_profile(load_profile(H200.name))
    params = replace(known, nccl={**known.nccl, "inter_node": TRUTH})
    prices = {
        "all_to_all": all_to_all_s, "all_gather": all_gather_s, "reduce_scatter": reduce_scatter_s,
        "all_reduce": lambda payload, **shape: all_reduce_s(payload, backend="nccl", **shape),
    }  # fmt: skip
    cluster = load_cluster("dgx-h200", nodes=4)
    parts = []
    for nodes, per_node in ((2, 1), (4, 1), (4, 8)):
        shape: dict[str, Any] = {"ranks_per_node_in_group": per_node, "cluster": cluster, "params": params}
        for op, price in prices.items():
            time_s = price(SIZES, n_ranks=nodes * per_node, **shape)
            parts.append(rows_of(op, nodes * per_node, time_s, n_nodes=nodes, implementation="nccl"))
    far = send_recv_s(SIZES, same_domain=False, cluster=cluster, params=params)
    parts.append(rows_of("send_recv", 2, far, n_nodes=2, implementation="nccl"))
    return pd.concat(parts, ignore_index=True)


def test_nccl_across_nodes_gives_the_parameters_that_plans_read() -> None:
    rows = nccl_rows()
    families = fitted(rows.assign(latency_s=noisy(rows["latency_s"].to_numpy())))
    found = values_of(families, "inter_node", "nccl")
    assert found == pytest.approx(TRUTH, rel=0.1)
    whole = [*families, *(f.model_dump() for f in load_profile(H200.name).families if f.op != "inter_node")]
    told = predict_table(rows, gpu=H200, profile=profile_of(whole))
    assert told.why_not == [None] * len(rows)
    assert told.time_s == pytest.approx(rows["latency_s"].to_numpy(), rel=0.05)
    # the same rows by the families of each collective, where a profile lacks what prices need
    alone = predict_table(
        rows, gpu=H200, profile=profile_of([f for f in families if f["op"] != "inter_node"])
    )
    assert np.isfinite(alone.time_s).all()


def test_point_to_point_over_nvlink_gives_its_price() -> None:
    time_s = 12e-6 + SIZES / (0.6 * H200.nvlink_bytes_per_s)
    families = fitted(rows_of("send_recv", 2, time_s, implementation="nccl"))
    found = values_of(families, "send_recv", "nccl")
    assert found == pytest.approx({"nvlink_start_s": 12e-6, "nvlink_rate_fraction": 0.6}, rel=0.02)


def test_a_gpu_without_nvlink_gives_the_price_of_pcie() -> None:
    gpu = load_gpu("l40s")
    wire = 7 / 8 * SIZES / (0.5 * gpu.pcie_bytes_per_s)
    rows = rows_of("all_gather", 8, 2e-5 + 7 * 4e-6 + wire, implementation="nccl", device=gpu.name)
    rows = pd.concat(
        [rows, rows_of("send_recv", 2, 2e-5 + SIZES / 0.5 / gpu.pcie_bytes_per_s, implementation="nccl")]
    )
    families = fit_table(rows, gpu=gpu, base=None, note=lambda line: None)
    found = values_of(families, "pcie", "nccl")
    assert found == pytest.approx({"rate_fraction": 0.5, "start_s": 2e-5, "step_s": 4e-6}, rel=0.02)


def test_a_fitted_profile_comes_out_of_the_files_alone(tmp_path: Any) -> None:
    rows = pd.concat(
        [rows_of("send_recv", 2, ALPHA_S + SIZES / RATE), rows_of("all_to_all", 4, exchange(4, 0.6))]
    )
    with Recorder(tmp_path / "links.csv", "collective") as recorder:
        for row in rows.to_dict("records"):
            recorder.append(row)
    table = read_table(tmp_path / "links.csv", gpu=H200)
    families = fit_tables([table], gpu=H200, base=None, note=lambda line: None)
    assert values_of(families, "all_to_all", "gloo")["efficiency"] == pytest.approx(0.6, rel=0.02)
    told = predict_rows(table.frame, "collective", gpu=H200, profile=profile_of(families))
    assert told.time_s == pytest.approx(table.frame["latency_s"].to_numpy(), rel=0.05)
