"""Everything a scenario names, loaded once: model, routing, profile; and cases made from it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from moesim.cost.backend import TRAINING, Backend, backend_of
from moesim.cost.price import Pricer
from moesim.hardware.cluster import Cluster
from moesim.hardware.profile import Profile, profile_for
from moesim.model import load_model
from moesim.model.spec import ModelSpec
from moesim.plan.loads import TrafficMaker
from moesim.routing import RoutingSource, SyntheticRouting, default_routing, open_trace
from moesim.scenario.schema import RoutingChoice, Scenario
from moesim.work.capacity import CapacityConvention
from moesim.work.case import Case, DispatchKind, Layout
from moesim.work.ops import FloatArray

__all__ = ["Choice", "Context"]

DISPATCH_FP8_BYTES = 1.0 + 4 / 128
"""One FP8 value and its share of a float32 scale per 128 (DeepEP's dispatch; DeepSeek-V3 report, 3.2.2)."""


@dataclass(frozen=True)
class Choice:
    """What is chosen besides the layout."""

    dispatch: str = "auto"
    overlap: Literal["none", "two-batch"] = "none"
    capacity_factor: float | None = None


@dataclass(frozen=True, eq=False)
class Context:
    """A scenario's model, routing and engine; clusters and layouts vary."""

    model: ModelSpec
    source: RoutingSource
    backend: Backend
    weight_dtype: str
    expert_dtype: str
    kv_dtype: str
    capacity_convention: CapacityConvention = "megatron"
    seed: int = 0
    max_drawn_tokens: int = 8192
    """Tokens drawn for one expert group; larger batches are extrapolated from them."""
    _makers: dict[str, TrafficMaker] = field(default_factory=dict)
    _memos: dict[int, tuple[Cluster, dict[Hashable, FloatArray]]] = field(default_factory=dict)
    """By identity; the cluster is held so that no other can take its identity."""

    @classmethod
    def of(cls, scenario: Scenario, *, max_drawn_tokens: int = 8192) -> Context:
        """Load what a scenario names.

        Raises
        ------
        MoesimError
            If the model or the trace is unknown or damaged, or the trace is of another model.
        """
        model = load_model(scenario.model)
        backend = backend_of("sglang" if scenario.backend in ("auto", "moesim") else scenario.backend)
        weights, experts = _formats(model, scenario.dtype)
        kv_dtype = scenario.kv_dtype or (
            "fp8" if backend.name == "trtllm" and weights != "bfloat16" else "bfloat16"
        )
        return cls(
            model,
            _source(scenario.routing, model),
            backend,
            weights,
            experts,
            kv_dtype,
            scenario.policy.capacity_convention,
            scenario.seed,
            max_drawn_tokens,
        )

    @property
    def source_name(self) -> str:
        """What the routing is drawn from, in words."""
        if isinstance(self.source, SyntheticRouting):
            return f"synthetic, {self.source.name}"
        return f"trace of {self.source.model}, {self.source.phase}"

    @property
    def traffic(self) -> TrafficMaker:
        """Maker of expert loads; keeps what it has drawn."""
        if "only" not in self._makers:
            self._makers["only"] = TrafficMaker(self.model, self.source, self.seed, self.max_drawn_tokens)
        return self._makers["only"]

    def profile(self, cluster: Cluster) -> Profile:
        """Fitted parameters for a cluster's GPU, carried over where it was never measured."""
        return profile_for(cluster.gpu.name)

    def case(self, cluster: Cluster, layout: Layout, choice: Choice, phase: str) -> Case:
        """One candidate in one phase, with `dispatch` resolved as the engine would."""
        dispatch = _dispatch(self, layout, choice.dispatch, phase)
        deepep = dispatch in ("low-latency", "normal")
        # a combine, and every backward exchange, stays in 16 bits
        fp8_out = deepep and self.expert_dtype in ("fp8", "fp8_block") and phase != "train"
        exchanges = dispatch in ("low-latency", "normal", "nccl")
        return Case(
            self.model,
            cluster,
            layout,
            self.weight_dtype,
            self.expert_dtype,
            self.kv_dtype,
            dispatch,
            choice.overlap if exchanges else "none",
            DISPATCH_FP8_BYTES if fp8_out else 2.0,
            choice.capacity_factor,
            self.capacity_convention,
        )

    def pricer(self, case: Case, phase: str) -> Pricer:
        """Prices of one case's operators."""
        memo = self._memos.setdefault(id(case.cluster), (case.cluster, {}))[1]
        backend = TRAINING if phase == "train" else self.backend
        return Pricer(case, self.profile(case.cluster), backend, decode=phase == "decode", memo=memo)


def _formats(model: ModelSpec, dtype: str | None) -> tuple[str, str]:
    """Formats of dense and expert weights; a 4-bit choice is of the experts alone."""
    if dtype is None:
        return model.weight_dtype, model.expert_dtype
    return (model.weight_dtype, dtype) if dtype in ("w4a16_mxfp4", "nvfp4") else (dtype, dtype)


def _source(choice: RoutingChoice, model: ModelSpec) -> RoutingSource:
    if choice.kind == "uniform":
        return SyntheticRouting.uniform()
    if choice.kind == "zipf":
        return SyntheticRouting.zipf(1.0 if choice.exponent is None else choice.exponent)
    if choice.trace is not None:
        return open_trace(choice.trace, n_experts=model.moe.n_experts if model.moe else None)
    return default_routing(model.name)


def _dispatch(context: Context, layout: Layout, wanted: str, phase: str) -> DispatchKind:
    """How tokens reach their experts.

    ``auto``: where one attention replica spans the expert group its ranks hold every token already and one
    all-reduce joins their experts' outputs; else SGLang and vLLM exchange tokens with DeepEP (low latency in
    decode, normal in prefill) and TensorRT-LLM gathers all tokens on all ranks; training uses NCCL's
    all-to-all, as Megatron-Core's default dispatcher does. Sharded experts (`etp` > 1) are served by a gather.
    """
    if not context.model.is_moe or layout.group_dp == 1:
        if phase != "train" or layout.ep == 1:
            return "allreduce"
        return "nccl"
    if wanted in ("low-latency", "normal", "nccl", "allgather"):
        return wanted  # type: ignore[return-value]
    if phase == "train":
        return "nccl"
    if context.backend.name == "trtllm" or layout.etp > 1:
        return "allgather"
    return "low-latency" if phase == "decode" else "normal"
