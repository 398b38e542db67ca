"""Quantities: what is read, what is refused, and how numbers are written for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from moesim import units
from moesim.errors import UnitError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_bytes, "141 GB", 141e9),
        (units.parse_bytes, "80GiB", 80 * 2**30),
        (units.parse_bytes, "1.5 KiB", 1536),
        (units.parse_bytes_per_s, "400 Gb/s", 50e9),
        (units.parse_bytes_per_s, "900 GB/s", 900e9),
        (units.parse_seconds, "2.5 us", 2.5e-6),
        (units.parse_seconds, " 50 ms ", 0.05),
        (units.parse_seconds, "2 s", 2.0),
        (units.parse_seconds, "1e3 ns", 1e-6),
        (units.parse_flops_per_s, "989 TFLOP/s", 989e12),
        (units.parse_flops_per_s, "2 PFLOPS", 2e15),
        (units.parse_hertz, "1.98 GHz", 1.98e9),
        (units.parse_usd_per_gpu_hour, "2.80 USD/gpu-hour", 2.80),
    ],
)
def test_reads_quantities_in_si_units(parse, text, value):
    assert parse(text) == pytest.approx(value, rel=1e-15)


def test_a_byte_is_eight_bits_and_a_gibibyte_is_not_a_gigabyte():
    assert units.parse_bytes_per_s("8 Gb/s") == units.parse_bytes_per_s("1 GB/s")
    assert units.parse_bytes("1 GiB") - units.parse_bytes("1 GB") == 73_741_824


@pytest.mark.parametrize(
    ("parse", "text", "rule", "fix"),
    [
        (units.parse_bytes, 141, "needs a unit", 'write "141 GB"'),
        (units.parse_bytes, "141", "needs a unit", 'write "141 GB"'),
        (units.parse_bytes, "141 gb", "unknown unit gb", 'write "141 GB"'),
        (units.parse_bytes, "fifty GB", "is not a size", "number and a unit"),
        (units.parse_bytes, None, "nothing is given", "number and a unit"),
        (units.parse_bytes, True, "is not a size", "number and a unit"),
        (units.parse_bytes, [1], "is not a size", "number and a unit"),
        (units.parse_bytes_per_s, "400 GB", "GB is a unit of size", 'write "400 GB/s"'),
        (units.parse_bytes_per_s, "400 Gb", "unknown unit Gb", 'write "400 Gb/s"'),
        (units.parse_seconds, "50 GB", "GB is a unit of size", "write it in ms"),
        (units.parse_seconds, "3 fortnights", "unknown unit", "write it in ms"),
        (units.parse_seconds, "-2 s", "not negative", None),
        (units.parse_seconds, "1e999 s", "finite", None),
        (units.parse_usd_per_gpu_hour, 2.8, "needs a unit", 'write "2.8 USD/gpu-hour"'),
        (units.parse_flops_per_s, "989 TB/s", "unit of data rate", "TFLOP/s"),
    ],
)
def test_refuses_with_the_fix(parse, text, rule, fix):
    with pytest.raises(UnitError) as caught:
        parse(text)
    assert rule in caught.value.rule
    assert (caught.value.fix is None) if fix is None else fix in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("text", "kind", "op", "value"),
    [
        ("<= 50 ms", "time", "<=", 0.05),
        ("<=2s", "time", "<=", 2.0),
        ("≥ 50000 tokens/s", "throughput", ">=", 50000.0),
        (">= 1 tokens/s", "throughput", ">=", 1.0),
        ("<= 0.5 USD/Mtok", "cost of a million tokens", "<=", 0.5),
    ],
)
def test_reads_bounds(text, kind, op, value):
    bound = units.parse_bound(text, kind)
    assert (bound.op, bound.value) == (op, pytest.approx(value))
    assert units.parse_bound(bound.text, kind) == bound


def test_a_bound_allows_its_own_limit_and_one_side_of_it():
    most, least = units.parse_bound("<= 50 ms"), units.parse_bound(">= 50 ms")
    assert [most.allows(value_s) for value_s in (0.04, 0.05, 0.06)] == [True, True, False]
    assert [least.allows(value_s) for value_s in (0.04, 0.05, 0.06)] == [False, True, True]
    assert most.value_s == 0.05


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("50 ms", 'write "<= 50 ms"'),
        ("< 50 ms", 'write "<= 50 ms"'),
        ("== 50 ms", 'write "<= 50 ms"'),
        ("<= 50", 'write "<= 50 ms"'),
        ("<= 50 MS", 'write "<= 50 ms"'),
        (50, 'write "<= 50 ms"'),
        (None, 'write "<= 50 ms"'),
    ],
)
def test_refuses_bounds_with_the_fix(text, fix):
    with pytest.raises(UnitError) as caught:
        units.parse_bound(text)
    assert caught.value.fix == fix


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.format_seconds(0.0412), "41.2 ms"),
        (units.format_seconds(999.7e-6), "1.00 ms"),
        (units.format_seconds(0), "0 ns"),
        (units.format_bytes(671e9), "671 GB"),
        (units.format_bytes(12), "12.0 B"),
        (units.format_bytes_per_s(900e9), "900 GB/s"),
        (units.format_flops_per_s(989.4e12), "989 TFLOP/s"),
        (units.format_usd(0.2314), "0.231 USD"),
        (units.format_usd(12345.6), "12,346 USD"),
        (units.format_seconds(-0.0412), "-41.2 ms"),
        (units.format_seconds(float("inf")), "inf ns"),
    ],
)
def test_writes_three_digits_in_a_fitting_unit(text, expected):
    assert text == expected


@pytest.mark.parametrize(
    ("write", "parse"),
    [
        (units.format_seconds, units.parse_seconds),
        (units.format_bytes, units.parse_bytes),
        (units.format_bytes_per_s, units.parse_bytes_per_s),
        (units.format_flops_per_s, units.parse_flops_per_s),
    ],
)
@given(value=st.floats(1e-6, 1e17))
def test_what_is_written_reads_back_to_half_a_percent(write, parse, value):
    assert parse(write(value)) == pytest.approx(value, rel=5.01e-3)


@given(number=st.floats(1e-6, 1e6), unit=st.sampled_from(["B", "kB", "MB", "GB", "TB", "KiB", "GiB"]))
def test_bytes_scale_with_the_number(number, unit):
    assert units.parse_bytes(f"{number!r} {unit}") == pytest.approx(number * units.parse_bytes(f"1 {unit}"))


@given(text=st.text(max_size=20))
def test_any_text_is_read_or_refused(text):
    for parse in (units.parse_bytes, units.parse_seconds, units.parse_bound):
        try:
            parse(text)
        except UnitError as error:
            assert "\n" not in str(error)


class _Model(BaseModel):
    size: units.Bytes
    limit: units.TimeBound
    price: units.UsdPerGpuHour = 1.0


def test_models_write_what_they_read_back_exactly():
    model = _Model.model_validate({"size": "0.1 GiB", "limit": "<= 0.3 us", "price": "2.3 USD/gpu-hour"})
    again = _Model.model_validate(model.model_dump())
    assert again == model
    assert _Model.model_validate_json(model.model_dump_json()) == model


def test_models_refuse_bare_numbers_at_their_field():
    with pytest.raises(ValidationError) as caught:
        _Model.model_validate({"size": 3, "limit": "<= 1 s"})
    (error,) = caught.value.errors()
    assert error["loc"] == ("size",)
    assert error["ctx"]["fix"] == 'write "3 GB"'
