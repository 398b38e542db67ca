"""Every error that moesim raises on purpose.

::

    MoesimError
    +-- UnitError        a quantity without a unit, or with one of the wrong kind
    +-- ScenarioError    a scenario file or an override that does not say a valid scenario
    +-- ModelError       a model that is unknown, incomplete or contradictory
    +-- HardwareError    a GPU or a cluster that is unknown or impossible
    +-- LayoutError      ranks, experts or layers that do not divide
    +-- TraceError       a routing trace that is missing, damaged or of another model
    +-- ProfileError     a hardware profile without the parameters that are asked for
    +-- TrafficError     traffic or links that no network could carry
    +-- MeasurementError a measured table that is damaged, incomplete or in other units
    +-- EngineError      a program that cannot run: a cycle, an absent rank
"""

from __future__ import annotations

__all__ = [
    "EngineError",
    "HardwareError",
    "LayoutError",
    "MeasurementError",
    "ModelError",
    "MoesimError",
    "ProfileError",
    "ScenarioError",
    "TraceError",
    "TrafficError",
    "UnitError",
]


class MoesimError(Exception):
    """One input that moesim refuses, said in one line.

    Parameters
    ----------
    rule
        What was expected of the value.
    value
        The value as the user gave it; left out of the message where None.
    fix
        What to write instead.
    place
        Where it stands: ``file:line:column``, a key, or a command-line option.
    """

    def __init__(
        self, rule: str, *, value: object = None, fix: str | None = None, place: str | None = None
    ) -> None:
        self.rule = rule
        self.value = value
        self.fix = fix
        self.place = place
        super().__init__(self._line())

    def _line(self) -> str:
        place = f"{self.place}: " if self.place else ""
        value = "" if self.value is None else f"{_short(self.value)}: "
        fix = f"; fix: {self.fix}" if self.fix else ""
        return " ".join(f"{place}{value}{self.rule}{fix}".split())

    def at(self, place: str) -> MoesimError:
        """Return the same error, of the same class, at a place known only further out."""
        return type(self)(self.rule, value=self.value, fix=self.fix, place=place)


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class UnitError(MoesimError):
    """A quantity without a unit, or with one of the wrong kind."""


class ScenarioError(MoesimError):
    """A scenario file or an override that does not say a valid scenario."""


class ModelError(MoesimError):
    """A model that is unknown, incomplete or contradictory."""


class HardwareError(MoesimError):
    """A GPU or a cluster that is unknown or impossible."""


class LayoutError(MoesimError):
    """Ranks, experts or layers that do not divide."""


class TraceError(MoesimError):
    """A routing trace that is missing, damaged or of another model."""


class ProfileError(MoesimError):
    """A hardware profile without the parameters that are asked for."""


class TrafficError(MoesimError):
    """Traffic or links that no network could carry."""


class MeasurementError(MoesimError):
    """A measured table that is damaged, incomplete or in other units."""


class EngineError(MoesimError):
    """A program that cannot run: a cycle, an absent rank."""
