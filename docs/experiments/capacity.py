"""Loss and dropped share against capacity factor: trained with it, and only run with it."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go

from calibrate.routing.model import MoeLayer
from calibrate.routing.training import Trained

from common import Table, balance, figure, fit, judge, options, router, settings, setup

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
TRAINED = {"position": (0.5, 0.75, 1.0, 1.5), "weight": (0.5, 1.0)}
"""Factors to train with, by which tokens are dropped."""


def main() -> None:
    """Train dropless and with each factor; run the dropless model with each factor too."""
    asked = options(__doc__ or "")
    model, recipe, corpus = setup(asked)
    factors = (0.5, 1.0) if asked.small else FACTORS
    table = Table(asked.output / "capacity.csv")

    def add(trained_with: float | None, run_with: float | None, drop: str, trained: Trained) -> None:
        found = judge(trained, corpus, small=asked.small)
        table.add(
            trained_with=trained_with or 0.0,
            run_with=run_with or 0.0,
            drop=drop,
            bits_per_byte=round(found.bits_per_byte, 4),
            dropped_fraction=round(found.dropped_fraction, 4),
            **balance(found.chosen),
            **settings(trained.model.config, trained.recipe),
        )

    for seed in range(asked.seeds):
        mine = replace(recipe, seed=seed)
        dropless, _ = fit(replace(model, router=router()), mine, corpus, small=asked.small)
        add(None, None, "none", dropless)
        for drop in ("position", "weight"):
            for factor in factors:
                limited = router(capacity_factor=factor, drop=drop)
                for layer in dropless.model.modules():
                    if isinstance(layer, MoeLayer):
                        layer.config = replace(model, router=limited)
                add(None, factor, drop, dropless)
                if factor in TRAINED[drop]:
                    add(
                        factor,
                        factor,
                        drop,
                        fit(replace(model, router=limited), mine, corpus, small=asked.small)[0],
                    )
    _figure(table, asked.output / "capacity.html", factors)


def _figure(table: Table, path: object, factors: tuple[float, ...]) -> None:
    traces = []
    for drop in ("position", "weight"):
        for trained in (True, False):
            at = [f for f in factors if not trained or f in TRAINED[drop]]
            means = [
                table.mean("bits_per_byte", trained_with=f if trained else 0.0, run_with=f, drop=drop)
                for f in at
            ]
            name = f"{'trained and run' if trained else 'only run'} with it, drop by {drop}"
            error = {"type": "data", "array": [half for _, half in means]}
            traces.append(go.Scatter(x=at, y=[mean for mean, _ in means], error_y=error, name=name))
    base, _ = table.mean("bits_per_byte", run_with=0.0)
    traces.append(
        go.Scatter(x=[factors[0], factors[-1]], y=[base, base], name="dropless", line={"dash": "dot"})
    )
    figure(path, traces, "Held-out loss against capacity factor", "capacity factor", "bits per byte")


if __name__ == "__main__":
    main()
