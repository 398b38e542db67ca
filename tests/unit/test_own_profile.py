"""A profile that a user fitted, in place of the catalog's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim.errors import ProfileError, ScenarioError
from moesim.hardware import load_profile, read_profile
from moesim.plan.context import Context
from moesim.plan.run import price_one
from moesim.scenario import Scenario, read_scenario

TEXT = """\
model: mixtral-8x7b
cluster: {gpu: h200-sxm, nodes: 1}
layout: {tp: 1, ep: 8}
workload: {kind: decode, batch_per_rank: 16, context: 1024}
"""
FAMILY = """\
device: {device}
families:
- op: gemm
  implementation: torch-cublas
  dtype: bfloat16
  parameters: {parameters}
  provenance: {{kind: fitted, data: "ours", n_points: 9}}
"""


def scenario(folder: Path, profile: Path | None = None) -> Scenario:
    file = folder / "scenario.yaml"
    file.write_text(TEXT + (f"profile: {profile}\n" if profile else ""), encoding="utf-8")
    return read_scenario(file)


def written(folder: Path, device: str = "h200-sxm", **changes: float) -> Path:
    values: dict[str, Any] = load_profile("h200-sxm").family("gemm", "torch-cublas", "bfloat16").values()
    parameters = {name: {"value": value} for name, value in (values | changes).items()}
    path = folder / "mine.yaml"
    path.write_text(FAMILY.format(device=device, parameters=parameters), encoding="utf-8")
    return path


def test_a_family_of_ones_own_prices_its_operators_and_the_rest_stays(tmp_path: Path) -> None:
    usual = price_one(scenario(tmp_path))
    launch_s = load_profile("h200-sxm").family("gemm", "torch-cublas", "bfloat16").values()["launch_s"]
    slow = price_one(scenario(tmp_path, written(tmp_path, launch_s=launch_s + 1e-3)))
    # three dense products a layer (QKV, output, router) and the head, a millisecond more each
    layers = 32
    assert float(slow.step_s[0] - usual.step_s[0]) == pytest.approx((3 * layers + 1) * 1e-3, rel=0.05)
    own = Context.of(scenario(tmp_path, written(tmp_path)))
    (cluster,) = scenario(tmp_path).cluster.clusters()
    profile = own.profile(cluster)
    assert profile.family("gemm", "torch-cublas", "bfloat16").provenance.data == "ours"
    assert len(profile.families) == len(load_profile("h200-sxm").families)
    assert profile.carried_from is None


def test_its_file_is_looked_for_beside_the_scenario(tmp_path: Path) -> None:
    written(tmp_path)
    assert scenario(tmp_path, Path("mine.yaml")).profile == str(tmp_path / "mine.yaml")
    with pytest.raises(ScenarioError, match=r"absent\.yaml.*there is no such profile file"):
        scenario(tmp_path, Path("absent.yaml"))


def test_a_profile_of_another_device_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, device="h100-sxm")
    with pytest.raises(ProfileError, match=r"profile of h100-sxm, and the scenario's GPU is h200-sxm"):
        Context.of(scenario(tmp_path, path))


def test_families_carried_over_are_said(tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("kind: fitted", "kind: carried-over"), "utf-8")
    assert read_profile(path).over(load_profile("h200-sxm")).carried_from == "its base profile"
