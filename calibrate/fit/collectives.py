"""Fit NCCL's collectives and the engines' own all-reduce to tables of kinds ``collective`` and ``all_reduce``.

Equations, errors and what was tried: docs/fits/collectives.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.assumed import assumed_network
from calibrate.fit.common import FloatArray, Prediction
from calibrate.fit.family import (
    Kernel,
    Key,
    Method,
    Note,
    Spec,
    Values,
    fit_family,
    known_family,
    newest_software,
    predict_by_family,
)
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Profile
from moesim.network.collectives import custom_all_reduce_s, nccl_one_node_s

__all__ = [
    "CUSTOM", "TABLES", "custom_kernel", "fit_table", "nccl_kernel", "predict_custom", "predict_nccl", "predict_send",
    "predict_table", "with_payload",
]  # fmt: skip

TABLES = ("collective", "all_reduce")
LIBRARY = "nccl"
LONE_HOP_S = 0.6e-6
"""Hop of a ring over NVLink in the LL protocol: NCCL's own constant (hwLat in src/graph/tuning.cc, 2.19 to 2.28)."""
SWITCH_RANKS = 8
"""Ranks from which NCCL sums in the switch."""
COLLECTIVES = ("all_gather", "all_reduce", "all_to_all", "reduce_scatter")
METHOD = Method(("payload_bytes",), loss_scale=0.08, max_evaluations=80, split="5-fold by message size")
RATE = "share of the NVLink datasheet rate"
CUSTOM = {
    "vllm:vLLM_custom_graph": "vllm-custom",
    "sglang:SGLang_CustomAllReduce_graph": "sglang-custom",
    "trtllm:TRTLLM": "trtllm",
    "vllm:vLLM_custom_eager": "vllm-custom-eager",
    "sglang:SGLang_CustomAllReduce_eager": "sglang-custom-eager",
}
"""Engines' kernels in the measured table and in the profile, launched in a CUDA graph or one by one."""
CUSTOM_MAX_BYTES = 8 * 2**20
"""Largest buffer that engines give their own kernel; beyond it the measured curve is NCCL's own."""
_ELEMENT_BYTES = {"int8": 1, "uint8": 1, "fp8": 1, "float32": 4, "fp32": 4, "int32": 4, "int64": 8}
"""Others are 2."""
_INTEGERS = ("int8", "uint8", "int32", "int64")


def _line(
    name: str,
    latency: float,
    step: float,
    rate: float,
    what: str,
    span: tuple[float, float],
    loss: float = 0.2,
) -> Spec:
    return {
        f"{name}_latency_s": (latency, 5e-7, 1.5e-4, f"{what}: fixed cost [s]"),
        f"{name}_step_s": (step, 1e-8, 6e-6, f"{what}: cost of each further rank [s]"),
        f"{name}_rate_fraction": (rate, *span, f"{what}: {RATE}, many ranks"),
        f"{name}_rate_loss": (loss, 1e-3, 1.6, f"{what}: share of that rate lost, times the ranks"),
    }


_NCCL: Spec = {
    **_line("ll", 4e-6, 1e-6, 0.05, "LL protocol", (0.003, 0.3)),
    **_line("ll128", 6e-6, 1e-6, 0.3, "LL128 protocol", (0.03, 0.9)),
    **_line("simple", 1.5e-5, 1e-6, 0.8, "Simple protocol", (0.3, 1.0)),
}
_PAIRS: Spec = {
    **_line("ll", 6e-6, 4e-7, 0.07, "LL protocol", (0.003, 0.3), loss=1.5),
    **_line("ll128", 1.3e-5, 2e-7, 0.6, "LL128 protocol", (0.03, 0.9), loss=0.4),
    "ll128_free_bytes": (7e5, 1e3, 1e7, "LL128 protocol: bytes under way within the fixed cost [bytes]"),
    **_line("simple", 3e-5, 3e-6, 0.75, "Simple protocol", (0.3, 1.0)),
}
"""An all-to-all's: sends between pairs fill their channels' buffers while the kernel starts."""
_SWITCH: Spec = {
    "nvls_latency_s": (2.5e-5, 5e-6, 1.5e-4, "in-switch reduction: fixed cost [s]"),
    "nvls_step_s": (1e-8, 1e-8, 1e-8, "in-switch reduction: cost of each further rank, held [s]"),
    "nvls_rate_fraction": (0.65, 0.3, 1.0, f"in-switch reduction: {RATE}"),
    "nvls_rate_loss": (1e-3, 1e-3, 1e-3, "in-switch reduction: held at none"),
    "nvls_min_ranks": (
        SWITCH_RANKS,
        SWITCH_RANKS,
        SWITCH_RANKS,
        "ranks from which NCCL reduces in the switch, seen in the data",
    ),
}
_CUSTOM: Spec = {
    **_line("one_shot", 2.5e-6, 1e-7, 0.5, "one-shot", (0.05, 1.0)),
    **_line("two_shot", 4e-6, 3e-7, 0.6, "two-shot", (0.05, 1.0)),
}
_SEND: Spec = {
    "nvlink_start_s": (8e-6, 1e-6, 1e-4, "fixed cost of a send [s]"),
    "nvlink_rate_fraction": (0.8, 0.1, 1.0, RATE),
}


def nccl_kernel(op: str, dtype: str, most_ranks: int = SWITCH_RANKS) -> Kernel:
    """Family of one of NCCL's collectives, measured on groups of up to `most_ranks`.

    Integers are not added in the switch, so they have a family of their own.
    """
    if op == "send_recv":
        return Kernel(op, LIBRARY, "any", _SEND)
    spec = _PAIRS if op == "all_to_all" else _NCCL
    if op == "all_reduce":
        spec = {**spec, "ll_step_s": (1.7e-6, 1e-8, 6e-6, spec["ll_step_s"][3])}
        spec = spec if dtype == "int8" or most_ranks < SWITCH_RANKS else {**spec, **_SWITCH}
    given = {
        "all_to_all": {"n_sms": (16.0, "SMs taken: NCCL's channels on one host, assumed")},
        "all_reduce": {
            "ll_lone_step_s": (
                2 * LONE_HOP_S,
                "LL protocol: cost of each further rank where one chunk goes round: two hops, by NCCL's constant [s]",
            )
        },
    }
    return Kernel(op, LIBRARY, dtype, spec, given.get(op, {}))


def custom_kernel(implementation: str) -> Kernel:
    """Family of an engine's own all-reduce."""
    most = {"max_bytes": (float(CUSTOM_MAX_BYTES), "largest buffer of the engine's own kernel; assumed")}
    return Kernel("all_reduce", CUSTOM.get(implementation, implementation), "any", _CUSTOM, most)


def with_payload(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with `payload_bytes`, as `moesim.network.collectives.wire_bytes` counts them."""
    width = rows["dtype"].map(lambda name: _ELEMENT_BYTES.get(name, 2)).astype(float)
    payload = rows["message_elements"].astype(float) * width
    if "message_bytes" in rows:
        payload = rows["message_bytes"].astype(float).fillna(payload)
    return rows.assign(payload_bytes=payload)


def _by_ranks(rows: pd.DataFrame, price: Callable[[FloatArray, int], FloatArray]) -> FloatArray:
    out = np.empty(len(rows))
    ranks = rows["n_ranks"].to_numpy()
    payload = rows["payload_bytes"].to_numpy(dtype=float)
    for n_ranks in np.unique(ranks):
        here = ranks == n_ranks
        out[here] = price(payload[here], int(n_ranks))
    return out


def predict_nccl(op: str, gpu: Gpu, rows: pd.DataFrame, values: Values) -> FloatArray:
    """Times of NCCL rows on one host [s]."""
    link = gpu.nvlink_bytes_per_s
    return _by_ranks(
        rows, lambda b, n: nccl_one_node_s(op, b, n_ranks=n, link_bytes_per_s=link, values=values)
    )


def predict_send(gpu: Gpu, rows: pd.DataFrame, values: Values) -> FloatArray:
    """Times of sends to one rank of the same host [s]."""
    payload = rows["payload_bytes"].to_numpy(dtype=float)
    rate = values["nvlink_rate_fraction"] * gpu.nvlink_bytes_per_s
    return np.asarray(values["nvlink_start_s"] + payload / rate)


def predict_custom(gpu: Gpu, rows: pd.DataFrame, values: Values) -> FloatArray:
    """Times of rows of an engine's all-reduce [s]."""
    link = gpu.nvlink_bytes_per_s
    return _by_ranks(
        rows, lambda b, n: custom_all_reduce_s(b, n_ranks=n, link_bytes_per_s=link, values=values)
    )


def fit_table(
    rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note, source: str = ""
) -> list[dict[str, Any]]:
    """Families of collectives inside one host, and those assumed beyond it.

    Arguments as in `calibrate.fit.gemm.fit_table`.
    """
    rows = with_payload(rows)
    rows = rows.assign(why=_why_not(rows, gpu))
    for (name, op, why), part in rows[rows["why"] != ""].groupby(["implementation", "op", "why"]):
        note(f"{op} {name}: {len(part)} rows not fitted: {why}")
    rows = rows[(rows["why"] == "") & (rows["n_ranks"] > 1)]
    rows = rows.assign(family=_families(rows))
    found = []
    for (name, op, dtype), every in rows.groupby(["implementation", "op", "family"], sort=False):
        part = newest_software(every, note)
        kernel = (
            nccl_kernel(op, dtype, int(part["n_ranks"].max())) if name == LIBRARY else custom_kernel(name)
        )
        if name != LIBRARY:
            part = part[part["payload_bytes"] <= CUSTOM_MAX_BYTES]
        model = _model(kernel.key, gpu)
        found.append(fit_family(kernel, part, model, METHOD, base=base, note=note, source=source))
    return [*found, *assumed_network(found)]


def _families(rows: pd.DataFrame) -> pd.Series:
    """Format in the profile: NCCL adds floats of 8 ranks and more in the switch, integers never."""
    integers = (
        (rows["op"] == "all_reduce") & rows["dtype"].isin(_INTEGERS) & (rows["implementation"] == LIBRARY)
    )
    return pd.Series(np.where(integers, "int8", "any"), index=rows.index)


def _why_not(rows: pd.DataFrame, gpu: Gpu) -> pd.Series:
    """Reason why a row has no model, else an empty string."""
    why = pd.Series("", index=rows.index)
    library = rows["implementation"] == LIBRARY
    why[library & ~rows["op"].isin([*COLLECTIVES, "send_recv"])] = "no model of this operator"
    why[~library & (rows["op"] != "all_reduce")] = "only all-reduce has kernels of its own beside NCCL's"
    why[rows["implementation"] == "gloo"] = "gloo runs on hosts; its links are fitted apart"
    if "n_nodes" in rows:
        why[rows["n_nodes"].fillna(1).astype(float) > 1] = "links between nodes are fitted apart"
    if "split" in rows:
        why[rows["split"] == "trace"] = (
            "uneven splits are priced by their busiest port, which the row does not tell"
        )
    if gpu.nvlink_bytes_per_s == 0:
        why[why == ""] = f"{gpu.name} has no NVLink; collectives over PCIe are assumed"
    return why


def _model(key: Key, gpu: Gpu) -> Callable[[pd.DataFrame, Values], FloatArray]:
    op, implementation, _ = key
    if implementation != LIBRARY:
        return partial(predict_custom, gpu)
    return partial(predict_send, gpu) if op == "send_recv" else partial(predict_nccl, op, gpu)


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Times of measured collectives on one host; NaN with a reason where there is no model.

    Beyond the largest buffer of its own kernel an engine runs NCCL.
    """
    rows = with_payload(rows)
    rows = rows.assign(why=_why_not(rows, gpu), family=_families(rows))
    library = known_family(profile, ("all_reduce", LIBRARY, "any"))

    def locate(values: tuple[Any, ...]) -> Key | str:
        op, implementation, dtype, why = values
        if why:
            return str(why)
        return (op, implementation, dtype) if implementation == LIBRARY else custom_kernel(implementation).key

    def price(part: pd.DataFrame, values: Values, key: Key) -> FloatArray:
        time_s = _model(key, gpu)(part, values)
        if key[1] == LIBRARY:
            return time_s
        beyond = part["payload_bytes"].to_numpy(dtype=float) > values["max_bytes"]
        nccl_s = np.nan if library is None else predict_nccl("all_reduce", gpu, part, library.values())
        return np.where(beyond, nccl_s, time_s)

    return predict_by_family(rows, ["op", "implementation", "family", "why"], locate, profile, price)
