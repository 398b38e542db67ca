"""The page of predicted against measured."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from moesim.report import Compared, Panels, write_scatter_report
from moesim.report.scatter import errors


def test_errors_are_relative_to_what_was_measured():
    group = Compared("a", measured=[1.0, 2.0, 4.0], predicted=[1.1, 1.8, 4.0], labels=["x"] * 3)
    median, p90, bias = errors(group)
    assert median == pytest.approx(0.1)
    assert p90 == pytest.approx(0.1)
    assert bias == pytest.approx(0.0)


def test_page_shows_every_group_and_table_and_escapes_names(tmp_path):
    groups = [
        Compared("<b>one</b>", [1.0, 3.0], [1.5, 3.0], ["a <i>", "b"]),
        Compared("two", [2.0], [2.0], ["c"]),
    ]
    path = write_scatter_report(
        tmp_path / "page.html",
        "Title & more",
        {"time [ms]": groups},
        {"Published": [["case"], ["A16 <script>"]]},
    )
    text = path.read_text()
    assert "Title &amp; more" in text
    assert "&lt;b&gt;one&lt;/b&gt;" in text and "<b>one</b>" not in text
    assert "A16 &lt;script&gt;" in text
    assert "25.0%" in text  # half of the first group is 50% off, the other exact
    assert "http-equiv" in text and 'src="http' not in text
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]


def figures_of(text: str) -> list[dict]:
    """Data of a page's figures."""
    found = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL)
    return [json.loads(one) for one in found]


def test_panels_thin_the_scatter_and_count_every_row(tmp_path):
    measured = np.repeat([1.0, 100.0], 500)
    predicted = measured * np.repeat([1.1, 0.8], 500)  # small ones 10% above, large ones 20% below
    groups = [Compared(str(n), measured.tolist(), predicted.tolist(), ["x"] * 1000) for n in range(17)]
    lead = "some <rows>"
    path = write_scatter_report(
        tmp_path / "a.html", "T", {"t [us]": groups}, {}, panels=Panels(lead=lead, max_points=1700)
    )
    text = path.read_text()
    assert "some &lt;rows&gt;" in text
    scatter, by_size, spread = figures_of(text)
    markers = [one for one in scatter["data"] if one["mode"] == "markers"]
    assert [len(one["x"]) for one in markers] == [100] * 17
    assert text.count("<td>1,000</td>") == 17
    for line in by_size["data"]:
        assert line["x"] == pytest.approx([1.0, 100.0]) and line["y"] == pytest.approx([0.1, -0.2])
        assert line["text"] == ["500 rows", "500 rows"]
    strokes = {(line["line"]["color"], line["line"]["dash"]) for line in by_size["data"]}
    assert len(strokes) == 17  # told apart although there are nine colours
    marks = {(one["marker"]["color"], one["marker"]["symbol"]) for one in markers}
    assert len(marks) == 17
    for line in spread["data"]:
        shares = dict(zip(line["x"], line["y"], strict=True))
        assert sum(shares.values()) == pytest.approx(1)
        used = sorted(x for x, share in shares.items() if share)
        assert used == [pytest.approx(-0.2, abs=0.026), pytest.approx(0.1, abs=0.026)]


def test_errors_beyond_the_histogram_are_in_its_last_bars(tmp_path):
    groups = [Compared("a", [1.0, 1.0, 2.0], [50.0, 1.0, 2.0], ["x"] * 3)]
    path = write_scatter_report(tmp_path / "a.html", "T", {"t": groups}, {}, panels=Panels("", 10))
    spread = figures_of(path.read_text())[2]["data"][0]
    assert spread["y"][-1] == pytest.approx(1 / 3, abs=1e-3)


def test_legends_are_short_and_below_and_the_whole_name_is_shown_on_hover(tmp_path):
    long = "vllm:" + "a_long_kernel" * 9
    groups = [Compared(f"{long} {n}", [1.0, 2.0], [1.0, 2.0], ["x"] * 2, f"kernel {n}") for n in range(17)]
    summary = [["op", "rows"], ["gemm", "1,234"]]
    path = write_scatter_report(
        tmp_path / "a.html", "T", {"t": groups}, {}, panels=Panels("lead", 10, summary)
    )
    text = path.read_text()
    assert text.index("lead") < text.index("1,234") < text.index("<h2>t</h2>")
    few = write_scatter_report(tmp_path / "b.html", "T", {"t": groups[:1]}, {}, panels=Panels("", 10))
    assert "Summary" not in few.read_text()
    for many, one in zip(figures_of(text), figures_of(few.read_text()), strict=True):
        named = [trace for trace in many["data"] if "name" in trace]
        assert [trace["name"] for trace in named] == [f"kernel {n}" for n in range(17)]
        assert all(trace["hovertemplate"].startswith(f"{long} ") for trace in named)
        assert many["layout"]["legend"]["yanchor"] == "bottom" and many["layout"]["legend"]["y"] == 0
        plots = [
            figure["layout"]["height"] - figure["layout"]["margin"]["t"] - figure["layout"]["margin"]["b"]
            for figure in (many, one)
        ]
        assert plots[0] == plots[1]  # the legend takes nothing of the plot
