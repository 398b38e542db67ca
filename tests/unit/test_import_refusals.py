"""What `moesim trace import` refuses: exit code 2, one line, nothing written, nothing run."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from moesim.cli import main
from tests.routing_files import (
    MAKERS,
    N_EXPERTS,
    megatron,
    megatron_line,
    save_ranks,
    sglang_record,
    some_ids,
    some_logits,
    trtllm_counts,
    trtllm_raw,
)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Import a file of the folder `in`; the line that it is refused with."""
    folder = tmp_path / "in"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> str:
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["moesim", "trace", "import", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        told = capsys.readouterr()
        assert stop.value.code == 2
        assert told.out == ""
        assert len(told.err.splitlines()) == 1, told.err
        assert told.err.startswith("moesim: ")
        assert set(tmp_path.rglob("*")) == before, "something was written"
        return told.err

    return call


OUT = ("-o", "out.safetensors")


def with_id(value: int) -> np.ndarray:
    ids = some_ids(30)
    ids[20, 1, 1] = value
    return ids


def test_expert_id_out_of_range(refused):
    np.savez("t.npz", expert_ids=with_id(16), n_experts=16)
    assert "expert_ids[20, 1, 1]: 16: expert ids lie in 0..15" in refused("t.npz", *OUT)
    np.save("r.npy", np.tile(with_id(9), (1, 1, 1)))
    assert "the model" in refused("r.npy", *OUT, "--model", "mixtral-8x7b")
    Path("router_trace_rank0.jsonl").write_text(megatron_line(0, 0, np.array([[1, 70000]])) + "\n")
    assert "70000" in refused("router_trace_rank0.jsonl", *OUT)


def test_duplicate_experts_of_a_token(refused):
    ids = some_ids(30)
    ids[7, 2] = 5
    np.save("r.npy", ids)
    assert "expert_ids[7, 2]: [5, 5]: the experts of one token are distinct" in refused("r.npy", *OUT)


def test_weights_and_logits_that_are_not_finite(refused):
    weights = np.full((30, 3, 2), 0.5, np.float32)
    weights[4, 0, 1] = np.nan
    np.savez("t.npz", expert_ids=some_ids(30), expert_weights=weights, n_experts=16)
    assert "expert_weights[4, 0, 1]: 'nan': weights are finite" in refused("t.npz", *OUT)
    logits = some_logits()
    logits[1, 8, 3] = np.nan
    save_file({f"l.{n}": one for n, one in enumerate(logits)}, "l.safetensors")
    assert "layer 1, token 8, expert 3: 'nan': logits are finite" in refused(
        "l.safetensors", *OUT, "--top-k", "2"
    )


@pytest.mark.parametrize("offsets", [[0, 20, 10, 30], [0, 10, 10, 30], [0, 10, 31], [5, 30], [0]])
def test_offsets_that_do_not_ascend_to_the_end(refused, offsets):
    np.savez("t.npz", expert_ids=some_ids(30), sequence_offsets=offsets, n_experts=16)
    assert "sequence_offsets" in refused("t.npz", *OUT)


class Bomb:
    """Writes a file where it is unpickled."""

    def __reduce__(self):
        return (os.system, ("touch exploded",))


@pytest.mark.parametrize(
    "name", ["x.pt", "x.pth", "x.pkl", "x.npz", "x.npy", "x.json", "x.gguf", "x.safetensors"]
)
@pytest.mark.parametrize("format_", ["auto", "sglang", "hf", "vllm"])
def test_code_in_a_pickle_is_not_run(refused, name, format_):
    Path(name).write_bytes(pickle.dumps({"records": Bomb()}))
    assert name in refused(name, *OUT, "--format", format_)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_is_not_run(refused, zipped):
    torch.save({"logical_count": Bomb()}, "x.pt", _use_new_zipfile_serialization=zipped)
    assert "code in it is never run" in refused("x.pt", *OUT)
    assert not Path("exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))  # noqa: S301 (the bomb is one)
    assert Path("exploded").exists()


def test_objects_in_npz_are_not_unpickled(refused):
    np.savez("t.npz", expert_ids=np.array([Bomb()], dtype=object))
    assert "nothing is unpickled" in refused("t.npz", *OUT)
    np.save("t.npy", np.array([Bomb()], dtype=object))
    assert "nothing is unpickled" in refused("t.npy", *OUT)
    assert not Path("exploded").exists()


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.98])
@pytest.mark.parametrize("name", ["npz", "vllm_npy", "vllm_json", "hf_safetensors", "hf_npz", "hf_pt", "imatrix",
                                  "sglang_json", "sglang_stat"])  # fmt: skip
def test_truncated_files(refused, name, keep):
    recording = MAKERS[name](Path())
    whole = recording.path.read_bytes()
    recording.path.write_bytes(whole[: int(keep * len(whole))])
    assert recording.path.name in refused(str(recording.path), *OUT, *recording.options)


@pytest.mark.parametrize("name", ["trtllm_counts", "trtllm_raw", "sglang_per_token", "sglang_per_pass"])
def test_truncated_file_of_one_rank(refused, name):
    folder = Path("dump")
    folder.mkdir()
    MAKERS[name](folder)
    last = (
        sorted(folder.glob("*_1.pt") or folder.glob("rank1*"))[-1]
        if name.startswith("sg")
        else sorted(folder.glob("rank1*"))[-1]
    )
    last.write_bytes(last.read_bytes()[:-300])
    assert last.name in refused("dump", *OUT)


def test_broken_line_before_the_last(refused):
    recording = megatron(Path())
    lines = recording.path.read_text().splitlines()
    lines[2] = lines[2][:-5]
    recording.path.write_text("\n".join(lines) + "\n")
    assert "router_trace_rank0.jsonl:3: each line is one JSON object" in refused(recording.path.name, *OUT)


def test_only_line_cut_off(refused):
    Path("router_trace_rank0.jsonl").write_text(megatron_line(0, 0, some_ids(4)[:, 0])[:-6])
    assert "router_trace_rank0.jsonl:1" in refused("router_trace_rank0.jsonl", *OUT)


def test_folders_without_the_expected_files(refused):
    Path("empty").mkdir()
    assert "empty: is not a folder that a known program wrote" in refused("empty", *OUT)
    for format_ in ("trtllm", "megatron", "sglang", "vllm", "hf", "imatrix", "npz"):
        assert "empty: " in refused("empty", *OUT, "--format", format_)
    Path("half").mkdir()
    Path("half/meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    assert "half: has meta_info.json and rank*.safetensors" in refused("half", *OUT)


def test_files_that_do_not_belong_together(refused):
    Path("a").mkdir()
    trtllm_counts(Path("a"))
    save_file({"100_9": np.zeros(N_EXPERTS, np.int64)}, "a/rank7.safetensors")
    assert "every iteration has every layer" in refused("a", *OUT)
    Path("b").mkdir()
    trtllm_raw(Path("b"))
    save_file({"7_0": some_ids(3)[:, 0].copy()}, "b/rank7_raw.safetensors")
    assert "iteration 7: 1: has all 3 layers" in refused("b", *OUT)
    np.save("1.npy", some_ids(3))
    np.save("2.npy", some_ids(3, n_layers=2))
    assert "2.npy: " in refused("?.npy", *OUT)
    save_ranks(Path(), {0: [sglang_record(some_ids(5), 1, 0)]})
    torch.save({"records": [], "last_physical_to_logical_map": torch.zeros(1, 2, dtype=torch.int64)}, "z.pt")
    assert "one last_physical_to_logical_map" in refused("*.pt", *OUT)


@pytest.mark.parametrize("format_", ["sglang", "vllm", "trtllm", "megatron", "hf", "imatrix", "npz"])
def test_wrong_format(refused, format_):
    for name in ("npz", "imatrix", "sglang_json", "hf_safetensors", "vllm_jsonl"):
        recording = MAKERS[name](Path())
        if recording.format != format_:
            refused(recording.path.name, *OUT, "--format", format_)


def test_unknown_format_and_missing_file(refused):
    np.savez("t.npz", expert_ids=some_ids(3))
    assert "--format: 'onnx': is no known format" in refused("t.npz", *OUT, "--format", "onnx")
    assert "'none.npz': there is no such file" in refused("none.npz", *OUT)
    assert "there is no such file" in refused("none*.npz", *OUT)


@pytest.mark.parametrize("output", ["absent/out.safetensors", "out.npz", "."])
def test_output_that_cannot_be_written(refused, output):
    np.savez("t.npz", expert_ids=some_ids(3), n_experts=16)
    assert "--output: " in refused("t.npz", "-o", output)


def test_recordings_without_a_real_token(refused):
    np.save("r.npy", np.full((4, 3, 2), -1))
    assert "4 padding tokens" in refused("r.npy", *OUT)
    np.save("r.npy", np.broadcast_to(some_ids(1), (20, 3, 2)))
    assert "1 warm-up passes with 20 tokens" in refused("r.npy", *OUT)
    Path("r.json").write_text(json.dumps({"choices": [{"routed_experts": None}]}))
    assert "--enable-return-routed-experts" in refused("r.json", *OUT)
    Path("r.json").write_text(json.dumps({"physical_to_logical_map": [[0, 1]]}))
    assert "is a placement" in refused("r.json", *OUT)


def test_model_that_was_not_recorded(refused):
    np.savez("t.npz", expert_ids=some_ids(3), n_experts=16)
    assert "has 8 experts" in refused("t.npz", *OUT, "--model", "mixtral-8x7b")
    assert "is a dense model" in refused("t.npz", *OUT, "--model", "llama-3.1-8b")
    MAKERS["hf_safetensors"](Path())
    assert "logits do not say top_k" in refused("logits.safetensors", *OUT)
    assert "lies in 1..16" in refused("logits.safetensors", *OUT, "--top-k", "17")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"router_logits.0": (4, 8), "router_logits.1": (4, 9)},
            "is logits of the first layer's shape (4, 8)",
        ),
        ({"a": (4, 8), "b": (4, 8)}, "holds router logits"),
        ({"a.0": (4, 8), "b.0": (4, 8)}, "holds router logits"),
        ({"attention_mask": (4, 8)}, "holds router logits"),
        ({"a": (8,)}, "a single tensor stacks layers"),
        ({"a.0": (4, 8), "attention_mask": (3, 2)}, "attention_mask: (3, 2): is (batch, sequence)"),
        ({"a.0": (4, 8), "a.1": (4, 8), "bias.0": (8,)}, "bias: "),
    ],
)
def test_tensors_that_are_no_logits(refused, tensors, said):
    save_file({name: np.ones(shape, np.float32) for name, shape in tensors.items()}, "l.safetensors")
    assert said in refused("l.safetensors", *OUT, "--format", "hf", "--top-k", "2")


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([[(0, 0)], [(0, 0), (0, 1)]], "ranks hold the same layers"),
        ([[(0, 0), (1, 5)]], "layer: 5: is one of those of the first step"),
        ([[(0, "x")]], "step and layer are whole numbers"),
        ([[]], "holds at least one record"),
    ],
)
def test_megatron_ranks_that_do_not_fit(refused, ranks, said):
    for rank, records in enumerate(ranks):
        lines = [
            json.dumps({"step": s, "layer": n, "top_indices": [[0, 1]], "num_tokens": 1}) for s, n in records
        ]
        Path(f"router_trace_rank{rank}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert said in refused("router_trace_rank*.jsonl", *OUT, "--format", "megatron")


def test_megatron_rows_that_contradict_their_record(refused):
    file = Path("router_trace_rank0.jsonl")
    for change, said in (
        ({"num_tokens": 3}, "is (num_tokens 3, topk)"),
        ({"top_indices": [[0, 1], [2]]}, "are whole numbers"),
        ({"top_indices": [[0.5, 1]]}, "are whole numbers"),
    ):
        record = {"step": 0, "layer": 0, "num_tokens": 2, "top_indices": [[0, 1], [2, 3]], **change}
        file.write_text(json.dumps(record) + "\n")
        assert said in refused(file.name, *OUT)


def recording(**changes):
    record = sglang_record(some_ids(5), 1, 0)
    record.update(changes)
    return record


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (recording(topk_ids_of_layer=torch.full((4, 5, 8), 20)), "ids of physical experts lie in 0..19"),
        (recording(topk_ids_of_layer=torch.full((4, 5, 8), -2)), "ids of physical experts lie in 0..19"),
        (recording(topk_ids_of_layer=torch.full((4, 5, 8), -1)), "at least one pass has tokens"),
        (recording(topk_ids_of_layer=torch.zeros(3, 5, 8)), "is (4 layers, tokens, width) of whole numbers"),
        (recording(rank="a"), "has forward_pass_id and rank"),
        (recording(topk_ids_of_layer=None), "topk_ids_of_layer"),
    ],
)
def test_sglang_records_that_break_a_rule(refused, record, said):
    save_ranks(Path(), {0: [record]})
    assert said in refused("expert_distribution_recorder_17.0_0.pt", *OUT)


def test_sglang_counts_that_break_a_rule(refused):
    keep = ("forward_pass_id", "rank", "global_physical_count")
    save_ranks(Path(), {0: [{k: recording(global_physical_count=torch.ones(2, 3))[k] for k in keep}]})
    assert "are whole numbers" in refused("expert_distribution_recorder_17.0_0.pt", *OUT)
    save_ranks(Path(), {0: []})
    assert "holds at least one record" in refused("expert_distribution_recorder_17.0_0.pt", *OUT)
    torch.save({"logical_count": [1, 2]}, "stat.pt")
    assert "is a tensor of counts" in refused("stat.pt", *OUT)
    torch.save({"other": 1}, "other.pt")
    assert "records and last_physical_to_logical_map" in refused("other.pt", *OUT, "--format", "sglang")
    assert "holds router logits" in refused("other.pt", *OUT)


def test_torch_absent_is_one_line_with_the_extra(refused, monkeypatch):
    torch.save({"logical_count": torch.ones(2, 4)}, "x.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch, which is not installed; fix: pip install 'moesim[capture]'" in refused(
        "x.pt", *OUT
    )
