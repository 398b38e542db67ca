"""Host's share of a step and of a request, fitted on measured serving of **dense** models only.

Run as ``python -m calibrate.fit.host DATA_DIR``; writes ``<device>.host.yaml`` of the catalog. No row of an MoE
model is read, so that their errors are errors of a prediction. See docs/fits/serving.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from calibrate.fit.common import FloatArray, ape_stats, write_fragment
from calibrate.validate.serving import HOST_OF, predict, read_rows
from moesim.hardware.profile import CATALOG, load_profile

DEVICES = ("h100-sxm", "h200-sxm")
DECODE_BOUND = 0.3
"""Largest predicted share of prefill in a token's time among the rows that fit the host's share of a step."""
FEW_REQUESTS = 16
"""Largest concurrency among the rows that fit what a request costs: above it requests queue."""

MEANINGS = {
    "step_s": "scheduling, sampling and launch of a step that the device waits for [s]",
    "per_sequence_s": "the same for each running sequence: token handling, output [s]",
    "request_s": "HTTP, admission and first-token return of a request [s]",
    "prompt_token_s": "tokenising and admitting one prompt token [s]",
}


def main(arguments: list[str] | None = None) -> int:
    """Fit and write the host families of the measured devices."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=CATALOG)
    options = parser.parse_args(arguments)
    table = predict(read_rows(options.data))
    dense = table[(table["skip"] == "") & ~table["is_moe"]].copy()
    # SGLang's dense rows ran in waves that queue for their prompts: what a request costs is of the other two
    steady = dense[dense.backend != "sglang"]
    families = [
        _family(str(name), part, steady if name == "sglang" else part) for name, part in dense.groupby("host")
    ]
    families.append(_asynchronous(families))
    for device in DEVICES:
        write_fragment(options.out / f"{device}.host.yaml", device, families)
    return 0


def _family(name: str, rows: pd.DataFrame, asked: pd.DataFrame) -> dict[str, Any]:
    """Fit one engine and hold out each of its models in turn."""
    bare = _without_host(rows)
    used = bare[bare.decode_s / bare.tpot_pred_s > 1 - DECODE_BOUND]
    step = _fit(_step_residual, used, (1e-4, 1e-5), (2e-2, 5e-4))
    few = _without_host(asked[asked.concurrency <= FEW_REQUESTS])
    request = _fit(_request_residual, few, (5e-2, 1e-5), (1.0, 1e-3))
    predicted = pd.Series(dtype=float)
    for model in used.model.unique():
        held, rest = used[used.model == model], used[used.model != model]
        found = _fit(_step_residual, rest, (1e-4, 1e-5), (2e-2, 5e-4)) if len(rest) else step
        predicted = pd.concat([predicted, pd.Series(_tpot_s(held, found), index=held.index)])
    stats = ape_stats(predicted.loc[used.index], used.tpot_s)
    values = dict(zip(MEANINGS, (*step, *request), strict=True))
    return {
        "op": "host",
        "implementation": name,
        "dtype": "any",
        "parameters": {key: {"value": value, "meaning": MEANINGS[key]} for key, value in values.items()},
        "provenance": {
            "kind": "fitted",
            "data": "AIConfigurator silicon database @095f58a51 (Apache-2.0): end-to-end serving of "
            f"{', '.join(sorted(m.split('/')[-1] for m in rows.model.unique()))} on H100 and H200, rows whose "
            "time is mostly decode; no MoE model",
            "n_points": len(used),
        },
        "held_out": {"split": "each model in turn (time per output token)", **stats},
    }


def _asynchronous(families: list[dict[str, Any]]) -> dict[str, Any]:
    """Engine that schedules the next step while this one runs: no dense row of vLLM 0.14 or later is known."""
    base = next(family for family in families if family["implementation"] == "vllm-sync")
    parameters = {key: dict(base["parameters"][key]) for key in MEANINGS}
    for key in ("step_s", "per_sequence_s"):
        parameters[key]["value"] = 0.0
    return {
        "op": "host",
        "implementation": "vllm",
        "dtype": "any",
        "parameters": parameters,
        "provenance": {
            "kind": "assumed",
            "data": "vLLM schedules asynchronously by default since 0.14, so that a step hides its host work; "
            "what a request costs is of the family vllm-sync",
        },
    }


def _without_host(rows: pd.DataFrame) -> pd.DataFrame:
    """Predictions with the host's present share taken off."""
    bare = rows.copy()
    for (system, host), part in rows.groupby(["system", "host"]):
        now = load_profile(str(system)).family("host", str(host)).values()
        step_s = now["step_s"] + now["per_sequence_s"] * part.batch_per_rank
        request_s = now.get("request_s", 0.0) + now.get("prompt_token_s", 0.0) * part.prompt
        bare.loc[part.index, "tpot_pred_s"] -= step_s
        bare.loc[part.index, "decode_s"] -= step_s
        bare.loc[part.index, "ttft_pred_s"] -= request_s
    return bare


def _tpot_s(rows: pd.DataFrame, x: FloatArray) -> FloatArray:
    return np.asarray(rows.tpot_pred_s + x[0] + x[1] * rows.batch_per_rank, dtype=float)


def _step_residual(x: FloatArray, rows: pd.DataFrame) -> FloatArray:
    return np.log(_tpot_s(rows, x) / rows.tpot_s.to_numpy(float))


def _request_residual(x: FloatArray, rows: pd.DataFrame) -> FloatArray:
    predicted = rows.ttft_pred_s + x[0] + x[1] * rows.prompt
    return np.log(predicted.to_numpy(float) / rows.ttft_s.to_numpy(float))


def _fit(
    residual: Callable[..., FloatArray], rows: pd.DataFrame, start: tuple[float, float], top: tuple[float, float]
) -> FloatArray:
    found = least_squares(
        residual, start, bounds=([0.0, 0.0], top), args=(rows,), loss="soft_l1", f_scale=0.1, x_scale=start
    )
    return np.asarray(np.where(found.x < 1e-9, 0.0, found.x))


if __name__ == "__main__":
    raise SystemExit(main())
