"""One candidate: a model on a cluster in one layout, with every choice made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from moesim.errors import LayoutError
from moesim.hardware.cluster import Cluster
from moesim.model.spec import LayerSpec, ModelSpec
from moesim.routing.capacity import CapacityPolicy
from moesim.scenario.layout import LayoutSizes
from moesim.work.ops import FloatArray

__all__ = ["Case", "DispatchKind", "Layout", "Stage"]

DispatchKind = Literal["low-latency", "normal", "nccl", "allgather", "allreduce"]


class Layout(LayoutSizes):
    """A layout that divides, and the groups it makes.

    Ranks of one pipeline stage are numbered with `tp` innermost, then `dp`; an expert group is
    `ep` x `etp` consecutive ranks, `etp` innermost.
    """

    @property
    def n_ranks(self) -> int:
        """GPUs that the layout takes."""
        return self.tp * self.dp * self.pp

    @property
    def group_ranks(self) -> int:
        """Ranks simulated: the smallest set that communicates within a stage, gradients apart."""
        return max(self.tp, self.ep * self.etp)

    @property
    def group_dp(self) -> int:
        """Attention replicas inside one such set."""
        return self.group_ranks // self.tp

    @property
    def n_groups(self) -> int:
        """Independent sets in one stage."""
        return self.tp * self.dp // self.group_ranks

    @property
    def n_expert_groups(self) -> int:
        """Expert groups inside one such set; several where a replica holds more ranks than an expert group."""
        return self.group_ranks // (self.ep * self.etp)

    @property
    def edp(self) -> int:
        """Copies of each expert shard in one stage, redundant slots apart."""
        return self.tp * self.dp // (self.ep * self.etp)


@dataclass(frozen=True)
class Stage:
    """Consecutive layers that one pipeline stage runs."""

    index: int
    layers: tuple[int, ...]
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the head."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model on a cluster in one layout."""

    model: ModelSpec
    cluster: Cluster
    layout: Layout
    weight_dtype: str
    """Format of the dense matrices."""
    expert_dtype: str
    """Format of the routed experts."""
    kv_dtype: str
    """Format of the KV cache."""
    dispatch: DispatchKind
    """How tokens reach their experts; resolved, never ``auto``."""
    overlap: Literal["none", "two-batch"] = "none"
    dispatch_bytes_per_value: float = 2.0
    """Payload of one activation on the way out, scales included."""
    capacity: CapacityPolicy | None = None
    """What an expert takes; None = dropless."""

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Layers cut into `pp` runs as even as they come, the longer ones last-but-head first."""
        pp, n_layers = self.layout.pp, self.model.n_layers
        if pp > n_layers:
            raise LayoutError(f"{n_layers} layers give no {pp} stages", fix=f"try pp={n_layers}")
        if pp > 1 and any(layer.role == "encoder" for layer in self.model.layers):
            # encoder and decoder layers run in different phases: cut by number, stages would stand idle
            raise LayoutError(
                "a model with an encoder is not cut into pipeline stages", value=f"pp={pp}", fix="try pp=1"
            )
        cuts = np.linspace(0, n_layers, pp + 1).round().astype(int)
        return tuple(Stage(i, tuple(range(cuts[i], cuts[i + 1])), i == 0, i == pp - 1) for i in range(pp))

    def on_ranks(self, per_ep_rank: FloatArray) -> FloatArray:
        """(n_points, n_layers, n_ranks, ...) from (n_points, n_layers, ep, ...): each shard, each expert group."""
        layout = self.layout
        whole = np.repeat(per_ep_rank, layout.etp, axis=2) if layout.etp > 1 else per_ep_rank
        if layout.n_expert_groups == 1:
            return whole
        return np.concatenate([whole] * layout.n_expert_groups, axis=2)

    def layer(self, index: int) -> LayerSpec:
        """One layer's shape."""
        return self.model.layers[index]
