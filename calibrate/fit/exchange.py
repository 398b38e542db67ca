"""Fit DeepEP's exchanges on one host and across hosts, and the one-sided ones of a large NVLink domain."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, LogFit, grouped_folds
from calibrate.fit.links import FOLDS, NIC, NVLINK, RATE, Spec, family_entry, say, solve
from calibrate.statistics import ape_stats
from moesim.hardware.cluster import Cluster
from moesim.hardware.gpu import Gpu
from moesim.network.exchange import ExchangeTerms, low_latency_terms, normal_terms
from moesim.network.traffic import hit_fraction
from moesim.work.ops import Combine, Dispatch, Exchange

__all__ = [
    "ExchangeRows", "exchange_families", "exchange_rows", "measured_exchange", "one_sided_families", "one_sided_rows",
    "predict_exchange",
]  # fmt: skip

Direction = Literal["dispatch", "combine"]


def _reference_cluster(n_nodes: int) -> Cluster:
    """Nodes of 8 Hopper GPUs with NVLink 4 and one 400 Gb/s NIC a GPU, as the measurements ran on."""
    gpu = Gpu(
        name="hopper-sxm", memory_bytes=80e9, hbm_bytes_per_s=3.35e12, flops_per_s={"bfloat16": 989.4e12},
        n_sms=132, l2_bytes=50 * 2**20, clock_hz=1.98e9, nvlink_bytes_per_s=NVLINK, pcie_bytes_per_s=64e9,
        usd_per_gpu_hour=0.0, sources={},
    )  # fmt: skip
    return Cluster(
        gpu=gpu, nodes=n_nodes, gpus_per_node=8, scale_up_ranks=8, nic_bytes_per_s=NIC, usd_per_gpu_hour=0.0
    )


@cache
def distinct_groups(n_nodes: int, n_experts: int, top_k: int, limit: int | None) -> tuple[float, float]:
    """Expected different (nodes, ranks) of a token in DeepEP's tests.

    Scores are |N(0, 1)| + 1; with a `limit`, only the experts of the `limit` nodes with the highest score
    count. Exact where the limit does not bind, 20,000 draws of a fixed seed where it does.
    """
    n_ranks = 8 * n_nodes
    if limit is None or limit >= n_nodes:
        return (
            n_nodes * hit_fraction(n_nodes, n_experts, top_k),
            n_ranks * hit_fraction(n_ranks, n_experts, top_k),
        )
    scores = np.abs(np.random.default_rng(0).standard_normal((20_000, n_nodes, n_experts // n_nodes)))
    best = np.argsort(-scores.max(axis=-1), axis=1)[:, :limit]
    allowed = np.zeros(scores.shape[:2], dtype=bool)
    np.put_along_axis(allowed, best, True, axis=1)
    masked = np.where(allowed[:, :, None], scores, -1.0).reshape(len(scores), n_experts)
    chosen = np.argpartition(-masked, top_k, axis=1)[:, :top_k]
    hits = [np.zeros((len(scores), n), dtype=bool) for n in (n_nodes, n_ranks)]
    for hit, n in zip(hits, (n_nodes, n_ranks), strict=True):
        np.put_along_axis(hit, chosen // (n_experts // n), True, axis=1)
    return float(hits[0].sum(1).mean()), float(hits[1].sum(1).mean())


def measured_exchange(
    n_tokens: Sequence[float] | FloatArray, *, hidden: int, top_k: int, n_experts: int, n_nodes: int,
    kind: Literal["low-latency", "normal"], direction: Direction, n_sms: int = 0,
) -> Exchange:  # fmt: skip
    """Operator of a DeepEP test: (n_points, 1, 1) uniform tokens on every rank of nodes of 8.

    Dispatch in fp8 (4 bytes of scale per 128 values; low latency adds a header of 16), combine in bf16.
    """
    tokens = np.asarray(n_tokens, dtype=float).reshape(-1, 1, 1)
    n_ranks = 8 * n_nodes
    if kind == "normal":
        nodes, ranks = distinct_groups(n_nodes, n_experts, top_k, 4)
        # A copy crosses NVLink unless its rank has the sender's (or forwarder's) own index in the node.
        nvlink, nic = tokens * ranks * 7 / 8, tokens * nodes * (n_nodes - 1) / n_nodes
    else:
        nvlink = tokens * top_k * 7 / n_ranks
        nic = tokens * top_k * (n_ranks - 8) / n_ranks
    token_bytes = 2.0 * hidden if direction == "combine" else hidden * (1 + 4 / 128) + 16 * (kind != "normal")
    operator = Combine if direction == "combine" else Dispatch
    return operator(
        n_tokens=tokens, sent_nvlink=nvlink, received_nvlink=nvlink, sent_nic=nic, received_nic=nic,
        token_bytes=token_bytes, hidden=hidden, top_k=top_k, n_experts=n_experts, kind=kind, n_sms=n_sms,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ExchangeRows:
    """Measurements of one shape: one operator, its times."""

    op: Exchange
    n_nodes: int
    key: tuple[int, int, int]
    """(hidden, top_k, n_experts)."""
    measured_s: FloatArray
    cluster: Cluster = field(repr=False)
    n_ranks: int = 8


def exchange_rows(
    rows: pd.DataFrame, kind: Literal["low-latency", "normal"], direction: Direction
) -> list[ExchangeRows]:
    """Group ``deepep.parquet`` rows of one kernel by shape, nodes and SMs."""
    here = rows[(rows["implementation"] == f"deepep-{kind}") & (rows["op"] == f"ep_{direction}")]
    here = here.assign(n_sms=here["n_sms"].fillna(0).astype(int))
    found = []
    for names, part in here.groupby(["hidden", "top_k", "n_experts", "n_nodes", "n_sms"]):
        hidden, top_k, n_experts, n_nodes, n_sms = (int(name) for name in names)
        op = measured_exchange(
            part["n_tokens"].to_numpy(), hidden=hidden, top_k=top_k, n_experts=n_experts, n_nodes=n_nodes,
            kind=kind, direction=direction, n_sms=n_sms,
        )  # fmt: skip
        key = (hidden, top_k, n_experts)
        cluster, measured_s = _reference_cluster(n_nodes), part["latency_s"].to_numpy()
        found.append(ExchangeRows(op, n_nodes, key, measured_s, cluster, 8 * n_nodes))
    return found


Terms = Callable[[Exchange, Mapping[str, float], Cluster, int, int], ExchangeTerms]


def predict_exchange(
    rows: Sequence[ExchangeRows], values: Mapping[str, float], terms: Terms | None = None
) -> FloatArray:
    """Times of all rows, shape after shape [s]; `terms` is the kernel's model, by default the operator's kind."""
    models: dict[str, Terms] = {"low-latency": low_latency_terms, "normal": normal_terms}
    return np.concatenate(
        [
            (terms or models[r.op.kind])(
                r.op, values, r.cluster, r.n_ranks, min(r.n_ranks, r.cluster.scale_up_ranks)
            )
            .total_s()
            .ravel()
            for r in rows
        ]
    )


def _measured(rows: Sequence[ExchangeRows]) -> FloatArray:
    return np.concatenate([r.measured_s for r in rows])


LOW_LATENCY_SPEC: Spec = {
    "start_s": (7e-6, 1e-6, 3e-5, "fixed cost of a call [s]"),
    "expert_s": (1e-8, 1e-10, 1e-7, "more of it per expert of the layer: flags and counts [s]"),
    "token_s": (4e-7, 1e-9, 1e-5, "an SM's time per token [s]"),
    "token_byte_s": (1e-10, 1e-13, 1e-8, "the same per byte of a copy [s/byte]"),
    "copy_byte_s": (1e-11, 1e-14, 1e-8, "the same per byte of each of the token's top_k copies [s/byte]"),
    "message_s": (5e-8, 1e-10, 1e-5, "a warp group's time per message that it receives [s]"),
    "message_byte_s": (2e-11, 1e-14, 1e-8, "the same per byte [s/byte]"),
    "nvlink_rate_fraction": (0.7, 0.3, 1.0, RATE),
}
NORMAL_SPEC: Spec = {
    "start_s": (2.5e-5, 1e-6, 1e-4, "fixed cost of a call [s]"),
    "start_byte_s": (2e-10, 1e-12, 1e-8, "more of it per byte of a copy: the first one through [s/byte]"),
    "start_copy_byte_s": (1e-11, 1e-13, 1e-8, "the same for each copy of a token [s/byte]"),
    "ramp_s": (1e-5, 1e-7, 2e-4, "filling and draining the channels' queues [s]"),
    "ramp_tokens": (300.0, 1.0, 5000.0, "tokens at which half of it is paid"),
    "token_s": (1e-7, 1e-9, 1e-5, "an SM's time per token [s]"),
    "token_byte_s": (1e-11, 1e-13, 1e-9, "the same per byte of a copy [s/byte]"),
    "copy_s": (2e-8, 1e-10, 1e-6, "an SM's time per copy over NVLink [s]"),
    "copy_byte_s": (3e-11, 1e-12, 1e-9, "the same per byte [s/byte]"),
    "nvlink_rate_fraction": (0.8, 0.3, 1.0, RATE),
}
_FAR: Spec = {
    "far_start_s": (4e-6, 1e-7, 2e-4, "more fixed cost where NICs take part, beside one hop [s]"),
}
LOW_LATENCY_FAR_SPEC: Spec = {
    **_FAR,
    "far_peer_s": (2e-7, 1e-9, 5e-6, "the same for every rank behind a NIC [s]"),
    "nic_rate_fraction": (0.9, 0.3, 1.0, "share of the NIC's datasheet rate"),
}
NORMAL_FAR_SPEC: Spec = {
    **_FAR,
    "far_peer_s": (1e-6, 1e-8, 5e-5, "the same for every other node [s]"),
    # Held: two nodes are bound by SMs, so the rows tell only its product with the contention.
    "nic_rate_fraction": (
        0.97,
        0.97,
        0.97,
        "share of the NIC's datasheet rate: 48.5 of 50 GB/s (NVIDIA, CX7)",
    ),
    "far_sm_scale": (1.4, 0.5, 5.0, "SM time of the kernel that also forwards, over the one-node kernel's"),
    "nic_contention": (0.2, 1e-4, 2.0, "NIC time added by each node beyond two, on the measured fabric"),
}
_NO_FAR = {
    "far_start_s": 4e-6,
    "far_peer_s": 1e-6,
    "nic_rate_fraction": 0.9,
    "far_sm_scale": 1.0,
    "nic_contention": 0.0,
}
_PCIE = (0.75, "share of the PCIe datasheet rate, where a box has no NVLink; assumed")


def _fit_near(near: list[ExchangeRows], spec: Spec) -> tuple[LogFit, dict[str, Any]]:
    """Fit on one node, and its error by shape."""

    def fitted(rows: Sequence[ExchangeRows]) -> LogFit:
        return solve(lambda v: predict_exchange(rows, {**_CONSTANT, **v}), _measured(rows), spec)

    fit = fitted(near)
    predicted, measured = [], []
    for mask in grouped_folds(np.array([r.key for r in near]), FOLDS, 0):
        unseen = [r for r, out in zip(near, mask, strict=True) if out]
        seen = fitted([r for r, out in zip(near, mask, strict=True) if not out])
        predicted.append(predict_exchange(unseen, {**_CONSTANT, **seen.values}))
        measured.append(_measured(unseen))
    split = f"{FOLDS}-fold by (hidden, top_k, n_experts)"
    return fit, {"split": split, **ape_stats(np.concatenate(predicted), np.concatenate(measured))}


_CONSTANT = {**_NO_FAR, "pcie_rate_fraction": _PCIE[0], "n_sms": 20.0}


def _fit_far(
    far: list[ExchangeRows], spec: Spec, near_values: Mapping[str, float], out: Callable[[ExchangeRows], bool]
) -> tuple[LogFit, dict[str, Any]]:
    """Fit across nodes, one node's values held; error on the rows that `out` names, seen by no fit."""
    base = {**_CONSTANT, **near_values}

    def fitted(rows: Sequence[ExchangeRows]) -> LogFit:
        return solve(lambda v: predict_exchange(rows, {**base, **v}), _measured(rows), spec)

    unseen = [r for r in far if out(r)]
    part = fitted([r for r in far if not out(r)])
    held = ape_stats(predict_exchange(unseen, {**base, **part.values}), _measured(unseen))
    return fitted(far), held


def exchange_families(
    rows: pd.DataFrame, show: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Families ``(ep_dispatch | ep_combine, deepep-*)`` of an H200 and of an H100."""
    h200, h100 = [], []
    kinds: tuple[tuple[Literal["low-latency", "normal"], Spec, Spec], ...] = (
        ("low-latency", LOW_LATENCY_SPEC, LOW_LATENCY_FAR_SPEC),
        ("normal", NORMAL_SPEC, NORMAL_FAR_SPEC),
    )
    for kind, near_spec, far_spec in kinds:
        directions: tuple[Direction, ...] = ("dispatch", "combine")
        for direction in directions:
            every = exchange_rows(rows, kind, direction)
            near, near_held = _fit_near([r for r in every if r.n_nodes == 1], near_spec)
            far_rows = [r for r in every if r.n_nodes > 1]
            split, out = _far_split(kind)
            far, far_held = _fit_far(far_rows, far_spec, near.values, out)
            name = f"{direction} {kind}"
            far_predicted = predict_exchange(far_rows, {**_CONSTANT, **near.values, **far.values})
            inside = ape_stats(far_predicted, _measured(far_rows))
            show(f"{name}, one node: by shape {say(near_held)}")
            show(f"{name}, 2 and 8 nodes: in {say(inside)}; {split} {say(far_held)}")
            here, there = _pair(
                kind, direction, near, far, near_spec, far_spec, near_held, {"split": split, **far_held}
            )
            h200.append(here)
            h100.append(there)
    return h200, h100


def _far_split(kind: str) -> tuple[str, Callable[[ExchangeRows], bool]]:
    if kind == "normal":
        return "SM counts 8 and 20 held out", lambda r: r.op.n_sms in (8, 20)
    return "288 experts held out", lambda r: r.op.n_experts == 288


def _pair(
    kind: str, direction: Direction, near: LogFit, far: LogFit, near_spec: Spec, far_spec: Spec,
    near_held: Mapping[str, Any], far_held: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """The same kernel as an H200 and as an H100 profile has it."""
    spec = {**near_spec, **far_spec}
    fit = LogFit({**near.values, **far.values}, {**near.stderr, **far.stderr}, 0.0, near.n_rows)
    taken = (20.0 if kind == "normal" else 0.0, "SMs kept from compute: the library's default, or none")
    constants = {"n_sms": taken, "pcie_rate_fraction": _PCIE}
    if kind != "normal":
        constants["nic_contention"] = (0.0, "NIC time added by each node beyond two: none seen")
    arguments = (f"ep_{direction}", f"deepep-{kind}", fit, spec)
    one_node = "sglang 0.5.12, one node of 8 H200"
    nodes = "sglang 0.5.6.post2, 2 and 8 nodes of 8 H100"
    here = family_entry(
        *arguments, f"{one_node}; what NICs take part in carried over from {nodes}", near_held, constants
    )
    there = family_entry(
        *arguments, f"{nodes}; what happens inside a node carried over from {one_node}", far_held, constants
    )
    there["provenance"]["n_points"] = far.n_rows
    if kind == "normal":
        # The 8-node fabric carried a third of its NICs' rate where DeepEP's own tables show none of that.
        here["parameters"]["nic_contention"] = {
            "value": 0.0,
            "meaning": "NIC time added by each node beyond two: none in DeepEP's published tables (8 nodes)",
        }
    return here, there


ONE_SIDED_SPEC: Spec = {
    "start_s": (1.3e-5, 1e-6, 1e-4, "fixed cost of a call [s]"),
    "token_s": (5e-6, 1e-7, 1e-4, "an SM's time per token [s]"),
    "nvlink_rate_fraction": (0.8, 0.3, 1.0, RATE),
}


def one_sided_rows(facts: pd.DataFrame, direction: Direction) -> list[ExchangeRows]:
    """Published batch sweeps of one-sided kernels on GB200 NVL72 (case A05), one entry per group size.

    bfloat16 both ways; the router of that benchmark gives every token min(ep, top_k) different ranks.
    """
    sweep = [json.loads(text) for text in facts.loc[facts["case"] == "A05", "config_json"]]
    latency_s = 1e-6 * facts.loc[facts["case"] == "A05", "value"].astype(float).to_numpy()
    found = []
    for ep in sorted({row["ep"] for row in sweep}):
        here = [i for i, row in enumerate(sweep) if row["ep"] == ep and row["op"] == direction]
        tokens = np.array([sweep[i]["batch_per_rank"] for i in here], dtype=float).reshape(-1, 1, 1)
        shape = sweep[here[0]]
        copies = tokens * min(ep, shape["topk"]) * (ep - 1) / ep
        none = np.zeros_like(tokens)
        op = (Combine if direction == "combine" else Dispatch)(
            n_tokens=tokens, sent_nvlink=copies, received_nvlink=copies, sent_nic=none, received_nic=none,
            token_bytes=2.0 * shape["hidden"], hidden=shape["hidden"], top_k=shape["topk"],
            n_experts=shape["experts"], kind="normal",
        )  # fmt: skip
        key = (shape["hidden"], shape["topk"], shape["experts"])
        found.append(ExchangeRows(op, 1, key, latency_s[here], _large_domain(), n_ranks=ep))
    return found


def _large_domain() -> Cluster:
    cluster = _reference_cluster(18)
    gpu = cluster.gpu.model_copy(update={"nvlink_bytes_per_s": 900e9, "n_sms": 152})
    return cluster.model_copy(update={"gpu": gpu, "gpus_per_node": 4, "scale_up_ranks": 72})


def _one_sided_terms(
    op: Exchange, values: Mapping[str, float], cluster: Cluster, n_ranks: int, per_domain: int
) -> ExchangeTerms:
    return low_latency_terms(op, values, cluster, n_ranks, per_domain, copies_per_rank=True)


def _predict_one_sided(
    rows: Sequence[ExchangeRows], base: Mapping[str, float], values: Mapping[str, float]
) -> FloatArray:
    return predict_exchange(rows, {**base, **values}, _one_sided_terms)


def one_sided_families(facts: pd.DataFrame, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Families ``(ep_dispatch | ep_combine, one-sided)``: fitted on 8 ranks, shown on 32."""
    names = [*LOW_LATENCY_SPEC, "far_start_s", "far_peer_s", "nic_contention"]
    unused = {
        name: (0.0, "not in these kernels, or not measured") for name in names if name not in ONE_SIDED_SPEC
    }
    constants = {
        **unused,
        "nic_rate_fraction": (0.97, "share of the NIC's datasheet rate: 48.5 of 50 GB/s (NVIDIA, CX7)"),
        "pcie_rate_fraction": _PCIE,
        "n_sms": (0.0, "SMs kept from compute: none"),
    }
    base = {name: value for name, (value, _) in constants.items()}
    families = []
    directions: tuple[Direction, ...] = ("dispatch", "combine")
    for direction in directions:
        rows = one_sided_rows(facts, direction)
        eight, more = ([r for r in rows if (r.n_ranks == 8) is wanted] for wanted in (True, False))
        fit = solve(partial(_predict_one_sided, eight, base), _measured(eight), ONE_SIDED_SPEC)
        inside = ape_stats(_predict_one_sided(eight, base, fit.values), _measured(eight))
        held = ape_stats(_predict_one_sided(more, base, fit.values), _measured(more))
        show(f"{direction} one-sided: in {say(inside)}; 32 ranks from 8 {say(held)}")
        family = family_entry(
            f"ep_{direction}",
            "one-sided",
            fit,
            ONE_SIDED_SPEC,
            "",
            {"split": "32 ranks from 8", **held},
            constants,
        )
        data = "published: TensorRT-LLM NVLinkOneSided on GB200 NVL72, 8 ranks (published_facts A05)"
        family["provenance"]["data"] = data
        families.append(family)
    return families
