"""Behaviour that once was wrong, each seen by somebody who used the command."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moesim.cli import show
from moesim.cli.trace_import import imported
from moesim.errors import ScenarioError, TraceError
from moesim.plan import run
from moesim.scenario import parse_scenario

SERVE = """
model: qwen3-30b-a3b
cluster: {gpu: h200-sxm, nodes: 1}
layout: {tp: 1, dp: 8, ep: 8}
workload: {kind: serve, input: 512, output: 128, batch_per_rank: 8}
minimise: usd_per_mtok
"""


def row(*overrides: str) -> dict:
    return run(parse_scenario(SERVE, overrides).scenario).row


def test_an_objective_given_as_an_override_replaces_the_files():
    assert parse_scenario(SERVE, ("maximise=mfu",)).scenario.objective == ("mfu", -1)
    with pytest.raises(ScenarioError, match="both"):
        parse_scenario(SERVE, ("maximise=mfu", "minimise=tpot"))


def test_a_token_trace_of_a_model_with_other_layers_is_not_imported(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(32)[:4] for _ in range(6 * 24)]).reshape(6, 24, 4).astype(np.uint8)
    source = tmp_path / "tokens.npz"
    np.savez(source, expert_ids=ids, sequence_offsets=np.array([0, 6]))
    with pytest.raises(TraceError, match="36 MoE layers"):
        imported(source, tmp_path / "out.safetensors", "auto", "gpt-oss-120b")
    assert not (tmp_path / "out.safetensors").exists()
    assert imported(source, tmp_path / "out.safetensors", "auto", "gpt-oss-20b")["n_layers"] == 24


def test_fewer_requests_than_replicas_make_fewer_tokens():
    one, four = (row("workload.batch_per_rank=null", f"workload.concurrency={n}") for n in (1, 4))
    assert four["tokens_per_s"] == pytest.approx(4 * one["tokens_per_s"])
    assert four["tpot_s"] == pytest.approx(one["tpot_s"])


def test_small_chunks_do_not_make_prompts_cheaper():
    """Where every step already carries a chunk, requests queue: no more are served than there is room for."""
    long = ("backend=vllm", "workload.input=8000", "workload.output=64", "workload.batch_per_rank=32")
    whole, cut = row(*long), row(*long, "workload.chunk=512")
    assert cut["tokens_per_s"] < 1.1 * whole["tokens_per_s"]
    assert cut["ttft_s"] > whole["ttft_s"]


def test_the_dispatch_of_a_row_gives_the_same_row_back():
    free = row()
    again = row(f"policy.dispatch={free['choice']['dispatch']}")
    assert free["choice"]["resolved"] == {"decode": "low-latency", "prefill": "normal"}
    assert again["ttft_s"] == free["ttft_s"]


def test_old_gpus_and_pcie_boxes_gather_tokens():
    for gpu in ("a100-80g-sxm", "l40s"):
        assert set(row(f"cluster.gpu={gpu}")["choice"]["resolved"].values()) == {"allgather"}


def test_what_a_reader_has_to_know_is_said(capsys):
    from moesim.plan import run_answer

    scenario = parse_scenario(
        SERVE, ("cluster.gpu=a100-80g-sxm", "dtype=fp8", "workload.input=900000")
    ).scenario
    result, _ = run_answer(run(scenario), scenario)
    text = " ".join(result["warnings"])
    assert "never measured" in text and "no FP8 units" in text and "900,128" in text
    show.run(result)
    assert capsys.readouterr().out.count("Warning:") == 3
    json.dumps(result["warnings"])


def test_the_busiest_rank_needs_more_memory_for_its_rows():
    prefill = ("workload={kind: prefill, tokens_per_rank: 16384, prompt: 2048}", "model=deepseek-v2-lite")
    even, skewed = (
        row(*prefill, f"routing={routing}") for routing in ("uniform", "{kind: zipf, exponent: 1.2}")
    )
    assert skewed["memory_bytes"]["activations"] > 1.5 * even["memory_bytes"]["activations"]
