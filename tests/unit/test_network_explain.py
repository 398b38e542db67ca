"""What bounds a collective, what faster links buy, and which dispatch engines take."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.cli import main
from moesim.errors import LayoutError, MoesimError, ScenarioError, TrafficError
from moesim.hardware.catalog import load_cluster
from moesim.hardware.cluster import Fabric
from moesim.hardware.profile import profile_for
from moesim.network import NetworkParams, Topology, all_reduce_s
from moesim.network.choice import choose_dispatch
from moesim.network.explain import critical_link, explain
from moesim.network.playing import pair_bound_s, play
from moesim.network.shared_links import ExchangeCall, collective_fluid, exchange_fluid
from moesim.network.transfers import Transfers, all_to_all, uniform_traffic
from moesim.plan import explain as terms_of
from moesim.plan import price_one
from moesim.plan.explain import families_used
from moesim.plan.network import network_answer
from moesim.report.topology_page import topology_figure, write_network_report
from moesim.scenario import load_scenario
from moesim.work.case import Layout

PARAMS = NetworkParams.from_profile(profile_for("h200-sxm"))
DISPATCH = ExchangeCall("normal", False, 4096, 7168, 8, 256, 7392.0)
SMALL = ExchangeCall("low-latency", False, 1, 7168, 8, 256, 7408.0)


def cluster(nodes: int = 4, **wiring):
    oversubscription = wiring.pop("uplink_oversubscription", None)
    return load_cluster(
        "dgx-h200", nodes=nodes, fabric=Fabric(**wiring), uplink_oversubscription=oversubscription
    )


def fluid(call: ExchangeCall, on):
    traffic = uniform_traffic(
        call.n_tokens, n_ranks=on.n_gpus, n_experts=256, top_k=8, ranks_per_domain=min(8, on.n_gpus)
    )
    return exchange_fluid(call, traffic, topology=Topology(on), params=PARAMS)


def test_nics_bound_an_exchange_between_nodes_and_nvlink_one_inside() -> None:
    far, near = explain(fluid(DISPATCH, cluster(4))), explain(fluid(DISPATCH, cluster(1)))
    assert (far.bound, far.link.kind) == ("nic", "nic")
    assert far.link.utilisation == pytest.approx(1.0)
    assert far.margin > 1.5 and list(far.by_kind) == ["nic", "nvlink"]
    assert far.gain("nic") > 0.2 and abs(far.gain("nvlink")) < 0.05
    assert near.bound in ("nvlink", "sm") and near.gain("nvlink") > 0.05 and near.margin is None


def test_what_compute_beside_it_costs_is_told_of_kernels_that_keep_sms() -> None:
    normal, small = explain(fluid(DISPATCH, cluster(4))), explain(fluid(SMALL, cluster(4)))
    assert normal.n_sms == 20
    assert normal.beside_s == pytest.approx(PARAMS.exchange_stretch * normal.total_s)
    assert normal.compute_stretch == PARAMS.compute_stretch > 1
    assert (small.n_sms, small.beside_s, small.compute_stretch) == (0, small.total_s, 1.0)
    asked = explain(fluid(replace(DISPATCH, n_sms=24), cluster(4)))
    assert asked.n_sms == 24
    summed = collective_fluid(
        "all_reduce", 1e8, topology=Topology(cluster(1)), params=PARAMS, ranks=np.arange(8)
    )
    assert explain(summed).n_sms == PARAMS.sms_taken("nccl")


def test_a_run_of_two_half_batches_explains_what_overlap_costs(tmp_path: Path) -> None:
    path = tmp_path / "case.yaml"
    path.write_text(
        "model: olmoe-1b-7b\ncluster: {gpu: h200-sxm, nodes: 1, gpus_per_node: 8}\nlayout: {dp: 8, ep: 8}\n"
        "workload: {kind: prefill, tokens_per_rank: 2048, prompt: 2048}\n"
        "policy: {dispatch: normal, overlap: OVERLAP}\nbackend: sglang\n"
    )
    text = path.read_text()
    found = {}
    for overlap in ("none", "two-batch"):
        path.write_text(text.replace("OVERLAP", overlap))
        outcome = price_one(load_scenario(path).single())
        found[overlap] = terms_of(outcome)
        assert any("beside" in row["what"] for row in families_used(outcome)) is (overlap == "two-batch")
    names = ["beside / exchange / any", "beside / compute / any"]
    assert [one["beside"] for one in found["two-batch"]["passes"]] == [names]
    assert [one["beside"] for one in found["none"]["passes"]] == [[]]
    assert found["two-batch"]["families"][names[0]]["held_out"]["n"] == 2


def test_few_tokens_are_bound_by_the_start() -> None:
    told = explain(fluid(SMALL, cluster(4)))
    assert told.bound == "latency"
    assert told.gain("nic") < 0.05
    assert told.parts_s["latency"] > told.parts_s["nic"]


def test_a_blocking_spine_bounds_what_crosses_rails() -> None:
    call = ExchangeCall("low-latency", False, 512, 7168, 8, 256, 7408.0)
    free, blocked = (
        fluid(call, cluster(4, cross_rail="spine", uplink_oversubscription=ratio)) for ratio in (1.0, 4.0)
    )
    assert free.total_s == pytest.approx(free.port_bound_s, rel=1e-9)
    told = explain(blocked)
    assert told.bound == "rail" and told.gap > 1.0
    assert told.gain("rail") > 0.4 > told.gain("nic")
    # on rails of their own, the two levels never cross the spine
    assert fluid(
        DISPATCH, cluster(4, cross_rail="spine", uplink_oversubscription=4.0)
    ).total_s == pytest.approx(fluid(DISPATCH, cluster(4)).total_s)


def test_one_slow_nic_holds_everybody_up() -> None:
    slow = fluid(DISPATCH, cluster(4, degraded={"node1.nic3.out": 0.5}))
    told = explain(slow)
    assert told.link.name == "node1.nic3.out"
    assert slow.total_s > 1.5 * fluid(DISPATCH, cluster(4)).total_s
    assert int(np.argmax(slow.rank_s)) % 8 == 3  # its rail


def test_shared_nics_serve_one_busy_gpu_of_a_pair_twice_as_fast() -> None:
    traffic = uniform_traffic(4096, n_ranks=32, n_experts=256, top_k=8, ranks_per_domain=8)
    for copies in (traffic.copies_per_rank, traffic.copies_per_node, traffic.assignments):
        copies[1::2] = 0  # every other GPU has no token to send
    call = ExchangeCall("low-latency", False, 4096, 7168, 8, 256, 7408.0)
    own, shared = (
        exchange_fluid(call, traffic, topology=Topology(cluster(4, gpus_per_nic=n)), params=PARAMS)
        for n in (1, 2)
    )
    assert shared.total_s < 0.8 * own.total_s


def test_no_link_bounds_nothing() -> None:
    played = play(Transfers.of("none", [0], [0], [1.0]), Topology(cluster(1)))
    assert critical_link(played) is None and played.makespan_s == 0.0 and played.bound_s == 0.0


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
def test_a_collective_is_its_fitted_price_where_nothing_is_shared(op: str) -> None:
    one = collective_fluid(op, 64e6, topology=Topology(cluster(2)), params=PARAMS, ranks=np.arange(16))
    assert one.total_s == pytest.approx(one.port_bound_s, rel=1e-9)
    told = explain(one)
    # rings of two nodes: NICs carry an eighth of a rank's bytes at a ninth of NVLink's rate, so NVLink is next
    assert told.bound == "nic" and told.margin == pytest.approx(9 / 8)
    assert 0.05 < told.gain("nic") < 1 / 9
    slow = Topology(cluster(2, degraded={"node0.nic0.*": 0.25}))
    held = collective_fluid(op, 64e6, topology=slow, params=PARAMS, ranks=np.arange(16))
    assert held.stretch == pytest.approx(4.0) and held.total_s > 2 * one.total_s


def test_a_collective_of_no_bytes_or_one_rank() -> None:
    on = cluster(1)
    assert (
        collective_fluid("all_gather", 0.0, topology=Topology(on), params=PARAMS, ranks=range(8)).total_s == 0
    )
    assert collective_fluid("all_gather", 1e6, topology=Topology(on), params=PARAMS, ranks=[3]).total_s == 0
    switched = collective_fluid(
        "all_reduce", 1e6, topology=Topology(on), params=PARAMS, ranks=range(8), algorithm="in-switch"
    )
    wanted = all_reduce_s(
        1e6, n_ranks=8, ranks_per_node_in_group=8, cluster=on, params=PARAMS, backend="nccl"
    )
    assert switched.total_s == pytest.approx(float(wanted))
    assert explain(switched).bound in ("nvlink", "latency")


def test_pair_bound_at_512_ranks_takes_a_millisecond() -> None:
    sizes = np.random.default_rng(0).gamma(0.5, 1e5, (512, 512))
    arguments = {"ranks_per_domain": 8, "near_bytes_per_s": 450e9, "far_bytes_per_s": 50e9}
    took_s = []
    for _ in range(30):
        started = time.perf_counter()
        pair_bound_s(sizes, **arguments)
        took_s.append(time.perf_counter() - started)
    assert min(took_s) < 1e-3


def layout(**sizes) -> Layout:
    return Layout(**{"tp": 1, "dp": 8, "ep": 8, **sizes})


@pytest.mark.parametrize(
    ("engine", "gpu", "phase", "cut", "kind", "library"),
    [
        ("sglang", "h200-sxm", "decode", {}, "low-latency", "DeepEP low latency"),
        ("vllm", "h200-sxm", "prefill", {}, "normal", "DeepEP normal"),
        ("trtllm", "h200-sxm", "decode", {}, "allgather", "NCCL"),
        ("sglang", "gb200", "decode", {}, "low-latency", "one-sided kernels over NVLink"),
        ("sglang", "a100-80g-sxm", "decode", {}, "allgather", "NCCL"),
        ("sglang", "l40s", "prefill", {}, "allgather", "NCCL"),
        ("sglang", "h200-sxm", "decode", {"ep": 4, "etp": 2}, "allgather", "NCCL"),
        ("sglang", "h200-sxm", "decode", {"tp": 8, "dp": 1}, "allreduce", "NCCL"),
        ("megatron", "h200-sxm", "train", {}, "nccl", "NCCL"),
    ],
)
def test_auto_picks_as_engines_do(engine, gpu, phase, cut, kind, library) -> None:
    found = choose_dispatch(
        "auto", is_moe=True, engine=engine, cluster=load_cluster(gpu=gpu), layout=layout(**cut), phase=phase
    )
    assert (found.kind, found.library) == (kind, library)
    assert found.why


@pytest.mark.parametrize(
    ("wanted", "cut", "said"),
    [
        ("carrier-pigeon", {}, "no kind"),
        ("allreduce", {}, "exchange tokens"),
        ("normal", {"tp": 8, "dp": 1}, "spans"),
    ],
)
def test_dispatch_that_does_not_go_is_refused(wanted: str, cut: dict, said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        choose_dispatch(
            wanted, is_moe=True, engine="sglang", cluster=cluster(1), layout=layout(**cut), phase="decode"
        )


def test_what_is_asked_for_is_taken() -> None:
    found = choose_dispatch(
        "nccl", is_moe=True, engine="sglang", cluster=cluster(1), layout=layout(), phase="decode"
    )
    assert (found.kind, found.why) == ("nccl", "asked for")


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: exchange_fluid(DISPATCH, uniform_traffic(1, n_ranks=32, n_experts=64, top_k=2, ranks_per_domain=8),
                                topology=Topology(cluster(2)), params=PARAMS), "1 to 16 ranks"),
        (lambda: exchange_fluid(DISPATCH, uniform_traffic(1, n_ranks=8, n_experts=64, top_k=2, ranks_per_domain=8),
                                topology=Topology(cluster(2)), params=PARAMS, ranks=[0]), "as many GPUs"),
        (lambda: exchange_fluid(SMALL, uniform_traffic(np.nan, n_ranks=8, n_experts=64, top_k=2, ranks_per_domain=8),
                                topology=Topology(cluster(1)), params=PARAMS), "finite"),
        (lambda: collective_fluid("broadcast", 1.0, topology=Topology(cluster(1)), params=PARAMS, ranks=[0, 1]),
         "no collective with a price"),
        (lambda: collective_fluid("all_gather", 1.0, topology=Topology(cluster(1)), params=PARAMS, ranks=range(9)),
         "1 to 8 ranks"),
        (lambda: fluid(DISPATCH, cluster(2, degraded={"node*.nic*.in": 0.0})), "no way"),
    ],
)  # fmt: skip
def test_refused_in_one_line(work, said: str) -> None:
    with pytest.raises(TrafficError, match=said) as refused:
        work()
    assert "\n" not in str(refused.value)


SCENARIO = """
model: deepseek-v3
cluster: {gpu: h200-sxm, nodes: 2}
layout: {tp: 1, dp: 16, ep: 16}
workload: {kind: decode, batch_per_rank: 64, context: 4096}
routing: deepseek-v3-decode
"""


def answer(tmp_path: Path, **keys: str):
    file = tmp_path / "s.yaml"
    file.write_text(SCENARIO)
    return network_answer(
        load_scenario(str(file), [f"{key}={value}" for key, value in keys.items()]).single()
    )


def test_a_scenario_is_told_even_real_and_balanced(tmp_path: Path) -> None:
    told = answer(tmp_path).told
    rows = {(row["collective"], row["routing"]): row for row in told["collectives"]}
    real = "as routed, contiguous"
    assert {name for name, _ in rows} == {"dispatch", "combine"} and len(rows) == 6
    for name in ("dispatch", "combine"):
        even, routed, eplb = (
            rows[name, each]["time_s"] for each in ("evenly spread", real, "as routed, eplb +16")
        )
        assert even < eplb < routed
    assert told["dispatch"]["kind"] == "low-latency" and told["copy_bytes"]["combine"] == 14336
    assert json.dumps(told)


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({"policy.dispatch": "allgather"}, ["dispatch, all-gather", "combine, reduce-scatter"]),
        ({"layout": "{tp: 8, dp: 2, ep: 16}", "policy.dispatch": "normal"}, ["dispatch", "combine"]),
        ({"layout": "{tp: 8, dp: 1, ep: 8}", "cluster.nodes": "1"}, ["all-reduce"]),
        ({"model": "llama-3.1-70b", "layout": "{tp: 8, dp: 2}", "routing": "synthetic"}, ["all-reduce"]),
        ({"workload": "{kind: prefill, tokens_per_rank: 512, prompt: 512}"}, ["dispatch", "combine"]),
        ({"workload": "{kind: serve, input: 512, output: 128, concurrency: 512}"}, ["dispatch", "combine"]),
        ({"workload": "{kind: serve, input: 512, output: 128, batch_per_rank: 8}",
          "layout": "{tp: 1, dp: 16, ep: 16, placement: eplb, redundant_experts: 16}"}, ["dispatch", "combine"]),
        ({"workload": "{kind: train, global_batch: 64, sequence: 512}", "policy.overlap": "two-batch"},
         ["dispatch", "combine"]),
    ],
)  # fmt: skip
def test_collectives_are_those_of_the_layout(tmp_path: Path, keys: dict[str, str], names: list[str]) -> None:
    told = answer(tmp_path, **keys).told
    assert list(dict.fromkeys(row["collective"] for row in told["collectives"])) == names
    assert all(row["time_s"] > 0 for row in told["collectives"])


def test_one_rank_sends_nothing(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="nothing is sent"):
        answer(tmp_path, model="mixtral-8x7b", cluster="{gpu: h200-sxm, nodes: 1, gpus_per_node: 1}",
               layout="{tp: 1, dp: 1, ep: 1}", routing="synthetic")  # fmt: skip


def test_a_layer_without_experts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(SCENARIO)
    with pytest.raises(MoesimError, match="layers 3 to 60"):
        network_answer(load_scenario(str(file), ()).single(), layer=0)


def test_the_page_shows_links_and_bytes(tmp_path: Path) -> None:
    found = answer(tmp_path)
    views = [(one.title, one.played, one.pair_bytes) for one in found.views[:2]]
    page = write_network_report(tmp_path / "n.html", found.told, views).read_text()
    assert "Bytes from rank to rank" in page and page.count('class="plot"') == 4
    assert "DeepEP low latency" in page and "node0.nic0.out" in page


@pytest.mark.parametrize(
    "wiring",
    [
        {},
        {"scale_up": "mesh"},
        {"network": "fat-tree"},
        {"cross_rail": "spine", "nodes_per_pod": 2, "pod_oversubscription": 2.0},
        {"gpus_per_nic": 2, "gpus_per_pcie_switch": 4},
        {"gpus_per_pcie_switch": 2, "gpus_per_socket": 4},
    ],
)
def test_every_link_has_a_place(wiring: dict) -> None:
    on = load_cluster("dgx-h200", nodes=4, fabric=Fabric(**wiring), uplink_oversubscription=2.0)
    topology = Topology(on)
    figure = topology_figure(play(all_to_all(np.full((32, 32), 1e6)), topology))
    marks = figure["data"][-2]
    assert len(marks["x"]) == len(topology.names)
    heights = dict(zip((re.sub(r"<br>.*", "", text) for text in marks["text"]), marks["y"], strict=True))
    if not wiring:
        assert heights["gpu0.nvlink.out"] > 0 > heights["node3.nic7.in"]
    places = set(zip(marks["x"], marks["y"], strict=True))
    assert len(places) == len(topology.names)  # none hides another
    json.dumps(figure, allow_nan=False)


@pytest.mark.parametrize("options", [[], ["--json"], ["--html", "page.html"]])
def test_the_command_prints_it(tmp_path: Path, monkeypatch, capsys, options: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    Path("s.yaml").write_text(SCENARIO)
    monkeypatch.setattr("sys.argv", ["moesim", "network", "s.yaml", *options])
    main()
    said = capsys.readouterr().out
    if options == ["--json"]:
        assert json.loads(said)["collectives"][0]["bound"] in ("nic", "latency", "sm")
    else:
        assert "evenly spread" in said and "DeepEP" in said
        assert Path("page.html").exists() == bool(options)
