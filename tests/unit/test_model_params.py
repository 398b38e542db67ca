"""Weights of a layer, worked out by hand."""

from __future__ import annotations

import pytest

from moesim.errors import ModelError
from moesim.model import (
    AttentionSpec,
    LayerSpec,
    ModelSpec,
    MoeSpec,
    Published,
    count_parameters,
    layer_weights,
    load_model,
    model_weights,
)

GQA = AttentionSpec(kind="gqa", n_heads=4, n_kv_heads=2, head_dim=8, v_head_dim=8)
DENSE = LayerSpec(attention=GQA, dense_intermediate=64)
MOE = LayerSpec(attention=GQA, moe=MoeSpec(n_experts=8, top_k=2, intermediate=16))
H = 32


def size(layer: LayerSpec, prefix: str = "") -> int:
    return sum(w.n_parameters for name, w in layer_weights(layer, H).items() if name.startswith(prefix))


def test_dense_layer_by_hand():
    assert size(DENSE, "attention.") == H * 32 + 2 * H * 16 + 32 * H
    assert size(DENSE, "ffn.") == 3 * H * 64
    assert size(DENSE, "norm") == 2 * H


def test_ungated_layer_lacks_one_matrix():
    assert size(DENSE.model_copy(update={"gated": False}), "ffn.") == 2 * H * 64


def test_experts_count_all_and_top_k():
    weights = layer_weights(MOE, H)
    experts = [w for w in weights.values() if w.part == "expert"]
    assert sum(w.n_parameters for w in experts) == 8 * 3 * H * 16
    assert sum(w.n_active for w in experts) == 2 * 3 * H * 16
    assert weights["router.weight"].n_parameters == weights["router.weight"].n_active == H * 8


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({"qkv_bias": True}, 32 + 16 + 16),
        ({"out_bias": True}, H),
        ({"sinks": True}, 4),
        ({"output_gate": True}, H * 32),
    ],
)
def test_attention_options_by_hand(changes, extra):
    layer = LayerSpec(attention=GQA.model_copy(update=changes), dense_intermediate=64)
    assert size(layer, "attention.") - size(DENSE, "attention.") == extra


@pytest.mark.parametrize(("norm", "extra"), [("head", 2 * 8), ("full", 32 + 16)])
def test_query_key_norm(norm, extra):
    layer = LayerSpec(attention=GQA.model_copy(update={"qk_norm": norm}), dense_intermediate=64)
    assert size(layer) - size(DENSE) == extra


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({"bias": True}, 8 * (2 * 16 + H)),
        ({"router_bias": True}, 8),
        ({"correction_bias": True}, 8),
        ({"n_shared": 2, "shared_intermediate": 40}, 3 * H * 40),
        ({"n_shared": 1, "shared_intermediate": 40, "shared_gate": True}, 3 * H * 40 + H),
        ({"gated": False}, -8 * H * 16),
    ],
)
def test_expert_options_by_hand(changes, extra):
    layer = LayerSpec(attention=GQA, moe=MOE.moe.model_copy(update=changes))
    assert size(layer) - size(MOE) == extra


def test_mla_by_hand():
    mla = AttentionSpec(
        kind="mla", n_heads=4, n_kv_heads=4, head_dim=12, v_head_dim=10, q_lora_rank=20, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4,
    )  # fmt: skip
    layer = LayerSpec(attention=mla, dense_intermediate=64)
    q = H * 20 + 20 * 48
    kv = H * (16 + 4) + 16 * 4 * (8 + 10)
    assert size(layer, "attention.") == q + 20 + kv + 16 + 40 * H
    direct = LayerSpec(attention=mla.model_copy(update={"q_lora_rank": None}), dense_intermediate=64)
    assert size(direct, "attention.") == H * 48 + kv + 16 + 40 * H
    biased = LayerSpec(
        attention=mla.model_copy(update={"qkv_bias": True, "out_bias": True}), dense_intermediate=64
    )
    assert size(biased) - size(layer) == 20 + 16 + 4 + H


def test_gated_delta_net_by_hand():
    linear = AttentionSpec(kind="linear", n_heads=4, n_kv_heads=2, head_dim=8, v_head_dim=6, conv_kernel=4)
    qkv, v = 2 * 16 + 24, 24
    by_hand = H * qkv + H * v + H * 8 + 4 * qkv + 8 + 6 + v * H
    assert size(LayerSpec(attention=linear, dense_intermediate=64), "attention.") == by_hand


def test_layer_without_attention():
    assert size(LayerSpec(attention=AttentionSpec(kind="none"), dense_intermediate=64)) == 3 * H * 64 + 2 * H


def test_decoder_with_cross_attention_has_a_third_norm():
    cross = GQA.model_copy(update={"cross": True})
    layer = DENSE.model_copy(update={"cross_attention": cross})
    assert size(layer) - size(DENSE) == size(DENSE, "attention.") + H


def model(**changes) -> ModelSpec:
    base = {"name": "m", "architecture": "x", "hidden": H, "vocab": 100, "layers": (DENSE, MOE, MOE)}
    return ModelSpec(**{**base, **changes})


def test_whole_model_by_hand():
    count = count_parameters(model())
    assert count.total == size(DENSE) + 2 * size(MOE) + 2 * 100 * H + H
    assert count.total - count.active == 2 * 6 * 3 * H * 16
    assert count.active_without_embedding == count.active - 100 * H
    assert count.active_without_vocabulary == count.active - 200 * H
    assert count.total_without_vocabulary == count.total - 200 * H
    assert count.attention_per_layer == (size(DENSE, "attention."),) * 3
    assert sum(count.by_part.values()) == count.total
    assert sum(count.active_by_part.values()) == count.active


def test_tied_embedding_counts_once_and_positions_count():
    tied = model(tied_embeddings=True)
    assert "head" not in model_weights(tied)
    assert count_parameters(model()).total - count_parameters(tied).total == 100 * H
    assert count_parameters(tied).head == 0
    assert count_parameters(model(n_position_weights=7)).total - count_parameters(model()).total == 7


def test_mtp_is_apart():
    without, with_two = count_parameters(model()), count_parameters(model(n_mtp_layers=2))
    assert with_two.total == without.total
    assert without.mtp == 0
    assert with_two.mtp == 2 * (size(MOE) + 2 * H * H + 3 * H)
    assert with_two.total_with_mtp == without.total + with_two.mtp


def test_equal_layers_are_one_group():
    assert model().layer_groups == {DENSE: 1, MOE: 2}
    assert model().moe_layers == (1, 2)
    assert len(load_model("deepseek-v3").layer_groups) == 2


def test_two_kinds_of_experts_have_no_common_spec():
    other = LayerSpec(attention=GQA, moe=MOE.moe.model_copy(update={"top_k": 1}))
    with pytest.raises(ModelError, match="2 kinds of MoE layers"):
        _ = model(layers=(MOE, other)).moe


def test_window_bounds_the_cache():
    window = GQA.model_copy(update={"window": 10})
    assert (window.kv_tokens(4), window.kv_tokens(400), GQA.kv_tokens(400)) == (4, 10, 400)
    assert GQA.kv_elements_per_token == 2 * 2 * 8
    assert GQA.state_elements_per_sequence == 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: LayerSpec(attention=GQA),
        lambda: LayerSpec(attention=GQA, dense_intermediate=4, moe=MOE.moe),
        lambda: AttentionSpec(kind="gqa", n_heads=4, n_kv_heads=3, head_dim=8, v_head_dim=8),
        lambda: AttentionSpec(kind="gqa", n_heads=4, n_kv_heads=2, head_dim=0, v_head_dim=8),
        lambda: AttentionSpec(kind="mla", n_heads=4, n_kv_heads=4, head_dim=8, v_head_dim=8),
        lambda: MoeSpec(n_experts=8, top_k=2, intermediate=4, n_shared=1),
        lambda: model(layers=()),
    ],
)
def test_impossible_shapes_are_refused(build):
    with pytest.raises(ModelError):
        build()


@pytest.mark.parametrize(
    ("printed", "low", "high"),
    [
        ("37B", 36.5e9, 37.5e9),
        ("36.6B", 36.55e9, 36.65e9),
        ("1.04T", 1.035e12, 1.045e12),
        ("223M", 222.5e6, 223.5e6),
    ],
)
def test_printed_interval(printed, low, high):
    assert Published.interval(printed) == pytest.approx((low, high))
