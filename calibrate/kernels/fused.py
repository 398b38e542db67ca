"""The whole expert feed-forward of one rank: sort, up, down, combine.

::

    tokens = sort_by_expert(expert_ids)                   # 1 kernel to 2,048 pairs, 3 beyond
    x, x_scale = quantise_rows(x)                         # fp8 only
    h = silu(x Wg^T) * (x Wu^T)    over sorted rows       # fp8: quantised in the same kernel
    rows = weight * (h Wd^T)       in pair order
    y = sum over the pairs of each token

Nothing asks the device anything, and every shape follows from shapes of the arguments, so a CUDA graph can hold
the call. With a `Workspace` it allocates only the sort's index arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibrate.kernels import KernelError
from calibrate.kernels.grouped_gemm import down_combine, up_swiglu
from calibrate.kernels.permute import sort_by_expert, upper_bound_blocks
from calibrate.kernels.rows import combine, quantise_rows
from calibrate.kernels.tiles import SCALE_GROUP, TilePair, choose_pair

__all__ = ["Workspace", "format_of", "moe_ffn", "tiles_for"]

_FORMATS = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "fp8_block",
}


def format_of(weight: Tensor) -> str:
    """Name that the tables give a weight's format.

    Raises
    ------
    KernelError
        If the kernels do not take it.
    """
    if weight.dtype not in _FORMATS:
        raise KernelError("weights are bfloat16, float16 or float8_e4m3fn", value=weight.dtype)
    return _FORMATS[weight.dtype]


def tiles_for(n_tokens: int, top_k: int, n_experts: int, w_up: Tensor, n_sms: int | None = None) -> TilePair:
    """Tiles by the rule, for `w_up` [slots, 2 I, H] on its device, or on one of `n_sms` multiprocessors."""
    if n_sms is None and w_up.device.type == "cuda":
        n_sms = torch.cuda.get_device_properties(w_up.device).multi_processor_count
    _, two_inner, hidden = w_up.shape
    return choose_pair(
        n_tokens * top_k / max(n_experts, 1), hidden, two_inner // 2, format_of(w_up), n_sms or 1
    )


@dataclass(frozen=True, eq=False)
class Workspace:
    """What one call writes between its kernels, allocated once; of one shape and one pair of tiles."""

    h: Tensor
    """(n_rows, I), the type of the weights."""
    rows: Tensor
    """(T * top_k, H), the type of the tokens."""
    out: Tensor
    """(T, H), the type of the tokens."""
    h_scale: Tensor | None = None
    """(I / 128, n_rows), fp8 only."""
    x_fp8: Tensor | None = None
    """(T, H), fp8 only."""
    x_scale: Tensor | None = None
    """(T, H / 128), fp8 only."""

    @classmethod
    def of(cls, x: Tensor, w_up: Tensor, top_k: int, tiles: TilePair) -> Workspace:
        """Make room for tokens like `x` [T, H], `top_k` experts each, and weights like `w_up`."""
        n_tokens, hidden = x.shape
        n_slots, inner = w_up.shape[0], w_up.shape[1] // 2
        n_pairs, height = n_tokens * top_k, tiles[0].block_m
        n_rows = upper_bound_blocks(n_pairs, n_slots, height) * height
        common = cls(
            h=w_up.new_empty((n_rows, inner)),
            rows=x.new_empty((n_pairs, hidden)),
            out=x.new_empty((n_tokens, hidden)),
        )
        if w_up.dtype is not torch.float8_e4m3fn:
            return common
        return cls(
            common.h,
            common.rows,
            common.out,
            h_scale=x.new_empty((inner // SCALE_GROUP, n_rows), dtype=torch.float32),
            x_fp8=w_up.new_empty((n_tokens, hidden)),
            x_scale=x.new_empty((n_tokens, hidden // SCALE_GROUP), dtype=torch.float32),
        )

    @property
    def n_bytes(self) -> int:
        """Bytes of all of it."""
        held = (self.h, self.rows, self.out, self.h_scale, self.x_fp8, self.x_scale)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def moe_ffn(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    expert_ids: Tensor,
    router_weights: Tensor,
    *,
    n_experts: int,
    expert_map: Tensor | None = None,
    tiles: TilePair | None = None,
    w_up_scale: Tensor | None = None,
    w_down_scale: Tensor | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Routed experts of one rank: ``sum over j of weight_j * (silu(x Wg^T) * (x Wu^T)) Wd^T``.

    Parameters
    ----------
    x : (T, H)
        Tokens in bfloat16 or float16, contiguous.
    w_up : (slots, 2 I, H)
        Gate rows, then up rows; the type of `x`, or float8_e4m3fn.
    w_down : (slots, H, I)
        The same type.
    expert_ids : (T, top_k)
        int32 or int64; a negative id is a dropped pair.
    router_weights : (T, top_k)
        Any float type.
    n_experts
        Experts of the layer on all ranks.
    expert_map : (n_experts,)
        Slot of each expert here, -1 elsewhere; without it expert and slot are the same.
    tiles
        Tiles of the two products; `tiles_for` by default.
    w_up_scale, w_down_scale
        For fp8: float32 (slots, 2 I / 128, H / 128) and (slots, H / 128, I / 128).
    workspace
        Buffers to write to, made for these shapes and tiles; the result is its `out`, overwritten by the next
        call.

    Returns
    -------
    (T, H) of the type of `x`; zero for a token with no expert here.

    Raises
    ------
    KernelError
        If shapes, types or tiles do not fit together.
    """
    fp8 = format_of(w_up) == "fp8_block"
    _check(x, w_up, w_down, expert_ids, router_weights, fp8)
    n_tokens, top_k = expert_ids.shape
    tile_up, tile_down = tiles or tiles_for(n_tokens, top_k, n_experts, w_up)
    if tile_up.block_m != tile_down.block_m:
        raise KernelError("both products walk the same blocks", value=(tile_up.block_m, tile_down.block_m))
    space = workspace or Workspace.of(x, w_up, top_k, (tile_up, tile_down))
    tokens = sort_by_expert(expert_ids, n_experts, tile_up.block_m, expert_map, n_slots=w_up.shape[0])
    x_scale = None
    if fp8:
        x, x_scale = quantise_rows(x, out=space.x_fp8, scale=space.x_scale)
    h, h_scale = up_swiglu(
        x, w_up, tokens, tile=tile_up, top_k=top_k,
        x_scale=x_scale, w_scale=w_up_scale, out=space.h, out_scale=space.h_scale,
    )  # fmt: skip
    rows = down_combine(
        h, w_down, tokens, router_weights, tile=tile_down,
        h_scale=h_scale, w_scale=w_down_scale, out=space.rows,
    )  # fmt: skip
    return combine(rows, tokens, top_k=top_k, out=space.out)


def _check(
    x: Tensor, w_up: Tensor, w_down: Tensor, expert_ids: Tensor, router_weights: Tensor, fp8: bool
) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16) or not (fp8 or x.dtype is w_up.dtype):
        raise KernelError("tokens are bfloat16 or float16, and weights the same or fp8", value=x.dtype)
    if expert_ids.dim() != 2 or expert_ids.shape[0] != x.shape[0]:
        raise KernelError(
            "expert_ids is [T, top_k] for x [T, H]", value=(tuple(expert_ids.shape), tuple(x.shape))
        )
    if router_weights.shape != expert_ids.shape:
        raise KernelError("router_weights has the shape of expert_ids", value=tuple(router_weights.shape))
    n_slots, two_inner, hidden = w_up.shape
    if tuple(w_down.shape) != (n_slots, hidden, two_inner // 2):
        raise KernelError(
            "w_up is [slots, 2 I, H] and w_down [slots, H, I]",
            value=(tuple(w_up.shape), tuple(w_down.shape)),
        )
