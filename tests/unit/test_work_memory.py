"""What a rank holds, item by item."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.model import count_parameters, load_model
from moesim.plan.context import Choice
from moesim.work.case import Layout
from moesim.work.memory import (
    TrainingState,
    inference_memory,
    kv_bytes_per_sequence,
    rank_elements,
    training_memory,
    weight_bytes,
)
from tests.work_cases import case_of, whole

ONE = np.ones(1)


def memory(
    model: str, layout: Layout, phase: str = "decode", *, n=32.0, context=4096.0, tokens=32.0, **choice
):
    case = case_of(model, layout, phase, Choice(**choice))
    return inference_memory(case, n * ONE, context * ONE, tokens * ONE)


def held(model: str, layout: Layout, part: str) -> int:
    case = case_of(model, layout, "decode")
    return sum(n for (one, _), n in rank_elements(case, whole(case)).items() if one == part)


def test_items_make_the_total():
    items = memory("deepseek-v3", Layout(dp=32, ep=32))
    parts = [value for name, value in items.items() if name not in ("total", "capacity")]
    np.testing.assert_allclose(np.sum(parts, axis=0), items["total"])
    assert items["capacity"] == 141e9


def test_redundant_experts_take_their_slots():
    plain = held("deepseek-v3", Layout(dp=32, ep=32), "expert")
    more = held("deepseek-v3", Layout(dp=32, ep=32, redundant_experts=32), "expert")
    assert more * 8 == plain * 9


@pytest.mark.parametrize(("tp", "share"), [(2, 2), (4, 4), (8, 4), (16, 4)])
def test_key_value_heads_fewer_than_ranks_are_copied(tp, share):
    # Qwen3-235B has 4 key-value heads of 128
    one, cut = (held("qwen3-235b-a22b", Layout(tp=n, ep=n), "attention") for n in (1, tp))
    model = load_model("qwen3-235b-a22b")
    key_value = model.n_layers * 2 * 4 * 128 * model.hidden
    assert cut == (one - key_value) // tp + key_value // share
    caches = []
    for n in (1, tp):
        case = case_of("qwen3-235b-a22b", Layout(tp=n, ep=n), "decode")
        caches.append(kv_bytes_per_sequence(case, whole(case), 1000 * ONE)[0])
    assert caches[0] == caches[1] * share


def test_mla_down_projections_are_copied():
    model = load_model("deepseek-v3")
    down = model.n_layers * model.hidden * (1536 + 512 + 64)
    one, cut = (held("deepseek-v3", Layout(tp=n, ep=n), "attention") for n in (1, 8))
    assert cut == (one - down) // 8 + down


def test_shared_experts_are_split_where_the_tokens_are_shared():
    together = held("deepseek-v3", Layout(tp=8, ep=8), "shared_expert")
    apart = held("deepseek-v3", Layout(dp=8, ep=8), "shared_expert")
    assert apart == 8 * together


def test_tied_embeddings_are_on_first_and_last_stage():
    apart = case_of("mixtral-8x7b", Layout(pp=3), "train")
    case = replace(apart, model=apart.model.model_copy(update={"tied_embeddings": True}))
    on = [rank_elements(case, stage)["embedding", "bfloat16"] for stage in case.stages]
    assert on == [case.model.vocab * case.model.hidden, 0, case.model.vocab * case.model.hidden]
    alone = case_of("switch-base-8", Layout(), "train")
    assert alone.model.tied_embeddings
    total = sum(rank_elements(alone, whole(alone)).values())
    assert total == count_parameters(alone.model).total


def test_low_latency_buffers_follow_sequences_not_the_prefill_chunk():
    few = memory("deepseek-v3", Layout(dp=32, ep=32), tokens=32.0)
    many = memory("deepseek-v3", Layout(dp=32, ep=32), tokens=8192.0)
    assert few["exchange_buffers"] == many["exchange_buffers"]
    assert many["activations"] > few["activations"]
    assert memory("deepseek-v3", Layout(dp=32, ep=32), dispatch="allgather")["exchange_buffers"] == 0
    assert memory("deepseek-v3", Layout(dp=32, ep=32), "prefill")["exchange_buffers"] == 1.5e9


def test_gathered_tokens_take_more_room_than_exchanged_ones():
    layout = Layout(dp=8, ep=8)
    gathered = memory("mixtral-8x7b", layout, "prefill", tokens=8192.0, dispatch="allgather")
    exchanged = memory("mixtral-8x7b", layout, "prefill", tokens=8192.0)
    assert gathered["activations"] > exchanged["activations"]


def test_a_window_bounds_the_cache():
    case = case_of("gpt-oss-20b", Layout(), "decode")
    near, far = (kv_bytes_per_sequence(case, whole(case), n * ONE)[0] for n in (1000.0, 2000.0))
    full = sum(layer.attention.window == 0 for layer in case.model.layers)
    assert 0 < full < case.model.n_layers
    assert (far - near) / 1000 == full * 2 * 8 * 64 * 2


def test_linear_layers_keep_a_state_and_no_cache():
    case = case_of("qwen3-next-80b-a3b", Layout(), "decode")
    near, far = (kv_bytes_per_sequence(case, whole(case), n * ONE)[0] for n in (0.0, 1000.0))
    full = sum(layer.attention.kind == "gqa" for layer in case.model.layers)
    assert far - near == 1000 * full * 2 * 2 * 256 * 2
    states = sum(layer.attention.state_elements_per_sequence for layer in case.model.layers)
    assert near == pytest.approx(4 * states + full * 32 * 2 * 2 * 256 * 2)


def test_an_encoder_caches_nothing_and_cross_attention_does():
    case = case_of("switch-base-8", Layout(), "decode")
    near, far = (kv_bytes_per_sequence(case, whole(case), n * ONE)[0] for n in (0.0, 1000.0))
    assert far - near == 1000 * 12 * 2 * (2 * 12 * 64) * 2


def test_stages_share_the_weights_and_the_fullest_counts():
    case = case_of("deepseek-v3", Layout(dp=8, ep=8, pp=4), "decode")
    per_stage = [sum(weight_bytes(case, stage).values()) for stage in case.stages]
    items = inference_memory(case, ONE, ONE, ONE)
    assert items["weights_dense"] + items["weights_experts"] == pytest.approx(max(per_stage), rel=0.05)
    assert sum(len(stage.layers) for stage in case.stages) == 61


def test_experts_in_four_bits():
    case = case_of("gpt-oss-120b", Layout(), "decode")
    experts = count_parameters(case.model).by_part["expert"]
    held_bytes = weight_bytes(case, whole(case))["weights_experts"]
    assert 0.53 * experts < held_bytes < 0.54 * experts + 2 * 36 * 128 * (2 * 2880 + 2880)


@pytest.mark.parametrize(
    ("recompute", "least", "most"), [("none", 0.5, 1.2), ("selective", 0.2, 0.6), ("full", 0, 0.1)]
)
def test_first_stage_holds_a_micro_batch_a_stage(recompute, least, most):
    """Dense layers keep about 34 bytes per token and hidden value (arXiv:2205.05198, equation 2)."""
    case = case_of("mixtral-8x22b", Layout(tp=2, dp=8, ep=4, etp=2, pp=8), "train")
    items = training_memory(case, TrainingState(recompute=recompute), 1, 4096, 32)
    few = training_memory(case, TrainingState(recompute=recompute), 1, 4096, 4)
    assert items["activations"] == pytest.approx(2 * few["activations"], rel=0.2)
    per_layer = items["activations"] / (8 * 7 * 4096 / 2 * 6144)
    assert least * 50 <= per_layer <= most * 50
    assert sum(v for k, v in items.items() if k not in ("total", "capacity")) == pytest.approx(items["total"])


def test_a_dense_layer_keeps_its_feed_forward():
    case = case_of("llama-3.1-8b", Layout(), "train")
    short, long = (
        training_memory(case, TrainingState(), 1, n, 1)["activations"] - n * case.model.vocab * 6.0
        for n in (1024, 2048)
    )
    assert long == pytest.approx(2 * short)
    assert 25 < short / (1024 * 32 * 4096) < 40
