"""Hugging Face configurations: what is read, what is refused and how."""

from __future__ import annotations

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import ModelError
from moesim.model import ModelSpec, count_parameters, from_hf_config, supported_architectures

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
}
DEEPSEEK_V3 = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 8,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
GPT_OSS = {**MIXTRAL, "model_type": "gpt_oss", "head_dim": 32, "sliding_window": 128}
LLAMA4 = {
    "model_type": "llama4",
    "tie_word_embeddings": False,
    "text_config": {
        **MIXTRAL,
        "model_type": "llama4_text",
        "num_hidden_layers": 8,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 1024,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 512,
    },
}
SWITCH = {
    "model_type": "switch_transformers",
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 6,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 8,
    "vocab_size": 100,
}
QWEN3_NEXT = {
    **QWEN3_MOE,
    "model_type": "qwen3_next",
    "shared_expert_intermediate_size": 128,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
}
EVERY = (LLAMA, MIXTRAL, QWEN3_MOE, DEEPSEEK_V3, GPT_OSS, LLAMA4, SWITCH, QWEN3_NEXT)


def read(config, **changes) -> ModelSpec:
    return from_hf_config({**config, **changes}, "m")


def refused(config, **changes) -> str:
    with pytest.raises(ModelError) as caught:
        read(config, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_llama_is_dense_with_grouped_heads():
    spec = read(LLAMA)
    assert spec.n_layers == 4
    assert not spec.is_moe
    assert spec.moe is None
    assert spec.moe_layers == ()
    attention = spec.layers[0].attention
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (8, 2, 32)
    assert len(spec.layer_groups) == 1
    assert spec.gated


def test_key_value_heads_default_to_all_heads():
    config = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert read(config).layers[0].attention.n_kv_heads == 8


def test_null_counts_as_absent():
    assert read(MIXTRAL, sliding_window=None).layers[0].attention.window == 0
    assert read(MIXTRAL, sliding_window=64).layers[0].attention.window == 64


def test_deepseek_v3_layers_and_router():
    spec = read(DEEPSEEK_V3)
    assert spec.moe_layers == (1, 2, 3)
    assert spec.layers[0].dense_intermediate == 512
    moe = spec.moe
    assert (moe.n_experts, moe.top_k, moe.intermediate, moe.shared_intermediate) == (16, 4, 128, 256)
    assert (moe.n_groups, moe.top_groups, moe.scoring) == (4, 2, "sigmoid")
    assert moe.correction_bias
    assert moe.normalise
    attention = spec.layers[1].attention
    assert attention.kind == "mla"
    assert attention.head_dim == 24
    assert attention.kv_elements_per_token == 40


def test_deepseek_v2_scores_by_softmax_and_steps():
    spec = read(DEEPSEEK_V3, model_type="deepseek_v2", moe_layer_freq=2, q_lora_rank=None)
    assert spec.moe_layers == (2,)
    assert spec.moe.scoring == "softmax"
    assert not spec.moe.correction_bias
    assert spec.layers[0].attention.q_lora_rank is None


def test_qwen_sparse_step_and_dense_list():
    spec = read(QWEN3_MOE, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[1])
    assert spec.moe_layers == (3, 5)
    assert spec.layers[1].dense_intermediate == 512
    assert spec.moe.shared_intermediate == 0


def test_qwen_dense_width_is_asked_for_only_where_used():
    config = {k: v for k, v in QWEN3_MOE.items() if k != "intermediate_size"}
    assert read(config).n_layers == 4
    assert "intermediate_size is missing" in refused(config, mlp_only_layers=[0])


def test_qwen_sliding_window_from_a_layer_on():
    spec = read(
        {**LLAMA, "model_type": "qwen2"}, use_sliding_window=True, sliding_window=64, max_window_layers=3
    )
    assert [layer.attention.window for layer in spec.layers] == [0, 0, 0, 64]
    assert spec.layers[0].attention.qkv_bias
    assert not spec.layers[0].attention.out_bias


def test_qwen2_moe_shared_expert_is_gated():
    spec = read(QWEN3_MOE, model_type="qwen2_moe", shared_expert_intermediate_size=320)
    assert (spec.moe.n_shared, spec.moe.shared_intermediate, spec.moe.shared_gate) == (1, 320, True)
    assert not spec.moe.normalise


def test_gpt_oss_alternates_windows():
    spec = read(GPT_OSS, quantization_config={"quant_method": "mxfp4"})
    assert [layer.attention.window for layer in spec.layers] == [128, 0, 128, 0]
    assert spec.layers[0].attention.sinks
    assert spec.moe.bias
    assert spec.dtype_of("expert") == "w4a16_mxfp4"
    assert spec.dtype_of("attention") == "bfloat16"
    assert spec.dtype_of("router") == "bfloat16"
    assert spec.kv_elements_per_token == 2 * 2 * (2 * 32)


def test_layer_types_win_over_the_rule():
    kinds = ["full_attention"] * 3 + ["sliding_attention"]
    assert [layer.attention.window for layer in read(GPT_OSS, layer_types=kinds).layers] == [0, 0, 0, 128]
    kinds = ["full_attention"] + ["linear_attention"] * 3
    spec = read(QWEN3_NEXT, layer_types=kinds)
    assert [layer.attention.kind for layer in spec.layers] == ["gqa", "linear", "linear", "linear"]


def test_llama4_nested_interleaved_chunked():
    spec = read(LLAMA4)
    assert spec.moe_layers == (1, 3, 5, 7)
    assert spec.layers[0].dense_intermediate == 1024
    assert [layer.attention.window for layer in spec.layers] == [512, 512, 512, 0] * 2
    assert spec.layers[0].attention.chunked
    assert spec.moe.shared_intermediate == spec.moe.intermediate == 512


def test_llama4_lists_of_layers():
    text = {**LLAMA4["text_config"], "moe_layers": [2], "no_rope_layers": [0, 1] * 4}
    spec = read(LLAMA4, text_config=text)
    assert spec.moe_layers == (2,)
    assert [layer.attention.window for layer in spec.layers] == [0, 512] * 4


def test_switch_encoder_and_decoder():
    spec = read(SWITCH)
    assert [layer.role for layer in spec.layers] == ["encoder"] * 4 + ["decoder"] * 6
    assert spec.moe_layers == (1, 3, 5, 8)
    assert spec.layers[0].cross_attention is None
    assert spec.layers[4].cross_attention.cross
    assert not spec.gated
    assert spec.tied_embeddings
    assert spec.moe.top_k == 1


def test_switch_without_sparse_layers_is_dense():
    assert not read(SWITCH, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0).is_moe
    assert "more than the 4 layers" in refused(SWITCH, num_sparse_encoder_layers=5)


def test_qwen3_next_hybrid_state():
    spec = read(QWEN3_NEXT)
    assert [layer.attention.kind for layer in spec.layers] == ["linear", "linear", "linear", "gqa"]
    linear, full = spec.layers[0].attention, spec.layers[3].attention
    assert full.output_gate
    assert linear.kv_elements_per_token == 0
    assert linear.kv_tokens(1000) == 0
    # 8 value heads of 32 x 32, and 3 taps for q, k (4 x 32 each) and v (8 x 32).
    assert linear.state_elements_per_sequence == 8 * 32 * 32 + 3 * (128 + 128 + 256)
    assert spec.kv_elements_per_token == 2 * 2 * 64


@pytest.mark.parametrize(
    ("quantization", "dense", "expert"),
    [
        (None, "bfloat16", "bfloat16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block", "fp8_block"),
        ({"quant_method": "fp8"}, "fp8", "fp8"),
        ({"quant_method": "mxfp4"}, "bfloat16", "w4a16_mxfp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "bfloat16", "nvfp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8", "fp8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "fp8", "fp8"),
    ],
)
def test_native_format(quantization, dense, expert):
    spec = read(MIXTRAL, quantization_config=quantization)
    assert (spec.weight_dtype, spec.expert_dtype) == (dense, expert)
    assert spec.dtype_of("embedding") == "bfloat16"


def test_unknown_format_says_what_to_do():
    int4 = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert "'compressed-tensors'" in refused(MIXTRAL, quantization_config=int4)
    message = refused(MIXTRAL, quantization_config={"quant_method": "awq"})
    assert "'awq'" in message
    assert "remove quantization_config" in message


def test_class_name_stands_in_for_model_type():
    assert read(MIXTRAL, model_type=None, architectures=["MixtralForCausalLM"]).architecture == "mixtral"
    assert read(MIXTRAL, model_type="my_own", architectures=["MixtralForCausalLM"]).is_moe


def test_unknown_architecture_names_the_supported():
    message = refused(LLAMA, model_type="mamba")
    assert "'mamba'" in message
    assert all(name in message for name in supported_architectures())
    assert "model_type is missing" in refused({"hidden_size": 4})
    assert "'BertModel'" in refused({"architectures": ["BertModel"]})


@pytest.mark.parametrize("config", EVERY, ids=lambda c: c["model_type"])
def test_every_required_key_is_named_when_missing(config):
    inner = config.get("text_config", config)
    for key in inner:
        changed = {k: v for k, v in inner.items() if k != key}
        whole = {**config, "text_config": changed} if "text_config" in config else changed
        try:
            from_hf_config(whole, "m")
        except ModelError as error:
            assert key in str(error)
            assert "missing" in str(error)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "4096"),
        ("hidden_size", 4096.0),
        ("hidden_size", True),
        ("vocab_size", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**7),
        ("intermediate_size", 10**40),
        ("num_local_experts", [8]),
        ("num_experts_per_tok", {}),
        ("sliding_window", math.nan),
        ("tie_word_embeddings", "yes"),
        ("quantization_config", "fp8"),
    ],
)
def test_wrong_value_is_refused_with_key_and_value(key, value):
    message = refused(MIXTRAL, **{key: value})
    assert key in message or "layers" in message
    shown = type(value).__name__ if key == "quantization_config" else repr(value)
    assert shown[:40] in message


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (MIXTRAL, {"num_attention_heads": 8, "num_key_value_heads": 3}, "do not divide over 3"),
        (MIXTRAL, {"num_attention_heads": 7, "num_key_value_heads": 7}, "hidden_size 256 does not divide"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "top_k=9 experts of only 8"),
        (DEEPSEEK_V3, {"n_group": 5}, "16 experts do not divide into 5 groups"),
        (DEEPSEEK_V3, {"topk_group": 5}, "5 groups of only 4"),
        (DEEPSEEK_V3, {"num_experts_per_tok": 9}, "hold fewer than top_k=9"),
        (DEEPSEEK_V3, {"scoring_func": "tanh"}, "'tanh'"),
        (DEEPSEEK_V3, {"routed_scaling_factor": -1.0}, "routed_scaling_factor"),
        (DEEPSEEK_V3, {"routed_scaling_factor": math.inf}, "routed_scaling_factor"),
        (DEEPSEEK_V3, {"routed_scaling_factor": "2"}, "routed_scaling_factor"),
        (DEEPSEEK_V3, {"topk_method": 3}, "topk_method"),
        (QWEN3_MOE, {"mlp_only_layers": [4]}, "layer indices from 0 to 3"),
        (QWEN3_MOE, {"mlp_only_layers": 1}, "must be a list"),
        (GPT_OSS, {"layer_types": ["full_attention"]}, "one entry per layer, 4"),
        (GPT_OSS, {"layer_types": ["linear_attention"] * 4}, "'linear_attention'"),
        (LLAMA4, {"text_config": {**LLAMA4["text_config"], "no_rope_layers": [1, 2]}}, "8 values of 0 or 1"),
        (LLAMA4, {"text_config": [1]}, "text_config must be a JSON object"),
    ],
)
def test_contradictions_are_refused(config, changes, words):
    assert words in refused(config, **changes)


@pytest.mark.parametrize("config", [[], "x", 3, None, {}])
def test_anything_but_an_object_is_refused(config):
    with pytest.raises(ModelError):
        from_hf_config(config, "m")


def test_name_that_is_no_text_is_refused():
    with pytest.raises(ModelError, match="name"):
        from_hf_config(LLAMA, 3)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_spoilt_configuration_gives_a_model_or_a_model_error(data):
    config = copy.deepcopy(data.draw(st.sampled_from(EVERY)))
    inner = config.get("text_config", config)
    for key in data.draw(st.sets(st.sampled_from(sorted(inner)), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            del inner[key]
        else:
            inner[key] = data.draw(JSON_VALUES | st.integers(1, 64))
    try:
        spec = from_hf_config(config, "m")
    except ModelError as error:
        assert str(error).startswith("m: ")
        return
    count = count_parameters(spec)
    assert 0 < count.active <= count.total
