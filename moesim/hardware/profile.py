"""Fitted parameters of one device, with where each is from and how wrong it was on what it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeFloat,
    NonNegativeInt,
    ValidationError,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moesim.errors import HardwareError, ProfileError
from moesim.hardware.catalog import load_gpu

__all__ = [
    "Family", "HeldOut", "Parameter", "Profile", "Provenance", "load_profile", "open_profile", "profile_for",
    "read_profile",
]  # fmt: skip

CATALOG = Path(__file__).resolve().parents[1] / "catalog" / "profiles"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Parameter(_Frozen):
    """One number of a cost model."""

    value: FiniteFloat = Field(ge=0)
    """SI units; rates are fractions of the datasheet's peak."""
    stderr: NonNegativeFloat | None = None
    """Standard error of the fit, in the value's unit."""
    meaning: str = ""
    """What it stands for, in words."""


class Provenance(_Frozen):
    """Where a family's parameters come from."""

    kind: Literal["measured", "fitted", "datasheet", "assumed", "carried-over"]
    """How the numbers were had."""
    data: str
    """Data set, publication or datasheet."""
    n_points: NonNegativeInt = 0
    """Measurements in the fit."""
    doubts: str | None = None
    """Why a fit says little, in words; None where nothing speaks against it."""


class HeldOut(_Frozen):
    """Error on shapes that the fit did not see, as fractions of the measured time."""

    split: str
    """How shapes were held out."""
    n: NonNegativeInt
    """Rows predicted."""
    median_ape: NonNegativeFloat
    """Median absolute error."""
    p90_ape: NonNegativeFloat
    """90th percentile of the absolute error."""
    bias: float = 0.0
    """Median signed error, predicted over measured minus 1."""


class Family(_Frozen):
    """The parameters of one kernel or collective family."""

    op: str
    """Operator, named as in the measured tables."""
    implementation: str
    """Library and kernel."""
    dtype: str
    """Weight or payload format, or ``any``."""
    parameters: dict[str, Parameter]
    """By name."""
    provenance: Provenance
    """Where they come from."""
    held_out: HeldOut | None = None
    """Error on unseen shapes; None where nothing was measured."""

    def values(self) -> dict[str, float]:
        """Parameter values alone, for the constructor of a cost model; asking for one that is not there is an error.

        Raises
        ------
        ProfileError
            By the result, where a parameter is asked for that the family lacks.
        """
        known = {name: parameter.value for name, parameter in self.parameters.items()}
        return _Parameters(known, family=f"{self.op} {self.implementation} {self.dtype}")


class _Parameters(dict[str, float]):
    """Values by name that say which family lacks what."""

    def __init__(self, known: Mapping[str, float], *, family: str) -> None:
        super().__init__(known)
        self._family = family

    def __missing__(self, name: str) -> float:
        rule = "is no parameter of this family, and a cost model needs it"
        fix = "fit the profile again: it is of another version"
        raise ProfileError(rule, value=name, place=self._family, fix=fix)


class Profile(_Frozen):
    """All families known for one device."""

    device: str
    """GPU that the numbers were measured on."""
    families: tuple[Family, ...] = Field(min_length=1)
    """One entry per (op, implementation, dtype)."""
    carried_from: str | None = None
    """Device whose efficiencies stand in for missing measurements."""

    def family(self, op: str, implementation: str, dtype: str = "any") -> Family:
        """Parameters of one family; a family for dtype ``any`` serves every dtype.

        Raises
        ------
        ProfileError
            If the profile has none.
        """
        for wanted in (dtype, "any"):
            found = self._index.get((op, implementation, wanted))
            if found is not None:
                return found
        known = sorted({f"{f.implementation}/{f.dtype}" for f in self.families if f.op == op})
        ops = ", ".join(sorted({f.op for f in self.families}))
        raise ProfileError(
            f"profile {self.device} has no parameters for {op} by {implementation} in {dtype}",
            fix=f"use one of {', '.join(known)}" if known else f"moesim calibrate fit; it knows {ops}",
        )

    def has(self, op: str, implementation: str, dtype: str = "any") -> bool:
        """Tell whether `family` finds one."""
        return any((op, implementation, wanted) in self._index for wanted in (dtype, "any"))

    def over(self, base: Profile) -> Profile:
        """The same with the families of `base` that it lacks.

        A family carried over or assumed gives way to one of `base` that was measured on this GPU.
        """
        measured = set() if base.carried_from else {_key(f) for f in base.families if _is_measured(f)}
        own = tuple(f for f in self.families if _is_measured(f) or _key(f) not in measured)
        taken = {_key(f) for f in own}
        lacking = tuple(f for f in base.families if _key(f) not in taken)
        carried = any(f.provenance.kind == "carried-over" for f in own)
        return Profile(
            device=self.device,
            families=own + lacking,
            carried_from=(base.carried_from if lacking else None)
            or ("its base profile" if carried else None),
        )

    @property
    def _index(self) -> dict[tuple[str, str, str], Family]:
        return _index_of(self)


def _key(family: Family) -> tuple[str, str, str]:
    return family.op, family.implementation, family.dtype


def _is_measured(family: Family) -> bool:
    return family.provenance.kind in ("fitted", "measured")


_INDEXES: dict[int, tuple[Profile, dict[tuple[str, str, str], Family]]] = {}


def _index_of(profile: Profile) -> dict[tuple[str, str, str], Family]:
    known = _INDEXES.get(id(profile))
    if known is None or known[0] is not profile:
        known = (profile, {_key(f): f for f in profile.families})
        _INDEXES[id(profile)] = known
    return known[1]


@cache
def load_profile(device: str, folder: Path = CATALOG) -> Profile:
    """Read every ``<device>.*.yaml`` of `folder` as one profile.

    Raises
    ------
    ProfileError
        If there is none, or one of them is not a profile of `device`.
    """
    paths = _parts(device, folder)
    if not paths:
        known = sorted({path.name.split(".")[0] for path in folder.glob("*.yaml")})
        raise ProfileError("no profile for this device", value=device, fix=f"use one of {', '.join(known)}")
    families: list[Family] = []
    for path in paths:
        part = _read(path, path.name)
        if part.device != device:
            raise ProfileError(f"is a profile of {part.device}, not of {device}", place=path.name)
        families += part.families
    return Profile(device=device, families=tuple(families))


def _parts(device: str, folder: Path) -> list[Path]:
    """Files of one device's profile."""
    return sorted(path for path in folder.glob("*.yaml") if path.name.split(".")[0] == device)


def read_profile(path: Path | str) -> Profile:
    """Read one profile file, whatever it is called.

    Raises
    ------
    ProfileError
        If it cannot be read, or is no profile.
    """
    return _read(Path(path), str(path))


def open_profile(name: str) -> Profile:
    """Profile of the catalog by its device or an alias of it, or of the YAML file that `name` is the path of.

    Raises
    ------
    ProfileError
        If there is none.
    """
    if name.endswith((".yaml", ".yml")):
        return read_profile(name)
    try:
        device = load_gpu(name).name
    except HardwareError:
        device = name
    try:
        return load_profile(device)
    except ProfileError as error:
        if _parts(device, CATALOG):
            raise
        raise ProfileError(error.rule, value=name, fix=f"{error.fix}, or the path of a .yaml file") from None


def _read(path: Path, place: str) -> Profile:
    try:
        content: Any = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            what = "is empty" if content is None else "holds no mapping"
            raise ProfileError(
                f"{what}: it is no profile of a GPU", place=place, fix="use what moesim calibrate fit wrote"
            )
        if "families" not in content:
            what = "is a scenario" if {"model", "workload"} & set(content) else "has no families"
            raise ProfileError(
                f"{what}: it is no profile of a GPU", place=place, fix="use what moesim calibrate fit wrote"
            )
        return Profile.model_validate(content)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ProfileError(f"cannot be read: {reason}", place=place) from error
    except (YAMLError, RecursionError) as error:
        raise ProfileError(f"is not YAML: {error}", place=place) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProfileError(f"{where}: {first['msg']}" if where else first["msg"], place=place) from error


RELATIVE = "h200-sxm"
"""Measured device whose efficiencies stand in for a GPU never measured, the H800 too: the H100's profile holds the
congestion of the one cluster that it was measured on (docs/fits/collectives.md)."""


@cache
def profile_for(gpu: str, folder: Path = CATALOG) -> Profile:
    """Profile of a GPU: its own, or a measured relative's efficiencies, marked as carried over.

    Raises
    ------
    ProfileError
        If the relative's profile is damaged.
    """
    if _parts(gpu, folder):
        return load_profile(gpu, folder)
    relative = load_profile(RELATIVE, folder)
    return relative.model_copy(update={"device": gpu, "carried_from": relative.device})
