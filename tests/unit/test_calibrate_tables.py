"""Measured tables: what is read, what is refused and in which words."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from calibrate.floors import floor_s
from calibrate.recorder import Recorder
from calibrate.schema import SCHEMAS, schema
from calibrate.tables import read_table, read_tables
from moesim.errors import MeasurementError
from moesim.hardware import load_gpu

GEMM = {
    "op": "gemm", "device": "h200-sxm", "implementation": "mine", "software": "mine 1", "dtype": "bfloat16", "m": 4096,
    "n": 8192, "k": 8192, "latency_s": 7e-4,
}  # fmt: skip
EXPERTS = {
    "device": "h200-sxm", "implementation": "mine", "software": "mine 1", "dtype": "bfloat16", "n_tokens": 4096,
    "hidden": 4096, "intermediate": 2048, "top_k": 8, "n_experts": 64, "tp": 1, "ep": 1, "load": "balanced",
}  # fmt: skip
NAMED = {"device": "h200-sxm", "implementation": "mine", "software": "mine 1"}
ATTENTION = {
    **NAMED, "kind": "gqa", "dtype": "bfloat16", "kv_dtype": "bfloat16", "batch": 64, "n_query": 1, "n_context": 4096,
    "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "window": 0,
}  # fmt: skip
LINKS = {**NAMED, "dtype": "bfloat16", "n_ranks": 8, "message_elements": 2**26}
PLAIN = {**NAMED, "dtype": "any"}
ROWS: dict[str, dict[str, object]] = {
    "gemm": GEMM,
    "moe_ffn": {"op": "moe_ffn", **EXPERTS, "latency_s": 4e-3},
    "moe_step": {"op": "moe_up", **EXPERTS, "latency_s": 3e-3},
    "attention": {"op": "attention_decode", **ATTENTION, "latency_s": 3e-4},
    "mla_block": {
        "op": "mla_block_decode", **NAMED, "model": "deepseek-v3", "dtype": "fp8_block", "kv_dtype": "fp8", "batch": 64,
        "n_context": 8192, "n_heads": 128, "latency_s": 3e-4,
    },
    "collective": {"op": "all_gather", **LINKS, "message_bytes": 2**27, "latency_s": 4e-4},
    "all_reduce": {"op": "all_reduce", **LINKS, "latency_s": 6e-4},
    "deepep": {
        "op": "ep_dispatch", **NAMED, "n_nodes": 1, "n_ranks": 8, "n_tokens": 4096, "hidden": 7168, "top_k": 8,
        "n_experts": 256, "n_sms": 20, "latency_s": 4e-4,
    },
    "router": {
        "op": "router", **NAMED, "dtype": "bfloat16", "n_tokens": 65536, "n_experts": 256, "top_k": 8, "hidden": 7168,
        "scoring": "sigmoid", "latency_s": 6e-4,
    },
    "transfer": {
        "op": "h2d", **PLAIN, "n_bytes": 2**28, "pinned": 1, "n_streams": 1, "busy": 0, "latency_s": 5e-3,
    },
    "memory": {"op": "hbm_copy", **PLAIN, "n_bytes": 2**30, "latency_s": 5e-4},
    "launch": {"op": "launch", **PLAIN, "mode": "graph", "n_kernels": 1000, "latency_s": 1.2e-6},
}  # fmt: skip
"""A row of every kind, with a plausible time."""


def write(path: Path, *rows: dict[str, object]) -> Path:
    frame = pd.DataFrame(list(rows))
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(MeasurementError) as caught:
        read_table(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert len(said.splitlines()) == 1
    return said.removeprefix(str(path))


def test_there_is_a_row_of_every_kind() -> None:
    assert set(ROWS) == set(SCHEMAS)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("kind", ROWS)
def test_every_kind_is_known_by_its_columns_and_read_in_si_types(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    table = read_table(write(tmp_path / f"a{suffix}", ROWS[kind], ROWS[kind]))
    assert table.kind == kind
    assert table.frame.iloc[1].to_dict() == ROWS[kind]
    for name, column in SCHEMAS[kind].columns.items():
        if name in table.frame and column.type != "text":
            assert str(table.frame[name].dtype) == {"integer": "int64", "number": "float64"}[column.type]


def test_both_formats_give_the_same_frame_with_blanks(tmp_path: Path) -> None:
    rows = [
        {**ROWS["deepep"], "start_skew_s": 1e-6, "date": "2026-05-01T12:00:00"},
        {**ROWS["deepep"], "n_sms": None, "start_skew_s": None, "date": None},
    ]
    one, other = read_tables([write(tmp_path / "a.csv", *rows), write(tmp_path / "a.parquet", *rows)])
    pd.testing.assert_frame_equal(one.frame, other.frame)
    assert one.frame["n_sms"].tolist()[0] == 20 and one.frame["n_sms"].isna().tolist() == [False, True]
    assert one.line(1) == f"{tmp_path / 'a.csv'}:3"
    assert other.line(1) == f"{tmp_path / 'a.parquet'}: row 2"


def test_optional_columns_that_nobody_filled_in_are_left_out(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", {**GEMM, "host": None, "cache": "cold"}))
    assert "host" not in table.frame and table.frame["cache"].tolist() == ["cold"]


def changed(**cells: object) -> Callable[[Path], Path]:
    return lambda path: write(path, GEMM, GEMM | cells)


BAD_CELLS: dict[str, tuple[dict[str, object], str]] = {
    "zero time": ({"latency_s": 0.0}, "latency_s must be a finite number above 0 [s]"),
    "negative time": ({"latency_s": -1e-6}, "-1e-06"),
    "no time": ({"latency_s": None}, "blank: latency_s must be"),
    "NaN": ({"latency_s": float("nan")}, "latency_s must be a finite number above 0 [s]"),
    "infinite time": ({"latency_s": float("inf")}, "inf"),
    "fraction of a row": ({"m": 1.5}, "m must be a whole number of at least 1"),
    "no rows at all": ({"m": 0}, "m must be a whole number of at least 1"),
    "more than a float counts": ({"m": 1e300}, "m must be a whole number"),
    "unknown format": ({"dtype": "bfloat61"}, "fix: did you mean bfloat16?"),
    "unknown operation": ({"op": "gem"}, "fix: did you mean gemm?"),
    "operation of another kind": ({"op": "router"}, "is no gemm measurement like the rows above; fix: one kind a file"),
    "nameless device": ({"device": ""}, "device must be a name"),
    "flag": ({"held_out": 2}, "held_out must be 0 or 1"),
    "cache": ({"cache": "lukewarm"}, "cache must be one of cold, warm"),
}  # fmt: skip


@pytest.mark.parametrize(("suffix", "place"), [(".csv", ":3: "), (".parquet", ": row 2: ")])
@pytest.mark.parametrize("case", BAD_CELLS)
def test_cells_that_break_a_rule_are_refused_by_line(
    tmp_path: Path, case: str, suffix: str, place: str
) -> None:
    cells, said = BAD_CELLS[case]
    told = refusal(changed(**cells)(tmp_path / f"a{suffix}"))
    assert told.startswith(place)
    assert said in told


AGAIN = "; fix: measure the point again or delete the line"


@pytest.mark.parametrize("value", [0.0, -1e-6, float("nan"), None])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_time_that_cannot_be_is_to_be_measured_again(
    tmp_path: Path, suffix: str, value: float | None
) -> None:
    assert refusal(write(tmp_path / f"a{suffix}", GEMM, GEMM | {"latency_s": value})).endswith(AGAIN)


def test_cells_without_a_value_are_called_what_they_may_be(tmp_path: Path) -> None:
    nan = GEMM | {"latency_s": float("nan")}
    assert refusal(write(tmp_path / "a.parquet", GEMM, nan)).startswith(": row 2: is NaN or blank: latency_s")
    assert refusal(write(tmp_path / "a.csv", GEMM, nan)).startswith(
        ":3: is blank: latency_s"
    )  # pandas writes none
    assert refusal(write(tmp_path / "a.csv", GEMM, GEMM | {"op": ""})).startswith(":3: is blank: op must be")


@pytest.mark.parametrize("word", ["nan", "inf", "fast", "1e-6s"])
def test_words_for_times_are_refused(tmp_path: Path, word: str) -> None:
    told = refusal(write(tmp_path / "a.csv", GEMM, GEMM | {"latency_s": word}))
    assert told.startswith(f":3: '{word}': latency_s must be a finite number above 0 [s]")


def test_text_for_a_number_is_refused_in_parquet_too(tmp_path: Path) -> None:
    told = refusal(write(tmp_path / "a.parquet", GEMM | {"m": "4096"}))
    assert told.startswith(": row 1: '4096': m must be a whole number")


RULES: list[tuple[str, dict[str, object], str]] = [
    ("moe_ffn", {"top_k": 65}, "top_k must be at most n_experts"),
    ("moe_ffn", {"ep": 3}, "n_experts must be a multiple of ep"),
    ("moe_ffn", {"load": "zipf"}, "load must be like balanced, uniform, power_law_1.2 or trace:NAME"),
    ("attention", {"head_dim": None}, "head_dim may be blank only where kind is mla"),
    ("attention", {"kind": "mha"}, "kind must be one of gqa, mla"),
    ("collective", {"n_ranks": 1}, "n_ranks must be a whole number of at least 2"),
    ("router", {"scoring": "relu"}, "scoring must be one of softmax, sigmoid"),
    ("launch", {"mode": "lazy"}, "mode must be one of eager, graph"),
]


@pytest.mark.parametrize(("kind", "cells", "said"), RULES)
def test_rows_that_contradict_themselves_are_refused(
    tmp_path: Path, kind: str, cells: dict[str, object], said: str
) -> None:
    told = refusal(write(tmp_path / "a.csv", ROWS[kind], ROWS[kind] | cells))
    assert told.startswith(":3: ")
    assert said in told


def test_latent_attention_may_leave_its_heads_blank(tmp_path: Path) -> None:
    row = ROWS["attention"] | {"kind": "mla", "n_kv_heads": None, "head_dim": None}
    assert read_table(write(tmp_path / "a.csv", row)).kind == "attention"


HEAD = "op,device,implementation,software,dtype,m,n,k,latency_s"
LINE = "gemm,h200-sxm,mine,mine 1,bfloat16,4096,8192,8192,0.0007"
COLUMNS: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], str]] = {
    "missing": (
        lambda f: f.drop(columns=["latency_s", "software"]),
        f"columns software, latency_s; fix: the header of gemm is {HEAD}",
    ),
    "misspelt": (lambda f: f.rename(columns={"latency_s": "latency_ms"}), "fix: rename latency_ms to latency_s"),
    "extra": (lambda f: f.assign(speed=1), "have no column speed; fix: rename speed to seed or delete it"),
    "extra like an optional one": (lambda f: f.assign(latency_p90=1.0), "fix: rename latency_p90 to latency_p90_s or"),
    "missing and misspelt": (
        lambda f: f.drop(columns="m").rename(columns={"latency_s": "latency_ms"}), f"fix: the header of gemm is {HEAD}",
    ),
    "no op": (lambda f: f.drop(columns="op"), f"column op is missing; fix: the header of gemm is {HEAD}"),
    "no rows": (lambda f: f.iloc[:0], "holds no rows"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("case", COLUMNS)
def test_columns_are_those_of_the_kind(tmp_path: Path, case: str, suffix: str) -> None:
    change, said = COLUMNS[case]
    path = tmp_path / f"a{suffix}"
    frame = change(pd.DataFrame([GEMM]))
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    assert said in refusal(path)


def test_a_library_without_its_message_bytes_is_no_framework_kernel(tmp_path: Path) -> None:
    told = refusal(write(tmp_path / "a.csv", ROWS["all_reduce"] | {"implementation": "nccl"}))
    assert "collective measurements need the column message_bytes" in told


FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.csv", b"", ": is empty"),
    "blank": ("a.csv", b" \n\n", ": is empty"),
    "empty Parquet": ("a.parquet", b"", ": is empty"),
    "cut off": ("a.csv", f"{HEAD}\n{LINE}\n{LINE[:17]}".encode(), ":3: the last line has no end: it was cut short"),
    "cut in its last cell": ("a.csv", f"{HEAD}\n{LINE}\n{LINE[:-2]}".encode(), ":3: the last line has no end: it was"),
    "cut header": ("a.csv", HEAD[:-5].encode(), ":1: the last line has no end"),
    "cut, old line ends": ("a.csv", f"{HEAD}\r{LINE}\r{LINE[:-2]}".encode(), ":3: the last line has no end"),
    "semicolons": ("a.csv", f"{HEAD}\n{LINE}\n".replace(",", ";").encode(), ":1: cells are parted by semicolons, not"),
    "tabs": ("a.csv", f"{HEAD}\n{LINE}\n".replace(",", "\t").encode(), ":1: cells are parted by tabs, not by commas"),
    "serving": (
        "a.csv", b"id,system,isl,osl,concurrency,ttft_s,tpot_s\na,h200-sxm,1,1,1,1,1\n",
        ":1: is a table of serving benchmarks, not of kernels; fix: python -m calibrate.validate.serving",
    ),
    "another table": ("a.csv", b"a,b\n1,2\n", ":1: column op is missing; fix: the first line names the columns"),
    "too long": ("a.csv", f"{HEAD}\n{LINE},1\n{LINE}\n".encode(), ":2: has 10 of 9 cells; fix: one cell a column"),
    "gap": ("a.csv", f"{HEAD}\n{LINE}\n\n{LINE}\n".encode(), ":3: has 0 of 9 cells"),
    "header twice": ("a.csv", f"{HEAD},m\n{LINE},1\n".encode(), ":1: 'm': column is there twice"),
    "nameless column": ("a.csv", f"{HEAD},\n{LINE},1\n".encode(), ":1: column 10 has no name"),
    "no header": ("a.csv", f"{LINE.replace('8192,', '', 1)}\n".encode(), ":1: column op is missing"),
    "not UTF-8": ("a.csv", f"{HEAD}\n".encode() + b"\xff\xfe,\n", ":2: is not UTF-8 text"),
    "binary": ("a.csv", f"{HEAD}\n\0\0\n".encode(), ":2: is not text"),
    "open quote": ("a.csv", f'{HEAD}\n{LINE}\n"gemm,h200\n'.encode(), ":3: is not CSV"),
    "Parquet as CSV": ("a.csv", b"PAR1xxxxPAR1", ": is a Parquet file named .csv"),
    "CSV as Parquet": ("a.parquet", f"{HEAD}\n".encode(), ": is not a Parquet file"),
    "torn Parquet": ("a.parquet", b"PAR1xxxxPAR1", ": is a damaged Parquet file"),
    "tiny Parquet": ("a.parquet", b"PAR1", ": is "),
    "JSON": ("a.json", b"{}", ": '.json': is neither CSV nor Parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_damaged_files_are_refused(tmp_path: Path, case: str) -> None:
    name, content, said = FILES[case]
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(said)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_parquet_is_refused(tmp_path: Path, share: float) -> None:
    whole = write(tmp_path / "a.parquet", *[GEMM] * 50).read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: int(len(whole) * share)])
    assert refusal(tmp_path / "a.parquet").startswith(": is cut off")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == ": is a folder; fix: name the files in it"
    assert refusal(tmp_path / "no.csv") == ": there is no such file; fix: check its name and folder"


def test_a_spreadsheet_s_habits_are_taken(tmp_path: Path) -> None:
    """Byte order mark, carriage returns, blanks after commas, blank lines at the end, quoted commas."""
    lines = [HEAD.replace(",", ", "), LINE.replace("mine 1", '"mine, 1"'), "", ""]
    (tmp_path / "a.CSV").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    table = read_table(tmp_path / "a.CSV")
    assert table.frame.loc[0, "software"] == "mine, 1"
    assert table.frame.loc[0, "m"] == 4096


# ---------------------------------------------------------------- units


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("factor", "unit"),
    [
        (1e3, "milliseconds; fix: divide latency_s by 1000"),
        (1e6, "microseconds; fix: divide latency_s by 1e6"),
        (1e9, "nanoseconds; fix: divide latency_s by 1e9"),
    ],
)
def test_times_in_another_unit_are_called_out(tmp_path: Path, kind: str, factor: float, unit: str) -> None:
    row = ROWS[kind]
    path = write(tmp_path / "a.csv", *[row | {"latency_s": float(str(row["latency_s"])) * factor}] * 3)
    told = refusal(path)
    assert told.endswith(f"latency_s looks like {unit}")


@pytest.mark.parametrize("kind", ROWS)
def test_times_below_what_the_device_can_do_are_called_out(tmp_path: Path, kind: str) -> None:
    row = ROWS[kind]
    path = write(tmp_path / "a.csv", row | {"latency_s": float(str(row["latency_s"])) / 1000})
    assert "latency_s looks divided by 1000 too often" in refusal(path)


def test_only_the_median_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", GEMM, GEMM, GEMM | {"latency_s": 7e-1})
    assert len(read_table(path).frame) == 3


def test_single_rows_in_another_unit_are_noted(tmp_path: Path) -> None:
    rows = [GEMM | {"m": m} for m in (64, 65, 66)] + [GEMM | {"m": m, "latency_s": 0.7} for m in (64, 65)]
    slow = ROWS["collective"] | {"implementation": "gloo", "latency_s": 30.0}
    paths = [
        write(tmp_path / "a.csv", *rows),
        write(tmp_path / "b.csv", slow),
        write(tmp_path / "c.csv", GEMM),
    ]
    notes: list[str] = []
    assert len(read_tables(paths, note=notes.append)) == 3
    assert notes == [
        f"{tmp_path / 'a.csv'}:5: 2 of 5 rows take at least 300 times what the datasheet asks for, this the first: "
        "another unit, or outliers?"
    ]


def test_a_sort_that_leaves_rows_where_they_are_is_no_wrong_unit(tmp_path: Path) -> None:
    shape = ROWS["moe_step"] | {"op": "moe_permute", "n_tokens": 16384, "latency_s": 15e-6}
    assert len(read_table(write(tmp_path / "a.csv", shape)).frame) == 1


def test_rows_that_stand_twice_are_noted(tmp_path: Path) -> None:
    notes: list[str] = []
    read_tables([write(tmp_path / "a.csv", GEMM, GEMM | {"m": 65}, GEMM)], note=notes.append)
    assert notes == [f"{tmp_path / 'a.csv'}:4: 1 rows stand in the file twice, this the first"]


def test_percentiles_ascend(tmp_path: Path) -> None:
    rows = {"latency_p10_s": 2e-3, "latency_p90_s": 1e-3}
    assert "latency_p10_s must be at most latency_p90_s" in refusal(write(tmp_path / "a.csv", GEMM | rows))


@pytest.mark.parametrize(
    ("word", "meant"), [("bf16", "bfloat16"), ("fp32", "float32"), ("mxfp4", "w4a16_mxfp4")]
)
def test_usual_names_of_formats_are_understood(word: str, meant: str, tmp_path: Path) -> None:
    assert f"did you mean {meant}?" in refusal(write(tmp_path / "a.csv", GEMM | {"dtype": word}))


def test_a_file_is_named_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", GEMM)
    (tmp_path / "b.csv").symlink_to(path)
    for other in (path, f"{tmp_path}/../{tmp_path.name}/a.csv", tmp_path / "b.csv"):
        with pytest.raises(MeasurementError, match="is given twice; fix: name every file once"):
            read_tables([path, other])


def test_launch_bound_rows_do_not_hide_times_that_are_too_short(tmp_path: Path) -> None:
    small = GEMM | {"m": 1, "n": 64, "k": 64, "latency_s": 3e-6}
    path = write(tmp_path / "a.csv", *[small] * 9, GEMM | {"latency_s": 1e-5})
    assert "too often" in refusal(path)


def test_links_of_unknown_rate_are_not_judged_slow(tmp_path: Path) -> None:
    slow = ROWS["collective"] | {"implementation": "gloo", "latency_s": 30.0}
    assert read_table(write(tmp_path / "a.csv", slow)).kind == "collective"
    assert "microseconds" in refusal(write(tmp_path / "a.csv", slow | {"implementation": "nccl"}))


def test_a_device_of_no_catalog_is_compared_with_the_fastest_or_its_own_datasheet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", GEMM | {"device": "x9000", "latency_s": 3e-4})
    assert read_table(path).frame["device"].tolist() == ["x9000"]
    slower = load_gpu("l40s").model_copy(update={"name": "x9000"})  # a tenth of the arithmetic
    with pytest.raises(MeasurementError, match="at least: latency_s looks divided"):
        read_table(path, gpu=slower)


def test_a_floor_is_bytes_over_bandwidth_or_flops_over_peak() -> None:
    h200 = load_gpu("h200-sxm")
    copy = pd.DataFrame([ROWS["memory"]])
    assert floor_s("memory", copy, h200) == pytest.approx(2**30 / 4.8e12)
    product = pd.DataFrame([GEMM])
    assert floor_s("gemm", product, h200) == pytest.approx(2 * 4096 * 8192 * 8192 / 989.4e12)
    cache = pd.DataFrame([ROWS["attention"]])
    assert floor_s("attention", cache, h200) == pytest.approx(64 * 4096 * 2 * 8 * 128 * 2 / 4.8e12)


def test_every_reference_file_is_read_and_none_is_in_another_unit(shared_data: Path) -> None:
    kinds = {}
    for path in sorted((shared_data / "measured").glob("*.parquet")):
        if path.name != "moe_ffn.parquet":  # the largest: a test of its own
            kinds[path.stem] = read_table(path).kind
    assert kinds == {
        "all_reduce": "all_reduce", "attention": "attention", "deepep": "deepep", "gemm": "gemm",
        "mla_block": "mla_block", "nccl": "collective",
    }  # fmt: skip


def test_every_part_of_the_largest_reference_file_is_in_seconds(shared_data: Path, tmp_path: Path) -> None:
    """One implementation, format and load at a time, as a user's own file would hold."""
    whole = pd.read_parquet(shared_data / "measured" / "moe_ffn.parquet")
    whole = whole.iloc[np.random.default_rng(0).permutation(len(whole))[:20000]]
    for number, (_, part) in enumerate(whole.groupby(["device", "implementation", "dtype", "load"])):
        path = tmp_path / f"{number}.parquet"
        part.to_parquet(path)
        assert read_table(path).kind == "moe_ffn"


# ---------------------------------------------------------------- recorder

POINT = {name: value for name, value in GEMM.items() if name != "latency_s"}


def test_rows_are_on_disk_one_by_one_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "gemm.csv"
    with Recorder(path, "gemm") as recorder:
        assert not recorder.seen(POINT)
        recorder.append(
            {**POINT, "latency_s": np.float64(7e-4), "cache": "warm", "graph": True, "held_out": 0}
        )
        assert read_table(path).frame["latency_s"].tolist() == [7e-4]  # before it is closed
        assert recorder.seen(POINT) and recorder.seen({**POINT, "m": np.int64(4096), "cache": "warm"})
        assert not recorder.seen({**POINT, "cache": "cold"})
        assert not recorder.seen({**POINT, "m": 1})
    with Recorder(path, "gemm") as again:
        assert len(again) == 1 and again.seen({**POINT, "graph": 1}) and not again.seen({**POINT, "graph": 0})
        again.append({**POINT, "m": 1, "latency_s": 3e-4})
        assert again.seen({**POINT, "m": 1})
        assert [row["m"] for row in again.rows] == [4096, 1]
    assert read_table(path).frame["m"].tolist() == [4096, 1]


@pytest.mark.parametrize("keep", [1, 7, 40, -1])
def test_a_line_cut_off_by_a_kill_is_measured_again(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "gemm.csv"
    with Recorder(path, "gemm") as recorder:
        recorder.append({**POINT, "latency_s": 7e-4})
        whole = path.read_bytes()
        recorder.append({**POINT, "m": 8192, "latency_s": 1.4e-3})
    second = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + second[:keep])
    with Recorder(path, "gemm") as again:
        assert again.seen(POINT) and not again.seen({**POINT, "m": 8192})
        again.append({**POINT, "m": 8192, "latency_s": 1.4e-3})
    assert path.read_bytes() == whole + second


def test_a_header_cut_off_by_a_kill_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "gemm.csv"
    path.write_bytes(b"op,device,imp")
    with Recorder(path, "gemm") as recorder:
        recorder.append({**POINT, "latency_s": 7e-4})
    assert len(read_table(path).frame) == 1


def test_a_killed_process_loses_nothing_that_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "gemm.csv"
    program = (
        "import os, signal, sys\n"
        "from calibrate.recorder import Recorder\n"
        f"recorder = Recorder({str(path)!r}, 'gemm')\n"
        f"point = {POINT!r}\n"
        "for m in (1, 2, 3):\n"
        "    recorder.append({**point, 'm': m, 'latency_s': 1e-3})\n"
        "recorder._stream.write('gemm,h200')\n"  # as far as the fourth came
        "recorder._stream.flush()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -9
    assert path.read_text().endswith("gemm,h200")
    with Recorder(path, "gemm") as recorder:
        assert [row["m"] for row in recorder.rows] == [1, 2, 3]


def test_one_process_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "gemm.csv"
    program = f"from calibrate.recorder import Recorder\nRecorder({str(path)!r}, 'gemm')\n"

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )

    with Recorder(path, "gemm") as recorder:
        recorder.append({**POINT, "latency_s": 7e-4})
        before = path.read_bytes()
        refused = other()
        assert refused.returncode == 1
        assert f"{path}: another process is writing this file; fix: wait for its end" in refused.stderr
        assert path.read_bytes() == before
    assert other().returncode == 0
    with pytest.raises(MeasurementError, match="is no file of memory"):
        Recorder(path, "memory")
    assert other().returncode == 0  # a refusal keeps no lock


def test_files_are_recorded_where_nothing_can_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    Recorder(tmp_path / "a.csv", "gemm").close()
    monkeypatch.setattr("calibrate.recorder.fcntl", None)
    with Recorder(tmp_path / "a.csv", "gemm") as recorder:
        assert len(recorder) == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1


def test_a_file_of_another_kind_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with Recorder(path, "memory") as recorder:
        recorder.append(ROWS["memory"])
    path.write_text(path.read_text() + "cut o")
    before = path.read_bytes()
    with pytest.raises(
        MeasurementError, match=r"a\.csv:1: is no file of gemm measurements: it lacks m, n, k; fix"
    ):
        Recorder(path, "gemm")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xff\n", "is not CSV"),
        (b"x" * 5000, "is not a file of measurements"),
        (f"{HEAD}\n{LINE[:-4]}fast\n".encode(), ":2: '0.fast': latency_s must be"),
        (f"{HEAD}\n{LINE},1\n".encode(), ":2: has 10 of 9 cells"),
    ],
)
def test_a_file_that_is_none_is_not_continued(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(MeasurementError) as caught:
        Recorder(path, "gemm")
    assert said in str(caught.value)
    assert path.read_bytes() == content


def test_rows_that_break_a_rule_are_not_written(tmp_path: Path) -> None:
    with Recorder(tmp_path / "a.csv", "gemm") as recorder:
        for row, said in [
            ({**POINT, "latency_s": -1.0}, "latency_s must be"),
            ({**POINT, "latency_s": float("nan")}, "latency_s must be"),
            (POINT, r"a\.csv: is blank: latency_s must be"),
            ({**GEMM, "speed": 1}, "has no column speed"),
            ({**GEMM, "split": "equal"}, "has no column split; fix: start a new file"),
        ]:
            with pytest.raises(MeasurementError, match=said):
                recorder.append(row)
        assert len(recorder) == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1


def test_an_exchange_is_another_point_where_its_split_is_another(tmp_path: Path) -> None:
    row = ROWS["collective"] | {"split": "equal", "n_nodes": 1}
    with Recorder(tmp_path / "a.csv", "collective") as recorder:
        recorder.append(row)
        assert recorder.seen(row)
        assert not recorder.seen(row | {"split": "trace"})
        assert not recorder.seen(row | {"n_nodes": 2})


def test_kinds_and_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        MeasurementError, match=r"'gem': is no kind of measurement; fix: use one of moe_ffn, "
    ):
        schema("gem")
    with pytest.raises(MeasurementError, match="recorded as CSV"):
        Recorder(tmp_path / "a.parquet", "gemm")
