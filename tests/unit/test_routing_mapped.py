"""A long trace is read a block at a time: the same figures, in memory that its length does not change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.routing import RoutingShape, RoutingTrace, draw_batch, read_trace, write_trace
from moesim.routing.mapped import blocks, take_rows

LAYERS, TOP_K, EXPERTS = 24, 4, 32


def write_long(path: Path, n_tokens: int, *, sequence: int = 500) -> Path:
    """A trace of many tokens, written straight to disk: a pattern that repeats."""
    rng = np.random.default_rng(0)
    pattern = np.argsort(rng.random((2048, LAYERS, EXPERTS)), axis=-1)[..., :TOP_K].astype(np.uint8)
    offsets = np.arange(0, n_tokens + 1, sequence, dtype="<i8")
    n_bytes = n_tokens * LAYERS * TOP_K
    header = {
        "__metadata__": {
            "n_experts": str(EXPERTS),
            "top_k": str(TOP_K),
            "layer_ids": json.dumps(list(range(LAYERS))),
            "phase": "decode",
        },
        "expert_ids": {"dtype": "U8", "shape": [n_tokens, LAYERS, TOP_K], "data_offsets": [0, n_bytes]},
        "sequence_offsets": {
            "dtype": "I64",
            "shape": [offsets.size],
            "data_offsets": [n_bytes, n_bytes + offsets.nbytes],
        },
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, n_tokens, 2048):
            stream.write(pattern[: min(2048, n_tokens - start)].tobytes())
        stream.write(offsets.tobytes())
    return path


def mapped(path: Path, values: np.ndarray) -> np.ndarray:
    values.tofile(path)
    return np.memmap(path, dtype=values.dtype, mode="r", shape=values.shape)


@pytest.mark.parametrize("n_rows", [1, 255, 5000])
def test_blocks_hold_every_row_once(tmp_path, n_rows):
    values = np.random.default_rng(0).integers(0, 200, (n_rows, 40, 8)).astype(np.uint8)
    on_disk = mapped(tmp_path / "values", values)
    for source in (values, on_disk):
        kept = [(start, block.copy()) for start, block in blocks(source)]
        assert [start for start, _ in kept] == list(np.cumsum([0, *(len(b) for _, b in kept)])[:-1])
        assert np.array_equal(np.concatenate([block for _, block in kept]), values)


def test_sampled_blocks_reach_both_ends(tmp_path):
    values = np.arange(100_000, dtype=np.int64)[:, None, None]
    starts = [(start, len(block)) for start, block in blocks(values, sampled=True)]
    assert len(starts) == 64
    assert starts[0][0] == 0
    assert sum(starts[-1]) == 100_000


@pytest.mark.parametrize("n", [10, 3000])
@pytest.mark.parametrize("small_bytes", [0, 2**25])
def test_rows_come_in_the_order_asked(tmp_path, monkeypatch, n, small_bytes):
    monkeypatch.setattr("moesim.routing.mapped._SMALL_BYTES", small_bytes)
    values = np.random.default_rng(0).integers(0, 200, (5000, 3, 2)).astype(np.uint16)
    at = np.random.default_rng(1).integers(0, 5000, n)
    assert np.array_equal(take_rows(mapped(tmp_path / "values", values), at), values[at])
    assert np.array_equal(take_rows(values, at), values[at])


def test_a_mapping_that_can_be_written_to_keeps_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr("moesim.routing.mapped._SMALL_BYTES", 0)
    np.zeros((4096, 4, 4), np.uint8).tofile(tmp_path / "values")
    values = np.memmap(tmp_path / "values", dtype=np.uint8, mode="c", shape=(4096, 4, 4))
    values[:] = 7
    for _ in blocks(values):
        pass
    assert (take_rows(values, np.arange(4096)) == 7).all()


def test_counts_of_a_file_are_those_in_memory(tmp_path):
    trace = read_trace(write_long(tmp_path / "t.safetensors", 5000))
    ids = np.asarray(trace.expert_ids)
    expected = np.stack([np.bincount(ids[:, layer].ravel(), minlength=EXPERTS) for layer in range(LAYERS)])
    assert np.array_equal(trace.counts, expected)


def test_draws_from_a_file_are_those_from_memory(tmp_path):
    on_disk = read_trace(write_long(tmp_path / "t.safetensors", 20_000))
    in_memory = RoutingTrace(
        "toy", EXPERTS, TOP_K, tuple(range(LAYERS)), expert_ids=np.array(on_disk.expert_ids),
        sequence_offsets=np.array(on_disk.sequence_offsets),
    )  # fmt: skip
    shape = RoutingShape(LAYERS, EXPERTS, TOP_K)
    drawn = [
        draw_batch(one, shape, n_ranks=4, n_tokens=300, phase="decode", rng=np.random.default_rng(3))
        for one in (on_disk, in_memory)
    ]
    assert np.array_equal(*drawn)


def test_a_bad_token_deep_in_a_long_file_is_found_where_it_is(tmp_path):
    path = write_long(tmp_path / "t.safetensors", 400_000)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with path.open("r+b") as stream:
        stream.seek(start + (123_457 * LAYERS + 5) * TOP_K + 2)
        stream.write(bytes([EXPERTS]))
    with pytest.raises(TraceError, match=r"expert_ids\[123457, 5, 2\]"):
        read_trace(path).check()


MEASURE = """
import resource, sys
from moesim.routing import describe, read_trace
trace = read_trace(sys.argv[1])
trace.check()
describe(trace, ep_sizes=[8], placements=["contiguous"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_length(tmp_path):
    peaks_kib = []
    for n_tokens in (400_000, 1_000_000):
        path = write_long(tmp_path / "t.safetensors", n_tokens)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
        )
        peaks_kib.append(int(done.stdout))
    grown = (peaks_kib[1] - peaks_kib[0]) * 1024
    assert grown < 8e6  # the file grew by 58 MB


def test_a_trace_written_block_by_block_is_whole(tmp_path):
    trace = read_trace(write_long(tmp_path / "t.safetensors", 30_000))
    again = read_trace(write_trace(trace, tmp_path / "again.safetensors"))
    assert np.array_equal(again.expert_ids, trace.expert_ids)
