"""From a point to what runs it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import cast

from calibrate.run.device import Device
from calibrate.run.points import Point
from calibrate.run.protocol import Case, measure
from calibrate.schema import Value

__all__ = ["build_case", "sentinel"]

_CASES = {
    "gemm": ("dense", "GemmCase"),
    "attention": ("dense", "attention_case"),
    "transfer": ("transfers", "TransferCase"),
    "memory": ("transfers", "MemoryCase"),
    "launch": ("transfers", "LaunchCase"),
    "moe_ffn": ("kernels", "expert_case"),
    "moe_step": ("kernels", "step_case"),
    "router": ("kernels", "RouterCase"),
}
"""Module of this package and the maker of a case, by kind of table: loaded when the first one is needed."""


def build_case(point: Point, device: Device) -> Case:
    """Allocate a point's buffers and give what runs it.

    Raises
    ------
    DoesNotFitError
        If memory does not suffice.
    """
    module, name = _CASES[point.kind]
    make: Callable[[Point, Device], Case] = getattr(import_module(f"calibrate.run.{module}"), name)
    return make(point, device)


def sentinel(device: Device) -> Callable[[], float]:
    """Time one fixed bfloat16 product: the same work before every round shows how the machine drifts."""
    size = 128 if device.name == "cpu" else 4096
    columns: dict[str, Value] = {
        "op": "gemm",
        "implementation": "torch:linear",
        "dtype": "bfloat16",
        "m": size,
        "n": size,
        "k": size,
    }
    case = build_case(Point("gemm", "sentinel", columns), device)

    def time_s() -> float:
        return measure(cast(Case, _Warm(case)), device, n_samples=10)[0].latency_s

    time_s()  # the first one wakes the clocks
    return time_s


class _Warm:
    """A case timed in one state of the cache only."""

    caches = ("warm",)

    def __init__(self, case: Case) -> None:
        self._case = case

    def __getattr__(self, name: str) -> object:
        return getattr(self._case, name)
