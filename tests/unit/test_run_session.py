"""A run: resumable, drift watched, repeats, budget, and nothing left out in silence."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from calibrate.recorder import Recorder
from calibrate.run.design import Candidate
from calibrate.run.points import Point
from calibrate.run.protocol import DoesNotFitError, WrongResultError
from calibrate.run.session import DeviceLostError, Session
from calibrate.tables import read_table
from tests.run_fakes import FakeCase, FakeDevice

COLUMNS = {"op": "gemm", "implementation": "torch:linear", "dtype": "bfloat16"}


def gemm(m: int, seconds: float = 0.5) -> Candidate:
    return Candidate(Point("gemm", "gemm", {**COLUMNS, "m": m, "n": 1024, "k": 1024}), seconds)


POINTS = [gemm(m) for m in range(1, 101)]


class Bench:
    """Builds cases; can fail, and be interrupted, at points of choice."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.built: list[int] = []
        self.at: dict[int, Exception | KeyboardInterrupt] = {}
        self.breaks: set[int] = set()
        self.sentinel_s = [1e-3]
        self.now_s = 0.0
        self.build_s = 0.0

    def build(self, point: Point, device: Any) -> Any:
        m = int(point.columns["m"])
        self.built.append(m)
        self.now_s += self.build_s
        self.device.dead = self.device.dead or m in self.breaks
        if m in self.at and not isinstance(self.at[m], WrongResultError):
            raise self.at[m]
        wrong = self.at.get(m)
        return FakeCase(device, cold_s=2e-6 * m, warm_s=1e-6 * m, wrong=wrong)  # type: ignore[arg-type]

    def sentinel(self) -> float:
        return self.sentinel_s.pop(0) if len(self.sentinel_s) > 1 else self.sentinel_s[0]

    def session(self, folder: Path, seed: int = 0) -> Session:
        return Session(self.device, folder, self.build, self.sentinel, seed=seed, clock=lambda: self.now_s)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    with Recorder(folder / "gemm.csv", "gemm") as recorder:
        return recorder.rows


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_rows_say_all_that_the_protocol_promises(tmp_path: Path) -> None:
    outcome = Bench().session(tmp_path, seed=7).run(POINTS[:10])
    assert outcome.n_measured == 10
    frame = read_table(tmp_path / "gemm.csv").frame
    first = frame[(frame["m"] == 4) & (frame.repeat == 0)]
    assert dict(zip(first.cache, first.latency_s, strict=True)) == {"cold": 8e-6, "warm": 4e-6}
    assert set(frame.device) == {"fake"} and set(frame.software) == {"fake 1.0"}
    assert set(frame.n_samples) == {30} and set(frame.seed) == {7} and set(frame.graph) == {1}
    assert set(frame.sm_clock_hz) == {1.98e9} and set(frame.temperature_c) == {40.0}
    assert frame.date.str.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00").all()
    assert set(frame.held_out) <= {0, 1}


def test_an_interrupted_run_loses_nothing_and_goes_on(tmp_path: Path) -> None:
    bench = Bench()
    bench.at[50] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.session(tmp_path).run(POINTS)
    n_before = len({row["m"] for row in rows_in(tmp_path)})
    assert 0 < n_before < 100
    bench.at.clear()
    bench.built.clear()
    outcome = bench.session(tmp_path).run(POINTS)
    assert (outcome.n_before, outcome.n_measured) == (n_before, 100 - n_before)
    rows = rows_in(tmp_path)
    assert Counter((row["m"], row["cache"], row["repeat"]) for row in rows).most_common(1)[0][1] == 1
    assert {row["m"] for row in rows} == set(range(1, 101))


@pytest.mark.parametrize("repeat", [0, 1])
def test_half_of_a_point_is_made_whole_by_the_next_run(repeat: int, tmp_path: Path) -> None:
    Bench().session(tmp_path).run(POINTS)
    file = tmp_path / "gemm.csv"
    whole = Counter((row["m"], row["cache"], row["repeat"]) for row in rows_in(tmp_path))
    head, *lines = file.read_text().splitlines(keepends=True)
    at = {name: i for i, name in enumerate(head.strip().split(","))}
    cells = [line.strip().split(",") for line in lines]
    lost = next(
        i for i, one in enumerate(cells) if one[at["cache"]] == "warm" and one[at["repeat"]] == str(repeat)
    )
    file.write_text(
        head + "".join(lines[:lost] + lines[lost + 1 :]) + lines[lost][:20]
    )  # as a kill leaves it
    outcome = Bench().session(tmp_path).run(POINTS)
    assert outcome.n_measured == 1 - repeat
    assert Counter((row["m"], row["cache"], row["repeat"]) for row in rows_in(tmp_path)) == whole


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    bench = Bench()
    bench.session(tmp_path).run(POINTS)
    size = (tmp_path / "gemm.csv").stat().st_size
    bench.built.clear()
    outcome = bench.session(tmp_path).run(POINTS)
    assert bench.built == []
    assert (outcome.n_before, outcome.n_measured) == (100, 0)
    assert (tmp_path / "gemm.csv").stat().st_size == size


def test_about_one_point_in_twenty_is_measured_again_in_a_later_round(tmp_path: Path) -> None:
    bench = Bench()
    bench.session(tmp_path).run(POINTS)
    rows = rows_in(tmp_path)
    repeated = {row["m"] for row in rows if row["repeat"]}
    assert 2 <= len(repeated) <= 10
    assert Counter(bench.built) == Counter(range(1, 101)) + Counter(repeated)
    for m in repeated:
        first, second = (i for i, built in enumerate(bench.built) if built == m)
        assert second - first > 1


def test_points_of_a_round_come_in_an_order_that_only_the_seed_decides(tmp_path: Path) -> None:
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        bench = Bench()
        bench.session(tmp_path / name, seed=seed).run(POINTS[:30])
        orders.append(bench.built)
    assert orders[0] == orders[1] != orders[2]
    assert set(orders[0][:20]) == set(range(1, 21)), "the first round is that of the most informative points"
    assert orders[0][:20] != sorted(orders[0][:20])


def test_the_sentinel_runs_before_every_round_and_its_drift_is_told(tmp_path: Path) -> None:
    bench = Bench()
    bench.sentinel_s = [1.00e-3, 1.01e-3, 1.00e-3, 1.05e-3, 1.00e-3, 1.00e-3, 1.00e-3]
    outcome = bench.session(tmp_path).run(POINTS)
    assert len(outcome.sentinel_s) >= 6
    assert outcome.drift == pytest.approx(0.05)
    told = [event["latency_s"] for event in events(tmp_path) if event["event"] == "sentinel"]
    assert told == outcome.sentinel_s
    assert events(tmp_path)[-1]["drift"] == 0.05


def test_what_cannot_be_measured_is_named_with_its_reason(tmp_path: Path) -> None:
    bench = Bench()
    bench.at = {
        3: DoesNotFitError("needs 9e+12 bytes of the 1e+09 that are free"),
        5: RuntimeError("CUDA out of memory.\nTried to allocate 20 GiB"),
    }
    outcome = bench.session(tmp_path).run(POINTS[:10])
    assert outcome.n_measured == 8
    assert len(outcome.skipped) == 2
    reasons = {
        event["point"]["m"]: event["reason"] for event in events(tmp_path) if event["event"] == "skipped"
    }
    assert reasons == {
        3: "needs 9e+12 bytes of the 1e+09 that are free",
        5: "RuntimeError: CUDA out of memory.",
    }
    assert bench.device.events.count("release") == len(bench.built)


def test_a_kernel_that_breaks_the_device_ends_the_run_and_the_next_one_leaves_it_out(tmp_path: Path) -> None:
    bench = Bench()
    bench.at = {3: RuntimeError("CUDA error: an illegal memory access was encountered\nmore")}
    bench.breaks = {3}
    with pytest.raises(
        DeviceLostError, match=r"m=3 .*: broke the device \(RuntimeError: CUDA error"
    ) as stopped:
        bench.session(tmp_path).run(POINTS[:10])
    assert len(str(stopped.value).splitlines()) == 1
    assert bench.built[-1] == 3, "no other point is tried, or blamed"
    assert [event["event"] for event in events(tmp_path)][-2:] == ["fatal", "end"]
    assert not any(event["event"] == "skipped" for event in events(tmp_path))
    bench.device.dead = False
    outcome = bench.session(tmp_path).run(POINTS[:10])
    assert len(outcome.lost) == 1 and "m=3" in outcome.lost[0]
    assert outcome.n_before + outcome.n_measured == 9 and outcome.n_done == 10
    assert bench.built.count(3) == 1


def test_a_device_that_fails_between_points_is_told_in_one_line(tmp_path: Path) -> None:
    bench = Bench()
    session = bench.session(tmp_path)

    def broken() -> float:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    session._sentinel = broken
    with pytest.raises(DeviceLostError, match="sentinel: does not run any more") as stopped:
        session.run(POINTS[:10])
    assert len(str(stopped.value).splitlines()) == 1
    assert bench.session(tmp_path).run(POINTS[:10]).lost == []


def test_a_process_that_was_killed_in_a_point_does_not_meet_it_again(tmp_path: Path) -> None:
    bench = Bench()
    bench.session(tmp_path).run(POINTS[:3])
    log = tmp_path / "log.jsonl"
    start = log.read_text().splitlines()[0]
    begin = json.dumps({"event": "begin", "point": dict(POINTS[7].point.columns)})
    with log.open("a") as stream:
        stream.write(f"{start}\n{begin}\n" + '{"event": "sent')
    log.write_text(log.read_text() + "\n")
    for _ in range(2):  # and not on the run after next
        outcome = bench.session(tmp_path).run(POINTS[:10])
        assert [text for text in outcome.lost if "m=8" in text] and len(outcome.lost) == 1
    assert 8 not in bench.built
    lost = [event["point"]["m"] for event in events_that_parse(tmp_path) if event["event"] == "lost"]
    assert lost == [8, 8]
    bench.device.software = "fake 2.0"
    assert bench.session(tmp_path).run(POINTS[:10]).lost == [], "another driver may have mended it"
    assert 8 in bench.built


def events_that_parse(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_an_interrupt_is_not_the_points_fault(tmp_path: Path) -> None:
    bench = Bench()
    bench.at[5] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.session(tmp_path).run(POINTS[:10])
    bench.at.clear()
    outcome = bench.session(tmp_path).run(POINTS[:10])
    assert outcome.lost == [] and outcome.n_before + outcome.n_measured == 10


def test_a_point_that_hangs_ends_the_process_and_is_known(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from calibrate.run.session import Session
from tests.run_fakes import FakeDevice
from tests.unit.test_run_session import Bench, gemm

hang = lambda point, device: time.sleep(60)
session = Session(FakeDevice(), Path(sys.argv[1]), hang, Bench().sentinel, hang_s=0.5)
session.run([gemm(4, seconds=0.01)])
"""
    repository = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 1 and "Timeout" in done.stderr
    outcome = Bench().session(tmp_path).run(POINTS[:5])
    assert [text for text in outcome.lost if "m=4" in text] and outcome.n_measured == 4


def test_what_points_took_is_in_the_log_beside_the_estimate(tmp_path: Path) -> None:
    bench = Bench()
    bench.build_s = 2.0
    bench.session(tmp_path).run(POINTS[:4])
    told = [
        (event["seconds"], event["estimated_s"]) for event in events(tmp_path) if event["event"] == "done"
    ]
    assert set(told) == {(2.0, 0.5)} and len(told) >= 4


def test_a_wrong_kernel_has_no_row(tmp_path: Path) -> None:
    bench = Bench()
    bench.at = {4: WrongResultError("differs from its reference")}
    outcome = bench.session(tmp_path).run(POINTS[:10])
    assert len(outcome.wrong) == 1 and "m=4" in outcome.wrong[0]
    assert 4 not in {row["m"] for row in rows_in(tmp_path)}


def test_a_budget_ends_the_run_in_time_with_the_first_points_done(tmp_path: Path) -> None:
    bench = Bench()
    bench.build_s = 0.5
    outcome = bench.session(tmp_path).run(POINTS, budget_s=20.0)
    assert bench.now_s <= 20.0
    assert 30 <= outcome.n_measured <= 40
    assert outcome.n_left == 100 - outcome.n_measured
    assert set(bench.built) <= set(range(1, 41))


def test_estimates_that_are_off_are_made_good_as_the_run_goes(tmp_path: Path) -> None:
    bench = Bench()
    bench.build_s = 2.0  # four times what was thought
    bench.session(tmp_path).run(POINTS, budget_s=30.0)
    assert bench.now_s <= 30.0


def test_progress_counts_what_is_done(tmp_path: Path) -> None:
    told: list[int] = []
    Bench().session(tmp_path).run(POINTS[:20], progress=lambda done, what: told.append(done))
    assert told == sorted(told)
    assert told[:3] == [0, 1, 2]
