"""Figures and traces of one timeline worked out by hand."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.engine import Program, Task, Timeline, evaluate, simulate
from moesim.errors import EngineError
from moesim.metrics import (
    WAIT,
    breakdown_s,
    busy_s,
    check_timeline,
    critical_rank,
    exposed_communication_s,
    idle_s,
    imbalance,
    lower_bound_s,
    utilisation,
    waiting_s,
    write_perfetto,
)


def step() -> Program:
    """Rank 1 is the straggler of a dispatch; a copy runs beside the experts of rank 0.

    rank 0: attention 0..1, wait 1..3, dispatch 3..5 (shared experts 3..4 beside), experts 5..6, copy 5..8
    rank 1: attention 0..3,            dispatch 3..5 (shared experts 3..4 beside), experts 5..9, copy 5..5.5
    """
    seconds = [[1.0, 3.0], 2.0, 1.0, [1.0, 4.0], [3.0, 0.5]]
    attention, dispatch, shared, experts, copy = (np.asarray(one) for one in seconds)
    return Program(
        2,
        (
            Task("attention", "compute", attention, category="attention"),
            Task("dispatch", "comm", dispatch, (0,), np.array([0, 0]), category="dispatch"),
            Task("delay", "copy", attention, category="attention"),
            Task("shared", "compute", shared, (2,), np.array([1, 1]), category="ffn"),
            Task("experts", "compute", experts, (1,), category="ffn"),
            Task("copy", "copy", copy, (1,)),
        ),
        labels=("node0/gpu0", "node0/gpu1"),
    )


@pytest.fixture
def timeline() -> Timeline:
    return simulate(step())


def test_breakdown_of_the_critical_rank(timeline: Timeline) -> None:
    assert critical_rank(timeline) == 1
    parts_s = breakdown_s(timeline)
    assert parts_s == {"attention": 3, "ffn": 5, "exposed dispatch": 1, WAIT: 0}
    assert sum(parts_s.values()) == timeline.makespan_s == 9


def test_breakdown_of_a_rank_that_waits(timeline: Timeline) -> None:
    # 1..3 waits for the dispatch's straggler, 8..9 for the end of the step
    parts_s = breakdown_s(timeline, rank=0)
    assert parts_s == {"attention": 1, "ffn": 2, "exposed dispatch": 1, "exposed copy": 2, WAIT: 3}


def test_totals_by_rank(timeline: Timeline) -> None:
    assert busy_s(timeline)["compute"].tolist() == [3, 8]
    assert busy_s(timeline)["comm"].tolist() == [2, 2]
    assert utilisation(timeline)["compute"].tolist() == pytest.approx([3 / 9, 8 / 9])
    assert exposed_communication_s(timeline).tolist() == [3, 1]
    assert idle_s(timeline).tolist() == [3, 0]
    # rank 0 waits 2 s for the dispatch and 2 s for the shared experts, which meet too
    assert waiting_s(timeline).tolist() == [4, 0]


def test_imbalance_is_largest_over_mean(timeline: Timeline) -> None:
    assert imbalance(timeline) == pytest.approx(8 / 5.5)
    assert imbalance(timeline, "dispatch") == 1
    assert imbalance(timeline, "ffn") == pytest.approx(5 / 3.5)
    assert imbalance(timeline, "no such work") == 1


def test_lower_bound_leaves_out_ranks_that_take_no_part() -> None:
    each = np.array([0, -1])
    tasks = (Task("a", "compute", np.array([1.0, 100.0]), group=each), Task("b", "compute", np.array(2.0)))
    assert lower_bound_s(Program(2, tasks)) == 3


def test_an_empty_step_has_figures_too() -> None:
    empty = evaluate(Program(2, ())).timeline()
    assert breakdown_s(empty) == {WAIT: 0}
    assert utilisation(empty)["compute"].tolist() == [0, 0]
    assert lower_bound_s(empty.program) == 0


@pytest.mark.parametrize(
    ("field", "position", "rank", "value_s", "rule"),
    [
        ("end_s", 0, 0, 0.5, "less than its duration"),
        ("ready_s", 4, 1, 4.0, "ready before its stream"),
        ("start_s", 4, 1, 4.0, "starts before it is ready"),
        ("start_s", 1, 0, 2.5, "apart from its collective"),
        ("end_s", 1, 0, float("nan"), "other ranks"),
    ],
)
def test_a_timeline_that_breaks_a_rule_is_named(
    timeline: Timeline, field: str, position: int, rank: int, value_s: float, rule: str
) -> None:
    check_timeline(timeline)
    times_s = getattr(timeline, field).copy()
    times_s[position, rank] = value_s
    with pytest.raises(EngineError, match=rule):
        check_timeline(replace(timeline, **{field: times_s}))


@pytest.mark.parametrize("name", ["step.json", "step.json.gz"])
def test_perfetto_trace_holds_every_span(timeline: Timeline, tmp_path: Path, name: str) -> None:
    path = write_perfetto(timeline, tmp_path / name)
    content = path.read_bytes()
    trace = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)
    events = trace["traceEvents"]
    names = {
        (one["pid"], one.get("tid")): one["args"]["name"] for one in events if one["name"].endswith("_name")
    }
    assert names[0, None] == "node0/gpu0"
    spans = [one for one in events if one["ph"] == "X"]
    assert len(spans) == 12
    (dispatch,) = [one for one in spans if one["name"] == "dispatch" and one["pid"] == 0]
    assert names[0, dispatch["tid"]] == "comm"
    assert (dispatch["ts"], dispatch["dur"], dispatch["cat"]) == (3e6, 2e6, "dispatch")
    assert dispatch["args"] == {"task": 1, "ready_us": 1e6, "waiting_us": 2e6}
    assert [one.name for one in tmp_path.iterdir()] == [name]


def test_same_timeline_same_bytes(timeline: Timeline, tmp_path: Path) -> None:
    first, second = (write_perfetto(timeline, tmp_path / name).read_bytes() for name in ("a.gz", "b.gz"))
    assert first == second


def test_ranks_without_labels_are_numbered(tmp_path: Path) -> None:
    path = write_perfetto(simulate(replace(step(), labels=())), tmp_path / "step.json")
    assert '"rank 1"' in path.read_text()


def test_nothing_half_written_stays(timeline: Timeline, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_perfetto(timeline, tmp_path / "taken")
    assert [one.name for one in tmp_path.iterdir()] == ["taken"]
