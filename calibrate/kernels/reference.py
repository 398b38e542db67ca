"""The kernels of this folder said in plain PyTorch: slow, obvious, in float64.

Every kernel is tested against these; they run on any device and are never timed. A *pair* is one token sent to
one of its experts: pair ``p = t * top_k + j`` is choice ``j`` of token ``t``.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from calibrate.kernels.permute import SortedTokens, upper_bound_blocks

__all__ = [
    "FP8_MAX",
    "combine",
    "dequantise_blocks",
    "down",
    "latent_decode",
    "logits",
    "moe_ffn",
    "moe_ffn_padded",
    "quantise_blocks",
    "route",
    "select",
    "sort_by_expert",
    "up_swiglu",
]

FP8_MAX = 448.0
"""Largest finite value of float8_e4m3fn (OCP 8-bit floating point specification, 2023, table 2)."""


def logits(x: Tensor, w_router: Tensor, *, logit_bias: Tensor | None = None) -> Tensor:
    """Scores before softmax or sigmoid: x [T, H] times w_router [E, H], plus logit_bias [E]; float32 [T, E]."""
    product = x.double() @ w_router.double().T
    if logit_bias is not None:
        product = product + logit_bias.double()
    return product.float()


def select(
    logits: Tensor,
    *,
    top_k: int,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    n_groups: int = 1,
    top_groups: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
    group_score: str = "top2",
) -> tuple[Tensor, Tensor]:
    """Choose `top_k` experts for each token and weigh them.

    Parameters
    ----------
    logits : (T, E)
        Router scores before the softmax or sigmoid.
    bias : (E,)
        Added to the score that chooses, not to the weight.
    n_groups, top_groups
        Experts are cut into `n_groups` equal runs; only the best `top_groups` runs may be chosen from.
    group_score
        ``top2``: a group's score is the sum of its two best experts'; ``max``: that of its best.

    Returns
    -------
    tuple of Tensor
        expert_ids int32 [T, k], best first, ties by the lowest index; weights float32 [T, k].

    References
    ----------
    DeepSeek-V3 technical report, arXiv:2412.19437, equations 12 to 16 and section 2.1.2 (sigmoid, choosing
    bias, node-limited routing); DeepSeek-V2, arXiv:2405.04434, section 2.1.3 (groups scored by their maximum).
    """
    exact = logits.double()
    score = exact.softmax(dim=1) if scoring == "softmax" else exact.sigmoid()
    choice = score if bias is None else score + bias.double()
    if top_groups < n_groups:
        grouped = choice.view(len(choice), n_groups, -1)
        best = grouped.topk(2 if group_score == "top2" else 1, dim=2).values.sum(dim=2)
        groups = _top(best, top_groups)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter(1, groups, True)
        choice = grouped.masked_fill(~allowed[:, :, None], -torch.inf).flatten(1)
    chosen = _top(choice, top_k)
    weights = score.gather(1, chosen)
    if normalise:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return chosen.int(), (weights * scale).float()


def route(
    x: Tensor, w_router: Tensor, *, logit_bias: Tensor | None = None, **how: object
) -> tuple[Tensor, Tensor]:
    """`logits`, then `select` with its keywords."""
    return select(logits(x, w_router, logit_bias=logit_bias), **how)  # type: ignore[arg-type]


def _top(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, best first; of equals the lowest index first."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def sort_by_expert(
    expert_ids: Tensor,
    n_experts: int,
    block_m: int,
    expert_map: Tensor | None = None,
    *,
    n_slots: int | None = None,
) -> SortedTokens:
    """Pairs expert by expert, each expert's padded to whole blocks; see `calibrate.kernels.permute`."""
    n_slots = n_experts if n_slots is None else n_slots
    n_pairs = expert_ids.numel()
    places = None if expert_map is None else expert_map.tolist()
    pairs_of: list[list[int]] = [[] for _ in range(n_slots)]
    for pair, expert in enumerate(expert_ids.flatten().tolist()):
        slot = expert if places is None or not 0 <= expert < n_experts else places[expert]
        if 0 <= expert < n_experts and 0 <= slot < n_slots:
            pairs_of[slot].append(pair)
    n_blocks = upper_bound_blocks(n_pairs, n_slots, block_m)
    rows: list[int] = []
    blocks: list[int] = []
    pair_row = [-1] * n_pairs
    for slot, mine in enumerate(pairs_of):
        for position, pair in enumerate(mine):
            pair_row[pair] = len(rows) + position
        padding = -len(mine) % block_m
        rows += mine + [n_pairs] * padding
        blocks += [slot] * ((len(mine) + padding) // block_m)
    n_used = len(blocks)
    rows += [n_pairs] * (n_blocks * block_m - len(rows))
    blocks += [-1] * (n_blocks - n_used)

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=expert_ids.device)

    return SortedTokens(
        int32(rows), int32(blocks), int32([n_used]), int32([len(mine) for mine in pairs_of]), int32(pair_row)
    )


def up_swiglu(x: Tensor, w_up: Tensor, expert_ids: Tensor) -> Tensor:
    """First half of the expert: silu(gate) * up.

    x [T, H], w_up [E, 2 I, H] with the I rows of the gate before the I rows of up, expert_ids [T, k]; float32
    [T * k, I] in the order of the pairs. Zero where the id is not one of the E experts.
    """
    n_tokens, top_k = expert_ids.shape
    inner = w_up.shape[1] // 2
    out = torch.zeros(n_tokens * top_k, inner, dtype=torch.float64, device=x.device)
    rows = x.double().repeat_interleave(top_k, dim=0)
    for expert in range(w_up.shape[0]):
        mine = expert_ids.flatten() == expert
        both = rows[mine] @ w_up[expert].double().T
        gate, up = both[:, :inner], both[:, inner:]
        out[mine] = gate * gate.sigmoid() * up
    return out.float()


def down(hidden: Tensor, w_down: Tensor, expert_ids: Tensor) -> Tensor:
    """Second half of the expert: hidden [T * k, I], w_down [E, H, I]; float32 [T * k, H], not yet weighted."""
    out = torch.zeros(hidden.shape[0], w_down.shape[1], dtype=torch.float64, device=hidden.device)
    for expert in range(w_down.shape[0]):
        mine = expert_ids.flatten() == expert
        out[mine] = hidden[mine].double() @ w_down[expert].double().T
    return out.float()


def combine(rows: Tensor, router_weights: Tensor) -> Tensor:
    """Weighted sum of each token's pairs: rows [T * k, H], router_weights [T, k]; float32 [T, H]."""
    weighted = rows.double().view(*router_weights.shape, -1) * router_weights.double()[:, :, None]
    return weighted.sum(dim=1).float()


def moe_ffn(x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, router_weights: Tensor) -> Tensor:
    """Return the routed experts' output: `up_swiglu`, `down`, `combine`; float32 [T, H]."""
    return combine(down(up_swiglu(x, w_up, expert_ids), w_down, expert_ids), router_weights)


def moe_ffn_padded(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, router_weights: Tensor, *, capacity: int
) -> tuple[Tensor, Tensor]:
    """`moe_ffn` where each expert keeps its first `capacity` pairs and drops the rest.

    Returns
    -------
    tuple of Tensor
        float32 [T, H], a dropped pair adding nothing; int32 [1], how many pairs were dropped.
    """
    flat = expert_ids.flatten()
    position = torch.zeros_like(flat)
    for expert in range(w_up.shape[0]):
        mine = flat == expert
        position[mine] = torch.arange(int(mine.sum()), device=flat.device, dtype=flat.dtype)
    dropped = (position >= capacity) & (flat >= 0)
    kept = flat.masked_fill(dropped, -1).view_as(expert_ids)
    return moe_ffn(x, w_up, w_down, kept, router_weights), dropped.sum().int().reshape(1)


def quantise_blocks(values: Tensor, block: tuple[int, int] = (128, 128)) -> tuple[Tensor, Tensor]:
    """Scale each block to the range of float8_e4m3fn and round to it.

    Parameters
    ----------
    values : (..., rows, columns)
        Weights in blocks of 128 by 128, or activations in blocks of 1 by 128.
    block
        Rows and columns that share a scale; the last block of a row or column may be smaller.

    Returns
    -------
    tuple of Tensor
        float8_e4m3fn of the shape of `values`; float32 scales [..., ceil(rows / block[0]),
        ceil(columns / block[1])], by which a stored value is multiplied.
    """
    starts = [range(0, size, step) for size, step in zip(values.shape[-2:], block, strict=True)]
    scales = torch.empty(*values.shape[:-2], *map(len, starts), dtype=torch.float32, device=values.device)
    for i, j, piece in _blocks(values, block):
        largest = piece.float().abs().amax(dim=(-2, -1))
        scales[..., i, j] = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    stored = values.float() / _spread(scales, values, block)
    return stored.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def dequantise_blocks(stored: Tensor, scales: Tensor, block: tuple[int, int] = (128, 128)) -> Tensor:
    """float32 values of what `quantise_blocks` returned."""
    return stored.float() * _spread(scales, stored, block)


def _blocks(values: Tensor, block: tuple[int, int]) -> list[tuple[int, int, Tensor]]:
    rows, columns = (
        [*range(0, size, step), size] for size, step in zip(values.shape[-2:], block, strict=True)
    )
    return [
        (i, j, values[..., top:bottom, left:right])
        for i, (top, bottom) in enumerate(pairwise(rows))
        for j, (left, right) in enumerate(pairwise(columns))
    ]


def _spread(scales: Tensor, values: Tensor, block: tuple[int, int]) -> Tensor:
    """One scale an element."""
    spread = scales.repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return spread[..., : values.shape[-2], : values.shape[-1]]


def latent_decode(q: Tensor, cache: Tensor, *, scale: float, latent: int = 512) -> Tensor:
    """Attention of one query a sequence on the cached latent: q [B, H, C + R], cache [B, S, C + R] -> [B, H, C]."""
    scores = torch.einsum("bhw,bsw->bhs", q.double(), cache.double()) * scale
    return torch.einsum("bhs,bsc->bhc", scores.softmax(dim=-1), cache[..., :latent].double()).to(q.dtype)
