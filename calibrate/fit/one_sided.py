"""Fit the one-sided exchanges of a large NVLink domain to published batch sweeps, which are in no measured table.

    python -m calibrate.fit.one_sided published_facts.csv -o moesim/catalog/profiles

writes ``<device>.one_sided.yaml``: no part of it is of the device, so every profile has the same.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import FloatArray, fit_log_least_squares, write_fragment
from calibrate.fit.exchange_rows import DIRECTIONS, Direction, ExchangeRows, predict_exchange
from calibrate.fit.family import Kernel, Note, Spec, Values, family_entry, say
from calibrate.statistics import ape_stats
from moesim.hardware.catalog import load_cluster
from moesim.hardware.cluster import Cluster
from moesim.network.exchange import ExchangeTerms, low_latency_terms
from moesim.work.ops import Combine, Dispatch, Exchange

__all__ = ["families", "one_sided_rows"]

DEVICES = ("h200-sxm", "h100-sxm")
RACK = "nvl72"
DATA = "published: TensorRT-LLM NVLinkOneSided on GB200 NVL72, 8 ranks (published_facts A05)"
_SPEC: Spec = {
    "start_s": (1.3e-5, 1e-6, 1e-4, "fixed cost of a call [s]"),
    "token_s": (5e-6, 1e-7, 1e-4, "an SM's time per token [s]"),
    "nvlink_rate_fraction": (0.8, 0.3, 1.0, "share of the NVLink datasheet rate"),
}
_NONE = (0.0, "not in these kernels, or not measured")
_CONSTANTS = {
    **dict.fromkeys(
        [
            "expert_s",
            "token_byte_s",
            "copy_byte_s",
            "message_s",
            "message_byte_s",
            "far_start_s",
            "far_peer_s",
        ],
        _NONE,
    ),
    "nic_contention": _NONE,
    "nic_rate_fraction": (0.97, "share of the NIC's datasheet rate: 48.5 of 50 GB/s (NVIDIA, CX7)"),
    "pcie_rate_fraction": (0.75, "share of the PCIe datasheet rate, where a box has no NVLink; assumed"),
    "n_sms": (0.0, "SMs kept from compute: none"),
}


def one_sided_rows(facts: pd.DataFrame, direction: Direction) -> list[ExchangeRows]:
    """Published batch sweeps of one-sided kernels on GB200 NVL72 (case A05), one entry per group size.

    bfloat16 both ways; the router of that benchmark gives every token min(ep, top_k) different ranks.
    """
    rack = load_cluster(RACK)
    sweep = [json.loads(text) for text in facts.loc[facts["case"] == "A05", "config_json"]]
    latency_s = 1e-6 * facts.loc[facts["case"] == "A05", "value"].astype(float).to_numpy()
    found = []
    for ep in sorted({row["ep"] for row in sweep}):
        here = [i for i, row in enumerate(sweep) if row["ep"] == ep and row["op"] == direction]
        tokens = np.array([sweep[i]["batch_per_rank"] for i in here], dtype=float).reshape(-1, 1, 1)
        shape = sweep[here[0]]
        copies = tokens * min(ep, shape["topk"]) * (ep - 1) / ep
        none = np.zeros_like(tokens)
        op = (Combine if direction == "combine" else Dispatch)(
            n_tokens=tokens, sent_nvlink=copies, received_nvlink=copies, sent_nic=none, received_nic=none,
            token_bytes=2.0 * shape["hidden"], hidden=shape["hidden"], top_k=shape["topk"],
            n_experts=shape["experts"], kind="normal",
        )  # fmt: skip
        key = (shape["hidden"], shape["topk"], shape["experts"])
        found.append(ExchangeRows(op, 1, key, latency_s[here], rack, n_ranks=ep))
    return found


def _terms(op: Exchange, values: Values, cluster: Cluster, n_ranks: int, per_domain: int) -> ExchangeTerms:
    return low_latency_terms(op, values, cluster, n_ranks, per_domain, copies_per_rank=True)


def _predicted_s(rows: Sequence[ExchangeRows], values: Values) -> FloatArray:
    given = {name: value for name, (value, _) in _CONSTANTS.items()}
    return predict_exchange(rows, {**given, **values}, _terms)


def families(facts: pd.DataFrame, note: Note) -> list[dict[str, Any]]:
    """Families ``(ep_dispatch | ep_combine, one-sided)``: fitted on 8 ranks, shown on 32."""
    found = []
    for direction in DIRECTIONS:
        rows = one_sided_rows(facts, direction)
        eight, more = ([row for row in rows if (row.n_ranks == 8) is wanted] for wanted in (True, False))
        fit = fit_log_least_squares(
            partial(_predicted_s, eight),
            np.concatenate([row.measured_s for row in eight]),
            {name: row[0] for name, row in _SPEC.items()},
            {name: (row[1], row[2]) for name, row in _SPEC.items()},
            loss_scale=0.08,
            max_evaluations=80,
        )
        unseen_s = np.concatenate([row.measured_s for row in more])
        error = ape_stats(_predicted_s(more, fit.values), unseen_s)
        note(f"{direction} one-sided: 32 ranks from 8 {say(error)}")
        kernel = Kernel(f"ep_{direction}", "one-sided", "any", _SPEC, _CONSTANTS)
        found.append(family_entry(kernel, fit, DATA, fit.n_rows, {"split": "32 ranks from 8", **error}))
    return found


def main() -> None:
    """Fit, and write a fragment for each device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("facts", type=Path, help="CSV of published figures")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the profiles")
    chosen = parser.parse_args()
    found = families(pd.read_csv(chosen.facts), print)
    for device in DEVICES:
        write_fragment(chosen.output / f"{device}.one_sided.yaml", device, found)


if __name__ == "__main__":
    main()
