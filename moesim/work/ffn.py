"""Feed-forward blocks: dense, shared experts, and routed experts with what carries tokens to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moesim.model.spec import LayerSpec, MoeSpec
from moesim.routing.capacity import CapacityLoss
from moesim.work.attention import ACTIVATION_BYTES, Named, gemm, norm, tp_sum
from moesim.work.case import Case
from moesim.work.ops import (
    AllGather,
    AllReduce,
    Combine,
    DenseGemm,
    Dispatch,
    Elementwise,
    ExpertFfn,
    FloatArray,
    ReduceScatter,
    Router,
)

__all__ = ["ExpertTraffic", "dense_ops", "expert_ops", "head_ops", "loss_ops", "sequence_cut"]


@dataclass(frozen=True, eq=False)
class ExpertTraffic:
    """Where one micro-batch's tokens go, in every MoE layer of a stage."""

    tokens_per_slot: FloatArray
    """[P, L, ep, slots] rows of each expert slot."""
    sent_nvlink: FloatArray
    """[P, L, ep] token copies, as in `moesim.work.ops.Exchange`; zeros where nothing is dispatched."""
    received_nvlink: FloatArray
    sent_nic: FloatArray
    received_nic: FloatArray
    loss: CapacityLoss | None = None
    """What a capacity has taken, over all layers; None without one."""

    def of_layers(self, rows: slice | list[int]) -> ExpertTraffic:
        """The same for some of the layers."""
        return ExpertTraffic(
            self.tokens_per_slot[:, rows],
            self.sent_nvlink[:, rows],
            self.received_nvlink[:, rows],
            self.sent_nic[:, rows],
            self.received_nic[:, rows],
            self.loss,
        )


def dense_ops(case: Case, layer: LayerSpec, n_tokens: FloatArray) -> Named:
    """Dense feed-forward, split over the attention replica."""
    width = (layer.dense_intermediate or 0) // case.layout.tp
    return [
        ("ffn_norm", norm(case, n_tokens), "elementwise"),
        *_mlp(case, n_tokens, width, layer.gated, "ffn"),
        *tp_sum(case, n_tokens),
    ]


def _mlp(case: Case, n_tokens: FloatArray, width: int, gated: bool, name: str) -> Named:
    n_up = 2 if gated else 1
    moved = n_tokens * width * (n_up + 1) * ACTIVATION_BYTES
    return [
        (f"{name}_up", gemm(case, n_tokens, n_up * width, case.model.hidden), "dense_ffn"),
        (f"{name}_act", Elementwise(moved), "elementwise"),
        (f"{name}_down", gemm(case, n_tokens, case.model.hidden, width), "dense_ffn"),
    ]


def expert_ops(
    case: Case, moe: MoeSpec, n_tokens: FloatArray, traffic: ExpertTraffic
) -> tuple[Named, Named, Named, Named, Named]:
    """Operators of one MoE block, in five parts: gate, dispatch, shared experts, experts, combine.

    Parameters
    ----------
    case
        Model, cluster and layout.
    moe
        The experts, whole.
    n_tokens : (n_points, 1, 1)
        Tokens of one attention replica.
    traffic
        Rows per slot and copies between ranks, for the layers of this block.
    """
    build = {"allreduce": _summed, "allgather": _gathered}.get(case.dispatch, _exchanged)
    return build(case, moe, n_tokens, traffic)


def _gate(case: Case, moe: MoeSpec, n_tokens: FloatArray) -> Named:
    return [
        ("ffn_norm", norm(case, n_tokens), "elementwise"),
        ("router", Router(n_tokens, case.model.hidden, moe.n_experts, moe.top_k), "router"),
    ]


def _shared(case: Case, moe: MoeSpec, n_tokens: FloatArray, split: int) -> Named:
    if not moe.n_shared:
        return []
    return _mlp(case, n_tokens, moe.shared_intermediate // split, moe.gated, "shared")


def _experts(
    case: Case, moe: MoeSpec, n_tokens: FloatArray, traffic: ExpertTraffic, sorted_rows: bool,
    rows_per_token: int,
) -> Named:  # fmt: skip
    op = ExpertFfn(
        case.on_ranks(traffic.tokens_per_slot), n_tokens, case.model.hidden, moe.intermediate // case.layout.etp,
        rows_per_token, case.expert_dtype, moe.gated, deepep_layout=sorted_rows,
    )  # fmt: skip
    return [("experts", op, "expert_ffn")]


def _summed(
    case: Case, moe: MoeSpec, n_tokens: FloatArray, traffic: ExpertTraffic
) -> tuple[Named, Named, Named, Named, Named]:
    """Tokens are on every rank already: each runs its own experts, one sum joins them.

    Where a replica holds several expert groups, each takes its share of the tokens.
    """
    entered = n_tokens / case.layout.n_expert_groups
    return (
        _gate(case, moe, n_tokens),
        [],
        _shared(case, moe, n_tokens, case.layout.tp),
        _experts(case, moe, entered, traffic, sorted_rows=False, rows_per_token=moe.top_k),
        tp_sum(case, n_tokens),
    )


def _gathered(
    case: Case, moe: MoeSpec, n_tokens: FloatArray, traffic: ExpertTraffic
) -> tuple[Named, Named, Named, Named, Named]:
    """Every rank of the group gets every token, runs its experts, and a reduce-scatter joins them."""
    whole = n_tokens * case.layout.group_dp
    values = whole * case.model.hidden
    own = n_tokens / case.layout.tp
    return (
        _gate(case, moe, own),
        [("dispatch", AllGather(values * case.dispatch_bytes_per_value, "tp_ep"), "dispatch")],
        _shared(case, moe, own, 1),
        _experts(case, moe, whole, traffic, sorted_rows=False, rows_per_token=moe.top_k),
        [
            ("combine", ReduceScatter(values * ACTIVATION_BYTES, "tp_ep"), "combine"),
            *_regather(case, n_tokens),
        ],
    )


def _regather(case: Case, n_tokens: FloatArray) -> Named:
    """Tokens that were cut over an attention replica are put together again."""
    if case.layout.tp == 1:
        return []
    payload = n_tokens * case.model.hidden * ACTIVATION_BYTES
    return [("tp_gather", AllGather(payload, "tp"), "all_reduce")]


def _exchanged(
    case: Case, moe: MoeSpec, n_tokens: FloatArray, traffic: ExpertTraffic
) -> tuple[Named, Named, Named, Named, Named]:
    """Each token travels to the ranks of its experts and back.

    NCCL carries rows that a kernel of their own has sorted by expert, and gives them back in that order;
    DeepEP's kernels do both on the way.
    """
    own = n_tokens / case.layout.tp
    kind: Literal["nccl", "low-latency", "normal"] = (
        "nccl" if case.dispatch == "nccl" else "low-latency" if case.dispatch == "low-latency" else "normal"
    )
    hidden, etp = case.model.hidden, case.layout.etp
    moved = own * (1 + moe.top_k) * hidden * ACTIVATION_BYTES
    sort: Named = [("permute", Elementwise(moved), "elementwise")] if kind == "nccl" else []
    unsort: Named = [("unpermute", Elementwise(moved), "elementwise")] if kind == "nccl" else []
    # each of an expert's shards carries its part of the tokens, then the shards exchange what they hold
    copies = [
        case.on_ranks(one / etp)
        for one in (traffic.sent_nvlink, traffic.received_nvlink, traffic.sent_nic, traffic.received_nic)
    ]
    sizes = (hidden, moe.top_k, moe.n_experts)
    bytes_out, bytes_back = hidden * case.dispatch_bytes_per_value, hidden * ACTIVATION_BYTES
    out = Dispatch(own, copies[0], copies[1], copies[2], copies[3], bytes_out, *sizes, kind)
    home = Combine(own, copies[1], copies[0], copies[3], copies[2], bytes_back, *sizes, kind)
    rows = case.on_ranks(traffic.tokens_per_slot.sum(axis=-1))
    spread: Named = []
    gather: Named = []
    if etp > 1:
        spread = [("etp_gather", AllGather(rows * hidden * ACTIVATION_BYTES, "etp"), "dispatch")]
        gather = [("etp_reduce", ReduceScatter(rows * hidden * ACTIVATION_BYTES, "etp"), "combine")]
    return (
        [*_gate(case, moe, own), *sort],
        [("dispatch", out, "dispatch"), *spread],
        _shared(case, moe, own, 1),
        # what arrives is one row per (token, expert), so none is for another rank's expert
        _experts(case, moe, rows, traffic, sorted_rows=kind != "nccl", rows_per_token=1),
        [*gather, ("combine", home, "combine"), *unsort, *_regather(case, n_tokens)],
    )


def head_ops(case: Case, n_sequences: FloatArray) -> Named:
    """Final norm, vocabulary projection and sampling, of the last token of each sequence."""
    ops = _logits(case, n_sequences)
    values = n_sequences * case.model.vocab
    if case.layout.tp > 1:
        ops.append(("logits_gather", AllGather(values * ACTIVATION_BYTES, "tp"), "all_reduce"))
    ops.append(("sampling", Elementwise(values * 3 * 4.0, 3), "head"))
    return ops


def loss_ops(case: Case, n_tokens: FloatArray) -> Named:
    """Final norm, vocabulary projection and cross-entropy, of every token.

    Each rank keeps its part of the vocabulary, so only sums of one number a token would be exchanged: left
    out. The loss casts its logits to float32 and takes their exponentials: 2 + 4 + 4 + 4 bytes of each.
    """
    return [*_logits(case, n_tokens), ("loss", Elementwise(n_tokens * _vocabulary(case) * 14.0, 3), "head")]


def _logits(case: Case, n_rows: FloatArray) -> Named:
    head = DenseGemm(n_rows, _vocabulary(case), case.model.hidden, "bfloat16")
    return [("final_norm", norm(case, n_rows), "elementwise"), ("lm_head", head, "head")]


def _vocabulary(case: Case) -> int:
    """Columns of the head on one rank."""
    return -(-case.model.vocab // case.layout.tp)


def sequence_cut(case: Case, n_tokens: FloatArray) -> Named:
    """Sum after attention, before tokens leave for their experts: each rank keeps its share."""
    if case.layout.tp == 1:
        return []
    payload = n_tokens * case.model.hidden * ACTIVATION_BYTES
    if case.dispatch == "allreduce":
        return [("attention_reduce", AllReduce(payload, "tp"), "all_reduce")]
    return [("attention_reduce", ReduceScatter(payload, "tp"), "all_reduce")]
