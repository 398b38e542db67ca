"""Which library's kernels an engine runs for each operator and weight format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moesim.errors import ProfileError

__all__ = ["BACKENDS", "TRAINING", "Backend", "BackendName", "backend_of"]

BackendName = Literal["sglang", "vllm", "trtllm", "megatron"]


@dataclass(frozen=True)
class Backend:
    """One engine's kernels, as the profile's families name them."""

    name: BackendName
    """Engine."""
    expert_ffn: dict[str, str]
    """Grouped GEMM by weight format, tokens arriving unsorted."""
    all_reduce: str
    """All-reduce inside a node."""
    mixes_prefill: bool
    """Prompts run inside decode steps (TensorRT-LLM's in-flight batching, vLLM's chunked prefill) or in steps of
    their own (SGLang, unless `--enable-mixed-chunk` is given)."""
    exchange_sorted: str = "sglang-deepep"
    """Grouped GEMM after a dispatch that sorts by expert; ``-decode`` and ``-context`` variants."""
    gemm: tuple[tuple[str, str], ...] = (
        ("bfloat16", "torch-cublas"),
        ("fp8", "vllm-cutlass"),
        ("fp8_block", "vllm-deepgemm"),
    )
    """Dense GEMM by weight format. Measured under vLLM alone: the other engines call the same libraries."""
    decode_attention: str = ""
    """KV format whose measured efficiencies the engine's decode attention has in every format; the cache's own
    where left out. FlashAttention 3 reads an FP8 cache at half the share of the memory rate at which it reads
    a 16-bit one; TensorRT-LLM's XQA kernel widens in registers and is taken to lose nothing."""
    host: str = ""
    """Family of the host's share of a step; the engine's name where left out."""

    def gemm_for(self, dtype: str) -> tuple[str, str]:
        """Family of dense products as (implementation, format); 4-bit weights multiply as 16-bit."""
        table = dict(self.gemm)
        known = dtype if dtype in table else "bfloat16"
        return table[known], known

    def expert_ffn_for(self, dtype: str) -> str:
        """Family of grouped products.

        Raises
        ------
        ProfileError
            If this engine runs no experts in that format.
        """
        if dtype not in self.expert_ffn:
            raise ProfileError(
                f"no expert kernel of {self.name} was measured in this format",
                value=dtype,
                fix=f"use one of {', '.join(sorted(self.expert_ffn))}",
            )
        return self.expert_ffn[dtype]


BACKENDS: dict[str, Backend] = {
    "sglang": Backend(
        "sglang",
        {
            "bfloat16": "sglang-triton",
            "fp8_block": "sglang-triton",
            "fp8": "vllm-cutlass",
            "w4a16_mxfp4": "sglang-triton",
        },
        "sglang-custom",
        mixes_prefill=False,
    ),
    "vllm": Backend(
        "vllm",
        {
            "bfloat16": "vllm-triton",
            "fp8_block": "vllm-triton",
            "fp8": "vllm-cutlass",
            "w4a16_mxfp4": "vllm-triton",
        },
        "vllm-custom",
        mixes_prefill=True,
    ),
    "trtllm": Backend(
        "trtllm",
        {
            "bfloat16": "trtllm-cutlass",
            "fp8_block": "trtllm-cutlass",
            "fp8": "trtllm-cutlass",
            "w4a16_mxfp4": "trtllm-cutlass",
        },
        "trtllm",
        mixes_prefill=True,
        decode_attention="bfloat16",
    ),
}
"""Engines by name. A GPU without FP8 units falls back as `moesim.hardware.Gpu.peak_flops_per_s` says."""


TRAINING = replace(BACKENDS["trtllm"], name="megatron", all_reduce="nccl", mixes_prefill=False)
"""Megatron-Core in training: its grouped products are CUTLASS's or cuBLAS's, of which the CUTLASS kernel was
measured, under TensorRT-LLM; its all-reduce is NCCL's."""


def backend_of(name: str) -> Backend:
    """Look an engine up.

    Raises
    ------
    ProfileError
        If it is not one of `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ProfileError("is no known engine", value=name, fix=f"use one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[name]
