"""What stands beside generated routing in its validation, and how it is shown."""

from __future__ import annotations

import numpy as np
import pytest

from calibrate.validate.routing import PARTS, Case, Row, routing_table, zipf_of
from moesim.routing import RoutingShape, RoutingTrace, SyntheticRouting, popularity


@pytest.mark.parametrize("exponent", [0.3, 1.0])
def test_zipf_of_a_zipf_load_has_its_exponent(exponent: float) -> None:
    load = popularity(SyntheticRouting.zipf(exponent), RoutingShape(5, 64, 1))
    assert zipf_of(load).zipf_exponent == pytest.approx(exponent, rel=1e-3)


def test_a_table_names_each_case_once_and_shows_the_largest_errors() -> None:
    errors = dict.fromkeys(PARTS, (0.01, -0.02))
    worst = dict.fromkeys(PARTS, -0.034)
    rows = [
        Row("toy", "fitted", "as numbered", routing, 8, errors, worst, errors, 0.05, 0.12)
        for routing in ("per layer", "uniform")
    ]
    text = routing_table(rows)
    assert text.count("toy, as numbered, fitted") == 1
    assert text.count("-3.4%") == 2 * len(PARTS)
    assert text.count("12.0%") == 2


def test_a_case_is_of_the_routing_that_is_shown() -> None:
    counts = np.ones((1, 3, 16), dtype=np.int64)
    trace = RoutingTrace("toy", 16, 2, (0, 1, 2), expert_counts=counts)
    assert Case("toy", "fitted", trace, trace, False, (8,)).shape == RoutingShape(3, 16, 2)
