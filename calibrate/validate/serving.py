"""Measured serving benchmarks against `serve_outcome`: TPOT and TTFT of each row of serving.csv."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibrate.statistics import ape_stats
from calibrate.validate.published import Fact, published, published_table
from moesim.cost.backend import backend_of
from moesim.errors import MeasurementError
from moesim.hardware.catalog import load_cluster
from moesim.hardware.cluster import Cluster
from moesim.model import load_model
from moesim.plan.context import Choice, Context
from moesim.plan.outcome import Outcome
from moesim.plan.workloads import serve_outcome
from moesim.report import Compared, write_scatter_report
from moesim.routing import default_routing
from moesim.work.case import Layout

__all__ = [
    "SPECULATIVE", "Deployment", "Reading", "cluster_of", "context_of", "deployment_of", "main", "outcome_of",
    "predict", "read_rows", "report", "summary",
]  # fmt: skip

MODELS = {
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/Qwen3.5-397B-A17B": "qwen3.5-397b-a17b",
    "deepseek-ai/DeepSeek-R1": "deepseek-v3",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
}
"""Catalog name of each model of the table; DeepSeek-R1 has V3's shape."""

BLOCK_SCALED = ("DeepSeek", "235B", "397B")
"""Checkpoints whose "fp8" has a scale per 128 x 128 block (their config.json: weight_block_size [128, 128])."""

ASYNCHRONOUS_VLLM = (0, 14)
"""vLLM release from which steps are scheduled while the one before runs, by default (vllm-project/vllm #27614,
#31998). Rows that name no release are InferenceMAX's of Llama-3.1-70B, whose server is started with
`--async-scheduling` (its README, "H200 70B")."""

SPECULATIVE = "read as run with multi-token prediction, which is not simulated"
"""Note on the DeepSeek-R1 rows of TensorRT-LLM measured on 2026-01-14: the same engine release, layout, lengths
and concurrency took 19.4 ms a token that day and 32.2 ms two weeks later; V3, of equal shape, 32.1 ms."""

RANDOM_LENGTHS = 0.9
"""Mean over nominal length in InferenceMAX: its client draws lengths evenly from 0.8 to 1.0 of the nominal
(`--random-range-ratio 0.8`); the fixed-length rows of other campaigns keep 1."""


@dataclass(frozen=True)
class Deployment:
    """What one group of rows ran."""

    model: str
    system: str
    backend: str
    weight_dtype: str
    expert_dtype: str
    kv_dtype: str
    layout: Layout
    host: str
    """Family of the host's share of a step."""

    @property
    def n_gpus(self) -> int:
        """GPUs of the engine."""
        return self.layout.n_ranks


@dataclass(frozen=True)
class Reading:
    """How a row was read."""

    deployment: Deployment | None
    notes: tuple[str, ...] = ()
    """What was not taken to the letter."""
    skip: str = ""
    """Why it cannot be read; empty where it can."""
    length_scale: float = 1.0
    """Mean over nominal length of prompts and answers."""


def read_rows(
    data: Path, *, systems: Iterable[str] = ("h100-sxm", "h200-sxm"), mode: str = "agg"
) -> pd.DataFrame:
    """Rows of the measured table on some GPUs."""
    table = pd.read_csv(data / "measured" / "serving.csv")
    wanted = table.system.isin(list(systems)) & (table["mode"] == mode)
    return table[wanted].reset_index(drop=True)


def deployment_of(row: Mapping[str, Any]) -> Reading:
    """Read one row; see docs/fits/serving.md for why it is read so."""
    name = MODELS.get(str(row["model"]))
    if name is None:
        return Reading(None, skip=f"no catalog entry for {row['model']}")
    moe_tp, moe_ep = _whole(row, "moe_tp_size"), _whole(row, "moe_ep_size")
    tp, dp = _whole(row, "tp_size"), _whole(row, "attention_dp_size")
    notes: list[str] = []
    is_moe = load_model(name).is_moe
    if not is_moe:
        moe_tp = moe_ep = 1
    elif moe_tp > 1 and moe_ep > 1 and tp * dp == moe_tp * moe_ep:
        # the campaign's "tp: 8, ep: 8" stands here as moe_tp 8, moe_ep 8 and their product as the GPU count
        if moe_tp != moe_ep:
            return Reading(None, skip=f"moe_tp {moe_tp} x moe_ep {moe_ep} on {tp * dp} GPUs")
        notes.append("tp x ep product read as one group of tp = ep GPUs")
        tp, dp = (moe_tp, 1) if dp == 1 else (1, moe_tp)
        moe_tp = 1
    elif tp * dp != moe_tp * moe_ep:
        if pd.notna(row["attention_dp_size"]) or (moe_tp * moe_ep) % tp:
            return Reading(None, skip=f"tp {tp} x dp {dp} is not moe_tp {moe_tp} x moe_ep {moe_ep}")
        dp = moe_tp * moe_ep // tp
        notes.append("attention dp, left out, read as moe_tp x moe_ep / tp")
    if name == "deepseek-v3" and row["backend"] == "trtllm" and row.get("measured_on") == "2026-01-14":
        notes.append(SPECULATIVE)
    layout = Layout(tp=tp, dp=dp, ep=moe_ep if is_moe else 1, etp=moe_tp if is_moe else 1)
    weights, experts = _formats(row)
    scale = RANDOM_LENGTHS if pd.notna(row["attention_dp_size"]) and int(row["isl"]) in (1024, 8192) else 1.0
    kv = "fp8" if row["backend"] == "trtllm" and weights != "bfloat16" else "bfloat16"
    found = Deployment(
        name, str(row["system"]), str(row["backend"]), weights, experts, kv, layout, _host(row)
    )
    if pd.isna(row["concurrency"]):
        if pd.isna(row["batch_size"]):
            return Reading(None, tuple(notes), skip="neither concurrency nor batch size")
        notes.append("concurrency, left out, read as batch_size x dp")
    return Reading(found, tuple(notes), length_scale=scale)


def _whole(row: Mapping[str, Any], name: str) -> int:
    return 1 if pd.isna(row[name]) else int(row[name])


def _host(row: Mapping[str, Any]) -> str:
    if row["backend"] != "vllm":
        return str(row["backend"])
    release = str(row["backend_version"]).split(".")
    known = len(release) > 1 and release[0].isdigit() and release[1].isdigit()
    early = known and (int(release[0]), int(release[1])) < ASYNCHRONOUS_VLLM
    return "vllm-sync" if early else "vllm"


def _formats(row: Mapping[str, Any]) -> tuple[str, str]:
    precision = row["precision"]
    if pd.isna(precision):
        return "bfloat16", "bfloat16"
    if precision == "fp4":
        # Hopper has no FP4 units: gpt-oss's own MXFP4 experts, 16-bit everywhere else
        return "bfloat16", "w4a16_mxfp4"
    block = any(key in str(row["model"]) for key in BLOCK_SCALED) or row["gemm_quant_mode"] == "fp8_block"
    found = "fp8_block" if block else "fp8"
    return found, found


def context_of(deployment: Deployment) -> Context:
    """The engine of one deployment; embedded routing."""
    return Context(
        load_model(deployment.model),
        default_routing(),
        replace(backend_of(deployment.backend), host=deployment.host),
        deployment.weight_dtype,
        deployment.expert_dtype,
        deployment.kv_dtype,
    )


def cluster_of(deployment: Deployment) -> Cluster:
    """HGX nodes enough for the deployment."""
    return load_cluster(gpu=deployment.system, nodes=max(1, -(-deployment.n_gpus // 8)))


def predict(rows: pd.DataFrame) -> pd.DataFrame:
    """Add predictions: ``tpot_pred_s, ttft_pred_s, decode_s, notes, skip`` and what they were read as."""
    table = rows.copy()
    readings = [deployment_of(row) for row in table.to_dict("records")]
    table["skip"] = [reading.skip for reading in readings]
    table["notes"] = ["; ".join(reading.notes) for reading in readings]
    table["deployment"] = [reading.deployment for reading in readings]
    table["scale"] = [reading.length_scale for reading in readings]
    table["host"] = [found.host if found else "" for found in table["deployment"]]
    table["is_moe"] = [bool(found) and load_model(found.model).is_moe for found in table["deployment"]]
    table["batch_per_rank"] = [
        concurrency / found.layout.dp if found else np.nan
        for concurrency, found in zip(table.concurrency, table["deployment"], strict=True)
    ]
    alone = table["batch_per_rank"].isna() & (table["skip"] == "")
    table.loc[alone, "batch_per_rank"] = table.loc[alone, "batch_size"]
    table["prompt"] = np.rint(table.isl * table["scale"])
    table["answer"] = np.rint(table.osl * table["scale"])
    for name in ("tpot_pred_s", "ttft_pred_s", "decode_s"):
        table[name] = np.nan
    for deployment, part in table[table["skip"] == ""].groupby("deployment", sort=False):
        outcome = outcome_of(deployment, part)
        table.loc[part.index, "tpot_pred_s"] = outcome.tpot_s
        table.loc[part.index, "ttft_pred_s"] = outcome.ttft_s
        table.loc[part.index, "decode_s"] = outcome.step_s
    return table


def outcome_of(deployment: Deployment, part: pd.DataFrame, context: Context | None = None) -> Outcome:
    """`serve_outcome` of the rows of one deployment."""
    sizes = {
        "input": part.prompt.to_numpy(float),
        "output": part.answer.to_numpy(float),
        "batch_per_rank": part.batch_per_rank.to_numpy(float),
    }
    return serve_outcome(
        context or context_of(deployment), cluster_of(deployment), deployment.layout, Choice(), sizes
    )


def summary(table: pd.DataFrame, by: Iterable[str] = ("model", "system", "backend")) -> list[dict[str, Any]]:
    """Errors of the rows read, by group: TPOT and TTFT."""
    read = table[table["skip"] == ""]
    return [
        dict(zip(by, keys, strict=True)) | _errors(part)
        for keys, part in read.groupby(list(by), sort=True, dropna=False)
    ]


def _errors(part: pd.DataFrame) -> dict[str, Any]:
    found: dict[str, Any] = {"n": len(part)}
    if part.empty:
        return found
    for name in ("tpot", "ttft"):
        predicted, measured = part[f"{name}_pred_s"].to_numpy(float), part[f"{name}_s"].to_numpy(float)
        stats = ape_stats(predicted, measured)
        found[name] = {key: stats[key] for key in ("median_ape", "p90_ape", "bias")}
        found[name]["mean_ape"] = float(np.mean(np.abs(predicted / measured - 1)))
    return found


def report(table: pd.DataFrame) -> dict[str, Any]:
    """Everything that is printed, as plain values."""
    read = table[table["skip"] == ""]
    moe = read[read["is_moe"]]
    plain = moe[~moe["notes"].str.contains(SPECULATIVE, regex=False)]
    notes = read["notes"].str.split("; ").explode()
    return {
        "groups": summary(table),
        "moe": _errors(moe),
        "moe_without_speculative": _errors(plain),
        "dense": _errors(read[~read["is_moe"]]),
        "skipped": table[table["skip"] != ""]["skip"].value_counts().to_dict(),
        "notes": notes[notes != ""].value_counts().to_dict(),
        "rows": [
            {
                "id": row["id"],
                **{key: row[key] for key in ("model", "system", "backend")},
                **{key: float(row[key]) for key in ("isl", "osl", "concurrency")},
                **{key: float(row[key]) for key in ("tpot_s", "tpot_pred_s", "ttft_s", "ttft_pred_s")},
            }
            for row in read.to_dict("records")
        ],
    }


def _print(found: Mapping[str, Any]) -> None:
    head = f"{'model':34}{'system':10}{'engine':8}{'n':>5}"
    print(head + "".join(f"{name + ' ' + kind:>13}" for name in ("TPOT", "TTFT") for kind in _KINDS))
    for group in found["groups"]:
        print(f"{group['model']:34}{group['system']:10}{group['backend']:8}" + _figures(group))
    for name in ("moe", "moe_without_speculative", "dense"):
        if found[name]["n"]:
            print(f"{'all ' + name.replace('_', ' '):52}" + _figures(found[name]))
    for kind in ("skipped", "notes"):
        for reason, n in found[kind].items():
            print(f"{kind}: {n} rows: {reason}")


_KINDS = {"median": "median_ape", "mean": "mean_ape", "p90": "p90_ape", "bias": "bias"}


def _figures(group: Mapping[str, Any]) -> str:
    return f"{group['n']:5d}" + "".join(
        f"{group[name][key]:13.1%}" for name in ("tpot", "ttft") for key in _KINDS.values()
    )


def _write_page(path: Path, found: Mapping[str, Any], facts: list[Fact]) -> None:
    """Scatter of TPOT and TTFT by model and engine, and the published rows as a table."""
    frame = pd.DataFrame(found["rows"])
    frame["name"] = frame["model"].str.split("/").str[-1] + ", " + frame["system"] + ", " + frame["backend"]
    moe = frame[~frame["model"].str.contains("Llama|Qwen3-32B")]
    figures = {
        f"{label} [ms]": [
            Compared(
                str(name),
                (part[f"{key}_s"] * 1e3).tolist(),
                (part[f"{key}_pred_s"] * 1e3).tolist(),
                [
                    f"{row.isl:.0f} in, {row.osl:.0f} out, {row.concurrency:.0f} at once"
                    for row in part.itertuples()
                ],
            )
            for name, part in moe.groupby("name")
        ]
        for key, label in (("tpot", "time per output token"), ("ttft", "time to first token"))
    }
    head = ["case", "row", "predicted", "measured", "error", "what"]
    rows = [
        [
            one.case,
            one.id,
            f"{one.predicted:,.0f}",
            f"{one.measured:,.0f}",
            f"{one.predicted / one.measured - 1:+.1%}",
            one.what,
        ]
        for one in facts
    ]
    write_scatter_report(
        path, "moesim against engines on real GPUs", figures, {"Published figures": [head, *rows]}
    )


def _check_folder(data: Path) -> None:
    """Refuse what is not the data folder."""
    for name in ("measured/serving.csv", "published_facts.csv"):
        if not (data / name).is_file():
            raise MeasurementError(
                f"holds no {name}", place=str(data), fix="give the folder that measured/serving.csv is in"
            )


def main(arguments: list[str] | None = None) -> int:
    """Print the tables of measured serving rows and of published figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "data", type=Path, help="folder that holds measured/serving.csv and published_facts.csv"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", type=Path, help="write a page with the scatter to this file")
    options = parser.parse_args(arguments)
    try:
        _check_folder(options.data)
    except MeasurementError as refused:
        print(f"moesim: {refused}", file=sys.stderr)
        return 2
    found = report(predict(read_rows(options.data)))
    facts = published(options.data)
    if options.html is not None:
        _write_page(options.html, found, facts)
    if options.json:
        print(json.dumps({**found, "published": [vars(fact) for fact in facts]}, indent=1))
        return 0
    _print(found)
    print(published_table(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
