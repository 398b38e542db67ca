"""A profile that a user fitted, in place of the catalog's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim.errors import ProfileError, ScenarioError
from moesim.hardware import Profile, load_profile, read_profile
from moesim.hardware.profile import Provenance, profile_for
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


def as_kind(path: Path, kind: str, implementation: str = "torch-cublas") -> Profile:
    text = path.read_text(encoding="utf-8").replace("kind: fitted", f"kind: {kind}")
    path.write_text(text.replace("torch-cublas", implementation), encoding="utf-8")
    return read_profile(path)


@pytest.mark.parametrize("kind", ["carried-over", "assumed"])
def test_what_was_measured_on_the_gpu_is_not_given_up_for_a_filler(tmp_path: Path, kind: str) -> None:
    catalog = load_profile("h200-sxm")
    whole = as_kind(written(tmp_path, launch_s=1.0), kind).over(catalog)
    assert whole.family("gemm", "torch-cublas", "bfloat16") == catalog.family(
        "gemm", "torch-cublas", "bfloat16"
    )
    assert whole.carried_from is None
    assert len(whole.families) == len(catalog.families)
    usual = price_one(scenario(tmp_path))
    assert price_one(scenario(tmp_path, tmp_path / "mine.yaml")).step_s[0] == usual.step_s[0]


@pytest.mark.parametrize("kind", ["carried-over", "assumed"])
def test_a_filler_takes_the_place_of_an_assumption(tmp_path: Path, kind: str) -> None:
    catalog = load_profile("h200-sxm")
    family = catalog.family("gemm", "torch-cublas", "bfloat16")
    guess = family.model_copy(update={"provenance": Provenance(kind="assumed", data="a guess")})
    others = tuple(one for one in catalog.families if one is not family)
    base = Profile(device="h200-sxm", families=(*others, guess))
    found = as_kind(written(tmp_path), kind).over(base).family("gemm", "torch-cublas", "bfloat16")
    assert found.provenance.data == "ours"


def test_fillers_in_use_are_said(tmp_path: Path) -> None:
    whole = as_kind(written(tmp_path), "carried-over", "mine").over(load_profile("h200-sxm"))
    assert whole.family("gemm", "mine", "bfloat16").provenance.kind == "carried-over"
    assert whole.carried_from == "its base profile"


def test_a_gpu_without_measurements_of_its_own_takes_every_family_given(tmp_path: Path) -> None:
    given = as_kind(written(tmp_path, device="b200-sxm", launch_s=1.0), "carried-over")
    whole = given.over(profile_for("b200-sxm"))
    assert whole.family("gemm", "torch-cublas", "bfloat16").values()["launch_s"] == 1.0
    assert whole.carried_from == "h200-sxm"
