"""GPUs and clusters by name."""

from __future__ import annotations

import pytest

from moesim.errors import HardwareError
from moesim.hardware import catalog
from moesim.hardware.gpu import weight_bytes_per_element


def test_every_figure_of_every_gpu_has_a_source_and_prices_are_marked_assumed():
    for gpu in catalog.list_gpus():
        figures = {"memory", "hbm", "flops", "sms", "l2", "clock", "nvlink", "pcie", "price"}
        assert set(gpu.sources) == figures
        assert all(len(source) > 10 for source in gpu.sources.values())
        assert gpu.sources["price"].startswith("assumed, 20")


def test_dense_rates_double_as_operands_halve():
    for gpu in catalog.list_gpus():
        rates = gpu.flops_per_s
        assert rates["bfloat16"] == pytest.approx(2 * rates["tf32"], rel=0.02)
        if "fp8" in rates:
            assert rates["fp8"] == pytest.approx(2 * rates["bfloat16"], rel=0.02)
        if "fp4" in rates:
            assert rates["fp4"] == pytest.approx(2 * rates["fp8"], rel=0.02)


def test_names_are_found_by_alias_and_in_any_case():
    assert catalog.load_gpu("H200") == catalog.load_gpu("h200-sxm") == catalog.load_gpu("h200_sxm")
    assert catalog.load_gpu("4090").name == "rtx-4090"
    assert catalog.load_cluster("gb200-nvl72").gpu.name == "gb200"


def test_no_alias_is_used_twice():
    for folder, kind in (("gpus", catalog._GpuFile), ("clusters", catalog._ClusterFile)):
        entries = catalog._entries(folder, kind)
        aliases = [alias for entry in entries for alias in (entry.name, *entry.aliases)]
        assert len(aliases) == len(set(aliases))
        assert {path.stem for path in (catalog.CATALOG / folder).glob("*.yaml")} == {e.name for e in entries}


@pytest.mark.parametrize(
    ("name", "near"), [("h20O", "h20"), ("h100-sxn", "h100-sxm"), ("zzzzz", "use one of a100")]
)
def test_unknown_gpus_are_refused_with_the_nearest_known(name, near):
    with pytest.raises(HardwareError, match="unknown GPU") as caught:
        catalog.load_gpu(name)
    assert near in (caught.value.fix or "")
    assert "h200-sxm" in (caught.value.fix or "")


def test_every_gpu_has_a_cluster():
    assert {cluster.gpu.name for cluster in catalog.list_clusters()} == set(catalog.gpu_names())


def test_nodes_of_nvswitch_share_a_domain_and_pcie_boxes_do_not():
    node = catalog.load_cluster(gpu="h200", nodes=4)
    assert (node.n_gpus, node.scale_up_ranks, node.nic_bytes_per_s) == (32, 8, 50e9)
    assert [node.domain_of(rank) for rank in (0, 7, 8, 31)] == [0, 0, 1, 3]
    assert catalog.load_cluster(gpu="h200", gpus_per_node=2).scale_up_ranks == 2
    assert catalog.load_cluster("nvl72").scale_up_ranks == 72
    box = catalog.load_cluster(gpu="l40s", scale_up_ranks=8)
    assert box.scale_up_ranks == 1, "there is no NVLink to scale up on"
    assert box.nic_bytes_per_s * 8 == 12.5e9, "eight GPUs share one 100 Gb/s port"


def test_what_is_given_replaces_the_catalog():
    cluster = catalog.load_cluster(
        "dgx-h100",
        gpu="h200",
        nic_bytes_per_s=25e9,
        nic_latency_s=1e-6,
        usd_per_gpu_hour=0.0,
        uplink_oversubscription=2.0,
        scale_up_ranks=4,
    )
    assert cluster.gpu.name == "h200-sxm"
    assert (cluster.nic_bytes_per_s, cluster.nic_latency_s) == (25e9, 1e-6)
    assert (cluster.usd_per_gpu_hour, cluster.uplink_oversubscription, cluster.scale_up_ranks) == (
        0.0,
        2.0,
        4,
    )


def test_nodes_without_a_network_are_refused_until_they_have_one():
    with pytest.raises(HardwareError, match="no network between them"):
        catalog.load_cluster(gpu="rtx-4090", nodes=2)
    assert catalog.load_cluster(gpu="rtx-4090", nodes=2, nic_bytes_per_s=1e9).n_gpus == 16


def test_a_cluster_needs_a_name_or_a_gpu():
    with pytest.raises(HardwareError, match="a name or a GPU"):
        catalog.load_cluster()


def test_a_gpu_of_ones_own_is_one_file(tmp_path):
    text = (catalog.CATALOG / "gpus" / "h200-sxm.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("name: h200-sxm", "name: mine").replace("141 GB", "288 GB"))
    cluster = catalog.load_cluster(gpu=str(path), nodes=2)
    assert (cluster.gpu.name, cluster.gpu.memory_bytes, cluster.n_gpus) == ("mine", 288e9, 16)


@pytest.mark.parametrize(
    ("old", "new", "gist"),
    [
        ("memory: 141 GB", "memory: 141", 'memory: a size in bytes needs a unit; fix: write "141 GB"'),
        ("sms: 132", "sms: many", "sms: Input should be a valid integer"),
        ("  hbm:", "  hbn:", "no source for hbm"),
        ("aliases: [", "aliases: [[", "is not YAML"),
    ],
)
def test_a_bad_gpu_file_is_refused_at_its_key(tmp_path, old, new, gist):
    text = (catalog.CATALOG / "gpus" / "h200-sxm.yaml").read_text()
    assert old in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(HardwareError) as caught:
        catalog.load_gpu(str(path))
    assert gist in str(caught.value)
    assert caught.value.place == str(path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(HardwareError, match="No such file"):
        catalog.load_gpu(str(tmp_path / "none.yaml"))
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"name: \xe9")
    with pytest.raises(HardwareError, match="not UTF-8"):
        catalog.load_gpu(str(path))


def test_the_next_wider_unit_serves_a_gpu_without_the_narrow_one():
    a100, h200 = catalog.load_gpu("a100"), catalog.load_gpu("h200")
    assert a100.peak_flops_per_s("fp8_block") == a100.flops_per_s["bfloat16"]
    assert h200.peak_flops_per_s("nvfp4") == h200.flops_per_s["fp8"]
    assert h200.peak_flops_per_s("w4a16_mxfp4") == h200.flops_per_s["bfloat16"]
    with pytest.raises(HardwareError, match="unknown weight format"):
        h200.peak_flops_per_s("fp7")
    with pytest.raises(HardwareError, match="unknown weight format"):
        weight_bytes_per_element("fp7")
    assert weight_bytes_per_element("fp8_block") * 128**2 == 128**2 + 4
