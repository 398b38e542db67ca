"""A step of one pipeline stage: blocks of operators, in the order in which they are issued."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from moesim.work.ops import FloatArray, Op

__all__ = ["Batch", "Block", "Node", "Step"]


@dataclass(frozen=True, eq=False)
class Batch:
    """What one attention replica is given in a step; arrays are (n_points, 1, 1)."""

    phase: Literal["prefill", "decode", "train"]
    n_sequences: FloatArray
    """Sequences on each replica."""
    n_query: FloatArray
    """New tokens of each sequence."""
    n_context: FloatArray
    """Tokens that the last of them attends to, itself included."""
    n_riding: FloatArray | float = 0.0
    """Sequences that decode one token each in the same prefill step (in-flight batching)."""
    riding_context: FloatArray | float = 1.0
    """Tokens that each of those attends to."""

    @classmethod
    def of(
        cls,
        phase: Literal["prefill", "decode", "train"],
        n_sequences: object,
        n_query: object,
        n_context: object,
        n_riding: object = 0.0,
        riding_context: object = 1.0,
    ) -> Batch:
        """Make a batch from scalars or (n_points,) arrays."""
        given = (n_sequences, n_query, n_context, n_riding, riding_context)
        columns = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, dtype=float)) for x in given))
        return cls(phase, *(column.reshape(-1, 1, 1) for column in columns))

    @property
    def n_points(self) -> int:
        """Workload sizes held."""
        return int(self.n_sequences.shape[0])

    @property
    def n_tokens(self) -> FloatArray:
        """(n_points, 1, 1) new tokens on each replica."""
        return np.asarray(self.n_sequences * self.n_query + self.n_riding)

    @property
    def n_rows_out(self) -> FloatArray:
        """(n_points, 1, 1) sequences that get a new token on each replica."""
        return np.asarray(self.n_sequences + self.n_riding)

    @property
    def riders(self) -> Batch | None:
        """The sequences that decode in a prefill step, as a batch of their own; None where there are none."""
        if not np.any(self.n_riding):
            return None
        ones = np.ones_like(self.n_sequences)
        return Batch("decode", ones * self.n_riding, ones, ones * self.riding_context)

    def share(self, fraction: float) -> Batch:
        """Return a micro-batch: this fraction of the sequences, or of the tokens of a lone prompt."""
        if self.phase == "prefill":
            whole = np.maximum(self.n_sequences * fraction, 1.0)
            query = self.n_sequences * self.n_query * fraction / whole
            # pieces of one prompt end at different tokens: the mean keeps the sum of (query, key) pairs
            seen = self.n_context - (self.n_query - query) / 2
            riding = self.n_riding * fraction
            return replace(self, n_sequences=whole, n_query=query, n_context=seen, n_riding=riding)
        return replace(self, n_sequences=self.n_sequences * fraction)


@dataclass(frozen=True, eq=False)
class Node:
    """One operator of a block."""

    name: str
    op: Op
    category: str
    """What its time is booked under."""
    stream: str = "compute"
    after: tuple[str, ...] | None = None
    """Nodes of the same block and micro-batch that must end first; None = the one before it."""
    micro: int = 0
    """Micro-batch."""


@dataclass(frozen=True, eq=False)
class Block:
    """Operators that run once for each of `layers`; their arrays' second axis runs over these."""

    name: str
    layers: tuple[int, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """Blocks, and the order in which their repeats run."""

    blocks: tuple[Block, ...]
    order: tuple[tuple[int, int], ...]
    """(block, repeat) pairs."""
    n_points: int
    n_ranks: int
