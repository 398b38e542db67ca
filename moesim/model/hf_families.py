"""Layers of each model family, read from the keys that its Hugging Face configuration uses.

A new family is one function and one line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from moesim.errors import ModelError
from moesim.model.hf_reader import ConfigReader
from moesim.model.spec import AttentionSpec, LayerSpec, MoeSpec

__all__ = ["CLASSES", "FAMILIES", "Body"]


class Body(NamedTuple):
    """What a family reads: its layers, and learned positions outside them."""

    layers: tuple[LayerSpec, ...]
    n_position_weights: int = 0


# Blocks that several families share


def _gqa(c: ConfigReader, **options: Any) -> AttentionSpec:
    """Grouped-query attention; head_dim is hidden / heads where the file does not say."""
    n_heads = c.count("num_attention_heads", "num_heads")
    n_kv_heads = c.count("num_key_value_heads", default=n_heads)
    if c.has("head_dim"):
        head_dim = c.count("head_dim")
    else:
        hidden = c.count("hidden_size")
        if hidden % n_heads:
            raise ModelError(
                f"hidden_size {hidden} does not divide over {n_heads} attention heads", fix="give head_dim"
            )
        head_dim = hidden // n_heads
    return AttentionSpec(
        kind="gqa",
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        **options,
    )


def _mla(c: ConfigReader) -> AttentionSpec:
    n_heads = c.count("num_attention_heads")
    nope, rope = c.count("qk_nope_head_dim"), c.count("qk_rope_head_dim")
    bias = c.flag("attention_bias", False)
    return AttentionSpec(
        kind="mla",
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=nope + rope,
        v_head_dim=c.count("v_head_dim"),
        q_lora_rank=c.count("q_lora_rank") if c.has("q_lora_rank") else None,
        kv_lora_rank=c.count("kv_lora_rank"),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        qkv_bias=bias,
        out_bias=bias,
    )


def _n_layers(c: ConfigReader) -> int:
    return c.count("num_hidden_layers", "num_layers")


def _layers(
    c: ConfigReader,
    attention: Callable[[int], AttentionSpec],
    moe: MoeSpec | None,
    is_moe: Callable[[int], bool],
    dense_key: str = "intermediate_size",
) -> tuple[LayerSpec, ...]:
    """One spec per layer; the dense width is asked for only where a layer needs it."""

    def layer(index: int) -> LayerSpec:
        if moe is not None and is_moe(index):
            return LayerSpec(attention=attention(index), moe=moe)
        return LayerSpec(attention=attention(index), dense_intermediate=c.count(dense_key))

    return tuple(layer(i) for i in range(_n_layers(c)))


def _sliding(c: ConfigReader, full: AttentionSpec) -> Callable[[int], AttentionSpec]:
    """Qwen's rule: with use_sliding_window, layers from max_window_layers on have a window."""
    if not c.flag("use_sliding_window", False):
        return lambda index: full
    window = full.model_copy(update={"window": c.count("sliding_window")})
    first = c.count("max_window_layers", default=0, minimum=0)
    return lambda index: window if index >= first else full


# Families


def _llama(c: ConfigReader) -> Body:
    bias = c.flag("attention_bias", False)
    attention = _gqa(c, qkv_bias=bias, out_bias=bias)
    return Body(_layers(c, lambda index: attention, None, lambda index: False))


def _qwen2(c: ConfigReader) -> Body:
    attention = _sliding(c, _gqa(c, qkv_bias=True))
    return Body(_layers(c, attention, None, lambda index: False))


def _qwen3(c: ConfigReader) -> Body:
    bias = c.flag("attention_bias", False)
    attention = _sliding(c, _gqa(c, qkv_bias=bias, out_bias=bias, qk_norm="head"))
    return Body(_layers(c, attention, None, lambda index: False))


def _mixtral(c: ConfigReader) -> Body:
    window = c.count("sliding_window", default=0, minimum=0)
    attention = _gqa(c, window=window)
    moe = MoeSpec(
        n_experts=c.count("num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        intermediate=c.count("intermediate_size"),
    )
    return Body(_layers(c, lambda index: attention, moe, lambda index: True))


def _olmoe(c: ConfigReader) -> Body:
    bias = c.flag("attention_bias", False)
    attention = _gqa(c, qkv_bias=bias, out_bias=bias, qk_norm="full")
    moe = MoeSpec(
        n_experts=c.count("num_experts"),
        top_k=c.count("num_experts_per_tok"),
        intermediate=c.count("intermediate_size"),
        normalise=c.flag("norm_topk_prob", False),
    )
    return Body(_layers(c, lambda index: attention, moe, lambda index: True))


def _qwen_moe(c: ConfigReader, *, normalise: bool) -> MoeSpec:
    shared = c.count("shared_expert_intermediate_size", default=0, minimum=0)
    return MoeSpec(
        n_experts=c.count("num_experts"),
        top_k=c.count("num_experts_per_tok"),
        intermediate=c.count("moe_intermediate_size"),
        n_shared=1 if shared else 0,
        shared_intermediate=shared,
        shared_gate=shared > 0,
        normalise=c.flag("norm_topk_prob", normalise),
    )


def _qwen_sparse(c: ConfigReader) -> Callable[[int], bool]:
    dense = c.indices("mlp_only_layers", _n_layers(c))
    step = c.count("decoder_sparse_step", default=1)
    return lambda index: index not in dense and (index + 1) % step == 0


def _qwen2_moe(c: ConfigReader) -> Body:
    attention = _sliding(c, _gqa(c, qkv_bias=True))
    return Body(_layers(c, attention, _qwen_moe(c, normalise=False), _qwen_sparse(c)))


def _qwen3_moe(c: ConfigReader) -> Body:
    bias = c.flag("attention_bias", False)
    attention = _sliding(c, _gqa(c, qkv_bias=bias, out_bias=bias, qk_norm="head"))
    return Body(_layers(c, attention, _qwen_moe(c, normalise=False), _qwen_sparse(c)))


def _qwen3_next(c: ConfigReader) -> Body:
    """Three gated delta nets to one gated full attention; a shared expert in every MoE layer."""
    bias = c.flag("attention_bias", False)
    gate = c.flag("attn_output_gate", True)
    full = _gqa(c, qkv_bias=bias, out_bias=bias, qk_norm="head", output_gate=gate)
    linear = AttentionSpec(
        kind="linear",
        n_heads=c.count("linear_num_value_heads"),
        n_kv_heads=c.count("linear_num_key_heads"),
        head_dim=c.count("linear_key_head_dim"),
        v_head_dim=c.count("linear_value_head_dim"),
        conv_kernel=c.count("linear_conv_kernel_dim"),
    )
    types = c.choices("layer_types", ("full_attention", "linear_attention"), _n_layers(c))
    interval = c.count("full_attention_interval", default=4)

    def attention(index: int) -> AttentionSpec:
        is_full = types[index] == "full_attention" if types else (index + 1) % interval == 0
        return full if is_full else linear

    return Body(_layers(c, attention, _qwen_moe(c, normalise=True), _qwen_sparse(c)))


def _gpt_oss(c: ConfigReader) -> Body:
    """Windowed and full attention in turn, with biases and a learned sink per head; biases in the experts."""
    bias = c.flag("attention_bias", True)
    full = _gqa(c, qkv_bias=bias, out_bias=bias, sinks=True)
    window = full.model_copy(update={"window": c.count("sliding_window")})
    types = c.choices("layer_types", ("full_attention", "sliding_attention"), _n_layers(c))
    moe = MoeSpec(
        n_experts=c.count("num_local_experts"),
        top_k=c.count("num_experts_per_tok", "experts_per_token"),
        intermediate=c.count("intermediate_size"),
        bias=True,
        router_bias=True,
    )

    def attention(index: int) -> AttentionSpec:
        is_full = types[index] == "full_attention" if types else index % 2 == 1
        return full if is_full else window

    return Body(_layers(c, attention, moe, lambda index: True))


_SCORING: dict[str, Literal["softmax", "sigmoid"]] = {"softmax": "softmax", "sigmoid": "sigmoid"}


def _deepseek_moe(c: ConfigReader, scoring: Literal["softmax", "sigmoid"]) -> MoeSpec:
    width = c.count("moe_intermediate_size")
    n_shared = c.count("n_shared_experts", default=0, minimum=0)
    top_groups = c.count("topk_group", default=1)
    if top_groups > 1 and not c.has("n_group"):
        raise c.refuse_missing("n_group")
    n_groups = c.count("n_group", default=1)
    return MoeSpec(
        n_experts=c.count("n_routed_experts"),
        top_k=c.count("num_experts_per_tok"),
        intermediate=width,
        n_shared=n_shared,
        shared_intermediate=n_shared * width,
        n_groups=n_groups,
        top_groups=top_groups if c.has("topk_group") else n_groups,
        scoring=_SCORING[c.one_of("scoring_func", tuple(_SCORING), scoring)],
        normalise=c.flag("norm_topk_prob", scoring == "sigmoid"),
        scaling=c.number("routed_scaling_factor", 1.0),
        correction_bias=c.text("topk_method", "noaux_tc" if scoring == "sigmoid" else "greedy") == "noaux_tc",
    )


def _deepseek_layers(c: ConfigReader, attention: AttentionSpec, moe: MoeSpec) -> Body:
    first = c.count("first_k_dense_replace", default=0, minimum=0)
    step = c.count("moe_layer_freq", default=1)
    return Body(_layers(c, lambda index: attention, moe, lambda i: i >= first and i % step == 0))


def _deepseek(c: ConfigReader) -> Body:
    bias = c.flag("attention_bias", False)
    return _deepseek_layers(c, _gqa(c, qkv_bias=bias, out_bias=bias), _deepseek_moe(c, "softmax"))


def _deepseek_v2(c: ConfigReader) -> Body:
    return _deepseek_layers(c, _mla(c), _deepseek_moe(c, "softmax"))


def _deepseek_v3(c: ConfigReader) -> Body:
    return _deepseek_layers(c, _mla(c), _deepseek_moe(c, "sigmoid"))


def _llama4(c: ConfigReader) -> Body:
    """Chunked attention with rotary positions but in every fourth layer; one shared expert beside top-1."""
    n_layers = _n_layers(c)
    bias = c.flag("attention_bias", False)
    full = _gqa(c, qkv_bias=bias, out_bias=bias)
    chunk = c.count("attention_chunk_size", default=0, minimum=0)
    chunked = full.model_copy(update={"window": chunk, "chunked": True}) if chunk else full
    # The list's name misleads: 1 marks a layer that has rotary positions, and those are chunked.
    rope = c.flags("no_rope_layers", n_layers)
    step = c.count("interleave_moe_layer_step", default=1)
    listed = c.indices("moe_layers", n_layers)
    width = c.count("intermediate_size")
    moe = MoeSpec(
        n_experts=c.count("num_local_experts"),
        top_k=c.count("num_experts_per_tok"),
        intermediate=width,
        n_shared=1,
        shared_intermediate=width,
        scoring="sigmoid",
        normalise=False,
    )

    def attention(index: int) -> AttentionSpec:
        return chunked if (rope[index] if rope else (index + 1) % 4 != 0) else full

    def is_moe(index: int) -> bool:
        return index in listed if listed else (index + 1) % step == 0

    return Body(_layers(c, attention, moe, is_moe, dense_key="intermediate_size_mlp"))


def _switch(c: ConfigReader) -> Body:
    """T5 with a top-1 expert layer in place of every n-th feed-forward, in encoder and decoder."""
    n_heads, head_dim = c.count("num_heads"), c.count("d_kv")
    attention = AttentionSpec(
        kind="gqa", n_heads=n_heads, n_kv_heads=n_heads, head_dim=head_dim, v_head_dim=head_dim
    )
    gated = c.flag("is_gated_act", False)
    width = c.count("d_ff")
    moe = MoeSpec(
        n_experts=c.count("num_experts"),
        top_k=c.count("num_selected_experts", default=1),
        intermediate=width,
        gated=gated,
        normalise=False,
        router_bias=c.flag("router_bias", False),
    )

    def stack(role: Literal["encoder", "decoder"], n_layers: int, n_sparse: int) -> list[LayerSpec]:
        step = n_layers // n_sparse if n_sparse else 0
        cross = attention.model_copy(update={"cross": True}) if role == "decoder" else None
        sparse = LayerSpec(attention=attention, cross_attention=cross, moe=moe, role=role)
        dense = LayerSpec(
            attention=attention, cross_attention=cross, dense_intermediate=width, gated=gated, role=role
        )
        return [sparse if step == 1 or (step > 1 and i % step == 1) else dense for i in range(n_layers)]

    n_encoder = c.count("num_layers")
    n_decoder = c.count("num_decoder_layers", default=n_encoder)
    layers = stack("encoder", n_encoder, _sparse_count(c, "num_sparse_encoder_layers", n_encoder))
    layers += stack("decoder", n_decoder, _sparse_count(c, "num_sparse_decoder_layers", n_decoder))
    buckets = c.count("relative_attention_num_buckets", default=32)
    return Body(tuple(layers), n_position_weights=2 * buckets * n_heads)


def _sparse_count(c: ConfigReader, key: str, n_layers: int) -> int:
    n_sparse = c.count(key, minimum=0)
    if n_sparse > n_layers:
        raise ModelError(f"{key} is more than the {n_layers} layers there are", value=n_sparse)
    return n_sparse


FAMILIES: dict[str, Callable[[ConfigReader], Body]] = {
    "deepseek": _deepseek,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "kimi_k2": _deepseek_v3,
    "llama": _llama,
    "llama4": _llama4,
    "llama4_text": _llama4,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_5_moe": _qwen3_next,
    "qwen3_5_moe_text": _qwen3_next,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "switch_transformers": _switch,
}
"""Reader by `model_type`."""

CLASSES: dict[str, str] = {
    "DeepseekForCausalLM": "deepseek",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "GptOssForCausalLM": "gpt_oss",
    "LlamaForCausalLM": "llama",
    "Llama4ForCausalLM": "llama4_text",
    "Llama4ForConditionalGeneration": "llama4",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
    "SwitchTransformersForConditionalGeneration": "switch_transformers",
}
"""`model_type` by class name, for files that state only `architectures` or a type of their own."""
