"""Named imbalance workloads: at their stated figure for every model of the catalog."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.model import list_models, load_model
from moesim.routing import (
    RoutingShape,
    SyntheticRouting,
    catalog_names,
    catalog_routing,
    draw_batch,
    inclusion,
)
from moesim.routing.describe import gini
from moesim.routing.imbalance import COLLAPSED_SHARES, unevenness

FIGURES = {"none": 0.0, "mild": 0.16, "moderate": 0.37, "heavy": 0.45, "severe": 0.66}
MEASURED = {  # Gini (median over layers) of the model's recordings, experts, top_k
    "mild": (0.1193, 8, 2),
    "moderate": (0.357, 256, 8),
    "heavy": (0.3968, 32, 4),
    "severe": (0.6161, 128, 8),
}
NAMES = [f"imbalance-{name}" for name in (*FIGURES, "collapsed")]
MODELS = {model.name: model for model in (load_model(row.name) for row in list_models()) if model.is_moe}


def shape_of(name: str) -> RoutingShape:
    moe = MODELS[name].moe
    assert moe is not None
    layers = min(len(MODELS[name].moe_layers), 6)
    return RoutingShape(layers, moe.n_experts, moe.top_k, moe.n_groups, moe.top_groups)


def test_all_are_in_the_catalog() -> None:
    assert set(NAMES) <= set(catalog_names())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", FIGURES)
def test_popularity_is_at_the_figure(model: str, name: str) -> None:
    shape = shape_of(model)
    load = inclusion(catalog_routing(f"imbalance-{name}"), shape)
    assert load.sum(axis=1) == pytest.approx(shape.top_k)
    assert unevenness(load, shape.top_k) == pytest.approx(FIGURES[name], abs=1e-6)
    assert gini(load) == pytest.approx(FIGURES[name] * (1 - shape.top_k / shape.n_experts), abs=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_batches_are_too(model: str) -> None:
    """What group-limited routing allows included; a finite batch adds its noise to an even load."""
    shape = shape_of(model)
    seen = []
    for name in NAMES:
        source = catalog_routing(name)
        rng = np.random.default_rng(1)
        ids = draw_batch(source, shape, n_ranks=8, n_tokens=2048, phase="decode", rng=rng)
        count = np.stack([np.bincount(layer.ravel(), minlength=shape.n_experts) for layer in ids])
        seen.append(float(unevenness(count, shape.top_k).mean()))
        wanted = float(unevenness(inclusion(source, shape), shape.top_k).mean())
        assert seen[-1] == pytest.approx(wanted, abs=0.1 if name == "imbalance-none" else 0.03)
    assert seen == sorted(seen)


@pytest.mark.parametrize("name", MEASURED)
def test_the_middle_ones_are_measured_models(name: str) -> None:
    measured, n_experts, top_k = MEASURED[name]
    assert measured / (1 - top_k / n_experts) == pytest.approx(FIGURES[name], abs=0.01)


def test_the_collapsed_one_is_the_example() -> None:
    load = inclusion(catalog_routing("imbalance-collapsed"), RoutingShape(5, 8, 1))
    assert np.sort(load, axis=1) == pytest.approx(np.tile(np.sort(COLLAPSED_SHARES), (5, 1)))


@pytest.mark.parametrize("model", MODELS)
def test_collapse_takes_four_fifths_of_the_choices(model: str) -> None:
    shape = shape_of(model)
    load = np.sort(inclusion(catalog_routing("imbalance-collapsed"), shape), axis=1)
    busiest = load[:, -shape.top_k :]
    assert busiest == pytest.approx(0.8)
    assert busiest.sum(axis=1) / load.sum(axis=1) == pytest.approx(0.8)
    rest = load[:, : -shape.top_k]
    share = rest.max(axis=1) / rest.mean(axis=1)
    assert share == pytest.approx(7 * 0.05 / 0.2, rel=0.25)  # a seventh of them has 5 of 20 parts


@given(
    skew=st.floats(0, 0.8),
    n_experts=st.integers(4, 200),
    share=st.floats(0.01, 0.5),
    layers=st.integers(1, 3),
)
def test_any_figure_and_model(skew: float, n_experts: int, share: float, layers: int) -> None:
    shape = RoutingShape(layers, n_experts, max(1, int(share * n_experts)))
    load = inclusion(SyntheticRouting("mine", "skew", skew=skew), shape)
    assert load.max() <= 1.0
    assert unevenness(load, shape.top_k) == pytest.approx(skew, abs=1e-5)


def test_more_than_the_experts_allow_is_refused() -> None:
    with pytest.raises(TraceError, match="are at most"):
        inclusion(SyntheticRouting("mine", "skew", skew=0.99999), RoutingShape(1, 400, 200))
    with pytest.raises(TraceError, match="below 1"):
        SyntheticRouting("mine", "skew", skew=1.0)
