"""From router logits to the tokens of each expert: choice, capacity, balancing, and the losses on them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moesim.errors import ModelError
from moesim.routing import expert_capacity

__all__ = [
    "Assignment",
    "RouterConfig",
    "assign",
    "balance_loss",
    "bias_step",
    "capacity",
    "router_scores",
    "z_loss",
]


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts, and what keeps the experts balanced.

    Parameters
    ----------
    scoring
        ``softmax`` over the experts, or ``sigmoid`` of each (DeepSeek-V3).
    aux_weight
        Weight of :func:`balance_loss`, added for each layer (Switch: 0.01); 0 leaves it out.
    z_weight
        Weight of :func:`z_loss`.
    bias_rate
        Step of :func:`bias_step` (DeepSeek-V3's gamma); 0 leaves the bias at 0.
    jitter
        The router's input is multiplied by uniform(1 - jitter, 1 + jitter) in training (Switch, eq. in
        section 2.4 "selective precision and jitter").
    capacity_factor
        Slots of an expert over the mean it would need; None is dropless.
    drop
        Which tokens lose when an expert is full: the later ones (``position``) or those with the smaller
        router weight (``weight``).
    expert_choice
        Experts choose tokens (Zhou et al. 2022): every expert takes exactly its capacity. Not causal: whether
        a token is taken depends on later ones, so its loss is not comparable with that of a causal router.
    """

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    aux_weight: float = 0.01
    z_weight: float = 0.0
    bias_rate: float = 0.0
    jitter: float = 0.0
    capacity_factor: float | None = None
    drop: Literal["position", "weight"] = "position"
    expert_choice: bool = False

    def __post_init__(self) -> None:
        for name in ("aux_weight", "z_weight", "bias_rate", "jitter"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ModelError(
                    "is a finite number, 0 or more", value=getattr(self, name), place=f"router.{name}"
                )
        if self.jitter >= 1:
            raise ModelError("lies in 0..1", value=self.jitter, place="router.jitter", fix="Switch uses 0.01")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ModelError("is positive", value=self.capacity_factor, place="router.capacity_factor")
        if self.scoring not in ("softmax", "sigmoid"):
            raise ModelError("is softmax or sigmoid", value=self.scoring, place="router.scoring")
        if self.drop not in ("position", "weight"):
            raise ModelError("is position or weight", value=self.drop, place="router.drop")


@dataclass(frozen=True, eq=False)
class Assignment:
    """Which expert works on which token.

    Parameters
    ----------
    token, expert : (n_kept,)
        Pairs, ordered by expert.
    weight : (n_kept,)
        Factor of the expert's output; carries the gradient to the router.
    kept : (n_experts,)
        Tokens that each expert works on.
    chosen : (n_experts,)
        Tokens that chose each expert, before any were dropped.
    ids : (n_tokens, top_k) or None
        Experts as the tokens chose them, largest score first; None with expert choice.
    ids_weight : (n_tokens, top_k) or None
        Their weights.
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    kept: Tensor
    chosen: Tensor
    ids: Tensor | None
    ids_weight: Tensor | None


def router_scores(logits: Tensor, scoring: str) -> Tensor:
    """Scores (n_tokens, n_experts) of float32 logits of the same shape."""
    return logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()


def capacity(n_tokens: int, top_k: int, n_experts: int, capacity_factor: float) -> int:
    """Slots of one expert: as the simulator counts them under `megatron`, at least 1."""
    rows = expert_capacity(np.asarray(float(n_tokens)), n_experts, top_k, capacity_factor, "megatron")
    return max(1, int(rows))


def assign(scores: Tensor, bias: Tensor, top_k: int, router: RouterConfig) -> Assignment:
    """Choose experts for a batch of tokens, and drop what is beyond capacity.

    Parameters
    ----------
    scores : (n_tokens, n_experts)
        From :func:`router_scores`.
    bias : (n_experts,)
        Added for the choice only, never for the weight (DeepSeek-V3, eq. 16).
    top_k
        Experts per token; with expert choice the mean of it.

    Notes
    -----
    The weights of one token's experts are divided by their sum where top_k > 1 (GShard, Mixtral,
    DeepSeek-V3); at top_k 1 the score itself is the weight (Switch), else no gradient would reach the router.
    Tokens dropped keep their residual only; the weights of the rest are not scaled up.
    """
    n_tokens, n_experts = scores.shape
    if router.expert_choice:
        return _expert_choice(scores, top_k, router)
    ids = (scores.detach() + bias).topk(top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if top_k > 1:
        weights = weights / weights.sum(-1, keepdim=True)
    flat, flat_weight = ids.reshape(-1), weights.reshape(-1)
    order = _by_expert(flat, flat_weight if router.drop == "weight" else None)
    chosen = torch.bincount(flat, minlength=n_experts)
    kept = chosen
    if router.capacity_factor is not None:
        slots = capacity(n_tokens, top_k, n_experts, router.capacity_factor)
        place = torch.arange(flat.numel(), device=flat.device) - (chosen.cumsum(0) - chosen)[flat[order]]
        order = order[place < slots]
        kept = chosen.clamp(max=slots)
    return Assignment(
        token=order // top_k,
        expert=flat[order],
        weight=flat_weight[order],
        kept=kept,
        chosen=chosen,
        ids=ids,
        ids_weight=weights,
    )


def _by_expert(expert: Tensor, weight: Tensor | None) -> Tensor:
    """Order by expert; within one by falling weight, else as they come."""
    if weight is None:
        return expert.argsort(stable=True)
    first = weight.detach().argsort(descending=True, stable=True)
    return first[expert[first].argsort(stable=True)]


def _expert_choice(scores: Tensor, top_k: int, router: RouterConfig) -> Assignment:
    n_tokens, n_experts = scores.shape
    factor = 1.0 if router.capacity_factor is None else router.capacity_factor
    slots = min(n_tokens, capacity(n_tokens, top_k, n_experts, factor))
    weight, token = scores.T.topk(slots, dim=-1)  # (n_experts, slots)
    kept = torch.full((n_experts,), slots, device=scores.device)
    expert = torch.arange(n_experts, device=scores.device).repeat_interleave(slots)
    return Assignment(token.reshape(-1), expert, weight.reshape(-1), kept, kept, None, None)


def balance_loss(scores: Tensor, chosen: Tensor) -> Tensor:
    """Auxiliary loss that is 1 at perfect balance and n_experts at full collapse.

    ``n_experts * sum_i f_i P_i``, f_i the share of choices that expert i got (no gradient), P_i its mean share
    of the scores.

    Parameters
    ----------
    scores : (n_tokens, n_experts)
        Sigmoid scores are first divided by their sum over the experts (DeepSeek-V3, eq. 19).
    chosen : (n_experts,)
        Tokens that chose each expert, before drops.

    References
    ----------
    Switch Transformers (arXiv:2101.03961), eq. 4 to 6; GShard (arXiv:2006.16668), section 2.2, is the same for
    top-2 with f from first choices only.
    """
    share = chosen / chosen.sum()
    probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return scores.shape[1] * (share * probability).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the router's logits (n_tokens, n_experts): keeps them small.

    References
    ----------
    ST-MoE (arXiv:2202.08906), eq. 5.
    """
    return logits.logsumexp(-1).square().mean()


def bias_step(bias: Tensor, chosen: Tensor, rate: float) -> Tensor:
    """Bias for the next step: up by `rate` where an expert was chosen less than the mean, down where more.

    References
    ----------
    Auxiliary-loss-free load balancing (arXiv:2408.15664), algorithm 1; DeepSeek-V3 (arXiv:2412.19437),
    section 2.1.2, with gamma 0.001.
    """
    load = chosen.to(bias.dtype)
    return bias + rate * torch.sign(load.mean() - load)
