"""Token exchanges: which kernel serves which cluster, what bounds it, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import ProfileError, TrafficError
from moesim.hardware.catalog import load_cluster
from moesim.hardware.profile import load_profile
from moesim.network import NetworkParams, all_to_all_s, bounding_link, combine_s, dispatch_s
from moesim.network.exchange import exchange_terms
from moesim.work.ops import Combine, Dispatch

PARAMS = NetworkParams.from_profile(load_profile("h200-sxm"))
NODE = load_cluster("dgx-h200", nodes=1)
CLUSTER = load_cluster("dgx-h200", nodes=4)
RACK = load_cluster("nvl72")
PCIE = load_cluster("pcie-rtx-4090")


def exchange(n_tokens: float, near: float, far: float = 0.0, *, kind="normal", ranks=8, to=Dispatch, **more):
    """Equal copies on every rank."""
    flat = np.ones((1, 1, ranks))
    sizes = {
        "token_bytes": 7392.0 if to is Dispatch else 14336.0,
        "hidden": 7168,
        "top_k": 8,
        "n_experts": 256,
    }
    return to(
        n_tokens=n_tokens * flat, sent_nvlink=near * flat, received_nvlink=near * flat, sent_nic=far * flat,
        received_nic=far * flat, kind=kind, **{**sizes, **more},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["low-latency", "normal", "nccl"])
def test_one_rank_exchanges_nothing(kind: str) -> None:
    assert dispatch_s(exchange(64, 0, kind=kind, ranks=1), cluster=NODE, params=PARAMS) == 0


@pytest.mark.parametrize("kind", ["low-latency", "normal", "nccl"])
@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["n_tokens", "sent_nvlink", "received_nvlink", "sent_nic", "received_nic"])
def test_impossible_copies_are_refused(kind: str, value: float, name: str) -> None:
    op = replace(exchange(64, 100, kind=kind), **{name: np.full((1, 1, 8), value)})
    with pytest.raises(TrafficError, match="finite and not negative"):
        dispatch_s(op, cluster=NODE, params=PARAMS)


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(TrafficError, match="a group has 1 to 8 ranks"):
        dispatch_s(exchange(64, 100, ranks=16), cluster=NODE, params=PARAMS)


def test_nodes_without_nics_are_refused() -> None:
    alone = CLUSTER.model_copy(update={"nic_bytes_per_s": 0.0})
    with pytest.raises(TrafficError, match="no NIC"):
        dispatch_s(exchange(64, 100, 50, ranks=16), cluster=alone, params=PARAMS)


def test_low_latency_wins_on_few_tokens_and_normal_on_many() -> None:
    def both(n_tokens: int) -> tuple[float, float]:
        per_expert = exchange(n_tokens, n_tokens * 7.0, kind="low-latency")
        per_rank = exchange(n_tokens, n_tokens * 4.6)
        return tuple(dispatch_s(op, cluster=NODE, params=PARAMS).max() for op in (per_expert, per_rank))

    few, many = both(8), both(4096)
    assert few[0] < few[1] and many[0] > many[1]


def test_few_experts_leave_sms_idle_in_low_latency() -> None:
    # One SM per expert at most: 16 experts run on 16 SMs, 128 on 128.
    few = exchange(1024, 896, kind="low-latency", top_k=1, n_experts=16)
    many = replace(few, n_experts=128)
    slow, quick = (dispatch_s(op, cluster=NODE, params=PARAMS).max() for op in (few, many))
    assert slow > 3 * quick


def test_more_sms_speed_normal_until_a_link_is_full() -> None:
    times = [
        dispatch_s(exchange(8192, 8192 * 4.6, n_sms=n), cluster=NODE, params=PARAMS).max()
        for n in (4, 8, 24, 48)
    ]
    assert times[0] / times[1] == pytest.approx(2, rel=0.1)
    assert times[2] / times[3] < 1.3


def normal_terms_on(n_nodes: int, n_tokens: float, near: float, far: float, **more):
    cluster = load_cluster("dgx-h200", nodes=n_nodes)
    op = exchange(n_tokens, near, far, ranks=8 * n_nodes, **more)
    return exchange_terms(op, cluster=cluster, params=PARAMS)


def test_forwarding_sms_also_move_a_copy_per_node() -> None:
    few, many = (normal_terms_on(8, 4096, 4096 * 6.5, 4096 * nodes) for nodes in (1.0, 3.5))
    assert np.all(many.sm_s > few.sm_s)
    assert np.all(many.latency_s == few.latency_s)


def test_barriers_between_nodes_go_out_in_rounds() -> None:
    # the first token through costs the same on either: what is left grows with the logarithm
    start = [normal_terms_on(n, 1, 6.0, 3.0).latency_s.max() for n in (2, 3, 4, 8)]
    hop = PARAMS.dispatch["deepep-normal"]["far_round_s"] + CLUSTER.nic_latency_s
    assert start[1] - start[0] == pytest.approx(hop, rel=0.1)
    assert start[2] - start[1] == pytest.approx(0, abs=0.1 * hop)
    assert start[3] - start[2] == pytest.approx(hop, rel=0.1)
    inside = normal_terms_on(2, 1, 6.0, 0.0).latency_s.max()
    assert start[0] - inside == pytest.approx(hop, rel=1e-6)


def test_a_channel_waits_for_its_first_chunk_only() -> None:
    # few tokens are all in the first chunk, one stage after the other; of many, 20 of a channel's 1e5 are
    values = PARAMS.dispatch["deepep-normal"]
    for n_tokens, share in ((10, 1.0), (1e6, 20 / 1e5)):
        terms = normal_terms_on(2, n_tokens, n_tokens * 5.7, n_tokens * 1.0, n_sms=20)
        ramp_s = values["ramp_s"] * n_tokens / (n_tokens + values["ramp_tokens"])
        assert (terms.after_s - ramp_s).max() == pytest.approx(share * terms.sm_s.max(), rel=0.06)


def test_the_kernel_takes_the_profiles_sms_where_none_are_given() -> None:
    implicit = dispatch_s(exchange(512, 2400), cluster=NODE, params=PARAMS)
    assert implicit == pytest.approx(dispatch_s(exchange(512, 2400, n_sms=20), cluster=NODE, params=PARAMS))


def test_bound_moves_from_latency_to_nvlink_to_nic() -> None:
    where = {"cluster": CLUSTER, "params": PARAMS}
    assert bounding_link(exchange(1, 4, kind="low-latency"), **where) == "latency"
    assert bounding_link(exchange(128, 896, kind="low-latency", to=Combine), **where) == "nvlink"
    assert bounding_link(exchange(128, 224, 768, kind="low-latency", ranks=32), **where) == "nic"
    assert bounding_link(exchange(4096, 4096, 8192, ranks=32, n_sms=24), **where) == "nic"
    assert bounding_link(exchange(4096, 4096 * 4.6, n_sms=4), **where) == "latency"


def test_bound_is_the_slowest_ranks() -> None:
    op = exchange(256, 100, 100, kind="low-latency", ranks=16)
    op.received_nic[0, 0, 3] = 4000
    assert bounding_link(op, cluster=CLUSTER, params=PARAMS) == "nic"
    times = dispatch_s(op, cluster=CLUSTER, params=PARAMS)
    assert times.argmax() == 3 and np.ptp(np.delete(times, 3)) == 0


def test_one_domain_of_72_never_pays_for_a_nic() -> None:
    op = exchange(256, 256 * 7.0, ranks=32, token_bytes=14336.0)
    terms = exchange_terms(op, cluster=RACK, params=PARAMS)
    assert np.all(terms.nic_s == 0)
    assert terms.nvlink_s.max() >= 256 * 7.0 * 14336 / 900e9
    # counted per (token, expert), the same traffic is cut to what one copy a rank makes of it
    again = exchange_terms(replace(op, kind="low-latency"), cluster=RACK, params=PARAMS)
    assert again.nvlink_s.max() < terms.nvlink_s.max()


def test_a_box_without_nvlink_exchanges_over_pcie() -> None:
    op = exchange(64, 0, 300, kind="low-latency", ranks=2)
    host = dispatch_s(op, cluster=PCIE, params=PARAMS).max()
    assert host >= 300 * 7392 / PCIE.gpu.pcie_bytes_per_s


def test_nccl_exchange_is_an_all_to_all_of_the_busiest_port() -> None:
    op = exchange(512, 3500, kind="nccl")
    direct = all_to_all_s(
        3500 * 7392.0 * 8 / 7, n_ranks=8, ranks_per_node_in_group=8, cluster=NODE, params=PARAMS
    )
    assert dispatch_s(op, cluster=NODE, params=PARAMS) == pytest.approx(np.full((1, 1, 8), direct))
    far = exchange(512, 500, 3000, kind="nccl", ranks=32)
    assert bounding_link(far, cluster=CLUSTER, params=PARAMS) == "nic"
    nothing = exchange(512, 0, kind="nccl")
    assert np.all(dispatch_s(nothing, cluster=NODE, params=PARAMS) == 0)


def test_nccl_exchange_pays_for_where_its_copies_go() -> None:
    """4 nodes, 3,500 copies a rank: 875 or 2,712 of them (a quarter, or evenly 24 of 31) leave their node."""

    def at(far: float) -> float:
        op = exchange(512, 3500 - far, far, kind="nccl", ranks=32)
        return float(dispatch_s(op, cluster=CLUSTER, params=PARAMS).max())

    near, even = at(875.0), at(3500 * 24 / 31)
    assert even > 2 * near
    # evenly spread it is NCCL's own all-to-all, give or take the start of the kernel
    uniform = all_to_all_s(
        3500 * 7392.0 * 32 / 31, n_ranks=32, ranks_per_node_in_group=8, cluster=CLUSTER, params=PARAMS
    )
    assert uniform <= even < 1.1 * uniform
    assert even >= 3500 * 24 / 31 * 7392 / (0.97 * 50e9)


def test_ranks_that_are_spread_out_see_more_domains() -> None:
    op = exchange(128, 400, 400, kind="normal", ranks=8)
    where = {"cluster": CLUSTER, "params": PARAMS}
    apart = combine_s(exchange(128, 400, 400, to=Combine), ranks_per_node_in_group=2, **where)
    assert np.all(dispatch_s(op, ranks_per_node_in_group=2, **where) > dispatch_s(op, **where))
    assert np.all(apart > combine_s(exchange(128, 400, 0, to=Combine), **where))


def test_group_size_can_be_told_apart_from_the_array() -> None:
    op = exchange(128, 500, ranks=1)
    full = exchange(128, 500, ranks=8)
    one = dispatch_s(op, cluster=NODE, params=PARAMS, n_ranks=8)
    assert one.shape == (1, 1, 1)
    assert one[0, 0, 0] == dispatch_s(full, cluster=NODE, params=PARAMS)[0, 0, 0]


def test_contention_of_the_measured_fabric_stays_with_the_h100_profile() -> None:
    wide = load_cluster("dgx-h100", nodes=8)
    measured = NetworkParams.from_profile(load_profile("h100-sxm"))
    op = exchange(4096, 4096 * 6.5, 4096 * 3.49, ranks=64)
    clean, shared = (dispatch_s(op, cluster=wide, params=params).max() for params in (PARAMS, measured))
    assert shared > 2 * clean


def test_a_profile_without_a_parameter_says_which() -> None:
    full = load_profile("h200-sxm")
    families = [
        one.model_copy(update={"parameters": {k: v for k, v in one.parameters.items() if k != "far_round_s"}})
        for one in full.families
    ]
    older = NetworkParams.from_profile(full.model_copy(update={"families": tuple(families)}))
    with pytest.raises(ProfileError, match="ep_dispatch deepep-normal any: 'far_round_s': is no parameter"):
        dispatch_s(exchange(64, 300, 100, ranks=32), cluster=CLUSTER, params=older)
    assert dispatch_s(exchange(64, 300, 100), cluster=NODE, params=older).max() > 0
