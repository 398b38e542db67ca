"""From NCCL's rows across nodes, over PCIe and point to point to the families that `moesim.network` prices by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.fit.common import FloatArray
from calibrate.fit.family import Kernel, Method, Note, Spec, Values, fit_family, known_family, seen_rows
from moesim.errors import MoesimError
from moesim.hardware import Cluster, Gpu, list_clusters
from moesim.hardware.profile import Profile, profile_for
from moesim.network import (
    NetworkParams,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    reduce_scatter_s,
    send_recv_s,
)

__all__ = ["priced_families", "priced_s", "prices"]

NIC_BYTES_PER_S = 50e9
"""NIC of a GPU that no catalog cluster has: 400 Gb/s [bytes/s]."""
METHOD = Method(("message_bytes",), loss_scale=0.08, max_evaluations=60)
_PRICED = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send_recv")

INTER_NODE: Spec = {
    "nic_rate_fraction": (0.9, 0.005, 1.0, "share of the NIC's datasheet rate"),
    "start_s": (1.5e-5, 1e-7, 1.0, "fixed cost of a call [s]"),
    "hop_s": (3e-6, 1e-9, 1.0, "cost of a hop beside the link's latency [s]"),
    "peer_s": (0.5e-6, 1e-9, 1e-2, "cost of posting to one far peer in an all-to-all [s]"),
}
NVLINK_SEND: Spec = {
    "nvlink_start_s": (8e-6, 1e-7, 1e-2, "fixed cost of a send [s]"),
    "nvlink_rate_fraction": (0.82, 0.005, 1.0, "share of the NVLink datasheet rate"),
}
PCIE: Spec = {
    "rate_fraction": (0.75, 0.005, 1.0, "share of the PCIe datasheet rate"),
    "start_s": (1.5e-5, 1e-7, 1.0, "fixed cost of a call [s]"),
    "step_s": (3e-6, 1e-9, 1.0, "cost of each ring step [s]"),
}


def priced_families(
    rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note
) -> list[dict[str, Any]]:
    """``inter_node``, ``send_recv`` and ``pcie`` of NCCL, each where its rows are there.

    Parameters
    ----------
    rows
        Of tables of kind ``collective``, of one device.
    gpu
        The device; NICs are those of its cluster in the catalog, or 400 Gb/s each.
    base
        Profile that has the links within a node; the catalog's where None.
    note
        Takes one line of progress.
    """
    params = _params(base) or _params(_catalog_profile(gpu))
    cluster = _cluster(gpu)
    mine = rows[_priced(rows)].reset_index(drop=True)
    families = []
    for level, spec in _levels(gpu):
        here = mine[_level(mine, cluster) == level]
        if seen_rows(here).sum() < 4:
            continue
        if params is None:
            note(f"{level}: no profile of {gpu.name} to start from, so no price is fitted; give --base")
            continue
        kernel = Kernel(level, "nccl", "any", spec)
        measured = known_family(base, kernel.key)
        kept = base if measured is not None and measured.provenance.kind == "fitted" else None
        source = f"shares of {cluster.nic_bytes_per_s:.3g} bytes/s" if level == "inter_node" else ""
        families.append(
            fit_family(
                kernel, here, _model(cluster, params, level), METHOD, base=kept, note=note, source=source
            )
        )
    return families


def prices(rows: pd.DataFrame, gpu: Gpu, profile: Profile) -> NDArray[np.bool_]:
    """[n] rows whose time plans would be priced with a family that was measured."""
    if _params(profile) is None:
        return np.zeros(len(rows), dtype=bool)
    fitted = {
        one.op for one in profile.families if one.implementation == "nccl" and one.provenance.kind == "fitted"
    }
    known = [name for name, _ in _levels(gpu) if name in fitted]
    return np.asarray(_priced(rows) & np.isin(_level(rows, _cluster(gpu)), known))


def priced_s(rows: pd.DataFrame, gpu: Gpu, profile: Profile) -> FloatArray:
    """Seconds of rows that `prices` chose, as `moesim.network` gives them."""
    params = _params(profile)
    if params is None:
        return np.full(len(rows), np.nan)
    return _times(rows.reset_index(drop=True), _cluster(gpu), params)


def _priced(rows: pd.DataFrame) -> NDArray[np.bool_]:
    return np.asarray((rows["implementation"] == "nccl") & rows["op"].isin(_PRICED))


def _levels(gpu: Gpu) -> list[tuple[str, Spec]]:
    inside = ("send_recv", NVLINK_SEND) if gpu.nvlink_bytes_per_s > 0 else ("pcie", PCIE)
    return [inside, ("inter_node", INTER_NODE)]


def _level(rows: pd.DataFrame, cluster: Cluster) -> NDArray[np.str_]:
    """Family that a row tells of; blank for NVLink's collectives, and across hosts of one NVLink domain."""
    nvlink = cluster.gpu.nvlink_bytes_per_s > 0
    inside = np.where(rows["op"] == "send_recv", "send_recv", "") if nvlink else "pcie"
    spans_hosts = nvlink and cluster.scale_up_ranks > cluster.gpus_per_node
    one_domain = spans_hosts & (_column(rows, "n_ranks") <= cluster.scale_up_ranks)
    return np.where(_column(rows, "n_nodes") > 1, np.where(one_domain, "", "inter_node"), inside)


def _model(
    cluster: Cluster, params: NetworkParams, level: str
) -> Callable[[pd.DataFrame, Values], FloatArray]:
    def predict(rows: pd.DataFrame, values: Values) -> FloatArray:
        return _times(rows, cluster, replace(params, nccl={**params.nccl, level: values}))

    return predict


def _times(rows: pd.DataFrame, cluster: Cluster, params: NetworkParams) -> FloatArray:
    out = np.empty(len(rows))
    payload = rows["message_bytes"].to_numpy(dtype=float)
    keys = rows.assign(_nodes=_column(rows, "n_nodes")).groupby(["op", "n_ranks", "_nodes"], sort=False)
    for (op, n_ranks, n_nodes), index in keys.indices.items():
        out[index] = _collective_s(str(op), payload[index], int(n_ranks), int(n_nodes), cluster, params)
    return out


def _collective_s(
    op: str, payload: FloatArray, n_ranks: int, n_nodes: int, cluster: Cluster, params: NetworkParams
) -> FloatArray:
    per_node = math.ceil(n_ranks / n_nodes)
    if op == "send_recv":
        return send_recv_s(payload, same_domain=n_nodes == 1, cluster=cluster, params=params)
    large = cluster.model_copy(update={"nodes": max(cluster.nodes, n_ranks)})
    shape: dict[str, Any] = {
        "n_ranks": n_ranks, "ranks_per_node_in_group": per_node, "cluster": large, "params": params,
    }  # fmt: skip
    if op == "all_reduce":
        return all_reduce_s(payload, **shape, backend="nccl")
    price = {"all_to_all": all_to_all_s, "all_gather": all_gather_s, "reduce_scatter": reduce_scatter_s}[op]
    return price(payload, **shape)


def _cluster(gpu: Gpu) -> Cluster:
    """The device's cluster of the catalog, or one made up of eight with 400 Gb/s NICs."""
    for cluster in list_clusters():
        if cluster.gpu.name == gpu.name and cluster.nic_bytes_per_s > 0:
            return cluster.model_copy(update={"gpu": gpu})
    return Cluster(
        gpu=gpu, nodes=1, gpus_per_node=8, scale_up_ranks=8 if gpu.nvlink_bytes_per_s > 0 else 1,
        nic_bytes_per_s=NIC_BYTES_PER_S, usd_per_gpu_hour=0.0,
    )  # fmt: skip


def _catalog_profile(gpu: Gpu) -> Profile | None:
    try:
        return profile_for(gpu.name)
    except MoesimError:
        return None


def _params(profile: Profile | None) -> NetworkParams | None:
    try:
        return NetworkParams.from_profile(profile) if profile is not None else None
    except MoesimError:
        return None


def _column(rows: pd.DataFrame, name: str) -> FloatArray:
    if name not in rows:
        return np.ones(len(rows))
    return np.asarray(rows[name].astype("Float64").fillna(1.0), dtype=float)
