"""Copies between host and device, device memory, and what a launch costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from calibrate.run.device import Device
from calibrate.run.points import Point
from calibrate.run.protocol import TIMED_S, Cache, WrongResultError, check_close, n_sets_for

__all__ = ["LaunchCase", "MemoryCase", "TransferCase"]

_HOST_BYTES = 2**28
"""Sets of host buffers stay below this: locking pages takes time."""
_BUSY_SIZE = 4096
"""Side of the products that keep the device busy."""
_OUTLAST = 4.0
"""Products last this many times a copy on an idle device: it is run twice, and slower beside them."""


class TransferCase:
    """A copy of ``n_bytes`` in all, cut over streams, on an idle device or while products run beside it."""

    n_units = 1
    repeats = True
    capturable = False
    caches: tuple[Cache, ...] = ()

    def __init__(self, point: Point, device: Device) -> None:
        import torch

        self._torch: Any = torch
        self._device = device
        at = point.columns
        n_bytes, pinned = int(at["n_bytes"]), bool(at["pinned"])
        self.n_kernels = n_streams = int(at["n_streams"])
        self.n_sets = min(n_sets_for(2 * n_bytes, device), max(1, _HOST_BYTES // n_bytes))
        from_host, to_host = at["op"] == "h2d", at["op"] == "d2h"
        self._from = [self._source(n_bytes, from_host, pinned) for _ in range(self.n_sets)]
        self._to = [self._buffer(n_bytes, to_host, pinned) for _ in range(self.n_sets)]
        self._streams = [self._torch.cuda.Stream() for _ in range(n_streams)]
        self._side = self._torch.cuda.Stream()
        self._n_products = self._products() if at["busy"] else 0

    def _buffer(self, n_bytes: int, on_host: bool, pinned: bool) -> Any:
        """Nothing in it yet."""
        where: dict[str, Any] = {"pin_memory": pinned} if on_host else {"device": self._device.torch_name}
        return self._torch.empty(n_bytes, dtype=self._torch.uint8, **where)

    def _source(self, n_bytes: int, on_host: bool, pinned: bool) -> Any:
        """Random bytes, made on the device: the processor needs a second for as many as fit."""
        made = self._buffer(n_bytes, on_host=False, pinned=False).random_(0, 255)
        return self._buffer(n_bytes, on_host, pinned).copy_(made) if on_host else made

    def _products(self) -> int:
        """Make what keeps the device busy, and count the products that outlast a warm-up and a timing."""
        torch = self._torch
        self._x = torch.randn(_BUSY_SIZE, _BUSY_SIZE, device=self._device.torch_name, dtype=torch.bfloat16)
        self._y = torch.empty_like(self._x)
        product_s = self._twice(lambda: torch.mm(self._x, self._x, out=self._y))
        return math.ceil(_OUTLAST * (self._twice(lambda: self.call(0)) + TIMED_S) / product_s) + 2

    def _twice(self, run: Callable[[], None]) -> float:
        """Time of the second of two runs [s]."""
        run()
        return self._device.elapsed_s(run)

    def refresh(self, index: int, sample: int) -> None:
        """New first bytes; then the products that run beside the copy."""
        self._device.synchronize()
        self._from[index][: 2**12].fill_(sample % 251)
        with self._torch.cuda.stream(self._side):
            for _ in range(self._n_products):
                self._torch.mm(self._x, self._x, out=self._y)

    def call(self, index: int) -> None:
        """Fork to the streams, copy a piece on each, join."""
        current = self._torch.cuda.current_stream()
        pieces = zip(
            self._to[index].chunk(len(self._streams)),
            self._from[index].chunk(len(self._streams)),
            strict=True,
        )
        for stream, (to, source) in zip(self._streams, pieces, strict=True):
            stream.wait_stream(current)
            with self._torch.cuda.stream(stream):
                to.copy_(source, non_blocking=True)
        for stream in self._streams:
            current.wait_stream(stream)

    def check(self) -> None:
        """Every byte arrives, where there was none: unused memory may hold what was copied last."""
        self._to[0].zero_()
        self.call(0)
        self._device.synchronize()
        if not self._torch.equal(self._to[0].cpu(), self._from[0].cpu()):
            raise WrongResultError("a copy differs from its source")


class MemoryCase:
    """A sum over ``n_bytes`` of float32 (read), or a copy of them (read and written once each)."""

    n_kernels = 1
    n_units = 1
    repeats = True
    capturable = True
    caches: tuple[Cache, ...] = ("cold", "warm")

    def __init__(self, point: Point, device: Device) -> None:
        import torch

        self._torch: Any = torch
        n_bytes = int(point.columns["n_bytes"])
        self._copy = point.columns["op"] == "hbm_copy"
        self.n_sets = n_sets_for((1 + self._copy) * n_bytes, device)
        self._from = [torch.randn(n_bytes // 4, device=device.torch_name) for _ in range(self.n_sets)]
        size = n_bytes // 4 if self._copy else 1
        self._to = [torch.zeros(size, device=device.torch_name) for _ in range(self.n_sets)]

    def refresh(self, index: int, sample: int) -> None:
        """New numbers."""
        self._from[index].normal_(mean=1.0)

    def call(self, index: int) -> None:
        """One kernel."""
        if self._copy:
            self._to[index].copy_(self._from[index])
        else:
            self._torch.sum(self._from[index], dim=0, keepdim=True, out=self._to[index])

    def check(self) -> None:
        """The copy equals its source; the sum equals that in float64."""
        self.call(0)
        source = self._from[0]
        expected = source if self._copy else source.sum(dim=0, keepdim=True, dtype=self._torch.float64)
        check_close(self._to[0], expected, tolerance=1e-3)


class LaunchCase:
    """Kernels that do next to nothing, launched one by one or as one graph; the time is of one of them."""

    caches: tuple[Cache, ...] = ()
    n_sets = 1
    repeats = False

    def __init__(self, point: Point, device: Device) -> None:
        import torch

        self.n_kernels = self.n_units = int(point.columns["n_kernels"])
        self.capturable = point.columns["mode"] == "graph"
        self._x = torch.zeros(1, device=device.torch_name)

    def refresh(self, index: int, sample: int) -> None:
        """Nothing to refresh."""

    def call(self, index: int) -> None:
        """Add 1 to one number, over and over."""
        for _ in range(self.n_kernels):
            self._x.add_(1.0)

    def check(self) -> None:
        """Each launch added 1."""
        self._x.zero_()
        self.call(0)
        if float(self._x) != self.n_kernels:
            raise WrongResultError("launches are lost", value=float(self._x))
