"""What a model is made of: shapes of its layers, no weights and no time.

Equal layers hold equal, hashable specs, so that callers group them and price each kind once.
"""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from moesim.errors import ModelError

__all__ = ["AttentionSpec", "LayerSpec", "ModelSpec", "MoeSpec", "Published"]

AttentionKind = Literal["gqa", "mla", "linear", "none"]
Part = Literal["attention", "router", "expert", "shared_expert", "dense_ffn", "norm", "embedding", "head"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class AttentionSpec(_Frozen):
    """One attention block; every count is of the whole model, before any tensor parallelism."""

    kind: AttentionKind
    """``gqa`` (multi-head, grouped and multi-query too), ``mla`` (DeepSeek's compressed keys and values),
    ``linear`` (gated delta net: constant state, no cache that grows) or ``none``."""
    n_heads: NonNegativeInt = 0
    """Query heads; value heads where `kind` is ``linear``."""
    n_kv_heads: NonNegativeInt = 0
    """Key and value heads; `n_heads` for ``mla``; key (and query) heads for ``linear``."""
    head_dim: NonNegativeInt = 0
    """Width of one query and key head; for ``mla`` qk_nope_head_dim + qk_rope_head_dim."""
    v_head_dim: NonNegativeInt = 0
    """Width of one value head."""
    q_lora_rank: PositiveInt | None = None
    """``mla``: width of the compressed query; None where queries are projected directly."""
    kv_lora_rank: NonNegativeInt = 0
    """``mla``: width of the compressed keys and values."""
    qk_nope_head_dim: NonNegativeInt = 0
    """``mla``: part of a head without rotary position."""
    qk_rope_head_dim: NonNegativeInt = 0
    """``mla``: part of a head with rotary position; shared by all heads in the cache."""
    window: NonNegativeInt = 0
    """Tokens that one query looks back over; 0 means all."""
    chunked: bool = False
    """The window is a fixed chunk (Llama 4): a query sees only its own chunk, half a window on average."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias."""
    out_bias: bool = False
    """The output projection has a bias."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Learned RMS norm of queries and keys: one vector per head width, or per full projection width."""
    sinks: bool = False
    """One learned logit per head joins the softmax (gpt-oss)."""
    output_gate: bool = False
    """Queries are projected to twice their width, the other half gates the output (Qwen3-Next)."""
    conv_kernel: NonNegativeInt = 0
    """``linear``: taps of the short causal convolution over queries, keys and values."""
    cross: bool = False
    """Keys and values are of the encoder's tokens."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind == "none":
            return self
        for name in ("n_heads", "n_kv_heads", "head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value < 1:
                raise ModelError(f"{self.kind} attention needs {name} of at least 1", value=value)
        if self.n_heads % self.n_kv_heads:
            raise ModelError(
                f"{self.n_heads} attention heads do not divide over {self.n_kv_heads} key-value heads",
                fix="make the head count a multiple of the key-value head count",
            )
        if self.kind == "mla" and (
            self.kv_lora_rank < 1 or self.head_dim != self.qk_nope_head_dim + self.qk_rope_head_dim
        ):
            raise ModelError(
                "mla attention needs kv_lora_rank of at least 1 and head_dim = qk_nope_head_dim + "
                f"qk_rope_head_dim, got kv_lora_rank={self.kv_lora_rank}, head_dim={self.head_dim}, "
                f"{self.qk_nope_head_dim} + {self.qk_rope_head_dim}"
            )
        return self

    @property
    def q_width(self) -> int:
        """Columns of the query projection (without an output gate)."""
        heads = self.n_kv_heads if self.kind == "linear" else self.n_heads
        return heads * self.head_dim

    @property
    def k_width(self) -> int:
        """Columns of the key projection (``gqa``, ``linear``) or of all decompressed keys (``mla``)."""
        return self.n_kv_heads * self.head_dim

    @property
    def v_width(self) -> int:
        """Columns of the value projection (``gqa``, ``linear``) or of all decompressed values (``mla``)."""
        heads = self.n_heads if self.kind == "linear" else self.n_kv_heads
        return heads * self.v_head_dim

    @property
    def out_width(self) -> int:
        """Rows of the output projection: all heads' values side by side."""
        return self.n_heads * self.v_head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Cached numbers per token held (an encoder token where `cross`); 0 for ``linear`` and ``none``.

        Notes
        -----
        ``mla`` caches kv_lora_rank + qk_rope_head_dim, for all heads together (DeepSeek-V2, section 2.1).
        """
        if self.kind == "gqa":
            return self.k_width + self.v_width
        if self.kind == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 0

    @property
    def state_elements_per_sequence(self) -> int:
        """Numbers of a ``linear`` layer's constant state: one key x value matrix per head, and the taps."""
        if self.kind != "linear":
            return 0
        taps = (self.q_width + self.k_width + self.v_width) * max(self.conv_kernel - 1, 0)
        return self.n_heads * self.head_dim * self.v_head_dim + taps

    def kv_tokens(self, context: int) -> int:
        """Tokens of a sequence of `context` tokens whose keys and values have to be kept."""
        if self.kind in ("linear", "none"):
            return 0
        return min(context, self.window) if self.window else context


class MoeSpec(_Frozen):
    """One layer's experts and how tokens choose among them."""

    n_experts: PositiveInt
    """Routed experts of one layer."""
    top_k: PositiveInt
    """Routed experts per token."""
    intermediate: PositiveInt
    """Width of one routed expert."""
    n_shared: NonNegativeInt = 0
    """Experts that every token passes through."""
    shared_intermediate: NonNegativeInt = 0
    """Width of all shared experts together; they run as one feed-forward."""
    shared_gate: bool = False
    """A sigmoid gate of the token scales the shared experts (Qwen2-MoE)."""
    n_groups: PositiveInt = 1
    """Groups of experts for group-limited routing; 1 means none."""
    top_groups: PositiveInt = 1
    """Groups that one token may use."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    normalise: bool = True
    """The weights of the chosen experts are scaled to sum to 1."""
    scaling: PositiveFloat = 1.0
    """Factor on the routed output."""
    gated: bool = True
    """An expert has gate, up and down matrices (SwiGLU); else up and down."""
    bias: bool = False
    """Expert matrices have biases (gpt-oss)."""
    router_bias: bool = False
    """The router's linear layer has a bias (gpt-oss)."""
    correction_bias: bool = False
    """A bias per expert steers the choice, not the weights (DeepSeek-V3's balancing without a loss)."""
    capacity_factor: NonNegativeFloat = 0.0
    """Capacity factor the model was trained with; 0 means dropless or unknown."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.top_k > self.n_experts:
            raise ModelError(
                f"each token chooses top_k={self.top_k} experts of only {self.n_experts}",
                fix=f"use top_k of at most {self.n_experts}",
            )
        if self.n_experts % self.n_groups:
            raise ModelError(f"{self.n_experts} experts do not divide into {self.n_groups} groups")
        if self.top_groups > self.n_groups:
            raise ModelError(f"each token chooses {self.top_groups} groups of only {self.n_groups}")
        if self.top_groups * (self.n_experts // self.n_groups) < self.top_k:
            raise ModelError(
                f"{self.top_groups} groups of {self.n_experts // self.n_groups} experts hold fewer than "
                f"top_k={self.top_k} experts"
            )
        if (self.n_shared > 0) != (self.shared_intermediate > 0):
            raise ModelError(
                f"{self.n_shared} shared experts of total width {self.shared_intermediate} contradict "
                "each other"
            )
        return self

    @property
    def n_matrices(self) -> int:
        """Weight matrices of one expert: 3 where gated, else 2."""
        return 3 if self.gated else 2


class LayerSpec(_Frozen):
    """One transformer layer: attention, then a dense or an expert feed-forward."""

    attention: AttentionSpec
    """Self-attention, or what stands in its place."""
    cross_attention: AttentionSpec | None = None
    """Attention to the encoder's output, in a decoder of an encoder-decoder model."""
    dense_intermediate: PositiveInt | None = None
    """Width of the dense feed-forward; None where the layer has experts."""
    gated: bool = True
    """The dense feed-forward has gate, up and down matrices; else up and down."""
    moe: MoeSpec | None = None
    """Experts; None where the layer is dense."""
    role: Literal["encoder", "decoder"] = "decoder"
    """Encoder layers see the whole prompt once and run in no decode step."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.dense_intermediate is None) == (self.moe is None):
            raise ModelError("a layer has either a dense feed-forward or experts, not both or neither")
        return self

    @property
    def n_norms(self) -> int:
        """Norms of `hidden` width: one before each block."""
        return 2 if self.cross_attention is None else 3


_Figure = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[MBT]$")]
_SUFFIXES = {"M": 1e6, "B": 1e9, "T": 1e12}


class Published(_Frozen):
    """What the makers say of the model's size, to the printed digits, such as ``671B``."""

    total: _Figure | None = None
    """Parameters in all."""
    active: _Figure | None = None
    """Parameters per token."""
    mtp: _Figure | None = None
    """Parameters of the multi-token-prediction modules, shared embedding and head excluded."""
    source: str
    """Address or paper table of the figures."""
    convention: str = ""
    """What the figures count, or where they cannot be met."""
    total_counts: Literal["total", "total_with_mtp", "total_without_vocabulary"] = "total"
    """Field of `ParameterCount` that `total` is compared with."""
    active_counts: Literal["active", "active_without_embedding", "active_without_vocabulary"] = "active"
    """Field of `ParameterCount` that `active` is compared with."""
    not_counted: NonNegativeInt = 0
    """Parameters in `total` that moesim leaves out, such as a vision tower."""

    @staticmethod
    def interval(figure: str) -> tuple[float, float]:
        """Smallest and largest count that rounds to a printed figure: 37B gives (36.5e9, 37.5e9)."""
        digits, unit = figure[:-1], _SUFFIXES[figure[-1]]
        half_step = 0.5 * 10.0 ** -len(digits.partition(".")[2])
        return (float(digits) - half_step) * unit, (float(digits) + half_step) * unit


class ModelSpec(_Frozen):
    """A whole model."""

    name: str
    """Catalog name, or the name of the file."""
    architecture: str
    """`model_type` of the Hugging Face configuration."""
    hidden: PositiveInt
    """Width of the residual stream."""
    vocab: PositiveInt
    """Rows of the embedding."""
    tied_embeddings: bool = False
    """The LM head is the embedding."""
    layers: tuple[LayerSpec, ...]
    """In order; the encoder's first where there is one."""
    weight_dtype: str = "bfloat16"
    """Native format of attention, dense and shared-expert matrices."""
    expert_dtype: str = "bfloat16"
    """Native format of the routed experts' matrices."""
    embedding_dtype: str = "bfloat16"
    """Format of embedding, LM head, router, norms and biases."""
    max_context: NonNegativeInt = 0
    """Longest sequence [tokens]; 0 where positions are unbounded."""
    n_mtp_layers: NonNegativeInt = 0
    """Multi-token-prediction layers, each like the last of `layers`; not among `layers`."""
    n_position_weights: NonNegativeInt = 0
    """Learned position numbers outside the layers (T5's relative bias)."""
    source: str = ""
    """Where the configuration is from."""
    published: Published | None = None
    """Published size, where the catalog has one."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.layers:
            raise ModelError("a model needs at least one layer", place=self.name)
        return self

    @property
    def n_layers(self) -> int:
        """All layers, the encoder's included, multi-token prediction excluded."""
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.moe is not None)

    @property
    def moe(self) -> MoeSpec | None:
        """The experts' spec that all MoE layers share; None for a dense model.

        Raises
        ------
        ModelError
            If MoE layers differ from each other.
        """
        kinds = {layer.moe for layer in self.layers if layer.moe is not None}
        if len(kinds) > 1:
            raise ModelError(f"{self.name} has {len(kinds)} kinds of MoE layers, not one")
        return next(iter(kinds), None)

    @property
    def is_moe(self) -> bool:
        """Whether any layer has experts."""
        return any(layer.moe is not None for layer in self.layers)

    @property
    def mtp_layer(self) -> LayerSpec | None:
        """Transformer layer inside one multi-token-prediction module."""
        return self.layers[-1] if self.n_mtp_layers else None

    @property
    def gated(self) -> bool:
        """Whether every feed-forward, dense or expert, is gated."""
        return all(layer.gated if layer.moe is None else layer.moe.gated for layer in self.layers)

    @cached_property
    def kinds(self) -> tuple[LayerSpec, ...]:
        """Each kind of layer once, in order of first occurrence."""
        return tuple(self.layer_groups)

    @cached_property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Position in `kinds` of every layer: comparing layers by value costs more than most that is asked of them."""
        position = {spec: number for number, spec in enumerate(self.kinds)}
        return tuple(position[layer] for layer in self.layers)

    @property
    def layer_groups(self) -> dict[LayerSpec, int]:
        """Each kind of layer and how often it occurs, in order of first occurrence."""
        return dict(Counter(self.layers))

    @property
    def kv_elements_per_token(self) -> int:
        """Cached numbers per token over all layers without a window, cross-attention left out."""
        return sum(
            layer.attention.kv_elements_per_token
            for layer in self.layers
            if layer.role == "decoder" and not layer.attention.window
        )

    def dtype_of(self, part: Part) -> str:
        """Native format of the weights of one part."""
        if part == "expert":
            return self.expert_dtype
        if part in ("attention", "shared_expert", "dense_ffn"):
            return self.weight_dtype
        return self.embedding_dtype
