"""Fit links that were measured between ranks: gloo, NCCL across nodes, NCCL over PCIe or sockets, point to point.

NCCL's collectives within an NVLink node have a model of their own (`calibrate.fit.collectives`); here every
implementation gets

    send_recv:   latency_s + bytes / rate_bytes_per_s, and a step where the protocol changes, if the data want one
    collective:  start_s + peer_s (n - 1) + wire bytes / (efficiency (n / n_ref)^-fade g^-crowd rate_bytes_per_s)

for n ranks, g of them on each node. The rate is point to point's, so that the efficiency is the algorithm's alone.
Families are named after the implementation, with ``-internode`` where ranks stand on several nodes (NCCL's on one:
``nccl-intranode``). NCCL's rows also give what `moesim.network` prices by: ``inter_node``, ``send_recv`` over NVLink,
``pcie`` where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.fit.common import FloatArray, LogFit, Prediction, fit_log_least_squares
from calibrate.fit.family import (
    Kernel,
    Method,
    Note,
    Spec,
    Values,
    fit_family,
    known_family,
    newest_software,
    predict_by_family,
    seen_rows,
)
from calibrate.fit.node_links import priced_families, priced_s, prices
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Profile
from moesim.network.collectives import wire_bytes

__all__ = ["TABLES", "fit_table", "predict_table", "serves"]

TABLES = ("collective",)

POINT_TO_POINT = "send_recv"
LOSS_SCALE = 0.05
METHOD = Method(("message_bytes",), loss_scale=LOSS_SCALE, max_evaluations=60)
_STEP_GAIN = 4.0
"""How much a step must gain, in units of what two parameters gain on noise (Bayesian information criterion)."""
_STEP_FROM = 0.02
"""Relative residual below which a straight line is good enough."""

LINE: Spec = {
    "latency_s": (1e-4, 1e-7, 10.0, "fixed cost of a message, one way [s]"),
    "rate_bytes_per_s": (1e9, 1e4, 1e13, "rate of one stream of large messages [bytes/s]"),
}
STEP: Spec = {**LINE, "step_s": (1e-5, 1e-8, 1.0, "further cost of a message above step_bytes [s]")}
COLLECTIVE: Spec = {
    "start_s": (1e-4, 1e-7, 10.0, "fixed cost of a call [s]"),
    "peer_s": (1e-5, 1e-9, 1.0, "cost of each further rank [s]"),
    "efficiency": (
        0.7,
        0.01,
        4.0,
        "rate of a rank over that of one point-to-point stream, n_ref ranks, one a node",
    ),
    "fade": (0.1, 1e-3, 2.0, "exponent by which the efficiency falls as ranks are more"),
    "crowd": (0.3, 1e-3, 2.0, "exponent by which it falls as ranks share a node's links"),
}


def serves(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """[n] rows that this module fits: all but NCCL's collectives within one node.

    Parameters
    ----------
    rows
        Of tables of kind ``collective``.
    """
    other = ~rows["op"].isin(["all_to_all", "all_gather", "reduce_scatter", "all_reduce"])
    return np.asarray(other | (rows["implementation"] != "nccl") | (_nodes(rows) > 1))


def fit_table(rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note) -> list[dict[str, Any]]:
    """Families of every implementation among `rows`, and those that prices are made of.

    Parameters
    ----------
    rows
        Of one device; rows with ``held_out`` 1 only judge.
    gpu
        The device.
    base
        Profile whose links within a node stand behind those across nodes; the catalog's where None.
    note
        Takes one line of progress.

    Notes
    -----
    Point to point is fitted to the 10th percentile of the samples where the table has it: other work on the hosts only
    ever adds time. Collectives are fitted to the median.
    """
    rows = rows.reset_index(drop=True)
    labels = _labels(rows)
    families: list[dict[str, Any]] = []
    for label in sorted(set(labels)):
        here = newest_software(rows[labels == label], note)
        families += _label_families(here, label, base, note)
    return [*families, *priced_families(rows, gpu=gpu, base=base, note=note)]


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Seconds of every row: by the families that plans are priced with where they cover it, else by its own."""
    rows = rows.reset_index(drop=True).assign(_label=_labels(rows))
    found = predict_by_family(rows, ["op", "_label"], _locate, profile, _price)
    covered = prices(rows, gpu, profile)
    if not covered.any():
        return found
    time_s, why = found.time_s.copy(), list(found.why_not)
    time_s[covered] = priced_s(rows[covered], gpu, profile)
    for place in np.flatnonzero(covered):
        why[place] = None
    return Prediction(time_s, why)


def _locate(values: tuple[Any, ...]) -> tuple[str, str, str]:
    return values[0], values[1], "any"


def _price(rows: pd.DataFrame, values: Values, key: tuple[str, str, str]) -> FloatArray:
    if "latency_s" in values:
        return _line_s(rows, values)
    return _collective_s(rows, values) if "start_s" in values else np.full(len(rows), np.nan)


def _labels(rows: pd.DataFrame) -> NDArray[np.str_]:
    names = rows["implementation"].astype(str)
    # within a node the name nccl alone is that of the model which plans are priced with
    inside = np.where(names == "nccl", "nccl-intranode", names)
    return np.asarray(np.where(_nodes(rows) > 1, [f"{name}-internode" for name in names], inside))


def _nodes(rows: pd.DataFrame) -> FloatArray:
    """[n] nodes of each row; 1 where the table does not say."""
    if "n_nodes" not in rows:
        return np.ones(len(rows))
    return np.asarray(rows["n_nodes"].astype("Float64").fillna(1.0), dtype=float)


def _label_families(rows: pd.DataFrame, label: str, base: Profile | None, note: Note) -> list[dict[str, Any]]:
    """Point to point first: the collectives' efficiencies are shares of its rate."""
    families = []
    rate = None
    pairs = rows[rows["op"] == POINT_TO_POINT]
    if seen_rows(pairs).sum() >= 3:
        families.append(_point_to_point(pairs, label, base, note))
        rate = float(families[0]["parameters"]["rate_bytes_per_s"]["value"])
    for op in sorted(set(rows["op"]) - {POINT_TO_POINT}):
        here = rows[rows["op"] == op]
        if seen_rows(here).sum() < 3:
            note(f"{op} {label}: {len(here)} rows are too few to fit")
            continue
        families.append(_collective(here, op, label, rate, base, note))
    return families


def _point_to_point(rows: pd.DataFrame, label: str, base: Profile | None, note: Note) -> dict[str, Any]:
    source = ""
    if "latency_p10_s" in rows and rows["latency_p10_s"].notna().all():
        rows = rows.assign(latency_s=rows["latency_p10_s"].astype(float))
        source = "10th percentiles of samples"
    seen = rows[seen_rows(rows)]
    kernel = Kernel(POINT_TO_POINT, label, "any", _started(LINE, seen))
    step = _step_bytes(seen, kernel.spec)
    if step is not None:
        meaning = "message from which the protocol, or the path, is another [bytes]"
        kernel = replace(kernel, spec=_started(STEP, seen), constants={"step_bytes": (step, meaning)})
    return fit_family(
        kernel, rows, _line_s, METHOD, base=_measured_base(base, kernel), note=note, source=source
    )


def _started(spec: Spec, rows: pd.DataFrame) -> Spec:
    """First guesses out of the rows: the smallest message's time, the largest one's rate."""
    size, time_s = rows["message_bytes"].to_numpy(dtype=float), rows["latency_s"].to_numpy(dtype=float)
    guesses = {
        "latency_s": float(time_s.min()),
        "step_s": 0.5 * float(time_s.min()),
        "rate_bytes_per_s": float(size[size.argmax()] / time_s[size.argmax()]),
    }
    return {
        name: (min(max(guesses.get(name, first), low), high), low, high, meaning)
        for name, (first, low, high, meaning) in spec.items()
    }


def _step_bytes(rows: pd.DataFrame, line: Spec) -> float | None:
    """Message size at which one line gives way to another; None where one is enough."""
    sizes = np.unique(rows["message_bytes"].to_numpy(dtype=float))
    plain = _fit(rows, line, {})
    if len(sizes) < 6 or math.sqrt(2 * plain.cost / len(rows)) < _STEP_FROM:
        return None
    between = np.sqrt(sizes[1:-2] * sizes[2:-1])  # two sizes at least on either side
    spec = _started(STEP, rows)
    fits = [(_fit(rows, spec, {"step_bytes": float(at)}).cost, float(at)) for at in between]
    cost, at = min(fits)
    gain = len(rows) * math.log(plain.cost / max(cost, 1e-12))
    return at if gain > _STEP_GAIN * 2 * math.log(len(rows)) else None


def _fit(rows: pd.DataFrame, spec: Spec, given: Mapping[str, float]) -> LogFit:
    return fit_log_least_squares(
        lambda values: _line_s(rows, {**given, **values}),
        rows["latency_s"].to_numpy(dtype=float),
        {name: row[0] for name, row in spec.items()},
        {name: (row[1], row[2]) for name, row in spec.items()},
        loss_scale=LOSS_SCALE,
    )


def _line_s(rows: pd.DataFrame, values: Values) -> FloatArray:
    size = rows["message_bytes"].to_numpy(dtype=float)
    step_s = values.get("step_s", 0.0) * (size > values.get("step_bytes", math.inf))
    return np.asarray(values["latency_s"] + step_s + size / values["rate_bytes_per_s"])


def _collective(
    rows: pd.DataFrame, op: str, label: str, rate: float | None, base: Profile | None, note: Note
) -> dict[str, Any]:
    ranks, crowd = rows["n_ranks"].to_numpy(dtype=float), _per_node(rows)
    held = {
        "peer_s": len(np.unique(ranks)) < 2,
        "fade": len(np.unique(ranks)) < 2,
        "crowd": len(np.unique(crowd)) < 2,
    }
    start_s = float(rows["latency_s"].min())
    spec = {
        name: (low, low, low, f"{meaning}; held, one value measured") if held.get(name) else (
            start_s if name == "start_s" else first, low, high, meaning
        )
        for name, (first, low, high, meaning) in COLLECTIVE.items()
    }  # fmt: skip
    constants = {"n_ref": (float(ranks.max()), "ranks that the efficiency is of")}
    if rate is None:
        note(f"{op} {label}: no send_recv measured, so its rate is the collective's own")
        spec = {**spec, "rate_bytes_per_s": _started(LINE, rows)["rate_bytes_per_s"]}
        del spec["efficiency"]
        constants["efficiency"] = (1.0, "of itself: no point-to-point rate was measured")
    else:
        constants["rate_bytes_per_s"] = (rate, "of one point-to-point stream, fitted apart [bytes/s]")
    kernel = Kernel(op, label, "any", spec, constants)
    return fit_family(kernel, rows, _collective_s, METHOD, base=_measured_base(base, kernel), note=note)


def _collective_s(rows: pd.DataFrame, values: Values) -> FloatArray:
    n = rows["n_ranks"].to_numpy(dtype=float)
    share = (
        values["efficiency"] * (n / values["n_ref"]) ** -values["fade"] * _per_node(rows) ** -values["crowd"]
    )
    time_s = (
        values["start_s"] + values["peer_s"] * (n - 1) + _wire(rows) / (share * values["rate_bytes_per_s"])
    )
    return np.asarray(time_s)


def _per_node(rows: pd.DataFrame) -> FloatArray:
    """[n] ranks that share a node, where there are several nodes; one node's own links are one kind."""
    nodes = _nodes(rows)
    return np.asarray(np.where(nodes > 1, rows["n_ranks"].to_numpy(dtype=float) / nodes, 1.0))


def _wire(rows: pd.DataFrame) -> FloatArray:
    """[n] bytes that each rank sends."""
    payload = rows["message_bytes"].to_numpy(dtype=float)
    out = payload.copy()
    for (op, n), index in rows.groupby(["op", "n_ranks"], sort=False).indices.items():
        if op not in ("broadcast", POINT_TO_POINT):
            out[index] = wire_bytes(str(op), payload[index], int(n))
    return np.asarray(out)


def _measured_base(base: Profile | None, kernel: Kernel) -> Profile | None:
    """`base` where it has measured this family: what was only assumed must not hold a fit back."""
    known = known_family(base, kernel.key)
    return base if known is not None and known.provenance.kind == "fitted" else None
