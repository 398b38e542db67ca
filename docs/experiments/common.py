"""What the experiments share: options, one training run, tidy CSV files, a figure."""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from calibrate.routing.corpus import Corpus, find_corpus
from calibrate.routing.model import ModelConfig
from calibrate.routing.router import RouterConfig
from calibrate.routing.training import Evaluation, Recipe, Trained, evaluate, train

MODEL = ModelConfig(n_layers=2, hidden=64, n_heads=2, n_experts=8, top_k=2, expert_width=64)
RECIPE = Recipe(steps=400, batch=16, context=64, learning_rate=5e-3, warmup=20)
SMALL_MODEL = replace(MODEL, n_layers=1, hidden=16, n_heads=1, expert_width=16)
SMALL_RECIPE = replace(RECIPE, steps=3, batch=4, context=32, warmup=1)
DOMAINS = ("python", "c", "javascript", "perl", "guide", "manual", "german", "french")


def options(what: str) -> argparse.Namespace:
    """Command line that every experiment has."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument(
        "--small", action="store_true", help="a few steps of a tiny model: shows that it runs"
    )
    parser.add_argument("--seeds", type=int, default=2, help="runs of each setting (default 2)")
    parser.add_argument("--steps", type=int, help=f"optimiser steps of a run (default {RECIPE.steps})")
    parser.add_argument(
        "--only", default="", help="settings whose name holds this text, where they have names"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    return asked


def setup(asked: argparse.Namespace) -> tuple[ModelConfig, Recipe, Corpus]:
    """Model, recipe and text of all experiments."""
    if asked.small:
        return SMALL_MODEL, SMALL_RECIPE, find_corpus(limit=300_000, only=["python"])
    return (
        MODEL,
        replace(RECIPE, steps=asked.steps or RECIPE.steps),
        find_corpus(limit=1_000_000, only=DOMAINS),
    )


def router(**changes: Any) -> RouterConfig:
    """Router of the experiments: balance loss 0.01, unless said otherwise."""
    return RouterConfig(**{"aux_weight": 0.01, **changes})


def fit(
    config: ModelConfig, recipe: Recipe, corpus: Corpus, *, small: bool = False
) -> tuple[Trained, Evaluation]:
    """Train one model and evaluate it on held-out text."""
    trained = train(config, recipe, corpus)
    return trained, judge(trained, corpus, small=small)


def judge(trained: Trained, corpus: Corpus, *, small: bool = False) -> Evaluation:
    """Held-out loss and balance."""
    n_sequences = 16 if small else 512
    return evaluate(trained.model, corpus, context=trained.recipe.context, n_sequences=n_sequences)


def balance(chosen: np.ndarray) -> dict[str, float]:
    """Balance of held-out choices (layers, experts): means over layers."""
    share = chosen / chosen.sum(1, keepdims=True)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1) / np.log(share.shape[1])
    mean = 1 / share.shape[1]
    return {
        "busiest_over_mean": round(float((share.max(1) / mean).mean()), 3),
        "entropy": round(float(entropy.mean()), 4),
        "active_fraction": round(float((share > 0.1 * mean).mean()), 3),
    }


class Table:
    """Rows of a CSV file, written whole after each."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self.started_s = path, list[dict[str, Any]](), time.monotonic()

    def add(self, **row: Any) -> None:
        """Add one row, write the file, say the row."""
        self.rows.append(row)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".csv")
        with os.fdopen(handle, "w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(self.path)
        said = "  ".join(f"{key} {value}" for key, value in row.items())
        print(f"{time.monotonic() - self.started_s:6.0f} s  {said}", flush=True)

    def mean(self, value: str, **where: Any) -> tuple[float, float]:
        """Mean and half range of a column over the rows that match."""
        found = [row[value] for row in self.rows if all(row[key] == one for key, one in where.items())]
        return float(np.mean(found)), float(np.ptp(found)) / 2


def settings(config: ModelConfig, recipe: Recipe) -> dict[str, Any]:
    """Columns that say what was trained."""
    return {
        "n_layers": config.n_layers,
        "hidden": config.hidden,
        "n_experts": config.n_experts,
        "top_k": config.top_k,
        "expert_width": config.expert_width,
        "n_shared": config.n_shared,
        "total": config.n_parameters,
        "active": config.n_active,
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.batch * recipe.context,
        "seed": recipe.seed,
    }


def figure(path: Path, traces: Sequence[Any], title: str, x: str, y: str, **layout: Any) -> None:
    """Write one figure as a page that needs no network."""
    made = go.Figure(traces)
    made.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", **layout)
    made.write_html(path, include_plotlyjs=True)
