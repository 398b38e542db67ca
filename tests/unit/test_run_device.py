"""Names, clocks and refusals of the machine that is measured."""

from __future__ import annotations

import builtins
import stat
from pathlib import Path
from typing import Any

import pytest

from calibrate.run import device
from calibrate.run.device import Clocks, CpuDevice, catalog_name, open_device
from moesim.errors import HardwareError


@pytest.mark.parametrize(
    ("board", "name"),
    [
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H800", "h800-sxm"),
        ("NVIDIA H20", "h20-sxm"),
        ("NVIDIA B200", "b200-sxm"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g-sxm"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA A100-SXM4-40GB", "a100-sxm4-40gb"),
        ("NVIDIA GeForce RTX 5090", "geforce-rtx-5090"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-80gb-hbm3-mig-1g-10gb"),
    ],
)
def test_boards_have_the_name_of_the_catalog_only_where_they_are_that_board(board: str, name: str) -> None:
    assert catalog_name(board) == name


@pytest.mark.parametrize(
    ("line", "clocks"),
    [
        ("1980, 3201, 41", Clocks(1.98e9, 3.201e9, 41.0)),
        ("345, [N/A], 30", Clocks(345e6, None, 30.0)),
        ("", Clocks()),
        ("No devices were found", Clocks()),
    ],
)
def test_clocks_are_read_as_nvidia_smi_writes_them(line: str, clocks: Clocks) -> None:
    assert device.parse_clocks(line) == clocks


def test_clocks_are_asked_for_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "1755, 3201, 50"\n')
    smi.chmod(smi.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    reader = device.Smi("1f6b")
    assert reader.clocks() == reader.clocks() == Clocks(1.755e9, 3.201e9, 50.0)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [
        "--id=GPU-1f6b --query-gpu=clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader,nounits"
    ]


def test_without_nvidia_smi_clocks_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    reader = device.Smi("0")
    assert reader.clocks() == Clocks()
    assert reader.driver() == "unknown"


def test_an_absent_cuda_device_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        HardwareError, match=r"--device: 'cuda': there is no such CUDA device: torch .* sees 0; fix:"
    ):
        open_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(HardwareError, match=r"'cuda:2': there is no such CUDA device: torch .* sees 2"):
        open_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", ""])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(HardwareError, match="use cuda, cuda:N or cpu"):
        open_device(name)


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_torch(name: str, *rest: Any, **named: Any) -> Any:
        if name == "torch":
            raise ModuleNotFoundError(name="torch")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(HardwareError, match=r"needs torch.*pip install"):
        open_device("cuda")


def test_a_processor_is_timed_by_the_wall_and_names_its_software() -> None:
    cpu = CpuDevice()
    assert cpu.elapsed_s(lambda: None) < 0.01
    assert cpu.elapsed_s(cpu.flush_cache) > 1e-4
    assert cpu.clocks() == Clocks()
    assert cpu.software.startswith("moesim ") and ", torch " in cpu.software
    ran: list[int] = []
    cpu.capture(lambda: ran.append(1))()
    assert ran == [1]
