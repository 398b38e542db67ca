"""Fit the collectives: NCCL and engines' all-reduce on one host, DeepEP on one host and across hosts.

    python -m calibrate.fit.collectives DATA_DIR -o moesim/catalog/profiles

reads ``measured/{nccl,all_reduce,deepep}.parquet`` and ``published_facts.csv`` there, and writes
 ``{h200-sxm,h100-sxm}.collectives.yaml``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, LogFit, grouped_folds, write_fragment
from calibrate.fit.exchange import exchange_families, one_sided_families
from calibrate.fit.links import FOLDS, NVLINK, RATE, Spec, family_entry, say, solve
from calibrate.statistics import ape_stats
from moesim.network.collectives import custom_all_reduce_s, nccl_one_node_s

__all__ = ["predict_custom", "predict_nccl", "run"]


def _line(name: str, latency: float, step: float, rate: float, what: str, span: tuple[float, float]) -> Spec:
    return {
        f"{name}_latency_s": (latency, 5e-7, 1.5e-4, f"{what}: fixed cost [s]"),
        f"{name}_step_s": (step, 1e-8, 6e-6, f"{what}: cost of each further rank [s]"),
        f"{name}_rate_fraction": (rate, *span, f"{what}: {RATE}, many ranks"),
        f"{name}_rate_loss": (0.2, 1e-3, 1.6, f"{what}: share of that rate lost, times the ranks"),
    }


NCCL_SPEC: Spec = {
    **_line("ll", 4e-6, 1e-6, 0.05, "LL protocol", (0.003, 0.3)),
    **_line("ll128", 6e-6, 1e-6, 0.3, "LL128 protocol", (0.03, 0.9)),
    **_line("simple", 1.5e-5, 1e-6, 0.8, "Simple protocol", (0.3, 1.0)),
}
NVLS_SPEC: Spec = {
    "nvls_latency_s": (2.5e-5, 5e-6, 1.5e-4, "in-switch reduction: fixed cost [s]"),
    "nvls_step_s": (1e-8, 1e-8, 1e-8, "in-switch reduction: cost of each further rank, held [s]"),
    "nvls_rate_fraction": (0.65, 0.3, 1.0, f"in-switch reduction: {RATE}"),
    "nvls_rate_loss": (1e-3, 1e-3, 1e-3, "in-switch reduction: held at none"),
    "nvls_min_ranks": (8, 8, 8, "ranks from which NCCL reduces in the switch, seen in the data"),
}
CUSTOM_SPEC: Spec = {
    **_line("one_shot", 2.5e-6, 1e-7, 0.5, "one-shot", (0.05, 1.0)),
    **_line("two_shot", 4e-6, 3e-7, 0.6, "two-shot", (0.05, 1.0)),
}
# Largest buffer that the engine gives its own kernel; beyond it the measured curve is NCCL's own.
CUSTOM_MAX_BYTES = {"vllm-custom": 8 * 2**20, "sglang-custom": 8 * 2**20, "trtllm": 8 * 2**20}
CUSTOM_ROWS = {
    "vllm-custom": "vllm:vLLM_custom_graph",
    "sglang-custom": "sglang:SGLang_CustomAllReduce_graph",
    "trtllm": "trtllm:TRTLLM",
}


def _by_ranks(rows: pd.DataFrame, price: Callable[[FloatArray, int], FloatArray]) -> FloatArray:
    out = np.empty(len(rows))
    ranks = rows["n_ranks"].to_numpy()
    payload = rows["payload_bytes"].to_numpy(dtype=float)
    for n_ranks in np.unique(ranks):
        here = ranks == n_ranks
        out[here] = price(payload[here], int(n_ranks))
    return out


def predict_nccl(op: str, rows: pd.DataFrame, values: Mapping[str, float]) -> FloatArray:
    """Times of NCCL rows [s]."""
    return _by_ranks(
        rows, lambda b, n: nccl_one_node_s(op, b, n_ranks=n, link_bytes_per_s=NVLINK, values=values)
    )


def predict_custom(rows: pd.DataFrame, values: Mapping[str, float]) -> FloatArray:
    """Times of rows of an engine's all-reduce [s]."""
    return _by_ranks(
        rows, lambda b, n: custom_all_reduce_s(b, n_ranks=n, link_bytes_per_s=NVLINK, values=values)
    )


RowModel = Callable[[pd.DataFrame, Mapping[str, float]], FloatArray]


def _fit_rows(model: RowModel, rows: pd.DataFrame, spec: Spec) -> LogFit:
    return solve(lambda values: model(rows, values), rows["latency_s"].to_numpy(), spec)


def _inside(model: RowModel, rows: pd.DataFrame, fit: LogFit) -> dict[str, Any]:
    return ape_stats(model(rows, fit.values), rows["latency_s"].to_numpy())


def _held_out_by_size(model: RowModel, rows: pd.DataFrame, spec: Spec) -> dict[str, Any]:
    predicted = np.empty(len(rows))
    for mask in grouped_folds(rows["payload_bytes"].to_numpy(), FOLDS, 0):
        predicted[mask] = model(rows[mask], _fit_rows(model, rows[~mask], spec).values)
    return {"split": f"{FOLDS}-fold by message size", **ape_stats(predicted, rows["latency_s"].to_numpy())}


def eight_from_fewer(op: str, rows: pd.DataFrame) -> dict[str, Any]:
    """Error on 8 GPUs of a fit that saw 2 and 4."""
    model = partial(predict_nccl, op)
    fit = _fit_rows(model, rows[rows["n_ranks"] < 8], NCCL_SPEC)
    return _inside(model, rows[rows["n_ranks"] == 8], fit)


def nccl_families(rows: pd.DataFrame, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Families ``(collective, nccl)``; all-reduce twice, because integers are not added in the switch."""
    families = []
    parts = [(op, "any", None) for op in ("all_gather", "reduce_scatter", "all_to_all")]
    for op, dtype, measured_dtype in [*parts, ("all_reduce", "any", "fp16"), ("all_reduce", "int8", "int8")]:
        here = rows[rows["op"] == op]
        if measured_dtype:
            here = here[here["dtype"] == measured_dtype]
        spec = {**NCCL_SPEC, **NVLS_SPEC} if measured_dtype == "fp16" else NCCL_SPEC
        if op == "all_reduce":
            spec = {**spec, "ll_step_s": (1.7e-6, 1e-8, 6e-6, spec["ll_step_s"][3])}
        model = partial(predict_nccl, op)
        fit, held = _fit_rows(model, here, spec), _held_out_by_size(model, here, spec)
        show(f"nccl {op} {dtype}: in {say(_inside(model, here, fit))}; by size {say(held)}")
        show(f"nccl {op} {dtype}: 8 GPUs from 2 and 4 {say(eight_from_fewer(op, here))}")
        sms = {"n_sms": (16.0, "SMs taken: NCCL's channels on one host, assumed")}
        data = "nccl 2.29.2, one H200 host, 2 to 8 GPUs"
        families.append(
            family_entry(op, "nccl", fit, spec, data, held, sms if op == "all_to_all" else {}, dtype)
        )
    return families


def custom_families(rows: pd.DataFrame, show: Callable[[str], None]) -> list[dict[str, Any]]:
    """Families ``(all_reduce, engine)``, from the rows launched in CUDA graphs within the kernel's limit."""
    families = []
    for name, label in CUSTOM_ROWS.items():
        limit = CUSTOM_MAX_BYTES[name]
        here = rows[(rows["implementation"] == label) & (rows["payload_bytes"] <= limit)]
        fit = _fit_rows(predict_custom, here, CUSTOM_SPEC)
        held = _held_out_by_size(predict_custom, here, CUSTOM_SPEC)
        show(f"all_reduce {name}: in {say(_inside(predict_custom, here, fit))}; by size {say(held)}")
        constants = {"max_bytes": (float(limit), "largest buffer of the engine's own kernel; assumed")}
        data = f"{here['software'].iloc[0]}, one H200 host, 2 to 8 GPUs, in CUDA graphs"
        families.append(family_entry("all_reduce", name, fit, CUSTOM_SPEC, data, held, constants))
    return families


def assumed_families() -> list[dict[str, Any]]:
    """Families across nodes, over PCIe and point to point: datasheet rates with assumed efficiencies."""
    start = (1.5e-5, "fixed cost of a call; assumed")
    tables: tuple[tuple[str, str, dict[str, tuple[float, str]]], ...] = (
        (
            "inter_node",
            "share of the NIC rate: 48.5 of 50 GB/s reachable on CX7 NDR (NVIDIA, published_facts NET-NDR); "
            "start, hop and peer costs assumed",
            {
                "nic_rate_fraction": (0.97, "share of the NIC's datasheet rate"),
                "start_s": start,
                "hop_s": (3e-6, "cost of a hop beside the link's latency; assumed"),
                "peer_s": (0.5e-6, "cost of posting to one far peer in an all-to-all; assumed"),
            },
        ),
        (
            "pcie",
            "no measurement without NVLink in the data; assumed",
            {
                "rate_fraction": (0.75, "share of the PCIe datasheet rate; assumed"),
                "start_s": start,
                "step_s": (3e-6, "cost of each ring step; assumed"),
            },
        ),
        (
            "send_recv",
            "NVLink share: 370 of 450 GB/s outside all-reduce (NVIDIA, published_facts NET-NVL-eff); start assumed",
            {
                "nvlink_start_s": (8e-6, "fixed cost of a send; assumed"),
                "nvlink_rate_fraction": (0.82, RATE),
            },
        ),
    )
    return [
        {
            "op": op, "implementation": "nccl", "dtype": "any",
            "parameters": {name: {"value": value, "meaning": meaning} for name, (value, meaning) in values.items()},
            "provenance": {"kind": "assumed", "data": data},
        }
        for op, data, values in tables
    ]  # fmt: skip


def _carried(family: Mapping[str, Any]) -> dict[str, Any]:
    provenance = family["provenance"]
    if provenance["kind"] == "assumed":
        return dict(family)
    data = f"h200-sxm, which has the same NVLink: {provenance['data']}"
    return {**family, "provenance": {**provenance, "kind": "carried-over", "data": data}}


def run(data: Path, out: Path, show: Callable[[str], None]) -> None:
    """Fit everything in `data` and write both fragments to `out`; errors go to `show`, a line each."""
    measured = data / "measured"
    nccl = pd.read_parquet(measured / "nccl.parquet")
    reduce = pd.read_parquet(measured / "all_reduce.parquet")
    one_host = [
        *nccl_families(nccl.assign(payload_bytes=nccl["message_bytes"].astype(float)), show),
        *custom_families(reduce.assign(payload_bytes=2.0 * reduce["message_elements"]), show),
        *assumed_families(),
    ]
    one_sided = one_sided_families(pd.read_csv(data / "published_facts.csv"), show)
    h200, h100 = exchange_families(pd.read_parquet(measured / "deepep.parquet"), show)
    for device, families, exchange in (
        ("h200-sxm", one_host, h200),
        ("h100-sxm", [_carried(family) for family in one_host], h100),
    ):
        write_fragment(out / f"{device}.collectives.yaml", device, [*families, *exchange, *one_sided])


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Fit collectives to measured tables and write profile fragments."
    )
    parser.add_argument("data", type=Path, help="folder with measured/*.parquet")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the profiles")
    options = parser.parse_args(arguments)
    run(options.data, options.out, print)


if __name__ == "__main__":
    main()
