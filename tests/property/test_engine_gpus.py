"""Tasks that overlap on one GPU: what they share, and what they never gain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine import Draw, Flows, Network, Program, Sharing, Task, simulate
from moesim.engine.gpus import Work, even_stretches, paces
from moesim.errors import EngineError

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)
stretches = st.sampled_from([1.0, 1.14, 1.5])
shares = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=5)
N_RANKS = 4
SLOWER = Sharing(1.5, 1.25)


def random_program(
    seed: int, sharing: Sharing | None, streams: tuple[str, ...] = ("compute", "comm")
) -> Program:
    """Tasks of single ranks, and exchanges of all of them, on one stream or several."""
    rng = np.random.default_rng(seed)
    tasks: list[Task] = []
    for number in range(12):
        stream = str(rng.choice(streams))
        after = (int(rng.integers(number)),) if number and rng.random() < 0.4 else ()
        draw = Draw(rng.choice([0.0, 0.3, 0.8, 1.0], N_RANKS), by_sms=stream == "comm")
        group = np.zeros(N_RANKS, dtype=np.int64) if stream == "comm" else None
        time_s = rng.choice([0.0, 1.0, 2.0, 3.5], N_RANKS)
        tasks.append(Task(str(number), stream, time_s, after, group, draw=draw))
    return Program(N_RANKS, tuple(tasks), sharing=sharing)


@few
@given(seed=seeds, exchange=stretches, compute=stretches)
def test_nothing_is_faster_than_alone(seed: int, exchange: float, compute: float) -> None:
    program = random_program(seed, Sharing(exchange, compute))
    timeline = simulate(program)
    for position, task in enumerate(program.tasks):
        took_s = timeline.end_s[position] - timeline.start_s[position]
        assert np.all(took_s >= np.asarray(task.duration_s) * (1 - 1e-12) - 1e-12)
    # nor is anything idle: a task is slowed by the stretch and by memory that at most two tasks share, no more
    alone_s = simulate(program, contention=False).makespan_s
    assert timeline.makespan_s <= alone_s * max(exchange, compute) * 2 * (1 + 1e-9)


@few
@given(seed=seeds)
def test_without_overlap_nothing_changes(seed: int) -> None:
    program = random_program(seed, SLOWER, streams=("compute",))
    assert np.array_equal(simulate(program).end_s, simulate(replace(program, sharing=None)).end_s)


@few
@given(seed=seeds)
def test_memory_that_suffices_and_no_stretch_change_nothing(seed: int) -> None:
    program = random_program(seed, Sharing())
    tasks = tuple(replace(task, draw=Draw(np.full(N_RANKS, 0.5), task.draw.by_sms)) for task in program.tasks)
    alone = simulate(replace(program, sharing=None))
    assert simulate(replace(program, tasks=tasks)).end_s == pytest.approx(alone.end_s, rel=1e-12)


@few
@given(seed=seeds)
def test_folded_ranks_and_the_order_of_ranks_do_not_matter(seed: int) -> None:
    program = random_program(seed, SLOWER)
    ends_s = simulate(program).end_s
    assert simulate(program, folding=False).end_s == pytest.approx(ends_s, rel=1e-12)
    order = np.random.default_rng(seed).permutation(N_RANKS)
    tasks = tuple(
        replace(
            task, duration_s=task.duration_s[order], draw=replace(task.draw, memory=task.draw.memory[order])
        )
        for task in program.tasks
    )
    assert simulate(replace(program, tasks=tasks)).end_s == pytest.approx(ends_s[:, order], rel=1e-12)


@few
@given(needs=shares)
def test_memory_is_shared_max_min_fairly(needs: list[tuple[float, bool]]) -> None:
    env = simpy.Environment()
    works = [Work(env, memory, by_sms) for memory, by_sms in needs]
    found = paces(works, Sharing())
    given_ = [pace * work.memory for pace, work in zip(found, works, strict=True)]
    assert all(0 < pace <= 1 for pace in found)
    assert sum(given_) <= max(1.0, max(work.memory for work in works)) * (1 + 1e-9)
    slowed = [share for share, pace in zip(given_, found, strict=True) if pace < 1 - 1e-9]
    if slowed:
        assert sum(given_) == pytest.approx(1.0)
        assert min(slowed) >= max(given_) * (1 - 1e-9)


@few
@given(compute_s=st.floats(0, 10), exchange_s=st.floats(0, 10), exchange=stretches, compute=stretches)
def test_halves_that_take_turns_are_stretched_as_one_long_overlap(
    compute_s: float, exchange_s: float, exchange: float, compute: float
) -> None:
    """Both end as one task of each that begin together do in the engine, the shorter stretched all the time."""
    sharing = Sharing(exchange, compute)
    found = even_stretches(np.array([compute_s]), np.array([exchange_s]), sharing)
    tasks = (
        Task("experts", "compute", np.array([compute_s]), draw=Draw(np.array(0.0))),
        Task("dispatch", "comm", np.array([exchange_s]), draw=Draw(np.array(0.0), by_sms=True)),
    )
    ends_s = simulate(Program(1, tasks, sharing=sharing)).end_s.ravel()
    assert [compute_s * found[0][0], exchange_s * found[1][0]] == pytest.approx(ends_s, rel=1e-9, abs=1e-12)


def two(exchange: Draw, compute: Draw, sharing: Sharing, exchange_s: float = 3.0) -> tuple[float, float]:
    """Ends of an exchange and of 2 s of compute that begin together on one GPU."""
    tasks = (
        Task("dispatch", "comm", np.array([exchange_s]), draw=exchange),
        Task("experts", "compute", np.array([2.0]), draw=compute),
    )
    ends_s = simulate(Program(1, tasks, sharing=sharing)).end_s
    return float(ends_s[0, 0]), float(ends_s[1, 0])


def test_both_are_stretched_while_they_overlap() -> None:
    # compute takes 2 x 1.25; until then the exchange has done 2.5 / 1.5 of its 3 s, and goes on alone
    ends_s = two(Draw(np.array(0.1), by_sms=True), Draw(np.array(0.1)), SLOWER)
    assert ends_s == pytest.approx((2.5 + 3.0 - 2.5 / 1.5, 2.5))


def test_copies_without_sms_share_memory_alone() -> None:
    # together they need 1.2 of the memory: the exchange has its 0.4, compute 0.6 of the 0.8 that it needs
    ends_s = two(Draw(np.array(0.4)), Draw(np.array(0.8)), SLOWER)
    assert ends_s == pytest.approx((3.0, 2.0 / 0.75), rel=1e-12)
    short = two(Draw(np.array(0.4)), Draw(np.array(0.8)), SLOWER, exchange_s=1.5)
    # 1.5 s at 0.75 leave 0.875 s of compute
    assert short == pytest.approx((1.5, 1.5 + 2.0 - 1.5 * 0.75), rel=1e-12)


def test_the_delay_of_bytes_is_stretched_with_the_rest() -> None:
    """2 s of bytes from rank 0 to 1; compute on rank 1 alone, all the while."""
    alone_s = np.array([2.0, 2.0])
    flows = Flows(np.array([0]), np.array([1]), np.array([[0]]), np.array([2.0]), np.zeros(1), alone_s)
    group = np.zeros(2, dtype=np.int64)
    sent = Task("dispatch", "comm", alone_s, (), group, flows=flows, draw=Draw(np.array(0.0), by_sms=True))
    busy = Task("experts", "compute", np.array([0.0, 9.0]), draw=Draw(np.array(0.0)))
    timeline = simulate(Program(2, (sent, busy), network=Network(np.array([1.0])), sharing=SLOWER))
    assert timeline.end_s[0] == pytest.approx([2.0, 3.0])


def test_impossible_sharing_is_refused() -> None:
    with pytest.raises(EngineError, match=r"0\.9: exchange beside the other takes at least as long as alone"):
        Sharing(exchange_stretch=0.9)
    with pytest.raises(EngineError, match="nan: compute beside the other"):
        Sharing(compute_stretch=float("nan"))
    with pytest.raises(EngineError, match="a: a task needs from none to all of the memory's rate"):
        Program(1, (Task("a", "compute", np.array([1.0]), draw=Draw(np.array(1.5))),))
