"""Balance of the experts with and without each means of balancing, and what it costs in loss."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go

from common import Table, balance, figure, fit, options, router, settings, setup

MEANS = {
    "none": {"aux_weight": 0.0},
    "aux 0.01": {"aux_weight": 0.01},
    "aux 0.1": {"aux_weight": 0.1},
    "z-loss 0.001": {"aux_weight": 0.0, "z_weight": 0.001},
    "jitter 0.01": {"aux_weight": 0.0, "jitter": 0.01},
    "sigmoid, none": {"aux_weight": 0.0, "scoring": "sigmoid"},
    "sigmoid, bias 0.01": {"aux_weight": 0.0, "scoring": "sigmoid", "bias_rate": 0.01},
    "expert choice (not causal)": {"aux_weight": 0.0, "expert_choice": True},
}


def main() -> None:
    """Train one model per means and seed."""
    asked = options(__doc__ or "")
    model, recipe, corpus = setup(asked)
    table = Table(asked.output / "balance.csv")
    means = dict(list(MEANS.items())[-3:]) if asked.small else MEANS
    means = {name: changes for name, changes in means.items() if asked.only in name}
    for seed in range(asked.seeds):
        for name, changes in means.items():
            config = replace(model, router=router(**changes))
            _, found = fit(config, replace(recipe, seed=seed), corpus, small=asked.small)
            table.add(
                means=name,
                bits_per_byte=round(found.bits_per_byte, 4),
                **balance(found.chosen),
                **settings(config, replace(recipe, seed=seed)),
            )
    found = {name: table.mean("busiest_over_mean", means=name) for name in means}
    error = {"type": "data", "array": [half for _, half in found.values()]}
    bars = go.Bar(x=list(found), y=[mean for mean, _ in found.values()], error_y=error)
    title = "Busiest expert over the mean, held-out text"
    figure(asked.output / "balance.html", [bars], title, "", "busiest / mean")


if __name__ == "__main__":
    main()
