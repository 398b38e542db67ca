"""A machine and a kernel whose times are known, for tests of the timing protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calibrate.run.device import Clocks

GRAPH_LAUNCH_S = 0.0


class FakeDevice:
    """Time passes as fake kernels say; knows which buffers are in its cache."""

    name = "fake"
    torch_name = "cpu"
    software = "fake 1.0"
    cache_bytes = 1000
    n_sms = 1
    capability: int | None = None

    def __init__(self, *, has_graphs: bool = True, free_bytes: int = 10**9) -> None:
        self.has_graphs = has_graphs
        self._free_bytes = free_bytes
        self.now_s = 0.0
        self.cached: set[Any] = set()
        self.in_graph = False
        self.events: list[Any] = []
        self.captures = 0
        self.dead = False

    def free_bytes(self) -> int:
        return self._free_bytes

    def release(self) -> None:
        self.events.append("release")

    def synchronize(self) -> None:
        if self.dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def flush_cache(self) -> None:
        self.cached.clear()
        self.events.append("flush")

    def elapsed_s(self, run: Callable[[], None]) -> float:
        start_s = self.now_s
        self.events.append("timed")
        run()
        self.events.append("end")
        return self.now_s - start_s

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1

        def replay() -> None:
            self.in_graph = True
            run()
            self.in_graph = False

        return replay

    def clocks(self) -> Clocks:
        return Clocks(1.98e9, 3.2e9, 40.0)

    def facts(self) -> dict[str, str | int]:
        return {"device": self.name}


class FakeCase:
    """A kernel that takes `cold_s` where its buffers are not cached, else `warm_s`; the host needs 20 us a launch."""

    repeats = True
    n_units = 1
    launch_s = 20e-6

    def __init__(
        self,
        device: FakeDevice,
        *,
        cold_s: float = 30e-6,
        warm_s: float = 10e-6,
        n_sets: int = 8,
        n_kernels: int = 1,
        capturable: bool = True,
        caches: tuple[str, ...] = ("cold", "warm"),
        wrong: Exception | None = None,
        noise: Callable[[int], float] = lambda sample: 1.0,
    ) -> None:
        self.device = device
        self.n_sets = n_sets
        self.n_kernels = n_kernels
        self.capturable = capturable
        self.caches: Any = caches
        self.samples: dict[int, int] = {}
        self._cold_s, self._warm_s, self._noise, self._wrong = cold_s, warm_s, noise, wrong

    def refresh(self, index: int, sample: int) -> None:
        self.samples[index] = sample
        self.device.events.append(("refresh", index, sample))

    def call(self, index: int) -> None:
        kernel_s = self._warm_s if index in self.device.cached else self._cold_s
        self.device.cached.add(index)
        self.device.events.append(("call", index, self.samples.get(index)))
        kernel_s *= self._noise(self.samples.get(index, 0))
        self.device.now_s += (
            kernel_s if self.device.in_graph else max(kernel_s, self.n_kernels * self.launch_s)
        )

    def check(self) -> None:
        if self._wrong is not None:
            raise self._wrong
