"""Scenario files: read, overridden, checked; every error with its place, value, rule and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moesim.errors import MoesimError, ScenarioError
from moesim.scenario.choices import Choices
from moesim.scenario.overrides import apply_overrides
from moesim.scenario.schema import Scenario
from moesim.scenario.source import Key, Source, parse_text, read_source

__all__ = [
    "DEFAULT_SCENARIO",
    "ScenarioFile",
    "load_scenario",
    "load_variants",
    "parse_scenario",
    "read_scenario",
]

DEFAULT_SCENARIO = Path(__file__).resolve().parents[1] / "catalog" / "scenarios" / "default.yaml"
"""What `moesim plan` answers when it is given no scenario."""

_EXAMPLES = {
    "model": "model: mixtral-8x7b",
    "cluster": "cluster: {gpu: h200-sxm, nodes: 1}",
    "workload": "workload: {kind: decode, batch_per_rank: 64, context: 4096}",
    "kind": "kind: decode, prefill, serve or train",
}
_KEYS = {
    "HardwareError": "cluster",
    "LayoutError": "layout",
    "ModelError": "model",
    "ProfileError": "dtype",
    "TraceError": "routing.trace",
}
"""Key of a scenario that each kind of error is about."""
_FILES = {".safetensors", ".json", ".jsonl", ".npz", ".npy", ".pt", ".yaml", ".yml", ".csv"}


@dataclass(frozen=True)
class ScenarioFile:
    """A scenario and the text it is from, for errors that show themselves only later."""

    scenario: Scenario
    """What is asked."""
    source: Source
    """Where it is asked."""

    def place(self, key: str) -> str:
        """Where a dotted key such as ``layout.ep`` stands; the nearest parent where it is left out."""
        return self.source.place(key.split("."))

    def located(self, error: MoesimError, key: str) -> MoesimError:
        """Give an error the place of a key, unless it has one."""
        return error if error.place else error.at(self.place(key))

    def placed(self, error: MoesimError) -> MoesimError:
        """Give an error without a place, or with only a key for one, the place of the key that it is about."""
        key = _KEYS.get(type(error).__name__)
        if error.place is not None and error.place in (key, "policy.dispatch"):
            return error.at(self.place(error.place))
        return self.located(error, key) if key else error

    def single(self) -> Scenario:
        """The scenario, if a run can take it.

        Raises
        ------
        ScenarioError
            At the first key that has several values.
        """
        try:
            return self.scenario.single()
        except ScenarioError as error:
            raise self.located(error, self.scenario.open_keys()[0]) from None


def read_scenario(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """Read a scenario from a YAML file.

    Parameters
    ----------
    path
        File.
    overrides
        ``key.path=value`` each; they replace or add to what the file says.

    Raises
    ------
    ScenarioError
        With place, value, rule and fix of the first thing wrong.
    """
    return load_scenario(path, overrides).scenario


def load_scenario(path: str | Path, overrides: Sequence[str] = ()) -> ScenarioFile:
    """Read a scenario as `read_scenario` does, and keep the places of its keys."""
    return _load(read_source(Path(path)), overrides, Path(path).parent)


def load_variants(
    path: str | Path, variants: Iterable[Sequence[str]]
) -> Iterator[ScenarioFile | ScenarioError]:
    """Read a scenario once and override it in many ways; a way that makes no scenario gives its error.

    Parameters
    ----------
    path
        File.
    variants
        Overrides of each way, as `read_scenario` takes them.

    Raises
    ------
    ScenarioError
        If the file is no YAML mapping.
    """
    source = read_source(Path(path))
    for overrides in variants:
        own = Source(source.name, deepcopy(source.data), source.root)
        try:
            yield _load(own, overrides, Path(path).parent)
        except ScenarioError as error:
            yield error


def parse_scenario(text: str, overrides: Sequence[str] = (), *, name: str = "scenario") -> ScenarioFile:
    """Read a scenario from text; `name` stands in the places of errors."""
    return _load(parse_text(text, name), overrides, Path())


def _load(source: Source, overrides: Sequence[str], folder: Path) -> ScenarioFile:
    apply_overrides(source, overrides)
    try:
        scenario = Scenario.model_validate(source.data)
    except ValidationError as error:
        raise _first(error, source) from error
    except RecursionError as error:
        raise ScenarioError("is nested too deep", place=source.name) from error
    return ScenarioFile(_with_files(scenario, source, folder), source)


def _with_files(scenario: Scenario, source: Source, folder: Path) -> Scenario:
    """Replace file names by paths that exist, seen from the scenario's folder first."""
    model = _file(scenario.model, source, ("model",), folder)
    scenario = scenario.model_copy(update={"model": model})
    if scenario.profile is not None:
        profile = _file(scenario.profile, source, ("profile",), folder)
        scenario = scenario.model_copy(update={"profile": profile})
    if scenario.layout.placement is not None:
        where = ("layout", "placement")
        placements = Choices(
            tuple(
                _file(name, source, where, folder) if Path(name).suffix else name
                for name in scenario.layout.placement
            )
        )
        layout = scenario.layout.model_copy(update={"placement": placements})
        scenario = scenario.model_copy(update={"layout": layout})
    if scenario.layout.placement_trace is not None:
        name = _file(scenario.layout.placement_trace, source, ("layout", "placement_trace"), folder)
        layout = scenario.layout.model_copy(update={"placement_trace": name})
        scenario = scenario.model_copy(update={"layout": layout})
    if scenario.routing.trace is None:
        return scenario
    trace = _file(scenario.routing.trace, source, ("routing", "trace"), folder)
    routing = scenario.routing.model_copy(update={"trace": trace})
    return scenario.model_copy(update={"routing": routing})


def _file(name: str, source: Source, path: tuple[str, ...], folder: Path) -> str:
    """Find a file that a key names; names of the catalog pass as they are."""
    if "\0" in name:
        raise ScenarioError("is not a file name", value=name, place=source.place(path))
    beside = folder / name
    for candidate in (Path(name),) if path in source.overridden else (beside, Path(name)):
        if _exists(candidate):
            return str(candidate)
    if Path(name).suffix.lower() not in _FILES:
        return name
    what = path[0] if path == ("model",) else path[-1]
    listed = "" if what == "placement" else ", or a name from moesim list"
    raise ScenarioError(
        f"there is no such {what} file",
        value=name,
        place=source.place(path),
        fix=f"give a path from {folder.resolve()} or from here{listed}",
    )


def _exists(path: Path) -> bool:
    try:
        # A folder that happens to be called as a catalog entry is not meant, unless it is a model's.
        return path.is_file() or (path / "config.json").is_file()
    except OSError:
        return False


def _first(error: ValidationError, source: Source) -> ScenarioError:
    """Turn pydantic's list into one error; a misspelt key goes before the key that it leaves missing."""
    details = error.errors(include_url=False)
    found = [_told(detail, source) for detail in details]
    order = sorted(range(len(found)), key=lambda i: (details[i]["type"] != "extra_forbidden", i))
    first = found[order[0]]
    if len(found) == 1:
        return first
    more = f" (and {len(found) - 1} more)"
    rule, fix = (first.rule, first.fix + more) if first.fix else (first.rule + more, None)
    return ScenarioError(rule, value=first.value, fix=fix, place=first.place)


def _told(detail: ErrorDetails, source: Source) -> ScenarioError:
    """Say one of pydantic's errors in the scenario's own words."""
    path = _path(detail["loc"], source.data)
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return _unknown_key(path, source)
        case "missing":
            name = str(path[-1])
            fix = "add " + _EXAMPLES.get(name, f"{name}: ...")
            return ScenarioError(f"{'.'.join(map(str, path))} is missing", fix=fix, place=source.place(path))
        case "union_tag_not_found":
            fix = "add " + _EXAMPLES["kind"]
            return ScenarioError("workload.kind is missing", fix=fix, place=source.place((*path, "kind")))
        case "union_tag_invalid":
            known = [word.strip("' ") for word in context["expected_tags"].split(",")]
            return _unknown_word(context["tag"], known, source.place((*path, "kind")))
        case "literal_error":
            known = [word.strip("' ") for word in context["expected"].replace(" or ", ",").split(",")]
            return _unknown_word(value, known, source.place(path))
        case "model_type" | "model_attributes_type" | "dict_type":
            fix = "write " + _EXAMPLES.get(str(path[-1]) if path else "", "key: value pairs")
            rule = "is not a mapping of keys to values"
        case "unit" | "scenario":
            value = context.get("unit_value", context.get("bad_value"))
            rule, fix = context["rule"], context["fix"]
        case _ if value is None:
            key = str(path[-1]) if path else ""
            rule, fix = "nothing is given", "write " + _EXAMPLES.get(key, f"{key}: ... or leave it out")
        case _:
            rule, fix = detail["msg"].replace("Input should", "should"), ""
    return ScenarioError(rule, value=value, fix=fix or None, place=source.place(path))


def _path(loc: Sequence[Key], data: Any) -> tuple[Key, ...]:
    """Keys of a pydantic location without the tags of unions, which the file does not have."""
    if len(loc) > 1 and loc[0] == "workload":
        return (loc[0], *loc[2:])
    return tuple(loc)


def _unknown_key(path: tuple[Key, ...], source: Source) -> ScenarioError:
    known = _known_keys(path[:-1], source.data)
    where = f" in {'.'.join(map(str, path[:-1]))}" if len(path) > 1 else ""
    near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}? known: " if near else "known: "
    return ScenarioError(
        f"unknown key{where}",
        value=path[-1],
        fix=fix + ", ".join(known),
        place=source.place(path, of_key=True),
    )


def _known_keys(path: tuple[Key, ...], data: Mapping[Any, Any]) -> list[str]:
    model: type[BaseModel] = Scenario
    for step in path:
        parts = _models(model.model_fields[str(step)].annotation)
        data = data.get(step, {})
        kinds = {get_args(part.model_fields["kind"].annotation)[0]: part for part in parts if len(parts) > 1}
        model = kinds.get(data.get("kind"), parts[0]) if kinds else parts[0]
    return list(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _unknown_word(word: object, known: list[str], place: str) -> ScenarioError:
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.4)
    fix = f"did you mean {near[0]}? known: " if near else "use one of "
    return ScenarioError("is unknown", value=word, fix=fix + ", ".join(known), place=place)
