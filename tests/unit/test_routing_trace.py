"""The trace format: what round-trips, and every file that is refused."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.routing import RoutingTrace, read_trace, write_trace


def token_trace(**changes):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((40, 3, 8)), axis=-1)[..., :2].astype(np.uint8)
    fields = {
        "model": "toy",
        "n_experts": 8,
        "top_k": 2,
        "layer_ids": (1, 2, 5),
        "phase": "decode",
        "source": "made up",
        "licence": "CC0",
        "expert_ids": ids,
        "expert_weights": rng.random(ids.shape).astype(np.float16),
        "sequence_offsets": np.array([0, 15, 40]),
    }
    return RoutingTrace(**{**fields, **changes})


def count_trace(**changes):
    counts = np.arange(2 * 3 * 8).reshape(2, 3, 8)
    fields = {"model": "toy", "n_experts": 8, "top_k": 2, "layer_ids": (0, 1, 2), "expert_counts": counts}
    return RoutingTrace(**{**fields, **changes})


def test_token_level_trace_survives_the_file(tmp_path):
    trace = token_trace(notes=("padded rows dropped",))
    back = read_trace(write_trace(trace, tmp_path / "t.safetensors"))
    for name in ("model", "n_experts", "top_k", "layer_ids", "phase", "source", "licence", "notes"):
        assert getattr(back, name) == getattr(trace, name)
    for name in ("expert_ids", "expert_weights", "sequence_offsets"):
        assert np.array_equal(getattr(back, name), getattr(trace, name))
    assert isinstance(back.expert_ids, np.memmap)
    assert back.n_tokens == 40
    assert back.is_token_level


def test_domains_survive_the_file(tmp_path):
    trace = token_trace(sequence_domains=np.array([1, 0]), domains=("python", "C, α"))
    back = read_trace(write_trace(trace, tmp_path / "t.safetensors"))
    assert back.domains == ("python", "C, α")
    assert back.sequence_domains.dtype == np.uint8
    assert back.sequence_domains.tolist() == [1, 0]


def test_counts_only_trace_survives_the_file(tmp_path):
    trace = count_trace(top_k=None)
    back = read_trace(write_trace(trace, tmp_path / "t.safetensors"))
    assert back.top_k is None
    assert back.n_tokens == 0
    assert not back.is_token_level
    assert np.array_equal(back.counts, trace.expert_counts.sum(0))


def test_counts_of_tokens_add_up_per_layer():
    trace = token_trace()
    assert trace.counts.sum(-1).tolist() == [80, 80, 80]
    assert trace.counts[1, 3] == (np.asarray(trace.expert_ids)[:, 1] == 3).sum()


def test_counts_only_trace_knows_its_tokens_from_top_k():
    assert count_trace().n_tokens == count_trace().counts[0].sum() // 2


def test_ids_of_more_than_256_experts_are_kept(tmp_path):
    ids = np.array([[[300, 2]], [[299, 0]]], dtype=np.uint16)
    trace = RoutingTrace("wide", 384, 2, (0,), expert_ids=ids)
    assert read_trace(write_trace(trace, tmp_path / "t.safetensors")).expert_ids.max() == 300


def test_trace_without_offsets_is_one_sequence():
    assert token_trace(sequence_offsets=None).offsets.tolist() == [0, 40]


def bad_ids(value):
    ids = np.array(token_trace().expert_ids)
    ids[7, 2] = value
    return ids


def bad_weights(value):
    weights = np.array(token_trace().expert_weights)
    weights[3, 1, 0] = value
    return weights


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_ids": bad_ids([8, 1])}, r"expert_ids\[7, 2, 0\]: 8: expert ids lie in 0..7"),
        (
            {"expert_ids": bad_ids([4, 4])},
            r"expert_ids\[7, 2\]: \[4, 4\]: the experts of one token are distinct",
        ),
        ({"expert_weights": bad_weights(np.nan)}, r"expert_weights\[3, 1, 0\]: 'nan': weights are finite"),
        ({"expert_weights": bad_weights(np.inf)}, "weights are finite"),
    ],
)
def test_bad_tokens_are_refused_and_nothing_is_written(tmp_path, changes, said):
    with pytest.raises(TraceError, match=said):
        write_trace(token_trace(**changes), tmp_path / "t.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert_ids": None}, "either expert_ids or expert_counts"),
        ({"expert_counts": np.zeros((1, 3, 8), int)}, "either expert_ids or expert_counts"),
        ({"n_experts": 0}, "n_experts: 0: is at least 1"),
        ({"top_k": 9}, "top_k: 9: lies in 1..8"),
        ({"layer_ids": (2, 1, 3)}, "layer_ids: .*ascend"),
        ({"layer_ids": ()}, "layer_ids: .*ascend"),
        ({"layer_ids": (0, 1)}, "expert_ids: .*2 layers"),
        ({"expert_ids": np.zeros((0, 3, 2), np.uint8)}, "at least one token"),
        ({"expert_ids": np.zeros((4, 3, 2))}, "whole numbers"),
        ({"expert_weights": np.zeros((4, 3, 2), np.float16)}, "expert_weights: .*shape of expert_ids"),
        (
            {"sequence_offsets": np.array([0, 20, 20, 40])},
            r"sequence_offsets\[2\]: \(20, 20\): offsets ascend",
        ),
        ({"sequence_offsets": np.array([0, 30])}, "run from 0 to the 40 tokens"),
        ({"sequence_offsets": np.array([0.0, 40.0])}, "two whole numbers"),
        ({"domains": ("a",)}, "domains: .*stand beside sequence_domains"),
        (
            {"sequence_domains": np.array([0, 1]), "domains": ("a", "b"), "sequence_offsets": None},
            "sequence_domains: need sequence_offsets",
        ),
        ({"sequence_domains": np.array([0]), "domains": ("a",)}, "are 2 whole numbers, one a sequence"),
        ({"sequence_domains": np.array([0.0, 1.0]), "domains": ("a", "b")}, "whole numbers, one a sequence"),
        ({"sequence_domains": np.array([0, 0])}, "domains: .*1 to 256 distinct names"),
        ({"sequence_domains": np.array([0, 0]), "domains": ("a", "a")}, "1 to 256 distinct names"),
        (
            {"sequence_domains": np.array([0, 2]), "domains": ("a", "b")},
            r"sequence_domains\[1\]: 2: number one of the 2 domains",
        ),
    ],
)
def test_token_trace_that_contradicts_itself_is_refused(changes, said):
    with pytest.raises(TraceError, match=said):
        token_trace(**changes)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (np.zeros((1, 2, 8), int), "expert_counts: .*3 layers, 8 experts"),
        (np.full((1, 3, 8), -1), "are not negative"),
        (np.ones((1, 3, 8)), "are whole numbers"),
    ],
)
def test_bad_counts_are_refused(counts, said):
    with pytest.raises(TraceError, match=said):
        count_trace(expert_counts=counts)


def header_of(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path, change):
    header, body = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture
def file(tmp_path):
    return write_trace(token_trace(), tmp_path / "t.safetensors")


def test_absent_file_is_refused(tmp_path):
    with pytest.raises(TraceError, match=r"nowhere.safetensors: no such trace file"):
        read_trace(tmp_path / "nowhere.safetensors")


def test_truncated_file_is_refused(file):
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(TraceError, match=r"t.safetensors: is truncated: 50 bytes are missing"):
        read_trace(file)


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"\x80\x04" * 40, b"hello, this is text, not tensors"])
def test_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(TraceError, match="is not a whole safetensors file"):
        read_trace(path)


@pytest.mark.parametrize("text", [b"[1, 2]  ", b"not json"])
def test_header_that_is_no_object_is_refused(tmp_path, text):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(TraceError, match="is not a safetensors file"):
        read_trace(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h["__metadata__"].pop("n_experts"), "states n_experts, top_k and layer_ids"),
        (lambda h: h["__metadata__"].update(layer_ids="oops"), "states n_experts, top_k and layer_ids"),
        (lambda h: [h.pop(k) for k in list(h) if k.startswith("expert")], "holds neither expert_ids"),
        (lambda h: h["expert_ids"].update(dtype="F64"), "expert_ids: .*dtype one of"),
        (lambda h: h["expert_ids"].update(shape=[1, 3, 2]), "expert_ids: .*spans 6 bytes by its shape"),
        (
            lambda h: h["__metadata__"].update(n_experts="4"),
            r"expert_ids\[\d+, \d, \d\]: \d: expert ids lie in 0..3",
        ),
    ],
)
def test_header_that_does_not_describe_the_data_is_refused(file, change, said):
    rewrite(file, change)
    with pytest.raises(TraceError, match=said) as caught:
        read_trace(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_trace_is_sampled_on_opening_and_checked_whole_on_request():
    ids = np.zeros((40000, 1, 2), dtype=np.uint8)
    ids[..., 1] = 1
    ids[20001, 0] = 3
    trace = RoutingTrace("long", 8, 2, (0,), expert_ids=ids)
    trace.check(sampled=True)
    with pytest.raises(TraceError, match=r"expert_ids\[20001, 0\]"):
        trace.check()


@pytest.mark.parametrize("top_k", [2, 16, 17, 40])
def test_repeated_experts_are_found_at_any_width(top_k):
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((5, 2, 64)), axis=-1)[..., :top_k].astype(np.uint8)
    RoutingTrace("toy", 64, top_k, (0, 1), expert_ids=ids).check()
    ids[3, 1, -1] = ids[3, 1, 0]
    with pytest.raises(TraceError, match=r"expert_ids\[3, 1\].*distinct"):
        RoutingTrace("toy", 64, top_k, (0, 1), expert_ids=ids).check()


def test_failed_write_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("moesim.routing.writing.map_trace", full)
    with pytest.raises(OSError, match="disk full"):
        write_trace(token_trace(), file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("trace", [token_trace(), count_trace()])
def test_renaming_experts_keeps_the_loads_but_not_their_owners(trace):
    renamed = trace.permuted(3)
    assert np.array_equal(np.sort(renamed.counts, axis=-1), np.sort(trace.counts, axis=-1))
    assert not np.array_equal(renamed.counts, trace.counts)
    renamed.check()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data_offsets", []),
        ("data_offsets", ["a", "b"]),
        ("data_offsets", None),
        ("shape", [-4, -1, 2]),
        ("shape", [2**32, 2**32, 2]),
    ],
)
def test_headers_that_state_nonsense_are_refused(tmp_path, key, value):
    ids = np.array([[[0, 1]], [[2, 3]]], dtype=np.uint8)
    file = write_trace(RoutingTrace("m", 4, 2, (0,), expert_ids=ids), tmp_path / "a.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["expert_ids"][key] = value
    if key == "shape":
        header["expert_ids"]["data_offsets"] = [0, 0]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(TraceError, match="expert_ids"):
        read_trace(file)


def test_a_written_trace_is_readable_as_the_umask_says(tmp_path):
    ids = np.array([[[0, 1]]], dtype=np.uint8)
    before = os.umask(0o022)
    try:
        file = write_trace(RoutingTrace("m", 4, 2, (0,), expert_ids=ids), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert file.stat().st_mode & 0o777 == 0o644
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]
