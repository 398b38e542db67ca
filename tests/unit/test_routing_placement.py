"""Placements: what they hold, and layouts that are refused with the number that would do."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import LayoutError
from moesim.routing import Placement, balanced, contiguous, eplb, read_placement, round_robin


def test_contiguous_and_round_robin_by_hand():
    assert contiguous(8, 4).slot_to_expert.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert round_robin(8, 4).slot_to_expert.tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]
    assert contiguous(6, 4, n_redundant=2).slot_to_expert.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]


def test_balanced_packs_longest_first():
    placement = balanced([[8.0, 7, 6, 5]], 2)
    assert placement.rank_load([[8.0, 7, 6, 5]]).tolist() == [[13, 13]]


def test_replicas_halve_the_load():
    placement = Placement(2, 3, np.array([[0, 1, 0, 2]]))
    assert placement.rank_load([[10.0, 3, 1]]).tolist() == [[8, 6]]
    assert (placement.n_slots, placement.slots_per_rank, placement.n_redundant) == (4, 2, 1)
    assert placement.replica_table[0, 0].tolist() == [0, 2]
    assert placement.replica_table[0, 1].tolist() == [1, 1]


@pytest.mark.parametrize("kwargs", [{}, {"n_groups": 4, "n_nodes": 2}, {"n_groups": 4, "n_nodes": 4}])
def test_eplb_holds_every_expert_and_beats_plain(kwargs):
    load = np.random.default_rng(0).lognormal(0, 0.8, (5, 32))
    placement = eplb(load, n_slots=40, n_ranks=8, **kwargs)
    assert (placement.n_replicas >= 1).all()
    assert placement.slot_to_expert.shape == (5, 40)
    assert placement.rank_load(load).sum(-1) == pytest.approx(load.sum(-1))
    assert (placement.rank_load(load).max(-1) < contiguous(32, 8).rank_load(load).max(-1)).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: contiguous(256, 36), "256: expert slots divide over ep=36; fix: n_redundant=32"),
        (lambda: round_robin(60, 8), "fix: n_redundant=4"),
        (lambda: contiguous(8, 0), "0: an expert-parallel group has at least one rank"),
        (lambda: balanced(np.ones((1, 10)), 4), "fix: n_redundant=2"),
        (
            lambda: eplb(np.ones((1, 8)), n_slots=9, n_ranks=4),
            "9: expert slots divide over ep=4; fix: n_redundant=4",
        ),
        (lambda: eplb(np.ones((1, 8)), n_slots=4, n_ranks=4), "4: slots hold every one of the 8 experts"),
        (lambda: eplb(np.ones((1, 8)), n_slots=8, n_ranks=4, n_nodes=3), "4: ranks divide over nodes=3"),
        (
            lambda: eplb(np.ones((1, 8)), n_slots=8, n_ranks=4, n_groups=3),
            "8: experts divide over n_groups=3",
        ),
        (lambda: eplb(np.ones(8), n_slots=8, n_ranks=4), "load is"),
        (lambda: eplb(np.full((1, 8), np.nan), n_slots=8, n_ranks=4), "load is finite"),
        (lambda: Placement(2, 4, np.arange(4)), "is .n_layers, n_slots."),
        (lambda: Placement(2, 4, np.array([[0, 1, 2, 7]])), "7: experts in a placement lie in 0..3"),
        (
            lambda: Placement(2, 3, np.array([[0, 1, 1, 0]])),
            r"2: every expert has a slot in every layer \(layer 0",
        ),
    ],
)
def test_layouts_that_do_not_work_are_refused(make, said):
    with pytest.raises(LayoutError, match=said):
        make()


@pytest.mark.parametrize("name", ["p.json", "p.yaml"])
def test_placement_from_a_file(tmp_path, name):
    file = tmp_path / name
    file.write_text('{"physical_to_logical_map": [[3, 2, 1, 0], [0, 1, 2, 3]]}')
    placement = read_placement(file, n_experts=4, n_ranks=2)
    assert placement.slot_to_expert.tolist() == [[3, 2, 1, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such placement file"),
        ("[1, 2", "states physical_to_logical_map"),
        ("other: 1", "states physical_to_logical_map"),
        ("physical_to_logical_map: [[0, 1], [2]]", "states physical_to_logical_map"),
        ("physical_to_logical_map: [0.5, 1]", "is whole numbers"),
        ("physical_to_logical_map: [0, 1, 2]", "3: slots hold every one of the 4 experts"),
        ("physical_to_logical_map: [0, 1, 2, 9]", "9: experts in a placement lie in 0..3"),
    ],
)
def test_bad_placement_files_are_refused(tmp_path, text, said):
    file = tmp_path / "p.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LayoutError, match=said) as caught:
        read_placement(file, n_experts=4, n_ranks=2)
    assert "p.yaml" in str(caught.value)
