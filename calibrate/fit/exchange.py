"""Fit DeepEP's exchanges on one host and across hosts to tables of kind ``deepep``.

Equations, errors and what was tried: docs/fits/collectives.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from calibrate.fit.common import LogFit, Prediction, fit_log_least_squares, grouped_folds
from calibrate.fit.exchange_rows import (
    DIRECTIONS,
    GPUS_PER_NODE,
    KINDS,
    Direction,
    ExchangeRows,
    Kind,
    exchange_rows,
    measured_s,
    predict_exchange,
)
from calibrate.fit.family import (
    MARKED,
    N_FOLDS,
    PRIOR_WEIGHT,
    Kernel,
    Note,
    Spec,
    Values,
    family_entry,
    fitted_values,
    is_blind,
    known_family,
    newest_software,
    provenance_text,
    say,
    seen_rows,
)
from calibrate.statistics import ape_stats
from moesim.hardware.gpu import Gpu
from moesim.hardware.profile import Family, Profile

__all__ = ["TABLES", "fit_table", "predict_table"]

TABLES = ("deepep",)
FEWEST_NODES = 2
"""Nodes that cannot tell what more of them cost each other."""
ODD_NODES = f"only nodes of {GPUS_PER_NODE} GPUs have a model"

_LOW_LATENCY_NEAR: Spec = {
    "start_s": (7e-6, 1e-6, 3e-5, "fixed cost of a call [s]"),
    "expert_s": (1e-8, 1e-10, 1e-7, "more of it per expert of the layer: flags and counts [s]"),
    "token_s": (4e-7, 1e-9, 1e-5, "an SM's time per token [s]"),
    "token_byte_s": (1e-10, 1e-13, 1e-8, "the same per byte of a copy [s/byte]"),
    "copy_byte_s": (1e-11, 1e-14, 1e-8, "the same per byte of each of the token's top_k copies [s/byte]"),
    "message_s": (5e-8, 1e-10, 1e-5, "a warp group's time per message that it receives [s]"),
    "message_byte_s": (2e-11, 1e-14, 1e-8, "the same per byte [s/byte]"),
    "nvlink_rate_fraction": (0.7, 0.3, 1.0, "share of the NVLink datasheet rate"),
}
_GPU_BYTE: Spec = {
    "gpu_byte_s": (1e-12, 1e-15, 1e-10, "a byte's time over NVLink that a wider link does not save [s/byte]"),
}
_NORMAL_NEAR: Spec = {
    "start_s": (2.5e-5, 1e-6, 1e-4, "fixed cost of a call [s]"),
    "start_byte_s": (2e-10, 1e-12, 1e-8, "more of it per byte of a copy: the first one through [s/byte]"),
    "start_copy_byte_s": (1e-11, 1e-13, 1e-8, "the same for each copy of a token [s/byte]"),
    "ramp_s": (1e-5, 1e-7, 2e-4, "filling and draining the channels' queues [s]"),
    "ramp_tokens": (300.0, 1.0, 5000.0, "tokens at which half of it is paid"),
    "token_s": (1e-7, 1e-9, 1e-5, "an SM's time per token [s]"),
    "token_byte_s": (1e-11, 1e-13, 1e-9, "the same per byte of a copy [s/byte]"),
    "copy_s": (2e-8, 1e-10, 1e-6, "an SM's time per copy over NVLink [s]"),
    "copy_byte_s": (3e-11, 1e-12, 1e-9, "the same per byte [s/byte]"),
    "nvlink_rate_fraction": (0.8, 0.3, 1.0, "share of the NVLink datasheet rate"),
}
_LOW_LATENCY_FAR: Spec = {
    "far_start_s": (4e-6, 1e-7, 2e-4, "more fixed cost where NICs take part, beside one hop [s]"),
    "far_peer_s": (2e-7, 1e-9, 5e-6, "the same for every rank behind a NIC [s]"),
    # At most what NVIDIA reaches; above 48 of 50 GB/s the PCIe behind it decides, and rows no longer tell.
    "nic_rate_fraction": (0.9, 0.3, 0.97, "share of the NIC's datasheet rate"),
}
_NORMAL_FAR: Spec = {
    "far_round_s": (2e-5, 1e-6, 2e-4, "the barriers' time per doubling of the nodes, beside one hop [s]"),
    # Held: two nodes are bound by SMs, so the rows tell only its product with the contention.
    "nic_rate_fraction": (
        0.97,
        0.97,
        0.97,
        "share of the NIC's datasheet rate: 48.5 of 50 GB/s (NVIDIA, CX7)",
    ),
    # Forwarding adds work to a copy: it takes none away.
    "far_sm_scale": (
        1.4,
        1.0,
        5.0,
        "SM time per copy of the kernel that also forwards, over the one-node kernel's",
    ),
    "nic_contention": (0.2, 1e-4, 2.0, "NIC time added by each node beyond two, on the measured fabric"),
}
_SPECS: Mapping[Kind, tuple[Spec, Spec]] = {
    "low-latency": (_LOW_LATENCY_NEAR, _LOW_LATENCY_FAR),
    "normal": (_NORMAL_NEAR, _NORMAL_FAR),
}
"""Parameters inside a node, and where NICs take part."""
_SHARE = "nvlink_rate_fraction"
_PORT_SHARE = "share of the NVLink datasheet rate: the normal kernels', which write through the same port"
_NO_FAR = {
    "far_start_s": (4e-6, "more fixed cost where NICs take part; assumed"),
    "far_peer_s": (1e-6, "the same for every peer behind a NIC; assumed"),
    "nic_rate_fraction": (0.9, "share of the NIC's datasheet rate; assumed"),
    "far_round_s": (
        2.5e-5,
        "the barriers' time per doubling of the nodes, beside one hop: as on H100; assumed",
    ),
    "far_sm_scale": (
        1.5,
        "SM time per copy of the kernel that also forwards, over the one-node kernel's; assumed",
    ),
}
_CONTENTION = "nic_contention"
_NO_CONTENTION = (
    0.0,
    "NIC time added by each node beyond two: a fabric's own, none in DeepEP's published tables (8 nodes)",
)
_HELD = (0.0, 0.0, 0.0, "NIC time added by each node beyond two: rows of two nodes do not tell")
_PCIE = ("pcie_rate_fraction", (0.75, "share of the PCIe datasheet rate, where a box has no NVLink; assumed"))


def _constants(kind: Kind) -> dict[str, tuple[float, str]]:
    taken = (20.0 if kind == "normal" else 0.0, "SMs kept from compute: the library's default, or none")
    return {"n_sms": taken, _PCIE[0]: _PCIE[1]}


@dataclass(frozen=True)
class _Level:
    """Parameters of one level (a node, or between nodes): fitted here, or taken from another profile."""

    values: dict[str, float]
    entries: dict[str, dict[str, Any]]
    """As a profile has them."""
    words: str
    """Where they are from."""
    n_rows: int = 0
    error: dict[str, Any] | None = None


def fit_table(
    rows: pd.DataFrame, *, gpu: Gpu, base: Profile | None, note: Note, source: str = ""
) -> list[dict[str, Any]]:
    """Families ``(ep_dispatch | ep_combine, deepep-*)`` of one device.

    Parameters
    ----------
    rows, gpu, note, source
        As in `calibrate.fit.gemm.fit_table`.
    base
        What this device's rows do not show is taken from it: nodes from one that was measured across nodes,
        a node's inside from one that was measured there. Contention between NICs is never taken: it is a
        fabric's own.
    """
    found: list[dict[str, Any]] = []
    odd = int((rows["n_ranks"] != GPUS_PER_NODE * rows["n_nodes"]).sum())
    if odd:
        note(f"exchange: {odd} rows not fitted: {ODD_NODES}")
        rows = rows[rows["n_ranks"] == GPUS_PER_NODE * rows["n_nodes"]]
    # normal first: low latency takes the share of the port from it
    for kind in reversed(KINDS):
        for direction in DIRECTIONS:
            here = rows[(rows["implementation"] == f"deepep-{kind}") & (rows["op"] == f"ep_{direction}")]
            if here.empty:
                continue
            if gpu.nvlink_bytes_per_s == 0:
                note(f"{direction} {kind}: {len(here)} rows not fitted: {gpu.name} has no NVLink")
                continue
            known = known_family(base, (f"ep_{direction}", f"deepep-{kind}", "any"))
            specs = _specs(kind, direction, _port_share(direction, found, base))
            found.append(_family(here, kind, direction, specs, gpu, base, known, note, source))
    strange = rows[~rows["implementation"].isin([f"deepep-{kind}" for kind in KINDS])]
    for name, part in strange.groupby("implementation"):
        note(f"exchange {name}: {len(part)} rows not fitted: no model of this library")
    return found


def _port_share(
    direction: Direction, found: Sequence[Mapping[str, Any]], base: Profile | None
) -> float | None:
    """Share of NVLink's rate that the normal kernel reaches, by the fit at hand or the base; None if unknown."""
    key = (f"ep_{direction}", "deepep-normal", "any")
    for one in found:
        if (one["op"], one["implementation"], one["dtype"]) == key:
            return float(one["parameters"][_SHARE]["value"])
    known = known_family(base, key)
    return known.parameters[_SHARE].value if known is not None and _SHARE in known.parameters else None


def _specs(kind: Kind, direction: Direction, port_share: float | None) -> tuple[Spec, Spec]:
    """Parameters of a kernel inside a node, and where NICs take part.

    On one GPU the rows of low latency tell only the sum of a byte's time on the link and on the GPU, which differ
    once NVLink is narrower. Its combine stores whole lines, as the normal kernel does, so what the port takes is
    known from there. Its dispatch does not: a message of h + h/32 + 16 bytes starts anywhere in a line of 128, and
    every store of 512 bytes touches five lines for four. That is the link's loss, so its share stays its own.
    """
    near, far = _SPECS[kind]
    if kind == "low-latency" and direction == "combine" and port_share is not None:
        near = {**near, _SHARE: (port_share, port_share, port_share, _PORT_SHARE), **_GPU_BYTE}
    return near, far


def _family(
    rows: pd.DataFrame,
    kind: Kind,
    direction: Direction,
    specs: tuple[Spec, Spec],
    gpu: Gpu,
    base: Profile | None,
    known: Family | None,
    note: Note,
    source: str,
) -> dict[str, Any]:
    near_spec, far_spec = specs
    owner = base.device if base is not None else ""
    near_rows, far_rows = rows[rows["n_nodes"] == 1], rows[rows["n_nodes"] > 1]
    if _CONTENTION in far_spec and far_rows["n_nodes"].max() == FEWEST_NODES:
        far_spec = {**far_spec, _CONTENTION: _HELD}
    constants = _constants(kind)
    given = {
        name: value for name, (value, _) in {**_NO_FAR, _CONTENTION: _NO_CONTENTION, **constants}.items()
    }

    def level(part: pd.DataFrame, spec: Spec, start: Values, groups: str) -> _Level:
        part = newest_software(part, note) if len(part) else part
        seen = seen_rows(part)
        if not seen.any():
            return _taken(spec, known, owner)
        lists = tuple(exchange_rows(part[mask], kind, direction, gpu) for mask in (seen, ~seen))
        near_to = (known, known is not None and is_blind(known, part))
        return _fitted(lists, spec, {**given, **start}, near_to, groups, provenance_text(part, source))

    near = level(near_rows, near_spec, {}, "shape")
    far = level(far_rows, far_spec, near.values, "kernel")
    fitted, taken = [one for one in (near, far) if one.n_rows], [one for one in (near, far) if not one.n_rows]
    parameters = {**near.entries, **far.entries}
    for name, (value, meaning) in ({_CONTENTION: _NO_CONTENTION} | constants).items():
        parameters.setdefault(name, {"value": value, "meaning": meaning})
    error = next((one.error for one in reversed(fitted) if one.error is not None), None)
    note(f"{direction} {kind}: {len(rows)} rows" + (f", held out {say(error)}" if error else ""))
    entry: dict[str, Any] = {
        "op": f"ep_{direction}", "implementation": f"deepep-{kind}", "dtype": "any", "parameters": parameters,
        "provenance": {
            "kind": "fitted", "data": "; ".join(one.words for one in [*fitted, *taken]),
            "n_points": sum(one.n_rows for one in fitted),
        },
    }  # fmt: skip
    return entry | ({"held_out": error} if error else {})


def _taken(spec: Spec, known: Family | None, owner: str) -> _Level:
    """A level that was not measured: another profile's, or assumed; never another fabric's contention."""
    what = "between nodes" if "nic_rate_fraction" in spec else "inside a node"
    if known is None or not set(spec) <= {*known.parameters, _CONTENTION}:
        values = {name: _NO_FAR[name][0] if name in _NO_FAR else row[0] for name, row in spec.items()}
        entries = {
            name: {"value": value, "meaning": f"{spec[name][3]}; assumed"} for name, value in values.items()
        }
        words = f"{what}: assumed"
    else:
        kept = {name: known.parameters[name] for name in spec if name != _CONTENTION}
        values = {name: one.value for name, one in kept.items()}
        entries = {name: one.model_dump(exclude_none=True) for name, one in kept.items()}
        words = f"{what}: carried over from the profile of {owner}"
    if _CONTENTION in spec:
        values[_CONTENTION] = _NO_CONTENTION[0]
        entries[_CONTENTION] = {"value": values[_CONTENTION], "meaning": _NO_CONTENTION[1]}
    return _Level(values, entries, words)


def _fitted(
    rows: tuple[list[ExchangeRows], ...],
    spec: Spec,
    given: Values,
    near_to: tuple[Family | None, bool],
    groups: str,
    words: str,
) -> _Level:
    """A level's parameters, the other's `given`, from rows (seen, held out).

    `near_to` is the family to stay near, and whether it is blind to these rows.
    """
    (seen, unseen), (known, blind) = rows, near_to
    free = {name for name, row in spec.items() if row[1] < row[2]}
    prior = {name: value for name, value in fitted_values(known).items() if name in free}
    fit = _solve(seen, spec, given, prior)
    error: dict[str, Any] | None = None
    if unseen:
        predicted = predict_exchange(unseen, {**given, **fit.values})
        error = {"split": MARKED, **ape_stats(predicted, measured_s(unseen))}
    elif len({_group(row, groups) for row in seen}) > 1:
        error = _fold_error(seen, spec, given, prior if blind else {}, groups)
    entry = family_entry(Kernel("", "", "", spec), fit, "", fit.n_rows, None)["parameters"]
    return _Level(fit.values, entry, words, fit.n_rows, error)


def _solve(rows: Sequence[ExchangeRows], spec: Spec, given: Values, prior: Values) -> LogFit:
    start = {name: prior.get(name, row[0]) for name, row in spec.items()}
    few = [row for row in rows if row.n_nodes == FEWEST_NODES]
    many = [row for row in rows if row.n_nodes > FEWEST_NODES]
    if few and many and spec.get(_CONTENTION, _HELD)[:3] != _HELD[:3]:
        # few rows of many nodes are outliers until it is near: the search would drop them
        start |= _solve(few, {**spec, _CONTENTION: _HELD}, given, prior).values
        start[_CONTENTION] = _nearest_contention(many, {**given, **start})
    return fit_log_least_squares(
        lambda values: predict_exchange(rows, {**given, **values}), measured_s(rows), start,
        {name: (row[1], row[2]) for name, row in spec.items()},
        prior=prior, prior_weight=PRIOR_WEIGHT,
        loss_scale=0.08, max_evaluations=80,
    )  # fmt: skip


def _nearest_contention(rows: Sequence[ExchangeRows], values: Values) -> float:
    """Of values a tenth apart, the one whose times are nearest to those of rows of many nodes."""
    tried = np.geomspace(1e-3, 2.0, 80)
    measured_log = np.log(measured_s(rows))
    off = [
        np.abs(np.log(predict_exchange(rows, {**values, _CONTENTION: float(c)})) - measured_log).mean()
        for c in tried
    ]
    return float(tried[int(np.argmin(off))])


def _group(row: ExchangeRows, groups: str) -> tuple[int, ...]:
    return row.key if groups == "shape" else (*row.key, row.op.n_sms)


def _fold_error(
    rows: list[ExchangeRows], spec: Spec, given: Values, prior: Values, groups: str
) -> dict[str, Any]:
    predicted, measured = [], []
    for mask in grouped_folds(np.array([_group(row, groups) for row in rows]), N_FOLDS, 0):
        unseen = [row for row, out in zip(rows, mask, strict=True) if out]
        values = _solve(
            [row for row, out in zip(rows, mask, strict=True) if not out], spec, given, prior
        ).values
        predicted.append(predict_exchange(unseen, {**given, **values}))
        measured.append(measured_s(unseen))
    columns = "hidden, top_k, n_experts" + ("" if groups == "shape" else ", n_sms")
    stats = ape_stats(np.concatenate(predicted), np.concatenate(measured))
    return {"split": f"{N_FOLDS}-fold by ({columns})", **stats}


def predict_table(rows: pd.DataFrame, *, gpu: Gpu, profile: Profile) -> Prediction:
    """Times of measured exchanges of uniform tokens; NaN with a reason where there is no model."""
    rows = rows.reset_index(drop=True)
    time_s = np.full(len(rows), np.nan)
    libraries = rows["implementation"].isin([f"deepep-{kind}" for kind in KINDS])
    why: list[str | None] = [ODD_NODES if known else "no model of this library" for known in libraries]
    for kind in KINDS:
        for direction in DIRECTIONS:
            key = (f"ep_{direction}", f"deepep-{kind}", "any")
            known = known_family(profile, key)
            for shape in exchange_rows(rows, kind, direction, gpu):
                reason = None if known else f"the profile has no family {' '.join(key)}"
                reason = f"{gpu.name} has no NVLink" if gpu.nvlink_bytes_per_s == 0 else reason
                if known and reason is None:
                    time_s[shape.places] = predict_exchange([shape], known.values())
                for place in shape.places:
                    why[place] = reason
    return Prediction(time_s, why)
