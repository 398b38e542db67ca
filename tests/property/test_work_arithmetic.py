"""What a step multiplies and moves, against the list of weights, for any layout of any model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesim.errors import LayoutError
from moesim.model import count_parameters, list_models, load_model
from moesim.plan.context import Choice
from moesim.routing.capacity import CapacityPolicy
from moesim.work.case import Layout
from moesim.work.memory import TrainingState, rank_elements
from moesim.work.ops import AllGather, AllReduce, Combine, Dispatch, Exchange, ExpertFfn, ReduceScatter
from moesim.work.step import Batch
from moesim.work.training import backward_step
from tests.work_cases import case_of, step_flops, step_of, weight_flops_per_token

MODELS = [row.name for row in list_models()]
MOE = [name for name in MODELS if load_model(name).is_moe]
EXAMPLES = settings(max_examples=60, deadline=None)
SIZES = st.sampled_from([1, 2, 4, 8])


@st.composite
def layouts(draw: st.DrawFn, model: str, *, pp: bool = False) -> Layout:
    moe = load_model(model).is_moe
    # encoder and decoder layers make no stages
    pp = pp and all(layer.role == "decoder" for layer in load_model(model).layers)
    tp, dp = draw(SIZES), draw(SIZES)
    ep, etp = (draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.sampled_from([1, 2]))) if moe else (1, 1)
    return Layout(tp=tp, dp=dp, ep=ep, etp=etp, pp=draw(st.sampled_from([1, 2, 3])) if pp else 1)


def made(model: str, layout: Layout, phase: str, choice: Choice | None = None, **context: str):
    try:
        return case_of(model, layout, phase, choice, **context)
    except LayoutError:
        assume(False)


@given(data=st.data(), model=st.sampled_from(MODELS), phase=st.sampled_from(["train", "decode"]))
@EXAMPLES
def test_products_of_a_step_are_two_per_weight_and_token(data, model, phase):
    # an encoder's layers are absent from a decode step, so the count of all layers does not apply
    encodes = any(layer.role == "encoder" for layer in load_model(model).layers)
    phase = "train" if encodes else phase
    case = made(model, data.draw(layouts(model)), phase)
    query = 1 if phase == "decode" else 16
    batch = Batch.of(phase, np.array([8.0, 16.0]), query, 16 if query > 1 else 100)
    flops = step_flops(step_of(case, batch))
    n_tokens = np.array([8.0, 16.0]) * query * case.layout.group_dp
    np.testing.assert_allclose(flops, n_tokens * weight_flops_per_token(case), rtol=1e-9)


@given(model=st.sampled_from(MODELS))
@EXAMPLES
def test_the_weights_a_token_meets_are_the_active_parameters(model):
    counted = count_parameters(load_model(model))
    case = case_of(model, Layout(), "train")
    extra = 0 if case.model.tied_embeddings else counted.embedding
    # what is no matrix product: norms (0.21% of the smallest), biases, convolutions, the shared experts' gate
    assert weight_flops_per_token(case) / 2 == pytest.approx(counted.active - extra, rel=2.5e-3)


@given(data=st.data(), model=st.sampled_from(MOE), phase=st.sampled_from(["prefill", "decode", "train"]))
@EXAMPLES
def test_expert_rows_are_tokens_times_top_k(data, model, phase):
    layout = data.draw(layouts(model))
    wanted = data.draw(st.sampled_from(["auto", "allgather", "normal", "nccl"]))
    case = made(model, layout, phase, Choice(dispatch=wanted))
    query = 1 if phase == "decode" else 16
    step = step_of(case, Batch.of(phase, 8.0, query, 16))
    moe = case.model.moe
    for block in step.blocks:
        for node in block.nodes:
            if isinstance(node.op, ExpertFfn):
                rows = node.op.tokens_per_expert
                assert rows.shape[2] == step.n_ranks
                assert moe.intermediate == node.op.intermediate * layout.etp
                total = rows.sum(axis=(2, 3)) / layout.etp
                np.testing.assert_allclose(total, 8 * query * layout.group_dp * moe.top_k, rtol=1e-9)


@given(
    data=st.data(), model=st.sampled_from(MOE), factor=st.sampled_from([None, 1.0, 1.5]),
    wanted=st.sampled_from(["normal", "low-latency", "nccl"]),
)  # fmt: skip
@EXAMPLES
def test_an_exchange_delivers_what_was_sent(data, model, factor, wanted):
    layout = data.draw(layouts(model))
    case = made(
        model,
        layout,
        "prefill",
        Choice(dispatch=wanted, capacity=factor and CapacityPolicy(factor)),
        routing="zipf",
    )
    step = step_of(case, Batch.of("prefill", 4.0, 16, 16), routing="zipf")
    ops = [node.op for block in step.blocks for node in block.nodes]
    for op in ops:
        if isinstance(op, Exchange):
            for sent, received in ((op.sent_nvlink, op.received_nvlink), (op.sent_nic, op.received_nic)):
                np.testing.assert_allclose(sent.sum(axis=2), received.sum(axis=2), rtol=1e-9, atol=1e-9)
            most = op.n_tokens * case.model.moe.top_k * case.layout.group_ranks
            assert np.all(op.sent_nvlink.sum(axis=2) + op.sent_nic.sum(axis=2) <= most.sum(axis=2) * 2 + 1e-6)
    there = [op for op in ops if isinstance(op, Dispatch)]
    back = [op for op in ops if isinstance(op, Combine)]
    for one, other in zip(there, back, strict=True):
        np.testing.assert_array_equal(one.sent_nic, other.received_nic)
        np.testing.assert_array_equal(one.received_nvlink, other.sent_nvlink)


@given(data=st.data(), model=st.sampled_from(MODELS))
@EXAMPLES
def test_weights_of_all_ranks_make_the_model(data, model):
    case = made(model, data.draw(layouts(model, pp=True)), "prefill")
    layout, counted = case.layout, count_parameters(case.model)
    held = dict.fromkeys(counted.by_part, 0)
    for stage in case.stages:
        for (part, _), n in rank_elements(case, stage).items():
            held[part] += n
    tied = case.model.tied_embeddings and layout.pp > 1
    copied = {layer.attention.kind for layer in case.model.layers} & {"mla"} or any(
        layer.attention.kind == "gqa" and layer.attention.n_kv_heads < layout.tp
        for layer in case.model.layers
    )
    for part, n in counted.by_part.items():
        cut = {"norm": 1, "router": 1, "expert": layout.ep * layout.etp}.get(part, layout.tp)
        if part == "shared_expert" and case.dispatch != "allreduce":
            cut = 1
        times = 2 if part == "embedding" and tied else 1
        whole = held[part] * cut / times
        assert whole == pytest.approx(n, rel=1e-4) or (part == "attention" and copied and whole >= n)


@given(
    data=st.data(), model=st.sampled_from(MODELS), recompute=st.sampled_from(["none", "selective", "full"])
)
@EXAMPLES
def test_backward_multiplies_twice_and_sends_the_other_way(data, model, recompute):
    case = made(model, data.draw(layouts(model)), "train")
    batch = Batch.of("train", 2.0, 16, 16)
    forward = step_of(case, batch)
    backward = backward_step(forward, TrainingState(recompute=recompute))
    layers_alone = step_flops(forward) - 2.0 * 2 * 16 * case.layout.group_dp * case.model.hidden * (
        -(-case.model.vocab // case.layout.tp) * case.layout.tp
    )
    again = layers_alone if recompute == "full" else 0.0
    np.testing.assert_allclose(step_flops(backward), 2 * step_flops(forward) + again, rtol=1e-9)
    turned = {
        AllGather: ReduceScatter,
        ReduceScatter: AllGather,
        AllReduce: AllReduce,
        Dispatch: Combine,
        Combine: Dispatch,
    }
    for there, here in zip(forward.blocks, backward.blocks, strict=True):
        n_again = len(here.nodes) - len(there.nodes)
        assert n_again == (len(there.nodes) if recompute == "full" and there.name in ("moe", "dense") else 0)
        for one, other in zip(reversed(there.nodes), here.nodes[n_again:], strict=True):
            assert type(other.op) is turned.get(type(one.op), type(one.op))
            if isinstance(one.op, Exchange):
                np.testing.assert_array_equal(one.op.sent_nic, other.op.received_nic)
                np.testing.assert_array_equal(one.op.received_nvlink, other.op.sent_nvlink)
                assert other.op.token_bytes == 2 * case.model.hidden
