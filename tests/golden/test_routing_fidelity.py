"""Generated routing against the real routing it was fitted to, by what it costs: the bars of the generator.

Real routing: six files of DeepSeek-V3 counts and 106,359 tokens of gpt-oss-20b (../shared/data/routing). The whole
table is printed by ``python -m calibrate.validate.routing``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from calibrate.fit.routing import OSS_SHAPE, batch_figures, catalog_generators
from calibrate.validate.routing import PARTS, Row, cases, compare
from moesim.routing import catalog_routing, fit_generator, generate_trace, inclusion, popularity, read_npz
from moesim.routing.fit_locality import layer_dependence, measure_locality

PRICED = 0.05
"""Bar on dispatch, combine, experts and step, any batch, any draw."""
LAYER = 0.10
"""Bar on busiest over mean, of the worst layer."""


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[Row]:
    found = []
    for case in cases(shared_data / "routing", quick=True):
        ep = 32 if case.name.startswith("deepseek") else 8
        found += compare(replace(case, eps=(ep,)))
    return found


def test_generated_routing_costs_what_real_routing_costs(rows: list[Row]) -> None:
    for row in rows:
        if row.routing in ("per layer", "few curves"):
            off = {part: row.worst[part] for part in PARTS if abs(row.worst[part]) > PRICED}
            assert not off, (row.case, row.routing, off)


def test_busiest_expert_layer_by_layer(rows: list[Row]) -> None:
    worst = {(row.case, row.routing): row.layer_busiest_worst for row in rows}
    assert max(value for (_, routing), value in worst.items() if routing == "per layer") <= LAYER
    assert max(value for (_, routing), value in worst.items() if routing == "few curves") <= LAYER


def test_uniform_and_zipf_do_not(rows: list[Row]) -> None:
    for row in rows:
        if row.routing in ("uniform", "zipf"):
            assert abs(row.worst["dispatch"]) > 2 * PRICED, (row.case, row.routing)


def test_every_real_file_is_fitted_layer_by_layer(shared_data: Path) -> None:
    for case in cases(shared_data / "routing"):
        if case.how == "fitted" and not case.renamed:
            real = np.asarray(inclusion(case.shown_on, case.shape))
            made = popularity(fit_generator(case.shown_on, per_layer=True), case.shape)
            assert made.max(-1) == pytest.approx(real.max(-1), rel=0.04), case.name


def test_locality_of_gpt_oss(shared_data: Path) -> None:
    trace = read_npz(shared_data / "routing/gpt_oss_20b/tokens.npz", model="gpt-oss-20b", n_experts=32)
    generator = fit_generator(trace)
    made = generate_trace(generator, OSS_SHAPE, n_sequences=352, sequence_length=302)
    real, found = (measure_locality(np.asarray(t.expert_ids), t.offsets) for t in (trace, made))
    assert vars(found) == pytest.approx(vars(real), rel=0.03)
    depends = [layer_dependence(np.asarray(t.expert_ids), 32) for t in (trace, made)]
    assert depends[1] == pytest.approx(depends[0], rel=0.05)
    for phase in ("decode", "prefill"):
        for n_tokens in (16, 64, 256):
            was, now = (batch_figures(source, OSS_SHAPE, n_tokens, phase) for source in (trace, generator))
            assert now == pytest.approx(was, rel=0.08), (phase, n_tokens)


def test_catalog_holds_what_the_fit_gives(shared_data: Path) -> None:
    for generator, _ in catalog_generators(shared_data / "routing"):
        kept = catalog_routing(generator.name)
        assert replace(kept, curves=generator.curves, provenance="") == replace(generator, provenance="")
        for one, other in zip(kept.curves, generator.curves, strict=True):
            assert one.log_load == pytest.approx(other.log_load, abs=0.02)
