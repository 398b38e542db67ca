"""A profile against measured tables: error of every kernel, what it cannot predict, a page of plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.statistics import ape_stats
from calibrate.tables import Table, devices_of
from moesim.errors import MeasurementError
from moesim.hardware import Profile
from moesim.report import Compared, Panels, unpredicted_reasons, write_scatter_report

__all__ = ["Checked", "Predict", "Predicted", "summary", "validate_tables", "write_page"]

FloatArray = NDArray[np.float64]


class Predicted(Protocol):
    """Times of some rows, as `calibrate.fit.registry.predict_rows` returns them."""

    @property
    def time_s(self) -> FloatArray:
        """(n_rows,) times [s]; NaN where there is none."""
        ...

    @property
    def why_not(self) -> Sequence[str | None]:
        """(n_rows,) reason where there is no time."""
        ...


Predict = Callable[[pd.DataFrame, str], Predicted]
"""Rows of one kind, all of the profile's device, and that kind, to their times."""

NAMES = ("op", "implementation", "dtype")
"""What a group of rows has in common."""
SHORT = 28
"""Characters of a kernel's name in a legend."""
POINTS_PER_FIGURE = 1000
"""Rows drawn of each operation; the page would weigh tens of megabytes with all."""
NO_SHAPE = (
    *NAMES,
    "device",
    "software",
    "latency_s",
    "held_out",
    "date",
    "host",
    "repeat",
    "seed",
    "n_samples",
)
"""Columns that do not tell two points of one kernel apart."""


@dataclass(frozen=True, eq=False)
class Checked:
    """Rows of one kind beside what the profile says of them."""

    kind: str
    rows: pd.DataFrame
    """Measurements; `dtype` is ``any`` where the kind has none."""
    time_s: FloatArray
    """(n_rows,) predicted times [s]; NaN where there is none."""
    why_not: Sequence[str | None]
    """(n_rows,) reason where there is no time."""

    @property
    def known(self) -> NDArray[np.bool_]:
        """(n_rows,) rows with a prediction."""
        return np.isfinite(self.time_s)


def validate_tables(
    tables: Sequence[Table], profile: Profile, predict: Predict, *, held_out_only: bool = False
) -> list[Checked]:
    """Predict every row of some tables.

    Parameters
    ----------
    tables
        Measurements. Rows of another device than the profile's have no prediction.
    profile, predict
        Whose error it is, and what it says of rows of its device.
    held_out_only
        Take only rows that were marked as held out when they were measured.

    Raises
    ------
    MeasurementError
        If no row is of the profile's device, or none is held out where only those are asked for.
    """
    if profile.device not in devices_of(tables):
        raise MeasurementError(
            f"the profile is of {profile.device}, and every row was measured on {' or '.join(devices_of(tables))}",
            place=", ".join(str(table.path) for table in tables),
            fix="use the profile of the measured device",
        )
    found = [_check(table, profile, predict, held_out_only) for table in tables]
    if not any(len(one.rows) for one in found):
        raise MeasurementError(
            "no row is marked as held out",
            place=", ".join(str(table.path) for table in tables),
            fix="leave out --held-out",
        )
    return [one for one in found if len(one.rows)]


def _check(table: Table, profile: Profile, predict: Predict, held_out_only: bool) -> Checked:
    rows = table.frame
    if held_out_only:
        marked = rows["held_out"].fillna(0) == 1 if "held_out" in rows else np.zeros(len(rows), dtype=bool)
        rows = rows[marked]
    rows = rows.reset_index(drop=True)
    time_s = np.full(len(rows), np.nan)
    why: list[str | None] = [
        f"measured on {one}, the profile is of {profile.device}" for one in rows["device"]
    ]
    own = np.flatnonzero(rows["device"] == profile.device)
    if own.size:
        told = predict(rows.iloc[own].reset_index(drop=True), table.kind)
        time_s[own] = told.time_s
        for i, reason in zip(own, told.why_not, strict=True):
            why[i] = reason
    if "dtype" not in rows:
        rows = rows.assign(dtype="any")
    return Checked(table.kind, rows, time_s, why)


def summary(found: Sequence[Checked], profile: Profile, name: str) -> dict[str, Any]:
    """The object of ``moesim calibrate validate --json``; errors are fractions of the measured time.

    Parameters
    ----------
    found
        Rows beside their predictions.
    profile
        Whose error it is.
    name
        How the profile was asked for.
    """
    known = pd.concat([_errors(one) for one in found], ignore_index=True)
    unknown = pd.concat([_reasons(one) for one in found], ignore_index=True)
    groups = [
        dict(zip(NAMES, key, strict=True)) | _figures(part)
        for key, part in known.groupby(list(NAMES), sort=True)
    ]
    unpredicted = [
        {**dict(zip((*NAMES, "reason"), key, strict=True)), "n": len(part)}
        for key, part in unknown.groupby([*NAMES, "reason"], sort=True)
    ]
    return {
        "profile": name,
        "device": profile.device,
        "n_rows": len(known) + len(unknown),
        "n_predicted": len(known),
        "n_unpredicted": len(unknown),
        "groups": groups,
        "unpredicted": unpredicted,
    }


def _errors(one: Checked) -> pd.DataFrame:
    known = one.known
    part = one.rows.loc[known, list(NAMES)]
    return part.assign(measured=one.rows.loc[known, "latency_s"], predicted=one.time_s[known])


def _reasons(one: Checked) -> pd.DataFrame:
    part = one.rows.loc[~one.known, list(NAMES)]
    return part.assign(
        reason=[str(why) for why, known in zip(one.why_not, one.known, strict=True) if not known]
    )


def _figures(part: pd.DataFrame) -> dict[str, float]:
    stats = ape_stats(part["predicted"], part["measured"])
    absolute = (part["predicted"] / part["measured"] - 1.0).abs()
    return {
        "n": int(stats["n"]),
        "median_ape": stats["median_ape"],
        "mean_ape": float(absolute.mean()),
        "p90_ape": stats["p90_ape"],
        "bias": stats["bias"],
    }


# ---------------------------------------------------------------- page


def write_page(path: Path, found: Sequence[Checked], told: Mapping[str, Any], profile: Profile) -> Path:
    """Write predicted against measured of every operation as one HTML file.

    Parameters
    ----------
    path
        Where to.
    found, told
        Rows beside their predictions, and their `summary`.
    profile
        For where each family is from.
    """
    figures: dict[str, list[Compared]] = {}
    for op in dict.fromkeys(op for one in found for op in one.rows.loc[one.known, "op"]):
        figures[f"{op} [us]"] = _compared([one for one in found if op in one.rows["op"].to_numpy()], op)
    tables = {
        "What the profile cannot predict": _unpredicted(told),
        "How the profile was fitted": _origin(profile),
    }
    lead = (
        f"{told['n_predicted']:,} of {told['n_rows']:,} measured rows are predicted by the profile of "
        f"{profile.device} ({told['profile']}). Errors are of all of them; a plot draws at most "
        f"{POINTS_PER_FIGURE:,} rows, drawn evenly over the files."
    )
    return write_scatter_report(
        path, f"{profile.device}: predicted against measured kernels", figures, tables,
        panels=Panels(lead=lead, max_points=POINTS_PER_FIGURE, summary=_summary_rows(told)),
    )  # fmt: skip


def _compared(found: Sequence[Checked], op: str) -> list[Compared]:
    """Groups of one operation; only rows that the plot may draw have words."""
    n_all = sum(int(np.sum(one.known & (one.rows["op"] == op).to_numpy())) for one in found)
    step = max(1, -(-n_all // POINTS_PER_FIGURE))
    out = []
    for one in found:
        mine = one.rows[one.known & (one.rows["op"] == op).to_numpy()]
        names = ["implementation", "dtype", *(["kv_dtype"] if "kv_dtype" in mine else [])]
        for key, part in mine.groupby(names, sort=True):
            time_s = one.time_s[part.index]
            labels = _labels(part.iloc[::step])
            out.append(
                Compared(
                    " ".join(str(word) for word in key[:2] if word != "any") + _cache(key[2:]),
                    (part["latency_s"].to_numpy() * 1e6).tolist(),
                    (time_s * 1e6).tolist(),
                    [labels[i // step] if i % step == 0 else "" for i in range(len(part))],
                    " ".join(_shortened(str(word)) for word in key[:2] if word != "any") + _cache(key[2:]),
                )
            )
    return out


def _shortened(name: str) -> str:
    """A name that fits a legend: without the framework before its colon, and cut in the middle."""
    tail = name.rpartition(":")[2] or name
    half = (SHORT - 1) // 2
    return tail if len(tail) <= SHORT else f"{tail[: SHORT - 1 - half]}…{tail[-half:]}"


def _cache(format_: Sequence[str]) -> str:
    return f", {format_[0]} cache" if format_ else ""


def _labels(part: pd.DataFrame) -> list[str]:
    columns = [
        c for c in part if c not in NO_SHAPE and not c.startswith("latency_") and part[c].notna().any()
    ]
    return [
        ", ".join(f"{name} {value}" for name, value in zip(columns, row, strict=True))
        for row in part[columns].astype(object).itertuples(index=False)
    ]


def _summary_rows(told: Mapping[str, Any]) -> list[list[str]]:
    """Groups as the terminal shows them."""
    rows = [["op", "implementation", "format", "rows", "median", "mean", "p90", "bias"]]
    for one in told["groups"]:
        errors = [f"{one[key]:.1%}" for key in ("median_ape", "mean_ape", "p90_ape")]
        rows.append([*(one[name] for name in NAMES), f"{one['n']:,}", *errors, f"{one['bias']:+.1%}"])
    return rows if told["groups"] else []


def _unpredicted(told: Mapping[str, Any]) -> list[list[str]]:
    """One line a reason, as the terminal shows them."""
    rows = [[f"{n:,}", reason, kernels] for n, reason, kernels in unpredicted_reasons(told)]
    return [["rows", "because", "kernels"], *rows] if rows else [["every row is predicted"]]


def _origin(profile: Profile) -> list[list[str]]:
    rows = [["family", "how", "data", "rows", "held-out median", "90th percentile", "split"]]
    for one in profile.families:
        held = one.held_out
        rows.append(
            [
                f"{one.op} {one.implementation} {one.dtype}",
                one.provenance.kind,
                one.provenance.data,
                f"{one.provenance.n_points:,}",
                *([f"{held.median_ape:.1%}", f"{held.p90_ape:.1%}", held.split] if held else ["-", "-", "-"]),
            ]
        )
    return rows
