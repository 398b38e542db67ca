"""Measured exchanges as the operators that the cost model prices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.fit.common import FloatArray
from calibrate.fit.family import Values
from calibrate.token_groups import distinct_groups
from moesim.hardware.catalog import list_clusters
from moesim.hardware.cluster import Cluster
from moesim.hardware.gpu import Gpu
from moesim.network.exchange import ExchangeTerms, low_latency_terms, normal_terms
from moesim.work.ops import Combine, Dispatch, Exchange

__all__ = [
    "DIRECTIONS", "GPUS_PER_NODE", "KINDS", "Direction", "ExchangeRows", "Kind", "exchange_rows", "measured_exchange",
    "measured_s", "predict_exchange", "reference_cluster",
]  # fmt: skip

Direction = Literal["dispatch", "combine"]
Kind = Literal["low-latency", "normal"]
KINDS: tuple[Kind, ...] = ("low-latency", "normal")
DIRECTIONS: tuple[Direction, ...] = ("dispatch", "combine")
GPUS_PER_NODE = 8
NIC_BYTES_PER_S = 50e9
"""NIC of a GPU that no cluster of the catalog has: 400 Gb/s."""


def reference_cluster(gpu: Gpu, n_nodes: int) -> Cluster:
    """Nodes of 8 such GPUs, with the NIC of the catalog's cluster of them: what a table does not tell."""
    nics = [cluster.nic_bytes_per_s for cluster in list_clusters() if cluster.gpu.name == gpu.name]
    return Cluster(
        gpu=gpu, nodes=n_nodes, gpus_per_node=GPUS_PER_NODE, scale_up_ranks=GPUS_PER_NODE,
        nic_bytes_per_s=nics[0] if nics else NIC_BYTES_PER_S, usd_per_gpu_hour=0.0,
    )  # fmt: skip


def measured_exchange(
    n_tokens: Sequence[float] | FloatArray, *, hidden: int, top_k: int, n_experts: int, n_nodes: int,
    kind: Kind, direction: Direction, n_sms: int = 0,
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
    n_ranks: int = GPUS_PER_NODE
    places: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Labels of the rows in the table."""


def exchange_rows(rows: pd.DataFrame, kind: Kind, direction: Direction, gpu: Gpu) -> list[ExchangeRows]:
    """Group rows of one kernel by shape, nodes and SMs; rows of nodes that are not of 8 GPUs are left out."""
    rows = rows[rows["n_ranks"] == GPUS_PER_NODE * rows["n_nodes"]]
    here = rows[(rows["implementation"] == f"deepep-{kind}") & (rows["op"] == f"ep_{direction}")]
    if here.empty:
        return []
    here = here.assign(n_sms=here["n_sms"].fillna(0).astype(int))
    found = []
    clusters = {int(n): reference_cluster(gpu, int(n)) for n in here["n_nodes"].unique()}
    for names, part in here.groupby(["hidden", "top_k", "n_experts", "n_nodes", "n_sms"]):
        hidden, top_k, n_experts, n_nodes, n_sms = (int(name) for name in names)
        op = measured_exchange(
            part["n_tokens"].to_numpy(), hidden=hidden, top_k=top_k, n_experts=n_experts, n_nodes=n_nodes,
            kind=kind, direction=direction, n_sms=n_sms,
        )  # fmt: skip
        key = (hidden, top_k, n_experts)
        measured_s, places = part["latency_s"].to_numpy(), part.index.to_numpy()
        found.append(ExchangeRows(op, n_nodes, key, measured_s, clusters[n_nodes], 8 * n_nodes, places))
    return found


Terms = Callable[[Exchange, Values, Cluster, int, int], ExchangeTerms]


def predict_exchange(rows: Sequence[ExchangeRows], values: Values, terms: Terms | None = None) -> FloatArray:
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


def measured_s(rows: Sequence[ExchangeRows]) -> FloatArray:
    """Measured times of all rows, in the order of `predict_exchange` [s]."""
    return np.concatenate([r.measured_s for r in rows])
