"""Collectives as programs of flows: who sends how many bytes to whom, and after what.

Flows of one leg and step run at once and share links; what a library streams in chunks (two-level exchanges,
rings) is one step. `moesim.network.playing` gives them times; all-reduces and gathers are in
`moesim.network.programs`. Bytes and conventions: docs/network.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import LayoutError, TrafficError
from moesim.network.traffic import checked_bytes, hit_fraction
from moesim.routing import ExchangeKind, Traffic
from moesim.work.ops import FloatArray

__all__ = [
    "FORMATS", "SWITCH", "Transfers", "all_to_all", "copy_bytes", "evened", "exchange_transfers", "joined",
    "pairwise", "point_to_point", "uniform_traffic",
]  # fmt: skip

IntArray = NDArray[np.int64]
SWITCH = -1
"""In place of a rank: the switch of its scale-up domain, which adds and copies (NVLS)."""
FORMATS: dict[str, tuple[float, float, float]] = {
    "bfloat16": (2.0, 0.0, 1.0),
    "fp8": (1.0, 4.0, 128.0),
    "nvfp4": (0.5, 1.0, 16.0),
    "mxfp4": (0.5, 1.0, 32.0),
}
"""Bytes of a value, bytes of a scale, values under one scale. fp8: float32 per 128 (DeepSeek-V3 report, 3.3.2);
nvfp4: E4M3 per 16 (NVIDIA); mxfp4: E8M0 per 32 (OCP MX 1.0)."""


def copy_bytes(hidden: int, dtype: str, *, header_bytes: float = 0.0) -> float:
    """Bytes of one token on the wire, scales included.

    Parameters
    ----------
    hidden
        Values of a token.
    dtype
        One of `FORMATS`.
    header_bytes
        What goes along: 16 in DeepEP's low-latency dispatch (the token's index) [bytes].

    Raises
    ------
    TrafficError
        If the format is not known.
    """
    if dtype not in FORMATS:
        raise TrafficError(
            "is no format of tokens on the wire", value=dtype, fix=f"one of {', '.join(FORMATS)}"
        )
    value, scale, block = FORMATS[dtype]
    return hidden * value + hidden / block * scale + header_bytes


@dataclass(frozen=True, eq=False)
class Transfers:
    """Flows of one collective.

    Raises
    ------
    TrafficError
        If bytes or starts are negative or not finite, or the columns differ in length.
    """

    source: IntArray
    """[n] rank that sends, or `SWITCH`."""
    target: IntArray
    """[n] rank that receives, or `SWITCH`."""
    flow_bytes: FloatArray
    """[n] [bytes]."""
    leg: IntArray
    """[n] number of its name in `legs`."""
    legs: tuple[str, ...]
    """What flows are for: ``direct``, ``rail``, ``forward``..."""
    step: IntArray
    """[n] a rank begins a step when all it sends and receives in earlier ones is there; 0 begins at `start_s`."""
    start_s: FloatArray
    """[n] when a flow of step 0 is posted; after the wait for others [s]."""

    def __post_init__(self) -> None:
        checked_bytes(self.flow_bytes, "bytes of a transfer")
        checked_bytes(self.start_s, "starts of transfers [s]")
        sizes = {
            one.shape
            for one in (self.source, self.target, self.flow_bytes, self.leg, self.step, self.start_s)
        }
        if len(sizes) != 1 or self.source.ndim != 1:
            raise TrafficError(
                "transfers have one source, target, size, leg, step and start each", value=sizes
            )

    @classmethod
    def of(
        cls, leg: str, source: ArrayLike, target: ArrayLike, flow_bytes: ArrayLike, *, step: ArrayLike = 0
    ) -> Transfers:
        """Flows of one leg, broadcast against each other; those without bytes, or to their own rank, are left out."""
        sizes = checked_bytes(flow_bytes, "bytes of a transfer")
        columns = np.broadcast_arrays(np.asarray(source), np.asarray(target), sizes, np.asarray(step))
        from_, to, size, steps = (column.ravel() for column in columns)
        kept = (size > 0) & (from_ != to)
        n = int(kept.sum())
        return cls(
            from_[kept].astype(np.int64), to[kept].astype(np.int64), size[kept].astype(np.float64),
            np.zeros(n, dtype=np.int64), (leg,), steps[kept].astype(np.int64), np.zeros(n),
        )  # fmt: skip

    def __len__(self) -> int:
        return int(self.source.size)

    def sent_bytes(self, n_ranks: int, leg: str | None = None) -> FloatArray:
        """(n_ranks,) bytes that each rank sends, in one leg or in all [bytes]."""
        return self._per_rank(self.source, n_ranks, leg)

    def received_bytes(self, n_ranks: int, leg: str | None = None) -> FloatArray:
        """(n_ranks,) the same, received [bytes]."""
        return self._per_rank(self.target, n_ranks, leg)

    def _per_rank(self, end: IntArray, n_ranks: int, leg: str | None) -> FloatArray:
        here = end >= 0
        if leg is not None:
            here &= self.leg == (self.legs.index(leg) if leg in self.legs else -1)
        return np.asarray(np.bincount(end[here], self.flow_bytes[here], n_ranks), dtype=np.float64)

    def mirrored(self) -> Transfers:
        """The way back: every flow the other way, the last step first."""
        last = int(self.step.max()) if len(self) else 0
        return replace(self, source=self.target, target=self.source, step=last - self.step)

    def on(self, ranks: ArrayLike) -> Transfers:
        """The same between other GPUs.

        Parameters
        ----------
        ranks : (n_ranks,)
            GPU of the cluster that each rank of the group is.

        Raises
        ------
        TrafficError
            If two ranks are one GPU, or the group has fewer ranks than the transfers speak of.
        """
        gpus = np.asarray(ranks, dtype=np.int64)
        if gpus.ndim != 1 or np.unique(gpus).size != gpus.size:
            raise TrafficError("ranks of a group are different GPUs", value=gpus.tolist())
        most = max(self.source.max(initial=-1), self.target.max(initial=-1))
        if most >= gpus.size:
            raise TrafficError(
                f"a group of {gpus.size} ranks has no rank {most}", fix="give every rank its GPU"
            )
        table = np.append(gpus, SWITCH)  # SWITCH reads the last
        return replace(self, source=table[self.source], target=table[self.target])


def joined(parts: Sequence[Transfers]) -> Transfers:
    """Several sets of flows as one; legs of the same name are one."""
    legs = tuple(dict.fromkeys(name for part in parts for name in part.legs))
    numbers = [np.array([legs.index(name) for name in part.legs], dtype=np.int64)[part.leg] for part in parts]
    return Transfers(
        np.concatenate([part.source for part in parts]),
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.flow_bytes for part in parts]),
        np.concatenate(numbers),
        legs,
        np.concatenate([part.step for part in parts]),
        np.concatenate([part.start_s for part in parts]),
    )


def all_to_all(pair_bytes: ArrayLike) -> Transfers:
    """All pairs at once.

    Parameters
    ----------
    pair_bytes : (n_ranks, n_ranks)
        ``[source, target]``; the diagonal stays on its rank [bytes].

    Raises
    ------
    TrafficError
        If the matrix is not square, or a size is negative or not finite.
    """
    sizes = _square(pair_bytes)
    ranks = np.arange(len(sizes))
    return Transfers.of("direct", ranks[:, None], ranks[None, :], sizes)


def pairwise(pair_bytes: ArrayLike, *, in_flight: int = 8) -> Transfers:
    """NCCL's sends and receives: in round d rank r sends to r + d, a few rounds at a time.

    Parameters
    ----------
    pair_bytes, Raises
        As `all_to_all`.
    in_flight
        Rounds that one batch of work holds (NCCL_MAX_DEV_WORK_P2P_PER_BATCH, 8).
    """
    sizes = _square(pair_bytes)
    if in_flight < 1:
        raise TrafficError("at least one round is in flight", value=in_flight)
    ranks = np.arange(len(sizes))
    round_ = (ranks[None, :] - ranks[:, None]) % max(len(sizes), 1)
    return Transfers.of(
        "direct", ranks[:, None], ranks[None, :], sizes, step=np.maximum(round_ - 1, 0) // in_flight
    )


def point_to_point(source: int, target: int, n_bytes: float) -> Transfers:
    """One send."""
    return Transfers.of("direct", [source], [target], [n_bytes])


def exchange_transfers(
    traffic: Traffic, kind: ExchangeKind, token_bytes: float, *, ranks_per_domain: int, combine: bool = False
) -> Transfers:
    """Token vectors of one dispatch, or of the combine that mirrors it.

    Parameters
    ----------
    traffic : (n_ranks, n_ranks)
        Copies of one layer, as `moesim.routing.count_batch` gives them.
    kind
        ``two_level``: a copy for each (token, domain) to the rank of the sender's index there (leg ``rail``), from
        there one to each rank that needs it (leg ``forward``), streamed; ``per_rank`` and ``per_assignment``:
        straight.
    token_bytes
        Of one copy, scales included (`copy_bytes`) [bytes].
    ranks_per_domain
        Ranks of one NVLink domain.
    combine
        Outputs go home the ways that tokens came; partial sums are joined where copies were made.

    Raises
    ------
    TrafficError
        If matrices are not of one group, or a size is negative or not finite.
    LayoutError
        If two levels would need a rank that a partial domain lacks.
    """
    copies = _square(traffic.assignments if kind == "per_assignment" else traffic.copies_per_rank)
    out = (
        _two_level(copies, _per_domain(traffic, len(copies), ranks_per_domain), token_bytes, ranks_per_domain)
        if kind == "two_level"
        else all_to_all(copies * token_bytes)
    )
    return out.mirrored() if combine else out


def _two_level(copies: FloatArray, per_domain: FloatArray, token_bytes: float, size: int) -> Transfers:
    n_domains = len(copies) // size
    ranks, domains = np.arange(len(copies)), np.arange(n_domains)
    # the rank of index i in the other domain takes what the rank of index i sends there
    entry = domains[None, :] * size + ranks[:, None] % size
    away = domains[None, :] != ranks[:, None] // size
    rail = Transfers.of("rail", ranks[:, None], entry, np.where(away, per_domain, 0.0) * token_bytes)
    # [source domain, index, target domain, index]: all domains' tokens leave the entry of their index as one stream
    forwarded = copies.reshape(n_domains, size, n_domains, size).sum(axis=0)
    from_ = domains[None, :, None] * size + np.arange(size)[:, None, None]
    to = domains[None, :, None] * size + np.arange(size)[None, None, :]
    return joined([rail, Transfers.of("forward", from_, to, forwarded * token_bytes)])


def _per_domain(traffic: Traffic, n_ranks: int, size: int) -> FloatArray:
    if n_ranks % size:
        raise LayoutError(
            f"two-level exchange has whole domains of {size} ranks", value=n_ranks,
            fix="per_rank exchange, or ep a multiple of the domain",
        )  # fmt: skip
    copies = checked_bytes(traffic.copies_per_node, "copies")
    if copies.shape != (n_ranks, n_ranks // size):
        raise TrafficError(f"copies per domain are ({n_ranks}, {n_ranks // size}) here", value=copies.shape)
    return copies


def _square(matrix: ArrayLike) -> FloatArray:
    sizes = checked_bytes(matrix, "bytes between ranks")
    if sizes.ndim != 2 or sizes.shape[0] != sizes.shape[1]:
        raise TrafficError("traffic is a square matrix, [source, target]", value=sizes.shape)
    return sizes


def uniform_traffic(
    n_tokens: float,
    *,
    n_ranks: int,
    n_experts: int,
    top_k: int,
    ranks_per_domain: int,
    distinct: tuple[float, float] | None = None,
) -> Traffic:
    """Expected copies where every expert is as likely.

    Parameters
    ----------
    n_tokens
        Tokens of each rank.
    n_ranks, ranks_per_domain
        Ranks of the group, and of one NVLink domain.
    n_experts, top_k
        Experts of the layer and different ones that a token picks.
    distinct
        Different (domains, ranks) that a token reaches, where routing is limited to groups; by default those of
        a free choice (`moesim.network.traffic.hit_fraction`).
    """
    n_domains = -(-n_ranks // ranks_per_domain)
    free = [n * hit_fraction(n, n_experts, top_k) for n in (n_domains, n_ranks)]
    nodes, ranks = distinct or (free[0], free[1])
    every = np.full((n_ranks, n_ranks), 1.0 / n_ranks)
    to_domain = np.full((n_ranks, n_domains), 1.0 / n_domains)
    return _traffic(every * n_tokens * ranks, to_domain * n_tokens * nodes, every * n_tokens * top_k)


def evened(traffic: Traffic, *, ranks_per_domain: int) -> Traffic:
    """As many copies, spread evenly: what stays on a rank, in a domain, and leaves it, each by itself.

    The same bytes cross every level, so that only the skew is gone.
    """
    n_ranks = traffic.copies_per_rank.shape[-1]
    ranks = np.arange(n_ranks)
    domain = ranks // ranks_per_domain
    pair = np.where(domain[:, None] == domain, 1, 2) - np.eye(n_ranks, dtype=int)
    to_domain = (domain[:, None] != np.arange(traffic.copies_per_node.shape[-1])).astype(int)
    return _traffic(
        _averaged(traffic.copies_per_rank, pair),
        _averaged(traffic.copies_per_node, to_domain),
        _averaged(traffic.assignments, pair),
    )


def _averaged(copies: NDArray[np.int64], classes: IntArray) -> FloatArray:
    """Each entry the mean of its class."""
    sums = np.bincount(classes.ravel(), weights=copies.ravel().astype(np.float64), minlength=3)
    sizes = np.bincount(classes.ravel(), minlength=3)
    return np.asarray((sums / np.maximum(sizes, 1))[classes])


def _traffic(per_rank: FloatArray, per_domain: FloatArray, assignments: FloatArray) -> Traffic:
    """Expected copies need not be whole."""
    whole: list[NDArray[np.int64]] = [np.asarray(one) for one in (per_rank, per_domain, assignments)]
    return Traffic(*whole)
