"""Profiles of devices: read, merged, carried over, refused where damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.cost.backend import BACKENDS, TRAINING, backend_of
from moesim.errors import ProfileError
from moesim.hardware import list_gpus
from moesim.hardware.profile import CATALOG, load_profile, profile_for

FAMILY = """
device: toy
families:
  - op: {op}
    implementation: mine
    dtype: {dtype}
    parameters: {{launch_s: {{value: 1.0e-6, stderr: 1.0e-7, meaning: launch}}}}
    provenance: {{kind: assumed, data: nothing}}
"""


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)


def test_parts_are_merged(tmp_path: Path) -> None:
    write(tmp_path, "toy.a.yaml", FAMILY.format(op="gemm", dtype="fp8"))
    write(tmp_path, "toy.b.yaml", FAMILY.format(op="router", dtype="any"))
    profile = load_profile("toy", tmp_path)
    assert {family.op for family in profile.families} == {"gemm", "router"}
    assert profile.family("gemm", "mine", "fp8").values() == {"launch_s": 1e-6}
    assert profile.family("router", "mine", "bfloat16").op == "router"  # `any` serves every format


def test_a_family_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    write(tmp_path, "toy.a.yaml", FAMILY.format(op="gemm", dtype="fp8"))
    profile = load_profile("toy", tmp_path)
    with pytest.raises(
        ProfileError, match=r"no parameters for gemm by mine in int8; fix: use one of mine/fp8$"
    ):
        profile.family("gemm", "mine", "int8")
    with pytest.raises(ProfileError, match=r"fix: moesim calibrate fit; it knows gemm$"):
        profile.family("moe_ffn", "mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FAMILY.format(op="gemm", dtype="any").replace("toy", "other"), "is a profile of other, not of toy"),
        ("device: [", "toy.a.yaml: is not YAML"),
        ("device: toy\nfamilies: []\n", "toy.a.yaml: families: "),
        (FAMILY.format(op="gemm", dtype="any").replace("assumed", "guessed"), "provenance.kind"),
        (FAMILY.format(op="gemm", dtype="any").replace("1.0e-7", "-1"), "stderr"),
        ("- 1\n", "toy.a.yaml"),
    ],
)
def test_damaged_profiles_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, "toy.a.yaml", text)
    with pytest.raises(ProfileError) as caught:
        load_profile("toy", tmp_path)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_device_without_a_profile(tmp_path: Path) -> None:
    write(tmp_path, "toy.a.yaml", FAMILY.format(op="gemm", dtype="any"))
    with pytest.raises(ProfileError, match=r"'h999': no profile for this device; fix: use one of toy$"):
        load_profile("h999", tmp_path)


def test_a_gpu_never_measured_takes_its_relatives_efficiencies() -> None:
    assert profile_for("h200-sxm").carried_from is None
    assert profile_for("h100-sxm").carried_from is None
    for gpu in list_gpus():
        profile = profile_for(gpu.name)
        assert profile.device == gpu.name
        if gpu.name not in ("h200-sxm", "h100-sxm"):
            # not the H100's, the H800's nearest: one cluster's congestion is in it
            assert profile.carried_from == "h200-sxm"
            assert profile.families == load_profile(profile.carried_from).families


@pytest.mark.parametrize("device", ["h100-sxm", "h200-sxm"])
def test_no_family_is_in_two_parts_of_a_profile(device: str) -> None:
    names = [(family.op, family.implementation, family.dtype) for family in load_profile(device).families]
    assert len(set(names)) == len(names)


def test_every_parameter_of_the_catalog_says_what_it_is_and_where_it_is_from() -> None:
    devices = sorted({path.name.split(".")[0] for path in CATALOG.glob("*.yaml")})
    assert devices == ["h100-sxm", "h200-sxm"]
    for device in devices:
        for family in load_profile(device).families:
            assert len(family.provenance.data) > 15
            assert all(parameter.meaning for parameter in family.parameters.values())
            # what claims to be fitted has an error on what it was not fitted to
            assert (family.held_out is not None) or family.provenance.kind != "fitted", family


@pytest.mark.parametrize("device", ["h100-sxm", "h200-sxm"])
def test_every_engine_has_its_kernels_measured(device: str) -> None:
    profile = load_profile(device)
    for backend in (*BACKENDS.values(), TRAINING):
        if backend.stand_in is not None:  # measured by users: see test_own_kernels.py
            continue
        for dtype, implementation in backend.expert_ffn.items():
            assert profile.family("moe_ffn", implementation, dtype).parameters
        for dtype in ("bfloat16", "fp8", "fp8_block", "w4a16_mxfp4"):
            assert profile.family("gemm", *backend.gemm_for(dtype)).parameters
        assert profile.family("all_reduce", backend.all_reduce).parameters


def test_engines_by_name() -> None:
    assert backend_of("vllm").mixes_prefill
    assert not backend_of("sglang").mixes_prefill
    with pytest.raises(
        ProfileError, match=r"'tgi': is no known engine; fix: use one of moesim, sglang, trtllm, vllm"
    ):
        backend_of("tgi")
    with pytest.raises(ProfileError, match=r"no expert kernel of sglang .* bfloat16, fp8, fp8_block"):
        backend_of("sglang").expert_ffn_for("nvfp4")


def test_four_bit_weights_multiply_as_sixteen_bit() -> None:
    assert backend_of("sglang").gemm_for("w4a16_mxfp4") == backend_of("sglang").gemm_for("bfloat16")
