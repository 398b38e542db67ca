"""Files of other programs, catalog names, and what is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.model import load_model
from moesim.routing import (
    RoutingTrace,
    SyntheticRouting,
    catalog_names,
    catalog_routing,
    open_trace,
    read_npz,
    read_sglang_counts,
    write_trace,
)


def write_counts(path, counts, key="logical_count"):
    path.write_text(json.dumps({key: counts}))
    return path


def test_layers_without_counts_are_dense_and_dropped(tmp_path):
    file = write_counts(tmp_path / "decode_x.json", [[0, 0, 0], [1, 2, 3], [0, 0, 0], [3, 2, 1]])
    trace = read_sglang_counts(file, model="toy", top_k=2)
    assert trace.layer_ids == (1, 3)
    assert trace.phase == "decode"
    assert trace.counts.tolist() == [[1, 2, 3], [3, 2, 1]]
    assert trace.notes == ("2 layers without counts taken as dense and dropped",)


def test_steps_are_kept_apart(tmp_path):
    file = write_counts(tmp_path / "x.json", [[[1, 2]], [[5, 0]]])
    trace = read_sglang_counts(file)
    assert trace.expert_counts.tolist() == [[[1, 2]], [[5, 0]]]
    assert trace.counts.tolist() == [[6, 2]]


@pytest.mark.parametrize(("total", "warned"), [(1009, False), (1011, True)])
def test_unequal_layer_totals_are_noted_above_one_percent(tmp_path, total, warned):
    file = write_counts(tmp_path / "x.json", [[500, 500], [500, total - 500]])
    notes = " ".join(read_sglang_counts(file).notes)
    assert ("layer totals differ by 1.1%" in notes) is warned


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{not json", "is not JSON"),
        ('{"other": 1}', "states logical_count"),
        ('{"logical_count": [[1, 2], [3]]}', "states logical_count"),
        ('{"logical_count": [1, 2]}', r"is \(layers, experts\)"),
        ('{"logical_count": [[1, -2]]}', r"logical_count\[0\]\[1\]: -2.0: counts are whole numbers"),
        ('{"logical_count": [[1, 2.5]]}', "counts are whole numbers"),
        ('{"logical_count": [[1, NaN]]}', "counts are whole numbers"),
        ('{"logical_count": [[0, 0]]}', "at least one layer has tokens"),
    ],
)
def test_bad_count_files_are_refused(tmp_path, text, said):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(TraceError, match=said) as caught:
        open_trace(file)
    assert "bad.json" in str(caught.value)


def test_a_count_file_too_large_to_parse_whole_is_refused_unread(tmp_path):
    file = tmp_path / "all_steps.json"
    with file.open("wb") as stream:
        stream.write(b"{")
        stream.truncate(256 * 10**6 + 1)  # sparse: takes no space on the disk
    with pytest.raises(TraceError, match=r"all_steps.json: 256000001: a JSON file has at most 256 MB.*fix: "):
        open_trace(file)


def test_top_k_that_the_counts_cannot_have_is_refused(tmp_path):
    file = write_counts(tmp_path / "x.json", [[1, 2]])
    with pytest.raises(TraceError, match=r"x.json: top_k: 8: lies in 1..2"):
        read_sglang_counts(file, top_k=8)


@pytest.fixture
def ids():
    rng = np.random.default_rng(0)
    return np.argsort(rng.random((30, 2, 8)), axis=-1)[..., :3].astype(np.uint8)


def test_npz_is_read_token_by_token(tmp_path, ids):
    file = tmp_path / "t.npz"
    np.savez(file, expert_ids=ids, sequence_offsets=[0, 10, 30], layer_ids=[3, 4], n_experts=16)
    trace = open_trace(file)
    assert np.array_equal(trace.expert_ids, ids)
    assert trace.layer_ids == (3, 4)
    assert (trace.n_experts, trace.top_k) == (16, 3)
    assert trace.offsets.tolist() == [0, 10, 30]
    assert trace.notes == ()


def test_npz_without_experts_takes_the_models_or_says_so(tmp_path, ids):
    file = tmp_path / "t.npz"
    np.savez(file, expert_ids=ids)
    assert open_trace(file, n_experts=64).n_experts == 64
    assert read_npz(file).notes == ("n_experts taken as the largest id + 1 = 8",)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"other": np.zeros(3)}, "expert_ids are whole numbers"),
        ({"expert_ids": np.zeros((3, 2))}, "expert_ids are whole numbers"),
        ({"expert_ids": np.ones((3, 2, 2), np.uint8)}, "experts of one token are distinct"),
        ({"expert_ids": np.array([{"a": 1}], dtype=object)}, "nothing is unpickled"),
    ],
)
def test_bad_npz_is_refused(tmp_path, arrays, said):
    file = tmp_path / "t.npz"
    np.savez(file, **arrays)
    with pytest.raises(TraceError, match=said):
        open_trace(file)


@pytest.mark.parametrize("content", [b"PK\x03\x04 broken", b"nonsense"])
def test_broken_npz_is_refused(tmp_path, content):
    file = tmp_path / "t.npz"
    file.write_bytes(content)
    with pytest.raises(TraceError, match=r"is an .npz of plain arrays"):
        open_trace(file)


def test_npy_under_the_name_npz_is_refused(tmp_path):
    file = tmp_path / "t.npz"
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(TraceError, match=r"is an .npz"):
        open_trace(file)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran code from a pickle')",))


@pytest.mark.parametrize("name", ["x.pt", "x.pkl", "x.data", "x.npz", "x.safetensors", "x.json"])
def test_pickles_are_never_opened(tmp_path, name):
    file = tmp_path / name
    file.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(TraceError):
        open_trace(file)


def test_safetensors_is_recognised(tmp_path, ids):
    source = tmp_path / "t.npz"
    np.savez(source, expert_ids=ids)
    file = write_trace(open_trace(source), tmp_path / "t.safetensors")
    assert np.array_equal(open_trace(file).expert_ids, ids)


def test_unknown_name_gets_the_nearest_and_the_list():
    with pytest.raises(TraceError, match=r"did you mean deepseek-v3-decode\?.*gpt-oss-20b-decode"):
        open_trace("deepseek-v3-decod")


@pytest.mark.parametrize("name", catalog_names())
def test_every_catalog_entry_opens_and_says_where_it_is_from(name):
    source = open_trace(name)
    if isinstance(source, RoutingTrace):
        assert source.model == name
        assert len(source.source) > 10
        assert len(source.licence) > 10
        return
    assert isinstance(source, SyntheticRouting)
    assert source.name == name
    assert len(source.provenance) > 10


def test_the_recorded_trace_of_the_catalog_is_of_the_model_of_its_name():
    trace, model = catalog_routing("moesim-bytes"), load_model("moesim-bytes")
    assert isinstance(trace, RoutingTrace)
    assert isinstance(trace.expert_ids, np.memmap)
    assert (trace.n_layers, trace.n_experts, trace.top_k) == (
        model.n_layers,
        model.moe.n_experts,
        model.moe.top_k,
    )
    assert trace.sequence_domains is not None
    assert len(np.unique(trace.sequence_domains)) == len(trace.domains) == 8
    trace.check()
    assert (np.diff(trace.expert_weights, axis=-1) <= 0).all()  # by falling weight
    assert trace.expert_weights.sum(-1, dtype=float) == pytest.approx(1.0, abs=2e-3)


def test_unknown_catalog_name_is_refused():
    with pytest.raises(TraceError, match="no such routing in the catalog"):
        catalog_routing("nothing")


def test_generator_from_a_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("kind: zipf\nparameters: {zipf_exponent: 0.7, seed: 3}\nprovenance: a guess\n")
    source = open_trace(file)
    assert (source.name, source.kind, source.zipf_exponent, source.seed) == ("mine", "zipf", 0.7, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parameters: {log_sigmo: 1}", "'log_sigmo': unknown parameter; fix: one of log_sigma"),
        ("- a\n- b\n", "is not a routing description"),
        ("a: [", "is not a routing description"),
        ("kind: fractal", "unknown kind of synthetic routing"),
        ("parameters: {log_sigma: -1}", "routing.log_sigma: -1: is a finite number"),
        ("parameters: {log_skew: 0.9}", "routing.log_skew: 0.9: lies within"),
    ],
)
def test_bad_generator_files_are_refused(tmp_path, text, said):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(TraceError, match=said):
        open_trace(file)


def test_deepseek_counts_read_as_published(shared_data):
    trace = read_sglang_counts(shared_data / "routing/deepseek_v3_sglang/decode_in1000out1000.json", top_k=8)
    assert trace.layer_ids == tuple(range(3, 61))
    assert trace.n_tokens == 147308544 // 8
    busiest = trace.counts.max(-1) / trace.counts.mean(-1)
    assert np.median(busiest) == pytest.approx(5.2025, abs=1e-3)  # shared STATS.json


def test_gpt_oss_tokens_read_as_published(shared_data):
    trace = read_npz(shared_data / "routing/gpt_oss_20b/tokens.npz", n_experts=32)
    assert (trace.n_tokens, trace.n_layers, trace.top_k) == (106359, 24, 4)
    assert trace.offsets.size == 353
