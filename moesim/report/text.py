"""Rows of a plan in words and numbers; every value may be absent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from moesim.units import format_bytes, format_seconds, format_usd, parse_seconds

__all__ = [
    "ABSENT",
    "Record",
    "band_of",
    "band_text",
    "cluster_name",
    "count",
    "layout_name",
    "number",
    "objective_words",
    "parts_of",
    "plural",
    "seconds",
    "share",
    "size_name",
    "step_parts",
    "targets_text",
    "total_and_capacity",
    "usd",
    "usd_column",
]

Record = Mapping[str, Any]
"""One object of ``--json``."""

ABSENT = "–"
"""Stands where a row has no value."""

OBJECTIVES = {
    "usd_per_mtok": "cost per million tokens",
    "tokens_per_s": "throughput",
    "tokens_per_s_per_gpu": "throughput per GPU",
    "tpot_s": "time per output token",
    "ttft_s": "time to first token",
    "step_s": "step time",
}

SIZES = {
    "batch_per_rank": "batch {} a rank",
    "concurrency": "{} requests running",
    "tokens_per_rank": "{} tokens a rank",
    "micro_batch": "micro-batch {}",
}
"""How the keys of a workload that a plan varies are read out."""


def number(record: Record | None, key: str) -> float | None:
    """A finite number of a record; None where it is absent, null or no number."""
    value = (record or {}).get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def parts_of(row: Record, key: str) -> dict[str, float]:
    """Named positive numbers, such as a breakdown; empty where the row has none."""
    parts = row.get(key) or {}
    values = {str(name): number(parts, name) for name in parts}
    return {name: value for name, value in values.items() if value is not None and value > 0}


def step_parts(row: Record) -> dict[str, float]:
    """Parts of one step. A serving row may also hold the prefill between steps, which is no part of a step."""
    parts = parts_of(row, "breakdown_s")
    of_step = {kind: part_s for kind, part_s in parts.items() if not kind.startswith("prefill")}
    return of_step or parts


def seconds(value_s: float | None) -> str:
    """A time, or the mark of an absent one."""
    return ABSENT if value_s is None else format_seconds(value_s)


def usd(value_usd: float | None) -> str:
    """An amount of money, or the mark of an absent one."""
    return ABSENT if value_usd is None else format_usd(value_usd)


def usd_column(value_usd: float | None) -> str:
    """An amount for a column whose head says USD: three digits, zeros kept."""
    if value_usd is None:
        return ABSENT
    return f"{value_usd:#.3g}" if 0.001 <= value_usd < 100 else f"{value_usd:,.3g}"


def share(value: float | None) -> str:
    """A fraction as a percentage."""
    if value is None:
        return ABSENT
    percent = 100 * value
    if 0 < percent < 0.01:
        return "less than 0.01%"
    return f"{percent:.0f}%" if percent >= 10 or percent == 0 else f"{percent:.2g}%"


def count(value: float | None) -> str:
    """A number of things with thousands set apart, or a small one with three digits."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def plural(n: int, one: str, many: str | None = None) -> str:
    """``1 layout``, ``2 layouts``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def band_of(row: Record) -> tuple[str, float, float] | None:
    """Metric that a row's band is about, and its ends.

    The band names it under ``of``; else it is the first of TPOT, step and TTFT that lies inside.
    """
    band = row.get("band") or {}
    low, high = number(band, "low"), number(band, "high")
    if low is None or high is None:
        return None
    if band.get("of"):
        return str(band["of"]), low, high
    for key in ("tpot_s", "step_s", "ttft_s"):
        value = number(row, key)
        if value is not None and low <= value <= high:
            return key, low, high
    return None


def band_text(row: Record, key: str) -> str:
    """A time of a row with its band where it has one: ``41.2 ms (38..46)``."""
    value_s, band = number(row, key), band_of(row)
    if value_s is None or band is None or band[0] != key:
        return seconds(value_s)
    text = format_seconds(value_s)
    unit_s = parse_seconds(f"1 {text.split()[-1]}")
    digits = 2 if band[2] - band[1] > 0.1 * value_s else 3
    low, high = (_short(end_s / unit_s, digits) for end_s in band[1:])
    return f"{text} ({low}..{high})"


def _short(value: float, digits: int) -> str:
    """A bound of a band: no more digits than its width deserves, and no exponent."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:g}" if abs(rounded) < 1e5 else f"{rounded:.0f}"


def layout_name(row: Record) -> str:
    """A layout in one line: ``TP1 DP32 EP32 +32``; sizes of 1 that change nothing are left out."""
    layout = row.get("layout") or {}
    sizes = {key: number(layout, key) for key in ("tp", "dp", "ep", "etp", "pp")}
    shown = [
        f"{key.upper()}{int(size)}"
        for key, size in sizes.items()
        if size is not None and (size > 1 or key in ("tp", "dp", "ep"))
    ]
    if spare := number(layout, "redundant_experts"):
        shown.append(f"+{int(spare)}")
    # eplb is what replicas are placed with unless told otherwise
    if layout.get("placement") not in (None, "contiguous", "eplb" if spare else None):
        shown.append(PurePath(str(layout["placement"])).name)  # a file goes by its name
    return " ".join(shown) or ABSENT


def cluster_name(row: Record) -> str:
    """GPUs of a row: ``32 x h200-sxm``."""
    cluster = row.get("cluster") or {}
    gpu, n_gpus = str(cluster.get("gpu") or ""), number(cluster, "n_gpus")
    if not gpu or n_gpus is None:
        return gpu or ABSENT
    return f"{int(n_gpus)} x {gpu}"


def size_name(row: Record) -> str:
    """Workload size of a row: ``batch 128 a rank``; empty where it has none."""
    workload = {"batch_per_rank": row.get("batch_per_rank"), **(row.get("workload") or {})}
    values = {key: number(workload, key) for key in SIZES}
    return ", ".join(SIZES[key].format(count(value)) for key, value in values.items() if value is not None)


def objective_words(objective: object) -> str:
    """What a plan minimises or maximises, in words."""
    return OBJECTIVES.get(str(objective), str(objective or "rank"))


def targets_text(targets: Record | None) -> str:
    """Targets in one line, ``TTFT ≤ 2 s, TPOT ≤ 30 ms``, that breaks between them only."""
    known: Iterable[tuple[str, object]] = ((targets or {}).items()) if isinstance(targets, Mapping) else ()
    signs = str.maketrans(" ", "\u00a0")
    lines = (
        f"{_metric_name(name)} {bound}".replace("<=", "≤").replace(">=", "≥")
        for name, bound in known
        if bound
    )
    return ", ".join(line.translate(signs) for line in lines)


def _metric_name(name: str) -> str:
    """A metric of a target: its usual capitals, or its words."""
    bare = name.removesuffix("_s").removesuffix("_p50")
    return bare.upper() if bare in ("ttft", "tpot") else bare.replace("_", " ")


def total_and_capacity(row: Record) -> str:
    """Memory used of memory there: ``118 of 141 GB``."""
    memory = row.get("memory_bytes") or {}
    total, capacity = number(memory, "total"), number(memory, "capacity")
    if total is None:
        return ABSENT
    if capacity is None:
        return format_bytes(total)
    used, held = format_bytes(total).split(), format_bytes(capacity).split()
    return f"{used[0] if used[1] == held[1] else ' '.join(used)} of {' '.join(held)}"
