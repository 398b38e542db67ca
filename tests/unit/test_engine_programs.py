"""Small programs with times worked out by hand, on both executors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from moesim.engine import Program, Task, Timeline, evaluate, makespan, simulate
from moesim.engine.folding import fold
from moesim.errors import EngineError

NAN = float("nan")
EVERYONE = np.zeros(2, dtype=np.int64)


def task(name: str, stream: str, duration_s: object, **extra: object) -> Task:
    return Task(name, stream, np.asarray(duration_s, dtype=np.float64), **extra)  # type: ignore[arg-type]


def by_recurrence(program: Program) -> Timeline:
    return evaluate(program).timeline()


both = pytest.mark.parametrize("run", [by_recurrence, simulate], ids=["recurrence", "simulation"])
Run = Callable[[Program], Timeline]


@both
def test_a_stream_runs_in_order_and_streams_overlap(run: Run) -> None:
    program = Program(
        1,
        (
            task("a", "compute", 2.0),
            task("b", "comm", 5.0),
            task("c", "compute", 1.0),
            task("d", "comm", 1.0),
        ),
    )
    timeline = run(program)
    assert timeline.start_s[:, 0].tolist() == [0, 0, 2, 5]
    assert timeline.end_s[:, 0].tolist() == [2, 5, 3, 6]
    assert timeline.makespan_s == 6


@both
def test_a_task_waits_for_other_streams_where_told(run: Run) -> None:
    program = Program(
        2,
        (
            task("a", "compute", [2.0, 3.0]),
            task("b", "comm", 5.0, after=(0,)),
            task("c", "copy", 1.0, after=(0, 1)),
        ),
    )
    timeline = run(program)
    assert timeline.start_s[1].tolist() == [2, 3]
    assert timeline.start_s[2].tolist() == [7, 8]


@both
def test_a_collective_waits_for_its_last_member_and_each_keeps_its_own_time(run: Run) -> None:
    program = Program(
        2,
        (
            task("a", "compute", [1.0, 4.0]),
            task("dispatch", "comm", [2.0, 0.5], after=(0,), group=EVERYONE),
            task("b", "compute", 1.0, after=(1,)),
        ),
    )
    timeline = run(program)
    assert timeline.ready_s[1].tolist() == [1, 4]
    assert timeline.start_s[1].tolist() == [4, 4]
    assert timeline.end_s[1].tolist() == [6, 4.5]
    assert timeline.start_s[2].tolist() == [6, 4.5]


@both
def test_a_rank_that_takes_no_part_goes_on_and_its_skipped_dependency_is_met(run: Run) -> None:
    only_first = np.array([0, -1])
    program = Program(
        2,
        (
            task("a", "compute", [3.0, 9.0], group=only_first),
            task("b", "comm", 1.0, after=(0,)),
            task("c", "compute", 1.0),
        ),
    )
    timeline = run(program)
    np.testing.assert_array_equal(timeline.end_s[0], [3.0, NAN])
    assert timeline.start_s[1].tolist() == [3, 0]
    assert timeline.start_s[2].tolist() == [3, 0]
    assert [span.name for span in timeline.spans(rank=1)] == ["b", "c"]


@both
def test_ranks_with_an_id_each_are_local(run: Run) -> None:
    each = np.array([3, 7])
    program = Program(2, (task("a", "compute", [1.0, 2.0]), task("b", "compute", 1.0, group=each)))
    assert run(program).start_s[1].tolist() == [1, 2]


@both
def test_groups_of_any_shape_meet_apart(run: Run) -> None:
    program = Program(
        6,
        (
            task("a", "compute", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            task("strided", "compute", 0.0, group=np.array([0, 1, 0, 1, 0, 1])),
            task("b", "compute", 0.0, group=np.array([9, -1, 4, 4, -1, 9])),
        ),
    )
    timeline = run(program)
    assert timeline.start_s[1].tolist() == [5, 6, 5, 6, 5, 6]
    np.testing.assert_array_equal(timeline.start_s[2], [6, NAN, 6, 6, NAN, 6])


@both
def test_a_program_without_tasks_takes_no_time(run: Run) -> None:
    timeline = run(Program(3, ()))
    assert timeline.makespan_s == 0
    assert list(timeline.spans()) == []


def test_points_are_independent() -> None:
    program = Program(
        2,
        (task("a", "compute", [[1.0], [10.0]]), task("b", "comm", 1.0, after=(0,), group=EVERYONE)),
        n_points=2,
    )
    assert makespan(program).tolist() == [2, 11]
    assert evaluate(program).end_s.shape == (2, 2, 2)
    assert simulate(program, 1).makespan_s == 11


def overlapping(works_s: list[float], late_s: float = 0.0, **second: object) -> Program:
    """Two tasks on one NIC: one on comm from 0, one on copy from `late_s`."""
    return Program(
        2,
        (
            task("delay", "compute", late_s),
            task("a", "comm", works_s[0], link="nic"),
            task("b", "copy", works_s[1], after=(0,), **({"link": "nic"} | second)),
        ),
    )


def test_two_tasks_on_one_link_go_at_half_speed_while_both_last() -> None:
    # a alone 0..1 does 1 of 3; both at 1/2 until b has done its 1 (t = 3, a has 2); a alone 3..4
    timeline = simulate(overlapping([3.0, 1.0], late_s=1.0))
    assert timeline.end_s[1].tolist() == pytest.approx([4, 4])
    assert timeline.end_s[2].tolist() == pytest.approx([3, 3])


@pytest.mark.parametrize("second", [{"link": "nvlink"}, {"link": None}], ids=["other link", "no link"])
def test_tasks_on_different_links_do_not_touch(second: dict[str, object]) -> None:
    timeline = simulate(overlapping([3.0, 1.0], late_s=1.0, **second))
    assert timeline.end_s[1:, 0].tolist() == [3, 2]


def test_contention_can_be_switched_off() -> None:
    assert simulate(overlapping([3.0, 1.0]), contention=False).makespan_s == 3


def test_a_collective_goes_at_the_pace_of_its_most_crowded_link() -> None:
    # rank 0 shares its NIC with a local copy of 1 s: half speed for both ranks until t = 2, then full
    program = Program(
        2,
        (
            task("local", "copy", [1.0, 0.0], group=np.array([0, -1]), link="nic"),
            task("dispatch", "comm", [2.0, 3.0], group=EVERYONE, link="nic"),
        ),
    )
    timeline = simulate(program)
    assert timeline.end_s[0, 0] == pytest.approx(2)
    assert timeline.end_s[1].tolist() == pytest.approx([3, 4])


def test_a_member_that_has_ended_frees_its_link() -> None:
    # rank 0 leaves the collective at t = 1, so its copy, which begins then, runs alone
    program = Program(
        2,
        (
            task("a", "compute", 1.0),
            task("dispatch", "comm", [1.0, 5.0], group=EVERYONE, link="nic"),
            task("local", "copy", 2.0, after=(0,), group=np.array([0, -1]), link="nic"),
        ),
    )
    timeline = simulate(program)
    assert timeline.end_s[2, 0] == pytest.approx(3)
    assert timeline.end_s[1].tolist() == pytest.approx([1, 5])


def test_three_streams_share_one_link_in_thirds() -> None:
    program = Program(1, tuple(task(s, s, 1.0, link="pcie") for s in ("compute", "comm", "copy")))
    assert simulate(program).end_s[:, 0].tolist() == pytest.approx([3, 3, 3])


def test_copies_fold_to_one_rank_and_a_straggler_stays_apart() -> None:
    slow = np.ones(8)
    slow[3] = 2.0
    pairs = np.arange(8) // 2
    program = Program(8, (task("a", "compute", slow), task("b", "comm", 1.0, after=(0,), group=pairs)))
    folding = fold(program, 0)
    # the straggler, the rank that waits for it, and the six others
    assert folding.program.n_ranks == 3
    assert folding.class_of.tolist() == [0, 0, 1, 2, 0, 0, 0, 0]
    assert simulate(program).end_s[1].tolist() == [2, 2, 3, 3, 2, 2, 2, 2]


def test_durations_of_ranks_that_take_no_part_do_not_keep_ranks_apart() -> None:
    program = Program(3, (task("a", "compute", [1.0, 2.0, 3.0], group=np.array([0, -1, -1])),))
    assert fold(program, 0).class_of.tolist() == [0, 1, 1]


def test_spans_carry_the_task() -> None:
    program = Program(1, (task("moe.3.dispatch", "comm", 2.0, category="dispatch"),))
    (span,) = simulate(program).spans()
    assert (span.name, span.stream, span.category, span.rank) == ("moe.3.dispatch", "comm", "dispatch", 0)
    assert (span.ready_s, span.start_s, span.end_s) == (0, 0, 2)


def build(n_ranks: int = 2, n_points: int = 1, labels: tuple[str, ...] = (), **changed: object) -> Program:
    values = {"stream": "compute", "duration_s": 1.0} | changed
    return Program(n_ranks, (task("x", **values),), n_points, labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"stream": "nccl"}, "a stream is one of"),
        ({"after": (0,)}, "waits only for earlier"),
        ({"after": (-1,)}, "waits only for earlier"),
        ({"group": np.zeros(3, dtype=np.int64)}, "one entry per rank"),
        ({"group": np.zeros(2)}, "group id is an integer"),
        ({"group": np.array([0, -2])}, "group id is an integer"),
        ({"duration_s": [1.0, 2.0, 3.0]}, "does not broadcast"),
        ({"duration_s": [[1.0], [2.0]]}, "does not broadcast"),
        ({"duration_s": [[[1.0]]]}, "does not broadcast"),
        ({"n_ranks": 0}, "at least 1"),
        ({"n_points": 0}, "at least 1"),
        ({"labels": ("one",)}, "labels name all 2 ranks"),
    ],
)
def test_a_program_that_cannot_run_is_refused(changed: dict[str, object], rule: str) -> None:
    with pytest.raises(EngineError, match=rule):
        build(**changed)  # type: ignore[arg-type]


@both
@pytest.mark.parametrize("bad_s", [-1.0, NAN, float("inf")])
def test_a_duration_that_is_no_time_is_refused_with_its_task(run: Run, bad_s: float) -> None:
    with pytest.raises(EngineError, match=r"^x: .* finite and >= 0 s"):
        run(build(duration_s=[1.0, bad_s]))


@pytest.mark.parametrize("bad_s", [NAN, float("inf")])
def test_makespan_refuses_what_is_not_finite(bad_s: float) -> None:
    with pytest.raises(EngineError, match="finite"):
        makespan(build(duration_s=bad_s))


@pytest.mark.parametrize("point", [-1, 2])
def test_a_point_that_the_program_has_not_is_refused(point: int) -> None:
    with pytest.raises(EngineError, match="points 0 to 1"):
        simulate(build(n_points=2), point)
