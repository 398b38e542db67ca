"""A byte-level decoder with Mixture-of-Experts layers, in the shape of Mixtral or DeepSeekMoE."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrate.routing.router import (
    Assignment,
    RouterConfig,
    assign,
    balance_loss,
    bias_step,
    router_scores,
    z_loss,
)
from moesim.errors import ModelError

__all__ = ["ModelConfig", "MoeLayer", "MoeModel", "Routed", "config_from_dict", "fine_grained"]

N_BYTES = 256


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model.

    Parameters
    ----------
    n_layers, hidden, n_heads
        Decoder layers, width, attention heads.
    n_experts
        Routed experts of every layer; 0 is a dense model.
    top_k
        Experts per token.
    expert_width
        Inner width of one expert, or of the feed-forward layer of a dense model.
    n_shared
        Experts of the same width that every token goes to, beside the routed ones.
    router
        How tokens choose.
    """

    n_layers: int = 4
    hidden: int = 128
    n_heads: int = 4
    n_experts: int = 16
    top_k: int = 2
    expert_width: int = 128
    n_shared: int = 0
    router: RouterConfig = field(default_factory=RouterConfig)

    def __post_init__(self) -> None:
        for name, least in (
            ("n_layers", 1),
            ("hidden", 8),
            ("n_heads", 1),
            ("expert_width", 1),
            ("n_shared", 0),
        ):
            if getattr(self, name) < least:
                raise ModelError(f"is at least {least}", value=getattr(self, name), place=name)
        if self.hidden % self.n_heads or self.hidden // self.n_heads % 2:
            rule = f"divides over {self.n_heads} heads of an even width"
            raise ModelError(rule, value=self.hidden, place="hidden")
        if self.n_experts < 0 or self.n_experts > 65_536:
            raise ModelError("lies in 0..65536", value=self.n_experts, place="n_experts")
        if self.n_experts and not 1 <= self.top_k <= self.n_experts:
            raise ModelError(f"lies in 1..{self.n_experts} (n_experts)", value=self.top_k, place="top_k")

    @property
    def n_parameters(self) -> int:
        """All parameters, embedding and output head included."""
        return self._parameters(self.n_experts + self.n_shared if self.n_experts else 1)

    @property
    def n_active(self) -> int:
        """Parameters that one token meets."""
        return self._parameters(self.top_k + self.n_shared if self.n_experts else 1)

    def _parameters(self, n_experts: int) -> int:
        layer = 4 * self.hidden**2 + 2 * self.hidden + self.hidden * self.n_experts
        layer += n_experts * 3 * self.hidden * self.expert_width
        return self.n_layers * layer + self.hidden + 2 * N_BYTES * self.hidden

    def flops_per_token(self, context: int) -> float:
        """Forward and backward FLOPs of one token: 6 per active parameter, and attention over the context."""
        return 6.0 * self.n_active + 6.0 * self.n_layers * self.hidden * context

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the header of a checkpoint."""
        return asdict(self)


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Configuration from what :meth:`ModelConfig.to_dict` gave."""
    return ModelConfig(**{**values, "router": RouterConfig(**values["router"])})


def fine_grained(config: ModelConfig, granularity: int) -> ModelConfig:
    """Cut every expert in `granularity` parts and choose that many times as many: the same active parameters.

    References
    ----------
    DeepSeekMoE (arXiv:2401.06066), section 3.1.
    """
    if granularity < 1 or config.expert_width % granularity:
        raise ModelError(
            f"divides expert_width {config.expert_width}", value=granularity, place="granularity"
        )
    return replace(
        config,
        n_experts=config.n_experts * granularity,
        top_k=config.top_k * granularity,
        expert_width=config.expert_width // granularity,
        n_shared=config.n_shared * granularity,
    )


@dataclass(frozen=True, eq=False)
class Routed:
    """What the routers of one forward pass did.

    Parameters
    ----------
    assignments
        One per layer.
    balance, z
        Sums over the layers of :func:`balance_loss` and :func:`z_loss`.
    """

    assignments: list[Assignment]
    balance: Tensor
    z: Tensor


class MoeLayer(nn.Module):
    """Router and experts of one layer; experts are SwiGLU without biases."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        n, d, w = config.n_experts, config.hidden, config.expert_width
        self.router = nn.Parameter(torch.empty(n, d))
        self.gate = nn.Parameter(torch.empty(n, d, w))
        self.up = nn.Parameter(torch.empty(n, d, w))
        self.down = nn.Parameter(torch.empty(n, w, d))
        self.shared = FeedForward(d, config.n_shared * w, config.n_layers) if config.n_shared else None
        self.register_buffer("bias", torch.zeros(n))
        nn.init.normal_(self.router, std=0.02)
        nn.init.normal_(self.gate, std=d**-0.5)
        nn.init.normal_(self.up, std=d**-0.5)
        nn.init.normal_(self.down, std=(2 * w * config.n_layers) ** -0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Assignment, Tensor, Tensor]:
        """Output (n_tokens, hidden) of (n_tokens, hidden), what was chosen, balance loss, z-loss."""
        router = self.config.router
        with torch.autocast(x.device.type, enabled=False):  # in float32: Switch, section 2.4
            seen = x.float()
            if self.training and router.jitter:
                seen = seen * torch.empty_like(seen).uniform_(1 - router.jitter, 1 + router.jitter)
            logits = seen @ self.router.float().T
            scores = router_scores(logits, router.scoring)
            chosen = assign(scores, self.bias, self.config.top_k, router)
            balance, z = balance_loss(scores, chosen.chosen), z_loss(logits)
        y = self._experts(x, chosen)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, chosen, balance, z

    def _experts(self, x: Tensor, chosen: Assignment) -> Tensor:
        """Run each expert on its tokens, one after the other: padded to the busiest, skew costs time."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        sizes = chosen.kept.tolist()
        rows = torch.split(x.index_select(0, chosen.token), sizes)
        gate = torch.cat([a @ w for a, w in zip(rows, self.gate.unbind(), strict=True)])
        up = torch.cat([a @ w for a, w in zip(rows, self.up.unbind(), strict=True)])
        inner = torch.split(functional.silu(gate) * up, sizes)
        out = torch.cat([a @ w for a, w in zip(inner, self.down.unbind(), strict=True)])
        weighted = out * chosen.weight.to(out.dtype)[:, None]
        return torch.zeros_like(x, dtype=out.dtype).index_add(0, chosen.token, weighted)

    @torch.no_grad()
    def balance(self, chosen: Tensor) -> None:
        """Move the bias after a step in which `chosen` (n_experts,) tokens chose each expert."""
        self.bias.copy_(bias_step(self.bias, chosen, self.config.router.bias_rate))


class FeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, hidden: int, width: int, n_layers: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        nn.init.normal_(self.up.weight, std=hidden**-0.5)
        nn.init.normal_(self.down.weight, std=(2 * width * n_layers) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Output of the shape of `x`, (..., hidden)."""
        gate, up = self.up(x).chunk(2, -1)
        result: Tensor = self.down(functional.silu(gate) * up)
        return result


class Block(nn.Module):
    """Attention and experts, each after a norm and beside a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.hidden
        self.n_heads = config.n_heads
        self.attention_norm = nn.RMSNorm(d, eps=1e-6)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.ffn_norm = nn.RMSNorm(d, eps=1e-6)
        self.ffn = (
            MoeLayer(config) if config.n_experts else FeedForward(d, config.expert_width, config.n_layers)
        )
        nn.init.normal_(self.qkv.weight, std=d**-0.5)
        nn.init.normal_(self.out.weight, std=(2 * d * config.n_layers) ** -0.5)

    def attend(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Causal attention with rotary positions: (batch, length, hidden) to the same."""
        batch, length, d = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = functional.scaled_dot_product_attention(
            _rotated(q, turn), _rotated(k, turn), v, is_causal=True
        )
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, d))
        return result


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(x.dtype)


def _turns(length: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rate = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angle = torch.arange(length, device=device)[:, None] * rate
    return angle.cos(), angle.sin()


class MoeModel(nn.Module):
    """Bytes to logits of the next byte."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(N_BYTES, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.head = nn.Linear(config.hidden, N_BYTES, bias=False)
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Routed]:
        """Logits (batch, length, 256) of bytes (batch, length), and what the routers did."""
        x = self.embedding(tokens)
        batch, length, d = x.shape
        turn = _turns(length, d // self.config.n_heads, x.device)
        assignments: list[Assignment] = []
        balance = z = x.new_zeros((), dtype=torch.float32)
        for block in self._decoder():
            x = x + block.attend(block.attention_norm(x), turn)
            normed = block.ffn_norm(x)
            if isinstance(block.ffn, MoeLayer):
                y, chosen, one_balance, one_z = block.ffn(normed.reshape(-1, d))
                assignments.append(chosen)
                balance, z = balance + one_balance, z + one_z
                x = x + y.view(batch, length, d)
            else:
                x = x + block.ffn(normed)
        return self.head(self.norm(x)), Routed(assignments, balance, z)

    def _decoder(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def update_biases(self, routed: Routed) -> None:
        """Balance by bias, after an optimiser's step; nothing where `bias_rate` is 0."""
        if self.config.router.bias_rate:
            for block, chosen in zip(self._decoder(), routed.assignments, strict=True):
                if isinstance(block.ffn, MoeLayer):
                    block.ffn.balance(chosen.chosen)
