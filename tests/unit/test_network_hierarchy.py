"""Which link a group's traffic takes, what it costs there, and which families say so."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.cost.price import Pricer
from moesim.hardware.catalog import load_cluster
from moesim.hardware.cluster import Cluster
from moesim.plan.context import Choice
from moesim.work.case import Layout
from moesim.work.ops import AllGather, AllReduce, Combine, Dispatch, ReduceScatter, SendRecv
from tests.work_cases import context_of

BOX = load_cluster("pcie-l40s")
BOXES = load_cluster("pcie-l40s", nodes=2)
NODES = load_cluster("dgx-h200", nodes=4)
RACK = load_cluster("nvl72")
PAYLOAD = np.full((1, 1, 1), 64e6)


def pricer(cluster: Cluster, layout: Layout, choice: Choice | None = None) -> Pricer:
    context = context_of("qwen3-235b-a22b")
    case = context.case(cluster, layout, choice or Choice(), "decode")
    return context.pricer(case, "decode")


def names(one: Pricer, op) -> list[str]:
    return [f"{family.op}/{family.implementation}" for family in one.families(op)]


def exchange(to: type, kind: str, near: float, far: float, ranks: int):
    flat = np.ones((1, 1, ranks))
    return to(64 * flat, near * flat, near * flat, far * flat, far * flat, 8192.0, 4096, 8, 128, kind)


def test_gpus_of_a_box_without_nvlink_speak_through_their_host() -> None:
    """Ring of 2 x 7/8 x 64 MB at 0.75 of PCIe 4.0 x16: 4.7 ms; over the shared Ethernet port it took 74 ms."""
    one = pricer(BOX, Layout(tp=8, dp=1, ep=8))
    assert BOX.gpu.pcie_bytes_per_s == 32e9
    reduced_s = one.seconds(AllReduce(PAYLOAD, "tp")).item()
    assert reduced_s == pytest.approx(2 * 7 / 8 * 64e6 / (0.75 * 32e9), rel=0.02)
    for op in (AllGather(PAYLOAD, "tp"), ReduceScatter(PAYLOAD, "tp")):
        assert one.seconds(op).item() == pytest.approx(7 / 8 * 64e6 / (0.75 * 32e9), rel=0.03)
    assert one.link("tp") == "pcie"


def test_stages_of_a_box_without_nvlink_send_through_their_host() -> None:
    near = pricer(BOX, Layout(tp=4, dp=1, ep=4, pp=2))
    far = pricer(BOXES, Layout(tp=8, dp=1, ep=8, pp=2))
    send = SendRecv(PAYLOAD)
    assert (near.link("pp"), far.link("pp")) == ("pcie", "nic")
    assert near.seconds(send).item() == pytest.approx(64e6 / (0.75 * 32e9), rel=0.02)
    assert far.seconds(send).item() == pytest.approx(64e6 / (0.97 * 12.5e9 / 8), rel=0.02)
    assert (names(near, send), names(far, send)) == (["pcie/nccl"], ["inter_node/nccl"])


def test_boxes_without_nvlink_meet_at_their_nics() -> None:
    """Host by host: each rank's share of the port carries an eighth of what one box sends the other."""
    one = pricer(BOXES, Layout(tp=16, dp=1, ep=16))
    assert (one.group("tp").ranks_per_domain, one.link("tp")) == (8, "nic")
    nic_s = 2 * 1 / 2 * 64e6 / 8 / (0.97 * 12.5e9 / 8)
    host_s = 2 * 7 / 8 * 64e6 / (0.75 * 32e9)
    assert one.seconds(AllReduce(PAYLOAD, "tp")).item() == pytest.approx(max(nic_s, host_s), rel=0.05)
    assert names(one, AllReduce(PAYLOAD, "tp")) == ["pcie/nccl", "inter_node/nccl"]


def test_no_scale_up_means_no_nvlink() -> None:
    """`scale_up: 1` on NVSwitch nodes: 2 x 7/8 x 64 MB at 0.75 of PCIe 5.0 x16, not over NVLink or NICs."""
    cluster = load_cluster("dgx-h200", nodes=1, scale_up_ranks=1)
    assert cluster.gpu.nvlink_bytes_per_s == 0
    one = pricer(cluster, Layout(tp=8, dp=1, ep=8))
    host_s = 2 * 7 / 8 * 64e6 / (0.75 * cluster.gpu.pcie_bytes_per_s)
    assert one.seconds(AllReduce(PAYLOAD, "tp")).item() == pytest.approx(host_s, rel=0.03)
    assert names(one, AllReduce(PAYLOAD, "tp")) == ["pcie/nccl"]
    assert load_cluster("dgx-h200", nodes=1).gpu.nvlink_bytes_per_s == 450e9


def test_a_rack_of_one_domain_keeps_its_nvlink() -> None:
    one = pricer(RACK, Layout(tp=1, dp=32, ep=32))
    assert (one.group("ep").ranks_per_domain, one.link("ep")) == (32, "nvlink")


@pytest.mark.parametrize("kind", ["low-latency", "nccl"])
def test_an_exchange_in_a_box_stays_in_the_box(kind: str) -> None:
    one = pricer(BOX, Layout(tp=1, dp=8, ep=8), Choice(kind))
    for near, far in ((448.0, 0.0), (0.0, 448.0)):  # whichever way the caller counts them
        time_s = one.seconds(exchange(Dispatch, kind, near, far, 8)).max()
        host_s = 448 * 8192 / (0.75 * 32e9)
        assert host_s <= time_s < host_s + 150e-6
    if kind == "nccl":
        assert names(one, exchange(Dispatch, kind, 448.0, 0.0, 8)) == ["pcie/nccl"]


def test_families_are_those_that_priced_an_exchange() -> None:
    rack = pricer(RACK, Layout(tp=1, dp=32, ep=32))
    for to, way in ((Dispatch, "ep_dispatch"), (Combine, "ep_combine")):
        for kind in ("low-latency", "normal"):
            assert names(rack, exchange(to, kind, 448.0, 0.0, 32)) == [f"{way}/one-sided"]
    nodes = pricer(NODES, Layout(tp=1, dp=32, ep=32))
    assert names(nodes, exchange(Dispatch, "normal", 448.0, 64.0, 32)) == ["ep_dispatch/deepep-normal"]
    across = names(nodes, exchange(Dispatch, "nccl", 448.0, 64.0, 32))
    assert across == ["all_to_all/nccl", "inter_node/nccl"]
    node = pricer(NODES, Layout(tp=1, dp=8, ep=8))
    assert names(node, exchange(Dispatch, "nccl", 448.0, 0.0, 8)) == ["all_to_all/nccl"]


def test_families_of_an_all_reduce_follow_its_size() -> None:
    one = pricer(NODES, Layout(tp=8, dp=1, ep=8))
    small, large = np.full((1, 1, 1), 16384.0), np.full((1, 1, 1), 2.0**28)
    assert names(one, AllReduce(small, "tp")) == ["all_reduce/sglang-custom"]
    assert names(one, AllReduce(large, "tp")) == ["all_reduce/nccl"]
    both = np.array([16384.0, 32768.0, 2.0**28]).reshape(3, 1, 1)
    assert names(one, AllReduce(both, "tp")) == ["all_reduce/sglang-custom", "all_reduce/nccl"]
    mostly = np.array([16384.0, 2.0**27, 2.0**28]).reshape(3, 1, 1)
    assert names(one, AllReduce(mostly, "tp")) == ["all_reduce/nccl", "all_reduce/sglang-custom"]
    wide = pricer(NODES, Layout(tp=32, dp=1, ep=32))
    assert names(wide, AllGather(large, "tp")) == ["all_gather/nccl", "inter_node/nccl"]


def test_one_sided_kernels_keep_no_sms_from_compute() -> None:
    """DeepEP's normal kernels take 20; on a rack the one-sided ones serve instead, and take none."""
    layout = Layout(tp=1, dp=32, ep=32)
    overlapped = Choice("normal", "two-batch")
    rack, nodes = pricer(RACK, layout, overlapped), pricer(NODES, layout, overlapped)
    assert rack.computing.n_sms == RACK.gpu.n_sms
    assert nodes.computing.n_sms == NODES.gpu.n_sms - 20


def test_nodes_without_nics_use_the_host_between_them() -> None:
    alone = NODES.model_copy(update={"nic_bytes_per_s": 0.0})
    one = pricer(alone, Layout(tp=32, dp=1, ep=32))
    assert names(one, AllReduce(PAYLOAD, "tp")) == ["pcie/nccl"]
    assert one.seconds(AllReduce(PAYLOAD, "tp")).item() >= 64e6 * 2 * 31 / 32 / alone.gpu.pcie_bytes_per_s
