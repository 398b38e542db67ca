"""The answer in words: what to take, what it costs, what limits it, how sure that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moesim.report import palette
from moesim.report.text import (
    Record,
    band_of,
    band_text,
    cluster_name,
    count,
    layout_name,
    number,
    objective_words,
    plural,
    seconds,
    share,
    size_name,
    step_parts,
    targets_text,
    total_and_capacity,
    usd,
)

__all__ = [
    "KINDS",
    "answer",
    "certainty",
    "close_rivals",
    "limits",
    "near_misses",
    "ruled_out_groups",
    "tiles",
]

KINDS = {
    "memory": (
        "does not fit in memory",
        "more or larger GPUs, a smaller batch or context, or smaller weights",
    ),
    "divisibility": ("does not divide", "other sizes of tp, ep or pp"),
    "target": ("misses a target", "a looser target, more GPUs, or faster ones"),
    "dominated": ("cannot come near the best", ""),
}
"""Why a point is out, and what would bring it back; the order of the page."""

MAXIMISED = ("tokens_per_s", "tokens_per_s_per_gpu")

COMMUNICATION = ("dispatch", "combine", "all_reduce", "all_gather", "reduce_scatter", "pipeline", "gradients")


def answer(plan: Record) -> str:
    """The sentence that a plan is run for."""
    rows: Sequence[Record] = plan.get("layouts") or []
    wanted = targets_text(plan.get("targets"))
    if not rows:
        return _no_answer(plan, wanted)
    best = rows[0]
    met = f" that meet{'s' if len(rows) == 1 else ''} {wanted}" if wanted else ""
    on = f"{layout_name(best)} on {cluster_name(best)}"
    size = f", {size_name(best)}," if size_name(best) else ""
    words = objective_words(plan.get("objective"))
    superlative = "highest" if plan.get("objective") in MAXIMISED else "lowest"
    if len(rows) == 1:
        return f"{on}{size} is the only candidate{met}."
    return f"{on}{size} has the {superlative} {words} of the {len(rows):,} candidates{met}."


def _no_answer(plan: Record, wanted: str) -> str:
    """Why nothing is left, by the reason that rules out most."""
    said = f"No candidate fits and meets {wanted}" if wanted else "No candidate is feasible"
    groups = ruled_out_groups(plan)
    if not groups:
        return f"{said}."
    kind, n, examples = max(groups, key=lambda group: group[1])
    total = sum(size for _, size, _ in groups)
    why = KINDS[kind][0] if kind in KINDS else kind
    example = f" ({examples[0][1]})" if examples[0][1] else ""
    return f"{said}. Most often, for {n:,} of {plural(total, 'candidate')}, the layout {why}{example}."


def near_misses(plan: Record) -> str:
    """How near the candidates that miss a target come to each latency target; empty where that is unknown."""
    said = []
    for name, bound in (plan.get("targets") or {}).items():
        key = f"{str(name).removesuffix('_p50').removesuffix('_s')}_s"
        values = [number(row, key) for row in plan.get("layouts_all") or ()]
        known = [value for value in values if value is not None]
        if known and bound:
            said.append(
                f"The lowest {objective_words(key)} of all candidates that fit is {seconds(min(known))}; "
                f"the target is {str(bound).replace('<=', '≤')}."
            )
    return " ".join(said)


def tiles(row: Record) -> list[tuple[str, str, str]]:
    """Figures to see first, as (label, value, remark); those that the row lacks are left out."""
    found: list[tuple[str, str, str]] = []
    per_hour = number(row.get("cluster"), "usd_per_gpu_hour")
    if (cost := number(row, "usd_per_mtok")) is not None:
        found.append(("per million tokens", usd(cost), f"at {usd(per_hour)} a GPU-hour" if per_hour else ""))
    for key, name in (("tpot_s", "per output token"), ("ttft_s", "to first token"), ("step_s", "step")):
        value = number(row, key)
        if value is None or (key == "step_s" and number(row, "tpot_s") is not None):
            continue
        band = band_of(row)
        remark = band_text(row, key).removeprefix(seconds(value)).strip(" ()")
        unit = seconds(value).split()[-1]
        found.append((name, seconds(value), f"band {remark} {unit}" if band and band[0] == key else ""))
    if (rate := number(row, "tokens_per_s_per_gpu")) is not None:
        whole = number(row, "tokens_per_s")
        found.append(
            ("tokens/s per GPU", count(_round(rate)), f"{count(_round(whole))} in all" if whole else "")
        )
    memory = row.get("memory_bytes") or {}
    total, capacity = number(memory, "total"), number(memory, "capacity")
    if total is not None and capacity:
        found.append(("of memory used", share(total / capacity), total_and_capacity(row)))
    if (mfu := number(row, "mfu")) is not None:
        found.append(("model FLOP/s use", share(mfu), ""))
    return found


def _round(value: float) -> float:
    return float(f"{value:.3g}")


def limits(row: Record) -> str:
    """What takes most of a step, how much of it is communication and waiting, and how full memory is."""
    parts = step_parts(row)
    said = []
    whole = sum(parts.values())
    if whole > 0:
        largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
        shares = [f"{palette.label(kind)} {share(value / whole)}" for kind, value in largest]
        said.append(f"Most of a step's time goes to {_joined(shares)}.")
        moved = sum(v for kind, v in parts.items() if _is_communication(kind))
        if moved / whole > 0.05:
            said.append(f"Communication is {share(moved / whole)} of it.")
        if parts.get("wait", 0.0) / whole > 0.05:
            said.append(f"Waiting is {share(parts['wait'] / whole)}.")
    if (imbalance := number(row, "imbalance")) is not None and imbalance > 1.05:
        said.append(f"The busiest expert rank has {count(_round(imbalance))} times the mean load.")
    memory = row.get("memory_bytes") or {}
    total, capacity = number(memory, "total"), number(memory, "capacity")
    if total is not None and capacity and total > 0.9 * capacity:
        said.append(
            f"Memory is {share(total / capacity)} full, so a larger batch or context has little room."
        )
    return " ".join(said)


def _is_communication(kind: str) -> bool:
    return palette.is_exposed(kind) or kind in COMMUNICATION


def _joined(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def certainty(row: Record) -> str:
    """How far to trust a row, and why."""
    said = []
    if row.get("calibrated") is True:
        said.append("Kernel times are fitted to measurements on this GPU.")
    elif row.get("calibrated") is False:
        said.append(
            "This GPU was not measured: its datasheet figures are used with efficiencies carried over from "
            "another GPU, so the band is wider."
        )
    band = band_of(row)
    value = number(row, band[0]) if band else None
    if band and value:
        half = max(band[2] - value, value - band[1]) / value
        said.append(f"The band is {share(half)} to either side.")
    engine = row.get("engine") or {}
    difference = number(engine, "difference")
    if difference is not None:
        said.append(
            f"The event-by-event engine gives {seconds(number(engine, 'step_s'))} for the same step, "
            f"{share(abs(difference))} away"
            + (", token exchanges sharing the cluster's links." if engine.get("links") == "fluid" else ".")
        )
    return " ".join(said)


def close_rivals(plan: Record) -> str:
    """Layouts that the best one's band does not tell apart from it."""
    rows: Sequence[Record] = plan.get("layouts") or []
    key = str(plan.get("objective") or "")
    if len(rows) < 2:
        return ""
    best, band = number(rows[0], key), band_of(rows[0])
    centre = number(rows[0], band[0]) if band else None
    second = number(rows[1], key)
    if not best or second is None:
        return ""
    gap = abs(second / best - 1)
    said = f"Next comes {layout_name(rows[1])} on {cluster_name(rows[1])}, {share(gap)} behind."
    if band and centre:
        half = (band[2] - band[1]) / 2 / centre
        values = [number(row, key) for row in rows[1:]]
        near = sum(value is not None and abs(value / best - 1) <= half for value in values)
        if near:
            lie = "lies" if near == 1 else "lie"
            said += (
                f" {plural(near, 'layout')} {lie} within the band of the first: "
                "measure before choosing between them."
            )
    return said


def ruled_out_groups(plan: Record) -> list[tuple[str, int, list[tuple[Record, str]]]]:
    """What was ruled out, as (kind, count, examples with their reasons); known kinds first.

    An item may carry a ``count`` of the points it stands for. Examples have different reasons, as far as
    there are.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, dict[str, Record]] = {}
    for item in plan.get("ruled_out") or []:
        kind = str(item.get("kind") or "other")
        counts[kind] += int(number(item, "count") or 1)
        of_kind = examples.setdefault(kind, {})
        if len(of_kind) < 3:
            of_kind.setdefault(str(item.get("reason") or ""), item)
    order = {kind: i for i, kind in enumerate(KINDS)}
    kinds = sorted(counts, key=lambda kind: (order.get(kind, len(order)), kind))
    return [(kind, counts[kind], [(item, why) for why, item in examples[kind].items()]) for kind in kinds]
