"""The page of ``moesim trace show``: what a router does, in figures, each with what it means."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from moesim.report import maps, routing_figures
from moesim.report.detail import LayoutDetail
from moesim.report.page import Page, write_page
from moesim.report.text import Record, count

__all__ = ["write_routing_report"]


def write_routing_report(path: Path | str, told: Record) -> Path:
    """Write one HTML file about a trace or a generator.

    Parameters
    ----------
    path
        Where to; an older file there is replaced at once.
    told
        The object of ``moesim trace show --json``.

    Returns
    -------
    Path
        The file, complete.
    """
    page = Page()
    named = f"{told['name']}, {told['n_layers']} layers x {told['n_experts']} experts, top {told['top_k']}"
    page.add(
        f'<header><p class="eyebrow">Routing: {escape(named)}</p><h1>{escape(_answer(told))}</h1>'
        f'<p class="note">{escape(_origin(told))}</p>'
    )
    _tiles(page, told)
    page.add("</header><main>")
    _load(page, told)
    _balance(page, told)
    _batches(page, told)
    _locality(page, told)
    _layers(page, told)
    _drift(page, told)
    _domains(page, told)
    _known(page, told)
    page.add(f"</main><footer><p>{escape(_looked_at(told))}</p></footer>")
    return write_page(path, page, f"moesim trace: {named}")


def _answer(told: Record) -> str:
    """The sentence that the page is made for."""
    skew = told["busiest_over_mean"]
    said = f"The busiest expert of a layer gets {skew['median']:.1f} times the mean"
    said += f" ({skew['max']:.1f} in the worst layer)"
    plain = [row for row in told["balance"] if row["placement"] == "contiguous"]
    if plain:
        row = plain[min(1, len(plain) - 1)]
        said += f"; spread over {row['ep']} ranks as numbered, the busiest rank gets {1 + row['imbalance']:.2f} times"
    return said + "."


def _origin(told: Record) -> str:
    tokens = f"{told['n_tokens']:,} tokens. " if told.get("n_tokens") else ""
    phase = f"Phase: {told['phase']}. "
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in told["notes"])
    return f"{tokens}{phase}Source: {told['source']}.{notes}"


def _looked_at(told: Record) -> str:
    looked = told.get("looked_at")
    if not looked:
        return (
            "Counts only: nothing is known of single tokens. Batches take what tokens share from the generator "
            "`default`; locality and layers are not shown."
        )
    if told["synthetic"]:
        return f"Locality, layers and drift are from {looked['tokens']:,} tokens drawn from the generator."
    part = "all" if looked["tokens"] == looked["of"] else f"{looked['tokens']:,} of {looked['of']:,}"
    return (
        f"Load is counted over all tokens; locality, layers, drift and domains over {part} tokens, "
        f"in {looked['runs']:,} runs."
    )


def _tiles(page: Page, told: Record) -> None:
    found = [
        (f"{told['busiest_over_mean']['median']:.2f}", "busiest expert over mean", "median of layers"),
        (f"{told['gini']['median']:.2f}", "Gini", "0 even, 1 all on one"),
    ]
    if told["balance"]:
        row = told["balance"][0]
        found.append(
            (f"{row['balancedness']:.2f}", f"mean over busiest rank, EP{row['ep']}", row["placement"])
        )
    found.append((f"{told['active_experts']['32']:.0%}", "of experts active", "batch of 32 tokens"))
    if (locality := told.get("locality")) and locality["by_lag"]:
        value = locality["shared_with_next_token"]
        found.append(
            (f"{value:.0%}", "of experts kept by the next token", f"{locality['chance']:.0%} by chance")
        )
    if one := told.get("layer_prediction"):
        chance = f"{one['popularity_hit_rate']:.0%} by popularity"
        found.append((f"{one['hit_rate']:.0%}", "of the next layer's experts told", chance))
    page.add('<div class="tiles">')
    for value, name, remark in found:
        page.add(
            f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(remark)}</small></div>'
        )
    page.add("</div>")


def _section(page: Page, name: str, title: str, *notes: str) -> None:
    page.add(f'<section id="{name}"><h2>{escape(title)}</h2>')
    _notes(page, *notes)


def _notes(page: Page, *notes: str) -> None:
    for note in notes:
        page.add(f'<p class="note">{escape(note)}</p>')


def _load(page: Page, told: Record) -> None:
    load = np.array([one["load"] for one in told["layers"]])
    layers = [one["layer"] for one in told["layers"]]
    _section(
        page, "load", "Load of each expert",
        "Tokens over the layer's mean: 1 is even. Dark cells are experts that hold a step up; columns or bands "
        "that are dark in many layers mean that load hangs on the expert's number, and so on placement.",
    )  # fmt: skip
    by_id = maps.expert_map(LayoutDetail("", expert_load=load, layers=layers))
    page.figure(by_id, "Tokens over the mean by layer and expert")
    page.add("<h3>Each layer from its busiest expert to its idlest</h3>")
    ranked = LayoutDetail(
        "", expert_load=-np.sort(-load, axis=1), layers=layers, expert_axis="place in its layer"
    )
    _notes(page, "How wide the dark edge is says how many experts would need a replica.")
    page.figure(maps.expert_map(ranked), "Tokens over the mean by layer, experts sorted by load")
    page.add("<h3>Skew, layer by layer</h3>")
    even = told.get("even")
    floor = (
        f" Equally popular experts would show {even['busiest_over_mean']:.2f} and a Gini of {even['gini']:.3f} over "
        "as many tokens, by chance."
        if even
        else ""
    )
    _notes(
        page,
        "Busiest over mean is what one layer waits for; Gini says how unequal all experts are, entropy how "
        "much of the spread of an even router is left." + floor,
    )
    page.figure(routing_figures.skew_by_layer(told["layers"], even), "Busiest over mean by layer")
    page.figure(routing_figures.gini_by_layer(told["layers"]), "Gini and entropy by layer")
    page.add("</section>")


def _balance(page: Page, told: Record) -> None:
    if not told["balance"]:
        return
    _section(
        page, "balance", "Balance of ranks",
        "Mean over busiest rank: 1 is perfect; 1 minus it is the share of the group's expert work time that is spent "
        "waiting for the busiest rank. Bars are the load of the whole trace; marks are batches drawn from it, "
        "which are less even the fewer tokens a rank holds.",
        "Permuted is contiguous with the experts of each layer in random order. Balanced and eplb are made from "
        "the very load that they are judged on: the best that such a balancer reaches.",
    )  # fmt: skip
    page.figure(routing_figures.balance_bars(told["balance"]), "Mean over busiest rank by EP and placement")
    page.add("</section>")


def _batches(page: Page, told: Record) -> None:
    _section(
        page, "batch", "Experts that work, against the batch",
        "Decode reads the weights of the experts with a token, and of no others. Tokens of one request stay on "
        "fewer experts than tokens of many; an even router would use the most.",
    )  # fmt: skip
    page.figure(routing_figures.active_lines(told["by_batch"]), "Share of experts with a token by batch size")
    page.add("<h3>The busiest expert in the same batches</h3>")
    _notes(page, "Over the mean. Small batches are uneven by chance alone.")
    page.figure(routing_figures.busiest_lines(told["by_batch"]), "Busiest expert over mean by batch size")
    page.add("</section>")


def _locality(page: Page, told: Record) -> None:
    found = told.get("locality")
    if not found or not found["by_lag"]:
        return
    _section(
        page, "locality", "Locality in a request",
        "Share of a token's experts that a token so many places further on has too. Above the line of any two "
        "tokens, a request has experts of its own: batches of one request load fewer experts, and caches of "
        "experts pay.",
    )  # fmt: skip
    page.figure(routing_figures.locality_lines(found), "Experts shared by tokens, by their distance")
    page.add("</section>")


def _layers(page: Page, told: Record) -> None:
    one = told.get("layer_prediction")
    if not one:
        return
    _section(
        page, "layers", "What a layer tells of the next",
        f"Share of the next layer's experts among the {told['top_k']} most likely given this layer's, learned on half "
        f"of the requests and told on the other: {one['hit_rate']:.0%}, against {one['popularity_hit_rate']:.0%} for "
        "the most popular ones. What lies between is what prefetching experts can gain.",
    )  # fmt: skip
    layers = [row["layer"] for row in told["layers"]][: len(one["by_layer"]["hit_rate"])]
    page.figure(routing_figures.hit_lines(one["by_layer"], layers), "Next layer's experts told, by layer")
    page.add("<h3>How far one expert moves the next layer's choice</h3>")
    _notes(
        page,
        f"As total variation: {one['total_variation']:.2f}, of which "
        f"{one['total_variation_noise']:.2f} is what so few tokens show without any link.",
    )
    page.figure(routing_figures.link_lines(one["by_layer"], layers), "Total variation by layer")
    page.add("</section>")


def _drift(page: Page, told: Record) -> None:
    found = told.get("drift")
    if not found:
        return
    _section(
        page, "drift", "Drift",
        f"The trace in {found['n_windows']} windows of {found['tokens_per_window']:,.0f} tokens, in order: how far "
        "popularity in two windows differs, against how far apart they are. A line that climbs above its dotted one "
        f"(the same windows with every {found['unit']} shuffled) is drift, and a placement made once grows stale; "
        "a line on it is none.",
    )  # fmt: skip
    page.figure(routing_figures.drift_lines(found), "Distance of popularity by distance of windows")
    page.add("</section>")


def _domains(page: Page, told: Record) -> None:
    found = told.get("domains")
    if not found:
        return
    _section(
        page, "domains", "Specialisation by domain",
        "Total variation of popularity between half of one domain and half of another; on the diagonal between "
        "the halves of one, so what is noise. A cell much darker than its diagonal is a domain with experts of "
        "its own: its load needs another placement.",
        f"Knowing the domain tells {found['mutual_information_bits']:.3f} bits of the expert; "
        f"{found['mutual_information_noise_bits']:.3f} with domains shuffled.",
    )  # fmt: skip
    page.figure(routing_figures.domain_map(found), "Total variation between domains", max_width=720)
    head = ("domain", "tokens", "expert that stands out", "share there", "over its mean")
    rows = [
        [one["domain"], f"{n:,}", f"layer {told['layers'][one['layer']]['layer']}, expert {one['expert']}",
         f"{one['share']:.1%}", f"{one['over_mean']:.1f} x"]
        for one, n in zip(found["specialists"], found["n_tokens"], strict=True)
    ]  # fmt: skip
    page.add(_table(head, rows))
    page.add("</section>")


_KNOWN = (
    ("busiest over mean", "busiest_over_mean"), ("Gini", "gini"), ("entropy", "entropy"),
    ("EP8", "balancedness_ep8"), ("EP16", "balancedness_ep16"), ("EP32", "balancedness_ep32"),
    ("next token", "shared_with_next_token"), ("active, 128", "active_128"),
)  # fmt: skip


def _known(page: Page, told: Record) -> None:
    known = told["known"]
    own = known["own"]
    _section(
        page, "known", "Among known models",
        f"Most alike in busiest over mean, Gini and entropy: {known['nearest']}. "
        f"{known['above']['busiest_over_mean']:.0%} of the models are less skewed by busiest over mean, "
        f"{known['above']['gini']:.0%} by Gini. Compare like with like: more experts, and fewer of them per token, "
        "make larger figures; few tokens make everything look more skewed.",
    )  # fmt: skip
    page.figure(routing_figures.known_scatter(known, str(told["name"])), "Gini against busiest over mean")
    _notes(
        page,
        "Medians over layers. EP8 to EP32: mean over busiest rank, experts as numbered. Next token: share of experts "
        "kept. Active, 128: share of experts with a token of 128. Below each name, what the figures are from.",
    )
    head = ("", "experts", "top-k", *(name for name, _ in _KNOWN))
    rows = [_known_row(str(told["name"]), told, own)]
    rows += [_known_row(one["name"], one, one) for one in known["models"]]
    sources = ["this trace", *(str(one["data"]) for one in known["models"])]
    page.add(_table(head, rows, sortable=True, first=True, remarks=sources))
    page.add("</section>")


def _known_row(name: str, sizes: Record, figures: Record) -> list[str]:
    cells = [figures.get(key) for _, key in _KNOWN]
    return [
        name,
        count(sizes["n_experts"]),
        str(sizes["top_k"] or ""),
        *("" if value is None else f"{value:.2f}" for value in cells),
    ]


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    sortable: bool = False,
    first: bool = False,
    remarks: Sequence[str] = (),
) -> str:
    """A table whose first column is words, with `remarks` under them; `first` marks the first row."""
    kinds = ["" if i == 0 else ' class="n"' for i in range(len(head))]
    inside = [f'<button type="button">{escape(name)}</button>' if sortable else escape(name) for name in head]
    top = "".join(f"<th{kind}>{name}</th>" for kind, name in zip(kinds, inside, strict=True))
    body = []
    for number, row in enumerate(rows):
        shown = [escape(cell) or "-" for cell in row]
        if remarks:
            shown[0] += f"<small>{escape(remarks[number])}</small>"
        cells = "".join(
            f'<td{kind} data-v="{escape(cell)}">{text}</td>'
            for kind, cell, text in zip(kinds, row, shown, strict=True)
        )
        body.append(f"<tr{' class=first' if first and number == 0 else ''}>{cells}</tr>")
    style = ' class="sortable"' if sortable else ""
    return f'<div class="wide"><table{style}><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
