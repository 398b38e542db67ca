"""Routing by name: generators and recorded traces in the catalog, and generators in files of one's own."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.error import YAMLError

from moesim.errors import TraceError
from moesim.routing.load_curves import LoadCurve
from moesim.routing.synthetic import SyntheticRouting
from moesim.routing.trace import RoutingTrace, read_trace
from moesim.routing.whole import whole_file

__all__ = ["catalog_names", "catalog_routing", "default_routing", "read_generator", "write_generator"]

_MEANINGS = {
    "log_sigma": "standard deviation of log popularity over the experts of a layer, median over layers",
    "log_sigma_spread": "standard deviation over layers of log(log_sigma)",
    "log_skew": "weight of a quadratic term in log popularity; above 0 a heavier upper tail than log-normal",
    "request_spread": "standard deviation of where a request's tokens start on the circle of experts, in turns",
    "request_stray": "share of a request's tokens that start anywhere",
    "token_keep": "share of tokens that start where their predecessor did, but for the step",
    "token_step": "scale of a token's own Laplace step, in units of top_k / n_experts",
    "layer_link": "share of requests (decode: tokens) whose choices in all layers hang together",
    "drift_share": "share of the variance of where linked requests stand that changes slowly from one to the next",
    "drift_sequences": "sequences after which that slow part has lost all but 1/e of what it was",
    "zipf_exponent": "popularity of rank r is r ** -zipf_exponent",
    "skew": "unevenness of kind skew: Gini coefficient over the largest that distinct experts allow, below 1",
    "seed": "seed of the popularity and of the tokens",
}
_WITHOUT_CURVES = ("log_sigma", "log_sigma_spread", "log_skew")
_KEYS = ("name", "kind", "phase", "models", "parameters", "curves", "provenance", "quality", "synthetic")
_CURVE_KEYS = ("order", "n_experts", "keep_index", "log_load", "index_trend", "block_peaks")


def _folder() -> Path:
    return Path(str(resources.files("moesim").joinpath("catalog", "routing")))


def catalog_names() -> list[str]:
    """Names of the routing sources in the catalog, plus ``uniform`` and ``zipf``."""
    files = (file.stem for file in _folder().iterdir() if file.suffix in (".yaml", ".safetensors"))
    return sorted({*files, "uniform", "zipf"})


@lru_cache(maxsize=32)
def catalog_routing(name: str) -> SyntheticRouting | RoutingTrace:
    """Open one entry of the catalog: a generator, or a recorded trace, mapped to its file.

    Parameters
    ----------
    name
        One of :func:`catalog_names`.

    Raises
    ------
    TraceError
        If there is none of that name, or its file says something else than the format.
    """
    recorded = _folder() / f"{name}.safetensors"
    return read_trace(recorded) if recorded.is_file() else _generator(name)


@lru_cache(maxsize=32)
def _generator(name: str) -> SyntheticRouting:
    if name == "uniform":
        return SyntheticRouting.uniform()
    if name == "zipf":
        return SyntheticRouting.zipf()
    file = _folder() / f"{name}.yaml"
    if not file.is_file():
        raise TraceError("no such routing in the catalog", value=name, fix=", ".join(catalog_names()))
    return read_generator(file)


def read_generator(file: Path) -> SyntheticRouting:
    """Read a generator from YAML, as :func:`write_generator` writes it; all keys may be left out.

    Raises
    ------
    TraceError
        If it is no such file, or a figure breaks a rule.
    """
    try:
        data = YAML(typ="safe").load(file)
        _check_keys(data, _KEYS, file)
        figures: dict[str, Any] = {}
        for key, entry in data.get("parameters", {}).items():
            if key not in _MEANINGS:
                fix = f"one of {', '.join(_MEANINGS)}"
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
            **(_curves(data["curves"], file) if "curves" in data else {}),
        )
    except (YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise TraceError("is not a routing description", value=first, place=str(file)) from None


def _check_keys(data: Any, known: tuple[str, ...], file: Path) -> None:
    if strange := sorted(map(str, set(data) - set(known))):
        fix = f"its keys are {', '.join(known)}"
        raise TraceError("is not a routing description", value=strange[0], fix=fix, place=str(file))


def _curves(data: dict[str, Any], file: Path) -> dict[str, Any]:
    """Fields of a generator that say its curves."""
    _check_keys(data, _CURVE_KEYS, file)
    rows = data["log_load"]
    trends = data.get("index_trend", [0.0] * len(rows))
    peaks = data.get("block_peaks", [()] * len(rows))
    return {
        "curves": tuple(
            LoadCurve(tuple(float(v) for v in row), float(trend), tuple(float(v) for v in blocks))
            for row, trend, blocks in zip(rows, trends, peaks, strict=True)
        ),
        "curve_order": data.get("order", "skew"),
        "curve_experts": int(data.get("n_experts", 0)),
        "keep_index": bool(data.get("keep_index", True)),
    }


def write_generator(
    generator: SyntheticRouting, path: str | Path, *, quality: dict[str, Any] | None = None
) -> Path:
    """Write a generator as YAML, whole or not at all; a scenario's `routing` takes the file.

    Parameters
    ----------
    generator
        What to write.
    path
        Target; a file there is replaced in one step.
    quality
        How well it does what it was fitted to, for people.

    Returns
    -------
    Path
        The file written.
    """
    target = Path(path)
    body: dict[str, Any] = {
        "name": generator.name, "kind": generator.kind, "phase": generator.phase, "synthetic": True,
    }  # fmt: skip
    left_out = _WITHOUT_CURVES if generator.curves else ()
    body["parameters"] = {
        key: {"value": float(getattr(generator, key)), "meaning": meaning}
        for key, meaning in _MEANINGS.items()
        if key not in (*left_out, "seed", "zipf_exponent")
    }
    if generator.kind == "zipf":
        body["parameters"]["zipf_exponent"] = generator.zipf_exponent
    body["parameters"]["seed"] = generator.seed
    if generator.curves:
        body["curves"] = {
            "order": generator.curve_order,
            "n_experts": generator.curve_experts,
            "keep_index": generator.keep_index,
            "log_load": [_row(c.log_load) for c in generator.curves],
            "index_trend": _row([c.index_trend for c in generator.curves]),
            "block_peaks": [_row(c.block_peaks) for c in generator.curves],
        }
    kind = "fitted" if generator.kind == "fitted" else "assumed"
    body["provenance"] = {"kind": kind, "data": generator.provenance}
    if quality is not None:
        body["quality"] = quality
    _write_yaml(body, target)
    return target


def _row(values: Iterable[float]) -> CommentedSeq:
    """A list that stands on one line."""
    row = CommentedSeq(float(v) for v in values)
    row.fa.set_flow_style()
    return row


def _write_yaml(body: dict[str, Any], target: Path) -> None:
    yaml = YAML()
    yaml.width = 110
    with whole_file(target) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write("# Synthetic routing: figures fitted to data, not the data.\n")
        yaml.dump(body, stream)


def default_routing(model: str | None = None) -> SyntheticRouting:
    """Generator used where a scenario names no routing: the model's own if the catalog has one, else `default`.

    Parameters
    ----------
    model
        Catalog name of the model; None for the generator that stands for any.
    """
    return _generator(_own_generators().get(model or "", "default"))


@lru_cache(maxsize=1)
def _own_generators() -> dict[str, str]:
    """Generator by model, for those entries that name the models they are to stand for."""
    texts = ((file.stem, file.read_text(encoding="utf-8")) for file in sorted(_folder().glob("*.yaml")))
    entries = ((name, YAML(typ="safe").load(text)) for name, text in texts if "\nmodels:" in text)
    return {str(model): name for name, entry in entries for model in entry["models"]}
