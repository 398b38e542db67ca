"""Both executors on random programs: they agree, and the orderings that must hold do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine import STREAMS, Program, Task, Timeline, evaluate, makespan, simulate
from moesim.engine.folding import fold
from moesim.metrics import (
    WAIT,
    breakdown_s,
    busy_s,
    check_timeline,
    exposed_communication_s,
    idle_s,
    lower_bound_s,
)

RTOL = 1e-9
EXAMPLES = settings(max_examples=60, deadline=None)

seeds = st.integers(0, 2**32 - 1)


def groupings(rng: np.random.Generator, n_ranks: int) -> np.ndarray:
    """One membership: everyone, blocks, strided blocks, at random with absentees, or each alone."""
    ranks = np.arange(n_ranks)
    size = int(rng.integers(1, n_ranks + 1))
    return [
        np.zeros(n_ranks, dtype=np.int64),
        ranks // size,
        ranks % size,
        rng.integers(-1, size, n_ranks),
        np.where(rng.random(n_ranks) < 0.5, ranks, -1),
    ][rng.integers(5)]


def durations(rng: np.random.Generator, n_points: int, n_ranks: int) -> np.ndarray:
    """Times in us of any broadcastable shape, some zero, some equal so that events tie."""
    shape = [(n_points, n_ranks), (n_points, 1), (1, n_ranks), (n_ranks,), ()][rng.integers(5)]
    values = rng.exponential(1e-5, shape) if rng.random() < 0.6 else rng.integers(0, 4, shape) * 1e-6
    return np.asarray(values, dtype=np.float64)


def random_program(seed: int, link: str | None = None) -> Program:
    """Layers of two micro-batches: compute, then collectives that overlap with the other half."""
    rng = np.random.default_rng(seed)
    n_ranks, n_points, n_layers = (int(rng.integers(1, high)) for high in (9, 4, 5))
    memberships = [groupings(rng, n_ranks) for _ in range(3)]
    tasks: list[Task] = []
    for layer in range(n_layers):
        for half in range(2):
            for step in range(int(rng.integers(1, 6))):
                n_after = min(len(tasks), int(rng.integers(0, 4)))
                recent = np.arange(max(0, len(tasks) - 8), len(tasks))
                after = rng.choice(recent, min(n_after, recent.size), replace=False) if tasks else []
                group = memberships[rng.integers(3)] if rng.random() < 0.6 else None
                tasks.append(
                    Task(
                        name=f"{layer}.{half}.{step}",
                        stream=STREAMS[rng.integers(3)],
                        duration_s=durations(rng, n_points, n_ranks),
                        after=tuple(int(one) for one in after),
                        group=group,
                        category=f"kind{rng.integers(3)}",
                        link=link if rng.random() < 0.7 else None,
                    )
                )
    return Program(n_ranks, tuple(tasks), n_points)


def assert_same(one: Timeline, other: Timeline, rtol: float = RTOL) -> None:
    for name in ("ready_s", "start_s", "end_s"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=rtol, atol=1e-18)


@EXAMPLES
@given(seed=seeds)
def test_simulation_without_overlapping_links_is_the_recurrence(seed: int) -> None:
    program = random_program(seed)
    schedule = evaluate(program)
    for point in range(program.n_points):
        timeline = simulate(program, point)
        assert_same(timeline, schedule.timeline(point))
        assert timeline.makespan_s == pytest.approx(schedule.makespan_s[point], rel=RTOL, abs=0)


@EXAMPLES
@given(seed=seeds)
def test_both_executors_keep_the_rules_of_the_program(seed: int) -> None:
    program = random_program(seed, link="nic")
    check_timeline(evaluate(program).timeline(program.n_points - 1))
    check_timeline(simulate(program, program.n_points - 1))


@EXAMPLES
@given(seed=seeds)
def test_lean_makespan_is_that_of_the_full_schedule(seed: int) -> None:
    program = random_program(seed)
    np.testing.assert_array_equal(makespan(program), evaluate(program).makespan_s)


@EXAMPLES
@given(seed=seeds)
def test_makespan_is_at_least_every_stream_of_every_rank(seed: int) -> None:
    program = random_program(seed, link="nic")
    timeline = simulate(program)
    assert timeline.makespan_s >= lower_bound_s(program) * (1 - RTOL)
    for held_s in busy_s(timeline).values():
        assert np.all(held_s <= timeline.makespan_s * (1 + RTOL))


@EXAMPLES
@given(seed=seeds)
def test_same_program_same_timeline(seed: int) -> None:
    first, second = (simulate(random_program(seed, link="nic")) for _ in range(2))
    assert_same(first, second, rtol=0)


@EXAMPLES
@given(seed=seeds)
def test_one_dependency_more_never_shortens(seed: int) -> None:
    program = random_program(seed)
    rng = np.random.default_rng(seed)
    later = int(rng.integers(len(program.tasks)))
    tasks = list(program.tasks)
    if later:
        tasks[later] = replace(tasks[later], after=(*tasks[later].after, int(rng.integers(later))))
    bound = Program(program.n_ranks, tuple(tasks), program.n_points)
    assert np.all(makespan(bound) >= makespan(program))


@EXAMPLES
@given(seed=seeds)
def test_renumbered_ranks_give_renumbered_times(seed: int) -> None:
    program = random_program(seed, link="nic")
    order = np.random.default_rng(seed).permutation(program.n_ranks)
    full = (program.n_points, program.n_ranks)
    tasks = tuple(
        replace(
            task,
            duration_s=np.broadcast_to(task.duration_s, full)[:, order],
            group=None if task.group is None else task.group[order],
        )
        for task in program.tasks
    )
    renumbered = Program(program.n_ranks, tasks, program.n_points)
    np.testing.assert_array_equal(evaluate(renumbered).end_s, evaluate(program).end_s[:, :, order])
    np.testing.assert_allclose(
        simulate(renumbered).end_s, simulate(program).end_s[:, order], rtol=RTOL, atol=1e-18
    )


@EXAMPLES
@given(seed=seeds)
def test_contention_only_lengthens(seed: int) -> None:
    program = random_program(seed, link="nic")
    shared, alone = simulate(program), simulate(program, contention=False)
    slack_s = RTOL * shared.makespan_s
    takes_part = ~np.isnan(alone.end_s)
    assert np.all((shared.end_s >= alone.end_s - slack_s)[takes_part])


@EXAMPLES
@given(seed=seeds)
def test_work_of_a_shared_link_is_conserved(seed: int) -> None:
    """Local tasks of one link on one rank: while any is in flight, the link moves one second a second."""
    rng = np.random.default_rng(seed)
    works_s = rng.exponential(1e-5, (3, 4))
    tasks = tuple(
        Task(f"{stream}{i}", stream, np.array([works_s[which, i]]), link="nic")
        for which, stream in enumerate(STREAMS)
        for i in range(4)
    )
    assert simulate(Program(1, tasks)).makespan_s == pytest.approx(works_s.sum(), rel=RTOL)


@EXAMPLES
@given(seed=seeds)
def test_a_collective_starts_when_its_last_member_is_ready(seed: int) -> None:
    program = random_program(seed, link="nic")
    timeline = simulate(program)
    for position, task in enumerate(program.tasks):
        if task.group is None:
            np.testing.assert_array_equal(timeline.start_s[position], timeline.ready_s[position])
            continue
        for one in set(task.group.tolist()) - {-1}:
            starts_s = timeline.start_s[position, task.group == one]
            assert set(starts_s) == {timeline.ready_s[position, task.group == one].max()}


@EXAMPLES
@given(seed=seeds, n_copies=st.integers(1, 4))
def test_folding_changes_nothing(seed: int, n_copies: int) -> None:
    """Copies of a whole program side by side fold back; the times stay those of every rank."""
    program = random_program(seed, link="nic")
    full = (program.n_points, program.n_ranks)
    tasks = tuple(
        replace(
            task,
            duration_s=np.tile(np.broadcast_to(task.duration_s, full), n_copies),
            group=None
            if task.group is None
            else np.concatenate(
                [np.where(task.group < 0, -1, task.group + 100 * i) for i in range(n_copies)]
            ),
        )
        for task in program.tasks
    )
    copied = Program(program.n_ranks * n_copies, tasks, program.n_points)
    assert fold(copied, 0).program.n_ranks <= program.n_ranks
    assert_same(simulate(copied), simulate(copied, folding=False))


@EXAMPLES
@given(seed=seeds)
def test_parts_of_a_step_add_up_to_it(seed: int) -> None:
    timeline = simulate(random_program(seed, link="nic"))
    exposed_s, idle = exposed_communication_s(timeline), idle_s(timeline)
    computing_s = busy_s(timeline)["compute"]
    for rank in range(timeline.program.n_ranks):
        parts_s = breakdown_s(timeline, rank)
        assert sum(parts_s.values()) == pytest.approx(timeline.makespan_s, rel=RTOL)
        assert all(part_s >= 0 for part_s in parts_s.values())
        assert parts_s[WAIT] == idle[rank]
        whole_s = computing_s[rank] + exposed_s[rank] + idle[rank]
        assert whole_s == pytest.approx(timeline.makespan_s, rel=RTOL)
