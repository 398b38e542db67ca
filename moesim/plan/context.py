"""Everything a scenario names, loaded once: model, routing, profile; and cases made from it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from moesim.cost.backend import TRAINING, Asked, Backend, backend_of
from moesim.cost.price import Pricer
from moesim.errors import ProfileError, TraceError
from moesim.hardware.cluster import Cluster
from moesim.hardware.profile import Profile, open_profile, profile_for
from moesim.model import load_model
from moesim.model.spec import ModelSpec
from moesim.network.choice import DispatchChoice, choose_dispatch
from moesim.plan.loads import TrafficMaker, routing_shape
from moesim.routing import (
    RoutingSource,
    RoutingTrace,
    SyntheticRouting,
    default_routing,
    inclusion,
    open_trace,
)
from moesim.routing.capacity import CapacityPolicy
from moesim.scenario.schema import RoutingChoice, Scenario
from moesim.work.case import Case, Layout
from moesim.work.ops import FloatArray

__all__ = ["Choice", "Context"]

DISPATCH_FP8_BYTES = 1.0 + 4 / 128
"""One FP8 value and its share of a float32 scale per 128 (DeepEP's dispatch; DeepSeek-V3 report, 3.2.2)."""


MOST_IDLE = 0.5
"""Experts without a token, above which a trace is likely of another model."""


@dataclass(frozen=True)
class Choice:
    """What is chosen besides the layout."""

    dispatch: str = "auto"
    overlap: Literal["none", "two-batch"] = "none"
    capacity: CapacityPolicy | None = None


@dataclass(frozen=True, eq=False)
class Context:
    """A scenario's model, routing and engine; clusters and layouts vary."""

    model: ModelSpec
    source: RoutingSource
    backend: Backend
    weight_dtype: str
    expert_dtype: str
    kv_dtype: str
    seed: int = 0
    max_drawn_tokens: int = 8192
    """Tokens drawn for one expert group; larger batches are extrapolated from them."""
    max_flows: float = float("inf")
    """Flows of a step above which the engine keeps the price per port, where it could play more."""
    own_profile: Profile | None = None
    """Parameters that a user measured, for one GPU."""
    placed_by: RoutingSource | None = None
    """Routing that placements are made from, where it is not `source`."""
    rebalance_every: int | None = None
    """Steps until a placement made from `source` takes over."""
    _profiles: dict[str, Profile] = field(default_factory=dict)
    _makers: dict[str, TrafficMaker] = field(default_factory=dict)
    _memos: dict[int, tuple[Cluster, dict[Hashable, FloatArray]]] = field(default_factory=dict)
    """By identity; the cluster is held so that no other can take its identity."""

    @classmethod
    def of(
        cls, scenario: Scenario, *, max_drawn_tokens: int = 8192, max_flows: float = float("inf")
    ) -> Context:
        """Load what a scenario names.

        Raises
        ------
        MoesimError
            If the model or the trace is unknown or damaged, or the trace is of another model.
        """
        model = load_model(scenario.model)
        backend = backend_of("sglang" if scenario.backend == "auto" else scenario.backend)
        weights, experts = _formats(model, scenario.dtype)
        kv_dtype = scenario.kv_dtype or (
            "fp8" if backend.name == "trtllm" and weights != "bfloat16" else "bfloat16"
        )
        context = cls(
            model,
            _source(scenario.routing, model),
            backend,
            weights,
            experts,
            kv_dtype,
            scenario.seed,
            max_drawn_tokens,
            max_flows,
            _own_profile(scenario),
            _placed_by(scenario, model),
            scenario.layout.rebalance_every,
        )
        if backend.stand_in is not None:
            for cluster in scenario.cluster.clusters():
                backend.replaced(context.profile(cluster), context.kernels)  # refuses what was never measured
        return context

    @property
    def kernels(self) -> list[Asked]:
        """Compute kernels that the model runs, as (op, format, kind of attention)."""
        found: list[Asked] = [("gemm", self.weight_dtype, "")]
        if self.model.is_moe:
            found.append(("moe_ffn", self.expert_dtype, ""))
        kinds = sorted({layer.attention.kind for layer in self.model.kinds})
        ops = ("attention_prefill", "attention_decode")
        return found + [(op, self.kv_dtype, kind) for kind in kinds for op in ops]

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
            self._makers["only"] = TrafficMaker(
                self.model, self.source, self.seed, self.max_drawn_tokens, self.placed_by
            )
        return self._makers["only"]

    def profile(self, cluster: Cluster) -> Profile:
        """Fitted parameters for a cluster's GPU, carried over where it was never measured."""
        gpu = cluster.gpu.name
        if self.own_profile is None or self.own_profile.device != gpu:
            return profile_for(gpu)
        if gpu not in self._profiles:
            self._profiles[gpu] = self.own_profile.over(profile_for(gpu))
        return self._profiles[gpu]

    def case(self, cluster: Cluster, layout: Layout, choice: Choice, phase: str) -> Case:
        """One candidate in one phase, with `dispatch` resolved as the engine would."""
        dispatch = self.dispatch(cluster, layout, choice.dispatch, phase).kind
        deepep = dispatch in ("low-latency", "normal")
        # a combine, and every backward exchange, stays in 16 bits
        fp8_out = deepep and self.expert_dtype in ("fp8", "fp8_block") and phase != "train"
        exchanges = dispatch in ("low-latency", "normal", "nccl")
        return Case(
            self.model,
            cluster,
            layout,
            self.weight_dtype,
            self.expert_dtype
            if phase == "train"
            else self.backend.held_as(self.expert_dtype, ep=layout.ep, gpu=cluster.gpu),
            self.kv_dtype,
            dispatch,
            choice.overlap if exchanges else "none",
            DISPATCH_FP8_BYTES if fp8_out else 2.0,
            choice.capacity,
        )

    def dispatch(self, cluster: Cluster, layout: Layout, wanted: str, phase: str) -> DispatchChoice:
        """How tokens reach their experts, `auto` resolved as the engine would, and why.

        Raises
        ------
        LayoutError
            If `wanted` does not go with the layout.
        """
        return choose_dispatch(
            wanted,
            is_moe=self.model.is_moe,
            engine=self.backend.name,
            cluster=cluster,
            layout=layout,
            phase=phase,
        )

    def warnings(self, cluster: Cluster, longest: float) -> list[str]:
        """What a reader of a result has to know of its inputs.

        Parameters
        ----------
        cluster
            Where it runs.
        longest
            Longest sequence asked for [tokens].
        """
        gpu, model = cluster.gpu, self.model
        said: list[str] = []
        carried = self.profile(cluster).carried_from
        if carried is not None:
            said.append(f"{gpu.name} was never measured: {carried}'s efficiencies on its datasheet")
        formats = {self.weight_dtype, self.expert_dtype} & {"fp8", "fp8_block"}
        if formats and "fp8" not in gpu.flops_per_s:
            said.append(
                f"{gpu.name} has no FP8 units: {', '.join(sorted(formats))} weights are widened to 16 bits"
            )
        if self.backend.held_as(self.expert_dtype, ep=2, gpu=gpu) != self.expert_dtype:
            said.append(
                f"{self.backend.name} widens {self.expert_dtype} experts to bfloat16 on {gpu.name} where ep > 1: "
                "nearly four times the memory"
            )
        if model.max_context and longest > model.max_context:
            said.append(f"{model.name} was trained for {model.max_context:,} tokens, not {longest:,.0f}")
        return said + self._stand_in_warnings(cluster) + self._routing_warnings()

    def _stand_in_warnings(self, cluster: Cluster) -> list[str]:
        """Kernels of another engine that a plan with the kernels measured here has to take."""
        lacking = self.backend.replaced(self.profile(cluster), self.kernels)
        said = [
            f"{key[0]} by {key[1]} in {key[2]} was not measured: {family.implementation} in {family.dtype} "
            "stands in for it"
            for key, family in lacking
        ]
        latent = any(kind == "mla" for _, _, kind in self.kernels)
        if self.backend.stand_in is not None and latent:
            said.append(
                "prompts of latent attention are priced as FlashAttention 3: calibrate run measures only their decoding"
            )
        return said

    def _routing_warnings(self) -> list[str]:
        source, n_layers = self.source, len(self.model.moe_layers)
        if isinstance(source, SyntheticRouting) or not self.model.is_moe:
            return []
        said = list(source.notes)
        if source.n_layers != n_layers:
            said.append(
                f"the trace has {source.n_layers} MoE layers and the model {n_layers}: layers are reused"
            )
        idle = float((source.counts == 0).mean())
        if idle > MOST_IDLE:
            said.append(f"{idle:.0%} of the experts in the trace get no token: is it of this model?")
        return said

    def policy_warnings(self, scenario: Scenario) -> list[str]:
        """What is assumed of a router where a capacity asks for more than its trace tells."""
        policy = scenario.policy
        if not self.model.is_moe or all(factor is None for factor in policy.capacity_factor):
            return []
        said: list[str] = []
        choosing = "expert-choice" in policy.router.values
        weighed = isinstance(self.source, RoutingTrace) and self.source.expert_weights is not None
        if "drop-weight" in policy.overflow.values and not weighed:
            said.append("the routing has no router weights: drop-weight drops by position")
        if "reroute" in policy.overflow.values and "top-k" in policy.router.values:
            said.append("assumed: rerouted tokens go to experts with room, drawn by popularity")
        if choosing:
            said.append("assumed: experts take the tokens that chose them, then tokens at random")
        if choosing and scenario.workload.kind in ("decode", "serve"):
            said.append("expert choice looks at all tokens of a batch: a causal decoder cannot be served so")
        return said

    def busiest(self, case: Case) -> float:
        """Rows of the busiest expert rank over the mean, by the routing's popularity, in the worst layer."""
        return self.traffic.busiest(case) if self.model.is_moe else 1.0

    def pricer(self, case: Case, phase: str) -> Pricer:
        """Prices of one case's operators."""
        memo = self._memos.setdefault(id(case.cluster), (case.cluster, {}))[1]
        own = self.backend.stand_in is not None  # kernels measured here train as well
        backend = TRAINING if phase == "train" and not own else self.backend
        return Pricer(case, self.profile(case.cluster), backend, decode=phase == "decode", memo=memo)


def _formats(model: ModelSpec, dtype: str | None) -> tuple[str, str]:
    """Formats of dense and expert weights; a 4-bit choice is of the experts alone."""
    if dtype is None:
        return model.weight_dtype, model.expert_dtype
    return (model.weight_dtype, dtype) if dtype in ("w4a16_mxfp4", "nvfp4") else (dtype, dtype)


def _own_profile(scenario: Scenario) -> Profile | None:
    """The scenario's own profile, which must be of one of its GPUs."""
    if scenario.profile is None:
        return None
    own = open_profile(scenario.profile)
    gpus = sorted({cluster.gpu.name for cluster in scenario.cluster.clusters()})
    if own.device not in gpus:
        raise ProfileError(
            f"is a profile of {own.device}, and the scenario's GPU is {' or '.join(gpus)}",
            value=scenario.profile,
            fix=f"set cluster.gpu to {own.device}, or fit a profile of {gpus[0]}",
            place="profile",
        )
    return own


def _placed_by(scenario: Scenario, model: ModelSpec) -> RoutingSource | None:
    """Routing that placements are made from; refused where it is of another model."""
    name = scenario.layout.placement_trace
    if name is None or model.moe is None:
        return None
    source = _source(RoutingChoice(**RoutingChoice.from_text(name)), model)
    try:
        inclusion(source, routing_shape(model))
    except TraceError as error:
        raise TraceError(
            error.rule, value=error.value, fix=error.fix, place="layout.placement_trace"
        ) from None
    return source


def _source(choice: RoutingChoice, model: ModelSpec) -> RoutingSource:
    if choice.kind == "uniform":
        return SyntheticRouting.uniform()
    if choice.kind == "zipf":
        return SyntheticRouting.zipf(1.0 if choice.exponent is None else choice.exponent)
    if choice.trace is not None:
        return open_trace(choice.trace, n_experts=model.moe.n_experts if model.moe else None)
    return default_routing(model.name)
