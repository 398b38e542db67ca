"""Which library's kernels an engine runs for each operator and weight format."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from moesim.errors import ProfileError
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Family, Profile

__all__ = ["BACKENDS", "TRAINING", "Asked", "Backend", "BackendName", "Key", "backend_of"]

BackendName = Literal["sglang", "vllm", "trtllm", "megatron", "moesim"]
Key = tuple[str, str, str]
"""(op, implementation, format) of a profile's family."""
Asked = tuple[str, str, str]
"""(op, format, kind of attention or empty): what a kernel is wanted for."""


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
    """Grouped GEMM after a dispatch that sorts by expert; ``-decode`` and ``-context`` variants. Where empty it is
    the one of unsorted tokens."""
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
    attention: str = "gqa-fa3"
    """Attention with keys and values of their own, where prompts of latent attention are not FlashAttention 3's."""
    latent: str = "mla-fa3"
    """Decode attention on a cached latent."""
    widened_by_ep: tuple[str, ...] = ()
    """Formats of experts that the engine widens to bfloat16 when it loads them, where expert parallelism spreads them
    and the GPU has no FP4 units. SGLang's triton_kernels run on one expert rank alone (``server_args.py``, 0.5: chosen
    for gpt-oss where ``ep_size == 1``); else it calls ``upcast_from_mxfp`` (``mxfp4.py``)."""
    stand_in: Backend | None = None
    """Whose kernels take the place of those that a profile lacks; None where all are to be there."""

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

    def held_as(self, dtype: str, *, ep: int, gpu: Gpu) -> str:
        """Format in which experts stored as `dtype` lie in memory and are multiplied."""
        widened = dtype in self.widened_by_ep and ep > 1 and "fp4" not in gpu.flops_per_s
        return "bfloat16" if widened else dtype

    def key(self, op: str, dtype: str, kind: str = "") -> Key:
        """Name of the family that this engine's kernel has.

        Parameters
        ----------
        op
            ``gemm``, ``moe_ffn``, ``attention_prefill`` or ``attention_decode``.
        dtype
            Format of the weights, of attention that of the KV cache.
        kind
            Of attention: ``gqa`` or ``mla``.
        """
        if op == "gemm":
            return op, *self.gemm_for(dtype)
        if op == "moe_ffn":
            return op, self.expert_ffn_for(dtype), dtype
        if op == "attention_prefill":
            # engines run fresh MLA prompts un-absorbed, as plain attention with its own key per head
            return op, "gqa-fa3" if kind == "mla" else self.attention, dtype
        # the measured fp8 MLA kernel widens its whole cache first; engines' kernels do not
        if kind == "mla":
            return op, self.latent, "bfloat16"
        return op, self.attention, self.decode_attention or dtype

    def family(self, profile: Profile, op: str, dtype: str, kind: str = "") -> Family:
        """Parameters of the kernel that an operator runs, the stand-in's where a profile lacks this engine's.

        Raises
        ------
        ProfileError
            If the profile has neither.
        """
        if self.stand_in is not None and not profile.has(*self.key(op, dtype, kind)):
            return self.stand_in.family(profile, op, dtype, kind)
        return profile.family(*self.key(op, dtype, kind))

    def sorted_by(self, profile: Profile, dtype: str) -> str:
        """Library of the grouped products behind a sorting dispatch; empty where it is that of unsorted tokens."""
        if self.stand_in is not None and not profile.has(*self.key("moe_ffn", dtype)):
            return self.stand_in.exchange_sorted
        return self.exchange_sorted

    def replaced(self, profile: Profile, asked: Iterable[Asked]) -> list[tuple[Key, Family]]:
        """Kernels of this engine that a profile lacks, each with what stands in for it.

        Raises
        ------
        ProfileError
            If it has none of an operator's kernels, in whatever format: then nothing of this engine was measured.
        """
        if self.stand_in is None:
            return []
        found = []
        for op, dtype, kind in asked:
            key = self.key(op, dtype, kind)
            own = {key[1], *(name for _, name in self.gemm)} if op == "gemm" else {key[1]}
            known = any(one.op == op and one.implementation in own for one in profile.families)
            if not known and kind != "mla":  # which profiles of before do not have
                raise ProfileError(
                    f"no {op} by {key[1]} in {key[2]} is in the profile of {profile.device}: "
                    "it was not measured on that GPU",
                    value=self.name,
                    place="backend",
                    fix="moesim calibrate run, then moesim calibrate fit, and set profile to the file that it writes",
                )
            if not profile.has(*key):
                found.append((key, self.family(profile, op, dtype, kind)))
        return found


BACKENDS: dict[str, Backend] = {
    "sglang": Backend(
        "sglang",
        {
            "bfloat16": "sglang-triton",
            "fp8_block": "sglang-triton",
            "fp8": "vllm-cutlass",
            "w4a16_mxfp4": "vllm-triton",  # OpenAI's triton_kernels, which both engines call
        },
        "sglang-custom",
        mixes_prefill=False,
        widened_by_ep=("w4a16_mxfp4",),
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

_OWN = "moesim-triton"
BACKENDS["moesim"] = Backend(
    "moesim",
    dict.fromkeys(("bfloat16", "fp8_block", "fp8", "w4a16_mxfp4"), _OWN),
    "nccl",
    mixes_prefill=False,
    exchange_sorted="",
    gemm=(("bfloat16", "torch-cublas"), ("fp8", "torch:scaled_mm"), ("fp8_block", "torch:scaled_mm")),
    host="sglang",
    attention="torch:sdpa",
    latent=_OWN,
    stand_in=BACKENDS["sglang"],
)
"""Kernels that `moesim calibrate run` measures, and NCCL for every collective. What it does not measure is SGLang's:
formats without rows, latent attention, and the host's share of a step."""


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
