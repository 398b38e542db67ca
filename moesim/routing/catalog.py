"""Routing by name: generators in the catalog, and files of any known format."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moesim.errors import TraceError
from moesim.routing.synthetic import SyntheticRouting

__all__ = ["catalog_names", "catalog_routing", "default_routing"]

_FIGURES = (
    "log_sigma",
    "log_sigma_spread",
    "log_skew",
    "request_sigma",
    "request_skew",
    "token_step",
    "layer_link",
    "zipf_exponent",
    "skew",
    "seed",
)
_KEYS = ("name", "kind", "phase", "models", "parameters", "provenance", "quality", "synthetic")


def _folder() -> Path:
    return Path(str(resources.files("moesim").joinpath("catalog", "routing")))


def catalog_names() -> list[str]:
    """Names of the routing sources in the catalog, plus ``uniform`` and ``zipf``."""
    return sorted({*(file.stem for file in _folder().glob("*.yaml")), "uniform", "zipf"})


@lru_cache(maxsize=32)
def catalog_routing(name: str) -> SyntheticRouting:
    """Read one generator of the catalog.

    Parameters
    ----------
    name
        One of :func:`catalog_names`.

    Raises
    ------
    TraceError
        If there is none of that name, or its file says something else than the format.
    """
    if name == "uniform":
        return SyntheticRouting.uniform()
    if name == "zipf":
        return SyntheticRouting.zipf()
    file = _folder() / f"{name}.yaml"
    if not file.is_file():
        raise TraceError("no such routing in the catalog", value=name, fix=", ".join(catalog_names()))
    return read_routing_yaml(file)


def read_routing_yaml(file: Path) -> SyntheticRouting:
    """Read a generator from YAML: `kind`, `phase`, `parameters` with values, `provenance`."""
    try:
        data = YAML(typ="safe").load(file)
        if strange := sorted(map(str, set(data) - set(_KEYS))):
            fix = f"its keys are {', '.join(_KEYS)}"
            raise TraceError("is not a routing description", value=strange[0], fix=fix, place=str(file))
        figures: dict[str, Any] = {}
        for key, entry in data.get("parameters", {}).items():
            if key not in _FIGURES:
                fix = f"one of {', '.join(_FIGURES)}"
                raise TraceError("unknown parameter", value=key, fix=fix, place=str(file))
            figures[key] = entry["value"] if isinstance(entry, dict) else entry
        provenance = data.get("provenance", {})
        return SyntheticRouting(
            name=str(data.get("name", file.stem)),
            kind=data.get("kind", "fitted"),
            phase=str(data.get("phase", "mixed")),
            provenance=str(
                provenance.get("data", provenance) if isinstance(provenance, dict) else provenance
            ),
            **figures,
        )
    except (YAMLError, AttributeError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise TraceError("is not a routing description", value=first, place=str(file)) from None


def default_routing(model: str | None = None) -> SyntheticRouting:
    """Generator used where a scenario names no routing: the model's own if the catalog has one, else `default`.

    Parameters
    ----------
    model
        Catalog name of the model; None for the generator that stands for any.
    """
    return catalog_routing(_own_generators().get(model or "", "default"))


@lru_cache(maxsize=1)
def _own_generators() -> dict[str, str]:
    """Generator by model, for those entries that name the models they are to stand for."""
    entries = ((file.stem, YAML(typ="safe").load(file)) for file in sorted(_folder().glob("*.yaml")))
    return {str(model): name for name, entry in entries for model in entry.get("models", ())}
