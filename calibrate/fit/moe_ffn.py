"""Fit the expert feed-forward of each library, device and weight format.

``python -m calibrate.fit.moe_ffn DATA_DIR -o moesim/catalog/profiles`` reads
``DATA_DIR/measured/moe_ffn.parquet`` and writes one fragment of a profile a device. The model is
`moesim.cost.expert_ffn`; docs/fits/moe_ffn.md tells what the numbers mean and how wrong they are.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from calibrate.fit.common import FloatArray, LogFit, fit_log_least_squares, grouped_folds, write_fragment
from calibrate.fit.moe_load import IntArray, tokens_per_expert_of_row
from calibrate.statistics import ape_stats
from moesim.cost.expert_ffn import ExpertFfnParameters, RowTiles, ffn_time_s, tile_rows_for
from moesim.hardware.catalog import load_gpu
from moesim.hardware.gpu import Gpu

__all__ = ["FAMILIES", "MeasuredFamily", "MeasuredRows", "main", "sample_rows", "tokens_per_expert_of_row"]

DEVICES = ("h200-sxm", "h100-sxm")
"""In order of the shapes measured: the second starts from, and stays near, the first's parameters."""
SHAPE = ["hidden", "intermediate", "top_k", "n_experts"]
N_DRAWS = 3
"""Draws of a power-law load that a prediction averages over; the measurement took the mean of 5 others."""
_TILE_HEIGHTS = 2.0 ** np.arange(3, 9)
"""Every tile height that a fit may try [rows]."""


@dataclass(frozen=True)
class MeasuredFamily:
    """One library's kernel in one weight format."""

    implementation: str
    """Name in the profile."""
    dtype: str
    """Weight format."""
    table: str
    """Name in the measured table."""
    deepep_layout: bool = False
    """Rows arrive sorted by expert."""


FAMILIES = (
    *(
        MeasuredFamily("sglang-triton", d, "sglang:sglang_fused_moe_triton")
        for d in ("bfloat16", "fp8_block", "w4a16_mxfp4")
    ),
    MeasuredFamily("vllm-triton", "bfloat16", "vllm:vllm_unquantizedfusedmoe_triton_tritonexperts"),
    MeasuredFamily("vllm-triton", "fp8_block", "vllm:vllm_fp8moe_triton_tritonexperts"),
    MeasuredFamily(
        "vllm-triton", "w4a16_mxfp4", "vllm:vllm_gptossmxfp4moe_triton_oaitritonmxfp4expertsmonolithic"
    ),
    *(
        MeasuredFamily("trtllm-cutlass", d, "trtllm:moe_torch_flow_cutlass")
        for d in ("bfloat16", "fp8", "fp8_block")
    ),
    MeasuredFamily("trtllm-cutlass", "w4a16_mxfp4", "trtllm:moe_torch_flow"),
    MeasuredFamily("vllm-cutlass", "fp8", "vllm:vllm_modeloptfp8moe_flashinfer_cutlass_flashinferexperts"),
    MeasuredFamily("vllm-cutlass", "fp8_block", "vllm:vllm_fp8moe_flashinfer_cutlass_flashinferexperts"),
    MeasuredFamily("sglang-cutlass", "bfloat16", "sglang:sglang_flashinfer_cutlass_moe"),
    MeasuredFamily("sglang-deepep-context", "fp8_block", "sglang:wideep_context", deepep_layout=True),
    MeasuredFamily("sglang-deepep-decode", "fp8_block", "sglang:wideep_generation", deepep_layout=True),
)

FREE: dict[str, tuple[float, float, float]] = {
    "launch_s": (15e-6, 1e-6, 1e-3),
    "ramp_s": (3e-7, 1e-9, 2e-5),
    "hbm_fraction": (0.8, 0.05, 0.96),
    "flops_fraction": (0.6, 0.05, 1.0),
    "tile_overhead_rows": (32.0, 1.0, 500.0),
    "tile_latency_s": (1e-6, 1e-8, 5e-5),
    "wave_quantisation": (0.5, 0.01, 1.0),
    "stream_quantisation": (0.3, 1e-3, 1.0),
    "overlap_power": (2.0, 1.0, 12.0),
    "reread_fraction": (0.05, 1e-4, 1.0),
    "local_traffic_fraction": (0.5, 0.02, 3.0),
    "remote_traffic_fraction": (0.5, 0.02, 100.0),
    "slot_s": (1e-8, 1e-11, 2e-6),
}
"""First guess, lower and upper bound of each fitted parameter."""

PRIOR_WEIGHT = 8.0
"""How strongly the second device's parameters stay near the first's; see `fit_log_least_squares`."""

HELD: dict[str, float] = {
    "host_s": 0.0,
    "tile_by_group": 0.0,
    "tile_fill": 1.0,
    "tile_rows_min": 16.0,
    "tile_rows_max": 128.0,
    "tile_columns": 128.0,
}
"""Parameters that are chosen from a few values, or given, instead of fitted."""


@dataclass(frozen=True, eq=False)
class MeasuredRows:
    """Rows of the measured table with the token draws behind each, reduced to what the cost reads."""

    table: pd.DataFrame
    """One measurement a row."""
    rows: FloatArray
    """[n, N_DRAWS] rows on the rank."""
    active: FloatArray
    """[n, N_DRAWS] slots with a row."""
    tiles: FloatArray
    """[tile heights, n, N_DRAWS] tiles at each height that a fit may try."""
    n_slots: FloatArray
    """[n, 1] slots on the rank."""

    @classmethod
    def of(cls, table: pd.DataFrame) -> MeasuredRows:
        """Draw the loads of every row of `table`."""
        table = table.reset_index(drop=True)
        rows, active, slots = (np.zeros((len(table), width)) for width in (N_DRAWS, N_DRAWS, 1))
        tiles = np.zeros((_TILE_HEIGHTS.size, len(table), N_DRAWS))
        keys = table[["n_tokens", "top_k", "n_experts", "ep", "load"]].itertuples(index=False)
        for i, key in enumerate(keys):
            summaries = _summaries(*key)
            for draw in range(N_DRAWS):
                summary = summaries[draw % len(summaries)]
                rows[i, draw], active[i, draw], slots[i, 0] = summary[:3]
                tiles[:, i, draw] = summary[3:]
        return cls(table, rows, active, tiles, slots)

    def where(self, mask: NDArray[np.bool_]) -> MeasuredRows:
        """Rows of `mask` only."""
        return MeasuredRows(
            self.table[mask], self.rows[mask], self.active[mask], self.tiles[:, mask], self.n_slots[mask]
        )

    @cached_property
    def latency_s(self) -> FloatArray:
        """[n] measured times [s]."""
        return np.asarray(self.table["latency_s"], dtype=float)

    @cached_property
    def shapes(self) -> IntArray:
        """[n, 4] hidden, intermediate, top_k, experts: what a fold holds out together."""
        return np.asarray(self.table[SHAPE], dtype=np.int64)

    @cached_property
    def n_up(self) -> FloatArray:
        """[n, 1] matrices before the activation: Nemotron's experts (squared ReLU, top-22) are not gated."""
        return np.where(self._column("top_k") == 22, 1.0, 2.0)

    def predict(self, values: Mapping[str, float], *, gpu: Gpu, family: MeasuredFamily) -> FloatArray:
        """[n] times [s] under `values`, the mean over the draws."""
        params = ExpertFfnParameters.from_values(values)
        n_tokens, top_k = self._column("n_tokens"), self._column("top_k")
        pairs = self.rows if family.deepep_layout else n_tokens * top_k
        height = tile_rows_for(self.rows, pairs, self.n_slots, params)
        index = np.searchsorted(_TILE_HEIGHTS, height)
        tiles = np.take_along_axis(self.tiles, index[None], axis=0)[0]
        time_s = ffn_time_s(
            RowTiles(self.rows, self.active, tiles, height, self.n_slots),
            n_tokens=n_tokens,
            hidden=self._column("hidden"),
            intermediate=self._column("intermediate") / self._column("tp"),
            top_k=top_k,
            dtype=family.dtype,
            n_up=self.n_up,
            deepep_layout=family.deepep_layout,
            n_passes=1,
            gpu=gpu,
            params=params,
        )
        return np.asarray(time_s.mean(axis=1))

    def _column(self, name: str) -> FloatArray:
        return np.asarray(self.table[name], dtype=float)[:, None]


@lru_cache(maxsize=65536)
def _summaries(n_tokens: int, top_k: int, n_experts: int, ep: int, load: str) -> list[list[float]]:
    draws = tokens_per_expert_of_row(n_tokens, top_k, n_experts, ep, load, N_DRAWS)
    return [_summary(draw) for draw in draws]


def _summary(tokens: IntArray) -> list[float]:
    tiles = np.ceil(tokens[None, :] / _TILE_HEIGHTS[:, None]).sum(axis=1)
    return [float(tokens.sum()), float(np.count_nonzero(tokens)), float(tokens.size), *tiles.tolist()]


def rows_of(table: pd.DataFrame, family: MeasuredFamily, device: str) -> pd.DataFrame:
    """Rows of one family on one device that mean what the model means.

    Notes
    -----
    `sglang:wideep_context` with a uniform load gives DeepGEMM's contiguous layout counts that are not padded
    to its 128-row blocks, so that below 128 tokens an expert most experts are never multiplied (1 token for
    each of 128 experts is timed at a third of what reading their weights takes): those rows are left out.
    """
    same_kernel = (table["implementation"] == family.table) & (table["dtype"] == family.dtype)
    found = table[(table["device"] == device) & same_kernel]
    if family.implementation == "sglang-deepep-context":
        mean_rows = found["n_tokens"] * found["top_k"] / found["n_experts"]
        found = found[(found["load"] != "uniform") | (mean_rows % 128 == 0)]
    return found


def sample_rows(table: pd.DataFrame, n_rows: int, seed: int) -> pd.DataFrame:
    """At most `n_rows`, the same number of each shape as far as there are."""
    share = max(1, n_rows // max(1, table.groupby(SHAPE).ngroups))
    shuffled = table.sample(frac=1.0, random_state=seed)
    return shuffled[shuffled.groupby(SHAPE).cumcount() < share]


def _choices(family: MeasuredFamily) -> Iterator[dict[str, float]]:
    """Held parameters to try; DeepGEMM's contiguous layout pads to 128 rows by its interface."""
    if family.implementation == "sglang-deepep-context":
        for columns in (64.0, 128.0):
            yield HELD | {"host_s": 3.7e-4, "tile_rows_min": 128.0, "tile_columns": columns}
        return
    ranges = ((16.0, 64.0), (16.0, 128.0), (64.0, 64.0), (64.0, 128.0))
    by_group = (0.0,) if family.deepep_layout else (0.0, 1.0)
    for (low, high), group, columns in itertools.product(ranges, by_group, (64.0, 128.0)):
        yield HELD | {
            "tile_rows_min": low, "tile_rows_max": high, "tile_by_group": group, "tile_columns": columns
        }  # fmt: skip


def _fit(
    rows: MeasuredRows, gpu: Gpu, family: MeasuredFamily, held: Mapping[str, float],
    start: Mapping[str, float] | None = None, evaluations: int = 30, prior: Mapping[str, float] | None = None,
) -> LogFit:  # fmt: skip
    """Fit the free parameters, the others held; `host_s` is free where it is not zero."""
    first = {name: (start or {}).get(name, guess) for name, (guess, _, _) in FREE.items()}
    bounds = {name: (low, high) for name, (_, low, high) in FREE.items()}
    held = dict(held)
    if held["host_s"] > 0:
        first["host_s"] = held.pop("host_s")
        bounds["host_s"] = (1e-4, 1e-3)
    if family.deepep_layout:
        held["remote_traffic_fraction"] = 1.0
        first.pop("remote_traffic_fraction", None)
    return fit_log_least_squares(
        lambda values: rows.predict({**held, **values}, gpu=gpu, family=family),
        rows.latency_s,
        {name: value for name, value in first.items() if name not in held},
        bounds,
        prior=prior,
        prior_weight=PRIOR_WEIGHT,
        max_evaluations=evaluations,
    )


def _held_out(
    fit_rows: MeasuredRows, check_rows: MeasuredRows, gpu: Gpu, family: MeasuredFamily,
    held: Mapping[str, float], start: Mapping[str, float], prior: Mapping[str, float] | None,
) -> dict[str, Any]:  # fmt: skip
    """Error on shapes that the fit did not see; where there is one shape only, on rank counts."""
    by_ep = len(np.unique(check_rows.shapes, axis=0)) < 3
    keys = check_rows.table[[*SHAPE, "ep", "tp"] if by_ep else SHAPE].to_numpy()
    fit_keys = fit_rows.table[[*SHAPE, "ep", "tp"] if by_ep else SHAPE].to_numpy()
    predicted = np.zeros(len(keys))
    for fold in grouped_folds(keys, 5, seed=0):
        hidden_keys = {tuple(key) for key in keys[fold]}
        train = fit_rows.where(np.array([tuple(key) not in hidden_keys for key in fit_keys]))
        fit = _fit(train, gpu, family, held, start, evaluations=15, prior=prior)
        values = {**_full(held, family), **fit.values}
        predicted[fold] = check_rows.predict(values, gpu=gpu, family=family)[fold]
    split = "5-fold by (hidden, intermediate, top_k, n_experts"
    split += ", ep, tp): too few shapes" if by_ep else ")"
    return {"split": split, **ape_stats(predicted, check_rows.latency_s)}


def _full(held: Mapping[str, float], family: MeasuredFamily) -> dict[str, float]:
    return {"remote_traffic_fraction": 1.0, **held} if family.deepep_layout else dict(held)


def fit_family(
    table: pd.DataFrame, gpu: Gpu, family: MeasuredFamily, prior: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Choose tiles, fit, hold out; returns one family of a profile.

    Parameters
    ----------
    table
        The measured table.
    gpu
        Device whose rows are fitted.
    family
        Which rows.
    prior
        Parameters of the same family on another device: its tiles are taken, its values kept where this
        device's few shapes do not say otherwise.
    """
    found = rows_of(table, family, gpu.name)
    fit_rows = MeasuredRows.of(sample_rows(found, 2500, seed=0))
    few = MeasuredRows.of(sample_rows(found, 1000, seed=1))
    choices = [{name: prior[name] for name in HELD}] if prior else list(_choices(family))
    tried = [(_fit(few, gpu, family, held, prior, 20, prior), held) for held in choices]
    best, held = min(tried, key=lambda pair: pair[0].cost)
    fit = _fit(fit_rows, gpu, family, held, best.values, prior=prior)
    check_rows = MeasuredRows.of(sample_rows(found, 6000, seed=2))
    software = ", ".join(sorted(found["software"].unique()))
    source = f"AIConfigurator silicon database @095f58a51 (Apache-2.0): moe_ffn, {gpu.name}, {software}, "
    kept = f", kept near {DEVICES[0]}'s values" if prior else ""
    return {
        "op": "moe_ffn",
        "implementation": family.implementation,
        "dtype": family.dtype,
        "parameters": _described({**_full(held, family), **fit.values}, fit.stderr),
        "provenance": {
            "kind": "fitted",
            "data": f"{source}{family.table}; {len(found)} rows, of which {fit.n_rows} fitted{kept}",
            "n_points": fit.n_rows,
        },
        "held_out": _held_out(fit_rows, check_rows, gpu, family, held, fit.values, prior),
    }


def _described(values: Mapping[str, float], stderr: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    described = {}
    for field in fields(ExpertFfnParameters):
        entry: dict[str, Any] = {"value": values[field.name], "meaning": MEANINGS[field.name]}
        if field.name in stderr:
            entry["stderr"] = stderr[field.name]
        else:
            entry["meaning"] += " (held)"
        described[field.name] = entry
    return described


MEANINGS = {
    "launch_s": "launches and dependencies of one call",
    "ramp_s": "added by each doubling of the (token, expert) pairs",
    "hbm_fraction": "share of the memory peak at which weights stream",
    "flops_fraction": "share of the matrix peak inside a tile",
    "tile_overhead_rows": "rows' worth of time that a tile costs beside its rows",
    "tile_latency_s": "prologue and epilogue of one wave of tiles",
    "wave_quantisation": "how far SMs idle in the last wave, compute",
    "stream_quantisation": "how far idle SMs lower the memory rate",
    "overlap_power": "norm that joins compute and memory",
    "reread_fraction": "share of a weight fetched again by each further tile of rows",
    "local_traffic_fraction": "share of the memory peak of permute, activation and combine",
    "remote_traffic_fraction": "the same for pairs whose expert is elsewhere",
    "slot_s": "scheduling of one expert slot in one product",
    "host_s": "host time of a call that is not hidden",
    "tile_by_group": "tiles chosen by the rank's rows (0) or the whole group's (1)",
    "tile_fill": "tile height over mean rows a slot",
    "tile_rows_min": "shortest tile",
    "tile_rows_max": "tallest tile",
    "tile_columns": "width of a tile",
}


def main(arguments: list[str] | None = None) -> None:
    """Fit every family that the data has, one device after another."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    table = pd.read_parquet(chosen.data_dir / "measured" / "moe_ffn.parquet")
    priors: dict[MeasuredFamily, dict[str, float]] = {}
    for gpu in map(load_gpu, DEVICES):
        fitted = []
        for family in FAMILIES:
            if len(rows_of(table, family, gpu.name)):
                fitted.append(fit_family(table, gpu, family, priors.get(family)))
                parameters = fitted[-1]["parameters"]
                priors[family] = {name: entry["value"] for name, entry in parameters.items()}
                error = fitted[-1]["held_out"]
                print(
                    f"{gpu.name} {family.implementation} {family.dtype}: "
                    f"{error['median_ape']:.1%} median, {error['p90_ape']:.1%} p90, bias {error['bias']:+.1%}"
                )
        write_fragment(chosen.output / f"{gpu.name}.moe_ffn.yaml", gpu.name, fitted)


if __name__ == "__main__":
    main()
