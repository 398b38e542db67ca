"""Runs of consecutive tokens out of a trace, few enough to hold in memory, from all over it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.routing.mapped import take_rows
from moesim.routing.trace import RoutingTrace

__all__ = ["TokenRuns", "token_runs"]

IndexArray = NDArray[np.int64]

LARGEST_IDS = 2**25
"""Ids held [count]: 33 MB for up to 256 experts."""
RUN_TOKENS = 512
"""Tokens of a run, where not all of a trace is held."""


@dataclass(frozen=True, eq=False)
class TokenRuns:
    """Runs of tokens, each within one sequence, in the order of the trace.

    Parameters
    ----------
    ids : (n_tokens, n_layers, top_k)
        Experts of the tokens, one run behind the other.
    bounds : (n_runs + 1,)
        First token of each run in `ids`, and the end.
    sequences : (n_runs,)
        Sequence of the trace that each run is from.
    n_experts
        Experts per layer.
    is_whole
        Whether these are all tokens of the trace, run by run its sequences.
    """

    ids: NDArray[Any]
    bounds: IndexArray
    sequences: IndexArray
    n_experts: int
    is_whole: bool

    @property
    def n_tokens(self) -> int:
        """Tokens held."""
        return int(self.ids.shape[0])

    @property
    def n_runs(self) -> int:
        """Runs held."""
        return int(self.sequences.size)

    @cached_property
    def run_of(self) -> IndexArray:
        """Run of each token: (n_tokens,)."""
        return np.repeat(np.arange(self.n_runs), np.diff(self.bounds))

    def counts_by(self, label: IndexArray, n_labels: int) -> IndexArray:
        """Tokens per (label, layer, expert), of tokens labelled 0..n_labels - 1; others are left out.

        Parameters
        ----------
        label : (n_tokens,)
            Label of each token, below 0 for none.
        n_labels
            Labels.

        Returns
        -------
        (n_labels, n_layers, n_experts)
            Counts.
        """
        n_layers = self.ids.shape[1]
        size = n_layers * self.n_experts
        base = np.arange(n_layers)[None, :, None] * self.n_experts
        total = np.zeros(n_labels * size, dtype=np.int64)
        step = max(1, 2**18 // self.ids[:1].size)
        for start in range(0, self.n_tokens, step):
            here = label[start : start + step]
            at = (here[:, None, None] * size + base) + self.ids[start : start + step]
            total += np.bincount(at[here >= 0].ravel(), minlength=total.size)
        return total.reshape(n_labels, n_layers, self.n_experts)


def token_runs(trace: RoutingTrace, *, largest_ids: int = LARGEST_IDS) -> TokenRuns:
    """Read runs of tokens: all of a trace, or evenly spaced ones of a long one.

    Parameters
    ----------
    trace
        Token level.
    largest_ids
        Ids held at most [count].

    Notes
    -----
    Of a long trace, runs of up to 512 tokens begin at evenly spaced tokens, so that longer sequences are
    met more often, as their tokens are. A run ends with its sequence.
    """
    ids = np.asanyarray(trace.expert_ids)
    offsets = trace.offsets
    if ids.size <= largest_ids:
        return TokenRuns(
            take_rows(ids, np.arange(len(ids))), offsets, np.arange(offsets.size - 1), trace.n_experts, True
        )
    lengths = np.diff(offsets)
    mean_run = float((np.minimum(lengths, RUN_TOKENS) * lengths).sum() / lengths.sum())
    n_runs = max(1, int(largest_ids / ids[:1].size / mean_run))
    at = np.linspace(0, trace.n_tokens, n_runs, endpoint=False).astype(np.int64)
    sequence = np.searchsorted(offsets, at, side="right") - 1
    start = np.unique(np.maximum(offsets[sequence], np.minimum(at, offsets[sequence + 1] - RUN_TOKENS)))
    sequence = np.searchsorted(offsets, start, side="right") - 1
    size = np.minimum(offsets[sequence + 1] - start, RUN_TOKENS)
    bounds = np.concatenate([[0], np.cumsum(size)])
    rows = np.arange(bounds[-1]) + np.repeat(start - bounds[:-1], size)
    return TokenRuns(take_rows(ids, rows), bounds, sequence, trace.n_experts, False)
