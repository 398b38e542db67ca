"""What one case comes to: times, throughput, memory, cost and the band, over many workload sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from moesim.hardware.cluster import Cluster
from moesim.hardware.profile import Family
from moesim.model.params import count_parameters, layer_weights
from moesim.model.spec import LayerSpec, ModelSpec
from moesim.plan.played import Play
from moesim.plan.steps import Pass
from moesim.routing.capacity import CapacityLoss, CapacityPolicy
from moesim.work.case import Case, Layout
from moesim.work.ops import FloatArray, Op

__all__ = ["Outcome", "StepTerm", "model_flops"]


@dataclass(frozen=True, eq=False)
class StepTerm:
    """A part of a step that is no kernel of its passes; arrays are (n_points,)."""

    name: str
    category: str
    times: FloatArray
    """Runs in a step."""
    seconds: FloatArray
    """In a whole step, mean over ranks."""
    seconds_busiest_rank: FloatArray
    op: Op | None = None
    """None for waiting."""
    families: tuple[Family, ...] = ()
    note: str = ""
    """What it is, where it is no operator."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """One layout and its choices at every workload size; arrays are (n_points,), None where a workload has none."""

    case: Case
    workload: dict[str, FloatArray]
    """Sizes asked for, by the scenario's names."""
    memory_bytes: dict[str, FloatArray]
    """By item, with ``total`` and ``capacity``."""
    step_s: FloatArray
    tokens_per_s: FloatArray
    """Tokens of the whole cluster: generated, prefilled or trained."""
    mfu: FloatArray
    band_fraction: FloatArray
    """Half-width of the band over the time."""
    ttft_s: FloatArray | None = None
    tpot_s: FloatArray | None = None
    imbalance: FloatArray | None = None
    """Busiest expert rank over the mean."""
    loss: CapacityLoss | None = None
    """What a capacity does; None for a dense model."""
    category_s: dict[str, FloatArray] = field(default_factory=dict)
    """Kernel time by category."""
    calibrated: bool = True
    """The device's own measurements stand behind the prices."""
    passes: Mapping[str, Pass] = field(default_factory=dict)
    """Steps that the result is made of, the main one first."""
    how: str = ""
    """How the result follows from them."""
    pass_times: FloatArray | None = None
    """(n_points,) micro-batches of a step that goes through all of `passes` for each; None = passes stand alone."""
    step_terms: tuple[StepTerm, ...] = ()
    """What is left of such a step, so that all terms add up to it."""
    play: Play = field(kw_only=True)
    """Runs one size, event by event or by the recurrence."""

    @property
    def n_points(self) -> int:
        """Workload sizes held."""
        return len(self.step_s)

    @property
    def fits(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(n_points,) whether memory suffices."""
        return np.asarray(self.memory_bytes["total"] <= self.memory_bytes["capacity"])

    @property
    def usd_per_mtok(self) -> FloatArray:
        """(n_points,) price of a million tokens [USD]."""
        usd_per_s = self.case.cluster.usd_per_gpu_hour * self.case.layout.n_ranks / 3600.0
        return np.asarray(usd_per_s / self.tokens_per_s * 1e6)

    def metric(self, name: str) -> FloatArray | None:
        """A metric of a target or an objective, by the scenario's name for it."""
        name = name.removesuffix("_p50")
        match name:
            case "ttft" | "tpot" | "step":
                found = getattr(self, f"{name}_s")
            case "tokens_per_s_per_gpu":
                found = self.tokens_per_s / self.case.layout.n_ranks
            case _:
                found = getattr(self, name)
        return None if found is None else np.asarray(found)

    def why_not(self, point: int) -> str | None:
        """Why a size does not fit; None where it does."""
        need, have = (float(self.memory_bytes[key][point]) for key in ("total", "capacity"))
        if need <= have:
            return None
        return f"needs {need / 1e9:.1f} GB of memory and the GPU has {have / 1e9:.1f} GB"

    @property
    def _resolved(self) -> dict[str, str]:
        """How tokens reach their experts in each step."""
        if not self.case.model.is_moe:
            return {}
        return {name: one.case.dispatch for name, one in self.passes.items()}

    @property
    def _dispatch(self) -> str | None:
        """What `policy.dispatch` has to say for the same result."""
        kinds = set(self._resolved.values())
        return "auto" if len(kinds) > 1 else (self.case.dispatch if self.case.model.is_moe else None)

    def row(self, point: int) -> dict[str, Any]:
        """One size as plain values, named as `moesim run --json` prints them."""
        timed = self.tpot_s if self.tpot_s is not None else self.step_s
        time_s, width = float(timed[point]), float(self.band_fraction[point])
        return {
            "layout": layout_row(self.case.layout),
            "cluster": cluster_row(self.case.cluster, self.case.layout),
            "choice": {
                "dispatch": self._dispatch,
                "resolved": self._resolved,
                "overlap": self.case.overlap,
                **capacity_row(self.case.capacity),
            },
            "workload": {name: _plain(values[point]) for name, values in self.workload.items()},
            "feasible": bool(self.fits[point]),
            "why_not": self.why_not(point),
            "memory_bytes": {name: float(values[point]) for name, values in self.memory_bytes.items()},
            "step_s": float(self.step_s[point]),
            "tokens_per_s": float(self.tokens_per_s[point]),
            "tokens_per_s_per_gpu": float(self.tokens_per_s[point]) / self.case.layout.n_ranks,
            "ttft_s": _at(self.ttft_s, point),
            "tpot_s": _at(self.tpot_s, point),
            "mfu": float(self.mfu[point]),
            "usd_per_mtok": float(self.usd_per_mtok[point]),
            "breakdown_s": None,
            "kernel_s": {name: float(values[point]) for name, values in self.category_s.items()},
            "imbalance": _at(self.imbalance, point),
            **loss_row(self.loss, point),
            "band": {
                "of": "step_s" if self.tpot_s is None else "tpot_s",
                "low": time_s * (1 - width),
                "high": time_s * (1 + width),
            },
            "calibrated": self.calibrated,
        }


def layout_row(layout: Layout) -> dict[str, Any]:
    """A layout as plain values."""
    return {
        "tp": layout.tp,
        "dp": layout.dp,
        "ep": layout.ep,
        "etp": layout.etp,
        "pp": layout.pp,
        "redundant_experts": layout.redundant_experts,
        "placement": layout.placement,
    }


def capacity_row(capacity: CapacityPolicy | None) -> dict[str, Any]:
    """What the scenario's policy has to say for the same capacity; null where there is none."""
    names = ("capacity_factor", "capacity_convention", "overflow", "padding", "router")
    if capacity is None:
        return dict.fromkeys(names)
    values = (capacity.factor, capacity.convention, capacity.overflow, capacity.padding, capacity.router)
    return dict(zip(names, values, strict=True))


def loss_row(loss: CapacityLoss | None, point: int) -> dict[str, float | None]:
    """What becomes of routed copies at one size; null for a dense model or where nothing is priced."""
    found: dict[str, float | None] = {}
    for name in (one.name for one in fields(CapacityLoss)):
        values = getattr(loss, name, None)
        found[name] = None if values is None else float(values[point])
    return found


def cluster_row(cluster: Cluster, layout: Layout) -> dict[str, Any]:
    """A cluster as plain values."""
    return {
        "gpu": cluster.gpu.name,
        "nodes": cluster.nodes,
        "n_gpus": layout.n_ranks,
        "usd_per_gpu_hour": cluster.usd_per_gpu_hour,
    }


def _at(values: FloatArray | None, point: int) -> float | None:
    return None if values is None else float(values[point])


def _plain(value: Any) -> Any:
    number = float(value)
    return int(number) if number == int(number) else number


_counted = lru_cache(maxsize=16)(count_parameters)
_weights_of = lru_cache(maxsize=256)(layer_weights)

Phase = Literal["prefill", "decode", "train"]


def model_flops(
    model: ModelSpec, n_tokens: FloatArray, context: FloatArray, phase: Phase = "train"
) -> FloatArray:
    """FLOPs that a forward pass over `n_tokens` needs.

    Parameters
    ----------
    model
        Layers and widths.
    n_tokens : (n_points,)
        New tokens.
    context : (n_points,)
        Tokens that each attends to in the mean; of a prompt, as a causal layer sees it: half.
    phase
        What runs of a model with an encoder: a prompt goes through the encoder and makes the decoder's cross
        keys and values, a decode step goes through the decoder, training through both. Any other model runs whole.

    Notes
    -----
    Two per active weight, the embedding's look-up left out, and four per attended token and head value (two
    products), as in PaLM's appendix B (arXiv:2204.02311).
    """
    encodes = any(layer.role == "encoder" for layer in model.layers)
    per_token = 2.0 * _active(model, phase, encodes) * np.ones_like(n_tokens)
    for layer, n_layers in model.layer_groups.items():
        if encodes and not _runs(layer, phase):
            continue
        # an encoder's token, and a cross-attention's, sees all of the prompt
        whole = context if phase == "decode" else 2 * context
        parts = [(layer.attention, whole if layer.role == "encoder" else context)]
        if layer.cross_attention is not None:
            parts.append((layer.cross_attention, whole))
        for attention, seen in parts:
            held = np.minimum(seen, attention.window) if attention.window else seen
            if attention.kind in ("gqa", "mla"):
                values = attention.n_heads * (attention.head_dim + attention.v_head_dim)
                per_token = per_token + n_layers * 2.0 * held * values
    return np.asarray(n_tokens * per_token)


def _runs(layer: LayerSpec, phase: Phase) -> bool:
    return phase == "train" or (layer.role == "encoder") == (phase == "prefill")


def _active(model: ModelSpec, phase: Phase, encodes: bool) -> int:
    """Weights that one token meets, the embedding's look-up left out."""
    counted = _counted(model)
    whole = counted.active - (0 if model.tied_embeddings else counted.embedding)
    if not encodes or phase == "train":
        return whole
    left_out = 0
    for layer, n_layers in model.layer_groups.items():
        for name, weight in _weights_of(layer, model.hidden).items():
            # cross keys and values are made with the prompt and kept
            cached = name in ("cross_attention.k", "cross_attention.v")
            runs = phase == "prefill" if cached else _runs(layer, phase)
            left_out += 0 if runs else weight.n_active * n_layers
    if phase == "prefill":  # an encoder makes no token
        left_out += counted.embedding if model.tied_embeddings else counted.head
    return whole - left_out
