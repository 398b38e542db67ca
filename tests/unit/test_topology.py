"""Links and routes of the clusters people buy."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import TrafficError
from moesim.hardware.catalog import cluster_names, load_cluster
from moesim.hardware.cluster import Cluster, Fabric
from moesim.network import Topology, solve_flows


def cluster(name: str = "dgx-h200", nodes: int = 2, **fabric) -> Cluster:
    rates = {key: fabric.pop(key) for key in ("uplink_oversubscription", "nic_bytes_per_s") if key in fabric}
    return load_cluster(name, nodes=nodes, fabric=Fabric(**fabric), **rates)


def route(topology: Topology, source: int, target: int) -> list[str]:
    links = topology.routes([source], [target]).links[0]
    return [topology.names[link] for link in links if link >= 0]


def test_links_of_an_nvswitch_node() -> None:
    topology = Topology(cluster(nodes=2))
    assert Counter(topology.kinds) == {"nvlink": 32, "pcie": 32, "nic": 32}
    rates = dict(zip(topology.names, topology.bytes_per_s, strict=True))
    assert rates["gpu3.nvlink.out"] == 450e9  # NVLink 4: 900 GB/s, half of it each way
    assert rates["node1.nic7.in"] == 50e9  # 400 Gb/s


def test_a_rail_is_reached_through_the_neighbour_on_it() -> None:
    topology = Topology(cluster())
    assert route(topology, 3, 3) == []
    assert route(topology, 0, 3) == ["gpu0.nvlink.out", "gpu3.nvlink.in"]
    assert route(topology, 2, 10) == ["node0.nic2.out", "node1.nic2.in"]
    pxn = ["node0.nic3.out", "node1.nic3.in", "gpu2.nvlink.out", "gpu3.nvlink.in"]
    assert route(topology, 2, 11) == pxn
    latency_s = topology.routes([0, 2, 2], [3, 10, 11]).latency_s
    assert latency_s == pytest.approx([1e-6, 5e-6, 6e-6])


def test_cross_rail_over_the_spine_shares_an_uplink_a_rail() -> None:
    topology = Topology(cluster(nodes=4, cross_rail="spine", uplink_oversubscription=2.0))
    assert route(topology, 2, 11) == ["node0.nic2.out", "node1.nic3.in", "pod0.rail2.out", "pod0.rail3.in"]
    assert route(topology, 2, 10) == ["node0.nic2.out", "node1.nic2.in"]
    rates = dict(zip(topology.names, topology.bytes_per_s, strict=True))
    assert rates["pod0.rail2.out"] == 4 * 50e9 / 2


def test_a_fat_tree_shares_the_leaf_where_it_is_oversubscribed() -> None:
    shared = Topology(cluster(network="fat-tree", uplink_oversubscription=4.0))
    assert route(shared, 2, 11) == ["node0.nic2.out", "node1.nic3.in", "node0.leaf.out", "node1.leaf.in"]
    assert shared.bytes_per_s[shared.names.index("node0.leaf.out")] == 8 * 50e9 / 4
    assert route(Topology(cluster(network="fat-tree")), 2, 11) == ["node0.nic2.out", "node1.nic3.in"]


def test_shared_nics_and_pods() -> None:
    wiring = {"gpus_per_nic": 2, "nodes_per_pod": 2, "pod_oversubscription": 4.0}
    topology = Topology(cluster(nodes=4, nic_bytes_per_s=25e9, **wiring))
    assert route(topology, 0, 9) == ["node0.nic0.out", "node1.nic0.in"]
    assert route(topology, 1, 16) == ["node0.nic0.out", "node2.nic0.in", "pod0.out", "pod1.in"]
    rates = dict(zip(topology.names, topology.bytes_per_s, strict=True))
    assert rates["node0.nic3.out"] == 2 * 25e9
    assert rates["pod1.in"] == 2 * 8 * 25e9 / 4
    # one GPU alone cannot fill a NIC that is faster than its own bus
    fast = Topology(cluster(nodes=4, **wiring))
    assert {"gpu0.pcie.out", "gpu9.pcie.in"} <= set(route(fast, 0, 9))


def test_an_nvlink_mesh_has_a_cable_to_each_peer() -> None:
    topology = Topology(cluster(nodes=1, scale_up="mesh"))
    assert route(topology, 0, 3) == ["gpu0.nvlink.to3"]
    assert topology.bytes_per_s[topology.names.index("gpu0.nvlink.to3")] == pytest.approx(450e9 / 7)


def test_a_pcie_tree_shares_the_uplink_of_a_switch() -> None:
    topology = Topology(cluster("pcie-l40s", nodes=1, gpus_per_pcie_switch=4))
    assert route(topology, 0, 3) == ["gpu0.pcie.out", "gpu3.pcie.in"]
    crossing = ["gpu0.pcie.out", "gpu5.pcie.in", "node0.pcie0.out", "node0.pcie1.in"]
    assert route(topology, 0, 5) == crossing
    # four pairs over one uplink take four times as long as one
    routes = topology.routes([0, 1, 2, 3], [4, 5, 6, 7])
    finish_s = solve_flows(topology.bytes_per_s, routes.links, np.full(4, 1e9), np.zeros(4))
    rate = topology.cluster.gpu.pcie_bytes_per_s
    assert finish_s == pytest.approx(np.full(4, 4e9 / rate))


def test_cpu_sockets_share_what_joins_them() -> None:
    wiring = {"gpus_per_pcie_switch": 2, "gpus_per_socket": 4, "socket_oversubscription": 4.0}
    topology = Topology(cluster("pcie-l40s", nodes=1, **wiring))
    assert route(topology, 0, 1) == ["gpu0.pcie.out", "gpu1.pcie.in"]
    one_socket = ["gpu0.pcie.out", "gpu2.pcie.in", "node0.pcie0.out", "node0.pcie1.in"]
    assert route(topology, 0, 2) == one_socket
    crossing = ["gpu0.pcie.out", "gpu6.pcie.in", "node0.pcie0.out", "node0.pcie3.in"]
    assert route(topology, 0, 6) == [*crossing, "node0.socket0.out", "node0.socket1.in"]
    # four GPUs' lanes over four: one GPU's; two pairs from each of two switches share it
    routes = topology.routes([0, 1, 2, 3], [4, 5, 6, 7])
    finish_s = solve_flows(topology.bytes_per_s, routes.links, np.full(4, 1e9), np.zeros(4))
    assert finish_s == pytest.approx(np.full(4, 4e9 / topology.cluster.gpu.pcie_bytes_per_s))


def test_no_link_of_the_longest_route_is_lost() -> None:
    """Around a dead NIC of a box without NVLink: over buses, switches and sockets at both ends, leaves and pods."""
    wiring = {"gpus_per_pcie_switch": 2, "gpus_per_socket": 4, "network": "fat-tree", "nodes_per_pod": 1}
    two = cluster(
        "pcie-l40s", nodes=2, uplink_oversubscription=2.0, nic_bytes_per_s=25e9,
        degraded={"node0.nic[4-7].*": 0.0, "node1.nic[4-7].*": 0.0, "node?.nic[123].*": 0.0}, **wiring,
    )  # fmt: skip
    found = route(Topology(two), 7, 15)
    near = ["gpu7.pcie.out", "gpu0.pcie.in", "node0.pcie3.out", "node0.pcie0.in", "node0.socket1.out",
            "node0.socket0.in"]  # fmt: skip
    far = ["gpu8.pcie.out", "gpu15.pcie.in", "node1.pcie0.out", "node1.pcie3.in", "node1.socket0.out",
           "node1.socket1.in"]  # fmt: skip
    between = ["node0.nic0.out", "node1.nic0.in", "gpu0.pcie.out", "gpu8.pcie.in", "node0.leaf.out",
               "node1.leaf.in", "pod0.out", "pod1.in"]  # fmt: skip
    assert sorted(found) == sorted([*near, *between, *far])


def test_a_large_nvlink_domain_needs_no_nic_inside_it() -> None:
    topology = Topology(load_cluster("nvl72", nodes=36))
    assert topology.cluster.scale_up_ranks == 72
    assert route(topology, 0, 71) == ["gpu0.nvlink.out", "gpu71.nvlink.in"]
    assert route(topology, 0, 72)[:2] == ["node0.nic0.out", "node18.nic0.in"]


def test_dead_links_are_gone_around_and_degraded_ones_slow() -> None:
    topology = Topology(cluster(degraded={"node0.nic2.*": 0.0, "gpu5.nvlink.out": 0.25}))
    around = route(topology, 2, 10)
    assert "node0.nic2.out" not in around
    assert around[0] == "node0.nic0.out"
    assert {"gpu2.nvlink.out", "gpu0.nvlink.in"} <= set(around)
    assert topology.bytes_per_s[topology.names.index("gpu5.nvlink.out")] == pytest.approx(450e9 / 4)
    dark = Topology(cluster(nodes=1, degraded={"gpu0.nvlink.out": 0.0}))
    assert route(dark, 0, 1) == ["gpu0.pcie.out", "gpu1.pcie.in"]


def test_what_cannot_be_reached_is_refused() -> None:
    cut = Topology(cluster(degraded={"node1.nic*": 0.0}))
    with pytest.raises(TrafficError, match=r"no way from rank 3 to rank 12.*dead link"):
        cut.routes([0, 3], [1, 12])
    with pytest.raises(TrafficError, match="16: ranks of this cluster are 0 to 15"):
        cut.routes([0], [16])
    with pytest.raises(
        TrafficError, match=r"node0\.nix3\.out.: no link of this cluster.*as node0\.nic3\.out"
    ):
        Topology(cluster(degraded={"node0.nix3.out": 0.5}))


@pytest.mark.parametrize("name", cluster_names())
def test_every_pair_of_every_cluster_is_connected_both_ways_alike(name: str) -> None:
    size = load_cluster(name).gpus_per_node
    topology = Topology(load_cluster(name, nodes=2 if load_cluster(name).nic_bytes_per_s else 1))
    n_ranks = topology.cluster.n_gpus
    source, target = np.nonzero(1 - np.eye(n_ranks))
    there, back = topology.routes(source, target), topology.routes(target, source)
    assert (there.links >= 0).any(axis=1).all()
    assert np.array_equal((there.links >= 0).sum(axis=1), (back.links >= 0).sum(axis=1))
    assert np.array_equal(there.latency_s, back.latency_s)
    assert np.all(there.latency_s[source // size == target // size] > 0)
    assert len(set(topology.names)) == len(topology.names)


def test_simgrids_cases_from_a_cluster_description(shared_data: Path) -> None:
    folder = shared_data / "network"
    for line in (folder / "summary.jsonl").read_text(encoding="utf-8").splitlines()[:7]:
        case = json.loads(line)
        with np.load(folder / f"{case['case']}.npz", allow_pickle=False) as known:
            topology = Topology(
                cluster(
                    nodes=case["ep"] // 8,
                    cross_rail=case["mode"],
                    uplink_oversubscription=case["spine"] or 1.0,
                )
            )
            routes = topology.routes(known["src"], known["dst"])
            finish_s = solve_flows(topology.bytes_per_s, routes.links, known["flow_bytes"], routes.latency_s)
            assert finish_s == pytest.approx(known["flow_finish"], rel=1e-6)
