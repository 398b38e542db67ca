"""The page of a router: every section where there is something to show, and nothing where there is not."""

from __future__ import annotations

import json
import re
from html import unescape
from typing import Any

import numpy as np
import pytest

from moesim.report.routing_page import write_routing_report
from moesim.routing import RoutingTrace, describe
from moesim.routing.drift import domain_specialisation
from moesim.routing.runs import token_runs

NAME = "<script>alert(1)</script> & co"


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    rng = np.random.default_rng(0)
    ids = np.argsort(-rng.gumbel(size=(4000, 3, 32)) + np.log(np.arange(1, 33)), axis=-1)[..., :4]
    return RoutingTrace(
        NAME, 32, 4, (0, 1, 2), source="made up", expert_ids=ids, sequence_offsets=np.arange(0, 4001, 100)
    )


@pytest.fixture(scope="module")
def told(trace: RoutingTrace) -> dict[str, Any]:
    found = describe(trace)
    found["domains"] = domain_specialisation(token_runs(trace), np.arange(40) % 2, ("code", "<b>prose</b>"))
    return found


def figures(page: str) -> list[dict[str, Any]]:
    found = re.findall(r'<script type="application/json" id="figure-\d+">(.*?)</script>', page, re.DOTALL)
    return [json.loads(one) for one in found]


def test_every_section_and_figure(tmp_path, told):
    page = write_routing_report(tmp_path / "page.html", told).read_text()
    sections = re.findall(r'<section id="(\w+)">', page)
    assert sections == ["load", "balance", "batch", "locality", "layers", "drift", "domains", "known"]
    drawn = figures(page)
    assert len(drawn) == 13
    load = np.array(drawn[0]["data"][0]["z"], dtype=float)
    assert load == pytest.approx(np.array([one["load"] for one in told["layers"]]), rel=5e-3)
    by_place = np.array(drawn[1]["data"][0]["z"], dtype=float)
    assert (np.diff(by_place, axis=1) <= 0).all()
    names = [trace["name"] for trace in drawn[4]["data"]]
    assert names[:3] == ["contiguous", "permuted", "eplb"]
    star = drawn[-1]["data"][-1]
    assert star["x"][0] == pytest.approx(told["busiest_over_mean"]["median"], rel=1e-3)


def test_every_known_model_stands_in_the_table_and_the_trace_first(tmp_path, told):
    page = write_routing_report(tmp_path / "page.html", told).read_text()
    rows = re.findall(r'<td data-v="([^"]*)">', page.split('id="known"')[1])
    assert unescape(rows[0]) == NAME
    assert [unescape(one) for one in rows[1:]] == [one["name"] for one in told["known"]["models"]]


def test_names_are_text(tmp_path, told):
    page = write_routing_report(tmp_path / "page.html", told).read_text()
    assert "<script>alert" not in page
    assert "<b>prose" not in page
    assert "default-src 'none'" in page


def test_counts_alone_leave_sections_out(tmp_path):
    counts = np.random.default_rng(0).integers(1, 99, (1, 3, 67))
    told = describe(RoutingTrace("counts", 67, 2, (3, 4, 5), expert_counts=counts))
    page = write_routing_report(tmp_path / "page.html", told).read_text()
    assert re.findall(r'<section id="(\w+)">', page) == ["load", "batch", "known"]
    assert "Counts only" in page


def test_a_page_that_fails_leaves_the_old_one(tmp_path, told):
    (tmp_path / "page.html").write_text("old")
    broken = {key: value for key, value in told.items() if key != "known"}
    with pytest.raises(KeyError):
        write_routing_report(tmp_path / "page.html", broken)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("page.html", "old")]
