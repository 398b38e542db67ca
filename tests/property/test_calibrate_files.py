"""Damaged measurement files are read or refused in one line, whatever the damage; recorded rows come back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.recorder import Recorder
from calibrate.tables import read_table
from moesim.errors import MeasurementError

ROWS = [
    {
        "op": "gemm", "device": "h200-sxm", "implementation": "mine", "software": "mine 1", "dtype": "bfloat16",
        "m": 4096 + i, "n": 8192, "k": 8192, "latency_s": 7e-4, "cache": "warm", "held_out": i % 2,
    }
    for i in range(8)
]  # fmt: skip

Edit = tuple[str, float, int]
EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert", "end"]), st.floats(0, 1), st.integers(0, 255)),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, edits: list[Edit]) -> bytes:
    out = bytearray(content)
    for how, where, byte in edits:
        at = min(int(where * len(out)), len(out) - 1)
        if at < 0:
            break
        if how == "set":
            out[at] = byte
        elif how == "cut":
            del out[at]
        elif how == "insert":
            out.insert(at, byte)
        else:
            del out[at:]
    return bytes(out)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@settings(max_examples=60, deadline=None)
@given(edits=EDITS)
def test_no_damage_gets_past_a_refusal(suffix: str, edits: list[Edit]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        frame = pd.DataFrame(ROWS)
        if suffix == ".csv":
            frame.to_csv(path, index=False)
        else:
            frame.to_parquet(path)
        path.write_bytes(damaged(path.read_bytes(), edits))
        try:
            table = read_table(path)
        except MeasurementError as refused:
            assert len(str(refused).splitlines()) == 1
            assert str(refused).startswith(str(path))
        else:
            assert len(table.frame) <= len(ROWS) + 1
            assert (table.frame["latency_s"] > 0).all()
            assert set(table.frame["dtype"]) == {"bfloat16"}


@settings(max_examples=60, deadline=None)
@given(cut=st.floats(0, 1))
def test_a_table_cut_short_is_refused_or_ends_earlier(cut: float) -> None:
    """No row has another value than was written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        pd.DataFrame(ROWS).drop(columns=["cache", "held_out"]).assign(latency_s=7.654321e-4).to_csv(
            path, index=False
        )
        content = path.read_bytes()
        whole = read_table(path).frame
        path.write_bytes(content[: int(cut * len(content))])
        try:
            table = read_table(path)
        except MeasurementError as refused:
            assert len(str(refused).splitlines()) == 1
        else:
            pd.testing.assert_frame_equal(table.frame, whole.iloc[: len(table.frame)])


@settings(max_examples=40, deadline=None)
@given(
    latencies=st.lists(st.floats(1e-5, 1e-2), min_size=1, max_size=6),
    cut=st.floats(0, 1),
    words=st.text("a,\"'é ", max_size=6),
)
def test_what_was_recorded_before_a_kill_is_read_back_to_the_last_digit(
    latencies: list[float], cut: float, words: str
) -> None:
    """Cut at any byte, the file continues with the rows that were whole."""
    row = ROWS[0] | {"software": f"x{words}"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        with Recorder(path, "gemm") as recorder:
            for m, latency_s in enumerate(latencies, start=4096):
                recorder.append(row | {"m": m, "latency_s": latency_s})
        content = path.read_bytes()
        kept = content[: int(cut * len(content))]
        path.write_bytes(kept)
        n_whole = max(kept.count(b"\n") - 1, 0)
        with Recorder(path, "gemm") as recorder:
            assert [one["latency_s"] for one in recorder.rows] == latencies[:n_whole]
            for m, latency_s in enumerate(latencies, start=4096):
                if not recorder.seen(row | {"m": m}):
                    recorder.append(row | {"m": m, "latency_s": latency_s})
        assert path.read_bytes() == content
