"""Bad inputs through the real command: exit code 2 and one line that says where, what and how to mend it."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]

GOOD = """\
model: mixtral-8x7b
cluster: {gpu: h100-sxm, nodes: 1, gpus_per_node: 8}
layout: {tp: 8, ep: 8}
workload: {kind: decode, batch_per_rank: 16, context: 1000}
"""

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True)
class Told:
    code: int
    out: str
    err: str


@pytest.fixture
def moesim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Told]:
    """Run the command in an empty folder with a good scenario, `good.yaml`, in it."""
    (tmp_path / "good.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["moesim", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        told = capsys.readouterr()
        return Told(code, told.out, told.err)

    return call


def write(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "bad.yaml").write_text(text) and None


def changed(old: str, new: str) -> Callable[[Path], None]:
    if old not in GOOD:
        raise ValueError(old)
    return write(GOOD.replace(old, new))


def config(text: str | None = None, **keys: object) -> Callable[[Path], None]:
    kept = {key: value for key, value in (MIXTRAL | keys).items() if value is not None}
    return lambda folder: (folder / "config.json").write_text(text or json.dumps(kept)) and None


def counts_json(n_experts: int = 8, n_layers: int = 32, low: int = 1) -> Callable[[Path], None]:
    counts = np.full((n_layers, n_experts), 100)
    counts[0, 0] = low
    text = json.dumps({"logical_count": counts.tolist()})
    return lambda folder: (folder / "trace.json").write_text(text) and None


def npz(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.savez(folder / "trace.npz", **arrays)


def raw(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def nothing(folder: Path) -> None:
    pass


def folder_named_yaml(folder: Path) -> None:
    (folder / "bad.yaml").mkdir()


def pickled() -> bytes:
    kept = io.BytesIO()
    pickle.dump({"expert_ids": [1, 2, 3]}, kept)
    return kept.getvalue()


RUN = ("run", "bad.yaml")
GOOD_RUN = ("run", "good.yaml")
IMPORT = ("trace", "import")

SCENARIOS = {
    "unknown key": (changed("model:", "modle:"), RUN, "bad.yaml:1:1:", "did you mean model"),
    "unknown key of a part": (changed("tp: 8", "tpp: 8"), RUN, "bad.yaml:3:10:", "did you mean tp"),
    "unit missing": (write(GOOD + "subject_to: {tpot: <= 30}\n"), ("plan", "bad.yaml"), "bad.yaml:5:", "ms"),
    "wrong unit": (
        changed("gpus_per_node: 8", "gpus_per_node: 8, nic: 400 GB"),
        RUN,
        "bad.yaml:2:",
        "GB/s",
    ),
    "price without a currency": (
        changed("gpus_per_node: 8", "gpus_per_node: 8, price: 2.8"),
        RUN,
        "bad.yaml:2:",
        "USD/gpu-hour",
    ),
    "bad YAML": (write(GOOD + "layout: [1, 2\n"), RUN, "bad.yaml:", "is not YAML"),
    "tab": (write(GOOD + "policy:\n\toverlap: none\n"), RUN, "bad.yaml:6:1:", "spaces, not tabs"),
    "duplicate key": (write(GOOD + "model: mixtral-8x22b\n"), RUN, "bad.yaml:5:1:", "twice"),
    "missing file": (nothing, RUN, "bad.yaml:", "good.yaml"),
    "folder": (folder_named_yaml, RUN, "bad.yaml:", "folder"),
    "empty": (write("# nothing yet\n"), RUN, "bad.yaml:1:1:", "empty"),
    "a list": (write("- model: mixtral-8x7b\n"), RUN, "bad.yaml:1:1:", "mapping"),
    "not text": (raw("bad.yaml", b"model: \xff\xfe\n"), RUN, "bad.yaml:1:8:", "UTF-8"),
    "several values in a run": (
        changed("context: 1000", "context: [1000, 2000]"),
        RUN,
        "bad.yaml:4:",
        "context",
    ),
    "workload kind": (changed("decode", "decoding"), RUN, "bad.yaml:4:", "did you mean decode"),
    "workload key missing": (
        changed(", context: 1000", ""),
        RUN,
        "bad.yaml:4:",
        "workload.context is missing",
    ),
    "batch below one": (changed("batch_per_rank: 16", "batch_per_rank: 0"), RUN, "bad.yaml:4:", "below 1"),
    "two objectives": (
        write(GOOD + "minimise: tpot\nmaximise: mfu\n"),
        ("plan", "bad.yaml"),
        "bad.yaml",
        "keep one",
    ),
    "unknown GPU": (changed("h100-sxm", "h100-smx"), RUN, "bad.yaml:2:", "did you mean h100-sxm"),
    "unknown model": (changed("mixtral-8x7b", "mixtral-8x7"), RUN, "bad.yaml:1:8:", "mixtral-8x7b"),
}

CONFIGS = {
    "truncated": (config(json.dumps(MIXTRAL)[:-20]), "config.json", "JSON"),
    "unknown architecture": (
        config(architectures=["FancyMoeForCausalLM"], model_type="fancy_moe"),
        "config.json",
        "'fancy_moe': unknown architecture",
    ),
    "missing key": (config(num_key_value_heads=None, hidden_size=None), "config.json", "hidden_size"),
    "top_k above experts": (config(num_experts_per_tok=9), "config.json", "top_k=9 experts of only 8"),
    "a list": (config("[1, 2]"), "config.json", "an object"),
    "text for a number": (config(hidden_size="large"), "config.json", "hidden_size"),
    "heads do not divide": (config(num_key_value_heads=7), "config.json", "7 key-value heads"),
}

TRACES = {
    "missing": (nothing, ("--set", "routing.trace=none-such.safetensors"), "none-such.safetensors"),
    "unknown name": (nothing, ("--set", "routing.trace=deepseek-v3-decod"), "deepseek-v3-decode"),
    "other number of experts": (counts_json(n_experts=64), ("--set", "routing.trace=trace.json"), "64"),
    "pickle": (raw("trace.pt", pickled()), ("--set", "routing.trace=trace.pt"), "trace.pt"),
    "truncated safetensors": (
        raw("trace.safetensors", b"\x80\x00\x00\x00\x00\x00\x00\x00{\"expert_counts\""),
        ("--set", "routing.trace=trace.safetensors"),
        "trace.safetensors",
    ),
    "object array": (
        npz(expert_ids=np.array([[1], [2, 3]], dtype=object)),
        ("--set", "routing.trace=trace.npz"),
        "trace.npz",
    ),
    "counts negative": (counts_json(low=-5), ("--set", "routing.trace=trace.json"), "-5"),
}  # fmt: skip

LAYOUTS = {
    "ep does not divide": (
        ("--set", "layout.ep=3"),
        "'ep=3 etp=1': ep x etp must divide tp x dp = 8; fix: try ep=8",
    ),
    "tp does not divide heads": (("--set", "layout={tp: 24}", "--set", "cluster.nodes=3"), "tp=24"),
    "pp above layers": (
        ("--set", "layout={pp: 64, tp: 1}", "--set", "cluster.nodes=8"),
        "32 layers make no 64 stages",
    ),
    "redundant experts do not divide": (("--set", "layout.redundant_experts=3"), "try redundant_experts=8"),
    "more GPUs than there are": (("--set", "layout={tp: 8, dp: 4}"), "takes 32 GPUs"),
    "experts of a dense model": (("--set", "model=llama-3.1-8b"), "dense"),
    "missing placement file": (
        ("--set", "layout.placement=none-such.json"),
        "'none-such.json': there is no such placement file",
    ),
    "width of experts": (
        ("--set", "layout={tp: 8, ep: 1, etp: 6, dp: 3}", "--set", "cluster.nodes=3"),
        "etp",
    ),
}

OVERRIDES = {
    "unknown key": ("layout.redundant=8", "did you mean redundant_experts"),
    "unknown part": ("clutser.nodes=2", "did you mean cluster"),
    "bad value": ("cluster.nodes=two", "cluster.nodes=two"),
    "no equals sign": ("layout.ep", "write layout.ep=8"),
    "nothing before the equals sign": ("=8", "key.path=value"),
    "not YAML": ("layout.ep=[8", "not YAML"),
    "a value with keys of its own": ("model.name=x", "has no keys of its own"),
}

OTHERS = {
    "report's folder": ((*GOOD_RUN, "--report", "none-such/page.html"), "--report"),
    "plan's report's folder": (("plan", "good.yaml", "--report", "none-such/page.html"), "--report"),
    "timeline's folder": ((*GOOD_RUN, "--timeline", "none-such/t.json"), "--timeline"),
    "report onto a folder": ((*GOOD_RUN, "--report", "."), "--report"),
    "timeline onto a folder": ((*GOOD_RUN, "--timeline", "."), "--timeline"),
    "unknown option": ((*GOOD_RUN, "--jsn"), "--jsn"),
    "unknown command": (("pln", "good.yaml"), "pln"),
    "no scenario": (("run",), "SCENARIO"),
    "number of layouts": (("plan", "good.yaml", "--top", "many"), "--top"),
    "unknown catalog part": (("list", "model"), "models"),
    "trace of a scenario": ((*GOOD_RUN, "--set", "routing.trace=good.yaml"), "not a routing description"),
    "trace import of nothing": ((*IMPORT, "none.json", "-o", "t.safetensors"), "none.json"),
    "trace import to another format": ((*IMPORT, "good.yaml", "-o", "t.npz"), "t.npz"),
    "trace import of a scenario": ((*IMPORT, "good.yaml", "-o", "t.safetensors"), "good.yaml"),
    "trace import format": (
        (*IMPORT, "good.yaml", "-o", "t.safetensors", "--format", "vllm"),
        "--format",
    ),
    "trace show of a dense model": (
        ("trace", "show", "default", "--model", "llama-3.1-8b"),
        "llama-3.1-8b",
    ),
}


def check(told: Told, folder: Path, before: set[Path], *named: str) -> None:
    assert told.code == 2, told
    assert told.out == ""
    assert told.err.startswith("moesim: ")
    assert told.err.endswith("\n")
    assert len(told.err.splitlines()) == 1, told.err
    assert "Traceback" not in told.err
    for name in named:
        assert name in told.err
    assert set(folder.rglob("*")) == before, "something was written"


@pytest.mark.parametrize(("make", "arguments", "place", "said"), SCENARIOS.values(), ids=SCENARIOS)
def test_scenario(
    moesim: Callable[..., Told],
    tmp_path: Path,
    make: Callable[[Path], None],
    arguments: tuple[str, ...],
    place: str,
    said: str,
) -> None:
    make(tmp_path)
    before = set(tmp_path.rglob("*"))
    told = moesim(*arguments)
    check(told, tmp_path, before, said)
    assert told.err.startswith(f"moesim: {place}")


@pytest.mark.parametrize(("make", "place", "said"), CONFIGS.values(), ids=CONFIGS)
def test_config_json(
    moesim: Callable[..., Told], tmp_path: Path, make: Callable[[Path], None], place: str, said: str
) -> None:
    make(tmp_path)
    before = set(tmp_path.rglob("*"))
    check(moesim(*GOOD_RUN, "--set", "model=config.json"), tmp_path, before, place, said)


@pytest.mark.parametrize(("make", "arguments", "said"), TRACES.values(), ids=TRACES)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_trace(
    moesim: Callable[..., Told],
    tmp_path: Path,
    command: str,
    make: Callable[[Path], None],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    make(tmp_path)
    before = set(tmp_path.rglob("*"))
    check(moesim(command, "good.yaml", *arguments), tmp_path, before, said)


@pytest.mark.parametrize(("arguments", "said"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout(moesim: Callable[..., Told], tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    before = set(tmp_path.rglob("*"))
    told = moesim(*GOOD_RUN, *arguments)
    check(told, tmp_path, before, said)
    assert told.err.startswith(("moesim: good.yaml:3:", "moesim: --set layout"))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([0, 1, 2, 3, 4, 5, 6], "7"),
        ([0, 1, 2, 3, 4, 5, 6, 6], "7: every expert has a slot"),
        ([0, 1, 2, 3, 4, 5, 6, 9], "9: experts in a placement lie in 0..7"),
        ([*range(8), *range(8)], "has 16 slots a layer and the layout 8; fix: write redundant_experts: 8"),
        ([[*range(8)]] * 5, "has 5 rows and the model 32 MoE layers"),
        ("none", "physical_to_logical_map is whole numbers"),
    ],
    ids=["too few", "one absent", "out of range", "redundant", "layers", "no map"],
)
def test_a_wrong_placement_map(moesim: Callable[..., Told], tmp_path: Path, table: object, said: str) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical_map": table}))
    before = set(tmp_path.rglob("*"))
    told = moesim(*GOOD_RUN, "--set", "layout.placement=map.json")
    check(told, tmp_path, before, said)
    assert told.err.startswith("moesim: map.json: ")


def test_a_missing_placement_is_told_at_its_place(moesim: Callable[..., Told], tmp_path: Path) -> None:
    changed("ep: 8}", "ep: 8, placement: map.yml}")(tmp_path)
    before = set(tmp_path.rglob("*"))
    told = moesim(*RUN)
    check(told, tmp_path, before, "'map.yml': there is no such placement file; fix: give a path")
    assert told.err.startswith("moesim: bad.yaml:3:35:")


@pytest.mark.parametrize(
    ("layout", "dispatch"), [("{tp: 8, ep: 8}", "low-latency"), ("{tp: 1, ep: 8}", "allreduce")]
)
def test_a_dispatch_that_the_layout_cannot_have(
    moesim: Callable[..., Told], tmp_path: Path, layout: str, dispatch: str
) -> None:
    changed("{tp: 8, ep: 8}", f"{layout}\npolicy: {{dispatch: {dispatch}}}")(tmp_path)
    before = set(tmp_path.rglob("*"))
    told = moesim(*RUN)
    check(told, tmp_path, before, f"'{dispatch}': ", "fix: write dispatch: auto")
    assert told.err.startswith("moesim: bad.yaml:4:20:")


@pytest.mark.parametrize("key", ["policy.overflow=drop", "policy.dispatch=none", "policy.router=expert"])
def test_words_that_say_nothing_are_refused(moesim: Callable[..., Told], tmp_path: Path, key: str) -> None:
    before = set(tmp_path.rglob("*"))
    check(moesim(*GOOD_RUN, "--set", key), tmp_path, before, f"--set {key}: ")


@pytest.mark.parametrize(("override", "said"), OVERRIDES.values(), ids=OVERRIDES)
def test_override(moesim: Callable[..., Told], tmp_path: Path, override: str, said: str) -> None:
    before = set(tmp_path.rglob("*"))
    told = moesim(*GOOD_RUN, "--set", override)
    check(told, tmp_path, before, said)
    assert told.err.startswith(f"moesim: --set {override}: ")


@pytest.mark.parametrize(("arguments", "said"), OTHERS.values(), ids=OTHERS)
def test_command_line(
    moesim: Callable[..., Told], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    before = set(tmp_path.rglob("*"))
    check(moesim(*arguments), tmp_path, before, said)


def test_explain_of_what_does_not_fit(moesim: Callable[..., Told], tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    told = moesim("explain", "good.yaml", "--set", "workload.batch_per_rank=100000")
    check(told, tmp_path, before, "good.yaml:3:1:", "GB")


@pytest.mark.parametrize(
    "arguments",
    [("run", "none.yaml"), (*GOOD_RUN, "--set", "layout.ep=3"), ("list", "nothing")],
    ids=["missing file", "layout", "catalog"],
)
def test_as_a_process(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    before = set(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from moesim.cli import main; main()", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    check(Told(done.returncode, done.stdout, done.stderr), tmp_path, before)


def test_the_scenario_they_are_made_from_is_good(moesim: Callable[..., Told], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    counts_json()(tmp_path)
    told = moesim(*GOOD_RUN, "--set", "model=config.json", "--set", "routing.trace=trace.json", "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["feasible"] is True
