"""Collectives: conventions, choices and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import ProfileError, TrafficError
from moesim.hardware.catalog import load_cluster
from moesim.hardware.profile import load_profile
from moesim.network import (
    NetworkParams,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    port_bound_s,
    reduce_scatter_s,
    send_recv_s,
)
from moesim.network.collectives import nccl_one_node_s, wire_bytes
from moesim.network.traffic import hit_fraction, smooth_max, smooth_min

PARAMS = NetworkParams.from_profile(load_profile("h200-sxm"))
NODE = load_cluster("dgx-h200", nodes=1)
CLUSTER = load_cluster("dgx-h200", nodes=4)
PCIE = load_cluster("pcie-rtx-4090")
COLLECTIVES = (all_reduce_s, all_gather_s, reduce_scatter_s, all_to_all_s)
MIB = 2**20


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_one_rank_and_no_bytes_take_no_time(collective) -> None:
    one = collective(MIB, n_ranks=1, ranks_per_node_in_group=1, cluster=NODE, params=PARAMS)
    none = collective(0.0, n_ranks=8, ranks_per_node_in_group=8, cluster=NODE, params=PARAMS)
    across = collective(0.0, n_ranks=32, ranks_per_node_in_group=8, cluster=CLUSTER, params=PARAMS)
    assert one == 0 and none == 0 and across == 0


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("payload", [-1.0, np.nan, np.inf])
def test_impossible_bytes_are_refused(collective, payload: float) -> None:
    with pytest.raises(TrafficError, match="finite and not negative"):
        collective(
            np.array([1.0, payload]), n_ranks=8, ranks_per_node_in_group=8, cluster=NODE, params=PARAMS
        )


@pytest.mark.parametrize(("n_ranks", "per_node"), [(0, 1), (9, 8), (8, 9), (8, 0)])
def test_groups_that_do_not_fit_are_refused(n_ranks: int, per_node: int) -> None:
    with pytest.raises(TrafficError, match="a group has 1 to 8 ranks"):
        all_reduce_s(MIB, n_ranks=n_ranks, ranks_per_node_in_group=per_node, cluster=NODE, params=PARAMS)


def test_unknown_all_reduce_is_refused() -> None:
    with pytest.raises(TrafficError, match="is no all-reduce"):
        all_reduce_s(MIB, n_ranks=8, ranks_per_node_in_group=8, cluster=NODE, params=PARAMS, backend="tree")


def test_wire_bytes_follow_nccl_tests() -> None:
    # nccl-tests, doc/PERFORMANCE.md: bus bandwidth is algorithm bandwidth times (n-1)/n, all-reduce twice that
    assert wire_bytes("all_gather", 800.0, 8) == 700
    assert wire_bytes("reduce_scatter", 800.0, 8) == 700
    assert wire_bytes("all_to_all", 800.0, 8) == 700
    assert wire_bytes("all_reduce", 800.0, 8) == 1400


def test_engine_kernel_serves_small_buffers_and_nccl_large_ones() -> None:
    def at(payload: float, backend: str) -> float:
        shape = {"n_ranks": 8, "ranks_per_node_in_group": 8, "cluster": NODE, "params": PARAMS}
        return float(all_reduce_s(payload, backend=backend, **shape))

    assert at(16 * 1024, "vllm-custom") < 0.5 * at(16 * 1024, "nccl")
    assert at(256 * MIB, "vllm-custom") == at(256 * MIB, "nccl")


def test_engine_kernel_needs_one_nvlink_domain() -> None:
    shape = {"n_ranks": 16, "ranks_per_node_in_group": 8, "cluster": CLUSTER, "params": PARAMS}
    assert all_reduce_s(16384, backend="vllm-custom", **shape) == all_reduce_s(16384, backend="nccl", **shape)
    box = {"n_ranks": 2, "ranks_per_node_in_group": 2, "cluster": PCIE, "params": PARAMS}
    assert all_reduce_s(16384, backend="vllm-custom", **box) == all_reduce_s(16384, backend="nccl", **box)


def test_in_switch_reduction_beats_the_ring_on_large_buffers() -> None:
    values = dict(PARAMS.nccl["all_reduce"])
    with_switch = nccl_one_node_s("all_reduce", 512 * MIB, n_ranks=8, link_bytes_per_s=450e9, values=values)
    del values["nvls_min_ranks"]
    ring = nccl_one_node_s("all_reduce", 512 * MIB, n_ranks=8, link_bytes_per_s=450e9, values=values)
    assert with_switch < 0.9 * ring


def test_nodes_are_joined_at_the_pace_of_their_nics() -> None:
    shape = {"n_ranks": 32, "ranks_per_node_in_group": 8, "cluster": CLUSTER, "params": PARAMS}
    payload = 2.0**30
    # a quarter of the ranks are at hand, so 3/4 of an all-to-all's bytes leave by a 50 GB/s NIC
    assert all_to_all_s(payload, **shape) >= 0.75 * payload / 50e9
    # rails: each rank's NIC carries an eighth of what leaves the node
    assert all_gather_s(payload, **shape) >= 0.75 * payload / 8 / 50e9
    assert all_gather_s(payload, **shape) < 0.75 * payload / 50e9


def test_oversubscription_slows_what_leaves_the_node() -> None:
    thin = CLUSTER.model_copy(update={"uplink_oversubscription": 2.0})
    shape = {"n_ranks": 32, "ranks_per_node_in_group": 8, "params": PARAMS}
    ratio = all_to_all_s(2.0**30, cluster=thin, **shape) / all_to_all_s(2.0**30, cluster=CLUSTER, **shape)
    assert ratio == pytest.approx(2.0, rel=0.01)


def test_without_nvlink_bytes_go_through_the_host() -> None:
    time_s = all_gather_s(80e6, n_ranks=2, ranks_per_node_in_group=2, cluster=PCIE, params=PARAMS)
    assert time_s >= 40e6 / PCIE.gpu.pcie_bytes_per_s
    alone = CLUSTER.model_copy(update={"nic_bytes_per_s": 0.0})
    shape = {"n_ranks": 16, "ranks_per_node_in_group": 8, "params": PARAMS}
    assert all_gather_s(80e6, cluster=alone, **shape) >= 80e6 * 15 / 16 / alone.gpu.pcie_bytes_per_s


def test_send_takes_the_link_between_its_ranks() -> None:
    near = send_recv_s(1e8, same_domain=True, cluster=CLUSTER, params=PARAMS)
    far = send_recv_s(1e8, same_domain=False, cluster=CLUSTER, params=PARAMS)
    box = send_recv_s(1e8, same_domain=True, cluster=PCIE, params=PARAMS)
    assert 1e8 / 450e9 <= near < 1e8 / 300e9
    assert 1e8 / 50e9 <= far < 1e8 / 40e9
    assert box >= 1e8 / PCIE.gpu.pcie_bytes_per_s
    assert send_recv_s(0.0, same_domain=True, cluster=CLUSTER, params=PARAMS) == 0
    with pytest.raises(TrafficError):
        send_recv_s(-1.0, same_domain=True, cluster=CLUSTER, params=PARAMS)


def test_results_keep_the_shape_of_their_bytes() -> None:
    payload = np.full((3, 2, 8), 1e6)
    shape = {"n_ranks": 8, "ranks_per_node_in_group": 8, "cluster": NODE, "params": PARAMS}
    assert all_reduce_s(payload, **shape).shape == (3, 2, 8)
    assert all_to_all_s(payload[:, :, :1], **shape).shape == (3, 2, 1)


def test_port_bound_refuses_what_no_port_is() -> None:
    with pytest.raises(TrafficError, match="positive rate"):
        port_bound_s([1.0], [1.0], 0.0)
    with pytest.raises(TrafficError, match="bytes received"):
        port_bound_s([1.0], [np.nan], 1e9)


def test_expected_groups_match_deepep() -> None:
    # published_facts F-DISTINCT: E = 256, k = 8: ranks 6.52/7.27/7.68 at 16/32/64; nodes 1.99/3.61/5.29 at 2/4/8
    for groups, expected in ((16, 6.52), (32, 7.27), (64, 7.68), (2, 1.99), (4, 3.61), (8, 5.29)):
        assert groups * hit_fraction(groups, 256, 8) == pytest.approx(expected, abs=0.006)
    assert hit_fraction(1, 8, 2) == 1.0


def test_smooth_bounds_lie_on_the_safe_side() -> None:
    terms = [np.array([0.0, 1.0, 3.0]), np.array([0.0, 1.0, 1.0])]
    high = smooth_max(terms, 4.0)
    assert high[0] == 0 and np.all(high >= np.maximum(*terms))
    low = smooth_min([np.array([1.0, 2.0]), np.array([1.0, 9.0])], 4.0)
    assert low[0] == pytest.approx(2**-0.25) and low[1] <= 2.0


def test_sms_taken_by_each_exchange() -> None:
    assert PARAMS.sms_taken("normal") == 20
    assert PARAMS.sms_taken("low-latency") == 0
    assert PARAMS.sms_taken("one-sided") == 0
    assert PARAMS.sms_taken("nccl") > 0
    with pytest.raises(ProfileError, match="is no kind of exchange"):
        PARAMS.sms_taken("tree")
