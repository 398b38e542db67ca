"""Which fit serves which measured table, and the two things done with all of them: fit a profile, predict rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.fit.assumed import merged
from calibrate.fit.common import FloatArray, Prediction
from calibrate.fit.doubts import doubts, n_free
from calibrate.fit.family import carried_family, known_family
from calibrate.tables import Table, devices_of
from moesim.errors import MeasurementError, ProfileError
from moesim.hardware import Gpu, Profile, load_profile

__all__ = ["FitModule", "fit_modules", "fit_tables", "predict_rows", "refitted", "rows_of"]

Note = Callable[[str], None]

MODULES = (
    "gemm", "moe_ffn", "moe_step", "attention", "collectives", "exchange", "elementwise", "router", "transfers",
    "measured_links",
)  # fmt: skip
"""Modules of `calibrate.fit` that read measured tables, in the order in which they fit: the router is priced with the
dense product. A module that has ``serves(rows) -> mask`` takes those rows of its kinds from the others."""


KERNEL = ("op", "implementation", "kind", "dtype", "kv_dtype")
"""Columns that name what a family is fitted to."""


class FitModule(Protocol):
    """What a fit of measured tables has at module level."""

    TABLES: tuple[str, ...]
    """Kinds of tables it reads."""

    def fit_table(
        self, rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note
    ) -> list[dict[str, Any]]:
        """Families of a profile, from rows of one device."""
        ...

    def predict_table(self, rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
        """Times of rows; NaN, with a reason, where the profile has none."""
        ...


def fit_modules() -> list[FitModule]:
    """Every fit of measured tables."""
    return [cast(FitModule, import_module(f"calibrate.fit.{name}")) for name in MODULES]


def rows_of(
    tables: Iterable[Table], module: FitModule, modules: Sequence[FitModule], devices: Iterable[str]
) -> pd.DataFrame:
    """Rows of some devices that one of several modules fits; a column that one kind lacks is blank in its rows."""
    wanted = set(devices)
    parts = []
    for table in tables:
        if table.kind in module.TABLES:
            part = table.frame[table.frame["device"].isin(wanted)]
            parts.append(part[_claimed(part, table.kind, module, modules)])
    parts = [part for part in parts if len(part)]
    if not parts:
        return pd.DataFrame()
    if any(list(part) != list(parts[0]) for part in parts):
        # whole numbers stay whole where a column is blank in another file
        parts = [part.astype({c: "Int64" for c in part if part[c].dtype == "int64"}) for part in parts]
    whole = pd.concat(parts, ignore_index=True)
    # a column that no row leaves blank has the type that one file alone has
    full = [c for c in whole if whole[c].dtype == "Int64" and not whole[c].isna().any()]
    return whole.astype(dict.fromkeys(full, "int64"))


def _claimed(
    rows: pd.DataFrame, kind: str, module: FitModule, modules: Sequence[FitModule]
) -> NDArray[np.bool_]:
    """[n] rows of one kind that fall to a module: those that it claims, else those that no other does."""
    if rows.empty:
        return np.zeros(0, dtype=bool)
    claims = getattr(module, "serves", None)
    if claims is not None:
        return np.asarray(claims(rows), dtype=bool)
    mine = np.ones(len(rows), dtype=bool)
    for other in modules:
        if kind in other.TABLES and hasattr(other, "serves"):
            mine &= ~np.asarray(other.serves(rows), dtype=bool)
    return mine


def fit_tables(
    tables: Sequence[Table],
    *,
    gpu: Gpu,
    base: Profile | None,
    note: Note,
    names: Iterable[str] = (),
    modules: Sequence[FitModule] | None = None,
) -> list[dict[str, Any]]:
    """Families of one device's profile, from every table that has rows of it.

    Parameters
    ----------
    tables
        Measurements, of any devices.
    gpu
        The device; rows of others are left out.
    base
        Profile to start from. What no row refits, or fewer rows than parameters, is kept, as carried over where it
        is of another device.
    note
        Takes one line of progress.
    names
        Other names of the device in the tables.
    modules
        Fits to use in place of all.

    Raises
    ------
    MeasurementError
        If no row is of the device, or none can be fitted.
    """
    devices = {gpu.name, *names}
    found = [name for name in devices_of(tables) if name in devices]
    if not found:
        raise MeasurementError(
            "no row was measured on this device",
            value=gpu.name,
            place=", ".join(str(table.path) for table in tables),
            fix=f"use --device {' or '.join(devices_of(tables))}",
        )
    for table in tables:
        others = sorted(set(table.frame["device"].astype(str)) - devices)
        if devices.isdisjoint(table.frame["device"].unique()):
            note(f"{table.path.name}: left out, it has no row of {gpu.name}")
        elif others:
            n_others = int((~table.frame["device"].isin(devices)).sum())
            note(f"{table.path.name}: {n_others:,} rows of {', '.join(others)} are left out")
    used = fit_modules() if modules is None else modules
    families: list[dict[str, Any]] = []
    fitted = False
    served: set[str] = set()
    for module in used:
        rows = rows_of(tables, module, used, devices)
        if len(rows):
            note(f"{', '.join(sorted(set(rows['op'])))}: {len(rows):,} rows")
            rows = _with_rows_to_fit(rows, note)
        if len(rows):
            found_here = module.fit_table(rows, gpu=gpu, base=_so_far(base, families, gpu), note=note)
            fitted |= bool(found_here)
            families += _trusted(found_here, base, gpu, note)
        served |= set(module.TABLES)
    for kind in dict.fromkeys(table.kind for table in tables):
        if kind not in served:
            note(f"{kind}: kept out of the profile, which has no parameters for it")
    if not fitted:
        raise MeasurementError(
            "none of these measurements can be fitted",
            place=", ".join(str(table.path) for table in tables),
            fix="docs/calibration.md says which kinds a profile has parameters for",
        )
    if not families and base is None:
        raise MeasurementError(
            "too few rows of any kernel to fit what the catalog's profile of the device knows better",
            place=", ".join(str(table.path) for table in tables),
            fix=f"measure more, or give --base {gpu.name}: few rows then move a few rates",
        )
    return merged([*_kept(base, gpu), *families])


def refitted(families: Iterable[Mapping[str, Any]], base: Profile | None, gpu: Gpu) -> list[bool]:
    """Which families `fit_tables` did not take from the base."""
    kept = _kept(base, gpu)
    return [family not in kept for family in families]


def _trusted(
    found: Sequence[dict[str, Any]], base: Profile | None, gpu: Gpu, note: Note
) -> list[dict[str, Any]]:
    """Families without those that fewer rows than parameters decided on, where the base has them; doubts are noted.

    Without a base the catalog's profile of the device is what such a family would take the place of in a plan.
    """
    better = base or _catalog_profile(gpu)

    def in_base(one: Mapping[str, Any]) -> bool:
        return known_family(better, (one["op"], one["implementation"], one["dtype"])) is not None

    out: list[dict[str, Any]] = []
    for one in found:
        name = f"{one['op']} {one['implementation']} {one['dtype']}"
        n_rows, n_needed = one["provenance"].get("n_points", 0), n_free(one)
        if (
            better is not None
            and one["provenance"]["kind"] == "fitted"
            and n_rows < n_needed
            and in_base(one)
        ):
            note(
                f"{name}: {n_rows} rows for {n_needed} parameters: those of {better.device}'s profile are kept"
            )
            continue
        out.append(one)
        if against := doubts(one):
            note(f"{name}: doubtful fit: {', '.join(against)}")
            one["provenance"]["doubts"] = "; ".join(against)
    if len(out) < len(found):  # what is assumed from a fit goes with it
        out = [one for one in out if one["provenance"]["kind"] != "assumed" or not in_base(one)]
    return out


def _catalog_profile(gpu: Gpu) -> Profile | None:
    try:
        return load_profile(gpu.name)
    except ProfileError:
        return None


def _with_rows_to_fit(rows: pd.DataFrame, note: Note) -> pd.DataFrame:
    """Leave out kernels of which every row was measured to be held out."""
    if "held_out" not in rows:
        return rows
    names = [name for name in KERNEL if name in rows]
    free = (
        (rows["held_out"].fillna(0) != 1)
        .groupby([rows[name] for name in names], dropna=False)
        .transform("any")
    )
    for key in rows.loc[~free, names].drop_duplicates().itertuples(index=False):
        note(f"{' '.join(str(word) for word in key if pd.notna(word))}: not fitted, every row is held out")
    return rows[free].reset_index(drop=True)


def _so_far(base: Profile | None, families: Sequence[Mapping[str, Any]], gpu: Gpu) -> Profile | None:
    """Base with what is fitted already in place of its own."""
    if not families:
        return base
    older = [family.model_dump(exclude_none=True) for family in base.families] if base else []
    device = base.device if base else gpu.name
    return Profile.model_validate({"device": device, "families": merged([*older, *families])})


def _kept(base: Profile | None, gpu: Gpu) -> list[Mapping[str, Any]]:
    """Families of the base: as they are where it is of the same device, else marked as carried over."""
    if base is None:
        return []
    if base.device == gpu.name:
        return [family.model_dump(exclude_none=True) for family in base.families]
    return [carried_family(family, base.device) for family in base.families]


def predict_rows(
    rows: pd.DataFrame,
    kind: str,
    *,
    gpu: Gpu,
    profile: Profile,
    modules: Sequence[FitModule] | None = None,
) -> Prediction:
    """What a profile says of rows of one kind, of the profile's device.

    Parameters
    ----------
    rows
        Measurements.
    kind
        Their kind.
    gpu, profile
        Device and its parameters.
    modules
        Fits to use in place of all.
    """
    time_s = np.full(len(rows), np.nan)
    why: list[str | None] = [f"no model of {kind} measurements"] * len(rows)
    used = fit_modules() if modules is None else modules
    for module in used:
        if kind not in module.TABLES:
            continue
        mine = np.flatnonzero(_claimed(rows, kind, module, used))
        if mine.size:
            part = rows.iloc[mine].reset_index(drop=True)
            _take(time_s, why, mine, module.predict_table(part, gpu=gpu, profile=profile))
    return Prediction(time_s, why)


def _take(time_s: FloatArray, why: list[str | None], todo: NDArray[np.intp], told: Prediction) -> None:
    for i, one, reason in zip(todo, told.time_s, told.why_not, strict=True):
        usable = bool(np.isfinite(one) and one > 0)
        time_s[i] = one if usable else np.nan
        why[i] = None if usable else (reason or "the model gives no time")
