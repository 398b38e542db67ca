"""What every fit shares: a robust fit in log space, folds by shape, error figures, profile fragments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ruamel.yaml import YAML
from scipy.optimize import least_squares

from moesim.errors import ProfileError
from moesim.hardware.profile import Profile

__all__ = ["FloatArray", "LogFit", "Prediction", "fit_log_least_squares", "grouped_folds", "write_fragment"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a profile says of measured rows."""

    time_s: FloatArray
    """[n] predicted times [s]; NaN where the profile has no parameters for the row."""
    why_not: list[str | None]
    """[n] reason where there is no time, else None."""


@dataclass(frozen=True, eq=False)
class LogFit:
    """Parameters that explain a set of times."""

    values: dict[str, float]
    """Best value by name."""
    stderr: dict[str, float]
    """Standard error by name, from the Jacobian; 0 where a bound holds the parameter."""
    cost: float
    """Robust cost at the optimum."""
    n_rows: int
    """Rows fitted."""


def fit_log_least_squares(
    predict: Callable[[Mapping[str, float]], ArrayLike],
    measured_s: ArrayLike,
    start: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]],
    *,
    weights: ArrayLike | None = None,
    prior: Mapping[str, float] | None = None,
    prior_weight: float = 4.0,
    loss_scale: float = 0.05,
    max_evaluations: int = 60,
) -> LogFit:
    """Fit positive parameters on log(predicted / measured), robust to outliers.

    Parameters
    ----------
    predict
        Parameters by name to times [s], shape of `measured_s`.
    measured_s : (n_rows,)
        Times [s].
    start, bounds
        First guess and (low, high) by name; both bounds positive, because the search runs over logarithms
        of the parameters. A parameter whose bounds are equal is held.
    weights : (n_rows,), optional
        Weight of each row's residual.
    prior, prior_weight
        Values to stay near where the rows do not say otherwise, for example another device's; a parameter that
        is off by a factor of e counts as a row that is off by e to the power of `prior_weight`.
    loss_scale
        Residual (natural log) from which the loss grows linearly (soft L1) instead of squared.
    max_evaluations
        Cap on evaluations of the Jacobian.

    Notes
    -----
    Standard errors are of the parameters, the residual variance taken from the rows' robust spread (median
    absolute deviation), rows counted as independent; neighbouring rows are not, so they are optimistic.
    """
    names = list(start)
    free = [name for name in names if bounds[name][0] < bounds[name][1]]
    measured_log = np.log(np.asarray(measured_s, dtype=float))
    weight = np.ones_like(measured_log) if weights is None else np.asarray(weights, dtype=float)

    def values_at(x: FloatArray) -> dict[str, float]:
        return {**{k: float(v) for k, v in start.items()}, **dict(zip(free, np.exp(x).tolist(), strict=True))}

    near = [(i, np.log(prior[name])) for i, name in enumerate(free) if name in prior] if prior else []

    def row_residuals(x: FloatArray) -> FloatArray:
        predicted = np.asarray(predict(values_at(x)), dtype=float)
        return np.asarray(weight * (np.log(np.maximum(predicted, 1e-12)) - measured_log))

    def residuals(x: FloatArray) -> FloatArray:
        return np.concatenate([row_residuals(x), [prior_weight * (x[i] - value) for i, value in near]])

    low = np.log([bounds[name][0] for name in free])
    high = np.log([bounds[name][1] for name in free])
    first = np.clip(np.log([start[name] for name in free]), low + 1e-9, high - 1e-9)
    found = least_squares(
        residuals, first, bounds=(low, high), loss="soft_l1", f_scale=loss_scale, x_scale=0.3,
        diff_step=1e-3, max_nfev=max_evaluations,
    )  # fmt: skip
    values = values_at(found.x)
    stderr = dict.fromkeys(names, 0.0) | _standard_errors(free, found.jac, row_residuals(found.x), values)
    return LogFit(values, stderr, float(found.cost), measured_log.size)


def _standard_errors(
    free: Sequence[str], jacobian: FloatArray, residual: FloatArray, values: Mapping[str, float]
) -> dict[str, float]:
    spread = 1.4826 * float(np.median(np.abs(residual - np.median(residual))))
    covariance = np.linalg.pinv(jacobian.T @ jacobian) * spread**2
    relative = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    return {name: float(values[name] * r) for name, r in zip(free, relative, strict=True)}


def grouped_folds(groups: ArrayLike, n_folds: int, seed: int) -> list[NDArray[np.bool_]]:
    """Held-out masks, one a fold, that never part two rows of one group.

    Parameters
    ----------
    groups : (n_rows,) or (n_rows, n_keys)
        Identity of each row's group, for example (n, k); rows with equal keys stay together.
    n_folds
        Folds wanted; fewer come back where there are fewer groups.
    seed
        Seed of the shuffle of groups.
    """
    keys = np.asarray(groups)
    _, index = np.unique(keys, axis=0, return_inverse=True)
    index = index.reshape(-1)
    n_groups = int(index.max()) + 1
    n_used = min(n_folds, n_groups)
    fold_of_group = np.random.default_rng(seed).permutation(n_groups) % n_used
    return [fold_of_group[index] == fold for fold in range(n_used)]


def write_fragment(path: Path, device: str, families: Sequence[Mapping[str, Any]]) -> None:
    """Write one part of a device's profile, checked against the schema first, whole or not at all.

    Raises
    ------
    ProfileError
        If the families are not what `moesim.hardware.profile` reads.
    """
    content = {"device": device, "families": [_rounded(dict(family)) for family in families]}
    try:
        Profile.model_validate(content)
    except ValueError as error:
        raise ProfileError(f"not a profile: {error}", place=path.name) from error
    yaml = YAML()
    yaml.width = 110
    temporary = path.with_suffix(path.suffix + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            yaml.dump(content, stream)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        rule = f"cannot be written: {error.strerror}"
        raise ProfileError(rule, place=str(path), fix="name another file") from None


def _rounded(value: Any, digits: int = 5) -> Any:
    """Plain containers with floats cut to `digits` significant digits."""
    if isinstance(value, Mapping):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{float(value):.{digits}g}")
    return value
