"""Routing of known models in figures, and where a trace stands among them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
from ruamel.yaml import YAML

__all__ = ["COMPARED", "compared_with_known", "known_models"]

COMPARED = (
    "busiest_over_mean", "gini", "entropy", "balancedness_ep8", "balancedness_ep16", "balancedness_ep32",
    "imbalance_ep8", "imbalance_ep16", "imbalance_ep32", "shared_with_next_token", "active_128",
)  # fmt: skip
"""Figures that are compared; medians or means over layers."""
_SIZES = (8, 16, 32)


@lru_cache(maxsize=1)
def known_models() -> tuple[dict[str, Any], ...]:
    """Figures of known models' routing, from the catalog.

    Returns
    -------
    tuple of dict
        ``name``, ``model``, ``phase``, ``n_layers``, ``n_experts``, ``top_k`` (None where unknown),
        ``n_choices`` ((token, expert) pairs per layer), ``entry`` and ``data`` (the source), and those
        of `COMPARED` that are known, ranks loaded by experts as they are numbered.
    """
    file = resources.files("moesim").joinpath("catalog", "known_routing.yaml")
    entries = YAML(typ="safe").load(file.read_text(encoding="utf-8"))["models"]
    return tuple(_flat(entry) for entry in entries)


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    figures = entry["figures"]
    flat = {key: value for key, value in entry.items() if key != "figures"}
    flat["busiest_over_mean"] = figures["busiest_over_mean"][1]
    for key in ("gini", "entropy", "shared_with_next_token"):
        if key in figures:
            flat[key] = figures[key]
    for ep in _SIZES:
        if f"ep{ep}" in figures:
            flat[f"balancedness_ep{ep}"], flat[f"imbalance_ep{ep}"] = figures[f"ep{ep}"]
    if (active := figures.get("active", {}).get(128)) is not None:
        flat["active_128"] = active
    return flat


def compared_with_known(own: Mapping[str, float]) -> dict[str, Any]:
    """Place figures of one trace among those of known models.

    Parameters
    ----------
    own
        Some of `COMPARED`.

    Returns
    -------
    dict
        ``own``, as given; ``above``: share of known models whose figure is lower, by figure, of the models that
        have it; ``nearest``: the model most alike in busiest over mean, Gini and entropy, each in units of
        its spread over the models; ``models``, all of them.
    """
    models = known_models()
    above, gaps = {}, np.zeros(len(models))
    for key, value in own.items():
        values = np.array([one.get(key, np.nan) for one in models], dtype=np.float64)
        has = np.isfinite(values)
        if has.any():
            above[key] = float((values[has] < value).mean())
        if key in ("busiest_over_mean", "gini", "entropy"):
            gaps += ((values - value) / values.std()) ** 2
    nearest = models[int(gaps.argmin())]["name"]
    return {"own": dict(own), "above": above, "nearest": nearest, "models": [dict(one) for one in models]}
