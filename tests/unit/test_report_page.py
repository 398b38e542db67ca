"""Pages of a plan and of a run: what they hold, what they must not hold, and their figures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.engine import Program, Task, Timeline, evaluate
from moesim.report import LayoutDetail, write_plan_report, write_run_report
from moesim.report.figures import MAX_POINTS, pareto, pareto_front, time_bars
from moesim.report.maps import (
    expert_map,
    load_by_layer,
    shown_ranks,
    step_overview,
    timeline_window,
    traffic_map,
    window_s,
)

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'


def row(
    rank: int = 1, *, tpot_s: float | None = 0.0412, rate: float = 2000.0, **changes: Any
) -> dict[str, Any]:
    base: dict[str, Any] = {
        "rank": rank,
        "layout": {
            "tp": 1,
            "dp": 32,
            "ep": 32,
            "etp": 1,
            "pp": 1,
            "redundant_experts": 0,
            "placement": "contiguous",
        },
        "cluster": {"gpu": "h200-sxm", "nodes": 4, "n_gpus": 32, "usd_per_gpu_hour": 2.8},
        "choice": {"dispatch": "low-latency", "overlap": "none"},
        "workload": {"batch_per_rank": 64, "input": 4000, "output": 1000},
        "feasible": True,
        "why_not": None,
        "memory_bytes": {"weights_experts": 60e9, "kv_cache": 30e9, "total": 90e9, "capacity": 141e9},
        "step_s": 0.04,
        "tokens_per_s": rate * 32,
        "tokens_per_s_per_gpu": rate,
        "ttft_s": 0.912,
        "tpot_s": tpot_s,
        "mfu": 0.12,
        "usd_per_mtok": 2.8 / 3600 / rate * 1e6,
        "breakdown_s": {"attention": 0.02, "expert_ffn": 0.015, "exposed dispatch": 0.004, "wait": 0.001},
        "imbalance": 1.4,
        "band": {"of": "tpot_s", "low": 0.038, "high": 0.046},
        "calibrated": True,
        "engine": None,
    }
    return {**base, **changes}


def plan(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "scenario": {"name": "here", "model": "deepseek-v3", "workload": "4,000 tokens in and 1,000 out"},
        "objective": "usd_per_mtok",
        "targets": {"ttft": "<= 2 s", "tpot": "<= 50 ms"},
        "layouts": [row(1), row(2, tpot_s=0.03, rate=1500.0, choice={"dispatch": "normal"})],
        "layouts_all": [row(0, tpot_s=0.08, rate=2500.0, feasible=False, why_not="TPOT 80 ms")],
        "ruled_out": [
            {
                "layout": {"tp": 1, "ep": 1},
                "batch_per_rank": 8,
                "kind": "memory",
                "reason": "needs 190.2 GB of 141 GB",
            },
            {
                "layout": {"tp": 3},
                "batch_per_rank": None,
                "kind": "divisibility",
                "reason": "128 heads, tp=3",
            },
        ],
        "n_evaluated": 86,
        "n_points": 860,
        "elapsed_s": 3.9,
        "cpu_s": 4.4,
        "warnings": ["the price is assumed"],
        "provenance": [
            {"what": "expert_ffn", "kind": "fitted", "data": "a database", "held_out": "median 5%"}
        ],
    }
    return {**base, **changes}


def timeline(n_ranks: int = 4, n_layers: int = 6) -> Timeline:
    """Layers of attention, dispatch and experts; rank 2 has the most experts' work."""
    work_s = np.array([1e-4] * n_ranks)
    work_s[2 % n_ranks] = 3e-4
    tasks: list[Task] = [Task("embedding.embedding.0", "compute", np.array(1e-5), category="elementwise")]
    together = np.zeros(n_ranks, dtype=np.int64)
    for layer in range(n_layers):
        kind, last = ("dense" if layer == 0 else "moe"), len(tasks) - 1
        tasks.append(
            Task(f"{kind}.{layer}.attention.0", "compute", np.array(5e-5), (last,), category="attention")
        )
        send = Task(
            f"{kind}.{layer}.dispatch.0", "comm", np.array(4e-5), (last + 1,), together, "dispatch", "nic"
        )
        tasks.append(send)
        tasks.append(Task(f"{kind}.{layer}.experts.0", "compute", work_s, (last + 2,), category="expert_ffn"))
    return evaluate(Program(n_ranks, tuple(tasks))).timeline(0)


def detail(**changes: Any) -> LayoutDetail:
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {
        "title": "TP1 DP32",
        "expert_load": rng.gamma(2, 0.5, (5, 16)),
        "rank_load": rng.gamma(2, 0.5, (5, 4)),
        "traffic": rng.uniform(1e6, 2e6, (4, 4)),
        "timeline": timeline(),
        "notes": ["routing drawn from a trace"],
        "layers": range(1, 6),
    }
    return LayoutDetail(**{**given, **changes})


class Reader(HTMLParser):
    """Collects tags, text outside scripts, and the JSON of the figures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.figures: dict[str, dict[str, Any]] = {}
        self._inside: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside is None:
            self.text += data + " "
        elif self._inside.startswith("figure-"):
            self.figures[self._inside] = json.loads(data)

    def ids(self) -> set[str]:
        return {str(attrs["id"]) for tag, attrs in self.tags if tag == "section"}


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return read(
        write_plan_report(tmp_path_factory.mktemp("report") / "plan.html", plan(), [detail(), detail()])
    )


def test_plan_has_every_section(page: Reader) -> None:
    assert page.ids() == {"ranking", "pareto", "time", "memory", "routing", "ruled-out", "provenance"}


def test_page_loads_nothing(page: Reader) -> None:
    for tag, attrs in page.tags:
        assert not {"src", "href", "srcset", "action"} & attrs.keys(), tag
        assert tag not in ("link", "iframe", "object", "embed", "base")
    policy = next(str(attrs["content"]) for tag, attrs in page.tags if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_in_the_page_once(page: Reader) -> None:
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert len([attrs for attrs in scripts if "type" not in attrs]) == 2  # plotly's and the page's own
    assert len(page.figures) == len([1 for tag, attrs in page.tags if "data-figure" in attrs])


def test_numbers_of_the_plan_stand_in_the_page(page: Reader) -> None:
    for text in (
        "41.2 ms (38..46)",
        "912 ms",
        "0.389",
        "90.0 of 141 GB",
        "needs 190.2 GB of 141 GB",
        "median 5%",
    ):
        assert text in page.text
    assert (
        "TP1 DP32 EP32 on 32 x h200-sxm, batch 64 a rank, has the lowest cost per million tokens" in page.text
    )
    assert "860 points, 86 candidates evaluated" in page.text
    assert "the price is assumed" in page.text


def test_figures_are_figures_to_plotly(page: Reader) -> None:
    from plotly import graph_objects

    assert len(page.figures) >= 8
    for spec in page.figures.values():
        graph_objects.Figure(spec)  # raises at any property that does not exist


def test_axes_have_units(page: Reader) -> None:
    titles = " ".join(
        axis["title"]["text"]
        for spec in page.figures.values()
        for name, axis in spec["layout"].items()
        if name.startswith(("xaxis", "yaxis"))
    )
    for words in ("[ms]", "[GB]", "[us]", "tokens/s per GPU", "MoE layer"):
        assert words in titles


def test_ranking_sorts_by_values_and_shows_columns_that_differ(page: Reader) -> None:
    cells = [attrs["data-v"] for tag, attrs in page.tags if tag == "td" and "data-v" in attrs]
    assert "low-latency" in cells and "normal" in cells  # differs between the two rows
    assert "0.0412" in cells  # sorted by seconds, not by what is written
    assert not [cell for cell in cells if cell == "32 x h200-sxm"]  # the same in both: said above the table
    assert "All on 32 x h200-sxm" in page.text


def test_what_was_ruled_out_says_what_would_help(page: Reader) -> None:
    assert "TP1 EP1, batch 8 a rank: needs 190.2 GB of 141 GB" in page.text
    assert "more or larger GPUs, a smaller batch or context, or smaller weights would help" in page.text


def test_only_the_first_detail_is_open(page: Reader) -> None:
    opened = ["open" in attrs for tag, attrs in page.tags if tag == "details"]
    assert opened == [True, False]


@pytest.mark.parametrize("kind", ["plan", "run"])
def test_what_a_person_wrote_is_escaped(tmp_path: Path, kind: str) -> None:
    scenario = {"name": EVIL, "model": EVIL, "workload": EVIL}
    evil_row = row(
        cluster={"gpu": EVIL, "n_gpus": 8},
        choice={"dispatch": EVIL},
        why_not=EVIL,
        breakdown_s={EVIL: 0.01},
        memory_bytes={EVIL: 1e9},
    )
    source = [{"what": EVIL, "kind": EVIL, "data": EVIL, "held_out": EVIL}]
    ruled_out = [{"layout": {"tp": 1, "placement": EVIL}, "kind": EVIL, "reason": EVIL}]
    one = detail(title=EVIL, notes=[EVIL], expert_axis=EVIL)
    if kind == "plan":
        content = plan(
            scenario=scenario,
            layouts=[evil_row, row(2)],
            layouts_all=[evil_row],
            ruled_out=ruled_out,
            provenance=source,
            warnings=[EVIL],
            targets={EVIL: EVIL, "tpot": "<= <b>"},
        )
        path = write_plan_report(tmp_path / "page.html", content, [one, one])
    else:
        content = {**evil_row, "scenario": scenario, "provenance": source, "warnings": [EVIL]}
        path = write_run_report(tmp_path / "page.html", content, one)
    reader = read(path)
    assert EVIL in reader.text  # shown as it was written
    assert "img" not in {tag for tag, _ in reader.tags}
    assert not [attrs for _, attrs in reader.tags if "onerror" in attrs]
    shown = json.dumps(list(reader.figures.values()))
    assert "<script" not in shown and "<img" not in shown  # Plotly reads tags in its labels


def test_plan_without_layouts_says_why(tmp_path: Path) -> None:
    content = plan(layouts=[], targets={"tpot": "<= 3 ms"})
    reader = read(write_plan_report(tmp_path / "empty.html", content, []))
    assert "No candidate fits and meets TPOT\u00a0≤\u00a03\u00a0ms" in reader.text
    assert "does not fit in memory (needs 190.2 GB of 141 GB)" in reader.text
    assert "The lowest time per output token of all candidates that fit is 80.0 ms" in reader.text
    assert reader.ids() == {"ruled-out", "pareto", "provenance"}


def test_plan_with_nothing_at_all_needs_no_plotly(tmp_path: Path) -> None:
    path = write_plan_report(tmp_path / "bare.html", {}, [])
    assert "No candidate is feasible" in read(path).text
    assert path.stat().st_size < 50_000


def test_rows_of_nulls_make_a_page(tmp_path: Path) -> None:
    nulls = dict.fromkeys(row())
    reader = read(
        write_plan_report(tmp_path / "null.html", plan(layouts=[nulls, nulls]), [LayoutDetail("none")])
    )
    assert "nan" not in reader.text.lower().split()
    assert "routing" not in reader.ids()


def test_run_page(tmp_path: Path) -> None:
    result = {**row(rank=None), "scenario": {"model": "mixtral-8x7b"}, "calibrated": False}  # type: ignore[arg-type]
    reader = read(write_run_report(tmp_path / "run.html", result, detail()))
    assert "time per output token 41.2 ms (38..46), 64,000 tokens/s in all" in reader.text
    assert "This GPU was not measured" in reader.text
    assert reader.ids() == {"time", "memory", "routing"}


def test_run_that_does_not_fit(tmp_path: Path) -> None:
    result = {**row(), "feasible": False, "why_not": "needs 190.2 GB of 141 GB"}
    text = read(write_run_report(tmp_path / "run.html", result, LayoutDetail("a"))).text
    assert "not feasible, needs 190.2 GB of 141 GB" in text


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.html"
    path.write_text("old", encoding="utf-8")

    def fails(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_plan_report(path, plan(), [])
    assert [one.name for one in tmp_path.iterdir()] == ["plan.html"]
    assert path.read_text(encoding="utf-8") == "old"


def test_a_large_plan_makes_a_small_page_soon(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [
        row(i, tpot_s=float(rng.uniform(0.01, 0.1)), rate=float(rng.uniform(100, 3000))) for i in range(4000)
    ]
    ruled_out = plan()["ruled_out"] * 5000
    big = detail(expert_load=rng.gamma(2, 0.5, (61, 2048)), traffic=rng.uniform(0, 1e6, (512, 512)))
    content = plan(layouts=rows, layouts_all=rows, ruled_out=ruled_out)
    write_plan_report(tmp_path / "warm.html", plan(), [])
    begin_s = time.process_time()
    path = write_plan_report(tmp_path / "big.html", content, [big] * 4)
    assert time.process_time() - begin_s < 1.5
    assert path.stat().st_size < 9e6
    assert "10,000 candidates in all" in read(path).text


def test_command_line_does_not_pay_for_plotly() -> None:
    script = "import sys, moesim.report; print(any(name.startswith('plotly') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---------------------------------------------------------------- figures


def test_front_keeps_what_nothing_beats() -> None:
    # by hand: (20, 5) is beaten by (10, 6); (10, 3) by (10, 6); (40, 9) has the most throughput
    assert pareto_front([20, 10, 30, 40, 10], [5, 6, 8, 9, 3]) == [1, 2, 3]
    assert pareto_front([], []) == []


def test_front_line_and_points_of_pareto() -> None:
    rows = [row(1, tpot_s=0.02, rate=900), row(2, tpot_s=0.01, rate=300), row(3, tpot_s=0.03, rate=500)]
    figure = pareto(rows, [row(0, tpot_s=0.05, feasible=False)], {"tpot_p50": "<= 30 ms"})
    assert figure is not None
    by_name = {trace["name"]: trace for trace in figure["data"]}
    assert by_name["Pareto front"]["x"] == [10.0, 20.0]
    assert sorted(by_name["32 x h200-sxm"]["x"]) == [10.0, 20.0, 30.0]
    assert by_name["misses a target"]["x"] == [50.0]
    assert figure["layout"]["shapes"][0]["x0"] == pytest.approx(30.0)


def test_band_is_drawn_where_the_first_has_one() -> None:
    def mark(one: dict[str, Any]) -> dict[str, Any]:
        figure = pareto([one], [], None)
        assert figure is not None
        return next(trace for trace in figure["data"] if trace["name"].startswith("ranked first"))

    error = mark(row())["error_x"]
    assert (error["array"], error["arrayminus"]) == ([pytest.approx(4.8)], [pytest.approx(3.2)])
    assert "error_x" not in mark(row(band=None))


def test_pareto_is_logarithmic_over_a_wide_range() -> None:
    figure = pareto([row(1, tpot_s=0.002), row(2, tpot_s=0.1)], [], {"tpot": "<= 10 ms"})
    assert figure is not None and figure["layout"]["xaxis"]["type"] == "log"
    assert figure["layout"]["annotations"][0]["x"] == pytest.approx(1.0)  # Plotly wants log10 there


def test_pareto_thins_what_is_too_much_but_keeps_the_front() -> None:
    rows = [row(i, tpot_s=0.01 + i * 1e-5, rate=100.0) for i in range(3 * MAX_POINTS)]
    figure = pareto([*rows, row(0, tpot_s=0.2, rate=101.0)], [], {})
    assert figure is not None
    points = next(trace for trace in figure["data"] if trace["name"] == "32 x h200-sxm")
    assert len(points["x"]) == MAX_POINTS + 2
    assert 200.0 in points["x"]


def test_clusters_have_their_own_colours() -> None:
    other = row(2, cluster={"gpu": "b200", "n_gpus": 8})
    figure = pareto([row(1), other], [], None)
    assert figure is not None
    colors = {
        t["name"]: t["marker"]["color"] for t in figure["data"] if t["mode"] == "markers" and "text" in t
    }
    assert len(colors) == len(set(colors.values())) == 2


def test_one_kind_of_work_has_one_colour_in_every_figure() -> None:
    bars = time_bars([row(breakdown_s={"dispatch": 1e-3, "exposed dispatch": 1e-3, "expert_ffn": 1e-3})])
    window = timeline_window(timeline())
    assert bars is not None and window is not None
    in_bars = {trace["name"]: trace["marker"].get("color") for trace in bars["data"]}
    in_window = {trace["name"]: trace["marker"]["color"] for trace in window["data"]}
    assert in_bars["dispatch"] == in_bars["exposed dispatch"] == in_window["dispatch"]
    assert in_bars["routed experts"] == in_window["routed experts"]


def test_bars_are_of_rows_that_were_played() -> None:
    unplayed = row(2, breakdown_s=None, kernel_s={"dispatch": 1.0})
    assert time_bars([unplayed]) is None
    figure = time_bars([row(1), unplayed])
    assert figure is not None
    assert all(len(trace["y"]) == 1 for trace in figure["data"])


def test_bars_hold_the_parts_in_milliseconds() -> None:
    figure = time_bars([row()])
    assert figure is not None
    parts = {trace["name"]: trace["x"] for trace in figure["data"]}
    assert parts["attention"] == [20.0]
    assert parts["exposed dispatch"] == [4.0]
    hatched = next(trace["marker"] for trace in figure["data"] if trace["name"] == "exposed dispatch")
    assert hatched["pattern"]["fillmode"] == "overlay"  # else the hatching takes the colour's place
    assert parts["step, overlap taken off"] == [40.0]


def test_expert_map_joins_neighbours_by_their_busiest() -> None:
    load = np.ones((2, 1024))
    load[1, 7] = 9.0
    figure = expert_map(detail(expert_load=load, layers=None))
    assert figure is not None
    z = figure["data"][0]["z"]
    assert (len(z), len(z[0])) == (2, 512)
    assert z[1][3] == 9.0 and sum(z[1]) == 511 + 9


def test_load_by_layer_is_busiest_over_mean() -> None:
    figure = load_by_layer(
        detail(expert_load=np.array([[1.0, 3.0], [0.0, 0.0]]), rank_load=None, layers=[4, 5])
    )
    assert figure is not None
    assert (figure["data"][0]["x"], figure["data"][0]["y"]) == ([4, 5], [1.5, 1.0])
    assert load_by_layer(detail(expert_load=None, rank_load=None)) is None


def test_traffic_map_leaves_out_the_diagonal_and_names_its_unit() -> None:
    figure = traffic_map(detail(traffic=np.array([[9e9, 2e6], [1e6, 9e9]])))
    assert figure is not None
    assert figure["data"][0]["z"] == [[None, 2.0], [1.0, None]]
    assert (figure["data"][0]["zmin"], figure["data"][0]["zmax"]) == (0, 2.0)
    assert figure["data"][0]["colorbar"]["title"]["text"] == "MB"


def test_large_traffic_is_summed_in_blocks() -> None:
    figure = traffic_map(detail(traffic=np.ones((192, 192))))
    assert figure is not None
    z = np.array(figure["data"][0]["z"])
    assert z.shape == (96, 96)
    assert z.sum() == 192 * 191
    assert figure["layout"]["xaxis"]["title"]["text"] == "to rank, 2 to a cell"


@pytest.mark.parametrize("traffic", [None, np.ones((1, 1)), np.diag([1.0, 2.0])])
def test_no_traffic_no_map(traffic: Any) -> None:
    assert traffic_map(detail(traffic=traffic)) is None


def test_timeline_shows_busiest_and_median_rank_in_the_first_moe_layers() -> None:
    one = timeline(n_layers=8)
    assert shown_ranks(one)[2] == "busiest" and set(shown_ranks(one).values()) == {"busiest", "median"}
    begin_s, end_s = window_s(one)
    assert 0 < begin_s < end_s < one.makespan_s
    figure = timeline_window(one)
    assert figure is not None
    names = {text for trace in figure["data"] for text in trace["text"]}
    assert {"moe.1.experts.0", "moe.4.experts.0"} <= names
    assert not {name for name in names if name.startswith(("moe.5.e", "moe.6", "dense.0.att"))}
    # rank 2 is last at every dispatch, so only the others wait
    waiting = next(trace for trace in figure["data"] if trace["name"] == "waiting for peers")
    assert all("busiest" not in place for place in waiting["y"])


def test_overview_adds_up_each_layer() -> None:
    figure = step_overview(timeline())
    assert figure is not None
    experts = next(trace for trace in figure["data"] if trace["name"] == "routed experts")
    assert experts["x"] == ["embedding", "0", "1", "2", "3", "4", "5"]
    assert experts["y"] == pytest.approx([0.0] + [300.0] * 6)


def test_timeline_without_layers_is_shown_whole() -> None:
    program = Program(1, (Task("one", "compute", np.array(1e-3)), Task("two", "copy", np.array(0.0))))
    one = evaluate(program).timeline(0)
    assert window_s(one) == (0.0, pytest.approx(1e-3))
    assert shown_ranks(one) == {0: "the only rank"}
    assert timeline_window(one) is not None


def test_empty_timeline_has_no_figure(tmp_path: Path) -> None:
    one = evaluate(Program(1, ())).timeline(0)
    assert timeline_window(one) is None
    assert step_overview(one) is None
    reader = read(write_run_report(tmp_path / "run.html", row(), LayoutDetail("a", timeline=one)))
    assert "Timeline" not in reader.text
