"""How tokens reach their experts: what engines take unasked, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from moesim.errors import LayoutError
from moesim.hardware.cluster import Cluster
from moesim.network.exchange import exchange_way
from moesim.work.case import DispatchKind, Layout

__all__ = ["DispatchChoice", "choose_dispatch"]

PLACE = "policy.dispatch"


@dataclass(frozen=True)
class DispatchChoice:
    """A dispatch, and the reason."""

    kind: DispatchKind
    """How tokens are moved."""
    why: str
    """In one line."""
    library: str
    """Whose kernels are priced."""


def choose_dispatch(
    wanted: str, *, is_moe: bool, engine: str, cluster: Cluster, layout: Layout, phase: str
) -> DispatchChoice:
    """Pick a dispatch as engines do.

    Parameters
    ----------
    wanted
        ``auto``, or a kind to check.
    is_moe
        Whether the model has routed experts.
    engine
        ``sglang``, ``vllm``, ``trtllm`` or ``megatron``.
    cluster, layout
        GPUs, and how the model is cut over them.
    phase
        ``decode``, ``prefill`` or ``train``.

    Raises
    ------
    LayoutError
        If `wanted` does not go with the layout, or is no kind of dispatch.

    Notes
    -----
    Where one attention replica spans the expert group its ranks hold every token already and one all-reduce joins
    their experts' outputs; else SGLang (``--deepep-mode auto``) and vLLM exchange tokens with DeepEP, low latency
    in decode and normal in prefill, and TensorRT-LLM gathers all tokens on all ranks; training uses NCCL's
    all-to-all, as Megatron-Core's default dispatcher does. Sharded experts (`etp` > 1) are served by a gather, and
    so are GPUs that DeepEP is not written for: without NVLink, or older than Hopper. In a scale-up domain that
    spans hosts DeepEP's two kinds are priced as the one-sided kernels written for it.
    """
    if wanted != "auto" and wanted not in get_args(DispatchKind):
        raise LayoutError(
            "is no kind of dispatch",
            value=wanted,
            fix=f"auto, {', '.join(get_args(DispatchKind))}",
            place=PLACE,
        )
    if not is_moe or layout.group_dp == 1:
        return _within_replica(wanted, is_moe, layout, phase)
    if wanted == "allreduce":
        raise LayoutError(
            f"an expert group of {layout.group_dp} attention replicas has to exchange tokens", value=wanted,
            fix="write dispatch: auto, or let one replica span the group (ep x etp = tp)", place=PLACE,
        )  # fmt: skip
    if wanted == "auto":
        kind, why = _usual(engine, cluster, layout, phase)
    else:
        kind, why = wanted, "asked for"  # type: ignore[assignment]
    return DispatchChoice(kind, why, _library(kind, cluster, layout))


def _within_replica(wanted: str, is_moe: bool, layout: Layout, phase: str) -> DispatchChoice:
    training = phase == "train" and layout.ep > 1
    usual: DispatchKind = "nccl" if training else "allreduce"
    why = "training exchanges them by nccl" if training else "its ranks hold every token already"
    spans = f"one attention replica spans the expert group of {layout.ep * layout.etp} ranks: {why}"
    if is_moe and wanted not in ("auto", usual):
        raise LayoutError(
            spans, value=wanted, fix=f"write dispatch: auto or {usual}, or let several replicas share the experts",
            place=PLACE,
        )  # fmt: skip
    return DispatchChoice(usual, spans if is_moe else "no routed experts", "NCCL")


def _usual(engine: str, cluster: Cluster, layout: Layout, phase: str) -> tuple[DispatchKind, str]:
    gpu = cluster.gpu
    if phase == "train":
        return "nccl", "Megatron-Core's default dispatcher exchanges tokens by NCCL's all-to-all"
    if engine == "trtllm":
        return "allgather", "TensorRT-LLM gathers all tokens on all ranks of an expert group"
    if layout.etp > 1:
        return "allgather", f"experts cut over {layout.etp} ranks are served by a gather"
    if gpu.nvlink_bytes_per_s == 0 or "fp8" not in gpu.flops_per_s:
        lacks = "has no NVLink" if gpu.nvlink_bytes_per_s == 0 else "is older than Hopper"
        return "allgather", f"DeepEP is not written for {gpu.name}, which {lacks}"
    if phase == "decode":
        return "low-latency", "engines take DeepEP's low-latency kernels in decode"
    return "normal", "engines take DeepEP's normal kernels in prefill"


def _library(kind: DispatchKind, cluster: Cluster, layout: Layout) -> str:
    if kind not in ("low-latency", "normal"):
        return "NCCL"
    domain = max(1, cluster.near_ranks // layout.etp)
    way = exchange_way(
        kind, cluster=cluster, n_ranks=layout.ep, ranks_per_node_in_group=min(layout.ep, domain)
    )
    names = {"one-sided": "one-sided kernels over NVLink", "deepep-normal": "DeepEP normal"}
    return names.get(way, "DeepEP low latency")
