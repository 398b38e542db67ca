"""What a point will take, before it is measured, and what it would say: from the base profile and the roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.run.points import Point
from calibrate.run.protocol import MIN_SAMPLES
from moesim.hardware.gpu import Gpu, weight_bytes_per_element
from moesim.hardware.profile import Family, Profile

__all__ = ["measuring_s", "predicted_s", "sensitivity"]

FloatArray = NDArray[np.float64]
Predict = Callable[[Profile], FloatArray]

_STAND_INS = {
    "moesim-triton": "sglang:sglang_fused_moe_triton",
    "moesim-padded": "sglang:sglang_fused_moe_triton",
    "moesim-naive": "sglang:sglang_fused_moe_triton",
    "torch:linear": "vllm:torch.nn.functional.linear",
    "torch:scaled_mm": "vllm:CutlassFP8ScaledMMLinearKernel",
    "torch:sdpa": "vllm:vllm_flash_attn_fa3",
}
"""A kernel of the base profile that does the same work as one of ours."""
_LATENT_STAND_IN = "sglang:flash_attention"
"""The same of our attention on a latent, whose implementation has the name of our experts'."""
_STEP = 1.02
"""Factor on a parameter for its sensitivity."""
_REACH = 0.5
"""Share of the roofline that an unknown kernel is taken to reach."""
_LAUNCH_S = 10e-6
_PREPARE_S = 0.4
"""Building a point, checking it, capturing graphs: assumed until runs say."""
_FILL_BYTES_PER_S = 3e11
"""Rate at which random data is made on a GPU; assumed likewise."""
_SAMPLE_S = 1e-3
"""Fresh data, the cache's flush and the events of one sample; assumed likewise."""


def predicted_s(points: Sequence[Point], gpu: Gpu, profile: Profile | None) -> FloatArray:
    """Time of one call of each point: the base profile's for a like kernel, or twice the roofline; (n_points,) [s]."""
    rough_s = np.asarray([_rough_s(point, gpu) for point in points])
    predict = _predictor(points, gpu)
    if predict is None or profile is None:
        return rough_s
    known_s = predict(profile)
    return np.where(np.isfinite(known_s), known_s, rough_s)


def measuring_s(points: Sequence[Point], call_s: FloatArray) -> FloatArray:
    """Time that measuring takes, cold and warm, kernels compiled; (n_points,) [s]."""
    filled_s = np.asarray([_held_bytes(point) for point in points]) / _FILL_BYTES_PER_S
    refreshed_s = np.asarray([_refreshed_bytes(point) for point in points]) / _FILL_BYTES_PER_S
    sampled_s = 2.0 * (_SAMPLE_S + refreshed_s) + 3.0 * np.maximum(call_s, 1e-4)
    return np.asarray(_PREPARE_S + filled_s + MIN_SAMPLES * sampled_s)


def sensitivity(points: Sequence[Point], gpu: Gpu, profile: Profile | None) -> FloatArray:
    """Slopes d log t / d log parameter of the cost model at the base profile; (n_points, n_parameters).

    Zero columns where nothing is known of a point; no columns at all where the family has no cost model.
    """
    predict = _predictor(points, gpu)
    if predict is None or profile is None:
        return np.zeros((len(points), 0))
    base_s = predict(profile)
    columns = []
    for name in _parameters_in_use(points, profile):
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.log(predict(_changed(profile, name, _STEP)) / base_s) / np.log(_STEP)
        columns.append(np.nan_to_num(change, nan=0.0, posinf=0.0, neginf=0.0))
    found = np.stack(columns, axis=1) if columns else np.zeros((len(points), 0))
    return np.asarray(found[:, np.abs(found).max(axis=0) > 1e-4]) if found.size else found


def _predictor(points: Sequence[Point], gpu: Gpu) -> Predict | None:
    """Function from a profile to times of these points, NaN where it has none."""
    if not points:
        return None
    import pandas as pd

    from calibrate.fit.registry import predict_rows

    kind = points[0].kind
    rows = [{**point.columns, "device": gpu.name, "software": "", "latency_s": 1.0} for point in points]
    frame = pd.DataFrame(rows)
    own = _STAND_INS | ({"moesim-triton": _LATENT_STAND_IN} if kind == "attention" else {})
    frame["implementation"] = frame["implementation"].map(lambda name: own.get(name, name))

    def predict(profile: Profile) -> FloatArray:
        return np.asarray(predict_rows(frame, kind, gpu=gpu, profile=profile).time_s, dtype=np.float64)

    return predict


def _parameters_in_use(points: Sequence[Point], profile: Profile) -> list[str]:
    """Names of the parameters of the families of this operator that were fitted, not held."""
    ops = {str(point.columns["op"]) for point in points}
    families = [family for family in profile.families if family.op in ops]
    return sorted({name for family in families for name, one in family.parameters.items() if one.stderr})


def _changed(profile: Profile, name: str, factor: float) -> Profile:
    """The profile with one parameter of every family multiplied."""

    def change(family: Family) -> Family:
        if name not in family.parameters:
            return family
        one = family.parameters[name]
        changed = one.model_copy(update={"value": one.value * factor})
        return family.model_copy(update={"parameters": {**family.parameters, name: changed}})

    return profile.model_copy(update={"families": tuple(change(family) for family in profile.families)})


# ---------------------------------------------------------------- roofline


def _rough_s(point: Point, gpu: Gpu) -> float:
    flops, moved_bytes = _work(point)
    dtype = str(point.columns["dtype"])
    if point.kind == "transfer" and point.columns["op"] != "d2d":
        return _LAUNCH_S + moved_bytes / (_REACH * gpu.pcie_bytes_per_s)
    if point.kind == "launch":
        return _LAUNCH_S * float(point.columns["n_kernels"])
    peak = gpu.peak_flops_per_s(dtype) if flops else 1.0
    return _LAUNCH_S + max(flops / peak, moved_bytes / gpu.hbm_bytes_per_s) / _REACH


def _work(point: Point) -> tuple[float, float]:
    """Operations and bytes of one call."""
    return _WORK[point.kind](_Sizes(point))


def _held_bytes(point: Point) -> float:
    """Bytes that are filled with random data first: what a call moves, and experts that get no token."""
    at = _Sizes(point)
    if point.kind not in ("moe_ffn", "moe_step") or at.op in ("moe_permute", "moe_combine"):
        return _work(point)[1]
    elements = 3.0 * at.hidden * at.intermediate * at.n_experts / (at.tp * at.ep)
    return float(elements * weight_bytes_per_element(at.dtype))


def _refreshed_bytes(point: Point) -> float:
    """Bytes of fresh random data in each sample: all that a memory point reads, else activations."""
    at = _Sizes(point)
    if point.kind in ("moe_ffn", "moe_step", "router"):
        return 2.0 * float(at.n_tokens * at.hidden)
    if point.kind == "gemm":
        return 2.0 * float(at.m * at.k)
    if point.kind == "attention":
        return 2.0 * float(at.batch * at.n_query * at.n_heads * at.head_dim)
    return float(at.n_bytes) if point.kind == "memory" else 0.0


class _Sizes:
    """Columns of a point as attributes."""

    def __init__(self, point: Point) -> None:
        self._columns = point.columns

    def __getattr__(self, name: str) -> Any:
        return self._columns[name]


def _experts_work(at: _Sizes) -> tuple[float, float]:
    pairs = at.n_tokens * at.top_k / at.ep
    matrix = 3.0 * at.hidden * at.intermediate / at.tp
    active = min(at.n_experts / at.ep, pairs)
    rows_bytes = 2.0 * pairs * (3 * at.hidden + 3 * at.intermediate / at.tp)
    if at.op in ("moe_permute", "moe_combine"):
        return 0.0, rows_bytes
    part = {"moe_up": 2 / 3, "moe_down": 1 / 3}.get(at.op, 1.0)
    weights_bytes = active * matrix * weight_bytes_per_element(at.dtype)
    return 2.0 * part * pairs * matrix, part * weights_bytes + rows_bytes


def _gemm_work(at: _Sizes) -> tuple[float, float]:
    return 2.0 * at.m * at.n * at.k, 2.0 * (at.m * at.k + at.n * at.k + at.m * at.n)


def _attention_work(at: _Sizes) -> tuple[float, float]:
    pairs = at.batch * at.n_query * at.n_context * (0.5 if at.n_query > 1 else 1.0)
    # keys and values; a latent is both at once
    cache_bytes = (2.0 if at.kind == "mla" else 4.0) * at.batch * at.n_context * at.n_kv_heads * at.head_dim
    return (
        4.0 * pairs * at.n_heads * at.head_dim,
        cache_bytes + 4.0 * at.batch * at.n_query * at.n_heads * at.head_dim,
    )


def _router_work(at: _Sizes) -> tuple[float, float]:
    bytes_moved = 2.0 * at.hidden * (at.n_tokens + at.n_experts)
    return 2.0 * at.n_tokens * at.hidden * at.n_experts, bytes_moved


def _copy_work(at: _Sizes) -> tuple[float, float]:
    return 0.0, float(at.n_bytes) * (2.0 if at.op in ("d2d", "hbm_copy") else 1.0)


_WORK: dict[str, Callable[[_Sizes], tuple[float, float]]] = {
    "moe_ffn": _experts_work,
    "moe_step": _experts_work,
    "gemm": _gemm_work,
    "attention": _attention_work,
    "router": _router_work,
    "transfer": _copy_work,
    "memory": _copy_work,
    "launch": lambda at: (0.0, 0.0),
}
