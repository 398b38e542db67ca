"""`moesim calibrate fit` and `validate`: what goes in, what comes out, what is refused."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from calibrate.fit import gemm, registry
from calibrate.fit.common import Prediction
from calibrate.fit.doubts import doubts
from calibrate.schema import SCHEMAS
from calibrate.tables import read_tables
from calibrate.validate import serving
from moesim.cli import main
from moesim.errors import MeasurementError, ProfileError
from moesim.hardware import Profile, load_gpu, load_profile, open_profile, read_profile

H200 = load_gpu("h200-sxm")
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Told:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def calibrate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Told]:
    """Run `moesim calibrate ...` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(arguments: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["moesim", "calibrate", *shlex.split(arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        told = capsys.readouterr()
        return Told(code, told.out, told.err)

    return call


def copies(folder: Path, name: str = "memory.csv", **cells: object) -> Path:
    """A table of copies that take 3 us and their bytes at 80% of the memory rate, both ways."""
    n_bytes = 2 ** np.arange(24, 33)
    rate = 0.8 * H200.hbm_bytes_per_s
    frame = pd.DataFrame({"op": "hbm_copy", "device": "h200-sxm", "implementation": "mine", "software": "mine 1"} | {
        "dtype": "any", "n_bytes": n_bytes, "latency_s": 3e-6 + 2 * n_bytes / rate,
    }).assign(**cells)  # fmt: skip
    frame.to_csv(folder / name, index=False)
    return folder / name


class Copies:
    """A fit of two parameters in closed form, so that what is around the fits is seen alone."""

    TABLES = ("memory",)
    seen: pd.DataFrame | None = None

    def fit_table(self, rows: pd.DataFrame, *, gpu: Any, base: Any, note: Any) -> list[dict[str, Any]]:
        self.seen = rows
        slope, start = np.polyfit(rows["n_bytes"].astype(float), rows["latency_s"].astype(float), 1)
        note("copies fitted")
        share = 2 / slope / gpu.hbm_bytes_per_s
        parameters = {"start_s": {"value": float(start)}, "hbm_fraction": {"value": float(share)}}
        held_out = {"split": "none", "n": len(rows), "median_ape": 0.01, "p90_ape": 0.02, "bias": -0.01}
        return [{
            "op": "hbm_copy", "implementation": "mine", "dtype": "any", "parameters": parameters, "held_out": held_out,
            "provenance": {"kind": "fitted", "data": "copies", "n_points": len(rows)},
        }]  # fmt: skip

    def predict_table(self, rows: pd.DataFrame, *, gpu: Any, profile: Any) -> Prediction:
        family = profile.family("hbm_copy", "mine").values()
        time_s = family["start_s"] + 2 * rows["n_bytes"].to_numpy() / (
            family["hbm_fraction"] * gpu.hbm_bytes_per_s
        )
        known = (rows["implementation"] == "mine").to_numpy()
        why = [
            None if one else f"no family of {name}"
            for one, name in zip(known, rows["implementation"], strict=True)
        ]
        return Prediction(np.where(known, time_s, np.nan), why)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Copies:
    one = Copies()
    monkeypatch.setattr(registry, "fit_modules", lambda: [one])
    return one


FIT = "fit memory.csv --device h200-sxm -o p.yaml"


def test_what_is_fitted_is_what_made_the_times(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    copies(tmp_path)
    told = calibrate(f"{FIT} --source 'a lab' --json")
    assert told.code == 0 and told.err == ""
    family = read_profile(tmp_path / "p.yaml").family("hbm_copy", "mine")
    assert family.values() == pytest.approx({"start_s": 3e-6, "hbm_fraction": 0.8}, rel=1e-3)
    assert family.provenance.data == "a lab: copies"
    assert told.json["families"] == [{
        "op": "hbm_copy", "implementation": "mine", "dtype": "any", "kind": "fitted", "n_points": 9,
        "held_out": {"split": "none", "n": 9, "median_ape": 0.01, "p90_ape": 0.02, "bias": -0.01},
        "refitted": True, "doubts": [],
    }]  # fmt: skip
    checked = calibrate("validate memory.csv --profile p.yaml --json").json
    assert checked["groups"] == [{
        "op": "hbm_copy", "implementation": "mine", "dtype": "any", "n": 9,
        "median_ape": pytest.approx(0, abs=1e-3), "mean_ape": pytest.approx(0, abs=1e-3),
        "p90_ape": pytest.approx(0, abs=1e-3), "bias": pytest.approx(0, abs=1e-3),
    }]  # fmt: skip
    assert checked["unpredicted"] == [] and checked["n_predicted"] == checked["n_rows"] == 9


def test_figures_are_fractions_with_the_sign_of_what_is_predicted(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    copies(tmp_path)
    calibrate(FIT)
    frame = pd.read_csv(tmp_path / "memory.csv").iloc[:4]
    frame["latency_s"] /= [1.0, 1.25, 0.8, 0.5]  # so predicted is 0%, +25%, -20% and -50% off
    frame.to_csv(tmp_path / "other.csv", index=False)
    (group,) = calibrate("validate other.csv --profile p.yaml --json").json["groups"]
    assert group["median_ape"] == pytest.approx(0.225, abs=1e-3)
    assert group["mean_ape"] == pytest.approx(0.2375, abs=1e-3)
    assert group["p90_ape"] == pytest.approx(0.25 + 0.7 * 0.25, abs=1e-3)
    assert group["bias"] == pytest.approx(-0.1, abs=1e-3)


def test_rows_without_a_prediction_are_counted_and_named(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    copies(tmp_path)
    calibrate(FIT)
    copies(tmp_path, "theirs.csv", implementation="theirs")
    copies(tmp_path, "h100.csv", device="h100-sxm")
    gemm_rows(tmp_path / "gemm.csv", 3)
    told = calibrate("validate memory.csv theirs.csv h100.csv gemm.csv --profile p.yaml --json").json
    assert [(one["op"], one["n"]) for one in told["groups"]] == [("hbm_copy", 9)]
    assert [(one["implementation"], one["n"], one["reason"]) for one in told["unpredicted"]] == [
        ("vllm:torch.nn.functional.linear", 3, "no model of gemm measurements"),
        ("mine", 9, "measured on h100-sxm, the profile is of h200-sxm"),
        ("theirs", 9, "no family of theirs"),
    ]
    assert told["n_unpredicted"] == 21 and told["n_rows"] == 30
    shown = calibrate("validate memory.csv theirs.csv --profile p.yaml").out
    assert "9 of 18 rows predicted." in shown and "no family of theirs" in shown


def test_rows_held_out_are_not_for_fitting_but_can_be_looked_at_alone(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    copies(tmp_path, held_out=[0, 1] * 4 + [0])
    copies(tmp_path, "theirs.csv", held_out=1, implementation="theirs")
    told = calibrate(f"{FIT} theirs.csv")
    assert told.code == 0
    assert told.err.count("every row is held out") == 1
    assert "fitting: hbm_copy theirs any: not fitted, every row is held out\n" in told.err
    assert stub.seen is not None and set(stub.seen["implementation"]) == {"mine"} and len(stub.seen) == 9
    (group,) = calibrate("validate memory.csv --held-out --profile p.yaml --json").json["groups"]
    assert group["n"] == 4
    copies(tmp_path)
    refused = calibrate("validate memory.csv --held-out --profile p.yaml")
    assert (refused.code, refused.err) == (
        2,
        "moesim: memory.csv: no row is marked as held out; fix: leave out --held-out\n",
    )


def test_what_the_rows_say_nothing_of_comes_from_the_base(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    copies(tmp_path)
    calibrate(f"{FIT} --base h200")
    whole = load_profile("h200-sxm")
    mine = read_profile(tmp_path / "p.yaml")
    assert len(mine.families) == len({(f.op, f.implementation, f.dtype) for f in whole.families}) + 1
    kept = mine.family("host", "vllm")
    assert kept.provenance.kind == whole.family("host", "vllm").provenance.kind
    assert kept.held_out is not None

    calibrate(f"{FIT} --base h100-sxm")
    carried = read_profile(tmp_path / "p.yaml").family("ep_dispatch", "deepep-normal")
    assert carried.provenance.kind == "carried-over"
    assert "fitted on h100-sxm" in carried.provenance.data
    assert carried.held_out is None  # it says nothing of this device
    assert carried.values() == pytest.approx(
        load_profile("h100-sxm").family("ep_dispatch", "deepep-normal").values(), rel=1e-4
    )


def test_the_table_shows_what_was_refitted_alone(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    copies(tmp_path)
    for base, carried in (("h200", 0), ("h100-sxm", None)):
        told = calibrate(f"{FIT} --base {base}")
        whole = read_profile(tmp_path / "p.yaml").families
        if carried is None:
            carried = sum(one.provenance.kind == "carried-over" for one in whole)
            assert carried > 20
        assert f"\n{len(whole) - 1} families kept from {base} ({carried} carried over)\n" in told.out
        assert "hbm_copy" in told.out and "moe_ffn" not in told.out
        assert len(told.out.splitlines()) < 10
        families = calibrate(f"{FIT} --base {base} --json").json["families"]
        assert len(families) == len(whole)
        assert [one["op"] for one in families if one["refitted"]] == ["hbm_copy"]


def test_few_rows_leave_the_base_and_say_so(calibrate: Callable[[str], Told], tmp_path: Path) -> None:
    gemm_rows(tmp_path / "gemm.csv", 3)
    told = calibrate("fit gemm.csv --device h200-sxm --base h100-sxm -o p.yaml")
    assert told.code == 0
    assert "gemm torch-cublas bfloat16: 3 rows for " in told.err
    assert "parameters: those of h100-sxm's profile are kept" in told.err
    mine, theirs = read_profile(tmp_path / "p.yaml"), load_profile("h100-sxm")
    assert {one.provenance.kind for one in mine.families} <= {"carried-over", "assumed"}
    for key in (("gemm", "torch-cublas", "bfloat16"), ("elementwise", "fused", "any")):
        assert mine.family(*key).values() == pytest.approx(theirs.family(*key).values(), rel=1e-4)


def test_few_rows_take_no_family_of_the_catalogs_place(
    calibrate: Callable[[str], Told], tmp_path: Path
) -> None:
    gemm_rows(tmp_path / "gemm.csv", 3)
    told = calibrate("fit gemm.csv --device h200-sxm -o p.yaml")
    assert told.code == 2
    assert "too few rows of any kernel" in told.err and "give --base h200-sxm" in told.err
    assert not (tmp_path / "p.yaml").exists()


def test_a_device_without_a_profile_is_fitted_and_the_doubt_stays_in_the_profile(
    calibrate: Callable[[str], Told], tmp_path: Path
) -> None:
    gemm_rows(tmp_path / "gemm.csv", 3).assign(device="b200-sxm").to_csv(tmp_path / "gemm.csv", index=False)
    told = calibrate("fit gemm.csv --device b200-sxm -o p.yaml")
    assert "gemm torch-cublas bfloat16: doubtful fit: " in told.err and "3 rows for " in told.err
    assert "fitted*" in told.out and "* doubtful: the notes above" in told.out
    one = calibrate("fit gemm.csv --device b200-sxm -o p.yaml --json").json["families"][0]
    assert any(word.startswith("3 rows for ") for word in one["doubts"])
    kept = read_profile(tmp_path / "p.yaml").family("gemm", "torch-cublas", "bfloat16")
    assert str(kept.provenance.doubts).startswith("3 rows for ")


def test_rows_of_other_devices_beside_the_own_are_named(
    calibrate: Callable[[str], Told], tmp_path: Path
) -> None:
    frame = gemm_rows(tmp_path / "gemm.csv", 60)
    frame.loc[0, "device"] = "H200"
    frame.to_csv(tmp_path / "gemm.csv", index=False)
    assert (
        "gemm.csv: 1 rows of H200 are left out" in calibrate("fit gemm.csv --device h200-sxm -o p.yaml").err
    )


def test_a_profile_with_impossible_numbers_is_refused(
    calibrate: Callable[[str], Told], tmp_path: Path
) -> None:
    gemm_rows(tmp_path / "gemm.csv", 60)
    calibrate("fit gemm.csv --device h200-sxm -o p.yaml")
    whole = (tmp_path / "p.yaml").read_text()
    for value in ("-1.0", ".nan", ".inf"):
        spoilt = re.sub(r"(launch_s:\n\s+value: )\S+", rf"\g<1>{value}", whole)
        assert spoilt != whole
        (tmp_path / "p.yaml").write_text(spoilt)
        told = calibrate("validate gemm.csv --profile p.yaml")
        assert told.code == 2
        assert "p.yaml: families.0.parameters.launch_s.value" in told.err
    (tmp_path / "p.yaml").write_text("")
    assert (
        "p.yaml: is empty: it is no profile of a GPU" in calibrate("validate gemm.csv --profile p.yaml").err
    )


def test_a_profile_that_cannot_be_written_leaves_nothing(
    calibrate: Callable[[str], Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemm_rows(tmp_path / "gemm.csv", 60)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    told = calibrate("fit gemm.csv --device h200-sxm -o p.yaml")
    assert told.code == 2
    assert "p.yaml: cannot be written: No space left on device; fix: name another file" in told.err
    assert [one.name for one in tmp_path.iterdir()] == ["gemm.csv"]


def family(values: dict[str, tuple[float, float | None]], n_points: int, **more: Any) -> dict[str, Any]:
    parameters = {name: {"value": value, "stderr": error} for name, (value, error) in values.items()}
    return {"parameters": parameters, "provenance": {"kind": "fitted", "n_points": n_points}} | more


def test_a_fit_is_doubtful_for_its_error_its_rows_or_its_parameters() -> None:
    sure = {"a": (1.0, 0.1), "b": (2.0, 0.1), "held": (1.0, 0.0), "given": (1.0, None)}
    assert doubts(family(sure, 9, held_out={"median_ape": 0.49})) == []
    assert doubts(family(sure, 9, held_out={"median_ape": 0.51})) == ["held-out median error 51%"]
    assert doubts(family(sure, 2)) == []
    assert doubts(family(sure, 1)) == ["1 rows for 2 parameters"]
    assert doubts(family({"a": (1.0, 0.0), "b": (1.0, 0.0)}, 1)) == ["1 rows for 2 parameters"]  # exact
    vague = sure | {"a": (1.0, 1.1)}
    assert doubts(family(vague, 9)) == []
    assert doubts(family(vague | {"b": (2.0, 2.1)}, 9)) == [
        "2 of 2 parameters have a standard error above their value"
    ]
    assert doubts(family(sure, 1) | {"provenance": {"kind": "assumed"}}) == []


def test_rows_that_no_fit_may_see_are_told_kernel_by_kernel(tmp_path: Path) -> None:
    notes: list[str] = []
    copies(tmp_path, held_out=[0, 1] * 4 + [0])
    tables = read_tables([tmp_path / "memory.csv"])
    registry.fit_tables(tables, gpu=H200, base=None, note=notes.append, modules=[Copies()])
    assert notes == ["hbm_copy: 9 rows", "copies fitted"]


def test_an_update_replaces_what_it_refits(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    frame = pd.read_csv(copies(tmp_path))
    calibrate(FIT)
    frame.assign(latency_s=frame["latency_s"] * 2).to_csv(tmp_path / "memory.csv", index=False)
    calibrate(f"{FIT} --base p.yaml")
    mine = read_profile(tmp_path / "p.yaml")
    assert len(mine.families) == 1
    assert mine.family("hbm_copy", "mine").values()["hbm_fraction"] == pytest.approx(0.4, rel=1e-3)


def test_a_fit_that_fails_leaves_the_older_profile(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies(tmp_path)
    calibrate(FIT)
    before = (tmp_path / "p.yaml").read_bytes()

    def broken(*_: object, **__: object) -> list[dict[str, Any]]:
        return [{"op": "hbm_copy"}]

    monkeypatch.setattr(stub, "fit_table", broken)
    with pytest.raises(KeyError):
        calibrate(FIT)

    def nothing(*_: object, **__: object) -> list[dict[str, Any]]:
        return []

    monkeypatch.setattr(stub, "fit_table", nothing)
    told = calibrate(FIT)
    assert (told.code, "none of these measurements can be fitted" in told.err) == (2, True)
    assert (tmp_path / "p.yaml").read_bytes() == before
    assert {one.name for one in tmp_path.iterdir()} == {"memory.csv", "p.yaml"}


def test_the_table_of_a_fit_and_its_progress(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    copies(tmp_path)
    gemm_rows(tmp_path / "gemm.csv", 3)
    copies(tmp_path, "h100.csv", device="h100-sxm")
    told = calibrate(f"{FIT} gemm.csv h100.csv")
    assert "fitting: h100.csv: left out, it has no row of h200-sxm\n" in told.err
    assert "fitting: hbm_copy: 9 rows\nfitting: copies fitted\n" in told.err
    assert "fitting: gemm: kept out of the profile, which has no parameters for it\n" in told.err
    assert "error on rows that the fit did not see" in told.out
    assert "1.0%" in told.out and "2.0%" in told.out and "-1.0%" in told.out
    assert told.out.rstrip().endswith("s") and "p.yaml: 1 families" in told.out


def test_progress_moves_where_somebody_watches(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    told = calibrate(FIT)
    assert told.code == 0
    assert "copies fitted" in told.err and "copies fitted" not in told.out
    assert calibrate(f"{FIT} --json").err == ""


GPU = (REPOSITORY / "moesim/catalog/gpus/h200-sxm.yaml").read_text()
REFUSED = {
    "another device": (
        FIT.replace("h200-sxm", "h100-sxm"),
        "memory.csv: 'h100-sxm': no row was measured on this device; fix: use --device h200-sxm",
    ),
    "unknown device": (FIT.replace("h200-sxm", "h999"), "'h999': unknown GPU; fix: "),
    "no file": (FIT.replace("memory", "nothing"), "nothing.csv: there is no such file"),
    "no such base": (
        f"{FIT} --base h999",
        "'h999': no profile for this device; fix: use one of h100-sxm, h200-sxm, or the path",
    ),
    "bases of two devices": (
        f"{FIT} --base h100-sxm --base h200-sxm",
        "--base: 'h200-sxm': is a profile of h200-sxm, and h100-sxm of",
    ),
    "output that is no profile": (FIT.replace("p.yaml", "p.csv"), "-o: 'p.csv': must end in .yaml; fix: p.csv.yaml"),
    "output that is a folder": (FIT.replace("p.yaml", "."), "-o: '.': is a folder"),
    "output without a folder": (FIT.replace("p.yaml", "a/p.yaml"), "-o: 'a/p.yaml': its folder does not exist"),
    "datasheet of another": (
        f"{FIT} --gpu mine.yaml".replace("h200-sxm", "h100-sxm"),
        "mine.yaml: describes h200-sxm, not h100-sxm",
    ),
    "no datasheet": (f"{FIT} --gpu no.yaml", "no.yaml: cannot be read: No such file"),
    "profile of another device": (
        "validate memory.csv --profile h100-sxm",
        "memory.csv: the profile is of h100-sxm, and every row was measured on h200-sxm",
    ),
    "no profile": ("validate memory.csv --profile p.yaml", "p.yaml: cannot be read: No such file or directory"),
    "damaged profile": ("validate memory.csv --profile mine.yaml", "mine.yaml: has no families: it is no profile"),
    "a scenario as base": (
        f"{FIT} --base scenario.yaml",
        "scenario.yaml: is a scenario: it is no profile of a GPU; fix: use what moesim calibrate fit wrote",
    ),
    "a file twice": (f"{FIT} ./memory.csv", "./memory.csv: is given twice; fix: name every file once"),
    "a file twice to validate": ("validate memory.csv memory.csv --profile h200", "memory.csv: is given twice; fix: "),
    "page that is none": ("validate memory.csv --profile h200 --html p.csv", "--html: 'p.csv': must end in .html"),
    "no device": ("fit memory.csv -o p.yaml", "Missing option '--device'; fix: see moesim calibrate fit --help"),
    "no command": ("measure x", "No such command 'measure'; fix: see moesim calibrate --help"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies, case: str
) -> None:
    arguments, said = REFUSED[case]
    copies(tmp_path)
    (tmp_path / "mine.yaml").write_text(GPU)
    (tmp_path / "scenario.yaml").write_text("model: mixtral-8x7b\nworkload: {kind: decode}\n")
    told = calibrate(arguments)
    assert told.code == 2
    assert told.err.startswith(f"moesim: {said}")
    assert len(told.err.splitlines()) == 1
    assert told.out == ""


@pytest.mark.parametrize("present", [(), ("measured/serving.csv",)])
def test_a_folder_without_the_serving_rows_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], present: tuple[str, ...]
) -> None:
    for name in present:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("id\n")
    assert serving.main([str(tmp_path)]) == 2
    lacking = "published_facts.csv" if present else "measured/serving.csv"
    assert capsys.readouterr() == (
        "",
        f"moesim: {tmp_path}: holds no {lacking}; fix: give the folder that measured/serving.csv is in\n",
    )


def test_a_gpu_of_no_catalog_is_described_in_a_file(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    (tmp_path / "mine.yaml").write_text(
        GPU.replace("name: h200-sxm", "name: x9000").replace("4.8 TB/s", "9.6 TB/s")
    )
    copies(tmp_path, device="x9000")
    for device in ("x9000 --gpu mine.yaml", "mine.yaml"):
        assert calibrate(f"fit memory.csv --device {device} -o p.yaml").code == 0
        profile = read_profile(tmp_path / "p.yaml")
        assert profile.device == "x9000"
        assert profile.families[0].values()["hbm_fraction"] == pytest.approx(0.4, rel=1e-3)
    assert "x9000" in calibrate("validate memory.csv --profile p.yaml").err  # its datasheet is needed again
    (group,) = calibrate("validate memory.csv --profile p.yaml --gpu mine.yaml --json").json["groups"]
    assert group["median_ape"] < 1e-3


def test_profiles_open_by_device_alias_or_path(tmp_path: Path) -> None:
    assert open_profile("h200") is load_profile("h200-sxm")
    assert open_profile("H100") is load_profile("h100-sxm")
    with pytest.raises(ProfileError, match="or the path of a"):
        open_profile(str(tmp_path))
    with pytest.raises(ProfileError, match="cannot be read: is not UTF-8 text"):
        (tmp_path / "p.yaml").write_bytes(b"\xff\xff")
        open_profile(str(tmp_path / "p.yaml"))


def test_the_page_shows_every_operation_and_where_the_profile_is_from(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    copies(tmp_path, implementation="mine")
    calibrate(FIT)
    copies(tmp_path, "theirs.csv", implementation="theirs<b>")
    (tmp_path / "page.html").write_text("older")
    told = calibrate("validate memory.csv theirs.csv --profile p.yaml --html page.html")
    assert told.code == 0 and "Page: page.html" in told.out
    page = (tmp_path / "page.html").read_text()
    body = page[: page.index("<script")]
    assert "9 of 18 measured rows are predicted by the profile of h200-sxm (p.yaml)" in body
    assert "<h2>hbm_copy [us]</h2>" in body
    assert "<th>mean</th>" in body[: body.index("<h2>hbm_copy [us]</h2>")]  # a summary comes first
    assert "no family of theirs&lt;b&gt;" in body
    assert body.index("How the profile was fitted") < body.index("copies")
    assert "n_bytes 16777216" in page  # what a point is
    assert page.count("<figure>") == 3  # scatter, error by size, spread
    assert len(page) < 6e6 and 'src="http' not in page


def test_a_page_of_many_rows_draws_some_and_counts_all(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies
) -> None:
    copies(tmp_path)
    calibrate(FIT)
    frame = pd.concat([pd.read_csv(tmp_path / "memory.csv")] * 3000)
    frame.to_parquet(tmp_path / "many.parquet", index=False)
    told = calibrate("validate many.parquet --profile p.yaml --html page.html --json").json
    assert told["groups"][0]["n"] == 27000
    page = (tmp_path / "page.html").read_text()
    assert "27,000 of 27,000" in page
    assert 900 <= page.count("n_bytes ") <= 1000
    assert len(page) < 6e6


def test_the_page_names_each_reason_once_and_shortens_long_names(
    calibrate: Callable[[str], Told], tmp_path: Path, stub: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies(tmp_path)
    calibrate(FIT)
    frame = pd.concat([pd.read_csv(tmp_path / "memory.csv")] * 3)
    frame["implementation"] = np.repeat(["mine", "a", "b"], 9)
    frame.to_csv(tmp_path / "many.csv", index=False)
    long = "vllm:some_unquantized_method_triton_experts"
    told = stub.predict_table

    def predict(rows: pd.DataFrame, *, gpu: Any, profile: Any) -> Prediction:
        one = told(rows.assign(implementation="mine"), gpu=gpu, profile=profile)
        known = rows["implementation"].isin(["mine", long]).to_numpy()
        return Prediction(np.where(known, one.time_s, np.nan), [None if k else "no family" for k in known])

    monkeypatch.setattr(stub, "predict_table", predict)
    copies(tmp_path, implementation=long)
    assert calibrate("validate memory.csv many.csv --profile p.yaml --html page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<td>18</td><td>no family</td><td>hbm_copy a any and 1 more</td>" in page
    legends = re.findall(r'"name":\s*"([^"]*)"', page)
    assert "mine" in legends and any("\\u2026" in name or "…" in name for name in legends)
    assert not any("vllm:" in name or len(name.replace("\\u2026", ".")) > 28 for name in legends)
    assert f"{long}<br>" in page or f"{long}\\u003cbr" in page  # whole on hover


# ---------------------------------------------------------------- the real fits

TRUE = {
    "launch_s": 3e-6, "compute_fraction": 0.7, "hbm_fraction": 0.8, "write_fraction": 0.6, "l2_ratio": 3.0,
    "tile_s": 5e-7, "wave_rounding": 0.5, "overlap_power": 3.0, "split_s": 2e-6, "max_split": 16.0,
}  # fmt: skip


def gemm_rows(path: Path, n_rows: int) -> pd.DataFrame:
    """Products that take exactly what the cost model says with `TRUE`."""
    rng = np.random.default_rng(0)
    sides = 2 ** rng.integers(7, 15, (n_rows, 2))
    frame = pd.DataFrame({
        "op": "gemm", "device": "h200-sxm", "implementation": "vllm:torch.nn.functional.linear", "software": "vllm 1",
        "dtype": "bfloat16", "m": 2 ** rng.integers(0, 15, n_rows), "n": sides[:, 0], "k": sides[:, 1],
    })  # fmt: skip
    frame["latency_s"] = gemm.predicted_s(frame, TRUE, H200, "bfloat16")
    frame.to_csv(path, index=False)
    return frame


def test_a_fit_finds_the_parameters_that_made_the_times(
    calibrate: Callable[[str], Told], tmp_path: Path
) -> None:
    gemm_rows(tmp_path / "gemm.csv", 250)
    told = calibrate("fit gemm.csv --device h200-sxm -o p.yaml")
    assert told.code == 0, told.err
    family = read_profile(tmp_path / "p.yaml").family("gemm", "torch-cublas", "bfloat16")
    assert family.held_out is not None and family.held_out.median_ape < 0.01
    for name in ("launch_s", "compute_fraction", "hbm_fraction"):
        assert family.values()[name] == pytest.approx(TRUE[name], rel=0.03)
    (group,) = calibrate("validate gemm.csv --profile p.yaml --json").json["groups"]
    assert group["implementation"] == "vllm:torch.nn.functional.linear"
    assert group["n"] == 250 and group["median_ape"] < 0.005 and abs(group["bias"]) < 0.005


def test_an_implementation_of_no_family_is_not_predicted(
    calibrate: Callable[[str], Told], tmp_path: Path
) -> None:
    frame = gemm_rows(tmp_path / "gemm.csv", 20)
    frame.assign(implementation="theirs").to_csv(tmp_path / "theirs.csv", index=False)
    told = calibrate("validate gemm.csv theirs.csv --profile h200-sxm --json").json
    assert [one["n"] for one in told["groups"]] == [20]
    (lacking,) = told["unpredicted"]
    assert (lacking["implementation"], lacking["n"]) == ("theirs", 20)
    assert "theirs" in lacking["reason"]


def test_every_kind_of_table_is_served() -> None:
    modules = registry.fit_modules()
    served = {kind for module in modules for kind in module.TABLES}
    assert served == set(SCHEMAS)


class Both(Copies):
    """A fit of two kinds."""

    TABLES = ("memory", "gemm")


class Large(Copies):
    """Claims some rows of one kind."""

    @staticmethod
    def serves(rows: pd.DataFrame) -> Any:
        return rows["n_bytes"] > 2**30


def test_rows_of_two_kinds_keep_their_whole_numbers(tmp_path: Path) -> None:
    copies(tmp_path)
    gemm_rows(tmp_path / "gemm.csv", 4)
    both = Both()
    rows = registry.rows_of(
        read_tables([tmp_path / "memory.csv", tmp_path / "gemm.csv"]), both, [both], ["h200-sxm"]
    )
    assert len(rows) == 13
    assert rows["m"].tolist()[-1] == pd.read_csv(tmp_path / "gemm.csv")["m"].tolist()[-1]
    assert rows["m"].isna().sum() == 9
    assert str(rows["latency_s"].dtype) == "float64"
    assert registry.rows_of([], both, [both], ["h200-sxm"]).empty


def test_rows_that_a_module_claims_are_no_other_s(tmp_path: Path) -> None:
    tables = read_tables([copies(tmp_path)])
    small, large = Copies(), Large()
    found = registry.fit_tables(tables, gpu=H200, base=None, note=lambda _: None, modules=[small, large])
    assert small.seen is not None and large.seen is not None
    assert small.seen["n_bytes"].max() == 2**30 and large.seen["n_bytes"].min() == 2**31
    profile = Profile.model_validate({"device": "h200-sxm", "families": found})
    told = registry.predict_rows(tables[0].frame, "memory", gpu=H200, profile=profile, modules=[small, large])
    assert told.time_s == pytest.approx(tables[0].frame["latency_s"].to_numpy(), rel=1e-3)


@pytest.mark.parametrize("name", ["nccl", "all_reduce", "deepep", "attention", "gemm", "mla_block"])
def test_shipped_profiles_price_what_they_were_fitted_to(
    calibrate: Callable[[str], Told], shared_data: Path, name: str
) -> None:
    told = calibrate(f"validate {shared_data}/measured/{name}.parquet --profile h200-sxm --json").json
    known = {one["op"] for one in told["groups"]}
    assert known == {
        "nccl": {"all_gather", "all_to_all", "reduce_scatter", "all_reduce"}, "all_reduce": {"all_reduce"},
        "deepep": {"ep_dispatch", "ep_combine"}, "attention": {"attention_prefill", "attention_decode"},
        "gemm": {"gemm"}, "mla_block": {"mla_block_decode"},
    }[name]  # fmt: skip
    for group in told["groups"]:
        assert group["median_ape"] < 0.10, group
    assert told["n_rows"] == told["n_predicted"] + sum(one["n"] for one in told["unpredicted"])


@pytest.mark.parametrize("device", ["h200-sxm", "h100-sxm"])
def test_shipped_profiles_price_every_expert_kernel_that_was_measured(
    calibrate: Callable[[str], Told], shared_data: Path, tmp_path: Path, device: str
) -> None:
    whole = pd.read_parquet(shared_data / "measured" / "moe_ffn.parquet")
    names = ["implementation", "dtype"]
    mine = whole[whole["device"] == device]
    some = mine.iloc[np.random.default_rng(0).permutation(len(mine))].groupby(names).head(60)
    some.to_parquet(tmp_path / "some.parquet", index=False)
    told = calibrate(f"validate some.parquet --profile {device} --json").json
    known = {(one["implementation"], one["dtype"]) for one in told["groups"]}
    lacking = {(one["implementation"], one["dtype"]) for one in told["unpredicted"]}
    assert known | lacking == {tuple(key) for key in mine[names].drop_duplicates().to_numpy()}
    for name, dtype in (
        ("vllm:vllm_unquantizedfusedmoe_triton_tritonexperts", "bfloat16"),
        ("sglang:sglang_fused_moe_triton", "bfloat16"),
        ("sglang:sglang_fused_moe_triton", "fp8_block"),
        ("trtllm:moe_torch_flow_cutlass", "fp8_block"),
        ("sglang:wideep_generation", "fp8_block"),
    ):
        assert (name, dtype) in known
    assert told["n_rows"] == told["n_predicted"] + told["n_unpredicted"] == len(some)


# ---------------------------------------------------------------- imports


def python(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )


def test_help_and_fits_load_no_torch_and_help_no_calibrate() -> None:
    program = (
        "import sys\nfrom moesim.cli import main\n"
        "sys.argv = ['moesim', '--help']\n"
        "main()\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'calibrate', 'pandas', 'torch', 'triton'}))\n"
        "import calibrate.app\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'pandas', 'torch', 'triton'}))\n"
        "import calibrate.fit.registry, calibrate.validate.kernels\n"
        "calibrate.fit.registry.fit_modules()\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'triton'}))\n"
    )
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == ["[]", "[]", "[]"]
    assert "calibrate" in done.stdout


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("pandas", "fit a.csv --device h200 -o p.yaml"), ("pyarrow", "validate a.csv --profile h200")],
)
def test_an_absent_extra_is_named(package: str, arguments: str) -> None:
    program = (
        f"import sys\nsys.modules[{package!r}] = None\nfrom moesim.cli import main\n"
        f"sys.argv = ['moesim', 'calibrate', *{arguments.split()!r}]\nmain()\n"
    )
    done = python(program)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"moesim: calibration needs {package}, which is not installed; fix: pip install 'moesim[calibrate]'\n"
    )


def test_measuring_is_reached_and_says_what_it_needs() -> None:
    done = python(
        "import sys\nsys.modules['torch'] = None\nfrom moesim.cli import main\n"
        "sys.argv = ['moesim', 'calibrate', 'run', 'kernels', '--out', 'measured']\nmain()\n"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "torch, which is not installed" in done.stderr and "moesim[calibrate]" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_help_of_every_part(calibrate: Callable[[str], Told]) -> None:
    assert {"run", "fit", "validate"} <= set(calibrate("--help").out.split())
    assert {"kernels", "transfers", "collectives", "all"} <= set(calibrate("run --help").out.split())
    assert "--base" in calibrate("fit --help").out
    assert "--held-out" in calibrate("validate --help").out


def test_the_module_runs_alone_as_torchrun_calls_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "calibrate", "fit", "no.csv", "--device", "h200", "-o", "p.yaml"],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (
        2,
        "moesim: no.csv: there is no such file; fix: check its name and folder\n",
    )


def test_no_rows_of_the_device_is_an_error_of_the_library_too(tmp_path: Path) -> None:
    tables = read_tables([copies(tmp_path)])
    with pytest.raises(MeasurementError, match="no row was measured on this device"):
        registry.fit_tables(tables, gpu=load_gpu("h100-sxm"), base=None, note=print, modules=[Copies()])
