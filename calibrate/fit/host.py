"""Host's share of a step and of a request, fitted on measured serving of **dense** models only.

Run as ``python -m calibrate.fit.host DATA_DIR -o moesim/catalog/profiles``; writes ``<device>.host.yaml``.
No row of an MoE model is read, so that their errors are errors of a prediction. See docs/fits/serving.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import least_squares

from calibrate.fit.common import FloatArray, write_fragment
from calibrate.statistics import ape_stats
from calibrate.validate.serving import predict, read_rows
from moesim.hardware.profile import load_profile

DEVICES = ("h100-sxm", "h200-sxm")
DECODE_BOUND = 0.3
"""Largest predicted share of prefill in a token's time among the rows that fit the host's share of a step."""
FEW_REQUESTS = 16
"""Largest concurrency among the rows that fit what a request costs: above it requests queue."""

KERNEL_SPREAD = 0.1
"""Standard deviation of the common factor by which one deployment's kernels may be mispriced (natural log): the
held-out errors of the kernel families. Fitted beside the host's share and thrown away."""
ROW_SPREAD = 0.05
"""Standard deviation of one row about its deployment (natural log)."""

MEANINGS = {
    "step_s": "scheduling, sampling and launch of a step that the device waits for [s]",
    "per_sequence_s": "the same for each running sequence: token handling, output [s]",
    "request_s": "HTTP, tokenising, admission and return of the first token of a request [s]",
}


def main(arguments: list[str] | None = None) -> int:
    """Fit and write the host families of the measured devices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of profiles to write")
    options = parser.parse_args(arguments)
    table = predict(read_rows(options.data))
    dense = table[(table["skip"] == "") & ~table["is_moe"]].copy()
    # What a request costs before its first step is the client's and the server's, not the engine's: one figure for
    # all engines. SGLang's dense rows ran in waves that queue for their prompts, so they are left out of it.
    request = _fit_request(
        _without_host(dense[(dense.backend != "sglang") & (dense.concurrency <= FEW_REQUESTS)])
    )
    families = [_family(str(name), part, request) for name, part in dense.groupby("host")]
    for device in DEVICES:
        write_fragment(options.out / f"{device}.host.yaml", device, families)
    return 0


def _family(name: str, rows: pd.DataFrame, asked: tuple[float, float]) -> dict[str, Any]:
    """Fit one engine and hold out each of its models in turn."""
    bare = _without_host(rows)
    used = bare[bare.decode_s / bare.tpot_pred_s > 1 - DECODE_BOUND]
    step, step_error = _fit_step(used)
    stats = ape_stats(_held_out(used), used.tpot_s)
    request, request_error = asked
    values = zip(MEANINGS, (*step, request), (*step_error, request_error), strict=True)
    return {
        "op": "host",
        "implementation": name,
        "dtype": "any",
        "parameters": {
            key: {"value": value, "stderr": error, "meaning": MEANINGS[key]} for key, value, error in values
        },
        "provenance": {
            "kind": "fitted",
            "data": "AIConfigurator silicon database @095f58a51 (Apache-2.0): end-to-end serving of "
            f"{', '.join(sorted(m.split('/')[-1] for m in rows.model.unique()))} on H100 and H200, rows whose "
            "time is mostly decode; no MoE model. request_s: time to first token of vLLM's and TensorRT-LLM's "
            f"dense rows with {FEW_REQUESTS} requests or fewer, waiting for one another's prompts included",
            "n_points": len(used),
        },
        "held_out": {
            "split": "time per output token; each model in turn, or each deployment where there is one model",
            **stats,
        },
    }


def _groups(rows: pd.DataFrame) -> pd.Series[str]:
    """Models, or deployments where all rows are of one model."""
    return rows["model"] if rows["model"].nunique() > 1 else rows["deployment"].map(str)


def _held_out(rows: pd.DataFrame) -> FloatArray:
    """Time per output token of each group's rows, fitted on the other groups' [s]."""
    predicted = pd.Series(np.nan, index=rows.index)
    groups = _groups(rows)
    for group in groups.unique():
        held, rest = rows[groups == group], rows[groups != group]
        found, _ = _fit_step(rest)
        predicted.loc[held.index] = _tpot_s(held, found)
    return np.asarray(predicted.to_numpy(float))


def _without_host(rows: pd.DataFrame) -> pd.DataFrame:
    """Predictions with the host's present share taken off."""
    bare = rows.copy()
    for (system, host), part in rows.groupby(["system", "host"]):
        now = load_profile(str(system)).family("host", str(host)).values()
        step_s = now["step_s"] + now["per_sequence_s"] * part.batch_per_rank
        request_s = now.get("request_s", 0.0)
        bare.loc[part.index, "tpot_pred_s"] -= step_s
        bare.loc[part.index, "decode_s"] -= step_s
        bare.loc[part.index, "ttft_pred_s"] -= request_s
    return bare


def _tpot_s(rows: pd.DataFrame, x: FloatArray) -> FloatArray:
    return np.asarray(rows.tpot_pred_s + x[0] + x[1] * rows.batch_per_rank, dtype=float)


def _fit_step(rows: pd.DataFrame) -> tuple[FloatArray, FloatArray]:
    """Host's share of a step, with its standard error; a term within two errors of nothing is left out.

    The less certain of two uncertain terms goes first, and the other is fitted again without it.
    """
    kept = np.array([True, True])
    while True:
        value, error = _fit_terms(rows, kept)
        doubt = np.where(kept, 2 * error / np.maximum(value, 1e-12), 0.0)
        if doubt.max() <= 1:
            return value, error
        kept[int(doubt.argmax())] = False


def _fit_terms(rows: pd.DataFrame, kept: NDArray[np.bool_]) -> tuple[FloatArray, FloatArray]:
    """Fit the terms kept of (`step_s`, `per_sequence_s`), and a factor for each deployment's kernels."""
    deployments, of = np.unique([str(found) for found in rows["deployment"]], return_inverse=True)
    bare, measured = rows.tpot_pred_s.to_numpy(float), rows.tpot_s.to_numpy(float)
    per_unit = np.stack([np.full(len(rows), 1e-3), 1e-6 * rows.batch_per_rank.to_numpy(float)], axis=1)[
        :, kept
    ]
    n_terms = int(kept.sum())

    def residual(x: FloatArray) -> FloatArray:
        predicted = bare * np.exp(x[n_terms:][of]) + per_unit @ x[:n_terms]
        return np.concatenate([np.log(predicted / measured) / ROW_SPREAD, x[n_terms:] / KERNEL_SPREAD])

    low = np.concatenate([np.zeros(n_terms), np.full(len(deployments), -np.inf)])
    found = least_squares(
        residual,
        np.concatenate([np.ones(n_terms), np.zeros(len(deployments))]),
        bounds=(low, np.inf),
        loss="soft_l1",
    )
    error = np.sqrt(np.diag(np.linalg.pinv(found.jac.T @ found.jac)))
    both = np.zeros((2, 2))
    both[:, kept] = np.stack([found.x[:n_terms], error[:n_terms]])
    return both[0] * [1e-3, 1e-6], both[1] * [1e-3, 1e-6]


def _fit_request(rows: pd.DataFrame) -> tuple[float, float]:
    """What a request costs before its first step, with its standard error [s]."""

    def residual(x: FloatArray) -> FloatArray:
        predicted = rows.ttft_pred_s.to_numpy(float) + x[0]
        return np.asarray(np.log(predicted / rows.ttft_s.to_numpy(float)))

    found = least_squares(
        residual, [5e-2], bounds=([0.0], [1.0]), loss="soft_l1", f_scale=0.1, x_scale=[5e-2]
    )
    return float(found.x[0]), float(_stderr(found, rows)[0])


def _stderr(found: Any, rows: pd.DataFrame) -> FloatArray:
    """Standard errors, rows of one deployment counted as one: they share what the kernels' prices get wrong."""
    spread = 1.4826 * float(np.median(np.abs(found.fun)))
    n_alike = len(rows) / rows["deployment"].nunique()
    return np.asarray(np.sqrt(np.diag(np.linalg.pinv(found.jac.T @ found.jac)) * n_alike) * spread)


if __name__ == "__main__":
    raise SystemExit(main())
