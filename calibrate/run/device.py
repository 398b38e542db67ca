"""The machine that is measured: its clocks, its timer, its caches. CUDA through torch, or the CPU for tests."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moesim.errors import HardwareError
from moesim.hardware.catalog import gpu_names, load_gpu

__all__ = [
    "Clocks", "CpuDevice", "CudaDevice", "Device", "catalog_name", "check_device", "check_device_name", "open_device",
]  # fmt: skip

Run = Callable[[], None]
"""Work put on a device's current stream."""

_CPU_CACHE_BYTES = 8 * 2**20
_CLOCKS_EVERY_S = 1.0
"""nvidia-smi takes some 50 ms: asked at most this often."""
_SIZE_APART = 0.1
"""Relative difference of memory sizes from which two boards of one chip are two products."""
_SMI_FIELDS = "clocks.sm,clocks.mem,temperature.gpu"


@dataclass(frozen=True)
class Clocks:
    """What the device says of itself while it is measured; None where it does not say."""

    sm_clock_hz: float | None = None
    memory_clock_hz: float | None = None
    temperature_c: float | None = None


class Device(Protocol):
    """All that a measurement needs of a machine."""

    name: str
    """As in the GPU catalog; a name made of the driver's where the catalog has none."""
    torch_name: str
    """Where tensors go: ``cuda:0`` or ``cpu``."""
    software: str
    """Versions of all that decides a time."""
    cache_bytes: int
    """Last level of cache."""
    n_sms: int
    """Multiprocessors, by which kernels choose tiles."""
    capability: int | None
    """What Triton compiles for: 90 for sm_90; None where it compiles nothing."""
    has_graphs: bool
    """Whether work can be captured and launched at once."""

    def free_bytes(self) -> int:
        """Memory that can be allocated now."""

    def release(self) -> None:
        """Give memory that nothing uses back."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def flush_cache(self) -> None:
        """Write twice the cache's size, on the current stream."""

    def elapsed_s(self, run: Run) -> float:
        """Time that `run` takes on the device [s]."""

    def capture(self, run: Run) -> Run:
        """Record `run` as a graph; the value replays it."""

    def clocks(self) -> Clocks:
        """Clocks and temperature now."""

    def facts(self) -> dict[str, str | int]:
        """What to note of the machine in the log of a run."""


def open_device(name: str) -> Device:
    """Open the machine to measure; see `check_device`."""
    index = check_device(name)
    return CpuDevice() if index is None else CudaDevice(index)


def check_device(name: str) -> int | None:
    """Refuse a machine that is not there, without touching it.

    Parameters
    ----------
    name
        ``cuda``, ``cuda:1`` or ``cpu``.

    Returns
    -------
    Number of the CUDA device; None for the processor.

    Raises
    ------
    HardwareError
        If torch is not installed, or there is no such device.
    """
    check_device_name(name)
    try:
        import torch
    except ModuleNotFoundError:
        fix = 'pip install "moesim[calibrate]"; --list needs neither torch nor a GPU'
        raise HardwareError(
            "measuring needs torch, which is not installed", place="--device", fix=fix
        ) from None
    if name == "cpu":
        return None
    index = int(name.partition(":")[2] or 0)
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= n_devices:
        rule = f"there is no such CUDA device: torch {torch.__version__} sees {n_devices}"
        fix = (
            "run on a machine with a GPU and a CUDA build of torch, or look with --list, or try --device cpu"
        )
        raise HardwareError(rule, value=name, place="--device", fix=fix)
    return index


def check_device_name(name: str) -> None:
    """Refuse what names no device, whatever the machine has.

    Raises
    ------
    HardwareError
        If it is not ``cuda``, ``cuda:N`` or ``cpu``.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        fix = "use cuda, cuda:N or cpu"
        raise HardwareError("is no device that can be measured", value=name, place="--device", fix=fix)


def catalog_name(marketing: str) -> str:
    """Catalog name of a GPU from the name that the driver gives it.

    Parameters
    ----------
    marketing
        For example ``NVIDIA H200`` or ``NVIDIA H100 80GB HBM3``.

    Returns
    -------
    The catalog's name where the board is the one that the catalog means (SXM, unless the name says PCIe or NVL),
    else the driver's name in lower case with dashes.
    """
    words = re.findall(r"[a-z0-9]+", marketing.lower())
    plain = "-".join(word for word in words if word != "nvidia")
    if {"pcie", "nvl", "mig"} & set(words):
        return plain
    chips = {name.split("-")[0]: name for name in gpu_names()} | {"4090": "rtx-4090"}
    chips.pop("rtx", None)
    found = next((chips[word] for word in words if word in chips), plain)
    sizes = [int(word[:-2]) for word in words if re.fullmatch(r"\d+gb", word)]
    other = (
        bool(sizes)
        and found != plain
        and abs(load_gpu(found).memory_bytes / 1e9 / sizes[0] - 1) > _SIZE_APART
    )
    return plain if other else found


def software_versions(*packages: str) -> str:
    """Versions of moesim and of those packages that are installed, as ``moesim 0.1.0, torch 2.11.0``."""
    found = [f"moesim {_own_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _own_version() -> str:
    """Of the package, or of the checkout that runs without being installed."""
    try:
        return importlib.metadata.version("moesim")
    except importlib.metadata.PackageNotFoundError:
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


class CpuDevice:
    """The processor of this machine: for tests of the whole path, and for a first look without a GPU."""

    name = "cpu"
    torch_name = "cpu"
    cache_bytes = _CPU_CACHE_BYTES
    n_sms = 1
    capability: int | None = None
    has_graphs = False

    def __init__(self) -> None:
        import torch

        self.software = software_versions("torch")
        self._flush = torch.zeros(2 * self.cache_bytes, dtype=torch.uint8)

    def free_bytes(self) -> int:
        """A fixed gigabyte: points for a processor are small."""
        return 2**30

    def release(self) -> None:
        """Nothing is kept."""

    def synchronize(self) -> None:
        """Work is done when a call returns."""

    def flush_cache(self) -> None:
        """Write twice the cache's size."""
        self._flush.fill_(1)

    def elapsed_s(self, run: Run) -> float:
        """Wall-clock time."""
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s

    def capture(self, run: Run) -> Run:
        """Run it each time: a processor has no graphs."""
        return run

    def clocks(self) -> Clocks:
        """Not known."""
        return Clocks()

    def facts(self) -> dict[str, str | int]:
        """Machine and interpreter."""
        return {"device": self.name, "machine": platform.machine(), "python": platform.python_version()}


class CudaDevice:
    """One NVIDIA GPU, timed by its own events. Its settings are read and never changed."""

    has_graphs = True

    def __init__(self, index: int) -> None:
        import torch

        torch.cuda.set_device(index)
        self._torch: Any = torch
        self._properties = torch.cuda.get_device_properties(index)
        self._smi = Smi(str(getattr(self._properties, "uuid", index)))
        self.torch_name = f"cuda:{index}"
        self.name = catalog_name(self._properties.name)
        self.cache_bytes = int(self._properties.L2_cache_size)
        self.n_sms = int(self._properties.multi_processor_count)
        self.capability: int | None = 10 * int(self._properties.major) + int(self._properties.minor)
        self.software = (
            f"{software_versions('torch', 'triton')}, cuda {torch.version.cuda}, driver {self._smi.driver()}"
        )
        self._flush = torch.zeros(2 * self.cache_bytes // 4, device=self.torch_name)
        self._flushed = torch.zeros((), device=self.torch_name)

    def free_bytes(self) -> int:
        """Memory free on the GPU, torch's own unused blocks included."""
        free, _ = self._torch.cuda.mem_get_info()
        unused = self._torch.cuda.memory_reserved() - self._torch.cuda.memory_allocated()
        return int(free + unused)

    def release(self) -> None:
        """Return torch's unused blocks to the driver, so that the next point finds whole ones."""
        self._torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for all streams."""
        self._torch.cuda.synchronize()

    def flush_cache(self) -> None:
        """Read twice the cache's size on the current stream; what follows it is queued meanwhile.

        Written lines would go back to memory while the next kernel runs, and slow it.
        """
        self._torch.amax(self._flush, dim=0, out=self._flushed)

    def elapsed_s(self, run: Run) -> float:
        """Time between two events around it, on the current stream."""
        start = self._torch.cuda.Event(enable_timing=True)
        end = self._torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3  # torch gives milliseconds

    def capture(self, run: Run) -> Run:
        """Record a CUDA graph, after one run on a side stream that loads what is to be loaded."""
        stream = self._torch.cuda.Stream()
        stream.wait_stream(self._torch.cuda.current_stream())
        with self._torch.cuda.stream(stream):
            run()
        self._torch.cuda.current_stream().wait_stream(stream)
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph):
            run()
        replay: Run = graph.replay
        return replay

    def clocks(self) -> Clocks:
        """As nvidia-smi says, at most a second old."""
        return self._smi.clocks()

    def facts(self) -> dict[str, str | int]:
        """Driver's name of the board, its processors, cache and memory."""
        return {
            "device": self.name,
            "board": str(self._properties.name),
            "n_sms": self.n_sms,
            "l2_bytes": self.cache_bytes,
            "memory_bytes": int(self._properties.total_memory),
            "software": self.software,
            "python": platform.python_version(),
        }


class Smi:
    """Reads one GPU through nvidia-smi; says nothing where that is missing."""

    def __init__(self, gpu: str) -> None:
        self._gpu = gpu if gpu.isdigit() or gpu.startswith("GPU-") else f"GPU-{gpu}"
        self._path = shutil.which("nvidia-smi")
        self._last = Clocks()
        self._asked_s = -_CLOCKS_EVERY_S

    def driver(self) -> str:
        return self._ask("driver_version", f"--id={self._gpu}") or self._ask("driver_version") or "unknown"

    def clocks(self) -> Clocks:
        now_s = time.monotonic()
        if now_s - self._asked_s >= _CLOCKS_EVERY_S:
            self._asked_s = now_s
            self._last = parse_clocks(self._ask(_SMI_FIELDS, f"--id={self._gpu}"))
        return self._last

    def _ask(self, fields: str, *which: str) -> str:
        if self._path is None:
            return ""
        command = [self._path, *which, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return ""
        return answer.stdout.strip().partition("\n")[0]


def parse_clocks(line: str) -> Clocks:
    """Read nvidia-smi's ``1980, 3201, 41`` [MHz, MHz, degrees Celsius]; a field may be ``[N/A]``."""
    numbers = [float(word) if re.fullmatch(r"[\d.]+", word.strip()) else None for word in line.split(",")]
    if len(numbers) != 3:
        return Clocks()
    sm, memory, temperature = numbers
    return Clocks(sm * 1e6 if sm else None, memory * 1e6 if memory else None, temperature)
