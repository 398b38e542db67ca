"""Count parameters from the list of weight matrices.

Conventions
-----------
- `total` holds embedding, LM head (once, where tied), every matrix, bias, norm and learned position.
- `active` is what one token's forward pass uses: `total` with `top_k` of the experts instead of all; shared
  experts, router, embedding and LM head included in full.
- Multi-token-prediction modules are in neither; they are given apart.
- Encoder-decoder models: `active` counts encoder and decoder, as if one token went through both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod

from moesim.errors import ModelError
from moesim.model.spec import AttentionSpec, LayerSpec, ModelSpec, MoeSpec, Part

__all__ = ["ParameterCount", "Weight", "count_parameters", "layer_weights", "model_weights"]


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight tensor, or `copies` of them of one shape."""

    shape: tuple[int, ...]
    """Input width, output width; one number for a bias or a norm."""
    part: Part
    """What it belongs to."""
    copies: int = 1
    """How many the layer holds: the expert count for routed experts."""
    active_copies: int = 1
    """How many one token uses: `top_k` for routed experts."""

    @property
    def n_parameters(self) -> int:
        """Numbers in all copies."""
        return prod(self.shape) * self.copies

    @property
    def n_active(self) -> int:
        """Numbers in the copies that one token uses."""
        return prod(self.shape) * self.active_copies


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameters of a model, in all and per token."""

    total: int
    """All parameters, multi-token prediction excluded."""
    active: int
    """Parameters that one token uses."""
    embedding: int
    """Input embedding alone."""
    head: int
    """LM head alone; 0 where it is the embedding."""
    mtp: int
    """All multi-token-prediction modules, shared embedding and head excluded."""
    by_part: dict[str, int] = field(default_factory=dict)
    """`total` by part: attention, router, expert, shared_expert, dense_ffn, norm, embedding, head."""
    active_by_part: dict[str, int] = field(default_factory=dict)
    """`active` by part."""
    attention_per_layer: tuple[int, ...] = ()
    """Attention parameters of each layer, cross-attention included."""

    @property
    def total_with_mtp(self) -> int:
        """All parameters with multi-token prediction."""
        return self.total + self.mtp

    @property
    def active_without_embedding(self) -> int:
        """Parameters per token without the input embedding, which is a look-up and not a product."""
        return self.active - self.embedding

    @property
    def active_without_vocabulary(self) -> int:
        """Parameters per token without input embedding and LM head."""
        return self.active - self.embedding - self.head

    @property
    def total_without_vocabulary(self) -> int:
        """All parameters without input embedding and LM head."""
        return self.total - self.embedding - self.head


def layer_weights(layer: LayerSpec, hidden: int) -> dict[str, Weight]:
    """Every weight tensor of one layer, by name.

    Parameters
    ----------
    layer
        The layer.
    hidden
        Width of the residual stream.

    Returns
    -------
    dict of str to Weight
        ``attention.*``, ``cross_attention.*``, ``router.*``, ``expert.*``, ``shared.*``, ``ffn.*``, ``norm``.
    """
    weights = _prefixed("attention", _attention(layer.attention, hidden))
    if layer.cross_attention is not None:
        weights |= _prefixed("cross_attention", _attention(layer.cross_attention, hidden))
    if layer.moe is not None:
        weights |= _moe(layer.moe, hidden)
    elif layer.dense_intermediate is not None:
        weights |= _prefixed("ffn", _ffn(hidden, layer.dense_intermediate, layer.gated, "dense_ffn"))
    weights["norm"] = Weight((hidden,), "norm", layer.n_norms, layer.n_norms)
    return weights


def model_weights(spec: ModelSpec) -> dict[str, Weight]:
    """Every weight tensor outside the layers: embedding, LM head, final norms, learned positions."""
    n_norms = len({layer.role for layer in spec.layers})
    weights = {
        "embedding": Weight((spec.vocab, spec.hidden), "embedding"),
        "final_norm": Weight((spec.hidden,), "norm", n_norms, n_norms),
    }
    if not spec.tied_embeddings:
        weights["head"] = Weight((spec.hidden, spec.vocab), "head")
    if spec.n_position_weights:
        weights["position"] = Weight((spec.n_position_weights,), "attention")
    return weights


def count_parameters(spec: ModelSpec) -> ParameterCount:
    """Count a model's parameters; the module's docstring says what is counted."""
    total: Counter[str] = Counter()
    active: Counter[str] = Counter()
    attention: dict[LayerSpec, int] = {}
    for layer, n_layers in spec.layer_groups.items():
        weights = layer_weights(layer, spec.hidden)
        _add(total, active, weights, n_layers)
        attention[layer] = sum(w.n_parameters for name, w in weights.items() if "attention." in name)
    outer = model_weights(spec)
    _add(total, active, outer, 1)
    return ParameterCount(
        total=total.total(),
        active=active.total(),
        embedding=total["embedding"],
        head=total["head"],
        mtp=_mtp_parameters(spec),
        by_part=dict(total),
        active_by_part=dict(active),
        attention_per_layer=tuple(attention[layer] for layer in spec.layers),
    )


def _add(total: Counter[str], active: Counter[str], weights: dict[str, Weight], times: int) -> None:
    for weight in weights.values():
        total[weight.part] += weight.n_parameters * times
        active[weight.part] += weight.n_active * times


def _mtp_parameters(spec: ModelSpec) -> int:
    """Each module: a layer, a 2 hidden -> hidden projection, two norms before it and one after the layer."""
    if spec.mtp_layer is None:
        return 0
    layer = sum(w.n_parameters for w in layer_weights(spec.mtp_layer, spec.hidden).values())
    return spec.n_mtp_layers * (layer + 2 * spec.hidden**2 + 3 * spec.hidden)


def _prefixed(prefix: str, weights: dict[str, Weight]) -> dict[str, Weight]:
    return {f"{prefix}.{name}": weight for name, weight in weights.items()}


def _attention(a: AttentionSpec, hidden: int) -> dict[str, Weight]:
    if a.kind == "none":
        return {}
    if a.kind == "mla":
        return _mla(a, hidden)
    if a.kind == "linear":
        return _linear_attention(a, hidden)
    if a.kind == "gqa":
        return _gqa(a, hidden)
    raise ModelError("no weights known for this attention kind", value=a.kind)


def _gqa(a: AttentionSpec, hidden: int) -> dict[str, Weight]:
    q_columns = a.q_width * (2 if a.output_gate else 1)
    weights = {
        "q": Weight((hidden, q_columns), "attention"),
        "k": Weight((hidden, a.k_width), "attention"),
        "v": Weight((hidden, a.v_width), "attention"),
        "o": Weight((a.out_width, hidden), "attention"),
    }
    if a.qkv_bias:
        weights["qkv_bias"] = Weight((q_columns + a.k_width + a.v_width,), "attention")
    if a.out_bias:
        weights["o_bias"] = Weight((hidden,), "attention")
    if a.qk_norm == "head":
        weights["qk_norm"] = Weight((2 * a.head_dim,), "norm")
    elif a.qk_norm == "full":
        weights["qk_norm"] = Weight((a.q_width + a.k_width,), "norm")
    if a.sinks:
        weights["sinks"] = Weight((a.n_heads,), "attention")
    return weights


def _mla(a: AttentionSpec, hidden: int) -> dict[str, Weight]:
    """DeepSeek-V2 (arXiv:2405.04434), section 2.1; `kv_b` decompresses keys and values."""
    weights = {}
    if a.q_lora_rank is None:
        weights["q"] = Weight((hidden, a.q_width), "attention")
    else:
        weights["q_a"] = Weight((hidden, a.q_lora_rank), "attention")
        weights["q_a_norm"] = Weight((a.q_lora_rank,), "norm")
        weights["q_b"] = Weight((a.q_lora_rank, a.q_width), "attention")
    weights["kv_a"] = Weight((hidden, a.kv_lora_rank + a.qk_rope_head_dim), "attention")
    weights["kv_a_norm"] = Weight((a.kv_lora_rank,), "norm")
    kv_columns = a.n_heads * (a.qk_nope_head_dim + a.v_head_dim)
    weights["kv_b"] = Weight((a.kv_lora_rank, kv_columns), "attention")
    weights["o"] = Weight((a.out_width, hidden), "attention")
    if a.qkv_bias:
        extra = a.q_lora_rank or 0
        weights["qkv_bias"] = Weight((extra + a.kv_lora_rank + a.qk_rope_head_dim,), "attention")
    if a.out_bias:
        weights["o_bias"] = Weight((hidden,), "attention")
    return weights


def _linear_attention(a: AttentionSpec, hidden: int) -> dict[str, Weight]:
    """Gated delta net as in Qwen3-Next: q, k, v, an output gate z, and two scalars per value head."""
    qkv = a.q_width + a.k_width + a.v_width
    return {
        "qkv": Weight((hidden, qkv), "attention"),
        "z": Weight((hidden, a.v_width), "attention"),
        "ba": Weight((hidden, 2 * a.n_heads), "attention"),
        "conv": Weight((a.conv_kernel, qkv), "attention"),
        "decay": Weight((2 * a.n_heads,), "attention"),
        "out_norm": Weight((a.v_head_dim,), "norm"),
        "o": Weight((a.v_width, hidden), "attention"),
    }


def _ffn(hidden: int, width: int, gated: bool, part: Part) -> dict[str, Weight]:
    weights = {"gate": Weight((hidden, width), part)} if gated else {}
    weights["up"] = Weight((hidden, width), part)
    weights["down"] = Weight((width, hidden), part)
    return weights


def _moe(moe: MoeSpec, hidden: int) -> dict[str, Weight]:
    weights = {"router.weight": Weight((hidden, moe.n_experts), "router")}
    if moe.router_bias:
        weights["router.bias"] = Weight((moe.n_experts,), "router")
    if moe.correction_bias:
        weights["router.correction_bias"] = Weight((moe.n_experts,), "router")
    for name, weight in _ffn(hidden, moe.intermediate, moe.gated, "expert").items():
        weights[f"expert.{name}"] = Weight(weight.shape, "expert", moe.n_experts, moe.top_k)
    if moe.bias:
        up_columns = moe.intermediate * (moe.n_matrices - 1)
        weights["expert.bias"] = Weight((up_columns + hidden,), "expert", moe.n_experts, moe.top_k)
    if moe.n_shared:
        weights |= _prefixed("shared", _ffn(hidden, moe.shared_intermediate, moe.gated, "shared_expert"))
    if moe.shared_gate:
        weights["shared.scale"] = Weight((hidden, 1), "shared_expert")
    return weights
