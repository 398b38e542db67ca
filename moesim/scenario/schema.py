"""A scenario: what a person says to moesim."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from moesim.errors import HardwareError, ScenarioError
from moesim.hardware.catalog import load_cluster, load_gpu
from moesim.hardware.cluster import Cluster, Fabric
from moesim.scenario.choices import Choices, counts, factors_or_none, names, refuse
from moesim.scenario.layout import LayoutSizes
from moesim.scenario.workload import Workload
from moesim.units import Bound, BytesPerSecond, Seconds, ThroughputBound, TimeBound, UsdBound, UsdPerGpuHour

__all__ = ["ClusterChoice", "LayoutChoice", "Policy", "RoutingChoice", "Scenario", "Targets", "json_schema"]

Counts = Annotated[Choices[int], *counts(1)]
CountsOrZero = Annotated[Choices[int], *counts(0)]
Gpus = Annotated[Choices[str], *names()]
Factors = Annotated[Choices[float | None], *factors_or_none(0.0)]
Placements = Annotated[
    Choices[str],
    *names("contiguous", "round-robin", "balanced", "eplb", "coactivation", files=(".json", ".yaml", ".yml")),
]
Overlaps = Annotated[Choices[str], *names("none", "two-batch")]
Conventions = Annotated[Choices[str], *names("megatron", "tutel", "megablocks")]
Overflows = Annotated[Choices[str], *names("drop-position", "drop-weight", "reroute")]
Paddings = Annotated[Choices[str], *names("none", "capacity")]
Routers = Annotated[Choices[str], *names("top-k", "expert-choice")]
Dispatches = Annotated[
    Choices[str], *names("auto", "low-latency", "normal", "nccl", "allgather", "allreduce")
]
WeightDtype = Literal["bfloat16", "fp8", "fp8_block", "w4a16_mxfp4", "nvfp4"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ClusterChoice(_Part):
    """GPUs and their links: a cluster of the catalog, or the catalog's nodes for a GPU, with what differs."""

    name: str | None = None
    """Cluster of the catalog (`moesim list clusters`); a plain text in place of the mapping is this."""
    gpu: Gpus | None = None
    """GPU of the catalog (`moesim list gpus`), or a YAML file like the catalog's."""
    nodes: Counts | None = None
    """Nodes; the catalog's count where left out."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of one node; the catalog's count where left out."""
    price: UsdPerGpuHour | None = None
    """Price of one GPU, as "2.80 USD/gpu-hour"; an assumed one where left out [USD/h]."""
    nic: BytesPerSecond | None = None
    """Network rate of one GPU, per direction, as "400 Gb/s" [bytes/s]."""
    nic_latency: Seconds | None = None
    """One-way latency between nodes, as "5 us" [s]."""
    scale_up: PositiveInt | None = None
    """GPUs in one NVLink domain; 1 means none."""
    oversubscription: PositiveFloat | None = None
    """Bandwidth of a node's NICs over what leaves its rail switch; 1 is non-blocking."""
    fabric: Fabric | None = None
    """Wiring beyond the rates: rails, shared NICs, PCIe switches, pods, degraded links."""

    @staticmethod
    def from_text(text: str) -> dict[str, Any]:
        """The mapping that a plain text stands for."""
        return {"name": text}

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        return cls.from_text(value) if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _known_cluster(cls, value: str | None) -> str | None:
        try:
            return value if value is None else (load_cluster(value), value)[1]
        except HardwareError as error:
            raise refuse(error.rule, error.fix or "", value) from error

    @field_validator("gpu")
    @classmethod
    def _known_gpu(cls, value: Choices[str] | None) -> Choices[str] | None:
        for name in value or ():
            try:
                load_gpu(name)
            except HardwareError as error:
                raise refuse(error.rule, error.fix or "", error.value) from error
        return value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        try:
            self.clusters()
        except HardwareError as error:
            raise refuse(error.rule, error.fix or "") from error
        return self

    def clusters(self) -> tuple[Cluster, ...]:
        """Every cluster that the choice allows: each GPU at each number of nodes."""
        gpus: tuple[str | None, ...] = (None,) if self.gpu is None else self.gpu.values
        sizes: tuple[int | None, ...] = (None,) if self.nodes is None else self.nodes.values
        return tuple(self._cluster(gpu, nodes) for gpu in gpus for nodes in sizes)

    def _cluster(self, gpu: str | None, nodes: int | None) -> Cluster:
        return load_cluster(
            self.name,
            gpu=gpu,
            nodes=nodes,
            gpus_per_node=self.gpus_per_node,
            scale_up_ranks=self.scale_up,
            nic_bytes_per_s=self.nic,
            nic_latency_s=self.nic_latency,
            usd_per_gpu_hour=self.price,
            uplink_oversubscription=self.oversubscription,
            fabric=self.fabric,
        )


class LayoutChoice(_Part):
    """How the model is cut; in a plan, a key left out takes the values of docs/plan.md, as far as they divide."""

    tp: Counts | None = None
    """Ranks that share one attention replica (tensor parallel); 1 in a run."""
    dp: Counts | None = None
    """Attention replicas of one pipeline stage (data parallel); what fills the cluster in a run."""
    ep: Counts | None = None
    """Ranks that share one layer's routed experts (expert parallel); all of a stage's in a run."""
    pp: Counts | None = None
    """Pipeline stages; 1 in a run."""
    etp: Counts | None = None
    """Ranks that share one expert (expert tensor parallel); 1 in a run."""
    redundant_experts: CountsOrZero | None = None
    """Extra expert replicas per layer; 0 in a run."""
    placement: Placements | None = None
    """How experts are put into slots: `contiguous`, `round-robin`, `balanced`, `eplb`, `coactivation`, or a JSON or
    YAML file of a `physical_to_logical_map`; contiguous in a run, eplb where there are redundant experts."""
    placement_trace: Annotated[str, Field(min_length=1)] | None = None
    """Routing that the placement is made from, by name or file; the scenario's own `routing` where left out."""
    rebalance_every: PositiveInt | None = None
    """Steps until a placement made from `routing` takes over from `placement_trace`'s; its cost is told [steps]."""

    @model_validator(mode="after")
    def _from_one_to_another(self) -> Self:
        if self.rebalance_every is not None and self.placement_trace is None:
            raise refuse(
                "rebalance_every needs a placement to come from",
                "write placement_trace: <the routing that the old placement was made from>",
                self.rebalance_every,
            )
        return self

    def sizes(self, n_gpus: int, n_experts: int) -> LayoutSizes:
        """The one layout of a run, with the defaults filled in.

        Parameters
        ----------
        n_gpus
            GPUs of the cluster, which `dp` fills.
        n_experts
            Routed experts of a layer; 0 for a dense model.

        Raises
        ------
        ScenarioError
            If a key has several values.
        """
        tp, pp, etp = _one(self.tp, 1), _one(self.pp, 1), _one(self.etp, 1)
        dp = _one(self.dp, max(n_gpus // (tp * pp), 1))
        redundant = _one(self.redundant_experts, 0)
        return LayoutSizes(
            tp=tp,
            dp=dp,
            ep=_one(self.ep, max(tp * dp // etp, 1) if n_experts else 1),
            pp=pp,
            etp=etp,
            redundant_experts=redundant,
            placement=self.placement.value if self.placement else ("eplb" if redundant else "contiguous"),
        )


def _one(choices: Choices[int] | None, default: int) -> int:
    return default if choices is None else choices.value


class RoutingChoice(_Part):
    """Synthetic routing of some kind, or a recording."""

    kind: Literal["synthetic", "uniform", "zipf", "trace"] = "synthetic"
    """`synthetic` is fitted to real routing, `trace` draws from a recording (implied where one is given)."""
    trace: str | None = None
    """Recording: a name of the catalog or a file; a plain text in place of the mapping is this."""
    exponent: Annotated[float, Field(ge=0, le=10)] | None = None
    """`zipf`: popularity of the r-th expert goes with r to minus this; 1 where left out."""

    @staticmethod
    def from_text(text: str) -> dict[str, Any]:
        """The mapping that a plain text stands for: a kind, or else a trace."""
        return {"kind": text} if text in ("synthetic", "uniform", "zipf") else {"trace": text}

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = cls.from_text(value)
        if isinstance(value, dict) and value.get("trace") is not None and "kind" not in value:
            value = {**value, "kind": "trace"}
        return value

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> Self:
        if self.kind == "trace" and self.trace is None:
            raise refuse("a trace is due and none is given", "write trace: <file or catalog name>")
        if self.kind != "trace" and self.trace is not None:
            raise refuse(f"routing of kind {self.kind} takes no trace", "leave kind or trace out")
        if self.kind != "zipf" and self.exponent is not None:
            raise refuse(f"routing of kind {self.kind} takes no exponent", "write kind: zipf")
        return self


class Policy(_Part):
    """Capacity, overlap and dispatch."""

    capacity_factor: Factors = Choices((None,))
    """Tokens that an expert takes, over the mean. none keeps them all, and the next four keys say nothing."""
    capacity_convention: Conventions = Choices(("megatron",))
    """Whose rounding, and whose tokens share a capacity: each source rank's (`megatron`, `tutel`) or the group's."""
    overflow: Overflows = Choices(("drop-position",))
    """Tokens beyond the capacity: the last ones are dropped, those of least router weight, or they go to the next
    preferred expert with room."""
    padding: Paddings = Choices(("none",))
    """Whether experts compute the tokens they have, or, `capacity`, as many rows as they may take."""
    router: Routers = Choices(("top-k",))
    """Tokens choose `top-k` experts; with `expert-choice` each expert takes its capacity of tokens."""
    overlap: Overlaps | None = None
    """Communication behind computation: none, or two half batches in turn; a plan tries both, a run none."""
    dispatch: Dispatches = Choices(("auto",))
    """How tokens reach their experts: `auto`, what the backend would take; `low-latency`, `normal` (DeepEP), `nccl`,
    `allgather` between attention replicas; `allreduce` inside one that spans the expert group."""

    @model_validator(mode="after")
    def _with_a_capacity(self) -> Self:
        if None in self.capacity_factor.values:
            for key, asked, what in (
                ("router", "expert-choice", self.router),
                ("padding", "capacity", self.padding),
            ):
                if asked in what.values:
                    raise refuse(
                        f"{key}: {asked} needs a capacity_factor", "write capacity_factor: 1.25", "none"
                    )
        return self


class Targets(_Part):
    """Bounds by metric."""

    ttft: TimeBound | None = None
    """Time to first token, as "<= 2 s" [s]."""
    ttft_p50: TimeBound | None = None
    """Median time to first token [s]; equal to `ttft` while requests arrive evenly."""
    tpot: TimeBound | None = None
    """Time per output token after the first, as "<= 50 ms" [s]."""
    tpot_p50: TimeBound | None = None
    """Median time per output token [s]; equal to `tpot` while requests arrive evenly."""
    step: TimeBound | None = None
    """Time of one step [s]."""
    tokens_per_s: ThroughputBound | None = None
    """Tokens of the whole cluster, as ">= 50000 tokens/s" [tokens/s]."""
    tokens_per_s_per_gpu: ThroughputBound | None = None
    """Tokens of one GPU [tokens/s]."""
    usd_per_mtok: UsdBound | None = None
    """Cost of a million tokens, as "<= 0.50 USD/Mtok" [USD]."""

    def bounds(self) -> dict[str, Bound]:
        """Bounds given, by metric."""
        given = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: bound for name, bound in given if bound is not None}


class Scenario(_Part):
    """A model, the GPUs it runs on, how it is cut, and what it is asked to do."""

    model: Annotated[str, Field(min_length=1)]
    """Name of the catalog (`moesim list models`), a Hugging Face config.json, or the folder of one."""
    cluster: ClusterChoice
    """GPUs and their links."""
    layout: LayoutChoice = LayoutChoice()
    """How the model is cut."""
    workload: Workload
    """What it is asked to do."""
    routing: RoutingChoice = RoutingChoice()
    """Which experts tokens go to."""
    policy: Policy = Policy()
    """What the software does with tokens."""
    minimise: Literal["usd_per_mtok", "tpot", "ttft", "step"] | None = None
    """What a plan ranks by, least first; usd_per_mtok where neither this nor `maximise` is given."""
    maximise: Literal["tokens_per_s", "tokens_per_s_per_gpu", "mfu"] | None = None
    """What a plan ranks by, most first."""
    subject_to: Targets = Targets()
    """Bounds that a layout must keep."""
    dtype: WeightDtype | None = None
    """Format of the weights; the model's own where left out."""
    kv_dtype: Literal["bfloat16", "fp8"] | None = None
    """Format of the KV cache; bfloat16, or what the backend takes for the model, where left out."""
    backend: Literal["auto", "sglang", "vllm", "trtllm", "moesim"] = "auto"
    """Whose kernels and steady state; auto is sglang, moesim the kernels that `moesim calibrate run` measures."""
    profile: str | None = None
    """Profile (YAML) of your own measurements, over the catalog's of the same GPU; `moesim calibrate fit` writes it."""
    seed: NonNegativeInt = 0
    """Seed of every random draw."""

    @model_validator(mode="after")
    def _one_objective(self) -> Self:
        if self.minimise and self.maximise:
            raise refuse("minimise and maximise are both given", "keep one of them")
        return self

    @property
    def objective(self) -> tuple[str, int]:
        """Metric to rank by, and the sign that makes less of it better (1) or worse (-1)."""
        return (self.maximise, -1) if self.maximise else (self.minimise or "usd_per_mtok", 1)

    def open_keys(self) -> tuple[str, ...]:
        """Keys with several values, dotted: what a plan chooses and a run cannot."""
        return tuple(key for key, choices in _choices(self) if not choices.is_single)

    @property
    def is_single(self) -> bool:
        """No key has several values."""
        return not self.open_keys()

    def single(self) -> Scenario:
        """The scenario itself.

        Raises
        ------
        ScenarioError
            If a key has several values.
        """
        for key, choices in _choices(self):
            if not choices.is_single:
                raise several(key, choices)
        return self


def several(key: str, choices: Choices[Any]) -> ScenarioError:
    """Error for a run of a scenario that leaves a key open."""
    return ScenarioError(
        f"{key} has {len(choices)} values and a run takes one",
        value=choices.plain(),
        fix=f"write {key}: {choices.values[0]}, or use moesim plan",
    )


def _choices(part: BaseModel, prefix: str = "") -> Iterator[tuple[str, Choices[Any]]]:
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Choices):
            yield prefix + name, value
        elif isinstance(value, BaseModel):
            yield from _choices(value, f"{prefix}{name}.")


def json_schema() -> dict[str, Any]:
    """JSON schema of a scenario file, for editors; units and meanings are in the descriptions."""
    schema = Scenario.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for name, short in (("ClusterChoice", "name"), ("RoutingChoice", "trace")):
        # A plain text stands for the mapping of one key.
        mapping = schema["$defs"][name]
        text = {"type": "string", "description": mapping["properties"][short]["description"]}
        schema["$defs"][f"{name}Mapping"] = mapping
        schema["$defs"][name] = {"anyOf": [{"$ref": f"#/$defs/{name}Mapping"}, text]}
    return schema
