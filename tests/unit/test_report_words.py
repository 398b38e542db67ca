"""What reports say in words and in the terminal's tables."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from moesim.report import plan_table, ruled_out_table, run_table
from moesim.report.headline import answer, certainty, close_rivals, limits, ruled_out_groups, tiles
from moesim.report.palette import color, label
from moesim.report.text import (
    ABSENT,
    band_of,
    band_text,
    count,
    layout_name,
    number,
    share,
    total_and_capacity,
)

ROW: dict[str, Any] = {
    "rank": 1,
    "layout": {"tp": 2, "dp": 16, "ep": 32, "etp": 1, "pp": 1, "redundant_experts": 32, "placement": "eplb"},
    "cluster": {"gpu": "h200-sxm", "n_gpus": 32, "usd_per_gpu_hour": 2.8},
    "workload": {"batch_per_rank": 64},
    "memory_bytes": {"weights_experts": 100e9, "kv_cache": 35e9, "total": 135e9, "capacity": 141e9},
    "step_s": 0.04,
    "tokens_per_s": 64000.0,
    "tokens_per_s_per_gpu": 2000.0,
    "ttft_s": 0.912,
    "tpot_s": 0.0412,
    "mfu": 0.12,
    "usd_per_mtok": 0.3889,
    "breakdown_s": {"attention": 0.02, "expert_ffn": 0.012, "dispatch": 0.006, "wait": 0.004},
    "imbalance": 1.41,
    "band": {"of": "tpot_s", "low": 0.038, "high": 0.046},
    "calibrated": True,
}


def printed(table: Table, width: int = 100) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ({"tp": 1, "dp": 32, "ep": 32, "pp": 1, "etp": 1}, "TP1 DP32 EP32"),
        ({"tp": 8, "dp": 1, "ep": 4, "etp": 2, "pp": 4}, "TP8 DP1 EP4 ETP2 PP4"),
        ({"tp": 1, "dp": 2, "ep": 2, "redundant_experts": 2, "placement": "eplb"}, "TP1 DP2 EP2 +2"),
        (
            {"tp": 1, "dp": 2, "ep": 2, "redundant_experts": 2, "placement": "balanced"},
            "TP1 DP2 EP2 +2 balanced",
        ),
        ({"tp": 1, "placement": "eplb"}, "TP1 eplb"),
        (None, ABSENT),
    ],
)
def test_layout_names(layout: dict[str, Any] | None, name: str) -> None:
    assert layout_name({"layout": layout}) == name


def test_band_is_written_in_the_unit_of_its_value() -> None:
    assert band_text(ROW, "tpot_s") == "41.2 ms (38..46)"
    assert band_text(ROW, "step_s") == "40.0 ms"
    narrow = {"tpot_s": 0.0412, "band": {"low": 0.0408, "high": 0.0416}}
    assert band_text(narrow, "tpot_s") == "41.2 ms (40.8..41.6)"
    long = {"step_s": 0.9, "band": {"of": "step_s", "low": 0.7, "high": 1.25}}
    assert band_text(long, "step_s") == "900 ms (700..1200)"
    assert band_text({}, "tpot_s") == ABSENT


def test_band_without_a_name_is_of_the_metric_inside_it() -> None:
    assert band_of({"tpot_s": 5.0, "step_s": 2.0, "band": {"low": 1.0, "high": 3.0}}) == ("step_s", 1.0, 3.0)
    assert band_of({"tpot_s": 5.0, "band": {"low": 1.0, "high": 3.0}}) is None
    assert band_of({"tpot_s": 5.0, "band": None}) is None


@pytest.mark.parametrize("value", [None, "12", True, float("nan"), float("inf")])
def test_no_number_is_absent(value: object) -> None:
    assert number({"key": value}, "key") is None


def test_numbers_for_people() -> None:
    assert (count(1234567), count(2.5), count(12.0), count(None)) == ("1,234,567", "2.5", "12", ABSENT)
    assert (share(0.4123), share(0.0412), share(0.0), share(None)) == ("41%", "4.1%", "0%", ABSENT)
    assert share(1.9e-15) == "less than 0.01%"
    assert total_and_capacity(ROW) == "135 of 141 GB"
    assert total_and_capacity({"memory_bytes": {"total": 5e8, "capacity": 80e9}}) == "500 MB of 80.0 GB"
    assert total_and_capacity({"memory_bytes": {"total": 5e8}}) == "500 MB"


def test_answer_names_layout_objective_and_targets() -> None:
    plan = {
        "layouts": [ROW, {**ROW, "rank": 2}],
        "objective": "tokens_per_s",
        "targets": {"tpot": "<= 50 ms"},
    }
    said = answer(plan).replace("\u00a0", " ")
    assert said == (
        "TP2 DP16 EP32 +32 on 32 x h200-sxm, batch 64 a rank, has the highest throughput of the 2 candidates "
        "that meet TPOT ≤ 50 ms."
    )
    assert answer({**plan, "layouts": [ROW]}).endswith(
        "is the only candidate that meets TPOT\u00a0≤\u00a050\u00a0ms."
    )


def test_limits_name_the_largest_parts_and_a_full_memory() -> None:
    said = limits(ROW)
    assert "attention 48%, routed experts 29% and dispatch 14%" in said
    assert "Communication is 14%" in said
    assert "Waiting is 9.5%" in said
    assert "Memory is 96% full" in said
    assert "1.41 times the mean" in said
    assert limits({}) == ""


def test_prefill_between_steps_is_no_part_of_a_step() -> None:
    with_prefill = {**ROW, "breakdown_s": {**ROW["breakdown_s"], "prefill_attention": 1.0}}
    assert limits(with_prefill) == limits(ROW)


def test_certainty_tells_measured_from_carried_over() -> None:
    assert "fitted to measurements on this GPU" in certainty(ROW)
    assert "12% to either side" in certainty(ROW)
    carried = certainty({**ROW, "calibrated": False, "engine": {"step_s": 0.0401, "difference": -0.002}})
    assert "was not measured" in carried and "40.1 ms for the same step, 0.2% away" in carried
    assert certainty({}) == ""


@pytest.mark.parametrize(("cost", "words"), [(0.40, "1 layout lies within"), (0.80, "")])
def test_rivals_inside_the_band_are_counted(cost: float, words: str) -> None:
    plan = {"layouts": [ROW, {**ROW, "usd_per_mtok": cost}], "objective": "usd_per_mtok"}
    said = close_rivals(plan)
    assert said.startswith("Next comes TP2 DP16 EP32 +32 on 32 x h200-sxm, ")
    assert ("within the band" in said) == bool(words) and words in said
    assert close_rivals({"layouts": [ROW]}) == ""
    assert close_rivals({"layouts": [ROW, {}], "objective": "usd_per_mtok"}) == ""


def test_tiles_leave_out_what_is_not_known() -> None:
    assert [name for name, _, _ in tiles({"step_s": 0.04})] == ["step"]
    by_name = {name: (value, remark) for name, value, remark in tiles(ROW)}
    assert by_name["per output token"] == ("41.2 ms", "band 38..46 ms")
    assert by_name["per million tokens"] == ("0.389 USD", "at 2.8 USD a GPU-hour")
    assert "step" not in by_name


def test_ruled_out_is_counted_by_kind_with_different_examples() -> None:
    items = [{"kind": "target", "reason": "TPOT 60 ms"}] * 5
    items += [{"kind": "memory", "reason": f"needs {n} GB"} for n in range(200, 210)]
    items += [{"kind": "odd", "reason": "why", "count": 7}, {"reason": None}]  # type: ignore[dict-item]
    groups = ruled_out_groups({"ruled_out": items})
    assert [(kind, n) for kind, n, _ in groups] == [("memory", 10), ("target", 5), ("odd", 7), ("other", 1)]
    examples = {kind: [why for _, why in found] for kind, _, found in groups}
    assert examples["target"] == ["TPOT 60 ms"]
    assert examples["memory"] == ["needs 200 GB", "needs 201 GB", "needs 202 GB"]


def test_unknown_kinds_of_work_have_a_lasting_colour() -> None:
    assert color("new_kind") == color("exposed new_kind") != ""
    assert label("exposed new_kind") == "exposed new kind"


# ---------------------------------------------------------------- tables


def test_plan_table_is_narrow_and_holds_the_figures() -> None:
    plan = {"layouts": [ROW] * 40, "objective": "usd_per_mtok", "scenario": {"model": "deepseek-v3"}}
    text = printed(plan_table(plan, limit=10))
    lines = text.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 100
    assert lines[0].strip() == "deepseek-v3 on 32 x h200-sxm, by cost per million tokens"
    first = next(line for line in lines if line.split()[:1] == ["1"])
    assert " ".join(first.split()) == "1 TP2 DP16 EP32 +32 64 0.389 41.2 ms (38..46) 912 ms 2,000 96%"
    assert sum("TP2 DP16" in line for line in lines) == 10


def test_plan_table_shows_gpus_where_they_differ_and_steps_where_there_are_no_tokens() -> None:
    other = {
        **ROW,
        "cluster": {"gpu": "b200", "n_gpus": 8},
        "tpot_s": None,
        "band": None,
        "calibrated": False,
    }
    text = printed(plan_table({"layouts": [{**ROW, "tpot_s": None}, other]}))
    assert "8 x b200" in text and "32 x h200-sxm" in text
    assert "40.0 ms" in text and "TPOT" not in text
    assert "* efficiencies carried over" in text


def test_tables_of_nothing() -> None:
    assert "Layouts" in printed(plan_table({}))
    assert "0 candidates ruled out" in printed(ruled_out_table({}))
    assert ABSENT in printed(run_table({}))


def test_run_table_lists_parts_with_shares() -> None:
    text = " ".join(printed(run_table(ROW)).split())
    assert "time per output token 41.2 ms (38..46)" in text
    assert "attention 20.0 ms 48%" in text
    assert "expert weights 100 GB 74%" in text
    assert "total" not in text


def test_run_table_of_what_does_not_fit() -> None:
    text = printed(run_table({**ROW, "feasible": False, "why_not": "needs 190.2 GB of 141 GB"}))
    assert "not feasible" in text and "needs 190.2 GB of 141 GB" in text


def test_markup_of_a_name_is_shown_not_obeyed() -> None:
    evil = "[red]x[/red]"
    row = {**ROW, "cluster": {"gpu": evil, "n_gpus": 8}, "breakdown_s": {evil: 1.0}}
    ruled_out = [{"layout": {"tp": 1}, "kind": evil, "reason": evil, "batch_per_rank": 8}]
    plan = {"layouts": [row], "scenario": {"model": evil}, "ruled_out": ruled_out}
    for table in (plan_table(plan), run_table(row), ruled_out_table(plan)):
        assert evil in printed(table)
    assert f"TP1, batch 8: {evil}" in printed(ruled_out_table(plan))
