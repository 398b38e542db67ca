"""Fit how much exchanges and compute slow one another on one GPU to DeepSeek-V3's published training trace.

    python -m calibrate.fit.beside DATA_DIR -o moesim/catalog/profiles

writes ``<device>.beside.yaml``: ratios of times on one H800, no part of which is of the device. What is fitted, on
what, and what it is shown on: docs/fits/collectives.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, write_fragment
from calibrate.fit.family import Note, say
from calibrate.statistics import ape_stats
from calibrate.validate.network import overlapped_alone_s

__all__ = ["compute_ratios", "exchange_ratio", "families"]

DEVICES = ("h200-sxm", "h100-sxm")
FITTED_ON = ("q_up", "kv_up", "o_proj")
"""Products of the trace that the compute's ratio is fitted on; it is shown on the others that stand alone in A06."""
US = 1e-6


def compute_ratios(facts: pd.DataFrame) -> dict[str, float]:
    """Time of each dense product beside an exchange (A10), over that alone (A06) on as large a share of the SMs."""
    alone_flops_per_s = {}
    for row in facts[facts["case"] == "A06"].to_dict("records"):
        shape = json.loads(str(row["config_json"]))
        if row["unit"] == "TFLOPS" and "M" in shape:
            alone_flops_per_s[shape["M"], shape["N"], shape["K"]] = 1e12 * float(row["value"])
    n_sms = 132  # the H800's, as the rows' hardware says
    ratios = {}
    for row in facts[facts["case"] == "A10"].to_dict("records"):
        shape = json.loads(str(row["config_json"]))
        size = shape.get("M"), shape["N"], shape["K"]
        if size in alone_flops_per_s:
            alone_s = 2.0 * np.prod(size) / alone_flops_per_s[size] * n_sms / shape["sms"]
            ratios[str(shape["op"])] = float(row["value"]) * US / float(alone_s)
    return ratios


def exchange_ratio(facts: pd.DataFrame) -> float:
    """Time of the forward kernels beside compute over that alone in the library of the same month.

    The geometric mean over dispatch and combine: their own ratios do worse on the backward kernels.
    """
    row = facts[facts["id"] == "DST-ratio-a2a"].iloc[0]
    combine = re.search(r"([\d.]+)x combine", str(row["unit"]))
    if combine is None:
        raise SystemExit("DST-ratio-a2a has no ratio of combine")
    return float(np.sqrt(float(row["value"]) * float(combine.group(1))))


def _backward(facts: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    """Backward kernels of the trace, alone as moesim has them, and measured beside compute [s]."""
    rows = facts[(facts["case"] == "A12") & facts["id"].str.endswith("of-grad")]
    alone_s = [overlapped_alone_s(json.loads(str(config))) for config in rows["config_json"]]
    return np.array(alone_s), rows["value"].astype(float).to_numpy() * US


def families(facts: pd.DataFrame, note: Note) -> list[dict[str, Any]]:
    """Families ``(beside, exchange)`` and ``(beside, compute)``."""
    exchange, ratios = exchange_ratio(facts), compute_ratios(facts)
    alone_s, beside_s = _backward(facts)
    compute = float(np.exp(np.mean(np.log([ratios[name] for name in FITTED_ON]))))
    others = np.array([ratios[name] for name in ratios if name not in FITTED_ON])
    errors = {
        "exchange": {"split": "backward from forward", **ape_stats(exchange * alone_s, beside_s)},
        "compute": {
            "split": f"other products from {', '.join(FITTED_ON)}",
            **ape_stats(np.full(len(others), compute), others),
        },
    }
    trace = "DeepSeek-V3 training trace, H800 (deepseek-ai/profile-data @4496024)"
    data = {
        "exchange": f"{trace}: dispatch and combine beside compute over DeepEP's rates of that month (DST-ratio-a2a)",
        "compute": f"{trace}: products on 112 SMs (A10) over DeepGEMM alone on 132 (A06), SMs taken off",
    }
    meanings = {
        "exchange": "time of an exchange that SMs copy while compute runs beside it, over that alone",
        "compute": "time of compute on the SMs left while such an exchange runs beside it, over that alone on as many",
    }
    points = {"exchange": 2, "compute": len(FITTED_ON)}
    found = []
    for name, value in (("exchange", exchange), ("compute", compute)):
        note(f"{name} beside the other: {value:.3f}; {say(errors[name])}")
        found.append(_entry(name, value, meanings[name], data[name], points[name], errors[name]))
    return found


def _entry(
    name: str, value: float, meaning: str, data: str, n_points: int, held_out: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "op": "beside",
        "implementation": name,
        "dtype": "any",
        "parameters": {"stretch": {"value": float(f"{value:.5g}"), "meaning": meaning}},
        "provenance": {"kind": "fitted", "data": data, "n_points": n_points},
        "held_out": dict(held_out),
    }


def main() -> None:
    """Fit, and write a fragment for each device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of published_facts.csv")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the profiles")
    chosen = parser.parse_args()
    found = families(pd.read_csv(chosen.data / "published_facts.csv"), print)
    for device in DEVICES:
        write_fragment(chosen.output / f"{device}.beside.yaml", device, found)


if __name__ == "__main__":
    main()
