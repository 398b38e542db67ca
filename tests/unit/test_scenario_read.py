"""Scenario files: what is read, and where each mistake is reported."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import MoesimError, ScenarioError
from moesim.scenario import DEFAULT_SCENARIO, Scenario, load_scenario, parse_scenario, read_scenario

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"

GOOD = """\
model: mixtral-8x7b
cluster: {gpu: h200-sxm, nodes: 1}
layout:
  tp: 1
  ep: 8
workload:
  kind: decode
  batch_per_rank: 64
  context: 4096
"""


def test_reads_a_scenario():
    scenario = parse_scenario(GOOD).single()
    assert scenario.model == "mixtral-8x7b"
    assert scenario.cluster.clusters()[0].n_gpus == 8
    assert scenario.layout.ep is not None
    assert scenario.layout.ep.value == 8
    assert scenario.layout.dp is None
    assert scenario.objective == ("usd_per_mtok", 1)
    assert scenario.routing.kind == "synthetic"


@pytest.mark.parametrize(
    "path", [*sorted(SCENARIOS.glob("*.yaml")), DEFAULT_SCENARIO], ids=lambda path: path.stem
)
def test_shipped_scenarios_read_and_come_back_the_same(path):
    scenario = read_scenario(path)
    assert Scenario.model_validate(scenario.model_dump()) == scenario
    assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario


# old text -> new text, place, gist of the message
BAD = [
    ("model: mixtral", "modle: mixtral", "1:1", "'modle': unknown key; fix: did you mean model?"),
    ("model: mixtral-8x7b\n", "", "1:1", "model is missing; fix: add model: mixtral-8x7b"),
    ("model: mixtral-8x7b", "model: 8", "1:8", "8: should be a valid string"),
    ("model: mixtral-8x7b", "model:", "1:1", "nothing is given; fix: write model: mixtral-8x7b"),
    ("model: mixtral-8x7b", "model: ''", "1:8", "at least 1 character"),
    ("model: mixtral-8x7b", "model: nosuch/config.json", "1:8", "there is no such model file"),
    ("h200-sxm", "h2000", "2:16", "'h2000': unknown GPU; fix: did you mean h200?"),
    ("{gpu: h200-sxm, nodes: 1}", "dgx-h20", "2:10", "unknown cluster; fix: did you mean dgx-h200?"),
    ("{gpu: h200-sxm, nodes: 1}", "{gpu: l40s, node: 1}", "2:22", "fix: did you mean nodes?"),
    ("h200-sxm, nodes: 1", "rtx-4090, nodes: 2", "2:1", "2 nodes of rtx-4090 have no network"),
    ("nodes: 1", "nodes: 1, price: 2.80", "2:43", 'a price needs a unit; fix: write "2.8 USD/gpu-hour"'),
    ("nodes: 1", "nodes: 1, nic: 400 GB", "2:41", 'GB is a unit of size in bytes, and a data rate is due'),
    ("nodes: 1", "nodes: 1, nic_latency: 5", "2:49", 'write "5 ms"'),
    ("nodes: 1", "nodes: 0", "2:33", "0: is below 1; fix: write 1 or more"),
    ("nodes: 1", "nodes: many", "2:33", "neither a number nor a range"),
    ("nodes: 1", "nodes: [1, two]", "2:33", "'two': is not a whole number"),
    ("nodes: 1", "nodes: []", "2:33", "[]: is empty"),
    ("nodes: 1", "nodes: 16..1", "2:33", "ends before it starts; fix: write 1..16"),
    ("nodes: 1", "nodes: 1..16*1", "2:33", "never reaches its end"),
    ("nodes: 1", "nodes: 1..1000000", "2:33", "more than 4096 values"),
    ("nodes: 1", "nodes: {a: 1}", "2:26", "a mapping where a value is due"),
    ("tp: 1", "tpp: 1", "4:3", "'tpp': unknown key in layout; fix: did you mean tp?"),
    ("tp: 1", "tp: 1.5", "4:7", "1.5: is not a whole number; fix: write 2"),
    ("tp: 1", "tp: true", "4:7", "True: is not a whole number"),
    ("tp: 1", "tp: .nan", "4:7", "is not a whole number; fix: write a number"),
    ("tp: 1", "tp: 1\n  placement: epbl", "5:14", "'epbl': is unknown; fix: did you mean eplb?"),
    ("tp: 1\n", "tp: 1\n  tp: 2\n", "5:3", "'tp': the key is given twice"),
    ("tp: 1\n", "tp: 1\n\tpp: 2\n", "5:1", "fix: indent with spaces, not tabs"),
    ("tp: 1\n  ep: 8\n", "- 8\n", "4:3", "is not a mapping of keys to values"),
    ("kind: decode", "kind: decod", "7:9", "'decod': is unknown; fix: did you mean decode?"),
    ("  kind: decode\n", "", "6:1", "workload.kind is missing; fix: add kind: decode, prefill"),
    ("  context: 4096\n", "", "6:1", "workload.context is missing"),
    ("context: 4096", "contxt: 4096", "9:3", "'contxt': unknown key in workload; fix: did you mean context?"),
    ("kind: decode", "kind: serve\n  input: 8\n  output: 8\n  concurrency: 9", "12:3", "'context': unknown key"),
    ("batch_per_rank: 64", "batch_per_rank: 64 GB", "8:19", "neither a number nor a range"),
    ("layout:", "layout: {}\nfoo:", "4:1", "'foo': unknown key"),
    ("layout:\n", "layout:\n  etp: 1: 2\n", "4:9", "is not YAML"),
    ("layout:", "seed: -1\nlayout:", "3:7", "greater than or equal to 0"),
    ("layout:", "dtype: bf16\nlayout:", "3:8", "'bf16': is unknown; fix: did you mean bfloat16?"),
    ("layout:", "backend: [vllm]\nlayout:", "3:10", "is unknown"),
    ("layout:", "minimise: tpot\nmaximise: mfu\nlayout:", "1:1", "minimise and maximise are both given"),
    ("layout:", "subject_to: {tpot: 50}\nlayout:", "3:20", 'fix: write "<= 50 ms"'),
    ("layout:", "subject_to: {tpot: <= 50 GB}\nlayout:", "3:20", "GB is a unit of size in bytes, and a time"),
    ("layout:", "subject_to: {tpots: <= 50 ms}\nlayout:", "3:14", "subject_to; fix: did you mean tpot"),
    ("layout:", "subject_to:\n  step: >= 5 s\nlayout:", "4:10", "fix: put the value in quotes"),
    ("layout:", "routing: nosuch.safetensors\nlayout:", "3:10", "there is no such trace file"),
    ("layout:", "routing: {kind: trace}\nlayout:", "3:1", "a trace is due and none is given"),
    ("layout:", "routing: {kind: zipf, trace: x}\nlayout:", "3:1", "zipf takes no trace"),
    ("layout:", "routing: {exponent: 2.0}\nlayout:", "3:1", "takes no exponent; fix: write kind: zipf"),
    ("layout:", "policy: {capacity_factor: 0}\nlayout:", "3:27", "is not above 0 and finite"),
    ("layout:", "policy: {capacity_factor: yes}\nlayout:", "3:27", "neither a number nor"),
    ("layout:", "policy: {dispatch: 3}\nlayout:", "3:20", "3: is unknown"),
    ("layout:", "policy: *nowhere\nlayout:", "3:9", "is not YAML"),
    ("layout:", "1: 2\nlayout:", "3:4", "Keys should be strings"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "place", "gist"), BAD, ids=[f"{bad[1]!r:.40}" for bad in BAD])
def test_each_mistake_is_reported_at_its_place(old, new, place, gist):
    assert old in GOOD
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(GOOD.replace(old, new, 1), name="s.yaml")
    message = str(caught.value)
    assert caught.value.place == f"s.yaml:{place}", message
    assert gist in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "s.yaml:1:1: is empty; fix: write at least model, cluster and workload"),
        ("# nothing\n", "s.yaml:1:1: is empty; fix: write at least model, cluster and workload"),
        ("mixtral", "s.yaml:1:1: 'mixtral': is not a mapping of keys to values"),
        ("\n- 1\n- 2\n", "s.yaml:2:1: [1, 2]: is not a mapping of keys to values"),
        ("a: 2026-99-99\n", "s.yaml: holds a value that YAML cannot read: month must be in 1..12"),
        ("[" * 3000, "s.yaml: is nested too deep"),
        ("x: !!python/object:os.system 1", "s.yaml:1:4: is not YAML: could not determine a constructor"),
    ],
)
def test_texts_that_are_no_mapping(text, message):
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(text, name="s.yaml")
    assert str(caught.value).startswith(message)


def test_several_mistakes_are_counted():
    text = GOOD.replace("tp: 1", "tp: 0").replace("64", "0").replace("ep: 8", "epp: 8")
    with pytest.raises(ScenarioError, match=r"'epp': unknown key in layout.* \(and 2 more\)$"):
        parse_scenario(text)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "here.yaml").write_text(GOOD)
    with pytest.raises(
        ScenarioError, match=r"there.yaml: there is no such file; fix: its folder has here.yaml"
    ):
        read_scenario(tmp_path / "there.yaml")
    with pytest.raises(ScenarioError, match="no such file; fix: give the path"):
        read_scenario(tmp_path / "no" / "there.yaml")
    with pytest.raises(ScenarioError, match="is a folder"):
        read_scenario(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: x\n# caf\xe9\n")
    with pytest.raises(ScenarioError, match=r"latin.yaml:2:6: is not UTF-8 text"):
        read_scenario(tmp_path / "latin.yaml")


def test_files_are_found_beside_the_scenario(tmp_path):
    (tmp_path / "trace.npz").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    text = GOOD.replace("mixtral-8x7b", "config.json") + "routing: trace.npz\n"
    (tmp_path / "s.yaml").write_text(text)
    scenario = read_scenario(tmp_path / "s.yaml")
    assert scenario.routing.kind == "trace"
    assert scenario.routing.trace == str(tmp_path / "trace.npz")
    assert scenario.model == str(tmp_path / "config.json")


def test_names_that_are_no_files_pass_for_the_catalog_to_judge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixtral-8x7b").mkdir()
    assert (
        parse_scenario(GOOD + "routing: deepseek-v3-decode\n").scenario.routing.trace == "deepseek-v3-decode"
    )
    assert parse_scenario(GOOD).scenario.model == "mixtral-8x7b"


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        ("layout.ep=4", "layout.ep", (4,)),
        ("layout.ep=8,16,32", "layout.ep", (8, 16, 32)),
        ("layout.ep=[8, 16]", "layout.ep", (8, 16)),
        ("layout.pp=1..4", "layout.pp", (1, 2, 3, 4)),
        ("workload.batch_per_rank=1..512*2", "workload.batch_per_rank", tuple(2**n for n in range(10))),
        ("policy.capacity_factor=1.0:1.5:0.25", "policy.capacity_factor", (1.0, 1.25, 1.5)),
        ("policy.capacity_factor=none,1.25", "policy.capacity_factor", (None, 1.25)),
        ("policy.overlap=none,two-batch", "policy.overlap", ("none", "two-batch")),
        ("cluster.gpu=h100,h200", "cluster.gpu", ("h100", "h200")),
    ],
)
def test_overrides_replace_and_add(override, key, values):
    value = parse_scenario(GOOD, [override]).scenario
    for part in key.split("."):
        value = getattr(value, part)
    assert value.values == values


def test_overrides_reach_into_texts_that_stand_for_mappings():
    text = GOOD.replace("{gpu: h200-sxm, nodes: 1}", "dgx-h200") + "routing: zipf\n"
    scenario = parse_scenario(text, ["cluster.nodes=4", "routing.exponent=1.5"]).scenario
    assert scenario.cluster.clusters()[0].n_gpus == 32
    assert (scenario.routing.kind, scenario.routing.exponent) == ("zipf", 1.5)


def test_bounds_need_no_quotes_in_overrides():
    scenario = parse_scenario(GOOD, ["subject_to.tokens_per_s=>= 5000 tokens/s"]).scenario
    assert scenario.subject_to.bounds()["tokens_per_s"].value == 5000
    assert scenario.subject_to.bounds().keys() == {"tokens_per_s"}


@pytest.mark.parametrize(
    ("override", "gist"),
    [
        ("layout.ep", "an override is key.path=value"),
        ("=8", "an override is key.path=value"),
        ("layout..ep=8", "an override is key.path=value"),
        ("layout.ep={", "the value is not YAML"),
        ("layout.ep=eight", "neither a number nor a range"),
        ("layout.etpp=8", "'etpp': unknown key in layout; fix: did you mean etp?"),
        ("layuot.ep=8", "'layuot': unknown key; fix: did you mean layout?"),
        ("model.name=x", "model is a value and has no keys of its own"),
        ("layout=8", "is not a mapping"),
        ("workload={kind: decode}", "workload.batch_per_rank is missing"),
        ("routing.trace=nosuch.npz", "there is no such trace file"),
        ("cluster.price=2.80", 'fix: write "2.8 USD/gpu-hour"'),
    ],
)
def test_bad_overrides_are_reported_as_such(override, gist):
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(GOOD, [override], name="s.yaml")
    assert caught.value.place == f"--set {override}"
    assert gist in str(caught.value)


def test_the_last_override_wins_and_owns_the_mistake():
    scenario = parse_scenario(GOOD, ["layout.ep=2", "layout={ep: 4}", "layout.ep=1"]).scenario
    assert scenario.layout.model_dump(exclude_none=True) == {"ep": 1}
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(GOOD, ["layout.ep=0", "layout={ep: -4}"])
    assert caught.value.place == "--set layout={ep: -4}"


def test_a_run_refuses_open_keys_at_their_place():
    found = parse_scenario(GOOD.replace("ep: 8", "ep: [4, 8]"), name="s.yaml")
    assert found.scenario.open_keys() == ("layout.ep",)
    assert not found.scenario.is_single
    with pytest.raises(
        ScenarioError, match=r"^s.yaml:5:7: \[4, 8\]: layout.ep has 2 values and a run takes one"
    ):
        found.single()
    with pytest.raises(ScenarioError, match="several values where one is due"):
        found.scenario.layout.sizes(8, 8)


def test_later_errors_are_given_their_place():
    found = parse_scenario(GOOD, ["seed=3"], name="s.yaml")
    assert found.place("layout.ep") == "s.yaml:5:7"
    assert found.place("layout.pp") == "s.yaml:3:1"
    assert found.place("policy.overlap") == "s.yaml:1:1"
    assert found.place("seed") == "--set seed=3"
    assert found.located(ScenarioError("bad"), "model").place == "s.yaml:1:8"
    assert found.located(ScenarioError("bad", place="there"), "model").place == "there"


def test_places_name_the_file_as_it_was_given(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(GOOD)
    assert load_scenario(path).place("model") == f"{path}:1:8"


_PIECES = [
    *re.findall(r"\S+|\n *", GOOD),
    ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "<<: ", "!!", "|", ">", "'", '"', "\t", "#", "1..9", "<= 5 ms",
    "null", "1e999", ".nan", "?", "%", "---\n", "0x", "2026-01-99", "\ufeff", "routing: ", "policy: ",
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(_PIECES)),
        min_size=1,
        max_size=4,
    )
)
def test_any_mutation_gives_a_scenario_or_one_clear_line(edits):
    text = GOOD
    for at, cut, piece in edits:
        text = text[:at] + piece + text[at + cut :]
    try:
        found = parse_scenario(text, name="s.yaml")
    except MoesimError as error:
        assert (error.place or "").startswith("s.yaml")
        assert "\n" not in str(error)
    else:
        assert Scenario.model_validate(found.scenario.model_dump()) == found.scenario


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(["layout", "layout.ep", "cluster", "workload", "a.b"]), text=st.text(max_size=15))
def test_any_override_gives_a_scenario_or_one_clear_line(key, text):
    try:
        parse_scenario(GOOD, [f"{key}={text}"])
    except MoesimError as error:
        assert "\n" not in str(error)
