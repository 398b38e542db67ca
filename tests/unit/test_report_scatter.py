"""The page of predicted against measured."""

from __future__ import annotations

import pytest

from moesim.report import Compared, write_scatter_report
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
