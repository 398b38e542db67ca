"""What a batch loads: tokens per slot, active experts, and who sends what to whom.

A token bound for several experts of one rank (or one node) may travel once; every matrix here says
whether it counts such copies once or singly.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import LayoutError
from moesim.routing.placement import Placement

__all__ = [
    "EXCHANGE_KINDS",
    "BatchCount",
    "Exchange",
    "ExchangeKind",
    "Traffic",
    "count_batch",
    "exchange_counts",
]

CountArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
ExchangeKind = Literal["two_level", "per_rank", "per_assignment"]
EXCHANGE_KINDS: tuple[ExchangeKind, ...] = ("two_level", "per_rank", "per_assignment")


@dataclass(frozen=True, eq=False)
class Traffic:
    """Copies of tokens between ranks, own rank and own node included.

    Parameters
    ----------
    copies_per_rank : (..., n_ranks, n_ranks)
        ``[source, destination]`` tokens, each counted once per destination rank.
    copies_per_node : (..., n_ranks, n_nodes)
        ``[source, destination]`` tokens, each counted once per destination node.
    assignments : (..., n_ranks, n_ranks)
        ``[source, destination]`` (token, expert) pairs: nothing de-duplicated.
    """

    copies_per_rank: CountArray
    copies_per_node: CountArray
    assignments: CountArray


@dataclass(frozen=True, eq=False)
class Exchange:
    """Token copies that each rank sends and receives in one dispatch; own rank not counted.

    Every field has shape (..., n_layers, n_ranks) [copies]. ``nvlink`` is within a domain, ``nic``
    between domains. Combine runs the other way: swap sent and received.
    """

    sent_nvlink: FloatArray
    received_nvlink: FloatArray
    sent_nic: FloatArray
    received_nic: FloatArray

    def scaled(self, factor: FloatArray | float) -> Exchange:
        """Every figure times a factor, broadcast against the fields."""
        return Exchange(*(getattr(self, f.name) * factor for f in fields(self)))


@dataclass(frozen=True, eq=False)
class BatchCount:
    """Load of one batch, or of several nested ones on a leading axis.

    Parameters
    ----------
    tokens_per_slot : (..., n_layers, n_ranks, slots_per_rank)
        Tokens that each expert slot processes.
    traffic
        Copies between ranks.
    """

    tokens_per_slot: CountArray
    traffic: Traffic

    @property
    def active_experts(self) -> CountArray:
        """Slots with at least one token, on each rank: (..., n_layers, n_ranks)."""
        return np.asarray((self.tokens_per_slot > 0).sum(-1))

    @property
    def tokens_per_rank(self) -> CountArray:
        """(token, expert) pairs that each rank processes: (..., n_layers, n_ranks)."""
        return np.asarray(self.tokens_per_slot.sum(-1))


def count_batch(
    ids: NDArray[Any],
    placement: Placement,
    *,
    ranks_per_domain: int | None = None,
    n_tokens: tuple[int, ...] | None = None,
) -> BatchCount:
    """Count what a batch loads under a placement.

    Parameters
    ----------
    ids : (n_layers, n_ranks, n_tokens, top_k)
        Logical experts, as :func:`moesim.routing.batches.draw_batch` gives them.
    placement
        Experts in slots, for as many ranks as hold tokens.
    ranks_per_domain
        Ranks of one NVLink domain, the "node" of de-duplication; all where None. A last domain may be
        partly filled.
    n_tokens
        Nested batches: the first ``n`` tokens of every rank for each ``n`` given, in ascending order; the
        results then have a leading axis of that length.

    Returns
    -------
    BatchCount
        Counts, with a leading axis where `n_tokens` is given.

    Raises
    ------
    LayoutError
        If ranks or layers of batch and placement disagree.
    """
    coded = encode_batch(ids, placement, ranks_per_domain=ranks_per_domain, n_tokens=n_tokens)
    traffic = coded.traffic()
    results = [coded.tokens_per_slot(), traffic.copies_per_rank, traffic.copies_per_node, traffic.assignments]
    if n_tokens is None:
        results = [r[0] for r in results]
    else:
        results = [np.cumsum(r, axis=0) for r in results]
    return BatchCount(results[0], Traffic(results[1], results[2], results[3]))


@dataclass(frozen=True, eq=False)
class CodedBatch:
    """A batch with its destinations looked up; repeats of a destination within a token are marked.

    Parameters
    ----------
    slots : (top_k, n_layers, n_ranks, n_tokens)
        Slot of each choice.
    ranks, domains
        Rank and domain of each choice, same shape; plus n_ranks (n_domains) where an earlier choice of
        the token goes there already; twice n_ranks (n_domains) where there is no copy.
    layer_row : (n_layers, 1, n_tokens)
        Row ``segment * n_layers + layer`` of each token, its segment being the smallest nested batch that
        holds it.
    n_segments, n_ranks, n_domains, slots_per_rank
        Sizes.
    has_gaps
        Some choices have no copy.
    """

    slots: NDArray[Any]
    ranks: NDArray[Any]
    domains: NDArray[Any]
    layer_row: CountArray
    n_segments: int
    n_ranks: int
    n_domains: int
    slots_per_rank: int
    has_gaps: bool = False

    @property
    def n_rows(self) -> int:
        """Rows of `layer_row`: segments times layers."""
        return self.n_segments * int(self.ranks.shape[1])

    def tokens_per_slot(self) -> CountArray:
        """(n_segments, n_layers, n_ranks, slots_per_rank), segments not yet added up."""
        counts = self._counted(self.slots, self.layer_row, self.n_ranks * self.slots_per_rank, self.n_rows)
        return counts.reshape(self.n_segments, -1, self.n_ranks, self.slots_per_rank)

    def per_source(self, values: NDArray[Any], n_values: int) -> CountArray:
        """Count values below `n_values`: (n_segments, n_layers, n_ranks, n_values), by source rank."""
        row = self.layer_row * self.n_ranks + np.arange(self.n_ranks)[None, :, None]
        counts = self._counted(values, row, n_values, self.n_rows * self.n_ranks)
        return counts.reshape(self.n_segments, -1, self.n_ranks, n_values)

    def traffic(self) -> Traffic:
        """Copies by source rank and segment, (n_segments, n_layers, n_ranks, ...), not yet added up."""
        # Repeats go to a second set of bins, so one count gives both with and without de-duplication.
        by_rank = self.per_source(self.ranks, 2 * self.n_ranks)
        first, repeat = by_rank[..., : self.n_ranks], by_rank[..., self.n_ranks :]
        by_node = self.per_source(self.domains, 2 * self.n_domains)[..., : self.n_domains]
        return Traffic(first, by_node, first + repeat)

    def _counted(self, values: NDArray[Any], row: CountArray, n_values: int, n_rows: int) -> CountArray:
        # what has no copy goes to a bin of its own, which is left out
        counts = bin_count(values, row, n_values + self.has_gaps, n_rows)
        return counts[:, :n_values] if self.has_gaps else counts


def encode_batch(
    ids: NDArray[Any],
    placement: Placement,
    *,
    ranks_per_domain: int | None = None,
    n_tokens: tuple[int, ...] | None = None,
) -> CodedBatch:
    """Look up the destinations of a batch; arguments and errors as for :func:`count_batch`."""
    n_held = ids.shape[2]
    cuts = (n_held,) if n_tokens is None else n_tokens
    if any(b <= a for a, b in zip((0, *cuts), cuts, strict=False)) or cuts[-1] > n_held:
        raise LayoutError(f"nested batches ascend within the {n_held} tokens drawn", value=cuts)
    planes = np.ascontiguousarray(np.moveaxis(ids[:, :, : cuts[-1]], -1, 0))
    slots = slots_of(planes, placement)
    return encode_slots(slots, placement, ranks_per_domain=ranks_per_domain, n_tokens=cuts)


def encode_slots(
    slots: NDArray[Any],
    placement: Placement,
    *,
    ranks_per_domain: int | None = None,
    n_tokens: tuple[int, ...] | None = None,
    has_gaps: bool = False,
) -> CodedBatch:
    """Look up the destinations of copies whose slots are known.

    Parameters
    ----------
    slots : (n_planes, n_layers, n_ranks, n_tokens)
        Slot of each copy; n_slots where there is none, if `has_gaps`.
    placement, ranks_per_domain, n_tokens
        As for :func:`count_batch`.
    """
    _, n_layers, n_ranks, n_held = slots.shape
    cuts = (n_held,) if n_tokens is None else n_tokens
    per_domain = min(ranks_per_domain or n_ranks, n_ranks)
    n_domains = -(-n_ranks // per_domain)
    segment = np.searchsorted(np.asarray(cuts), np.arange(cuts[-1]), side="right")
    ranks = _divided(
        slots, placement.slots_per_rank, placement.n_slots, placement.n_slots if has_gaps else None
    )
    domains = _divided(ranks, per_domain, n_ranks, 2 * n_ranks if has_gaps else None)
    return CodedBatch(
        slots=slots,
        ranks=_coded(ranks, n_ranks, has_gaps),
        domains=_coded(domains, n_domains, has_gaps),
        layer_row=(segment * n_layers)[None, None, :] + np.arange(n_layers)[:, None, None],
        n_segments=len(cuts),
        n_ranks=n_ranks,
        n_domains=n_domains,
        slots_per_rank=placement.slots_per_rank,
        has_gaps=has_gaps,
    )


def _check_batch(n_layers: int, n_ranks: int, placement: Placement) -> None:
    if n_ranks != placement.n_ranks:
        rule = f"the placement's {placement.n_ranks} ranks are those that hold tokens"
        raise LayoutError(rule, value=n_ranks)
    if placement.slot_to_expert.shape[0] not in (1, n_layers):
        rule = f"a placement has one row, or one for each of the {n_layers} MoE layers"
        raise LayoutError(rule, value=placement.slot_to_expert.shape[0])


def slots_of(planes: NDArray[Any], placement: Placement) -> NDArray[np.uint16]:
    """Slot of every choice, replicas in turn: (top_k, n_layers, n_ranks, n_tokens), as `planes` of experts are.

    Raises
    ------
    LayoutError
        If ranks, layers or experts of batch and placement disagree.
    """
    _check_batch(planes.shape[1], planes.shape[2], placement)
    table = placement.replica_table
    n_layers, n_experts = planes.shape[1], placement.n_experts
    n_turns = table.shape[-1]
    out = np.empty(planes.shape, dtype=np.uint16)
    # Rank r's tokens start one turn after rank r-1's, so that single tokens spread over replicas too.
    turn = (np.arange(planes.shape[2])[:, None] + np.arange(planes.shape[3])) % n_turns
    for layer in range(n_layers):
        row = table[layer if table.shape[0] > 1 else 0]
        if n_turns == 1:
            out[:, layer] = np.take(row[:, 0], planes[:, layer], mode="clip")
        else:
            at = planes[:, layer].astype(np.int32) * n_turns + turn.astype(np.int32)
            out[:, layer] = np.take(row.ravel(), at, mode="clip")
    if planes.size and int(planes.max()) >= n_experts:
        raise LayoutError(f"experts of a batch lie in 0..{n_experts - 1}", value=int(planes.max()))
    return out


def _divided(values: NDArray[np.uint16], divisor: int, n_values: int, none: int | None) -> NDArray[Any]:
    """Whole quotient by table, in the smallest dtype that holds its codes; `none` gives twice their number."""
    n_out = -(-n_values // divisor)
    table = np.arange(n_values) // divisor
    if none is not None:
        table = np.append(table, np.full(none + 1 - n_values, 2 * n_out))
    dtype = np.uint8 if n_out <= 128 - (none is not None) else np.uint16
    return np.take(table.astype(dtype), values, mode="clip")


def _coded(ranks: NDArray[Any], n: int, has_gaps: bool) -> NDArray[Any]:
    """Add `n` to a choice whose rank an earlier choice of the same token already has."""
    out = ranks.copy()
    for j in range(1, ranks.shape[0]):
        repeated = ranks[j] == ranks[0]
        for earlier in range(1, j):
            repeated |= ranks[j] == ranks[earlier]
        if has_gaps:
            repeated &= ranks[j] < n
        out[j] += repeated.astype(ranks.dtype) * ranks.dtype.type(n)
    return out


def bin_count(values: NDArray[Any], row: CountArray, n_values: int, n_rows: int) -> CountArray:
    """Count (row, value) pairs plane by plane: (n_rows, n_values)."""
    total = np.zeros(n_rows * n_values, dtype=np.int64)
    scaled = row * n_values
    for plane in values:
        total += np.bincount((scaled + plane).ravel(), minlength=total.size)
    return total.reshape(n_rows, n_values)


def exchange_counts(traffic: Traffic, kind: ExchangeKind, *, ranks_per_domain: int | None = None) -> Exchange:
    """Copies that each rank sends and receives in one dispatch, by level of the network.

    Parameters
    ----------
    traffic
        Copies between ranks.
    kind
        ``two_level``: one copy per (token, remote domain) goes to the rank of the same index there, which
        forwards one to each rank that needs it (DeepEP normal); ``per_rank``: one copy per (token, rank),
        straight (an all-to-all of unique tokens); ``per_assignment``: one copy per (token, expert),
        straight (DeepEP low latency).
    ranks_per_domain
        Ranks of one NVLink domain; all where None.

    Returns
    -------
    Exchange
        Copies of shape (..., n_ranks). What leaves by a level arrives by it.

    Raises
    ------
    LayoutError
        If `kind` is unknown, or two-level exchange would need a rank that a partial domain lacks.

    References
    ----------
    DeepEP, https://github.com/deepseek-ai/DeepEP (normal and low-latency kernels).
    """
    n_ranks = traffic.copies_per_rank.shape[-1]
    per_domain = min(ranks_per_domain or n_ranks, n_ranks)
    if kind == "two_level":
        return _two_level(traffic, per_domain)
    if kind not in EXCHANGE_KINDS:
        raise LayoutError("unknown kind of exchange", value=kind, fix=f"one of {', '.join(EXCHANGE_KINDS)}")
    copies = (traffic.copies_per_rank if kind == "per_rank" else traffic.assignments).astype(np.float64)
    domain = np.arange(n_ranks) // per_domain
    same = domain[:, None] == domain[None, :]
    near = copies * (same & ~np.eye(n_ranks, dtype=bool))
    far = copies * ~same
    return Exchange(near.sum(-1), near.sum(-2), far.sum(-1), far.sum(-2))


def _two_level(traffic: Traffic, per_domain: int) -> Exchange:
    copies = traffic.copies_per_rank.astype(np.float64)
    n_ranks = copies.shape[-1]
    if n_ranks % per_domain:
        rule = f"two-level exchange has whole domains of {per_domain} ranks"
        raise LayoutError(rule, value=n_ranks, fix="per_rank exchange, or ep a multiple of the domain")
    n_domains = n_ranks // per_domain
    lead = copies.shape[:-2]
    # (source domain, source index, destination domain, destination index); the entry point is the rank
    # of the source's index in the destination's domain, which for the own domain is the source itself.
    grid = copies.reshape(*lead, n_domains, per_domain, n_domains, per_domain)
    forwarded = grid.sum(-4)
    forwarded = forwarded * ~np.eye(per_domain, dtype=bool)[:, None, :]
    sent_nvlink = np.swapaxes(forwarded.sum(-1), -1, -2).reshape(*lead, n_ranks)
    received_nvlink = forwarded.sum(-3).reshape(*lead, n_ranks)
    nodes = traffic.copies_per_node.astype(np.float64).reshape(*lead, n_domains, per_domain, n_domains)
    far = nodes * ~np.eye(n_domains, dtype=bool)[:, None, :]
    sent_nic = far.sum(-1).reshape(*lead, n_ranks)
    received_nic = np.swapaxes(far.sum(-3), -1, -2).reshape(*lead, n_ranks)
    return Exchange(sent_nvlink, received_nvlink, sent_nic, received_nic)
