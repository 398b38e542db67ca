"""MoE against dense at equal active and at equal total parameters, by training tokens and by training FLOPs."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go

from calibrate.routing.model import ModelConfig, fine_grained

from common import Table, figure, fit, options, router, settings, setup


def contenders(model: ModelConfig) -> dict[str, ModelConfig]:
    """Models by name; widths of the dense ones make the feed-forward parameters equal, the router's aside."""
    width, k, n = model.expert_width, model.top_k, model.n_experts
    moe = replace(model, router=router())
    return {
        f"dense, active as the MoE (width {k * width})": replace(model, n_experts=0, expert_width=k * width),
        f"dense, total as the MoE (width {n * width})": replace(model, n_experts=0, expert_width=n * width),
        f"MoE, {k} of {n}": moe,
        f"MoE, {k} of {4 * n}": replace(moe, n_experts=4 * n),
        f"MoE, finer: {2 * k} of {2 * n}": fine_grained(moe, 2),
        f"MoE, shared: 1 and {k - 1} of {n - 1}": replace(moe, n_experts=n - 1, top_k=k - 1, n_shared=1),
    }


def main() -> None:
    """Train every contender at two lengths: by tokens, and as many steps as the same FLOPs buy."""
    asked = options(__doc__ or "")
    model, recipe, corpus = setup(asked)
    table = Table(asked.output / "moe_or_dense.csv")
    models = contenders(model)
    budget = recipe.steps * next(iter(models.values())).flops_per_token(recipe.context)
    models = {name: config for name, config in models.items() if asked.only in name}
    for seed in range(asked.seeds):
        for name, config in models.items():
            affordable = max(1, round(budget / config.flops_per_token(recipe.context)))
            lengths = {"tokens": recipe.steps, "flops": affordable}
            if affordable > 0.9 * recipe.steps:  # the same run answers both
                lengths.pop("flops")
            for equal, steps in lengths.items():
                mine = replace(recipe, seed=seed, steps=steps)
                _, found = fit(config, mine, corpus, small=asked.small)
                flops = steps * recipe.batch * recipe.context * config.flops_per_token(recipe.context)
                table.add(
                    model=name,
                    equal=equal,
                    bits_per_byte=round(found.bits_per_byte, 4),
                    training_flops=f"{flops:.3g}",
                    **settings(config, mine),
                )
    traces = []
    for name in models:
        rows = [row for row in table.rows if row["model"] == name]
        x = [float(row["training_flops"]) for row in rows]
        y = [row["bits_per_byte"] for row in rows]
        traces.append(go.Scatter(x=x, y=y, mode="markers", name=name))
    title = "Held-out loss against training FLOPs"
    figure(
        asked.output / "moe_or_dense.html", traces, title, "training FLOPs", "bits per byte", xaxis_type="log"
    )


if __name__ == "__main__":
    main()
