"""Rules of the house that hold for every module, read from the source itself."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesim import errors

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in ("moesim", "calibrate") for path in (REPOSITORY / package).rglob("*.py"))
CORE = [path for path in SOURCES if path.is_relative_to(REPOSITORY / "moesim")]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
HEAVY = ("gguf", "numba", "pandas", "pyarrow", "torch", "transformers", "triton")
"""What a core install does not have."""

UNSAFE_CALLS = {
    ("eval",), ("exec",), ("os", "system"), ("pickle", "load"), ("pickle", "loads"), ("yaml", "load"),
}  # fmt: skip
"""Functions that run what they read."""
UNSAFE_ARGUMENTS = {("allow_pickle", True), ("shell", True), ("weights_only", False)}
"""Keyword arguments that make a call run what it reads."""


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of every ``from moesim... import name``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moesim":
            yield from ((str(node.module), one.name) for one in node.names)


def has_code(tree: ast.Module) -> bool:
    return any(not isinstance(node, ast.Expr) for node in tree.body)


def dotted(node: ast.expr) -> tuple[str, ...]:
    if isinstance(node, ast.Attribute):
        return (*dotted(node.value), node.attr)
    return (node.id,) if isinstance(node, ast.Name) else ("?",)


def unsafe(tree: ast.Module) -> Iterator[int]:
    """Lines of calls that would run what they read."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        arguments = {(k.arg, k.value.value) for k in node.keywords if isinstance(k.value, ast.Constant)}
        if dotted(node.func) in UNSAFE_CALLS or arguments & UNSAFE_ARGUMENTS:
            yield node.lineno


def contract(name: str) -> dict[str, Any]:
    return next(one for one in PYPROJECT["tool"]["importlinter"]["contracts"] if one["id"] == name)


@pytest.mark.parametrize("path", CORE, ids=module_name)
def test_module_says_what_is_public(path: Path) -> None:
    if not has_code(parsed(path)) or path.name == "__main__.py":
        return
    module = importlib.import_module(module_name(path))
    names = getattr(module, "__all__", None)
    assert names is not None, "no __all__"
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_layers_take_only_public_names_from_each_other(path: Path) -> None:
    package = module_name(path).split(".")[:2]
    for target, name in imported_names(parsed(path)):
        if target == "moesim" or target.split(".")[:2] == package:
            continue
        module = importlib.import_module(target)
        public = [*getattr(module, "__all__", ())]
        submodule = (REPOSITORY / target.replace(".", "/") / name).with_suffix(".py").is_file()
        assert submodule or name in public, f"{target}.{name} is not in its __all__"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_source_raises_instead_of_asserting(path: Path) -> None:
    assert [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_source_runs_nothing_that_it_reads(path: Path) -> None:
    assert list(unsafe(parsed(path))) == []


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(file)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
    ],
)
def test_unsafe_calls_are_seen(source: str) -> None:
    assert list(unsafe(ast.parse(source))) == [1]


@pytest.mark.parametrize(
    "source", ["numpy.load(path)", "json.load(file)", "model.eval()", "reader.load(text)"]
)
def test_safe_calls_are_left_alone(source: str) -> None:
    assert list(unsafe(ast.parse(source))) == []


def test_command_line_starts_without_the_extras() -> None:
    script = f"import sys, moesim.cli; print(*sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_contract_names_every_layer() -> None:
    layers = {name.strip() for line in contract("layers")["layers"] for name in line.split("|")}
    packages = {path.parent.name for path in (REPOSITORY / "moesim").glob("*/__init__.py")}
    modules = {path.stem for path in (REPOSITORY / "moesim").glob("*.py")} - {"__init__", "__main__"}
    assert layers == packages | modules


def test_catalog_holds_data_only() -> None:
    catalog = REPOSITORY / "moesim" / "catalog"
    suffixes = {path.suffix for path in catalog.rglob("*") if path.is_file()}
    assert suffixes <= {".yaml", ".json", ".safetensors", ".md"}
    assert ".yaml" in suffixes


def test_core_install_has_no_extra() -> None:
    needed = {re.split(r"[<>=\[; ]", line)[0].lower() for line in PYPROJECT["project"]["dependencies"]}
    assert needed.isdisjoint(HEAVY)


def test_every_error_is_public_and_in_the_tree() -> None:
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert set(errors.__all__) == set(kinds)
    assert all(issubclass(kind, errors.MoesimError) for kind in kinds.values())
    drawn = re.findall(r"^ *(?:\+-- )?(\w+Error)\b", errors.__doc__ or "", flags=re.MULTILINE)
    assert set(drawn) == set(kinds)


def test_an_error_is_one_line_with_place_value_rule_and_fix() -> None:
    error = errors.LayoutError("experts must divide over ranks", value=7, fix="ep=8", place="a.yaml:3:7")
    assert str(error) == "a.yaml:3:7: 7: experts must divide over ranks; fix: ep=8"
    assert str(errors.UnitError("two\nlines", value="x" * 200)).count("\n") == 0
    assert len(str(errors.UnitError("too long", value="x" * 200))) < 100


def test_an_error_keeps_its_class_at_a_new_place() -> None:
    moved = errors.TraceError("a trace has tokens", value=0, fix="record again").at("routing.trace")
    assert type(moved) is errors.TraceError
    assert str(moved) == "routing.trace: 0: a trace has tokens; fix: record again"


def test_readme_has_one_test_command_and_it_is_the_one_that_ci_runs() -> None:
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if re.fullmatch(r".*&& python -m pytest.*", line)]
    assert len(commands) == 1
    assert "pip install" in commands[0]
    assert "--cov" in commands[0]


def test_docs_index_lists_every_page() -> None:
    docs = REPOSITORY / "docs"
    listed = set(re.findall(r"\]\(([^)#]+\.md)\)", (docs / "README.md").read_text(encoding="utf-8")))
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} - {"README.md"}
    assert pages - listed == set()
    assert {page for page in listed if not (docs / page).is_file()} == set()
