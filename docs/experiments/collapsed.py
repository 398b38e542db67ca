"""What a collapsed router costs on EP8: one layer's shares 80/5/3/2/3/2/3/2% against an even load."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from moesim.plan import run
from moesim.routing import RoutingTrace, write_trace
from moesim.scenario import parse_scenario

from common import Table, figure, options

SHARES = {
    "even": np.full(8, 0.125),
    "collapsed": np.array([0.80, 0.05, 0.03, 0.02, 0.03, 0.02, 0.03, 0.02]),
}
MIXTRAL_TOP_1 = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 1,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Mixtral-8x7B's shape with one expert a token: of two distinct ones, none could have more than half."""
WORKLOADS = {
    "prefill, 8192 tokens a rank": "{kind: prefill, tokens_per_rank: 8192, prompt: 2048}",
    "decode, 128 tokens a rank": "{kind: decode, batch_per_rank: 128, context: 2048}",
}


def main() -> None:
    """Price both loads with and without a capacity, in prefill and decode."""
    asked = options(__doc__ or "")
    table = Table(asked.output / "collapsed.csv")
    workloads = dict(list(WORKLOADS.items())[-1:]) if asked.small else WORKLOADS
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "config.json"
        model.write_text(json.dumps(MIXTRAL_TOP_1))
        for load, shares in SHARES.items():
            counts = np.tile(np.round(shares * 1_000_000).astype(np.int64), (1, 32, 1))
            trace = write_trace(
                RoutingTrace("top-1", 8, 1, tuple(range(32)), source="made up", expert_counts=counts),
                Path(folder) / f"{load}.safetensors",
            )
            for workload, text in workloads.items():
                for factor in ("none", "1.0", "1.25", "2.0"):
                    row = _priced(str(model), str(trace), text, factor)
                    table.add(load=load, workload=workload, capacity_factor=factor, **row)
    traces = [
        go.Bar(
            name=load,
            x=[
                f"{row['workload']}, capacity {row['capacity_factor']}"
                for row in table.rows
                if row["load"] == load
            ],
            y=[row["step_s"] for row in table.rows if row["load"] == load],
        )
        for load in SHARES
    ]
    figure(asked.output / "collapsed.html", traces, "A collapsed router on EP8, 8 H200", "", "step [s]")


def _priced(model: str, trace: str, workload: str, factor: str) -> dict[str, object]:
    text = f"""
model: {model}
cluster: {{gpu: h200-sxm, nodes: 1, gpus_per_node: 8}}
layout: {{tp: 1, dp: 8, ep: 8}}
workload: {workload}
routing: {{trace: {trace}}}
policy: {{capacity_factor: {factor}}}
"""
    row = run(parse_scenario(text).scenario).row
    return {
        "step_s": float(f"{row['step_s']:.4g}"),
        "busiest_rank_over_mean": round(row["imbalance"], 3),
        "dropped_fraction": round(row["dropped_fraction"], 4),
        "tokens_per_s_per_gpu": round(row["tokens_per_s_per_gpu"]),
    }


if __name__ == "__main__":
    main()
