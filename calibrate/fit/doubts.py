"""Which fitted families are doubtful, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["doubts", "n_free"]

USELESS = 0.5
"""Held-out median error from which a fit is no better than a guess of the order of magnitude."""


def n_free(family: Mapping[str, Any]) -> int:
    """Parameters that the rows of a family decided on; those held have no standard error, or none above 0."""
    told = [one["stderr"] for one in family["parameters"].values() if one.get("stderr") is not None]
    return sum(1 for one in told if one > 0) or len(told)  # a fit to one row is exact: every error is 0


def doubts(family: Mapping[str, Any]) -> list[str]:
    """Why a fitted family is doubtful, in words; none where it is not, or was not fitted."""
    origin = family["provenance"]
    if origin["kind"] != "fitted":
        return []
    found = []
    held = family.get("held_out")
    if held and held["median_ape"] > USELESS:
        found.append(f"held-out median error {held['median_ape']:.0%}")
    free = n_free(family)
    if 0 < origin.get("n_points", 0) < free:
        found.append(f"{origin['n_points']} rows for {free} parameters")
    parameters = family["parameters"].values()
    vague = sum((one.get("stderr") or 0.0) > abs(one["value"]) for one in parameters)
    if 2 * vague > free:
        found.append(f"{vague} of {free} parameters have a standard error above their value")
    return found
