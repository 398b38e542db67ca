"""Every term of a result: formula, inputs, parameters, and where the parameters are from."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.errors import ScenarioError
from moesim.hardware.profile import Family, Profile
from moesim.plan.outcome import Outcome
from moesim.plan.steps import Pass
from moesim.work.ops import Op
from moesim.work.step import Block, Node

__all__ = ["explain", "families_used"]

FORMULAS = {
    "gemm": "launch + smooth max(tiles over SMs in waves x time of a tile, bytes / HBM)",
    "moe_ffn": "launch + up and down products (tiles of each expert's rows in waves, against the weights of active "
    "experts / HBM) + rows permuted, activated and combined / HBM",
    "attention_prefill": "launch + smooth max(4 x pairs seen x heads x width / FLOP rate, bytes / HBM)",
    "attention_decode": "launch + smooth max(cached bytes / HBM, products / FLOP rate), split over SMs",
    "elementwise": "kernels x launch + bytes moved / HBM",
    "router": "gate product + top-k kernel",
    "host": "step + sequences x per sequence",
    "all_reduce": "min(engine's one-shot or two-shot kernel, NCCL): start + wire bytes / link",
    "all_gather": "start + wire bytes / link, three regimes",
    "reduce_scatter": "start + wire bytes / link, three regimes",
    "all_to_all": "start + busiest port's bytes / link",
    "ep_dispatch": "start + smooth max(NVLink bytes, NIC bytes, SM work) + after",
    "ep_combine": "start + smooth max(NVLink bytes, NIC bytes, SM work) + after",
    "send_recv": "start + bytes / link",
    "pcie": "start + steps of a ring + wire bytes / (fraction x PCIe)",
    "inter_node": "start + hops + wire bytes / (fraction x NIC), against what the node's own links take",
}
"""One line each; the equations are in docs/fits."""


def explain(outcome: Outcome, point: int = 0) -> dict[str, Any]:
    """Terms of one size of an outcome, as plain values.

    Returns
    -------
    dict
        ``passes``: for each step that the result is made of, ``terms``: name, how often it runs, seconds
        (mean over ranks and the busiest rank's, alone), share, inputs, formula, family; and ``beside``, the
        families that say how terms that overlap slow one another. Of training, terms are of the
        whole step: all micro-batches of both passes, and in an entry ``step`` what comes on top, wait and bubble
        included; all of them add up to the step, and shares are of it. ``families``: parameters
        with errors, provenance and held-out error by name. ``memory``: items of the fullest rank.
        ``summary``: how the result follows from the steps.

    Raises
    ------
    ScenarioError
        If the workload is one whose steps are not kept, or there is no such size.
    """
    if not 0 <= point < outcome.n_points:
        raise ScenarioError("there is no such size", value=point, fix=f"0 to {outcome.n_points - 1}")
    if not outcome.passes:
        raise ScenarioError(
            "has no terms to explain yet", value=",".join(outcome.workload), fix="use moesim run"
        )
    families: dict[str, Any] = {}
    passes = []
    for name, one in outcome.passes.items():
        at = one.row(point)
        terms = _terms(one, at, families)
        step_s = float(one.period_s[at])
        if outcome.pass_times is not None:
            step_s = _repeated(one, terms, float(outcome.pass_times[point]), at, float(outcome.step_s[point]))
        for family in one.timed.beside:
            families.setdefault(_name(family), _family(family))
        beside = [_name(family) for family in one.timed.beside]
        passes.append({"name": name, "step_s": step_s, "terms": terms, "beside": beside})
    if outcome.step_terms:
        passes.append(_rest(outcome, point, families))
    first = next(iter(outcome.passes.values()))
    profile = first.timed.pricer.profile
    return {
        "device": outcome.case.cluster.gpu.name,
        "profile": _profile(profile),
        "summary": outcome.how,
        "passes": passes,
        "families": families,
        "memory_bytes": {key: float(values[point]) for key, values in outcome.memory_bytes.items()},
        "gpu_sources": dict(outcome.case.cluster.gpu.sources),
    }


def _repeated(one: Pass, terms: list[dict[str, Any]], n_micro: float, point: int, step_s: float) -> float:
    """Turn the terms of one micro-batch, all stages of it, into a rank's in a whole step; return the pass's time."""
    share = n_micro / one.case.layout.pp
    for term in terms:
        term["times"] = term["times"] * n_micro / one.case.layout.pp
        term["times"] = int(term["times"]) if term["times"] == int(term["times"]) else term["times"]
        term["seconds"] *= share
        term["seconds_busiest_rank"] *= share
        term["share"] = term["seconds"] / step_s
    return float(one.stage_s[:, point].sum()) * share


def _rest(outcome: Outcome, point: int, families: dict[str, Any]) -> dict[str, Any]:
    """What comes on top of the passes' kernels; its entry has the whole step's time."""
    step_s = float(outcome.step_s[point])
    terms = []
    for part in outcome.step_terms:
        for family in part.families:
            families.setdefault(_name(family), _family(family))
        terms.append(
            {
                "name": part.name,
                "micro_batch": 0,
                "operator": type(part.op).__name__ if part.op is not None else "",
                "category": part.category,
                "stream": "comm" if part.category in ("gradients", "weight_gather") else "compute",
                "times": int(part.times[point]),
                "seconds": float(part.seconds[point]),
                "seconds_busiest_rank": float(part.seconds_busiest_rank[point]),
                "formula": FORMULAS.get(part.families[0].op, "") if part.families else part.note,
                "inputs": _inputs(part.op, 0) if part.op is not None else {},
                "families": [_name(family) for family in part.families],
                "share": float(part.seconds[point]) / step_s,
            }
        )
    return {"name": "step", "step_s": step_s, "terms": terms}


def families_used(outcome: Outcome) -> list[dict[str, str]]:
    """Provenance of every family behind an outcome, for a table."""
    found: dict[str, Family] = {}
    for one in outcome.passes.values():
        for block in one.timed.step.blocks:
            for node in block.nodes:
                for family in one.timed.pricer.families(node.op):
                    found[_name(family)] = family
        found |= {_name(family): family for family in one.timed.beside}
    for part in outcome.step_terms:
        found |= {_name(family): family for family in part.families}
    return [
        {
            "what": name,
            "kind": family.provenance.kind,
            "data": family.provenance.data,
            "held_out": _held_out(family),
        }
        for name, family in sorted(found.items())
    ]


def _held_out(family: Family) -> str:
    error = family.held_out
    said = f"{error.median_ape:.1%} median, {error.p90_ape:.1%} p90" if error else "not measured"
    return f"{said}; doubtful: {family.provenance.doubts}" if family.provenance.doubts else said


def _profile(profile: Profile) -> str:
    if profile.carried_from is None:
        return f"fitted on {profile.device}"
    return f"uncalibrated: efficiencies of {profile.carried_from} on {profile.device}'s datasheet"


def _terms(one: Pass, point: int, families: dict[str, Any]) -> list[dict[str, Any]]:
    terms = []
    for block, times in zip(one.timed.step.blocks, one.timed.seconds, strict=True):
        for node, seconds in zip(block.nodes, times, strict=True):
            terms.append(_term(one, block, node, seconds[min(point, len(seconds) - 1)], point, families))
    total = sum(term["seconds"] for term in terms) or 1.0
    for term in terms:
        term["share"] = term["seconds"] / total
    return terms


def _term(
    one: Pass, block: Block, node: Node, seconds: np.ndarray, point: int, families: dict[str, Any]
) -> dict[str, Any]:
    """`seconds` is (n_layers or 1, n_ranks or 1)."""
    repeats = len(block.layers)
    per_rank = seconds.sum(axis=0) * (repeats if seconds.shape[0] == 1 else 1)
    used = one.timed.pricer.families(node.op)
    for family in used:
        families.setdefault(_name(family), _family(family))
    return {
        "name": f"{block.name}.{node.name.rsplit('.', 1)[0]}",
        "micro_batch": node.micro,
        "operator": type(node.op).__name__,
        "category": node.category,
        "stream": node.stream,
        "times": repeats,
        "seconds": float(per_rank.mean()),
        "seconds_busiest_rank": float(per_rank.max()),
        "formula": FORMULAS.get(used[0].op, ""),
        "inputs": _inputs(node.op, point),
        "families": [_name(family) for family in used],
    }


def _inputs(op: Op, point: int) -> dict[str, Any]:
    """An operator's sizes; arrays over layers and ranks as their mean and largest."""
    given: dict[str, Any] = {}
    for name, value in vars(op).items():
        if not isinstance(value, np.ndarray):
            given[name] = value
            continue
        own = value[min(point, len(value) - 1)]
        mean, most = float(own.mean()), float(own.max())
        given[name] = mean if mean == most else {"mean": mean, "max": most}
    return given


def _name(family: Family) -> str:
    return f"{family.op} / {family.implementation} / {family.dtype}"


def _family(family: Family) -> dict[str, Any]:
    return family.model_dump(mode="json", exclude={"op", "implementation", "dtype"})
