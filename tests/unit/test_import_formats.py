"""Every format that `moesim trace import` reads: the trace says what the program recorded."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moesim.cli.trace_import import imported
from moesim.model import load_model
from moesim.routing import RoutingTrace, open_trace, read_trace
from moesim.routing.importers.huggingface import choose
from tests.routing_files import (
    MAKERS,
    N_EXPERTS,
    N_LAYERS,
    TOP_K,
    counts_of,
    megatron,
    megatron_line,
    npy_bytes,
    save_ranks,
    sglang_record,
    some_ids,
    some_logits,
    trtllm_counts,
)

NEED_MORE = {
    "hf_safetensors", "hf_npz", "hf_pt", "sglang_stat", "sglang_per_token", "sglang_per_pass",
}  # fmt: skip
"""Formats that need top_k told, or PyTorch."""


def bring(source, folder, format_="auto", top_k=None, model=None):
    told = imported(str(source), folder / "out.safetensors", format_, model, top_k)
    return read_trace(told["output"]), " ".join(told["notes"])


@pytest.mark.parametrize("how", ["auto", "named"])
@pytest.mark.parametrize("name", MAKERS)
def test_trace_says_what_the_program_recorded(tmp_path, name, how):
    (tmp_path / "in").mkdir()
    recording = MAKERS[name](tmp_path / "in")
    top_k = TOP_K if recording.options else None
    trace, notes = bring(recording.path, tmp_path, "auto" if how == "auto" else recording.format, top_k)
    assert trace.n_layers == N_LAYERS
    assert trace.source != "unknown"
    if recording.ids is not None:
        assert np.array_equal(trace.expert_ids, recording.ids)
    else:
        assert np.array_equal(trace.expert_counts, recording.counts)
    assert (trace.n_experts, "largest id" in notes) in ((N_EXPERTS, False), (N_EXPERTS, True))


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in NEED_MORE])
def test_formats_without_an_extra_open_as_they_are(tmp_path, name):
    recording = MAKERS[name](tmp_path)
    trace = open_trace(recording.path)
    assert isinstance(trace, RoutingTrace)
    expected = recording.ids if recording.ids is not None else recording.counts
    found = trace.expert_ids if recording.ids is not None else trace.expert_counts
    assert np.array_equal(found, expected)


def test_offsets_come_along(tmp_path):
    trace, _ = bring(MAKERS["npz"](tmp_path).path, tmp_path)
    assert trace.offsets.tolist() == [0, 10, 40]
    trace, _ = bring(MAKERS["vllm_jsonl"](tmp_path).path, tmp_path)
    assert trace.offsets.tolist() == [0, 20, 40]


# ---- SGLang


def test_sglang_requests_are_sequences_and_decoded_tokens_single_ones(tmp_path):
    ids = some_ids(9)
    records = {0: [
        sglang_record(ids[:6], 1, 0, extend_seq_lens=[2, 4]),
        sglang_record(ids[6:], 2, 0, forward_mode=2, extend_seq_lens=None),
    ]}  # fmt: skip
    trace, notes = bring(save_ranks(tmp_path, records), tmp_path)
    assert trace.offsets.tolist() == [0, 2, 6, 7, 8, 9]
    assert trace.phase == "mixed"
    assert trace.layer_ids == (1, 2, 3)
    assert "1 layers without choices taken as dense" in notes
    assert "decode passes do not name their requests" in notes
    assert "mapped to logical ones by the last map" in notes


def test_sglang_padding_warm_up_and_ranks_with_the_same_tokens_are_dropped(tmp_path):
    ids, padded = some_ids(30), sglang_record(some_ids(10, 3), 3, 0)
    padded["topk_ids_of_layer"][:, 8:] = -1
    padded["topk_ids_of_layer"][2, 7, 1] = -1
    warm = np.broadcast_to(ids[:1], (12, N_LAYERS, TOP_K)).copy()
    warm_up = sglang_record(warm, 1, 0)
    warm_up["topk_ids_of_layer"] = warm_up["topk_ids_of_layer"][:, :1].repeat(1, 12, 1)
    records = {
        0: [warm_up, sglang_record(ids, 2, 0), padded],
        1: [sglang_record(ids, 2, 1)],
    }
    trace, notes = bring(save_ranks(tmp_path, records), tmp_path)
    assert np.array_equal(trace.expert_ids, np.concatenate([ids, some_ids(10, 3)[:7]]))
    assert "2 padding tokens (ids -1) dropped" in notes
    assert "warning: 1 tokens without an expert in some layer" in notes
    assert "1 warm-up passes with 12 tokens dropped" in notes
    assert "30 tokens counted once: several ranks recorded the same ones" in notes


def test_sglang_ranks_that_counted_the_same_are_counted_once(tmp_path):
    ids = some_ids(20)
    keep = ("forward_pass_id", "rank", "global_physical_count")
    records = {r: [{k: sglang_record(ids, 1, r)[k] for k in keep}] for r in range(2)}
    trace, notes = bring(save_ranks(tmp_path, records), tmp_path)
    assert np.array_equal(trace.counts, counts_of(ids))
    assert "1 passes counted once" in notes


def test_sglang_initial_location_json_and_pt_agree(tmp_path):
    counts = counts_of(some_ids(40))
    content = {"physical_to_logical_map": [list(range(16))] * 3, "logical_count": counts.tolist()}
    (tmp_path / "location.json").write_text(json.dumps(content))
    torch.save({key: torch.tensor(value) for key, value in content.items()}, tmp_path / "location.pt")
    for name in ("location.json", "location.pt"):
        trace, _ = bring(tmp_path / name, tmp_path)
        assert np.array_equal(trace.counts, counts)


def test_torch_files_of_the_old_format_are_read_too(tmp_path):
    counts = counts_of(some_ids(40))
    file = tmp_path / "old.pt"
    torch.save({"logical_count": torch.tensor(counts)}, file, _use_new_zipfile_serialization=False)
    trace, _ = bring(file, tmp_path)
    assert np.array_equal(trace.counts, counts)


def test_a_trace_of_ones_own_gets_its_model(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"logical_count": np.full((32, 8), 5).tolist()}))
    imported(str(tmp_path / "c.json"), tmp_path / "a.safetensors", "auto", None)
    assert read_trace(tmp_path / "a.safetensors").top_k is None
    trace, _ = bring(tmp_path / "a.safetensors", tmp_path, model="mixtral-8x7b")
    assert (trace.model, trace.top_k) == (load_model("mixtral-8x7b").name, 2)


def test_layer_totals_are_warned_of_and_how(tmp_path):
    counts = counts_of(some_ids(40)) * 10
    counts[1, 0] += 9
    (tmp_path / "c.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    _, notes = bring(tmp_path / "c.json", tmp_path)
    assert "warning: layer totals differ by 1.1% (layer 0: 800, layer 1: 809)" in notes
    assert "each layer is scaled to its own total" in notes


# ---- vLLM


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32])
def test_vllm_arrays_of_every_type(tmp_path, dtype):
    np.save(tmp_path / "r.npy", some_ids(20).astype(dtype))
    trace, _ = bring(tmp_path / "r.npy", tmp_path)
    assert np.array_equal(trace.expert_ids, some_ids(20))


def test_vllm_folder_of_arrays_is_a_sequence_a_file_in_natural_order(tmp_path):
    for number, n in ((10, 4), (9, 3), (2, 5)):
        np.save(tmp_path / f"request-{number}.npy", some_ids(n, number))
    trace, _ = bring(tmp_path, tmp_path)
    assert trace.offsets.tolist() == [0, 5, 8, 12]
    assert np.array_equal(trace.expert_ids[5:8], some_ids(3, 9))
    quoted, _ = bring(tmp_path / "request-*.npy", tmp_path)
    assert np.array_equal(quoted.expert_ids, trace.expert_ids)


def test_vllm_padding_is_dropped_signed_or_not(tmp_path):
    ids = some_ids(20)
    ids[[3, 19]] = -1
    for dtype in (np.int16, np.uint8):
        np.save(tmp_path / "r.npy", ids.astype(dtype))
        trace, notes = bring(tmp_path / "r.npy", tmp_path)
        assert trace.n_tokens == 18
        assert "2 padding tokens" in notes


def test_vllm_truncated_last_line_is_told(tmp_path):
    recording = MAKERS["vllm_jsonl"](tmp_path)
    recording.path.write_text(recording.path.read_text()[:-40])
    trace, notes = bring(recording.path, tmp_path)
    assert trace.n_tokens == 20
    assert "warning: line 2 of responses.jsonl is cut off" in notes


def test_sglang_responses_need_the_model_for_their_shape(tmp_path):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((6, 32, 8)), axis=-1)[..., :2].astype("<i4")
    told = base64.b64encode(ids.tobytes()).decode()
    (tmp_path / "r.json").write_text(json.dumps({"text": "x", "meta_info": {"routed_experts": told}}))
    trace, _ = bring(tmp_path / "r.json", tmp_path, model="mixtral-8x7b")
    assert np.array_equal(trace.expert_ids, ids)


def test_layers_recorded_twice_are_told(tmp_path):
    ids = some_ids(40)
    ids[:, 2] = ids[:, 0]
    np.save(tmp_path / "r.npy", ids)
    _, notes = bring(tmp_path / "r.npy", tmp_path)
    assert "warning: layers 0, 2 are identical" in notes
    (tmp_path / "c.json").write_text(json.dumps({"logical_count": counts_of(ids).tolist()}))
    _, notes = bring(tmp_path / "c.json", tmp_path)
    assert "warning: layers 0, 2 are identical" in notes


# ---- TensorRT-LLM


def test_trtllm_warm_up_steps_of_counts_are_dropped(tmp_path):
    recording = trtllm_counts(tmp_path)
    tensors = {}
    for layer in range(N_LAYERS):
        one = np.zeros(N_EXPERTS, dtype=np.int64)
        one[[2, 5]] = 64
        tensors |= {f"99_{3 + layer}": one}
    save_file(tensors, tmp_path / "rank2.safetensors")
    trace, notes = bring(tmp_path, tmp_path)
    assert np.array_equal(trace.expert_counts, recording.counts)
    assert trace.layer_ids == (3, 4, 5)
    assert "1 warm-up passes dropped" in notes
    assert "counts of 3 ranks summed" in notes


# ---- Megatron


def test_megatron_micro_batches_ranks_mtp_and_a_killed_run(tmp_path):
    ids = some_ids(60)
    for rank in range(2):
        lines = []
        for step in range(2):
            first = ids[30 * step + 15 * rank :][:15]
            for batch in (first[:8], first[8:]):  # two micro-batches
                lines += [megatron_line(step, layer, batch[:, layer], rank) for layer in range(N_LAYERS)]
            lines.append(megatron_line(step, 0, first[:, 0], rank, mtp_idx=0, block="mtp"))
        if rank:
            lines.append(megatron_line(2, 0, ids[:4, 0], rank))
            lines.append(megatron_line(2, 1, ids[:4, 1], rank)[:-9])
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text("\n".join(lines))
    trace, notes = bring(tmp_path, tmp_path)
    order = [(step, rank, part) for step in range(2) for part in range(2) for rank in range(2)]
    expected = [
        ids[30 * s + 15 * r :][:15][slice(0, 8) if part == 0 else slice(8, 15)] for s, r, part in order
    ]
    assert np.array_equal(trace.expert_ids, np.concatenate(expected))
    assert "multi-token prediction (mtp_idx) dropped" in notes
    assert "line 16 of router_trace_rank1.jsonl is cut off" in notes
    assert "step 2 of router_trace_rank1.jsonl lacks layers" in notes


def test_megatron_pipeline_stages_are_joined(tmp_path):
    ids = some_ids(40)
    for rank, layers in enumerate(((0, 1), (0, 1), (2,), (2,))):
        rows = ids[20 * (rank % 2) :][:20]
        text = "\n".join(megatron_line(0, layer, rows[:, layer], rank) for layer in layers)
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text(text + "\n")
    trace, notes = bring(tmp_path, tmp_path)
    assert np.array_equal(trace.expert_ids, ids)
    assert "2 pipeline stages joined" in notes


def test_megatron_ranks_with_the_same_tokens_are_taken_once(tmp_path):
    first = megatron(tmp_path)
    (tmp_path / "router_trace_rank1.jsonl").write_bytes(first.path.read_bytes())
    trace, notes = bring(tmp_path, tmp_path)
    assert np.array_equal(trace.expert_ids, first.ids)
    assert "40 tokens counted once" in notes


# ---- Hugging Face


def test_hf_batches_are_sequences_and_masks_drop_padding(tmp_path):
    logits = some_logits(12).reshape(N_LAYERS, 2, 6, N_EXPERTS)
    mask = np.ones((2, 6), np.int64)
    mask[0, :2] = 0
    tensors = {f"layer.{n}": np.ascontiguousarray(one) for n, one in enumerate(logits)}
    save_file({**tensors, "attention_mask": mask}, tmp_path / "l.safetensors")
    trace, notes = bring(tmp_path / "l.safetensors", tmp_path, top_k=TOP_K)
    assert trace.offsets.tolist() == [0, 4, 10]
    assert "2 padding tokens" in notes
    expected = np.argsort(-some_logits(12), axis=-1)[..., :TOP_K].transpose(1, 0, 2)
    assert np.array_equal(trace.expert_ids, expected[2:])


def test_hf_compressed_and_stacked_logits_agree(tmp_path):
    expected = np.argsort(-some_logits(12), axis=-1)[..., :TOP_K].transpose(1, 0, 2)
    np.savez_compressed(tmp_path / "a.npz", *some_logits(12))
    np.savez_compressed(tmp_path / "b.npz", *some_logits(12).reshape(N_LAYERS, 2, 6, N_EXPERTS))
    np.savez_compressed(tmp_path / "c.npz", router_logits=some_logits(12))
    np.save(tmp_path / "d.npy", some_logits(12))
    for name in ("a.npz", "b.npz", "c.npz", "d.npy"):
        trace, _ = bring(tmp_path / name, tmp_path, top_k=TOP_K)
        assert np.array_equal(trace.expert_ids, expected), name


def test_hf_weights_are_the_softmax_over_the_chosen(tmp_path):
    trace, _ = bring(MAKERS["hf_npz"](tmp_path).path, tmp_path, top_k=TOP_K)
    best = np.sort(some_logits(), axis=-1)[..., ::-1][..., :TOP_K].transpose(1, 0, 2)
    expected = np.exp(best) / np.exp(best).sum(-1, keepdims=True)
    assert np.asarray(trace.expert_weights, np.float32) == pytest.approx(expected, abs=1e-3)


def test_deepseek_choice_equals_transformers(monkeypatch):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    moe = load_model("deepseek-v3").moe
    config = DeepseekV3Config(hidden_size=32)
    router = DeepseekV3TopkRouter(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.3)
    router.e_score_correction_bias.copy_(torch.randn(256) * 0.05)
    with torch.no_grad():
        logits, weights, ids = router(torch.randn(200, 32))
    ours, our_weights = choose(logits.numpy(), 8, moe, router.e_score_correction_bias.numpy())
    order, ours_order = np.argsort(ids.numpy(), axis=1), np.argsort(ours, axis=1)
    assert np.array_equal(np.take_along_axis(ids.numpy(), order, 1), np.take_along_axis(ours, ours_order, 1))
    assert np.take_along_axis(our_weights, ours_order, 1) == pytest.approx(
        np.take_along_axis(weights.numpy(), order, 1), rel=1e-5
    )


@pytest.mark.parametrize("stacked", [True, False])
def test_biases_steer_the_choice_and_not_the_weights(tmp_path, stacked):
    logits = some_logits()
    bias = np.random.default_rng(2).normal(0, 0.5, (N_LAYERS, N_EXPERTS)).astype(np.float32)
    tensors = {f"router_logits.{n}": one for n, one in enumerate(logits)}
    more = {"e_score_correction_bias": bias} if stacked else {f"bias.{n}": one for n, one in enumerate(bias)}
    save_file(tensors | more, tmp_path / "l.safetensors")
    trace, _ = bring(tmp_path / "l.safetensors", tmp_path, top_k=TOP_K)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    ids = np.argsort(-(scores + bias[:, None]), axis=-1)[..., :TOP_K]
    chosen = np.take_along_axis(scores, ids, -1)
    assert np.array_equal(trace.expert_ids, ids.transpose(1, 0, 2))
    expected = (chosen / chosen.sum(-1, keepdims=True)).transpose(1, 0, 2)
    assert np.asarray(trace.expert_weights, np.float32) == pytest.approx(expected, abs=1e-3)


def test_a_model_with_a_bias_that_the_file_lacks_is_told(tmp_path):
    logits = np.random.default_rng(0).normal(size=(58, 5, 256)).astype(np.float32)
    np.save(tmp_path / "l.npy", logits)
    trace, notes = bring(tmp_path / "l.npy", tmp_path, model="deepseek-v3")
    assert "warning: the model steers its choice by a bias per expert" in notes
    assert trace.layer_ids == tuple(range(3, 61))
    groups = np.sort(np.asarray(trace.expert_ids, np.int64) // 32, axis=-1)
    assert (np.diff(groups, axis=-1) != 0).sum(-1).max() == 3  # four of eight groups


def test_bfloat16_logits_are_read_from_safetensors(tmp_path):
    from safetensors.torch import save_file as save_torch

    logits = torch.tensor(some_logits()).to(torch.bfloat16)
    save_torch(
        {f"router_logits.{n}": one.clone() for n, one in enumerate(logits)}, tmp_path / "l.safetensors"
    )
    trace, _ = bring(tmp_path / "l.safetensors", tmp_path, top_k=TOP_K)
    ids = np.argsort(-logits.float().numpy(), axis=-1, kind="stable")[..., :TOP_K].transpose(1, 0, 2)
    assert np.array_equal(trace.expert_ids, ids)


def test_one_sequence_with_a_base64_header_and_lists_agree(tmp_path):
    ids = some_ids(5)
    told = base64.b64encode(npy_bytes(ids)).decode()
    for number, value in enumerate((told, ids.tolist())):
        (tmp_path / f"{number}.json").write_text(json.dumps({"choices": [{"routed_experts": value}]}))
        trace, _ = bring(tmp_path / f"{number}.json", tmp_path)
        assert np.array_equal(trace.expert_ids, ids)
