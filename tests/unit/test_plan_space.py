"""Which layouts a plan tries, and why the others are none."""

from __future__ import annotations

from typing import Any

import pytest

from moesim.errors import LayoutError
from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.plan.space import Space, check_sizes, choices_of, enumerate_layouts, facts_of
from moesim.scenario import Choices, LayoutChoice, LayoutSizes, Policy
from moesim.work.case import Layout


def space(model: str, nodes: int, *, train: bool = False, **layout: Any) -> Space:
    choice = LayoutChoice.model_validate(layout)
    return enumerate_layouts(load_model(model), load_cluster("dgx-h200", nodes=nodes), choice, train=train)


def has(found: Space, **sizes: Any) -> bool:
    return any(all(getattr(one, key) == value for key, value in sizes.items()) for one in found.layouts)


def test_layouts_that_people_run_are_among_them() -> None:
    found = space("deepseek-v3", 4)
    assert has(found, tp=1, dp=32, ep=32, pp=1)  # DeepEP
    assert has(found, tp=1, dp=32, ep=32, redundant_experts=32, placement="eplb")  # with EPLB
    assert has(found, tp=8, dp=4, ep=32)  # attention cut, experts spread
    assert has(found, tp=8, dp=1, ep=8, pp=4)  # a node a stage
    assert has(found, tp=8, dp=1, ep=1, etp=8, pp=4)  # experts cut
    assert has(found, tp=8, dp=4, ep=8, pp=1)  # replicas of a node


def test_every_layout_is_different_and_fills_the_cluster() -> None:
    found = space("qwen3-235b-a22b", 2)
    assert len(set(found.layouts)) == len(found.layouts)
    facts = facts_of(load_model("qwen3-235b-a22b"))
    for one in found.layouts:
        assert one.tp * one.dp * one.pp == 16
        check_sizes(LayoutSizes(**vars(one)), facts, 16)


def test_a_given_key_is_kept_and_the_others_are_searched() -> None:
    found = space("deepseek-v3", 4, ep=[8, 16], pp=1)
    assert {one.ep for one in found.layouts} == {8, 16}
    assert {one.pp for one in found.layouts} == {1}
    assert len({one.tp for one in found.layouts}) > 2


def test_what_is_asked_and_does_not_divide_is_told() -> None:
    found = space("mixtral-8x7b", 1, ep=16)
    assert found.layouts == ()
    assert {one.kind for one in found.refused} == {"divisibility"}
    assert any("ep x etp must divide" in one.reason for one in found.refused)
    assert all(one.row()["reason"] for one in found.refused)


def test_heads_that_do_not_divide() -> None:
    found = space("gpt-oss-120b", 1, tp=[3, 6])
    assert found.layouts == ()
    assert all("fix:" in one.reason for one in found.refused)


def test_a_dense_model_has_no_expert_sizes() -> None:
    found = space("llama-3.1-70b", 1)
    assert {(one.ep, one.etp, one.redundant_experts) for one in found.layouts} == {(1, 1, 0)}
    assert {one.tp for one in found.layouts} >= {1, 2, 4, 8}


def test_training_has_no_redundant_experts() -> None:
    assert all(one.redundant_experts == 0 for one in space("qwen3-30b-a3b", 1, train=True).layouts)
    assert has(space("qwen3-30b-a3b", 1), redundant_experts=8, ep=8)


def test_slots_are_filled_up_where_experts_do_not_divide() -> None:
    found = enumerate_layouts(load_model("deepseek-v3"), load_cluster("nvl72"), LayoutChoice())
    wide = [one for one in found.layouts if one.ep == 72]
    assert {one.redundant_experts for one in wide} == {32}
    assert {one.placement for one in wide} == {"eplb"}


def test_placement_is_searched_where_given() -> None:
    found = space("olmoe-1b-7b", 1, placement=["round-robin", "balanced"], redundant_experts=0)
    assert {one.placement for one in found.layouts} == {"round-robin", "balanced"}


def test_a_fixed_number_of_replicas() -> None:
    found = space("olmoe-1b-7b", 1, dp=4)
    assert {one.dp for one in found.layouts} == {4}
    assert {one.tp * one.pp for one in found.layouts} == {2}


@pytest.mark.parametrize(
    ("tp", "dp", "ep", "etp", "good"),
    [(8, 1, 8, 1, True), (8, 1, 4, 2, True), (8, 1, 4, 1, False), (2, 4, 2, 1, True), (2, 4, 1, 1, False)],
)
def test_an_expert_group_serves_whole_attention_replicas(
    tp: int, dp: int, ep: int, etp: int, good: bool
) -> None:
    sizes = LayoutSizes(tp=tp, dp=dp, ep=ep, etp=etp)
    facts = facts_of(load_model("mixtral-8x7b"))
    if good:
        check_sizes(sizes, facts, tp * dp)
        return
    with pytest.raises(LayoutError, match=f"fix: try ep={tp} etp=1") as caught:
        check_sizes(sizes, facts, tp * dp)
    assert f"tp = {tp}" in str(caught.value)
    check_sizes(LayoutSizes(tp=tp, dp=dp, ep=tp, etp=1), facts, tp * dp)  # the fix works


def test_choices_of_a_policy() -> None:
    asked = Policy(dispatch=Choices(("normal", "nccl")), capacity_factor=Choices((1.0, None)))
    both = choices_of(asked, plan=True, exchanges=True)
    assert len(both) == 8
    assert {one.overlap for one in both} == {"none", "two-batch"}
    assert {one.overlap for one in choices_of(asked, plan=True, exchanges=False)} == {"none"}
    assert {one.overlap for one in choices_of(asked, plan=False, exchanges=True)} == {"none"}
    given = Policy(overlap=Choices(("two-batch",)))
    assert [one.overlap for one in choices_of(given, plan=False, exchanges=True)] == ["two-batch"]


def test_facts_of_a_model_without_ordinary_attention_in_its_first_layer() -> None:
    facts = facts_of(load_model("qwen3-next-80b-a3b"))  # linear attention first
    assert (facts.n_heads, facts.n_kv_heads, facts.n_experts) == (16, 2, 512)


def test_a_layout_is_hashable_and_complete() -> None:
    assert Layout(tp=2, dp=4, ep=8).n_ranks == 8
