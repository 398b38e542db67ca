"""Collectives as flows: bytes of each leg, order of steps, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import LayoutError, TrafficError
from moesim.hardware.catalog import load_cluster
from moesim.hardware.cluster import Fabric
from moesim.network import Topology
from moesim.network.playing import pair_bound_s, play
from moesim.network.programs import collective_transfers
from moesim.network.transfers import (
    SWITCH,
    Transfers,
    all_to_all,
    copy_bytes,
    evened,
    exchange_transfers,
    joined,
    pairwise,
    point_to_point,
    uniform_traffic,
)
from moesim.routing import RoutingShape, SyntheticRouting, contiguous, count_batch, draw_batch

NODE = Topology(load_cluster("dgx-h200", nodes=1))
TWO = Topology(load_cluster("dgx-h200", nodes=2))
NVLINK, NIC = 450e9, 50e9


def routed(n_ranks: int = 16, per_domain: int = 8, n_tokens: int = 32):
    shape = RoutingShape(1, 64, 4)
    ids = draw_batch(
        SyntheticRouting.zipf(1.0), shape, n_ranks=n_ranks, n_tokens=n_tokens, phase="decode",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    traffic = count_batch(ids, contiguous(64, n_ranks), ranks_per_domain=per_domain).traffic
    one = type(traffic)(traffic.copies_per_rank[0], traffic.copies_per_node[0], traffic.assignments[0])
    return ids[0], one


@pytest.mark.parametrize(
    ("dtype", "header", "wanted"),
    [
        ("bfloat16", 0, 14336),
        ("fp8", 0, 7168 + 4 * 56),
        ("fp8", 16, 7168 + 4 * 56 + 16),
        ("nvfp4", 0, 3584 + 448),
        ("mxfp4", 0, 3584 + 224),
    ],
)
def test_scales_travel_with_their_values(dtype: str, header: float, wanted: float) -> None:
    assert copy_bytes(7168, dtype, header_bytes=header) == wanted


def test_a_token_crosses_to_a_node_once_and_is_forwarded_to_each_rank_once() -> None:
    # token by token, by hand, from the experts that it chose
    ids, traffic = routed()
    rail, forward = np.zeros((16, 16)), np.zeros((16, 16))
    for source in range(16):
        for token in ids[source]:
            ranks = {int(expert) // 4 for expert in token}
            for node in {rank // 8 for rank in ranks}:
                entry = node * 8 + source % 8
                if node != source // 8:
                    rail[source, entry] += 1
                for rank in ranks:
                    if rank // 8 == node and rank != entry:
                        forward[entry, rank] += 1
    found = exchange_transfers(traffic, "two_level", 1.0, ranks_per_domain=8)
    for leg, wanted in (("rail", rail), ("forward", forward)):
        here = found.leg == found.legs.index(leg)
        matrix = np.zeros((16, 16))
        np.add.at(matrix, (found.source[here], found.target[here]), found.flow_bytes[here])
        assert np.array_equal(matrix, wanted)


def test_low_latency_sends_a_message_for_each_expert() -> None:
    ids, traffic = routed()
    found = exchange_transfers(traffic, "per_assignment", 7408.0, ranks_per_domain=8)
    away = sum(int(expert) // 4 != source for source in range(16) for expert in ids[source].ravel())
    assert found.flow_bytes.sum() == away * 7408.0
    one_each = exchange_transfers(traffic, "per_rank", 7408.0, ranks_per_domain=8)
    assert one_each.flow_bytes.sum() < found.flow_bytes.sum()


def test_combine_is_the_dispatch_backwards() -> None:
    _, traffic = routed()
    out = exchange_transfers(traffic, "two_level", 2.0, ranks_per_domain=8)
    home = exchange_transfers(traffic, "two_level", 2.0, ranks_per_domain=8, combine=True)
    assert np.array_equal(home.sent_bytes(16, "rail"), out.received_bytes(16, "rail"))
    assert np.array_equal(home.received_bytes(16), out.sent_bytes(16))


def test_evened_copies_keep_the_bytes_of_every_level() -> None:
    _, traffic = routed()
    even = evened(traffic, ranks_per_domain=8)
    node = np.arange(16) // 8
    for same in (True, False):
        mask = ((node[:, None] == node) == same) & ~np.eye(16, dtype=bool)
        assert even.assignments[mask].sum() == pytest.approx(traffic.assignments[mask].sum())
        assert np.ptp(even.copies_per_rank[mask]) == 0
    assert even.copies_per_node.sum() == pytest.approx(traffic.copies_per_node.sum())


def test_group_limited_routing_shows_in_the_copies() -> None:
    free = uniform_traffic(100, n_ranks=64, n_experts=256, top_k=8, ranks_per_domain=8)
    limited = uniform_traffic(
        100, n_ranks=64, n_experts=256, top_k=8, ranks_per_domain=8, distinct=(3.984, 7.468)
    )
    rail = [
        exchange_transfers(one, "two_level", 1.0, ranks_per_domain=8).sent_bytes(64, "rail")[0]
        for one in (free, limited)
    ]
    assert rail[1] == pytest.approx(100 * 3.984 * 7 / 8)
    assert rail[0] == pytest.approx(100 * 5.29 * 7 / 8, rel=1e-3)


@pytest.mark.parametrize(
    ("algorithm", "sent"),
    [("ring", 2 * 7 / 8), ("two-shot", 2 * 7 / 8), ("one-shot", 7), ("in-switch", 9 / 8)],
)
def test_all_reduce_bytes_of_one_node(algorithm: str, sent: float) -> None:
    flows = collective_transfers("all_reduce", 1e9, n_ranks=8, per_node=8, algorithm=algorithm)
    assert flows.sent_bytes(8) == pytest.approx(np.full(8, sent * 1e9))
    assert flows.received_bytes(8) == pytest.approx(np.full(8, sent * 1e9))
    steps = 2 if algorithm == "two-shot" else 1
    assert play(flows, NODE).makespan_s == pytest.approx(sent * 1e9 / NVLINK + steps * 1e-6, rel=1e-3)


@pytest.mark.parametrize("n_nodes", [2, 3, 4, 5, 8])
def test_a_double_tree_sends_twice_the_payload_at_most_and_reaches_all(n_nodes: int) -> None:
    flows = collective_transfers("all_reduce", 8.0, n_ranks=8 * n_nodes, per_node=8, algorithm="tree")
    trees = flows.leg == flows.legs.index("tree")
    sent = np.bincount(flows.source[trees], weights=flows.flow_bytes[trees], minlength=8 * n_nodes)
    assert sent.max() <= 2.0 + 1e-12  # each NIC carries an eighth of the payload, twice
    assert sent.sum() == pytest.approx(2 * 8.0 * (n_nodes - 1))  # every edge of a tree, up and down
    assert n_nodes == 2 or sent.max() > 1.0


@pytest.mark.parametrize("op", ["all_gather", "reduce_scatter"])
def test_a_ring_of_nodes_uses_every_nic(op: str) -> None:
    flows = collective_transfers(op, 16e9, n_ranks=16, per_node=8)
    played = play(flows, TWO)
    nics = [played.link_bytes[at] for at, kind in enumerate(TWO.kinds) if kind == "nic"]
    assert nics == pytest.approx([16e9 * 15 / 16 / 8] * 32)


def test_broadcast_reaches_every_rank_once() -> None:
    flows = collective_transfers("broadcast", 5.0, n_ranks=12, per_node=8)
    assert flows.received_bytes(12) == pytest.approx([0] + [5.0] * 11)


def test_pairwise_keeps_rounds_in_order() -> None:
    sizes = np.full((16, 16), 1e6)
    at_once, rounds = play(all_to_all(sizes), TWO), play(pairwise(sizes, in_flight=1), TWO)
    assert rounds.transfers.step.max() == 14
    first = rounds.finish_s[rounds.transfers.step == 0]
    later = rounds.finish_s[rounds.transfers.step == 14]
    assert first.max() < later.min()
    # 8 of 15 rounds cross nodes, a NIC each; the rest wait for them
    assert rounds.makespan_s > at_once.makespan_s
    assert rounds.link_bytes == pytest.approx(at_once.link_bytes)


def test_a_rank_begins_a_step_when_its_own_earlier_ones_are_there() -> None:
    first = Transfers.of("a", [0, 2], [1, 3], [450e6, 900e6])
    second = Transfers.of("b", [1, 3], [0, 2], [450e6, 450e6], step=1)
    played = play(joined([first, second]), NODE, with_latency=False)
    assert played.finish_s == pytest.approx([1e-3, 2e-3, 2e-3, 3e-3])


def test_one_send_takes_its_bytes_and_its_latency() -> None:
    assert play(point_to_point(0, 8, 50e6), TWO).makespan_s == pytest.approx(1e-3 + 5e-6)
    assert play(point_to_point(3, 3, 50e6), TWO).makespan_s == 0.0


def test_pair_bound_is_the_busiest_port() -> None:
    sizes = np.zeros((16, 16))
    sizes[:, 3] = 1e6  # all to rank 3: 8 of them over its NIC
    bound_s = pair_bound_s(sizes, ranks_per_domain=8, near_bytes_per_s=NVLINK, far_bytes_per_s=NIC)
    assert bound_s == pytest.approx(8e6 / NIC)
    assert pair_bound_s(sizes[:8, :8], ranks_per_domain=8, near_bytes_per_s=NVLINK, far_bytes_per_s=0) == (
        pytest.approx(7e6 / NVLINK)
    )


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: copy_bytes(1, "int3"), "is no format"),
        (lambda: all_to_all([[0.0, np.nan], [1, 0]]), "finite"),
        (lambda: all_to_all(np.zeros((2, 3))), "square"),
        (lambda: point_to_point(0, 1, -1.0), "not negative"),
        (lambda: pairwise(np.ones((2, 2)), in_flight=0), "in flight"),
        (lambda: all_to_all(np.ones((3, 3))).on([0, 1]), "has no rank 2"),
        (lambda: all_to_all(np.ones((2, 2))).on([1, 1]), "different GPUs"),
        (lambda: play(point_to_point(0, 99, 1.0), TWO), "0 to 15"),
        (lambda: play(point_to_point(0, 1, 1.0), TWO, factor={"nvlink": 0.0}), "positive"),
        (lambda: collective_transfers("scan", 1.0, n_ranks=2, per_node=2), "is no collective"),
        (lambda: collective_transfers("all_gather", 1.0, n_ranks=2, per_node=2, algorithm="tree"), "algorithm"),
        (lambda: collective_transfers("all_gather", np.nan, n_ranks=2, per_node=2), "finite"),
        (lambda: collective_transfers("all_gather", 1.0, n_ranks=0, per_node=2), "a group has a rank"),
        (lambda: pair_bound_s(np.full((2, 2), np.nan), ranks_per_domain=2, near_bytes_per_s=1, far_bytes_per_s=1),
         "finite"),
        (lambda: pair_bound_s(np.ones((2, 3)), ranks_per_domain=2, near_bytes_per_s=1, far_bytes_per_s=1), "square"),
        (lambda: pair_bound_s(np.ones((2, 2)), ranks_per_domain=1, near_bytes_per_s=1, far_bytes_per_s=0), "rate"),
        (lambda: Transfers.of("a", [0], [1], [1.0]).__class__(
            np.zeros(1, int), np.zeros(2, int), np.ones(1), np.zeros(1, int), ("a",), np.zeros(1, int), np.zeros(1)
        ), "one source"),
    ],
)  # fmt: skip
def test_refused_in_one_line(work, said: str) -> None:
    with pytest.raises(TrafficError, match=said) as refused:
        work()
    assert "\n" not in str(refused.value)


def test_two_levels_need_whole_domains() -> None:
    traffic = uniform_traffic(1, n_ranks=12, n_experts=24, top_k=2, ranks_per_domain=8)
    with pytest.raises(LayoutError, match="whole domains of 8"):
        exchange_transfers(traffic, "two_level", 1.0, ranks_per_domain=8)


def test_a_switch_that_is_not_there_adds_nothing() -> None:
    flows = collective_transfers("all_reduce", 1e6, n_ranks=8, per_node=8, algorithm="in-switch")
    assert (flows.source == SWITCH).sum() == 8
    meshed = Topology(load_cluster("dgx-h200", nodes=1, fabric=Fabric(scale_up="mesh")))
    with pytest.raises(TrafficError, match="no switch adds"):
        play(flows, meshed)


def test_dead_links_without_a_way_round_are_told() -> None:
    dead = Fabric(degraded={"node0.nic*.out": 0.0})
    blocked = Topology(load_cluster("dgx-h200", nodes=2, fabric=dead))
    with pytest.raises(TrafficError, match="no way from rank 0 to rank 8"):
        play(point_to_point(0, 8, 1.0), blocked)
