"""Long ranges of sizes are searched in two passes."""

from __future__ import annotations

from moesim.plan import plan
from moesim.plan.refine import COARSE, coarse, finer
from moesim.scenario import parse_scenario

TEXT = """
model: qwen3-30b-a3b
cluster: {gpu: h200-sxm, nodes: 1}
layout: {tp: [1, 2], pp: 1, redundant_experts: 0}
workload: {kind: serve, input: 512, output: 128, batch_per_rank: SIZES}
subject_to: {tpot: <= 12 ms}
"""


def scenario(sizes: str):
    return parse_scenario(TEXT.replace("SIZES", sizes)).scenario


def test_short_ranges_are_left_whole():
    asked = scenario("1..512*2")
    assert coarse(asked) is asked
    assert finer(asked, {"batch_per_rank": 8.0}) is None


def test_long_ranges_keep_their_ends_and_the_sizes_between_lie_around_the_best():
    asked = scenario("1..512")
    first = list(coarse(asked).workload.batch_per_rank)
    assert len(first) <= COARSE and first[0] == 1 and first[-1] == 512
    best = first[-3]
    between = list(finer(asked, {"batch_per_rank": float(best)}).workload.batch_per_rank)
    assert first[-4] < between[0] < best < between[-1] < first[-2]
    assert not set(between) & set(first)


def test_every_size_finds_at_least_what_powers_of_two_find_with_few_points():
    powers, every = plan(scenario("1..512*2")), plan(scenario("1..512"))
    assert every.n_evaluated < 4 * powers.n_evaluated
    assert every.ranked[0].score <= powers.ranked[0].score
    size = every.ranked[0].outcome.workload["batch_per_rank"][every.ranked[0].point]
    assert float(size).is_integer()
    assert all(one.outcome.tpot_s[one.point] <= 12e-3 for one in every.ranked)
