"""Published serving figures of MoE models against the simulator: rows A15, A16, A17 and A20 of published_facts.csv."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moesim.cost.backend import backend_of
from moesim.hardware.catalog import load_cluster
from moesim.model import load_model
from moesim.plan.context import Choice, Context
from moesim.plan.workloads import Sizes, decode_outcome, memory_of, prefill_outcome, serve_outcome
from moesim.routing import RoutingSource, SyntheticRouting, default_routing
from moesim.work.case import Layout

__all__ = ["Fact", "published", "published_table"]

LARGEST_BATCH = 2048
"""Sequences that trtllm-bench runs at most (its `--max_batch_size` default)."""


@dataclass(frozen=True)
class Fact:
    """One published figure and its prediction."""

    case: str
    id: str
    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1."""
        return self.predicted / self.measured - 1


def published(data: Path) -> list[Fact]:
    """Predict every row that can be configured: not the text rows, nor simulated multi-token prediction."""
    table = pd.read_csv(data / "published_facts.csv")
    facts: list[Fact] = []
    for row in table[table.case.isin(list(_CASES))].to_dict("records"):
        predict = _CASES[str(row["case"])]
        value = predict(json.loads(str(row["config_json"])), row)
        if value is not None:
            what = f"{row['metric']} [{row['unit']}]"
            facts.append(Fact(str(row["case"]), str(row["id"]), what, value, float(row["value"])))
    return facts


def _deepseek(routing: RoutingSource) -> Context:
    return Context(
        load_model("deepseek-v3"), routing, backend_of("sglang"), "fp8_block", "fp8_block", "bfloat16"
    )


def _profile_decode(config: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """A15: DeepSeek's own decode profile, perfectly balanced routing."""
    if row["id"] != "DSP-DC":
        return None
    layout = Layout(tp=1, dp=config["ep"], ep=config["ep"])
    sizes = _sizes(batch_per_rank=config["batch_per_gpu"], context=config["kv_len"])
    cluster = load_cluster(gpu="h800-sxm", nodes=config["ep"] // 8)
    choice = Choice("low-latency", "two-batch")
    outcome = decode_outcome(_deepseek(SyntheticRouting.uniform()), cluster, layout, choice, sizes)
    return float(outcome.tokens_per_s[0] / cluster.nodes)


def _prefill(config: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """A16: prefill on four nodes; replicas placed by the load they meet, or perfect balance."""
    perfect = "perfect" in config["routing"]
    context = _deepseek(SyntheticRouting.uniform() if perfect else default_routing())
    layout = Layout(
        tp=1, dp=config["ep"], ep=config["ep"], redundant_experts=config["redundant_experts"],
        placement="contiguous" if perfect else "eplb",
    )  # fmt: skip
    sizes = _sizes(tokens_per_rank=config["tokens_per_device"], prompt=config["prompt_len"])
    cluster = load_cluster(gpu="h100-sxm", nodes=config["nodes"])
    outcome = prefill_outcome(context, cluster, layout, Choice("normal", "two-batch"), sizes)
    return float(outcome.tokens_per_s[0] / cluster.nodes)


def _decode(config: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """A17: decode on nine nodes."""
    if "MTP" in str(row["id"]):
        return None
    layout = Layout(
        tp=1,
        dp=config["ep"],
        ep=config["ep"],
        redundant_experts=config["redundant_experts"],
        placement="eplb",
    )
    sizes = _sizes(batch_per_rank=config["batch_per_gpu"], context=config["kv_len"])
    cluster = load_cluster(gpu="h100-sxm", nodes=config["nodes"])
    outcome = decode_outcome(
        _deepseek(default_routing()), cluster, layout, Choice("low-latency", "two-batch"), sizes
    )
    return float(outcome.tokens_per_s[0] / cluster.nodes)


def _mixtral(config: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """A20: offline throughput of TensorRT-LLM at the largest batch that memory and the engine's limit hold."""
    context = Context(
        load_model("mixtral-8x7b"), default_routing(), backend_of("trtllm"), "fp8", "fp8", "fp8"
    )
    layout = Layout(tp=config["tp"], ep=1, etp=config["tp"])
    cluster = load_cluster(gpu="h100-sxm", nodes=1)
    batches = np.arange(1.0, LARGEST_BATCH + 1)
    lengths = {"input": float(config["isl"]), "output": float(config["osl"])}
    tried = {
        "batch_per_rank": batches,
        **{key: np.full(len(batches), value) for key, value in lengths.items()},
    }
    case = context.case(cluster, layout, Choice(), "decode")
    memory = memory_of("serve", case, tried, context.busiest(case))
    batch = batches[memory["total"] <= memory["capacity"]].max()
    sizes = _sizes(batch_per_rank=batch, **lengths)
    outcome = serve_outcome(context, cluster, layout, Choice(), sizes)
    return float(outcome.tokens_per_s[0])


def _sizes(**values: float) -> Sizes:
    return {key: np.array([float(value)]) for key, value in values.items()}


_CASES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]] = {
    "A15": _profile_decode,
    "A16": _prefill,
    "A17": _decode,
    "A20": _mixtral,
}


def published_table(facts: list[Fact]) -> str:
    """Predicted, measured, error of each fact, as text."""
    lines = [f"{'case':6}{'row':34}{'predicted':>12}{'measured':>12}{'error':>8}  what"]
    for fact in facts:
        lines.append(
            f"{fact.case:6}{fact.id:34}{fact.predicted:12.0f}{fact.measured:12.0f}{fact.error:8.1%}  {fact.what}"
        )
    return "\n".join(lines)
