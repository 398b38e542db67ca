"""Measuring collectives between real processes over gloo, and what needs no process: plans, splits, stamps."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from calibrate.collectives import world as world_module
from calibrate.collectives.book import Book
from calibrate.collectives.groups import Group, groups_of, pairs_of
from calibrate.collectives.job import Plan, Wanted
from calibrate.collectives.payload import payload_of
from calibrate.collectives.plan import is_held_out, plan_points
from calibrate.collectives.points import OPS, Point, parse_sizes
from calibrate.collectives.samples import CommonClock, Stamps, collective_times_s
from calibrate.collectives.splits import as_equal_elements, split_elements, token_shares
from calibrate.collectives.world import Rank, Watchdog, World, rank_of
from calibrate.recorder import Recorder
from calibrate.run.command import app
from calibrate.tables import read_table
from moesim.errors import HardwareError, LayoutError, MeasurementError, UnitError
from moesim.routing import catalog_routing
from tests.rank_launcher import job

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = ["-m", "calibrate", "run", "collectives"]

# ---------------------------------------------------------------- real processes


@pytest.mark.slow
def test_torchrun_measures_every_operation_and_a_second_run_adds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "links.csv"
    options = ["--backend", "gloo", "--sizes", "1KiB,16KiB", "--budget", "1m", "-o", str(out)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = subprocess.run(
        [*launch, *COMMAND, *options],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = read_table(out).frame
    assert set(rows["op"]) == set(OPS)
    assert set(rows["n_ranks"]) == {2}
    assert set(rows["n_nodes"]) == {1}
    assert len(rows) == 2 * (len(OPS) + 1)  # the all-to-all is split by routing, too
    assert (rows["latency_p10_s"] <= rows["latency_s"]).all()
    assert (rows["message_bytes"] == 2 * rows["message_elements"]).all()
    assert (rows.loc[rows["op"] != "send_recv", "start_skew_s"] >= 0).all()

    before = out.read_bytes()
    with job(tmp_path, 2, *options) as again:
        first, second = again.end()
    assert (first.code, second.code) == (0, 0)
    assert f"0 points, {len(rows)} were there" in first.out
    assert out.read_bytes() == before


def test_four_ranks_exchange_uneven_parts(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "links.csv"
    options = ["--backend", "gloo", "--ops", "all_to_all", "--sizes", "4KiB", "--trace", "deepseek-v3-decode"]
    with job(tmp_path, 4, *options, "--dtype", "float32", "-o", str(out)) as running:
        found = running.end()
    assert [rank.code for rank in found] == [0, 0, 0, 0], found
    rows = read_table(out).frame.set_index(["n_ranks", "split"])
    assert rows.loc[(4, "equal"), "message_bytes"] == 4096
    # every rank sends as much as in the equal split, and some rank receives more
    assert rows.loc[(4, "trace"), "message_bytes"] > 4096
    assert set(rows["implementation"]) == {"gloo"}


def test_a_rank_that_dies_ends_the_others_and_keeps_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "links.csv"
    options = ["--backend", "gloo", "--sizes", "1KiB..64MiB", "--timeout", "20s", "-o", str(out)]
    with job(tmp_path, 2, *options) as running:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not out.is_file() or out.read_bytes().count(b"\n") < 3):
            time.sleep(0.05)
        os.kill(running.pids[1], signal.SIGKILL)
        survivor, _ = running.end()
    assert survivor.code == 1
    assert len(survivor.errors) == 1
    assert "rank 0 ended" in survivor.errors[0]
    assert "the same command resumes" in survivor.errors[0]
    assert len(read_table(out).frame) >= 2


def test_nccl_without_a_gpu_is_refused_on_every_rank(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with job(tmp_path, 2, "--backend", "nccl", "-o", str(tmp_path / "links.csv")) as running:
        first, second = running.end()
    assert (first.code, second.code) == (2, 2)
    assert len(first.errors) == 1
    assert "NCCL needs a CUDA GPU for every rank" in first.errors[0]
    assert "--backend gloo" in first.errors[0]
    assert second.errors == []
    assert not (tmp_path / "links.csv").exists()


# ---------------------------------------------------------------- what the command line says


def test_one_process_alone_is_told_how_to_start_several() -> None:
    with pytest.raises(LayoutError, match=r"^1: a collective is between two .* torchrun --nnodes"):
        rank_of({})
    with pytest.raises(LayoutError, match="whole numbers"):
        rank_of({"WORLD_SIZE": "two"})
    me = rank_of({"WORLD_SIZE": "16", "RANK": "9", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"})
    assert (me.rank, me.n_ranks, me.local_rank, me.n_local) == (9, 16, 1, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "mpi"], "--backend: 'mpi': is no backend; fix: use nccl or gloo"),
        (["--ops", "all_to_all,gather"], "--ops: 'gather': is not known here; fix: send_recv, all_to_all"),
        (["--dtype", "fp4"], "--dtype: 'fp4': is not known here; fix: bfloat16"),
        (["--backend", "gloo", "--one-gpu-sockets"], "--one-gpu-sockets: is about NCCL"),
        (["--sizes", "5KiB..1KiB"], "--sizes: '5KiB..1KiB': sizes ascend from one byte"),
        (["--sizes", "3..7"], "--sizes: '3..7': a size in bytes needs a unit; fix: write 1KiB..1GiB"),
        (["--budget", "abc"], "--budget: 'abc': is not a time; fix: write a number and s, m or h"),
        (["--timeout", "-3s"], "--timeout: '-3s': must be above 0; fix: write a number and s, m or h"),
    ],
)
def test_rank_0_refuses_an_option_in_one_line(
    options: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises((MeasurementError, UnitError)) as refused:
        app(["collectives", "-o", str(tmp_path / "links.csv"), *options], standalone_mode=False)
    assert str(refused.value).startswith(said)


def world_of(n_devices: int, *, one_gpu: bool) -> World:
    """Rank 3 of 4 on a host with some GPUs, before it takes one."""
    cuda = SimpleNamespace(
        device_count=lambda: n_devices, is_available=lambda: n_devices > 0, set_device=lambda index: None,
        mem_get_info=lambda: (1000, 2000), nccl=SimpleNamespace(version=lambda: (2, 29, 7)),
    )  # fmt: skip
    world = World.__new__(World)
    world.me, world.backend, world.one_gpu, world.device = Rank(3, 4, 3, 4), "nccl", one_gpu, "cpu"
    world.torch = SimpleNamespace(cuda=cuda, __version__="2.13.0")
    world.dist = SimpleNamespace(is_nccl_available=lambda: True)
    return world


def test_every_rank_takes_a_gpu_of_its_own_or_says_that_there_is_none() -> None:
    world = world_of(4, one_gpu=False)
    world.take_device()
    assert (world.device, world.free_bytes()) == ("cuda:3", 1000)
    assert world.software() == "nccl 2.29.7, torch 2.13.0"
    with pytest.raises(HardwareError, match=r"sees 1 for 4 on this host; fix: .*--one-gpu-sockets"):
        world_of(1, one_gpu=False).take_device()
    with pytest.raises(HardwareError, match=r"sees 0 for 4 on this host; fix: use --backend gloo$"):
        world_of(0, one_gpu=False).take_device()
    with pytest.raises(
        HardwareError, match=r"^--one-gpu-sockets: needs one CUDA GPU .*fix: run on a machine with"
    ):
        world_of(0, one_gpu=True).take_device()


def test_ranks_of_one_gpu_pass_for_different_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"NCCL_MAX_CTAS": "4"})
    world = world_of(1, one_gpu=True)
    world.take_device()
    assert (world.device, world.free_bytes()) == ("cuda:0", 250)
    assert os.environ["NCCL_HOSTID"] == "rank3"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_MAX_CTAS"] == "4"  # what is set stays


def test_sizes_are_a_range_or_a_list() -> None:
    assert parse_sizes("1KiB..8KiB") == [1024, 2048, 4096, 8192]
    assert parse_sizes("1 MiB, 2KiB") == [2048, 2**20]
    assert parse_sizes("3KiB..7KiB") == [3072, 6144]
    for wrong in ("8KiB..1KiB", "1KiB..", "1KiB..2KiB..3KiB", "", "0B"):
        with pytest.raises(MeasurementError, match="--sizes"):
            parse_sizes(wrong)
    with pytest.raises(UnitError):
        parse_sizes("1024")


def test_a_hung_point_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(world_module.os, "_exit", codes.append)
    Watchdog(0.05, rank=3).expect("all_to_all of 8 elements")
    deadline = time.monotonic() + 10
    while not codes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert codes == [1]
    assert "rank 3: all_to_all of 8 elements did not end within 0.05 s" in capsys.readouterr().err


# ---------------------------------------------------------------- who measures together


def test_groups_span_a_node_and_nodes_and_none_twice() -> None:
    groups = groups_of(["a"] * 4 + ["b"] * 4)
    assert {(group.ranks, group.n_nodes) for group in groups} == {
        ((0, 1, 2, 3, 4, 5, 6, 7), 2),
        ((0, 4), 2),
        ((0, 1, 2, 3), 1),
        ((0, 1), 1),
    }
    assert groups[0].size == 8
    assert {pair.ranks for pair in pairs_of(["a"] * 4 + ["b"] * 4)} == {(0, 4), (0, 1)}


def test_groups_of_nodes_with_one_rank_and_of_odd_numbers() -> None:
    assert [(group.ranks, group.n_nodes) for group in groups_of(["a", "b", "c"])] == [
        ((0, 1, 2), 3),
        ((0, 1), 2),
    ]
    assert [pair.ranks for pair in pairs_of(["a", "b", "c"])] == [(0, 1)]
    # ranks dealt out over nodes instead of node by node
    assert [pair.ranks for pair in pairs_of(["a", "b", "a", "b"])] == [(0, 1), (0, 2)]
    assert [pair.n_nodes for pair in pairs_of(["a", "a"])] == [1]


def planned(sizes: Sequence[int], **changes: Any) -> list[Point]:
    group, pair = Group((0, 1, 2), 1), Group((0, 1), 1)
    options: dict[str, Any] = {
        "item_bytes": 2, "largest_bytes": dict.fromkeys(OPS, 1e9), "shares": {}, "seed": 0, **changes,
    }  # fmt: skip
    return plan_points(OPS, [group], [pair], sizes, **options)


def test_a_plan_begins_with_pairs_and_with_sizes_far_apart() -> None:
    sizes = parse_sizes("1KiB..1MiB")
    points = planned(sizes)
    pairs, others = points[: len(sizes)], points[len(sizes) :]
    assert {point.op for point in pairs} == {"send_recv"}
    assert [2 * point.elements for point in pairs[:3]] == [1024, 2**15, 2**20]
    assert sorted(2 * point.elements for point in pairs) == sizes
    assert {round(np.log2(2 * point.elements)) for point in others[5:10]} == {20}
    assert {point.op for point in others[:5]} == set(OPS) - {"send_recv"}


def test_messages_divide_over_ranks_and_fit_memory() -> None:
    points = planned(parse_sizes("1B..4KiB"), largest_bytes=dict.fromkeys(OPS, 2048.0))
    assert all(point.elements % 3 == 0 for point in points if point.op in ("all_gather", "all_to_all"))
    assert max(2 * point.elements for point in points) <= 2048 + 6
    assert min(point.elements for point in points) >= 1
    assert len(set(points)) == len(points)


def test_about_a_fifth_of_the_sizes_is_held_out_whatever_else_is_measured() -> None:
    sizes = parse_sizes("1KiB..1GiB")
    held = {size for size in sizes if is_held_out(size)}
    assert len(held) == 5
    assert held < set(sizes[2:-2])
    assert not held & {2 * size for size in held}  # both neighbours of each are fitted

    def left_out(wanted: list[int]) -> set[int]:
        return {2 * p.elements for p in planned(wanted) if p.held_out and p.op == "send_recv"}

    assert left_out(sizes) == held
    assert left_out(sizes[:8]) == held & set(sizes[:8])
    assert left_out(sizes[3:7]) == set()  # four sizes: too few to spare one
    assert 0.15 < np.mean([is_held_out(size) for size in range(1000, 3000)]) < 0.25


# ---------------------------------------------------------------- uneven splits


def test_a_split_sends_every_element_once_and_as_routing_says() -> None:
    shares = token_shares(catalog_routing("deepseek-v3-decode"), 4, seed=1)
    assert shares.sum(-1) == pytest.approx(np.ones(4))
    matrix = split_elements(shares, 10_001)
    assert (matrix.sum(-1) == 10_001).all()
    assert matrix == pytest.approx(shares * 10_001, abs=1.0)
    assert np.ptp(matrix.sum(0)) > 100  # popular experts make a busy rank
    assert (token_shares(catalog_routing("deepseek-v3-decode"), 4, seed=1) == shares).all()


def test_a_trace_with_experts_that_do_not_divide_can_be_split() -> None:
    shares = token_shares(catalog_routing("deepseek-v3-decode"), 3, seed=0)
    assert shares.shape == (3, 3)


def test_an_uneven_exchange_counts_as_the_equal_one_of_its_busiest_port() -> None:
    equal = np.full((4, 4), 25)
    assert as_equal_elements(equal) == 100
    # rank 0 receives 90 from each of the others: 270 elements through its port
    crowded = np.zeros((4, 4), dtype=np.int64)
    crowded[:, 0], crowded[:, 1] = 90, 10
    assert as_equal_elements(crowded) == 360


# ---------------------------------------------------------------- payloads


class CheatingDist:
    """Delivers nothing, or to the wrong place."""

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def all_to_all_single(self, incoming: Any, outgoing: Any, *splits: Any, group: Any) -> None:
        if self.shift:
            incoming.copy_(outgoing.roll(self.shift))


@pytest.mark.parametrize("shift", [0, 1])
def test_data_that_do_not_arrive_are_noticed(shift: int) -> None:
    torch = pytest.importorskip("torch")
    point = Point("all_to_all", 0, 6, 6, "equal")
    payload = payload_of(
        point, Group((4, 7), 1), 7, dist=CheatingDist(shift), torch=torch, process_group=None, dtype=torch.bfloat16,
        device="cpu",
    )  # fmt: skip
    with pytest.raises(MeasurementError, match="delivered other data than was sent"):
        payload.check("gloo all_to_all")


# ---------------------------------------------------------------- stamps


class _FakeGpu:
    """A device whose clock counts calls, in milliseconds, and says when it was read."""

    device = "cuda:0"

    def __init__(self) -> None:
        self.n_calls = 0
        self.torch = self
        self.cuda = self

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        world = self

        class Event:
            def record(self) -> None:
                self.at = world.n_calls

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at)

        return Event()

    def synchronize(self) -> None:
        pass

    def call(self) -> None:
        self.n_calls += 1


def test_the_call_in_which_ranks_wait_for_each_other_is_not_timed() -> None:
    from calibrate.collectives import run

    gpu = _FakeGpu()
    _, _, device_s = run._timed(gpu, gpu.call, 5)  # type: ignore[arg-type]
    assert gpu.n_calls == 6
    assert device_s == pytest.approx(1e-3)  # five calls between the events, one a millisecond


def test_time_runs_from_the_last_start_to_the_last_end() -> None:
    start = np.array([[0.0, 10.0], [0.3, 10.0]])
    end = np.array([[1.0, 12.0], [1.3, 11.0]])
    nothing = np.full((2, 2), np.nan)
    time_s, skew_s = collective_times_s(Stamps(start, end, nothing), np.zeros(2))
    assert time_s == pytest.approx([1.0, 2.0])
    assert skew_s == pytest.approx([0.3, 0.0])
    # the second rank's clock is 100 s ahead: same times
    shifted = np.array([[0.0], [100.0]])
    moved, skew_s = collective_times_s(
        Stamps(start + shifted, end + shifted, nothing), np.array([0.0, 100.0])
    )
    assert moved == pytest.approx(time_s)
    assert skew_s == pytest.approx([0.3, 0.0])


def test_wrong_clocks_cannot_make_a_time_that_no_rank_saw() -> None:
    start, end = np.array([[0.0], [0.0]]), np.array([[1.0], [3.0]])
    for error in (-50.0, -0.5, 0.5, 50.0):
        time_s, _ = collective_times_s(Stamps(start, end, np.full((2, 1), np.nan)), np.array([0.0, error]))
        assert 1.0 <= time_s[0] <= 3.0


def test_a_devices_own_clock_counts_and_the_slowest_rank() -> None:
    stamps = Stamps(np.zeros((2, 1)), np.ones((2, 1)), np.array([[2e-5], [3e-5]]))
    assert collective_times_s(stamps, np.zeros(2))[0] == pytest.approx([3e-5])


def test_clocks_drift_between_estimates() -> None:
    clock = CommonClock()
    assert clock.is_due(0.0)
    clock.add(0.0, np.array([0.0, 1.0]))
    assert not clock.is_due(1.0)
    assert clock.is_due(6.0)
    assert clock.offsets_s(6.0) == pytest.approx([0.0, 1.0])
    clock.add(10.0, np.array([0.0, 1.001]))
    assert clock.offsets_s(20.0) == pytest.approx([0.0, 1.002])


# ---------------------------------------------------------------- rank 0's book


@contextlib.contextmanager
def book_of(path: Path, points: list[Point], **changes: Any) -> Iterator[Book]:
    wanted = Wanted(path, "gloo", [1024], **changes)
    plan = Plan(points, [Group((0, 1, 2, 3), 2)], [Group((0, 2), 2)])
    common = {"device": "cpu", "implementation": "gloo", "software": "gloo 1", "dtype": "bfloat16"}
    with Recorder(path, "collective") as recorder:
        yield Book(wanted, plan, common, recorder)


def measured(book: Book, seconds_of: Callable[[Point], float]) -> list[Point]:
    """Go through a book as the ranks do; gives what was measured."""
    found = []
    for index in book.remaining():
        found.append(book.plan.points[index])
        book.write(found[-1], np.full(5, seconds_of(found[-1])), np.full(5, 1e-4))
    return found


def line_of(*elements: int) -> list[Point]:
    return [Point("send_recv", 0, n, n, "equal") for n in elements]


def test_points_on_file_are_not_measured_again(tmp_path: Path) -> None:
    points = [*line_of(512, 1024), Point("all_to_all", 0, 512, 600, "trace")]
    with book_of(tmp_path / "a.csv", points) as book:
        assert measured(book, lambda point: 1e-3) == points
        assert (book.outcome.n_written, book.outcome.n_before) == (3, 0)
    with book_of(tmp_path / "a.csv", [*points, *line_of(2048)]) as book:
        assert list(book.remaining()) == [3]
        assert book.outcome.n_before == 3
    rows = read_table(tmp_path / "a.csv").frame
    assert rows["message_bytes"].tolist() == [1024, 2048, 1200]
    assert rows["n_nodes"].tolist() == [2, 2, 2]
    assert rows["start_skew_s"].notna().tolist() == [False, False, True]


def test_a_message_that_would_take_longer_than_is_left_is_not_begun(tmp_path: Path) -> None:
    points = line_of(1000, 2000, 2_000_000, 3000)
    with book_of(tmp_path / "a.csv", points, budget_s=60.0) as book:
        # the line through the first two says 200 s for the third
        found = measured(book, lambda point: 1e-3 + 1e-4 * point.elements)
        assert [point.elements for point in found] == [1000, 2000, 3000]
        assert book.outcome.n_left == 1


def test_a_collective_is_judged_by_the_pairs_before_it(tmp_path: Path) -> None:
    large, small = (Point("all_reduce", 0, n, n, "equal") for n in (1_000_000, 1000))
    with book_of(tmp_path / "a.csv", [*line_of(1000, 2000), large, small], timeout_s=30.0) as book:
        assert large not in measured(book, lambda point: 1e-5 * point.elements)
        assert book.outcome.n_written == 3


def test_a_message_near_the_time_out_is_not_begun(tmp_path: Path) -> None:
    with book_of(tmp_path / "a.csv", line_of(1000, 2000, 100_000), timeout_s=30.0) as book:
        assert [point.elements for point in measured(book, lambda point: 1e-3 * point.elements)] == [
            1000,
            2000,
        ]


def test_the_clock_of_a_rank_is_found_from_round_trips() -> None:
    torch = pytest.importorskip("torch")
    from calibrate.collectives.samples import exchange_stamps

    clocks = {"now": 0.0}

    class Line:
        """A line of 1 ms each way to a rank whose clock is 5 s ahead."""

        def send(self, cell: Any, dst: int) -> None:
            clocks["now"] += 1e-3

        def recv(self, cell: Any, src: int) -> None:
            cell[0] = clocks["now"] + 5.0
            clocks["now"] += 1e-3

    world: Any = SimpleNamespace(me=SimpleNamespace(rank=0, n_ranks=2), dist=Line(), torch=torch)
    assert exchange_stamps(world, lambda: clocks["now"]) == pytest.approx([0.0, 5.0])
