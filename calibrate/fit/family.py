"""What the fits of measured tables share: a kernel's parameters, its fit, its held-out error, its entry of a profile.

A fit module has ``TABLES`` (kinds of tables), ``fit_table`` and ``predict_table``; the functions here are their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.fit.common import FloatArray, LogFit, Prediction, fit_log_least_squares, grouped_folds
from calibrate.statistics import ape_stats
from moesim.errors import ProfileError
from moesim.hardware.profile import Family, Profile

__all__ = [
    "MARKED",
    "N_FOLDS",
    "PRIOR_WEIGHT",
    "WARM",
    "Kernel",
    "Key",
    "Method",
    "Note",
    "Predict",
    "Price",
    "Spec",
    "Values",
    "assumed_family",
    "carried_family",
    "cold_rows",
    "family_entry",
    "fit_family",
    "fitted_values",
    "is_blind",
    "known_family",
    "newest_software",
    "predict_by_family",
    "provenance_text",
    "say",
    "seen_rows",
    "with_cache",
]  # fmt: skip

Spec = Mapping[str, tuple[float, float, float, str]]
"""Fitted parameters: name -> (first guess, low, high, meaning); equal bounds hold one."""
Values = Mapping[str, float]
"""Parameters by name."""
Key = tuple[str, str, str]
"""(op, implementation, dtype) of a family."""
Note = Callable[[str], None]
"""Takes one line of progress."""
Predict = Callable[[pd.DataFrame, Values], FloatArray]
"""Rows and parameters to times [s]."""
Price = Callable[[pd.DataFrame, Values, Key], FloatArray]
"""The same for any family of a module; NaN where it does not apply."""

PRIOR_WEIGHT = 1.5
"""How strongly parameters stay near another profile's; see `fit_log_least_squares`."""
N_FOLDS = 5
WARM = "measured with its operands in the level-2 cache, where a step does not find them"
"""Why a row is not fitted or predicted, where a model has its operands in memory."""
MARKED = "rows measured to be held out"
"""Split of a table that says itself which rows no fit may see."""


@dataclass(frozen=True)
class Kernel:
    """One family to be: its name and its parameters."""

    op: str
    implementation: str
    dtype: str
    spec: Spec
    constants: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    """Parameters that are given: name -> (value, meaning)."""

    @property
    def key(self) -> Key:
        """Name in a profile."""
        return self.op, self.implementation, self.dtype

    @property
    def given(self) -> dict[str, float]:
        """Values of the constants."""
        return {name: value for name, (value, _) in self.constants.items()}


@dataclass(frozen=True)
class Method:
    """How rows are drawn, fitted and held out."""

    groups: tuple[str, ...]
    """Columns whose equal values are held out together."""
    max_rows: int = 4000
    """Rows of one fit, drawn at random."""
    loss_scale: float = 0.05
    max_evaluations: int = 30
    split: str = ""
    """In words; by default made of `groups`."""

    @property
    def words(self) -> str:
        """What is held out."""
        return self.split or f"{N_FOLDS}-fold by ({', '.join(self.groups)})"


def say(error: Mapping[str, Any]) -> str:
    """Median / 90th percentile of the absolute error, rows, bias."""
    return f"{error['median_ape']:.1%} / {error['p90_ape']:.1%} (n={error['n']}, bias {error['bias']:+.1%})"


def known_family(base: Profile | None, key: Key) -> Family | None:
    """A profile's family of exactly this name, or None."""
    if base is None:
        return None
    return next((one for one in base.families if (one.op, one.implementation, one.dtype) == key), None)


def fitted_values(known: Family | None) -> dict[str, float]:
    """Parameters of a family that were fitted, not assumed or given; none where there is no family."""
    parameters = known.parameters if known is not None else {}
    return {name: one.value for name, one in parameters.items() if one.stderr is not None and one.value > 0}


def seen_rows(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """[n] rows that a fit may see: all but those with ``held_out`` 1."""
    if "held_out" not in rows:
        return np.ones(len(rows), dtype=bool)
    return np.asarray(rows["held_out"].fillna(0).to_numpy(dtype=float) != 1)


def newest_software(rows: pd.DataFrame, note: Note) -> pd.DataFrame:
    """Rows of one software version: between versions a shape's time moves by up to a third.

    The version with most rows that a fit may see; of as many, the one measured last.
    """
    if rows["software"].nunique() <= 1:
        return rows
    dates = rows["date"].fillna("") if "date" in rows else pd.Series("", index=rows.index)
    told = rows.assign(seen=seen_rows(rows), date=dates.astype(str))
    order = told.groupby("software", sort=True).agg(seen=("seen", "sum"), date=("date", "max"))
    kept = order.sort_values(["seen", "date"], kind="stable").index[-1]
    left = rows["software"] != kept
    note(f"{rows['implementation'].iloc[0]}: {left.sum()} rows of other software than {kept} are not fitted")
    return rows[~left]


def with_cache(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with a column ``cache``: ``cold``, ``warm``, or empty where the table does not say."""
    return rows.assign(cache=rows["cache"].fillna("") if "cache" in rows else "")


def cold_rows(rows: pd.DataFrame, note: Note) -> pd.DataFrame:
    """Rows but those of a warm cache.

    Between two calls of a layer a step reads all other layers: its weights, and its part of the KV cache, are in
    memory again.
    """
    warm = with_cache(rows)["cache"] == "warm"
    if warm.any():
        note(
            f"{rows['op'].iloc[0]} {rows['implementation'].iloc[0]}: {int(warm.sum())} rows not fitted: {WARM}"
        )
    return rows[~warm]


def provenance_text(rows: pd.DataFrame, source: str) -> str:
    """Where rows are from, in words: `source` if given, kind, device, software and library."""

    def words(column: str) -> str:
        return ", ".join(sorted({str(value) for value in rows[column]})) if column in rows else ""

    parts = [words(column) for column in ("op", "device", "software", "implementation")]
    return f"{source}: {', '.join(parts)}" if source else ", ".join(parts)


def fit_family(
    kernel: Kernel,
    rows: pd.DataFrame,
    predict: Predict,
    method: Method,
    *,
    base: Profile | None,
    note: Note,
    source: str = "",
) -> dict[str, Any]:
    """Fit one family, hold out, and write it as a profile has it.

    Parameters
    ----------
    kernel
        Name, parameters.
    rows
        Measurements of this kernel alone, with `latency_s`; those with `held_out` 1 are only predicted.
    predict
        The cost model.
    method
        How.
    base
        Profile whose parameters are the first guess, and stay where few rows say otherwise.
    note, source
        Progress, and who measured.
    """
    known = known_family(base, kernel.key)
    prior = fitted_values(known)
    seen = seen_rows(rows)
    fit = _fit(kernel, rows[seen], predict, method, prior, seed=0)
    error: dict[str, Any] | None
    if not seen.all():
        error = _marked_error(kernel, rows[~seen], predict, fit)
        if known is not None and not is_blind(known, rows):
            error["split"] += f"; the base was fitted on {rows['device'].iloc[0]} before"
    else:
        blind = prior if known is not None and is_blind(known, rows) else {}
        error = _fold_error(kernel, rows, predict, method, blind)
    data = provenance_text(rows, source)
    if base is not None and known is not None:
        data += f"; kept near the values of {base.device}'s profile"
    note(f"{' '.join(kernel.key)}: {int(seen.sum())} rows" + (f", held out {say(error)}" if error else ""))
    return family_entry(kernel, fit, data, int(seen.sum()), error)


def family_entry(
    kernel: Kernel, fit: LogFit, data: str, n_points: int, error: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A fitted family as a profile has it."""
    parameters: dict[str, Any] = {
        name: {"value": fit.values[name], "stderr": fit.stderr[name], "meaning": row[3]}
        for name, row in kernel.spec.items()
    }
    for name, (value, meaning) in kernel.constants.items():
        parameters[name] = {"value": value, "meaning": meaning}
    entry: dict[str, Any] = {
        "op": kernel.op, "implementation": kernel.implementation, "dtype": kernel.dtype, "parameters": parameters,
        "provenance": {"kind": "fitted", "data": data, "n_points": n_points},
    }  # fmt: skip
    return entry | ({"held_out": dict(error)} if error else {})


def _fit(
    kernel: Kernel, rows: pd.DataFrame, predict: Predict, method: Method, prior: Values, seed: int
) -> LogFit:
    sample = rows.sample(min(method.max_rows, len(rows)), random_state=seed)
    given = kernel.given
    start = {name: prior.get(name, row[0]) for name, row in kernel.spec.items()}
    return fit_log_least_squares(
        lambda values: predict(sample, {**given, **values}),
        sample["latency_s"].to_numpy(dtype=float),
        start,
        {name: (row[1], row[2]) for name, row in kernel.spec.items()},
        prior=prior,
        prior_weight=PRIOR_WEIGHT,
        loss_scale=method.loss_scale,
        max_evaluations=method.max_evaluations,
    )


def is_blind(known: Family, rows: pd.DataFrame) -> bool:
    """Whether a family was made without this device's rows, so that folds may stay near it and still be blind."""
    return not any(str(device) in known.provenance.data for device in rows["device"].unique())


def _marked_error(kernel: Kernel, rows: pd.DataFrame, predict: Predict, fit: LogFit) -> dict[str, Any]:
    """Error on rows that were measured to be held out."""
    predicted = predict(rows, {**kernel.given, **fit.values})
    return {"split": MARKED, **ape_stats(predicted, rows["latency_s"].to_numpy(dtype=float))}


def _fold_error(
    kernel: Kernel, rows: pd.DataFrame, predict: Predict, method: Method, prior: Values
) -> dict[str, Any] | None:
    """Error on folds of whole groups, each predicted by a fit of the others; None where there is one group."""
    keys = rows[list(method.groups)].to_numpy(dtype=float)
    if len(np.unique(keys, axis=0)) < 2:
        return None
    predicted = np.zeros(len(rows))
    for seed, mask in enumerate(grouped_folds(keys, N_FOLDS, seed=0)):
        values = _fit(kernel, rows[~mask], predict, method, prior, seed).values
        predicted[mask] = predict(rows[mask], {**kernel.given, **values})
    return {"split": method.words, **ape_stats(predicted, rows["latency_s"].to_numpy(dtype=float))}


def assumed_family(
    op: str, implementation: str, dtype: str, data: str, values: Mapping[str, tuple[float, str]]
) -> dict[str, Any]:
    """A family that nobody measured: name -> (value, meaning)."""
    parameters = {name: {"value": value, "meaning": meaning} for name, (value, meaning) in values.items()}
    return {
        "op": op, "implementation": implementation, "dtype": dtype, "parameters": parameters,
        "provenance": {"kind": "assumed", "data": data},
    }  # fmt: skip


def carried_family(family: Family, device: str) -> dict[str, Any]:
    """A family of another device's profile, for a device where it was not measured: the same shares of its peaks.

    Parameters
    ----------
    family
        Of `device`'s profile.
    device
        Where it was fitted.
    """
    content: dict[str, Any] = family.model_dump(exclude_none=True)
    if family.provenance.kind in ("assumed", "carried-over"):
        return content
    content.pop("held_out", None)
    content["provenance"] = {
        "kind": "carried-over",
        "data": f"shares of peak fitted on {device}: {family.provenance.data}",
        "n_points": family.provenance.n_points,
    }
    return content


def predict_by_family(
    rows: pd.DataFrame,
    columns: Sequence[str],
    locate: Callable[[tuple[Any, ...]], Key | str],
    profile: Profile,
    price: Price,
) -> Prediction:
    """Times of rows, family by family.

    Parameters
    ----------
    rows, columns
        Measurements, and the columns that name their family.
    locate
        Values of `columns` to the family's name, or to the reason why there is none.
    profile, price
        Parameters, and the module's model.
    """
    time_s = np.full(len(rows), np.nan)
    why: list[str | None] = [None] * len(rows)

    def refuse(places: Iterable[int], reason: str) -> None:
        for place in places:
            why[place] = reason

    groups = rows.reset_index(drop=True).groupby(list(columns), sort=False, dropna=False)
    for values, part in groups:
        key = locate(values if isinstance(values, tuple) else (values,))
        if isinstance(key, str):
            refuse(part.index, key)
            continue
        family = known_family(profile, key) or known_family(profile, (key[0], key[1], "any"))
        if family is None:
            refuse(part.index, f"the profile has no family {' '.join(key)}")
            continue
        try:
            time_s[part.index] = price(part, family.values(), key)
        except (KeyError, ProfileError) as missing:
            name = missing.value if isinstance(missing, ProfileError) else missing.args[0]
            refuse(part.index, f"the profile's family {' '.join(key)} has no {name}: fit it again")
    left = [int(i) for i in np.flatnonzero(np.isnan(time_s)) if why[i] is None]
    refuse(left, "outside what the model covers")
    return Prediction(time_s, why)
