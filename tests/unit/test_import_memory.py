"""A recording is brought in without being held: memory does not grow with its length."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save_file

from moesim.cli.trace_import import imported
from moesim.routing import RoutingTrace, read_trace, write_trace
from tests.routing_files import N_EXPERTS, N_LAYERS, megatron_line, some_ids

MB = 10**6


def sparse_npy(path, n_tokens):
    """Top-1 routing of 24 layers: real ids at the head, then a hole that reads as zeros."""
    head = np.random.default_rng(0).integers(0, 64, (1000, 24, 1), dtype=np.uint8)
    with path.open("wb") as stream:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n_tokens, 24, 1)}
        np.lib.format.write_array_header_1_0(stream, header)
        begin = stream.tell()
        stream.write(head.tobytes())
        stream.truncate(begin + n_tokens * 24)
    return path


def sparse_logits(path, n_tokens):
    """Logits of 4 layers, 64 experts: zeros, as holes."""
    n_bytes = n_tokens * 64 * 4
    entries = {
        f"router_logits.{n}": {
            "dtype": "F32",
            "shape": [n_tokens, 64],
            "data_offsets": [n * n_bytes, (n + 1) * n_bytes],
        }
        for n in range(4)
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + 4 * n_bytes)
    return path


def zipped_logits(path, n_tokens):
    """The same, compressed to nearly nothing."""
    np.savez_compressed(path, *[np.zeros((n_tokens, 64), np.float32) for _ in range(4)])
    return path


def npz(path, n_tokens):
    ids = np.tile(some_ids(1000), (n_tokens // 1000, 1, 1)).astype(np.uint8)
    np.savez_compressed(path.with_suffix(".npz"), expert_ids=ids, n_experts=N_EXPERTS)
    return path.with_suffix(".npz")


def jsonl(path, n_tokens):
    ids = some_ids(1000)
    lines = [megatron_line(0, layer, ids[:, layer]) for layer in range(N_LAYERS)]
    with path.open("w") as stream:
        for step in range(n_tokens // 1000):
            stream.writelines(line.replace('"step": 0', f'"step": {step}') + "\n" for line in lines)
    return path


def trtllm(path, n_tokens):
    path.mkdir()
    (path / "meta_info.json").write_text(json.dumps({"num_experts": N_EXPERTS, "num_experts_per_token": 2}))
    ids = np.ascontiguousarray(np.tile(some_ids(1000), (10, 1, 1)).transpose(1, 0, 2))
    tensors = {f"{s}_{n}": ids[n] for s in range(n_tokens // 10_000) for n in range(N_LAYERS)}
    save_file(tensors, path / "rank0_raw.safetensors")
    return path


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest would keep it for three runs


def peak_bytes(source, target, top_k):
    tracemalloc.start()
    imported(str(source), target, "auto", None, top_k)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    ("make", "name", "short", "long", "top_k"),
    [
        (sparse_npy, "r.npy", 400_000, 12_500_000, None),  # 10 and 300 MB
        (sparse_logits, "l.safetensors", 40_000, 250_000, 2),  # 40 and 256 MB
        (zipped_logits, "l.npz", 40_000, 200_000, 2),  # 40 and 200 MB when expanded
        (npz, "t.npz", 700_000, 7_000_000, None),  # 4 and 42 MB when expanded
        (jsonl, "router_trace_rank0.jsonl", 20_000, 200_000, None),
        (trtllm, "dump", 200_000, 4_000_000, None),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_memory_does_not_grow_with_the_recording(folder, make, name, short, long, top_k):
    peaks = []
    for number, n_tokens in enumerate((short, long)):
        inside = folder / str(number)
        inside.mkdir()
        peaks.append(peak_bytes(make(inside / name, n_tokens), folder / "out.safetensors", top_k))
    assert peaks[1] < peaks[0] + 8 * MB
    assert peaks[1] < 120 * MB, peaks


def test_a_trace_is_written_without_being_held(folder):
    source = sparse_npy(folder / "r.npy", 4_000_000)
    ids = np.lib.format.open_memmap(source, mode="r")
    trace = RoutingTrace("toy", 64, 1, tuple(range(24)), expert_ids=ids)
    tracemalloc.start()
    write_trace(trace, folder / "out.safetensors")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * MB < ids.nbytes
    assert np.array_equal(read_trace(folder / "out.safetensors").expert_ids[:2000], ids[:2000])
