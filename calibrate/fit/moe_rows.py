"""Measured expert feed-forwards as the cost model reads them: draws of each load, reduced to tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.fit.common import FloatArray
from calibrate.fit.moe_load import UPCAST, UPCAST_MULTIPLE, Timing, draws_of_row, timing_of
from moesim.cost.expert_ffn import (
    ExpertFfnParameters,
    FfnCall,
    FfnParts,
    ffn_parts,
    ffn_time_s,
    tile_for,
    tiles_skipped,
)
from moesim.cost.moe_tiles import Tile, tile_choice, tile_library
from moesim.hardware.gpu import Gpu

__all__ = ["N_DRAWS", "SHAPE", "MeasuredRows", "sample_rows"]

SHAPE = ["hidden", "intermediate", "top_k", "n_experts"]
N_DRAWS = 8
"""Draws of a power-law load whose tiles a prediction averages; the measurement took the mean of 5 others."""
_HEIGHTS = 2.0 ** np.arange(3, 9)
"""Every tile height that a library or a fit may choose [rows]."""
_N_FEATURES = 5
"""Numbers of a draw before its tiles: rows, active slots, tokens entered, remote pairs, slots."""
_NOT_GATED_TOP_K = 22
"""Nemotron 3's experts (squared ReLU) have two matrices; its rows are those with 22 experts a token."""


@dataclass(frozen=True, eq=False)
class MeasuredRows:
    """Rows of one kernel on one device; arrays [n]."""

    latency_s: FloatArray
    shapes: NDArray[np.int64]
    """[n, 4] hidden, intermediate, top_k, experts: what a fold holds out together."""
    cells: NDArray[np.int64]
    """[n, 6] the same with ep and tp."""
    features: FloatArray
    """[n, 5 + heights] means over the draws."""
    most_entered: FloatArray
    """Most tokens of any draw: what a tile is looked up by."""
    hidden: FloatArray
    width: FloatArray
    """Intermediate size on the rank."""
    n_up: FloatArray
    n_experts: FloatArray
    routed: FloatArray
    """Tokens whose router was timed."""
    warm: NDArray[np.bool_]

    @classmethod
    def of(cls, table: pd.DataFrame) -> MeasuredRows:
        """Draw the loads of every row of `table`."""
        table = table.reset_index(drop=True)
        columns = ["n_tokens", *SHAPE, "tp", "ep"]
        numbers = table[columns].to_numpy(dtype=np.int64)
        shapes, eps = numbers[:, 1:5], numbers[:, 6]
        names = table[["implementation", "dtype", "load"]].astype(str).to_numpy()
        collected = np.array([name.split(":")[0] in ("sglang", "vllm", "trtllm") for name in names[:, 0]])
        timings = [
            timing_of(name, dtype, tuple(shape))
            for (name, dtype, _), shape in zip(names, shapes.tolist(), strict=True)
        ]
        found = [
            _summary(n, k, e, ep, load, timing)
            for (n, _, _, k, e, _, ep), load, timing in zip(
                numbers.tolist(), names[:, 2], timings, strict=True
            )
        ]
        bare = np.array([timing.rank_tokens_only for timing in timings], dtype=bool)
        cold = table["cache"].eq("cold").to_numpy() if "cache" in table else np.zeros(len(table), dtype=bool)
        hidden, width, top_k, n_experts = shapes.astype(float).T
        width = width / numbers[:, 5]
        widened = (names[:, :2] == UPCAST).all(axis=1)
        width = np.where(widened, np.ceil(width / UPCAST_MULTIPLE) * UPCAST_MULTIPLE, width)
        return cls(
            latency_s=table["latency_s"].to_numpy(dtype=float),
            shapes=shapes,
            cells=numbers[:, 1:],
            features=np.array([mean for mean, _ in found]).reshape(len(found), -1),
            most_entered=np.array([most for _, most in found], dtype=float),
            hidden=hidden,
            width=width,
            n_up=np.where(top_k == _NOT_GATED_TOP_K, 1.0, 2.0),
            n_experts=np.where(bare, n_experts / eps, n_experts),
            routed=np.where(collected & ~(bare & (eps > 1)), numbers[:, 0], 0.0),
            warm=~np.asarray(cold, dtype=bool),
        )

    def where(self, mask: NDArray[np.bool_]) -> MeasuredRows:
        """Rows of `mask` only."""
        return MeasuredRows(**{field.name: getattr(self, field.name)[mask] for field in fields(self)})

    def predict(
        self, values: Mapping[str, float], *, gpu: Gpu, implementation: str, dtype: str
    ) -> FloatArray:
        """[n] times [s] under `values`."""
        return Priced(self, gpu, implementation, dtype).predict(values)


class Priced:
    """Rows with what no parameter changes worked out once."""

    def __init__(self, rows: MeasuredRows, gpu: Gpu, implementation: str, dtype: str) -> None:
        self.gpu, self.rows = gpu, rows
        self.library = tile_library(implementation, dtype)
        self.sorted = implementation.startswith("sglang-deepep")
        pairs, active, entered, remote, slots = rows.features[:, :_N_FEATURES].T
        if self.sorted:
            entered, remote = np.zeros_like(entered), np.zeros_like(remote)
        self._tiles = rows.features[:, _N_FEATURES:]
        tile = Tile(*np.ones((5, len(pairs))))
        if self.library is not None:
            tile = tile_choice(
                self.library, gpu.name, dtype, n_slots=slots, intermediate=rows.width,
                n_tokens=rows.most_entered,
            )  # fmt: skip
        self.call = FfnCall(
            pairs, active, pairs, remote, entered, slots, rows.n_experts, rows.hidden, rows.width, rows.n_up,
            tile, dtype, self.library, warm=True, routed=rows.routed,
        )  # fmt: skip
        if self.library is not None:
            self.call = self.tiled(tile)

    def tiled(self, tile: Tile) -> FfnCall:
        """Look the tiles of the draws up by their height."""
        call = self.call
        index = np.searchsorted(_HEIGHTS, np.clip(tile.rows, _HEIGHTS[0], _HEIGHTS[-1]))
        tiles = np.take_along_axis(self._tiles, index[:, None], axis=1)[:, 0]
        skipped = tiles_skipped(self.library, call.rows, call.remote_pairs, call.n_experts)
        return replace(call, tile=tile, tiles=np.where(skipped, call.rows, tiles))

    def predict(self, values: Mapping[str, float]) -> FloatArray:
        """[n] times [s] under `values`."""
        params = ExpertFfnParameters.from_values(values)
        call = self._called(params)
        time_s = ffn_time_s(call, gpu=self.gpu, params=params)
        if not self.rows.warm.all():
            cold_s = ffn_time_s(replace(call, warm=False), gpu=self.gpu, params=params)
            time_s = np.where(self.rows.warm, time_s, cold_s)
        return time_s

    def parts(self, params: ExpertFfnParameters) -> FfnParts:
        """[n] times [s] of each kernel alone, weights in memory."""
        return ffn_parts(replace(self._called(params), warm=False), gpu=self.gpu, params=params)

    def _called(self, params: ExpertFfnParameters) -> FfnCall:
        """The rows with their tiles, which a family may choose by its own rule."""
        if self.library is not None:
            return self.call
        call = self.call
        return self.tiled(tile_for(call.rows, call.remote_pairs, call.n_slots, call.n_experts, params))


@lru_cache(maxsize=65536)
def _summary(
    n_tokens: int, top_k: int, n_experts: int, ep: int, load: str, timing: Timing
) -> tuple[FloatArray, int]:
    """Mean over draws of what a call is reduced to, and the most tokens of one draw."""
    draws = draws_of_row(n_tokens, top_k, n_experts, ep, load, timing, N_DRAWS)
    parts = []
    for draw in draws:
        tiles = np.ceil(draw.tokens[None, :] / _HEIGHTS[:, None]).sum(axis=1)
        total, active = int(draw.tokens.sum()), int(np.count_nonzero(draw.tokens))
        parts.append([total, active, draw.n_entered, draw.remote_pairs, draw.tokens.size, *tiles.tolist()])
    return np.mean(parts, axis=0), max(draw.n_entered for draw in draws)


def sample_rows(table: pd.DataFrame, n_rows: int, seed: int) -> pd.DataFrame:
    """At most `n_rows`, the same number of each shape as far as there are; all where they are no more."""
    if len(table) <= n_rows:
        return table
    share = max(1, n_rows // max(1, table.groupby(SHAPE).ngroups))
    shuffled = table.sample(frac=1.0, random_state=seed)
    return shuffled[shuffled.groupby(SHAPE).cumcount() < share]
