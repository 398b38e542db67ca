"""Laws of transfers and of exchanges priced over shared links."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.hardware.catalog import load_cluster
from moesim.hardware.cluster import Fabric
from moesim.hardware.profile import profile_for
from moesim.network import NetworkParams, Topology, combine_s, dispatch_s
from moesim.network.playing import pair_bound_s, play
from moesim.network.shared_links import ExchangeCall, exchange_fluid
from moesim.network.transfers import all_to_all, evened, exchange_transfers, uniform_traffic
from moesim.routing import Traffic, exchange_counts

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)
FREE = Fabric(cross_rail="direct")
CLUSTERS = {
    "one node": load_cluster("dgx-h200", nodes=1),
    "two nodes": load_cluster("dgx-h200", nodes=2, fabric=FREE),
    "rack": load_cluster("nvl72", nodes=4),
    "PCIe box": load_cluster("pcie-l40s", nodes=1),
    "mesh": load_cluster("dgx-h200", nodes=1, fabric=Fabric(scale_up="mesh")),
}
PARAMS = {name: NetworkParams.from_profile(profile_for(one.gpu.name)) for name, one in CLUSTERS.items()}
calls = st.builds(
    ExchangeCall,
    kind=st.sampled_from(["low-latency", "normal", "nccl"]),
    combine=st.booleans(),
    n_tokens=st.sampled_from([1.0, 16.0, 512.0, 8192.0]),
    hidden=st.just(4096),
    top_k=st.sampled_from([1, 4, 8]),
    n_experts=st.sampled_from([64, 256]),
    token_bytes=st.sampled_from([4224.0, 8192.0]),
)


def random_traffic(seed: int, n_ranks: int, per_domain: int) -> Traffic:
    """Copies as tokens could make them: a node's at least its busiest rank's, at most all of its ranks'."""
    rng = np.random.default_rng(seed)
    per_rank = rng.poisson(rng.gamma(0.5, 40.0, (1, n_ranks)), (n_ranks, n_ranks))
    grouped = per_rank.reshape(n_ranks, -1, per_domain)
    least, most = grouped.max(-1), grouped.sum(-1)
    per_node = least + ((most - least) * rng.random()).astype(int)
    return Traffic(per_rank, per_node, per_rank + rng.poisson(3.0, per_rank.shape))


@few
@given(seed=seeds, kind=st.sampled_from(["two_level", "per_rank", "per_assignment"]), combine=st.booleans())
def test_ports_carry_the_bytes_that_routing_counts(seed: int, kind, combine: bool) -> None:
    traffic = random_traffic(seed, 16, 8)
    counted = exchange_counts(traffic, kind, ranks_per_domain=8)
    moved = exchange_transfers(traffic, kind, 3.5, ranks_per_domain=8, combine=combine)
    node = [end // 8 for end in (moved.source, moved.target)]
    far = node[0] != node[1]
    wanted = [counted.sent_nvlink, counted.received_nvlink, counted.sent_nic, counted.received_nic]
    if combine:
        wanted = [wanted[1], wanted[0], wanted[3], wanted[2]]
    found = [
        np.bincount(end[mask], weights=moved.flow_bytes[mask], minlength=16)
        for mask in (~far, far)
        for end in (moved.source, moved.target)
    ]
    assert np.array(found) == pytest.approx(3.5 * np.array(wanted))


@few
@given(call=calls, where=st.sampled_from(sorted(CLUSTERS)))
def test_uniform_traffic_on_free_links_costs_what_ports_say(call: ExchangeCall, where: str) -> None:
    cluster, params = CLUSTERS[where], PARAMS[where]
    per_domain = min(cluster.near_ranks, cluster.n_gpus)
    traffic = uniform_traffic(
        call.n_tokens, n_ranks=cluster.n_gpus, n_experts=call.n_experts, top_k=call.top_k,
        ranks_per_domain=per_domain,
    )  # fmt: skip
    fluid = exchange_fluid(call, traffic, topology=Topology(cluster), params=params)
    price = combine_s if call.combine else dispatch_s
    wanted = price(call.operator(traffic, cluster, per_domain), cluster=cluster, params=params)
    assert fluid.rank_s == pytest.approx(wanted.ravel(), rel=1e-9)


@few
@given(call=calls, seed=seeds)
def test_sharing_never_beats_the_ports(call: ExchangeCall, seed: int) -> None:
    cluster = CLUSTERS["two nodes"]
    traffic = random_traffic(seed, 16, 8)
    fluid = exchange_fluid(call, traffic, topology=Topology(cluster), params=PARAMS["two nodes"])
    assert (fluid.rank_s >= fluid.ports.total_s() * (1 - 1e-9)).all()
    even = exchange_fluid(
        call, evened(traffic, ranks_per_domain=8), topology=Topology(cluster), params=PARAMS["two nodes"]
    )
    assert even.total_s <= fluid.total_s * (1 + 1e-9)


@few
@given(call=calls, seed=seeds)
def test_nodes_may_be_renamed(call: ExchangeCall, seed: int) -> None:
    cluster = CLUSTERS["two nodes"]
    traffic = random_traffic(seed, 16, 8)
    swapped = np.roll(np.arange(16), 8)
    other = Traffic(
        traffic.copies_per_rank[np.ix_(swapped, swapped)],
        traffic.copies_per_node[swapped][:, ::-1],
        traffic.assignments[np.ix_(swapped, swapped)],
    )
    first, second = (
        exchange_fluid(call, one, topology=Topology(cluster), params=PARAMS["two nodes"]).rank_s
        for one in (traffic, other)
    )
    assert second == pytest.approx(first[swapped], rel=1e-9)


@few
@given(seed=seeds)
def test_the_pair_bound_is_one(seed: int) -> None:
    cluster = CLUSTERS["two nodes"]
    sizes = np.random.default_rng(seed).gamma(0.5, 1e6, (16, 16))
    played = play(all_to_all(sizes), Topology(cluster), with_latency=False)
    bound_s = pair_bound_s(
        sizes, ranks_per_domain=8, near_bytes_per_s=cluster.gpu.nvlink_bytes_per_s,
        far_bytes_per_s=cluster.nic_bytes_per_s,
    )  # fmt: skip
    assert bound_s == pytest.approx(played.bound_s)
    assert played.makespan_s >= bound_s * (1 - 1e-9)


@few
@given(seed=seeds)
def test_the_pair_bound_knows_neighbours_nics(seed: int) -> None:
    cluster = load_cluster("dgx-h200", nodes=2)  # PXN
    sizes = np.random.default_rng(seed).gamma(0.5, 1e6, (16, 16))
    sizes[:8, :8] = sizes[8:, 8:] = 0.0
    played = play(all_to_all(sizes), Topology(cluster), with_latency=False)
    rates = {"near_bytes_per_s": cluster.gpu.nvlink_bytes_per_s, "far_bytes_per_s": cluster.nic_bytes_per_s}
    bound_s = pair_bound_s(sizes, ranks_per_domain=8, neighbours_nics=True, **rates)
    assert bound_s == pytest.approx(played.bound_s)
    # a sender's own NIC is not all that it has
    sizes[1:] = 0.0
    alone_s = play(all_to_all(sizes), Topology(cluster), with_latency=False).makespan_s
    assert alone_s < pair_bound_s(sizes, ranks_per_domain=8, **rates)
