"""Calibrate four hosts joined by links of known rate and delay, and find the truth again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from calibrate.fit.measured_links import fit_table, predict_table
from calibrate.tables import read_table
from moesim.hardware import Profile, load_gpu
from tests.integration.emulated_links import SUBNET, emulated_cluster, why_impossible
from tests.rank_launcher import job

pytest.importorskip("torch")
WHY_NOT = why_impossible()
N_HOSTS = 4
MBIT = 1e6


def measure(hosts: Sequence[str], out: Path, *options: str) -> str:
    """Run the command on every host; gives what rank 0 says."""
    fixed = ["--backend", "gloo", "--device", "h200-sxm", "-o", str(out)]
    with job(
        out.parent, len(hosts), *fixed, *options, namespaces=hosts, address=f"{SUBNET}1", interface="eth0"
    ) as running:
        found = running.end()
    assert [rank.code for rank in found] == [0] * len(hosts), found
    return found[0].out


def fitted(families: Sequence[Mapping[str, Any]], op: str) -> dict[str, float]:
    found = next(one for one in families if (one["op"], one["implementation"]) == (op, "gloo-internode"))
    return {name: item["value"] for name, item in found["parameters"].items()}


@pytest.mark.slow
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize(
    ("rate_bits_per_s", "delay_s", "sizes"),
    [
        (100 * MBIT, 5e-3, "1KiB,16KiB,128KiB,512KiB"),
        (400 * MBIT, 2e-3, "1KiB,32KiB,256KiB,2MiB"),
        (1000 * MBIT, 1.5e-3, "1KiB,64KiB,512KiB,4MiB"),
    ],
)
def test_calibration_recovers_rate_and_delay(
    tmp_path: Path, rate_bits_per_s: float, delay_s: float, sizes: str
) -> None:
    out = tmp_path / "links.csv"
    with emulated_cluster(N_HOSTS, rate_bits_per_s, delay_s) as hosts:
        said = measure(hosts, out, "--ops", "send_recv,all_to_all", "--sizes", sizes, "--budget", "8s")
    gpu, rows = load_gpu("h200-sxm"), read_table(out).frame
    assert set(rows["n_nodes"]) <= {2, N_HOSTS}
    families = fit_table(rows, gpu=gpu, base=None, note=lambda line: None)
    line, all_to_all = fitted(families, "send_recv"), fitted(families, "all_to_all")
    rate = 8 * line["rate_bytes_per_s"]
    print(
        f"\ntruth {rate_bits_per_s / MBIT:.0f} Mbit/s {delay_s * 1e3:.2f} ms: found {rate / MBIT:.1f} Mbit/s "
        f"({rate / rate_bits_per_s - 1:+.1%}) {line['latency_s'] * 1e3:.3f} ms "
        f"({(line['latency_s'] - delay_s) * 1e6:+.0f} us), all-to-all efficiency {all_to_all['efficiency']:.2f}; "
        f"{len(rows)} rows; {said.strip()}"
    )
    assert rate == pytest.approx(rate_bits_per_s, rel=0.12)
    assert line["latency_s"] == pytest.approx(delay_s, abs=max(0.2 * delay_s, 100e-6))
    assert 0.3 < all_to_all["efficiency"] < 1.0
    # the clocks of the hosts are one clock: what the ranks' starts differ by is what their barrier leaves
    assert rows["start_skew_s"].median() < 5 * delay_s + 2e-3
    told = predict_table(
        rows, gpu=gpu, profile=Profile.model_validate({"device": gpu.name, "families": families})
    )
    large = (rows["op"] == "send_recv") & (rows["message_bytes"] > 2**17)
    error = abs(told.time_s[large] / rows["latency_s"][large] - 1)
    assert error.median() < 0.15
