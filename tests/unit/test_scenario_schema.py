"""Choices, layouts that divide, and the schema for editors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moesim.errors import LayoutError, MoesimError, ScenarioError
from moesim.scenario import (
    Choices,
    LayoutChoice,
    LayoutSizes,
    ModelFacts,
    Scenario,
    ServeWorkload,
    check_layout,
    json_schema,
)

DEEPSEEK = ModelFacts(n_layers=61, n_heads=128, n_kv_heads=128, n_experts=256, expert_width=2048)
QWEN = ModelFacts(n_layers=94, n_heads=64, n_kv_heads=4, n_experts=128, expert_width=1536)
DENSE = ModelFacts(n_layers=80, n_heads=64, n_kv_heads=8)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (8, (8,)),
        ([8, 16, 8], (8, 16)),
        (8.0, (8,)),
        ("1..4", (1, 2, 3, 4)),
        ("8..32+8", (8, 16, 24, 32)),
        ("1..512*2", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)),
        ("3..20*2", (3, 6, 12)),
        ("1:9:4", (1, 5, 9)),
        ("8, 16", (8, 16)),
        (Choices((2, 3)), (2, 3)),
    ],
)
def test_one_value_or_several(text, values):
    layout = LayoutChoice.model_validate({"ep": text})
    assert layout.ep is not None
    assert tuple(layout.ep) == values
    assert layout.ep.is_single == (len(values) == 1)
    assert len(layout.ep) == len(values)


@pytest.mark.parametrize(
    "text", ["", "8..", "a,b", "0,1", "1..9*0", "1..9*1", "5..5000", "1:2", {}, [None], [1] * 5000, 1e40]
)
def test_what_is_no_choice_is_refused(text):
    with pytest.raises(ValidationError):
        LayoutChoice.model_validate({"ep": text})


@given(low=st.integers(1, 100), span=st.integers(0, 300), step=st.integers(1, 50))
def test_ranges_hold_what_they_say(low, span, step):
    values = LayoutChoice.model_validate({"ep": f"{low}..{low + span}+{step}"}).ep
    assert values is not None
    assert list(values) == list(range(low, low + span + 1, step))


@pytest.mark.parametrize(
    ("sizes", "more", "how"),
    [
        ({}, "neither is", "write batch_per_rank"),
        ({"batch_per_rank": 1, "concurrency": 2}, "both are", "keep one"),
    ],
)
def test_serving_needs_one_size(sizes, more, how):
    with pytest.raises(ValidationError) as caught:
        ServeWorkload.model_validate({"kind": "serve", "input": 1, "output": 1, **sizes})
    context = caught.value.errors()[0]["ctx"]
    assert more in context["rule"]
    assert how in context["fix"]


@pytest.mark.parametrize(
    ("given_keys", "expected"),
    [
        ({}, LayoutSizes(dp=32, ep=32)),
        ({"tp": 8}, LayoutSizes(tp=8, dp=4, ep=32)),
        ({"tp": 4, "pp": 2}, LayoutSizes(tp=4, dp=4, ep=16, pp=2)),
        ({"ep": 8, "etp": 2}, LayoutSizes(dp=32, ep=8, etp=2)),
        ({"redundant_experts": 32}, LayoutSizes(dp=32, ep=32, redundant_experts=32, placement="eplb")),
        ({"placement": "balanced"}, LayoutSizes(dp=32, ep=32, placement="balanced")),
    ],
)
def test_a_run_fills_in_what_is_left_out(given_keys, expected):
    assert LayoutChoice.model_validate(given_keys).sizes(32, 256) == expected


def test_a_dense_model_has_no_expert_ranks():
    assert LayoutChoice().sizes(8, 0) == LayoutSizes(dp=8, ep=1)


@pytest.mark.parametrize(
    ("layout", "model", "n_gpus", "gist"),
    [
        (LayoutSizes(tp=4, dp=4, ep=16), DEEPSEEK, 32, "takes 16 GPUs and the cluster has 32; fix: try dp=8"),
        (LayoutSizes(tp=3, dp=4), DEEPSEEK, 32, "choose tp and pp that divide 32"),
        (LayoutSizes(dp=32, ep=24), DEEPSEEK, 32, "ep x etp must divide tp x dp = 32; fix: try ep=16 etp=1"),
        (LayoutSizes(dp=32, ep=1, etp=64), DEEPSEEK, 32, "fix: try etp=1"),
        (LayoutSizes(tp=4, dp=3, ep=6), DENSE, 12, "expert group must hold whole attention replicas"),
        (LayoutSizes(tp=96, dp=1), DEEPSEEK, 96, "128 attention heads do not divide; fix: try tp=64"),
        (LayoutSizes(tp=8, dp=1), ModelFacts(4, 48, 6), 8, "6 key-value heads neither divide"),
        (LayoutSizes(pp=96), DENSE, 96, "80 layers make no 96 stages; fix: try pp=80"),
        (LayoutSizes(dp=8, ep=8), DENSE, 8, "a dense model has no experts"),
        (
            LayoutSizes(dp=72, ep=72),
            DEEPSEEK,
            72,
            "256 expert slots do not divide over ep=72; fix: try ep=8 or redundant_experts=32",
        ),
        (LayoutSizes(dp=8, ep=1, redundant_experts=1), DEEPSEEK, 8, "at most one replica"),
        (
            LayoutSizes(dp=2048, etp=2048, ep=1),
            QWEN,
            2048,
            "experts of width 1536 do not divide; fix: try etp=1536",
        ),
    ],
)
def test_layouts_that_do_not_divide_are_refused_with_one_that_does(layout, model, n_gpus, gist):
    with pytest.raises(LayoutError) as caught:
        check_layout(layout, model, n_gpus)
    assert gist in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "model", "n_gpus"),
    [
        (LayoutSizes(dp=72, ep=72, redundant_experts=32), DEEPSEEK, 72),
        (LayoutSizes(tp=8, dp=4, ep=32), DEEPSEEK, 32),
        (LayoutSizes(tp=8, dp=1, ep=1, etp=8), QWEN, 8),
        (LayoutSizes(tp=8, dp=2, ep=4), QWEN, 16),
        (LayoutSizes(tp=8, dp=1, pp=2), DENSE, 16),
    ],
)
def test_layouts_in_use_are_possible(layout, model, n_gpus):
    check_layout(layout, model, n_gpus)


@given(ep=st.sampled_from([2, 3, 5, 8, 24, 72, 144]), redundant=st.integers(0, 40))
def test_the_fix_for_redundant_experts_works(ep, redundant):
    try:
        check_layout(LayoutSizes(dp=ep, ep=ep, redundant_experts=redundant), DEEPSEEK, ep)
    except LayoutError as error:
        fix = int((error.fix or "").rpartition("=")[2])
        assert redundant < fix < redundant + ep
        check_layout(LayoutSizes(dp=ep, ep=ep, redundant_experts=fix), DEEPSEEK, ep)


def test_an_objective_has_a_direction():
    base = {
        "model": "m",
        "cluster": "dgx-h200",
        "workload": {"kind": "prefill", "tokens_per_rank": 8, "prompt": 8},
    }
    assert Scenario.model_validate(base).objective == ("usd_per_mtok", 1)
    assert Scenario.model_validate({**base, "minimise": "tpot"}).objective == ("tpot", 1)
    assert Scenario.model_validate({**base, "maximise": "tokens_per_s"}).objective == ("tokens_per_s", -1)


def test_several_gpus_and_sizes_make_as_many_clusters():
    scenario = Scenario.model_validate(
        {
            "model": "m",
            "cluster": {"gpu": ["h100", "h200"], "nodes": "1..4*2", "price": "1 USD/gpu-hour"},
            "workload": {"kind": "train", "global_batch": 8, "sequence": 8},
        }
    )
    found = [(c.gpu.name, c.nodes, c.usd_per_gpu_hour) for c in scenario.cluster.clusters()]
    assert found == [(gpu, n, 1.0) for gpu in ("h100-sxm", "h200-sxm") for n in (1, 2, 4)]
    with pytest.raises(ScenarioError, match=r"cluster\.gpu has 2 values"):
        scenario.single()


def test_the_schema_describes_every_key():
    schema = json_schema()
    json.dumps(schema)
    objects = [schema, *schema["$defs"].values()]
    described = 0
    for part in objects:
        for name, field in part.get("properties", {}).items():
            assert field.get("description"), f"{part.get('title')}.{name} has no description"
            described += 1
    assert described > 50
    texts = json.dumps(schema)
    assert all(unit in texts for unit in ("[tokens]", "[s]", "[sequences]", "USD/gpu-hour"))
    assert {option.get("type") for option in schema["$defs"]["ClusterChoice"]["anyOf"]} == {None, "string"}


def test_all_is_what_the_package_has():
    import moesim.scenario as package

    assert len(set(package.__all__)) == len(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)
    assert issubclass(ScenarioError, MoesimError)


def test_the_page_of_keys_names_them_all():
    page = (Path(__file__).resolve().parents[2] / "docs" / "scenario.md").read_text(encoding="utf-8")
    schema = json_schema()
    for part in (schema, *schema["$defs"].values()):
        for name, field in part.get("properties", {}).items():
            assert f"| `{name}` |" in page
            assert " ".join(field["description"].split()) in page
