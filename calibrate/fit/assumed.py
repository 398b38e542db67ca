"""Families that no table was found for, made from those that were measured; replaced once they are.

``fit_table`` of `calibrate.fit.gemm` and `calibrate.fit.collectives` returns them beside its own; `merged` keeps
the measured one where both exist.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibrate.fit.family import assumed_family

__all__ = ["assumed_dense", "assumed_network", "merged"]

_RANK = {"fitted": 0, "measured": 0, "carried-over": 1, "datasheet": 2, "assumed": 2}


def merged(families: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One family a name: fitted before carried over before assumed, the later of two equals; order kept."""
    best: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for one in families:
        key = (one["op"], one["implementation"], one["dtype"])
        held = best.get(key)
        if held is None or _RANK[one["provenance"]["kind"]] <= _RANK[held["provenance"]["kind"]]:
            best[key] = one
    return [dict(one) for one in best.values()]


def assumed_dense(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """4-bit weights, kernels bound by memory, and the router, from the bfloat16 product among `found`."""
    names = ("torch-cublas", "bfloat16")
    dense = [one for one in found if one["op"] == "gemm" and (one["implementation"], one["dtype"]) == names]
    if not dense:
        return []
    return [_widened(dense[0]), *_unmeasured(dense[0])]


def _widened(bfloat16: Mapping[str, Any]) -> dict[str, Any]:
    """4-bit weights with 16-bit activations: bfloat16's kernel that reads fewer bytes, not measured."""
    data = "the bfloat16 family of this device with 4-bit weights read; widening them is taken to be hidden"
    values = {name: (item["value"], item["meaning"]) for name, item in bfloat16["parameters"].items()}
    return assumed_family("gemm", "torch-cublas", "w4a16_mxfp4", data, values)


def _unmeasured(bfloat16: Mapping[str, Any]) -> list[dict[str, Any]]:
    launch = bfloat16["parameters"]["launch_s"]["value"]
    fraction = bfloat16["parameters"]["hbm_fraction"]["value"]
    data = (
        "not measured; launch: this device's smallest bfloat16 products; memory: the rate at which they read "
        "weights"
    )
    element = {
        "launch_s": (launch, "one small kernel in a CUDA graph [s]"),
        "hbm_fraction": (fraction, "rate of a long copy over the datasheet's memory rate"),
    }
    router_data = (
        "not measured; TensorRT-LLM tech blog 3 (NVIDIA/TensorRT-LLM @2cd3b52) gives 252 us in 18 kernels and "
        "15 us fused for top-8 of 256 experts on B200, at a batch that it does not state"
    )
    router = {
        "topk_s": (5e-6, "fused scores, top-k and normalisation of few tokens [s]"),
        "token_s": (1e-10, "one score of one token on one SM [s]"),
        "hbm_fraction": (fraction, "rate of reading scores over the datasheet's memory rate"),
    }
    return [
        assumed_family("elementwise", "fused", "any", data, element),
        assumed_family("router", "fused-topk", "any", router_data, router),
    ]


def assumed_network(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Families across nodes, over PCIe and point to point: datasheet rates with assumed efficiencies.

    Only beside NCCL's collectives, and only those not `found`.
    """
    measured = {one["op"] for one in found if one["implementation"] == "nccl"}
    return [one for one in _node_links() if one["op"] not in measured] if measured else []


def _node_links() -> list[dict[str, Any]]:
    start = (1.5e-5, "fixed cost of a call; assumed")
    across = (
        "share of the NIC rate: 48.5 of 50 GB/s reachable on CX7 NDR (NVIDIA, published_facts NET-NDR); "
        "start, hop and peer costs assumed"
    )
    point = "NVLink share: 370 of 450 GB/s outside all-reduce (NVIDIA, published_facts NET-NVL-eff); start assumed"
    return [
        assumed_family("inter_node", "nccl", "any", across, {
            "nic_rate_fraction": (0.97, "share of the NIC's datasheet rate"),
            "start_s": start,
            "hop_s": (3e-6, "cost of a hop beside the link's latency; assumed"),
            "peer_s": (0.5e-6, "cost of posting to one far peer in an all-to-all; assumed"),
        }),
        assumed_family("pcie", "nccl", "any", "no measurement without NVLink in the data; assumed", {
            "rate_fraction": (0.75, "share of the PCIe datasheet rate; assumed"),
            "start_s": start,
            "step_s": (3e-6, "cost of each ring step; assumed"),
        }),
        assumed_family("send_recv", "nccl", "any", point, {
            "nvlink_start_s": (8e-6, "fixed cost of a send; assumed"),
            "nvlink_rate_fraction": (0.82, "share of the NVLink datasheet rate"),
        }),
    ]  # fmt: skip
