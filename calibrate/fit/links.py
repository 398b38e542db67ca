"""What the fits of links share: parameter tables, one solve, one entry of a profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from calibrate.fit.common import FloatArray, LogFit, fit_log_least_squares

__all__ = ["FOLDS", "NIC", "NVLINK", "RATE", "SOURCE", "Spec", "family_entry", "say", "solve"]

Spec = Mapping[str, tuple[float, float, float, str]]
"""Parameters: name -> (first guess, low, high, meaning)."""


SOURCE = "AIConfigurator silicon database @095f58a51 (Apache-2.0)"
NVLINK, NIC = 450e9, 50e9
RATE = "share of the NVLink datasheet rate"
FOLDS = 5


def solve(predict: Callable[[Mapping[str, float]], FloatArray], measured_s: FloatArray, spec: Spec) -> LogFit:
    """Fit the parameters of `spec` to times [s]."""
    start = {name: row[0] for name, row in spec.items()}
    bounds = {name: (row[1], row[2]) for name, row in spec.items()}
    return fit_log_least_squares(predict, measured_s, start, bounds, loss_scale=0.08, max_evaluations=80)


def family_entry(
    op: str, implementation: str, fit: LogFit, spec: Spec, data: str, held_out: Mapping[str, Any] | None,
    constants: Mapping[str, tuple[float, str]] | None = None, dtype: str = "any",
) -> dict[str, Any]:  # fmt: skip
    """One family of a profile: fitted parameters, and `constants` (value, meaning) that were not."""
    parameters: dict[str, Any] = {
        name: {"value": fit.values[name], "stderr": fit.stderr[name], "meaning": row[3]}
        for name, row in spec.items()
    }
    for name, (value, meaning) in (constants or {}).items():
        parameters[name] = {"value": value, "meaning": meaning}
    family: dict[str, Any] = {
        "op": op, "implementation": implementation, "dtype": dtype, "parameters": parameters,
        "provenance": {"kind": "fitted", "data": f"{SOURCE}: {data}", "n_points": fit.n_rows},
    }  # fmt: skip
    if held_out is not None:
        family["held_out"] = dict(held_out)
    return family


def say(stats: Mapping[str, Any]) -> str:
    """Median / 90th percentile of the absolute error, rows, bias."""
    return f"{stats['median_ape']:.1%} / {stats['p90_ape']:.1%} (n={stats['n']}, bias {stats['bias']:+.1%})"
