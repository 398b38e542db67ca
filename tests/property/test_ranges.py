"""Ranges and lists of a sweep, whatever they are."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import ScenarioError
from moesim.scenario.ranges import split_sets, spread, stepped

decimals = st.decimals(Decimal("-1000"), Decimal("1000"), places=4)
steps = st.decimals(Decimal("0.0001"), Decimal("50"), places=4)


@given(low=decimals, by=steps, n=st.integers(0, 60), rest=st.decimals(0, Decimal("0.9999"), places=4))
def test_a_range_has_every_step_and_no_other(low: Decimal, by: Decimal, n: int, rest: Decimal) -> None:
    """Both ends belong to it where the high one is on the grid; beyond the last step nothing does."""
    high = low + n * by
    beyond = high + rest * by
    assert stepped(f"{low}:{high}:{by}") == ([low + i * by for i in range(n + 1)], "")
    assert stepped(f"{low}:{beyond}:{by}") == stepped(f"{low}:{high}:{by}")
    assert stepped(f"{low}..{high}+{by}") == stepped(f"{low}:{high}:{by}")


@given(low=decimals, by=steps, n=st.integers(1, 60))
def test_texts_are_the_decimals_a_person_would_write(low: Decimal, by: Decimal, n: int) -> None:
    texts = spread(f"{low}:{low + n * by}:{by}")
    assert [Decimal(text) for text in texts] == [low + i * by for i in range(n + 1)]
    assert all("e" not in text.lower() and len(text) <= 11 for text in texts)


@given(values=st.lists(st.sampled_from(["8", "16", "none", "eplb", "0.5"]), min_size=1, unique=True))
def test_lists_keep_their_order(values: list[str]) -> None:
    assert spread(", ".join(values)) == tuple(values)
    assert spread(f"[{','.join(values)}]") == tuple(values)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1.0:2.0:0.125", ("1", "1.125", "1.25", "1.375", "1.5", "1.625", "1.75", "1.875", "2")),
        ("0:1:0.1", ("0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1")),
        ("1:2:0.3", ("1", "1.3", "1.6", "1.9")),
        ("1..512*2", tuple(str(2**i) for i in range(10))),
        ("1..4", ("1", "2", "3", "4")),
        ("none,1:2:0.5,8", ("none", "1", "1.5", "2", "8")),
        ("200 Gb/s,400 Gb/s", ("200 Gb/s", "400 Gb/s")),
        ("200:600:200 Gb/s", ("200 Gb/s", "400 Gb/s", "600 Gb/s")),
        ('{"node0": 0.5, "node1": 1}', ('{"node0": 0.5, "node1": 1}',)),
        ("'a,b',c", ("'a,b'", "c")),
        ("8,8,16", ("8", "16")),
    ],
)
def test_examples(text: str, values: tuple[str, ...]) -> None:
    assert spread(text) == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1:2", "from, to and step"),
        ("1..", "from, to and step"),
        ("2:1:0.5", "ends before it starts"),
        ("1:2:0", "never reaches"),
        ("1:2:-1", "never reaches"),
        ("0..8*2", "never reaches"),
        ("8,,16", "is empty"),
        ("1:1000000:1", "more than 4096"),
    ],
)
def test_what_is_no_range(text: str, said: str) -> None:
    with pytest.raises(ScenarioError, match=said) as told:
        split_sets([f"layout.ep={text}"])
    assert told.value.place == f"--set layout.ep={text}"
    assert told.value.fix


def test_keys_with_one_value_are_fixed() -> None:
    fixed, swept = split_sets(["layout.tp=2", "layout.ep = 8,16", "policy.capacity_factor=1:1:1"])
    assert fixed == ["layout.tp=2", "policy.capacity_factor=1"]
    assert [(key.key, key.texts) for key in swept] == [("layout.ep", ("8", "16"))]
    with pytest.raises(ScenarioError, match="given twice"):
        split_sets(["layout.ep=8", "layout.ep=16,32"])
