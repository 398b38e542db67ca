"""What a datasheet says of one GPU."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, PositiveInt

from moesim.errors import HardwareError

__all__ = ["Gpu", "compute_dtype", "weight_bytes_per_element"]

_COMPUTE_DTYPE = {
    "bfloat16": "bfloat16",
    "fp8": "fp8",
    "fp8_block": "fp8",
    "w4a16_mxfp4": "bfloat16",
    "nvfp4": "fp4",
}
"""Which matrix unit multiplies a weight format: 4-bit weights with 16-bit activations are widened first."""

_WEIGHT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0 + 4 / 128**2,
    "w4a16_mxfp4": 0.5 + 1 / 32,
    "nvfp4": 0.5 + 1 / 16,
}
"""Bytes per weight, scales included: one float32 per 128 x 128 block (fp8_block, DeepSeek-V3 report, section
3.3.2), one E8M0 byte per 32 values (MXFP4, OCP microscaling 1.0), one FP8 byte per 16 (NVFP4)."""


class Gpu(BaseModel):
    """One GPU; rates are peaks of the datasheet, dense, per direction where they have one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Catalog name."""
    memory_bytes: PositiveFloat
    """Device memory [bytes]."""
    hbm_bytes_per_s: PositiveFloat
    """Device memory rate [bytes/s]."""
    flops_per_s: dict[str, PositiveFloat]
    """Dense matrix rate by operand type [FLOP/s]; a fused multiply-add is 2."""
    n_sms: PositiveInt
    """Streaming multiprocessors."""
    l2_bytes: PositiveFloat
    """Level-2 cache [bytes]."""
    clock_hz: PositiveFloat
    """Boost clock [Hz]."""
    nvlink_bytes_per_s: NonNegativeFloat
    """NVLink rate of the whole GPU, per direction [bytes/s]; 0 where there is none."""
    pcie_bytes_per_s: PositiveFloat
    """Host link rate, per direction [bytes/s]."""
    usd_per_gpu_hour: NonNegativeFloat
    """Default rental price [USD/h]; an assumption to be replaced by a quote."""
    sources: dict[str, str]
    """Where each figure is from."""

    def peak_flops_per_s(self, dtype: str) -> float:
        """Dense matrix rate for weights of `dtype` [FLOP/s]; the next wider unit where the GPU lacks one."""
        for unit in _widening(compute_dtype(dtype)):
            if unit in self.flops_per_s:
                return self.flops_per_s[unit]
        raise HardwareError(
            f"{self.name} has no matrix rate for it",
            value=dtype,
            fix=f"use one of {sorted(self.flops_per_s)}",
        )


def _widening(unit: str) -> tuple[str, ...]:
    order = ("fp4", "fp8", "bfloat16")
    return order[order.index(unit) :] if unit in order else (unit,)


def compute_dtype(dtype: str) -> str:
    """Matrix unit that serves weights of `dtype`."""
    if dtype not in _COMPUTE_DTYPE:
        raise HardwareError("unknown weight format", value=dtype, fix=f"use one of {sorted(_COMPUTE_DTYPE)}")
    return _COMPUTE_DTYPE[dtype]


def weight_bytes_per_element(dtype: str) -> float:
    """Bytes that one weight of `dtype` takes in memory, its share of the scales included."""
    if dtype not in _WEIGHT_BYTES:
        raise HardwareError("unknown weight format", value=dtype, fix=f"use one of {sorted(_WEIGHT_BYTES)}")
    return _WEIGHT_BYTES[dtype]
