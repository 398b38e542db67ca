"""Find a model by name: in the catalog, in a YAML, or in a Hugging Face ``config.json``."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moesim.errors import ModelError
from moesim.model.hf import from_hf_config
from moesim.model.params import count_parameters
from moesim.model.spec import ModelSpec, Published

__all__ = ["ModelRow", "list_models", "load_model"]

_YAML_SUFFIXES = (".yaml", ".yml")
_LARGEST_FILE_BYTES = 10_000_000
"""A configuration is a few kB; a file above it is a checkpoint given by mistake."""


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of the catalog."""

    name: str
    aliases: tuple[str, ...]
    total: int
    """Parameters."""
    active: int
    """Parameters per token."""
    n_layers: int
    n_experts: int
    """Routed experts per MoE layer; 0 for a dense model."""
    top_k: int
    """Routed experts per token; 0 for a dense model."""
    source: str
    """Where the configuration is from."""


def load_model(name_or_path: str | Path) -> ModelSpec:
    """Load a model.

    Parameters
    ----------
    name_or_path
        A catalog name or alias in any case (``deepseek-v3``, ``deepseek-ai/DeepSeek-R1``), a moesim YAML, a
        Hugging Face ``config.json``, or a directory that holds one. A catalog name wins over a file of that
        name; write ``./name`` for the file.

    Raises
    ------
    ModelError
        Nothing of that name or path, or a file that is no valid model.
    """
    text = str(name_or_path)
    stem = _index().get(text.casefold())
    if stem is not None:
        return _catalog_model(stem)
    path = Path(name_or_path)
    try:
        if path.is_dir():
            return _from_directory(path)
        if path.is_file():
            return _from_file(path)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", place=str(path)) from None
    except ValueError:
        raise ModelError("is neither a model's name nor a path", value=text) from None
    raise _unknown(text)


def list_models() -> list[ModelRow]:
    """One row per catalog model, by name."""
    return [_row(stem) for stem in sorted(_documents())]


def _row(stem: str) -> ModelRow:
    spec, count = _catalog_model(stem), count_parameters(_catalog_model(stem))
    moe = spec.moe
    return ModelRow(
        name=spec.name,
        aliases=tuple(_documents()[stem].get("aliases", ())),
        total=count.total,
        active=count.active,
        n_layers=spec.n_layers,
        n_experts=moe.n_experts if moe else 0,
        top_k=moe.top_k if moe else 0,
        source=spec.source,
    )


@cache
def _documents() -> dict[str, dict[str, Any]]:
    """Every catalog file, read once."""
    folder = files("moesim").joinpath("catalog", "models")
    return {
        entry.name.removesuffix(".yaml"): _parse_yaml(entry.read_text("utf-8"), entry.name)
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }


@cache
def _index() -> dict[str, str]:
    """Catalog file by name or alias, case folded."""
    index: dict[str, str] = {}
    for stem, document in _documents().items():
        for name in (stem, *document.get("aliases", ())):
            if index.setdefault(name.casefold(), stem) != stem:
                raise ModelError(f"stands for {index[name.casefold()]} and {stem} in the catalog", value=name)
    return index


@cache
def _catalog_model(stem: str) -> ModelSpec:
    return _from_document(_documents()[stem], stem, place=f"{stem}.yaml")


def _from_directory(path: Path) -> ModelSpec:
    config = path / "config.json"
    if not config.is_file():
        raise ModelError("the directory has no config.json", place=str(path))
    return _from_file(config)


def _from_file(path: Path) -> ModelSpec:
    place = str(path)
    if path.stat().st_size > _LARGEST_FILE_BYTES:
        raise ModelError("is too large for a configuration", place=place, fix="give config.json")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ModelError("is not a text file", place=place, fix="give config.json or a YAML") from None
    if not text.strip():
        raise ModelError("the file is empty", place=place)
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    is_yaml = path.suffix.lower() in _YAML_SUFFIXES
    document = _parse_yaml(text, place) if is_yaml else _parse_json(text, place)
    return _from_document(document, name or "model", place)


def _from_document(document: Mapping[str, Any], name: str, place: str) -> ModelSpec:
    """Read a moesim YAML, where there is a ``config`` key, or a bare Hugging Face configuration."""
    try:
        if not isinstance(document.get("config"), Mapping):
            return from_hf_config(document, name, source=place).model_copy(update={"name": name})
        named = document.get("name", name)
        spec = from_hf_config(document["config"], str(named), source=str(document.get("source", place)))
        if document.get("published") is None:
            return spec
        return spec.model_copy(update={"published": Published.model_validate(document["published"])})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("published", *map(str, first["loc"])))
        raise ModelError(f"{key}: {first['msg']}", value=first["input"], place=place) from None
    except ModelError as error:
        raise error.at(place) from None


def _parse_json(text: str, place: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{place}:{error.lineno}:{error.colno}"
        raise ModelError(f"is not valid JSON: {error.msg}", place=where) from None
    except (ValueError, RecursionError):
        raise ModelError("is not valid JSON: numbers too long or objects too deep", place=place) from None
    return _object(document, place)


def _parse_yaml(text: str, place: str) -> dict[str, Any]:
    try:
        document = YAML(typ="safe").load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{place}:{mark.line + 1}:{mark.column + 1}" if mark else place
        raise ModelError(f"is not valid YAML: {getattr(error, 'problem', error)}", place=where) from None
    except (ValueError, TypeError, RecursionError):
        raise ModelError("is not valid YAML", place=place) from None
    return _object(document, place)


def _object(document: object, place: str) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise ModelError(
            "a model file must hold an object of keys and values", value=type(document).__name__, place=place
        )
    return document


def _unknown(text: str) -> ModelError:
    if text.endswith((".json", *_YAML_SUFFIXES)) or text.startswith((".", "/", "~")):
        return ModelError("there is no such model file", value=text)
    known = _index()
    near = difflib.get_close_matches(text.casefold(), known, n=3, cutoff=0.5)
    near += difflib.get_close_matches(text.casefold().rpartition("/")[2], known, n=3, cutoff=0.5)
    names = list(dict.fromkeys(known[n] for n in near))[:3] or sorted(_documents())
    return ModelError(
        "unknown model", value=text, fix=f"use {' or '.join(names)}, or the path of a config.json"
    )
