"""moesim sweep: points equal to runs, refusals, files, resuming, processes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesim.cli import main
from moesim.errors import ScenarioError
from moesim.plan import read_grid, run_answer, sweep
from moesim.plan import run as simulate
from moesim.plan.point_log import PointLog
from moesim.scenario import read_scenario

SCENARIO = """\
model: olmoe-1b-7b
cluster: {gpu: h200-sxm, nodes: 1, gpus_per_node: 4}
workload: {kind: decode, batch_per_rank: 16, context: 1000}
"""
TRAIN = """\
model: mixtral-8x7b
cluster: {gpu: h100-sxm, nodes: 16, gpus_per_node: 8}
layout: {ep: 8}
workload: {kind: train, global_batch: 1024, sequence: 4096}
dtype: bfloat16
"""


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a scenario in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    (tmp_path / "asked.yaml").write_text(SCENARIO)
    (tmp_path / "train.yaml").write_text(TRAIN)
    return tmp_path / "asked.yaml"


@pytest.fixture
def moesim(
    asked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command; exit code, standard output and error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moesim", "sweep", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def ran(path: Path, *sets: str) -> dict[str, Any]:
    """What `moesim run` says of one point, as JSON has it."""
    scenario = read_scenario(path, sets)
    return json.loads(json.dumps(run_answer(simulate(scenario), scenario)[0]))


PLAYED = ("engine", "breakdown_s")
ONCE = {"scenario", "warnings", "provenance"}
"""Keys of a run that a sweep says once for all points, or not at all."""


@pytest.mark.parametrize(
    "sets",
    [
        ("layout.ep=2,4", "workload.batch_per_rank=1,24,64"),
        ("policy.capacity_factor=1:1.5:0.25,none", "policy.overflow=drop-position,reroute"),
        ("cluster.nic=200 Gb/s,400 Gb/s", "cluster.nodes=1,2", "layout.ep=8,4"),
        ("routing.trace=imbalance-none,imbalance-collapsed,default", "layout.redundant_experts=0,4"),
        ("model=olmoe-1b-7b,qwen3-30b-a3b", "seed=0,1", "layout.placement=contiguous,balanced"),
        (
            "layout.placement_trace=imbalance-mild,imbalance-severe",
            "layout.rebalance_every=100,1000",
            "layout.placement=eplb,balanced",
            "layout.redundant_experts=4",
            "routing.trace=imbalance-heavy",
        ),
        ("dtype=bfloat16,fp8", "backend=sglang,vllm", "routing=uniform,zipf"),
        ("workload={kind: serve, input: 500, output: 100, batch_per_rank: 8}", "workload.input=250,500"),
    ],
)
def test_points_are_what_runs_are(asked: Path, sets: tuple[str, ...]) -> None:
    told = sweep(read_grid(asked, sets))
    given = [one.split("=")[0] for one in sets]
    assert [key for key in given if key in told["swept"]] == told["swept"]
    fixed = [one for one in sets if one.split("=")[0] not in told["swept"]]
    for point in told["points"]:
        values = [f"{key}={value}" for key, value in point["set"].items()]
        if "refused" in point:
            continue
        one = ran(asked, *fixed, *values)
        result = json.loads(json.dumps(point["result"]))
        assert set(one) - ONCE == set(result)
        for key in set(result) - {*PLAYED}:
            assert result[key] == one[key], (point["set"], key)
    assert told["n_refused"] < told["n_points"] == len(told["points"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("cluster.gpu=h200-sxm,b200", "never measured"),
        ("workload.context=2000,2000000", "was trained for"),
        ("policy.overflow=drop-position,drop-weight", "no router weights"),
    ],
)
def test_every_point_s_warnings_are_told_whichever_comes_first(asked: Path, values: str, said: str) -> None:
    key, _, both = values.partition("=")
    backwards = f"{key}={','.join(reversed(both.split(',')))}"
    for one in (values, backwards):
        warnings = read_grid(asked, ["policy.capacity_factor=1.25", one]).warnings
        assert any(said in line for line in warnings), one


def test_with_the_engine_every_key_is_a_run_s(asked: Path) -> None:
    told = sweep(read_grid(asked, ["layout.ep=1,4", "policy.capacity_factor=1,none"]), engine=True)
    for point in told["points"]:
        one = ran(asked, *(f"{key}={value}" for key, value in point["set"].items()))
        for key, value in json.loads(json.dumps(point["result"])).items():
            assert value == one[key], (point["set"], key)


def test_what_is_played_is_shown(moesim: Callable[..., tuple[int, str, str]]) -> None:
    sets = ("--set", "workload.batch_per_rank=8,16")
    assert " played " in moesim("asked.yaml", *sets, "--engine")[1]
    assert " played " not in moesim("asked.yaml", *sets)[1]


def test_training_and_the_knee(moesim: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = moesim("train.yaml", "--set", "policy.capacity_factor=1.0:2.0:0.125", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["swept"] == ["policy.capacity_factor"]
    (curve,) = told["tradeoff"]["curves"]
    shares = [point["result"]["dropped_fraction"] for point in told["points"]]
    steps = [point["result"]["step_s"] for point in told["points"]]
    assert shares == sorted(shares, reverse=True)
    assert steps == sorted(steps)
    assert 0 < curve["knee"] < 8
    assert curve["costs"]["beyond"] > curve["costs"]["before"]
    _, text, _ = moesim("train.yaml", "--set", "policy.capacity_factor=1.0:2.0:0.125")
    factor = told["points"][curve["knee"]]["set"]["policy.capacity_factor"]
    assert f"a knee at capacity factor {factor}" in text


def test_keys_that_the_file_leaves_open_are_swept(asked: Path) -> None:
    asked.write_text(SCENARIO.replace("batch_per_rank: 16", "batch_per_rank: 8..16*2"))
    told = sweep(read_grid(asked, ["layout.ep=2,4"]))
    assert told["swept"] == ["layout.ep", "workload.batch_per_rank"]
    assert [tuple(point["set"].values()) for point in told["points"]] == [(2, 8), (2, 16), (4, 8), (4, 16)]


def test_refused_points_are_rows(moesim: Callable[..., tuple[int, str, str]]) -> None:
    sets = ("--set", "layout.ep=3,4", "--set", "workload.batch_per_rank=16,100000")
    code, out, err = moesim("asked.yaml", *sets, "--json")
    points = json.loads(out)["points"]
    assert (code, err) == (0, "")
    assert [("refused" in point) for point in points] == [True, True, False, True]
    assert "must divide" in points[0]["refused"]
    assert "GB of memory" in points[3]["refused"]
    code, out, _ = moesim("asked.yaml", *sets)
    assert code == 0
    assert "3 points refused" in out
    assert moesim("asked.yaml", "--set", "layout.ep=3,5")[0] == 0  # nothing is left, which is an answer too


def test_values_that_only_go_with_others_are_refused_points(asked: Path) -> None:
    told = sweep(read_grid(asked, ["policy.capacity_factor=none,1.25", "policy.padding=none,capacity"]))
    assert [("refused" in point) for point in told["points"]] == [False, True, False, False]
    assert "needs a capacity_factor" in told["points"][1]["refused"]


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["layout.ep=8"], "takes several of one"),
        (["layout.eep=8,16"], "did you mean ep"),
        (["layout.ep=8,eight"], "--set layout.ep=8,eight"),
        (["layout.ep=8:16"], "from, to and step"),
        (["layout.ep=8,16", "cluster.nic=200,400"], "needs a unit"),
        (["routing.trace=default,nowhere"], "nowhere"),
        (["model=olmoe-1b-7b,nothing"], "nothing"),
        (["policy.capacity_factor=1,0"], "is not above 0"),
        (["layout.ep=1,2", "layout.ep=4,8"], "given twice"),
        (["seed=1..4000", "workload.context=1..4000"], "more than 100,000"),
        (["layout.ep"], "key.path=values"),
    ],
)
def test_a_bad_key_or_value_is_one_error(
    moesim: Callable[..., tuple[int, str, str]], asked: Path, sets: list[str], said: str
) -> None:
    before = sorted(asked.parent.iterdir())
    arguments = [part for one in sets for part in ("--set", one)]
    code, out, err = moesim(
        "asked.yaml", *arguments, "--csv", "a.csv", "--report", "a.html", "--out", "a.jsonl"
    )
    assert (code, out) == (2, "")
    assert err.startswith("moesim: ")
    assert err.count("\n") == 1
    assert said in err
    assert "fix: " in err
    assert sorted(asked.parent.iterdir()) == before


def test_csv_is_tidy(moesim: Callable[..., tuple[int, str, str]], asked: Path) -> None:
    sets = ("--set", "cluster.nic=200 Gb/s,400 Gb/s", "--set", "layout.ep=2,3")
    code, _, err = moesim("asked.yaml", *sets, "--csv", "a.csv")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO((asked.parent / "a.csv").read_text())))
    assert [row["cluster.nic_bytes_per_s"] for row in rows] == ["25000000000.0"] * 2 + ["50000000000.0"] * 2
    assert [row["layout.ep"] for row in rows] == ["2", "3", "2", "3"]
    assert [bool(row["refused"]) for row in rows] == [False, True, False, True]
    for name in ("step_s", "tpot_s", "tokens_per_s", "memory_bytes.total", "kernel_s.attention", "imbalance"):
        assert float(rows[0][name]) > 0
        assert rows[1][name] == ""
    assert "band.low_s" in rows[0]
    assert sorted(path.name for path in asked.parent.iterdir()) == ["a.csv", "asked.yaml", "train.yaml"]


def test_a_rerun_takes_what_is_there(asked: Path) -> None:
    log = asked.parent / "points.jsonl"
    first = sweep(read_grid(asked, ["layout.ep=1,2"]), log=log)
    assert (first["n_resumed"], len(log.read_text().splitlines())) == (0, 2)
    more = sweep(read_grid(asked, ["layout.ep=1,2,4"]), log=log)
    assert more["n_resumed"] == 2
    assert more["points"][:2] == first["points"]
    asked.write_text(SCENARIO.replace("context: 1000", "context: 2000"))
    other = sweep(read_grid(asked, ["layout.ep=1,2"]), log=log)
    assert other["n_resumed"] == 0  # another scenario's points are not taken for this one's
    assert other["points"][0] != first["points"][0]
    assert sweep(read_grid(asked, ["layout.ep=1,2"]), log=log, engine=True)["n_resumed"] == 0


def test_a_line_cut_short_is_done_again(asked: Path) -> None:
    log = asked.parent / "points.jsonl"
    grid = read_grid(asked, ["layout.ep=1,2,4"])
    whole = sweep(grid, log=log)
    lines = log.read_bytes()
    for cut in (3, 20, 900):
        log.write_bytes(lines[:-cut])
        again = sweep(grid, log=log)
        assert again["n_resumed"] == 2
        assert again["points"] == whole["points"]
        assert log.read_bytes() == lines


@pytest.mark.parametrize("text", ["model: olmoe-1b-7b\n", "a,b\n1,2\n", "notes", '{"other": 1}\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine"
    path.write_text(text)
    with pytest.raises(ScenarioError, match="is no point of a sweep"):
        PointLog(path)
    assert path.read_text() == text


def test_killed_sweeps_go_on(asked: Path) -> None:
    arguments = ["asked.yaml", "--set", "seed=0..11", "--csv", "a.csv", "--json", "--set", "layout.ep=2,4"]
    command = [sys.executable, "-m", "moesim", "sweep", *arguments]
    part = asked.parent / "a.csv.part"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen(
        command, cwd=asked.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        if part.exists() and part.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert part.exists(), "it was done before it could be killed"
    assert not (asked.parent / "a.csv").exists()
    n_lines = part.read_bytes().count(b"\n")
    told = json.loads(
        subprocess.run(command, cwd=asked.parent, capture_output=True, check=True, env=environment).stdout
    )
    assert 3 <= n_lines == told["n_resumed"] < 24
    assert not part.exists()
    assert told["points"] == json.loads(
        json.dumps(sweep(read_grid(asked, ["seed=0..11", "layout.ep=2,4"]))["points"])
    )
    assert len((asked.parent / "a.csv").read_text().splitlines()) == 25


def test_two_processes_say_what_one_does(asked: Path) -> None:
    grid = read_grid(asked, ["layout.ep=1,2,3,4", "routing.trace=default,imbalance-severe"])
    one, two = sweep(grid), sweep(grid, jobs=2)
    assert two["points"] == one["points"]
    assert two["tradeoff"] == one["tradeoff"]


def test_a_script_without_a_guard_does_not_sweep_again_in_every_process(asked: Path) -> None:
    script = asked.parent / "script.py"
    script.write_text(
        "from moesim.plan import read_grid, sweep\n"
        "print(sweep(read_grid('asked.yaml', ['layout.ep=1,2,4']), jobs=2)['n_points'])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    told = subprocess.run(
        [sys.executable, "script.py"], cwd=asked.parent, capture_output=True, text=True, env=environment
    )
    assert (told.stdout, told.stderr) == ("3\n", "")


def test_page(moesim: Callable[..., tuple[int, str, str]], asked: Path) -> None:
    sets = ("--set", "policy.capacity_factor=1.0:2.0:0.25,none", "--set", "workload.micro_batch=1,64")
    code, out, _ = moesim("train.yaml", *sets, "--report", "a.html")
    text = (asked.parent / "a.html").read_text()
    assert code == 0
    assert "Report: a.html" in out
    assert "Choices dropped against step time" in text
    assert re.search(r"is a knee at capacity factor 1\.\d+: choices dropped", text)
    assert "Kneedle" in text
    assert "points refused" in text
    figures = [
        json.loads(one) for one in re.findall(r'application/json" id="figure-\d+">(.*?)</script>', text)
    ]
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert titles[:2] == ["Step time", "Throughput"]
    assert len(figures) == 1 + len(titles)
    step = figures[1]
    assert step["layout"]["xaxis"]["categoryarray"] == ["1", "1.25", "1.5", "1.75", "2", "none"]
    assert step["layout"]["yaxis"]["title"]["text"] == "s"
    points = json.loads(moesim("train.yaml", *sets, "--json")[1])["points"]
    steps_s = [point["result"]["step_s"] for point in points if "result" in point]
    assert step["data"][0]["y"] == pytest.approx(steps_s, rel=1e-4)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no headless browser")
def test_a_browser_draws_every_figure(moesim: Callable[..., tuple[int, str, str]], asked: Path) -> None:
    sets = ("--set", "policy.capacity_factor=1.0:2.0:0.25,none", "--set", "policy.padding=none,capacity")
    assert moesim("train.yaml", *sets, "--report", "a.html")[0] == 0
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
    )
    page = (asked.parent / "a.html").as_uri()
    told = subprocess.run(
        ["chromium", *flags, "--dump-dom", page], capture_output=True, text=True, timeout=240
    )
    assert told.stdout.count('data-drawn="1"') == (asked.parent / "a.html").read_text().count('id="figure-')
    assert told.stdout.count('class="main-svg"') >= told.stdout.count('data-drawn="1"') > 5
    assert "Uncaught" not in told.stderr


def test_page_of_names_and_of_no_result(moesim: Callable[..., tuple[int, str, str]], asked: Path) -> None:
    traces = "routing.trace=imbalance-none,imbalance-mild,imbalance-collapsed"
    assert moesim("asked.yaml", "--set", traces, "--report", "a.html")[0] == 0
    text = (asked.parent / "a.html").read_text()
    assert '"ticktext":["none","mild","collapsed"]' in text
    assert moesim("asked.yaml", "--set", "layout.ep=3,5", "--report", "b.html")[0] == 0
    assert "All 2 points are refused" in (asked.parent / "b.html").read_text()


def test_quantities_and_numbers_stand_in_order_on_an_axis(
    moesim: Callable[..., tuple[int, str, str]], asked: Path
) -> None:
    sets = (
        "--set",
        "cluster.nic=400 Gb/s,100 Gb/s,200 Gb/s",
        "--set",
        "layout.ep=1,2",
        "--set",
        "cluster.nodes=2",
    )
    assert moesim("asked.yaml", *sets, "--report", "a.html")[0] == 0
    text = (asked.parent / "a.html").read_text()
    assert '"text":"nic [Gb/s]"' in text
    assert '"x":[100.0,200.0,400.0]' in text


def test_many_curves_are_thinned_and_said(moesim: Callable[..., tuple[int, str, str]], asked: Path) -> None:
    sets = ("--set", "seed=0..19", "--set", "workload.batch_per_rank=1..15")
    assert moesim("asked.yaml", *sets, "--report", "a.html")[0] == 0
    text = (asked.parent / "a.html").read_text()
    assert "12 of 15 curves, evenly chosen" in text
    assert ">batch per rank 1<" in text
    assert ">batch per rank 15<" in text


def test_csv_reads_back_as_numbers(moesim: Callable[..., tuple[int, str, str]], asked: Path) -> None:
    moesim("asked.yaml", "--set", "layout.ep=1:4:1", "--csv", "a.csv")
    rows = list(csv.DictReader(io.StringIO((asked.parent / "a.csv").read_text())))
    for row in rows:
        if not row["refused"]:
            one = ran(asked, f"layout.ep={row['layout.ep']}")
            assert float(row["step_s"]) == one["step_s"]
            assert float(row["memory_bytes.total"]) == one["memory_bytes"]["total"]
