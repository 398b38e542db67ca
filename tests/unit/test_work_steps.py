"""Operators of one step: what each rank runs, in which order, for which tokens."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import LayoutError
from moesim.plan.context import Choice
from moesim.routing.capacity import CapacityPolicy
from moesim.work.case import Layout
from moesim.work.forward import forward_step
from moesim.work.memory import TrainingState
from moesim.work.ops import (
    AllGather,
    AllReduce,
    AttentionDecode,
    AttentionPrefill,
    Combine,
    DenseGemm,
    Dispatch,
    Elementwise,
    ExpertFfn,
    Op,
    Pause,
    ReduceScatter,
)
from moesim.work.step import Batch, Step
from moesim.work.training import optimizer_op
from tests.work_cases import case_of, context_of, step_flops, step_of, whole


def ops_of(step: Step, kind: type[Op], block: str | None = None) -> list[Op]:
    return [
        node.op for one in step.blocks for node in one.nodes if isinstance(node.op, kind) and block in (None, one.name)
    ]  # fmt: skip


def names(step: Step, block: str) -> list[str]:
    return [node.name for one in step.blocks if one.name == block for node in one.nodes]


def made(model: str, layout: Layout, batch: Batch, choice: Choice | None = None) -> Step:
    return step_of(case_of(model, layout, batch.phase, choice), batch)


def pairs(op: AttentionPrefill) -> float:
    """(query, key) pairs of the causal mask, all sequences."""
    first = op.n_context - op.n_query
    return float((op.batch * op.n_query * (2 * first + op.n_query + 1) / 2).item())


def test_layers_run_in_order():
    step = made("deepseek-v3", Layout(dp=8, ep=8), Batch.of("decode", 8, 1, 100))
    ran = [step.blocks[block].layers[repeat] for block, repeat in step.order]
    assert ran == list(range(-1, 62))
    assert [block.name for block in step.blocks] == ["embedding", "dense", "moe", "head"]


def test_a_host_pause_opens_a_served_step_alone():
    served = made("mixtral-8x7b", Layout(), Batch.of("decode", 8, 1, 100))
    trained = made("mixtral-8x7b", Layout(), Batch.of("train", 1, 100, 100))
    assert [op.n_sequences.item() for op in ops_of(served, Pause)] == [8]
    assert not ops_of(trained, Pause)


def test_all_logits_in_training_and_the_last_token_s_in_serving():
    for phase, rows in (("train", 4 * 128), ("prefill", 4), ("decode", 4)):
        step = made(
            "mixtral-8x7b", Layout(tp=2, ep=2), Batch.of(phase, 4, 1 if phase == "decode" else 128, 128)
        )
        head = next(op for op in ops_of(step, DenseGemm, "head"))
        assert (head.m.item(), head.n) == (rows, 16000)
        # a trained model's vocabulary stays divided
        assert bool(ops_of(step, AllGather, "head")) == (phase != "train")


@pytest.mark.parametrize(
    ("dispatch", "phase", "n_reduce"), [("allreduce", "decode", 2), ("nccl", "train", 0)]
)
def test_tensor_parallel_sums(dispatch, phase, n_reduce):
    """Two sums a layer (Megatron-LM, arXiv:1909.08053), or a reduce-scatter and an all-gather in their place."""
    step = made("mixtral-8x7b", Layout(tp=4, ep=4), Batch.of(phase, 2, 1 if phase == "decode" else 64, 64))
    assert len(ops_of(step, AllReduce, "moe")) == n_reduce
    scattered = [op for kind in (ReduceScatter, AllGather) for op in ops_of(step, kind, "moe")]
    assert len(scattered) == 2 - n_reduce
    assert len(ops_of(step, AllReduce, "embedding")) == 1
    tokens = 2 * (1 if phase == "decode" else 64)
    for op in [*ops_of(step, AllReduce), *scattered]:
        assert op.payload_bytes.item() == tokens * 4096 * 2
        assert op.group == "tp"


def test_a_replica_of_several_expert_groups_shares_its_tokens():
    """tp=8 over two groups of ep=4: each takes half of the tokens, so that one sum joins all."""
    step = made("mixtral-8x7b", Layout(tp=8, ep=4), Batch.of("decode", 64, 1, 100))
    [op] = ops_of(step, ExpertFfn)
    assert op.n_tokens.item() == 32
    assert op.tokens_per_expert.shape[2:] == (8, 2)
    np.testing.assert_allclose(op.tokens_per_expert.sum(axis=(2, 3)), 64 * 2)


def test_rows_sorted_before_nccl_and_by_deepep_itself():
    layout, batch = Layout(dp=8, ep=8), Batch.of("prefill", 4, 64, 64)
    sorted_by_nccl = made("mixtral-8x7b", layout, batch, Choice("nccl"))
    by_deepep = made("mixtral-8x7b", layout, batch, Choice("normal"))
    assert {"permute.0", "unpermute.0"} < set(names(sorted_by_nccl, "moe"))
    assert "permute.0" not in names(by_deepep, "moe")
    for step, arrives_sorted in ((sorted_by_nccl, False), (by_deepep, True)):
        [op] = ops_of(step, ExpertFfn)
        assert (op.deepep_layout, op.top_k) == (arrives_sorted, 1)
        np.testing.assert_allclose(op.n_tokens, op.tokens_per_expert.sum(-1))


def test_a_gather_moves_all_tokens_to_all_ranks():
    step = made("deepseek-v3", Layout(dp=8, ep=8), Batch.of("decode", 16, 1, 100), Choice("allgather"))
    [gather], [scatter] = ops_of(step, AllGather, "moe"), ops_of(step, ReduceScatter, "moe")
    assert gather.payload_bytes.item() == 8 * 16 * 7168 * 2  # fp8 only where DeepEP carries it
    assert scatter.payload_bytes.item() == 8 * 16 * 7168 * 2
    assert {gather.group, scatter.group} == {"tp_ep"}
    [op] = ops_of(step, ExpertFfn)
    assert op.n_tokens.item() == 8 * 16


def test_dispatch_in_fp8_and_combine_in_16_bits():
    step = made("deepseek-v3", Layout(dp=16, ep=16), Batch.of("decode", 16, 1, 100))
    [out] = ops_of(step, Dispatch)
    assert out.token_bytes == 7168 * (1 + 4 / 128)
    trained = made("deepseek-v3", Layout(dp=16, ep=16), Batch.of("train", 1, 64, 64))
    assert ops_of(trained, Dispatch)[0].token_bytes == 7168 * 2


def test_expert_shards_exchange_what_each_brought():
    layout = Layout(tp=2, dp=4, ep=4, etp=2)
    step = made("mixtral-8x7b", layout, Batch.of("train", 1, 256, 256))
    [out] = ops_of(step, Dispatch)
    [experts] = ops_of(step, ExpertFfn)
    gathers = [op for op in ops_of(step, AllGather) if op.group == "etp"]
    scatters = [op for op in ops_of(step, ReduceScatter) if op.group == "etp"]
    assert experts.intermediate == 14336 // 2
    rows = experts.tokens_per_expert.sum(-1)
    np.testing.assert_array_equal(rows[..., 0::2], rows[..., 1::2])
    for op in (*gathers, *scatters):
        np.testing.assert_allclose(op.payload_bytes, rows * 4096 * 2)
    assert len(gathers) == len(scatters) == 1
    assert out.n_tokens.item() == 128


def test_absorbed_decode_reads_the_latent():
    step = made("deepseek-v3", Layout(tp=8, ep=8), Batch.of("decode", 4, 1, 5000))
    for op in ops_of(step, AttentionDecode):
        assert (op.n_heads, op.n_kv_heads, op.head_dim, op.v_head_dim) == (16, 1, 576, 512)
        assert op.n_context.item() == 5000
    batched = {(op.n, op.k, op.batched) for op in ops_of(step, DenseGemm) if op.batched > 1}
    assert batched == {(512, 128, 16), (128, 512, 16)}


def test_prefill_decompresses_the_cached_latents_too():
    fresh = made("deepseek-v3", Layout(dp=8, ep=8), Batch.of("prefill", 1, 1024, 1024))
    chunk = made("deepseek-v3", Layout(dp=8, ep=8), Batch.of("prefill", 1, 1024, 4096))
    rows = [[op.m.item() for op in ops_of(step, DenseGemm, "moe") if op.k == 512] for step in (fresh, chunk)]
    assert rows == [[1024], [4096]]


@pytest.mark.parametrize(("query", "context"), [(1024, 1024), (4096, 4096), (512, 3000)])
def test_halves_of_a_prompt_see_as_many_keys_as_the_whole(query, context):
    whole_batch = Batch.of("prefill", 1, query, context)
    half = whole_batch.share(0.5)
    assert half.n_tokens.item() == query / 2

    def seen(batch: Batch) -> float:
        first = batch.n_context - batch.n_query
        return float((batch.n_sequences * batch.n_query * (first + batch.n_query / 2)).item())

    assert 2 * seen(half) == pytest.approx(seen(whole_batch))
    several = Batch.of("prefill", 4, query, context).share(0.5)
    assert (several.n_sequences.item(), several.n_query.item(), several.n_context.item()) == (
        2,
        query,
        context,
    )


def test_chunked_attention_sees_its_own_chunk():
    """Llama 4: three of four layers attend inside chunks of 8192."""
    prefill = made("llama-4-scout", Layout(dp=8, ep=8), Batch.of("prefill", 1, 32768, 32768))
    counts = sorted({pairs(op) for op in ops_of(prefill, AttentionPrefill)})
    assert counts == [4 * 8192 * 8193 / 2, 32768 * 32769 / 2]
    decode = made("llama-4-scout", Layout(dp=8, ep=8), Batch.of("decode", 1, 1, 32768))
    assert sorted({op.n_context.item() for op in ops_of(decode, AttentionDecode)}) == [8193 / 2, 32768]
    short = made("llama-4-scout", Layout(dp=8, ep=8), Batch.of("decode", 1, 1, 4096))
    assert {op.n_context.item() for op in ops_of(short, AttentionDecode)} == {4096}


def test_an_encoder_reads_the_prompt_and_a_decoder_writes():
    prefill = made("switch-base-8", Layout(), Batch.of("prefill", 2, 512, 512))
    decode = made("switch-base-8", Layout(), Batch.of("decode", 2, 1, 512))
    train = made("switch-base-8", Layout(), Batch.of("train", 2, 512, 512))
    layers = [
        sorted({i for block in step.blocks if block.name in ("moe", "dense") for i in block.layers})
        for step in (prefill, decode, train)
    ]
    assert layers == [list(range(12)), list(range(12, 24)), list(range(24))]
    [cross] = [block for block in prefill.blocks if block.name == "cross"]
    assert cross.layers == tuple(range(12, 24))
    [projection] = [node.op for node in cross.nodes]
    assert (projection.m.item(), projection.n) == (1024, 2 * 12 * 64)
    # no mask in an encoder: every token sees all
    assert {pairs(op) for op in ops_of(prefill, AttentionPrefill)} == {2 * 512 * 512}
    # in training: encoder and cross-attention unmasked, the decoder's own causal
    assert {pairs(op) for op in ops_of(train, AttentionPrefill)} == {2 * 512 * 512, 2 * 512 * 513 / 2}
    # a decoder's new token makes no keys for its cross-attention
    qkv = [node.op.n for block in decode.blocks for node in block.nodes if node.name == "cross_qkv_proj.0"]
    assert set(qkv) == {12 * 64}


def test_linear_attention_moves_its_state():
    one, many = (made("qwen3-next-80b-a3b", Layout(), Batch.of("decode", n, 1, 100)) for n in (1, 4))
    moved = [
        sum(
            node.op.moved_bytes.item() for b in step.blocks for node in b.nodes if node.name == "delta_rule.0"
        )
        for step in (one, many)
    ]
    state = 2 * 32 * 128 * 128 * 4
    assert moved[0] >= state
    assert moved[1] == pytest.approx(4 * moved[0])


def test_capacity_drops_rows_and_their_copies():
    layout, batch = Layout(dp=8, ep=8), Batch.of("train", 2, 256, 256)
    free = made("mixtral-8x7b", layout, batch)
    dropped, sent = [], []
    for factor in (0.25, 0.5, 1.0, 1.5, 8.0):
        choice = Choice(capacity=CapacityPolicy(factor))
        step = made("mixtral-8x7b", layout, batch, choice)
        [experts], [out] = ops_of(step, ExpertFfn), ops_of(step, Dispatch)
        routed = context_of("mixtral-8x7b").traffic.traffic(
            case_of("mixtral-8x7b", layout, "train", choice), "train", [512.0]
        )
        dropped.append(float(routed.loss.dropped_fraction[0]))
        sent.append(float((out.sent_nvlink + out.sent_nic).sum()))
        assert experts.tokens_per_expert.max() <= np.ceil(8 * 512 * 2 / 8 * factor)
        kept = experts.tokens_per_expert.sum() / ops_of(free, ExpertFfn)[0].tokens_per_expert.sum()
        assert kept == pytest.approx(1 - dropped[-1])
    assert dropped == sorted(dropped, reverse=True)
    assert (dropped[-1], dropped[0]) == (0, pytest.approx(0.75, abs=0.01))
    assert sent == sorted(sent)
    assert sent[0] == pytest.approx(0.25 * sent[-1], rel=0.02)
    assert sent[-1] == pytest.approx(float(ops_of(free, Dispatch)[0].sent_nvlink.sum()))


def test_two_batches_take_half_each_and_share_the_streams():
    case = case_of("olmoe-1b-7b", Layout(dp=8, ep=8), "prefill", Choice("normal", "two-batch"))
    step = step_of(case, Batch.of("prefill", 4, 128, 128))
    [first, second] = ops_of(step, ExpertFfn)
    assert first.n_tokens.sum() + second.n_tokens.sum() == pytest.approx(16 * 8 * 4 * 128 * 8)
    streams = {node.name: node.stream for block in step.blocks for node in block.nodes}
    assert (streams["dispatch.0"], streams["combine.1"], streams["experts.0"]) == ("comm", "comm", "compute")


def test_optimizer_reads_and_writes_its_share():
    case = case_of("mixtral-8x7b", Layout(dp=16, ep=8), "train")
    whole_op = optimizer_op(case, whole(case), TrainingState(zero=0))
    shared = optimizer_op(case, whole(case), TrainingState(zero=1))
    assert isinstance(shared, Elementwise)
    expert, total = 32 * 8 * 3 * 4096 * 14336, 46_702_792_704
    assert whole_op.moved_bytes.item() == pytest.approx((total - expert + expert / 8) * 30)
    assert shared.moved_bytes.item() == pytest.approx(((total - expert) / 16 + expert / 8 / 2) * 30)


def test_layouts_that_cannot_be():
    uneven = case_of("mixtral-8x7b", Layout(), "decode")
    object.__setattr__(uneven, "layout", Layout(tp=3))
    with pytest.raises(LayoutError, match=r"32 heads do not divide over tp=3; fix: try tp=2"):
        step_of(uneven, Batch.of("decode", 1, 1, 10))
    case = case_of("mixtral-8x7b", Layout(), "decode")
    with pytest.raises(LayoutError, match="at most two micro-batches"):
        forward_step(case, Batch.of("decode", 1, 1, 10), [None] * 3, whole(case))  # type: ignore[list-item]
    object.__setattr__(case, "layout", Layout(pp=33))
    with pytest.raises(LayoutError, match=r"32 layers give no 33 stages; fix: try pp=32"):
        _ = case.stages


@pytest.mark.parametrize("sequences", [1.0, 2.0, 8.0])
def test_halves_of_a_mixed_step_hold_all_its_tokens(sequences):
    batch = Batch.of("prefill", sequences, 512, 512, n_riding=48, riding_context=2000)
    half = batch.share(0.5)
    assert 2 * half.n_tokens.item() == batch.n_tokens.item() == sequences * 512 + 48
    assert half.riders.n_sequences.item() == 24


def test_an_exchange_between_shards_pays_for_the_network():
    """Of 8 ranks a node, etp=2 leaves 4 of an exchange's peers: ep=8 crosses to another node."""
    layout = Layout(tp=2, dp=8, ep=8, etp=2)
    case = case_of("mixtral-8x7b", layout, "train")
    step = step_of(case, Batch.of("train", 1, 64, 64))
    pricer = context_of("mixtral-8x7b").pricer(case, "train")
    values = pricer.network.nccl["inter_node"]
    rate = values["nic_rate_fraction"] * case.cluster.nic_bytes_per_s
    for kind in (Dispatch, Combine):
        [op] = ops_of(step, kind)
        assert op.sent_nic.min() > 0
        # the busiest port in both directions, and a start over the network, which NVLink alone has not
        far_s = np.minimum(op.sent_nic, op.received_nic) * op.token_bytes / rate
        assert np.all(pricer.seconds(op) >= far_s + values["start_s"] + case.cluster.nic_latency_s)


def test_backward_of_one_engine_s_kernels_is_another_s():
    """Training's grouped products are not the serving engine's: the memo of prices keeps them apart."""
    case = case_of("mixtral-8x7b", Layout(), "train")
    [op] = ops_of(step_of(case, Batch.of("train", 1, 256, 256)), ExpertFfn)
    context = context_of("mixtral-8x7b")
    names = [context.pricer(case, phase).families(op)[0].implementation for phase in ("train", "decode")]
    times = [context.pricer(case, phase).seconds(op).sum() for phase in ("train", "decode")]
    assert names == ["trtllm-cutlass", "sglang-triton"]
    assert times[0] != pytest.approx(times[1], rel=0.01)


@pytest.mark.parametrize("model", ["deepseek-v3", "mixtral-8x7b", "llama-3.1-8b"])
def test_sequences_that_decode_beside_a_prompt_multiply_as_alone(model):
    """Products of a mixed step are those of its prompt and of its decode step, the last tokens' heads apart."""
    layout = Layout(dp=8, ep=8) if model != "llama-3.1-8b" else Layout()
    case = case_of(model, layout, "prefill")
    alone = step_flops(step_of(case, Batch.of("prefill", 2, 512, 512)))
    mixed = step_of(case, Batch.of("prefill", 2, 512, 512, n_riding=64, riding_context=3000))
    decode = case_of(model, layout, "decode")
    riding = step_flops(step_of(decode, Batch.of("decode", 64, 1, 3000)))
    np.testing.assert_allclose(step_flops(mixed), alone + riding, rtol=1e-9)
    cores = ops_of(mixed, AttentionDecode)
    assert cores
    assert {(op.batch.item(), op.n_context.item()) for op in cores} == {(64, 3000)}
