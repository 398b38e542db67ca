"""Figures of the hardware catalog against what was published of whole systems, a way round from the datasheets."""

from __future__ import annotations

import pytest

from moesim.hardware.catalog import load_cluster, load_gpu

# fact, value from the catalog, published value, relative tolerance, source
FACTS = [
    ("DGX H100, 8 GPUs, FP8 with sparsity", 2 * 8 * load_gpu("h100").flops_per_s["fp8"], 32e15, 0.02,
     "NVIDIA DGX H100 datasheet: 32 petaFLOPS FP8"),
    ("DGX H200 memory", 8 * load_gpu("h200").memory_bytes, 1128e9, 0.0,
     "NVIDIA DGX H200 datasheet: 1,128 GB total GPU memory"),
    ("DGX B200 memory rate", 8 * load_gpu("b200").hbm_bytes_per_s, 64e12, 0.0,
     "NVIDIA DGX B200 datasheet: 64 TB/s HBM3e bandwidth"),
    ("DGX B200, 8 GPUs, FP8", 8 * 2 * load_gpu("b200").flops_per_s["fp8"], 72e15, 0.0,
     "NVIDIA DGX B200 datasheet: 72 petaFLOPS FP8, with sparsity"),
    ("GB200 NVL72 NVLink, both directions", 72 * 2 * load_gpu("gb200").nvlink_bytes_per_s, 130e12, 0.01,
     "NVIDIA GB200 NVL72: 130 TB/s"),
    ("GB200 NVL72 memory", 72 * load_gpu("gb200").memory_bytes, 13.4e12, 0.005,
     "NVIDIA GB200 NVL72: 13.4 TB HBM3E"),
    ("HGX H100 NVLink, both directions", 8 * 2 * load_gpu("h100").nvlink_bytes_per_s, 7.2e12, 0.0,
     "NVIDIA HGX H100: 7.2 TB/s aggregate"),
    ("H800 NVLink against H100", load_gpu("h800").nvlink_bytes_per_s / load_gpu("h100").nvlink_bytes_per_s,
     400 / 900, 1e-12, "DeepSeek, Insights into DeepSeek-V3 (arXiv 2505.09343): 900 to 400 GB/s"),
    ("DeepEP's NIC ceiling", load_cluster(gpu="h800", nodes=2).nic_bytes_per_s, 50e9, 0.0,
     "DeepEP README: CX7 InfiniBand 400 Gb/s, 50 GB/s a card"),
    ("H100 roofline ridge, BF16", load_gpu("h100").flops_per_s["bfloat16"] / load_gpu("h100").hbm_bytes_per_s,
     295, 0.01, "989 TFLOP/s over 3.35 TB/s"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fact", "value", "published", "tolerance", "source"), FACTS, ids=[f[0] for f in FACTS]
)
def test_catalog_agrees_with_published_systems(fact, value, published, tolerance, source):
    assert value == pytest.approx(published, rel=tolerance), f"{fact}: {source}"
