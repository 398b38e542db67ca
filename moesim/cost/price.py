"""Operators to seconds, by the profile of one device and the kernels of one engine."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moesim.cost.attention import attention_decode_s, attention_prefill_s
from moesim.cost.backend import Backend
from moesim.cost.elementwise import elementwise_s
from moesim.cost.expert_ffn import ExpertFfnParameters, expert_ffn_s
from moesim.cost.gemm import dense_gemm_s
from moesim.cost.memory import moved_bytes
from moesim.cost.router import router_s
from moesim.errors import ProfileError
from moesim.hardware.cluster import Cluster
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Family, Profile
from moesim.network.collectives import (
    all_gather_s,
    all_reduce_families,
    all_reduce_s,
    collective_levels,
    reduce_scatter_s,
    send_level,
    send_recv_s,
)
from moesim.network.exchange import combine_s, dispatch_s, exchange_families, exchange_way
from moesim.network.params import NetworkParams
from moesim.work.case import Case
from moesim.work.ops import (
    AllGather,
    AllReduce,
    AttentionDecode,
    AttentionPrefill,
    Combine,
    DenseGemm,
    Dispatch,
    Elementwise,
    Exchange,
    ExpertFfn,
    FloatArray,
    Op,
    Pause,
    ReduceScatter,
    Router,
    SendRecv,
)

__all__ = ["GroupShape", "Pricer"]


MEMO_ELEMENTS = 256
"""Operators with larger arrays are priced each time."""


@dataclass(frozen=True)
class GroupShape:
    """Ranks of one communication group, and how many of them reach each other without a NIC."""

    n_ranks: int
    ranks_per_domain: int
    """Ranks of it that share a scale-up domain; without NVLink, a host."""

    @property
    def crosses_domains(self) -> bool:
        """Whether some of its traffic leaves the domain, or without NVLink the host."""
        return self.ranks_per_domain < self.n_ranks


@dataclass(frozen=True, eq=False)
class Pricer:
    """Seconds of operators of one case."""

    case: Case
    profile: Profile
    backend: Backend
    decode: bool
    """Which of DeepEP's two expert layouts the sorted rows have."""
    memo: dict[Hashable, FloatArray] = field(default_factory=dict)
    """Prices of one cluster, profile and engine, shared between cases."""

    @cached_property
    def network(self) -> NetworkParams:
        """Parameters of the collectives."""
        return NetworkParams.from_profile(self.profile)

    @property
    def cluster(self) -> Cluster:
        """The case's cluster."""
        return self.case.cluster

    @cached_property
    def computing(self) -> Gpu:
        """The GPU that compute kernels see: less the SMs that an overlapped exchange keeps."""
        gpu = self.cluster.gpu
        if self.case.overlap == "none" or self.case.dispatch in ("allreduce", "allgather"):
            return gpu
        left = gpu.n_sms - self.network.sms_taken(self._way(self.case.dispatch))
        rates = {unit: rate * left / gpu.n_sms for unit, rate in gpu.flops_per_s.items()}
        return gpu.model_copy(update={"n_sms": left, "flops_per_s": rates})

    def copied_by_sms(self, op: Op) -> bool:
        """Whether an operator is an exchange that keeps SMs from compute while it runs."""
        return isinstance(op, Exchange) and (op.n_sms or self.network.sms_taken(self._way(op.kind))) > 0

    def memory_s(self, op: Op) -> FloatArray:
        """[P, L, R] time that an operator's bytes need at the rate of a long copy on its GPU's memory [s]."""
        fraction = self.profile.family("elementwise", "fused").values()["hbm_fraction"]
        return moved_bytes(op) / (fraction * self.cluster.gpu.hbm_bytes_per_s)

    def group(self, name: str) -> GroupShape:
        """Size and spread of a group: ``tp``, ``etp``, ``ep``, ``tp_ep``, ``dp``, ``edp`` or ``pp``."""
        layout, domain = self.case.layout, self.cluster.near_ranks
        n_ranks, stride = {
            "tp": (layout.tp, 1),
            "etp": (layout.etp, 1),
            "ep": (layout.ep, layout.etp),
            "tp_ep": (layout.group_ranks, 1),
            "dp": (layout.dp, layout.tp),
            "edp": (layout.edp, layout.ep * layout.etp),
            "pp": (layout.pp, layout.tp * layout.dp),
        }[name]
        return GroupShape(n_ranks, min(n_ranks, max(1, domain // stride)))

    def link(self, name: str) -> str:
        """Link that a group shares with others: ``nvlink``, ``nic``, or ``pcie`` in a host without NVLink."""
        if self.group(name).crosses_domains and self.cluster.nic_bytes_per_s > 0:
            return "nic"
        return "nvlink" if self.cluster.gpu.nvlink_bytes_per_s > 0 else "pcie"

    def _way(self, kind: str) -> str:
        """Library that serves the case's exchanges."""
        return exchange_way(kind, cluster=self.cluster, **self._spread("ep"))

    def _spread(self, name: str) -> dict[str, int]:
        """A group's size and how many of it share a domain: an expert's shards stand between its peers."""
        shape = self.group(name)
        return {"n_ranks": shape.n_ranks, "ranks_per_node_in_group": shape.ranks_per_domain}

    def families(self, op: Op) -> tuple[Family, ...]:
        """The profile's families that price an operator, the one that says most first."""
        find = self.profile.family
        match op:
            case DenseGemm():
                return (self._kernel("gemm", op.dtype),)
            case ExpertFfn():
                return (self._expert_family(op),)
            case AttentionPrefill():
                return (self._kernel("attention_prefill", op.kv_dtype, op.kind),)
            case AttentionDecode():
                return (self._kernel("attention_decode", op.kv_dtype, op.kind),)
            case Elementwise():
                return (find("elementwise", "fused"),)
            case Router():
                return find("router", "fused-topk"), self._kernel("gemm", "bfloat16")
            case Pause():
                return (find("host", self.backend.host or self.backend.name),)
            case _:
                return self._network_families(op)

    def _network_families(self, op: Op) -> tuple[Family, ...]:
        """Families of a collective: those of the kernel and of the levels that price it."""
        return tuple(self.profile.family(*name, "bfloat16") for name in self._network_names(op))

    def _network_names(self, op: Op) -> tuple[tuple[str, str], ...]:
        cluster = self.cluster
        match op:
            case Dispatch() | Combine():
                return exchange_families(op, cluster=cluster, **self._spread(op.group))
            case SendRecv():
                return ((send_level(not self.group(op.group).crosses_domains, cluster), "nccl"),)
            case AllReduce():
                return all_reduce_families(
                    op.payload_bytes,
                    cluster=cluster,
                    params=self.network,
                    backend=self.backend.all_reduce,
                    **self._spread(op.group),
                )
            case AllGather() | ReduceScatter():
                name = "all_gather" if isinstance(op, AllGather) else "reduce_scatter"
                shape = self.group(op.group)
                levels = collective_levels(name, shape.n_ranks, shape.ranks_per_domain, cluster)
                return tuple((level, "nccl") for level in levels)
            case _:
                raise ProfileError(f"no cost is known for a {type(op).__name__}")

    def _expert_family(self, op: ExpertFfn) -> Family:
        library = self.backend.sorted_by(self.profile, op.dtype) if op.deepep_layout else ""
        if library and op.dtype == "fp8_block":
            variant = "decode" if self.decode else "context"
            return self.profile.family("moe_ffn", f"{library}-{variant}", op.dtype)
        return self._kernel("moe_ffn", op.dtype)

    def _kernel(self, op: str, dtype: str, kind: str = "") -> Family:
        return self.backend.family(self.profile, op, dtype, kind)

    def seconds(self, op: Op) -> FloatArray:
        """(n_points, n_layers, n_ranks), or what broadcasts to it, time of one operator alone [s].

        Equal operators of equal groups are priced once for all cases that share `memo`.
        """
        key = self._key(op)
        if key is None:
            return self._seconds(op)
        if key not in self.memo:
            self.memo[key] = self._seconds(op)
        return self.memo[key]

    def _key(self, op: Op) -> Hashable | None:
        """What an operator's price depends on; None where comparing would cost more than pricing."""
        parts: list[Hashable] = [type(op).__name__, self.backend.name, self.decode, self.computing.n_sms]
        for name, value in vars(op).items():
            if isinstance(value, np.ndarray):
                if value.size > MEMO_ELEMENTS:
                    return None
                parts += [value.shape, value.tobytes()]
            else:
                parts.append(self.group(value) if name == "group" else value)
        return tuple(parts)

    def _seconds(self, op: Op) -> FloatArray:
        match op:
            case AllReduce() | AllGather() | ReduceScatter() | SendRecv():
                return self._collective_s(op)
            case Dispatch():
                return dispatch_s(op, cluster=self.cluster, params=self.network, **self._spread(op.group))
            case Combine():
                return combine_s(op, cluster=self.cluster, params=self.network, **self._spread(op.group))
            case _:
                return self._compute_s(op)

    def _compute_s(self, op: Op) -> FloatArray:
        families, gpu = self.families(op), self.computing
        params = families[0].values()
        match op:
            case DenseGemm():
                return dense_gemm_s(op, gpu=gpu, params=params)
            case ExpertFfn():
                # the host runs ahead of the GPU in a step, so what a lone call waits for it is not paid
                own = ExpertFfnParameters.from_values({**params, "host_s": 0.0})
                return expert_ffn_s(op, gpu=gpu, params=own, implementation=families[0].implementation)
            case AttentionPrefill():
                return attention_prefill_s(op, gpu=gpu, params=params)
            case AttentionDecode():
                return attention_decode_s(op, gpu=gpu, params=params)
            case Elementwise():
                return elementwise_s(op, gpu=gpu, params=params)
            case Router():
                return router_s(op, gpu=gpu, params=params, gemm_params=families[1].values())
            case Pause():
                return np.asarray(params["step_s"] + params["per_sequence_s"] * op.n_sequences)
            case _:
                raise ProfileError(f"no cost is known for a {type(op).__name__}")

    def _collective_s(self, op: AllReduce | AllGather | ReduceScatter | SendRecv) -> FloatArray:
        shape = self.group(op.group)
        if isinstance(op, SendRecv):
            return send_recv_s(
                op.payload_bytes,
                same_domain=not shape.crosses_domains,
                cluster=self.cluster,
                params=self.network,
            )
        if isinstance(op, AllReduce):
            return all_reduce_s(
                op.payload_bytes,
                n_ranks=shape.n_ranks,
                ranks_per_node_in_group=shape.ranks_per_domain,
                cluster=self.cluster,
                params=self.network,
                backend=self.backend.all_reduce,
            )
        price = all_gather_s if isinstance(op, AllGather) else reduce_scatter_s
        return price(
            op.payload_bytes,
            n_ranks=shape.n_ranks,
            ranks_per_node_in_group=shape.ranks_per_domain,
            cluster=self.cluster,
            params=self.network,
        )
