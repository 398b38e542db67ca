"""The commands on good input: what they print, the keys of their JSON, the files they write."""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli import main, show

WORKLOADS = {
    "decode": "{kind: decode, batch_per_rank: 16, context: 1000}",
    "prefill": "{kind: prefill, tokens_per_rank: 4096, prompt: 2048}",
    "serve": "{kind: serve, input: 1000, output: 100, batch_per_rank: 16}",
    "train": "{kind: train, global_batch: 16, sequence: 1024}",
}
KEYS = {
    "feasible", "why_not", "memory_bytes", "step_s", "tokens_per_s", "tokens_per_s_per_gpu", "ttft_s", "tpot_s",
    "mfu", "usd_per_mtok", "breakdown_s", "imbalance", "band",
}  # fmt: skip
HAS_NO = {"decode": {"ttft_s"}, "prefill": {"tpot_s"}, "serve": set(), "train": {"ttft_s", "tpot_s"}}
PLAN = ("plan", "--set", "cluster.nodes=1", "--set", "workload.batch_per_rank=16,32", "--engine", "1")


@pytest.fixture
def moesim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command in an empty folder; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["moesim", *arguments])
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(capsys.readouterr().err) from stop
        told = capsys.readouterr()
        assert told.err == ""
        return told.out

    return call


def scenario(folder: Path, workload: str, model: str = "olmoe-1b-7b", more: str = "") -> str:
    path = folder / "asked.yaml"
    cluster = "{gpu: h200-sxm, nodes: 1, gpus_per_node: 4}"
    path.write_text(f"model: {model}\ncluster: {cluster}\nworkload: {WORKLOADS[workload]}\n{more}")
    return str(path)


def test_plan_of_the_embedded_default(moesim: Callable[..., str], tmp_path: Path) -> None:
    told = json.loads(moesim(*PLAN, "--json"))
    assert {"layouts", "ruled_out", "n_evaluated", "elapsed_s"} <= set(told)
    assert told["n_evaluated"] > len(told["layouts"]) > 0
    first = told["layouts"][0]
    assert set(first) >= KEYS
    assert first["feasible"] is True
    assert first["engine"]["step_s"] == pytest.approx(first["step_s"], rel=0.02)
    assert [row["rank"] for row in told["layouts"]] == list(range(1, len(told["layouts"]) + 1))
    assert all({"layout", "kind", "reason"} <= set(row) for row in told["ruled_out"])
    assert list(tmp_path.iterdir()) == []  # JSON for a program: no page unasked


def test_plan_for_people_writes_a_page(moesim: Callable[..., str], tmp_path: Path) -> None:
    text = moesim(*PLAN, "--top", "2")
    page = tmp_path / "moesim-plan.html"
    assert "Report: moesim-plan.html" in text
    assert "qwen3-235b-a22b" in text
    assert "points of" in text
    ranks = re.findall(r"^ +(\d+)   TP", text, flags=re.MULTILINE)
    assert ranks == ["1", "2"]
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    assert 'src="http' not in html
    assert list(tmp_path.iterdir()) == [page]


def test_plan_without_a_page(moesim: Callable[..., str], tmp_path: Path) -> None:
    assert "Report" not in moesim(*PLAN, "--report", "none", "--engine", "0")
    assert list(tmp_path.iterdir()) == []


def test_plan_where_nothing_fits(moesim: Callable[..., str]) -> None:
    text = moesim(*PLAN, "--set", "subject_to.tpot=<= 1 us", "--report", "none")
    assert "No layout fits the scenario." in text
    assert "not <= 1 us" in " ".join(text.split())


@pytest.mark.parametrize("kind", WORKLOADS)
def test_run_says_every_figure(moesim: Callable[..., str], tmp_path: Path, kind: str) -> None:
    told = json.loads(moesim("run", scenario(tmp_path, kind), "--json"))
    assert set(told) >= KEYS
    assert told["feasible"] is True
    assert told["why_not"] is None
    numbers = KEYS - {"feasible", "why_not", "memory_bytes", "breakdown_s", "band"}
    assert {key for key in numbers if told[key] is None} == HAS_NO[kind]
    assert all(told[key] > 0 for key in numbers - HAS_NO[kind])
    memory = told["memory_bytes"]
    items = sum(size for name, size in memory.items() if name not in ("total", "capacity"))
    assert items == pytest.approx(memory["total"])
    assert memory["total"] < memory["capacity"] == 141e9
    assert told["tokens_per_s_per_gpu"] == pytest.approx(told["tokens_per_s"] / 4)
    assert told["usd_per_mtok"] == pytest.approx(
        told["cluster"]["usd_per_gpu_hour"] * 4 / 3600 / told["tokens_per_s"] * 1e6
    )
    assert told["band"]["low"] < told[told["band"]["of"]] < told["band"]["high"]
    assert 0 < told["mfu"] < 1
    assert told["imbalance"] >= 1


@pytest.mark.parametrize("kind", WORKLOADS)
def test_breakdown_adds_up_to_the_step(moesim: Callable[..., str], tmp_path: Path, kind: str) -> None:
    told = json.loads(moesim("run", scenario(tmp_path, kind), "--json"))
    assert sum(told["breakdown_s"].values()) == pytest.approx(told["engine"]["step_s"], rel=1e-6)
    assert told["engine"]["step_s"] == pytest.approx(told["step_s"], rel=0.02)
    assert min(told["breakdown_s"].values()) >= 0


@pytest.mark.parametrize("kind", WORKLOADS)
def test_run_of_what_does_not_fit(moesim: Callable[..., str], tmp_path: Path, kind: str) -> None:
    path = scenario(tmp_path, kind, model="deepseek-v3")
    told = json.loads(moesim("run", path, "--json", "--report", "page.html", "--timeline", "t.json"))
    assert set(told) >= KEYS
    assert told["feasible"] is False
    need, have = told["memory_bytes"]["total"], told["memory_bytes"]["capacity"]
    assert need > have
    assert f"{need / 1e9:.1f} GB" in told["why_not"]
    assert f"{have / 1e9:.1f} GB" in told["why_not"]
    assert not (tmp_path / "t.json").exists()  # nothing was played
    assert told["why_not"] in (tmp_path / "page.html").read_text()
    assert all(told[key] is None for key in ("step_s", "tokens_per_s", "usd_per_mtok", "breakdown_s"))
    text = " ".join(moesim("run", path).split())
    assert told["why_not"] in text


def test_run_for_people(moesim: Callable[..., str], tmp_path: Path) -> None:
    told = json.loads(moesim("run", scenario(tmp_path, "serve"), "--json"))
    text = moesim("run", scenario(tmp_path, "serve"))
    assert f"{told['tpot_s'] * 1e3:.3g} ms" in text
    assert "of 141 GB" in text
    assert "routed experts" in text


@pytest.mark.parametrize("name", ["step.json", "step.json.gz"])
def test_timeline_is_a_chrome_trace(moesim: Callable[..., str], tmp_path: Path, name: str) -> None:
    told = json.loads(moesim("run", scenario(tmp_path, "decode"), "--json", "--timeline", name))
    assert told["timeline"] == name
    raw = (tmp_path / name).read_bytes()
    events = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert all(span["dur"] >= 0 and span["ts"] >= 0 for span in spans)
    assert max(span["ts"] + span["dur"] for span in spans) == pytest.approx(
        told["engine"]["step_s"] * 1e6, rel=1e-6
    )
    assert any("attention" in span["name"] for span in spans)


def test_run_writes_a_page_where_asked(moesim: Callable[..., str], tmp_path: Path) -> None:
    text = moesim("run", scenario(tmp_path, "decode"), "--report", "page.html")
    assert "Report: page.html" in text
    assert "olmoe-1b-7b" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("kind", WORKLOADS)
def test_explain_has_a_source_for_every_term(moesim: Callable[..., str], tmp_path: Path, kind: str) -> None:
    told = json.loads(moesim("explain", scenario(tmp_path, kind), "--json"))
    assert told["passes"]
    for step in told["passes"]:
        assert step["terms"]
        if kind != "train":
            assert sum(term["share"] for term in step["terms"]) == pytest.approx(1)
        for term in step["terms"]:
            assert term["formula"]
            if term["name"] in ("wait", "pipeline_bubble"):  # no operator, so nothing prices them
                continue
            assert term["inputs"]
            assert term["families"]
            assert set(term["families"]) <= set(told["families"])
    if kind == "train":  # one step, of which all terms are a part
        assert sum(term["share"] for one in told["passes"] for term in one["terms"]) == pytest.approx(1)
    for name, family in told["families"].items():
        assert family["provenance"]["kind"] in ("measured", "fitted", "datasheet", "assumed", "carried-over")
        assert len(family["provenance"]["data"]) > 10, name
        assert family["parameters"]
        assert all(one["meaning"] for one in family["parameters"].values())
    assert told["memory_bytes"]["total"] > 0
    assert told["gpu_sources"]


def test_explain_leaves_small_terms_out(moesim: Callable[..., str], tmp_path: Path) -> None:
    path = scenario(tmp_path, "decode")
    short, long = moesim("explain", path), moesim("explain", path, "--all")
    assert len(short.splitlines()) < len(long.splitlines())
    for part in ("Parameters", "held-out", "Memory of the fullest rank", "Datasheet"):
        assert part in short


def test_a_device_never_measured_is_marked(moesim: Callable[..., str], tmp_path: Path) -> None:
    path = scenario(tmp_path, "decode")
    known = json.loads(moesim("run", path, "--json"))
    carried = json.loads(moesim("run", path, "--json", "--set", "cluster.gpu=b200-sxm"))
    assert known["calibrated"] is True
    assert carried["calibrated"] is False

    def width(told: dict[str, Any]) -> float:
        return float((told["band"]["high"] - told["band"]["low"]) / told["tpot_s"])

    assert width(carried) > width(known)
    assert "uncalibrated" in moesim("explain", path, "--set", "cluster.gpu=b200-sxm")


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("models", "deepseek-v3"),
        ("gpus", "h200-sxm"),
        ("clusters", "nvl72"),
        ("scenarios", "default"),
        ("routing", "deepseek-v3-decode"),
    ],
)
def test_list(moesim: Callable[..., str], what: str, name: str) -> None:
    rows = json.loads(moesim("list", what, "--json"))[what]
    assert name in [row["name"] for row in rows]
    assert name in moesim("list", what)


def test_list_has_figures(moesim: Callable[..., str]) -> None:
    models = {row["name"]: row for row in json.loads(moesim("list", "models", "--json"))["models"]}
    assert models["mixtral-8x7b"]["total"] == pytest.approx(46.7e9, rel=0.01)
    assert models["mixtral-8x7b"]["active"] == pytest.approx(12.9e9, rel=0.01)
    assert all(row["source"].startswith("http") for name, row in models.items() if name != "moesim-bytes")
    assert models["moesim-bytes"]["source"].startswith("trained by")


def test_schema_names_every_key(moesim: Callable[..., str]) -> None:
    schema = json.loads(moesim("schema"))
    assert {"model", "cluster", "layout", "workload", "routing", "policy", "subject_to"} <= set(
        schema["properties"]
    )
    assert set(schema["required"]) == {"model", "cluster", "workload"}
    assert schema["additionalProperties"] is False


def test_help_names_the_commands(moesim: Callable[..., str]) -> None:
    text = moesim("--help")
    assert all(name in text for name in ("plan", "run", "explain", "list", "trace", "schema"))


@pytest.mark.parametrize("arguments", [(), ("trace",)])
def test_no_command_at_all_shows_the_help(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moesim", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("Usage: moesim")
    assert len(told.splitlines()) > 5


def counts(folder: Path) -> str:
    rng = np.random.default_rng(1)
    table = rng.integers(1, 1000, (16, 64))
    path = folder / "expert_distribution.json"
    path.write_text(json.dumps({"logical_count": table.tolist()}))
    return str(path)


def token_level(folder: Path) -> str:
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((120, 16, 64)), axis=-1)[..., :8].astype(np.int16)
    path = folder / "tokens.npz"
    np.savez(path, expert_ids=ids, sequence_offsets=np.array([0, 60, 120]))
    return str(path)


def test_trace_of_counts(moesim: Callable[..., str], tmp_path: Path) -> None:
    source = counts(tmp_path)
    told = json.loads(
        moesim("trace", "import", source, "-o", "t.safetensors", "--model", "olmoe-1b-7b", "--json")
    )
    assert (told["model"], told["n_experts"], told["top_k"], told["n_layers"]) == ("olmoe-1b-7b", 64, 8, 16)
    assert told["token_level"] is False
    shown = json.loads(moesim("trace", "show", "t.safetensors", "--json"))
    assert shown["n_experts"] == 64
    assert shown["busiest_over_mean"]["median"] > 1.5
    text = moesim("trace", "show", "t.safetensors")
    assert "busiest expert over mean" in text
    assert "Share of experts with a token" in text


def test_trace_of_tokens(moesim: Callable[..., str], tmp_path: Path) -> None:
    source = token_level(tmp_path)
    text = moesim("trace", "import", source, "-o", "t.safetensors", "--model", "olmoe-1b-7b")
    assert "16 layers x 64 experts, 120 tokens" in text
    assert "Locality" in moesim("trace", "show", "t.safetensors")


@pytest.mark.parametrize("kind", ["sglang", "npz"])
def test_trace_import_with_a_given_format(moesim: Callable[..., str], tmp_path: Path, kind: str) -> None:
    source = counts(tmp_path) if kind == "sglang" else token_level(tmp_path)
    told = json.loads(
        moesim("trace", "import", source, "-o", f"{kind}.safetensors", "--format", kind, "--json")
    )
    assert told["n_experts"] == 64
    assert (tmp_path / f"{kind}.safetensors").is_file()


def test_an_imported_trace_changes_a_run(moesim: Callable[..., str], tmp_path: Path) -> None:
    skewed = np.ones((16, 64), dtype=int)
    skewed[:, :16] = 50  # the first rank of four holds the popular experts
    (tmp_path / "skewed.json").write_text(json.dumps({"logical_count": skewed.tolist()}))
    moesim("trace", "import", "skewed.json", "-o", "t.safetensors", "--model", "olmoe-1b-7b")
    path = scenario(tmp_path, "decode")
    real = json.loads(moesim("run", path, "--json", "--set", "routing.trace=t.safetensors"))
    even = json.loads(moesim("run", path, "--json", "--set", "routing=uniform"))
    # 16 of 64 experts draw 50 / 50.94 of the choices, but a token can choose each only once: 8 of those 16
    assert real["imbalance"] > 3
    assert real["imbalance"] > 2 * even["imbalance"]
    assert real["step_s"] > even["step_s"]


@pytest.mark.parametrize("name", ["map.json", "map.yaml"])
def test_a_given_placement_changes_a_run(moesim: Callable[..., str], tmp_path: Path, name: str) -> None:
    skewed = np.ones((16, 64), dtype=int)
    skewed[:, :16] = 50  # the first rank of four holds the popular experts
    (tmp_path / "skewed.json").write_text(json.dumps({"logical_count": skewed.tolist()}))
    dealt = np.arange(64).reshape(16, 4).T.ravel()  # dealt out like cards, sixteen slots a rank
    (tmp_path / name).write_text(json.dumps({"physical_to_logical_map": np.tile(dealt, (16, 1)).tolist()}))
    path = scenario(tmp_path, "decode", more=f"routing: skewed.json\nlayout: {{placement: {name}}}\n")
    told = json.loads(moesim("run", path, "--json"))
    assert told["layout"]["placement"].endswith(name)
    assert told["imbalance"] < 1.3
    contiguous = json.loads(moesim("run", path, "--json", "--set", "layout.placement=contiguous"))
    assert contiguous["imbalance"] > 3
    assert name in moesim("run", path)


def test_a_map_with_redundant_experts(moesim: Callable[..., str], tmp_path: Path) -> None:
    slots = [expert for rank in range(4) for expert in (*range(16 * rank, 16 * rank + 16), 60 - 16 * rank)]
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical_map": slots}))
    path = scenario(tmp_path, "decode", more="layout: {placement: map.json, redundant_experts: 4}\n")
    assert json.loads(moesim("run", path, "--json"))["feasible"] is True


def test_trace_show_of_a_generator(moesim: Callable[..., str]) -> None:
    told = json.loads(moesim("trace", "show", "deepseek-v3-decode", "--model", "deepseek-v3", "--json"))
    assert told["n_experts"] == 256
    assert told["busiest_over_mean"]["median"] > 2


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_seed_decides_the_draws(moesim: Callable[..., str], tmp_path: Path, command: str) -> None:
    path = scenario(tmp_path, "decode")

    def told(seed: int) -> dict[str, Any]:
        found = json.loads(moesim(command, path, "--json", "--set", f"seed={seed}"))
        for key in ("elapsed_s", "cpu_s", "points_per_cpu_s"):
            found.pop(key, None)
        return dict(found)

    def imbalances(found: dict[str, Any]) -> list[float]:
        rows = found["layouts"] if command == "plan" else [found]
        return [row["imbalance"] for row in rows if row["layout"]["ep"] == 4]

    first = told(1)
    assert told(1) == first
    assert imbalances(told(2)) != imbalances(first)


def stopped_by(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit code of a command that meets an error."""

    def meet(what: str) -> list[dict[str, Any]]:
        raise error

    monkeypatch.setattr("moesim.cli.show.catalog", meet)
    monkeypatch.setattr(sys, "argv", ["moesim", "list", "models"])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped_by(OSError(28, "No space left on device"), monkeypatch) == 2
    assert capsys.readouterr().err == (
        "moesim: No space left on device; fix: free some space, or write elsewhere\n"
    )


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped_by(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err.strip() == "moesim: stopped"


def test_a_disk_that_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped_by(PermissionError(13, "Permission denied", "page.html"), monkeypatch) == 2
    assert capsys.readouterr().err == "moesim: page.html: Permission denied\n"


def test_a_reader_that_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped_by(BrokenPipeError(32, "Broken pipe"), monkeypatch) == 1
    assert capsys.readouterr().err == ""


def test_a_mistake_of_ours_is_not_dressed_up_as_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        stopped_by(ZeroDivisionError(), monkeypatch)


def test_progress_is_shown_to_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with show.bar("pricing layouts", quiet=False) as progress:
        assert progress is not None
        progress(0.5)
    told = capsys.readouterr()
    assert "pricing layouts" in told.err
    assert told.out == ""
    with show.bar("pricing layouts", quiet=True) as progress:
        assert progress is None


def test_numbers_that_are_none_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    show.json_text({"a": float("nan"), "b": [float("inf"), 1.0], "c": ({"d": None},)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.0], "c": [{"d": None}]}
