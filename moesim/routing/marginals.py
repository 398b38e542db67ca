"""What ranks send and receive, counted without the rank-to-rank matrix.

For large groups the matrix of every layer and batch size outgrows the batch itself; its row and column
sums by class of copy are all that an exchange needs. Agrees with :func:`moesim.routing.load.exchange_counts`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.routing.load import EXCHANGE_KINDS, CodedBatch, Exchange, ExchangeKind, bin_count, exchange_counts

__all__ = ["all_exchanges", "marginal_exchanges"]

_LARGEST_MATRIX = 64
"""Ranks up to which rank-to-rank matrices are quicker than their sums by class."""

# Classes of a copy, by where it goes and whether an earlier one of its token goes there too.
_OWN, _NEAR_REPEAT, _NEAR, _FAR_REPEAT, _FAR_ENTRY, _FAR_FORWARDED = range(6)
_N_CLASSES = 6


def marginal_exchanges(
    batch: CodedBatch, *, ranks_per_domain: int | None = None
) -> dict[ExchangeKind, Exchange]:
    """Copies sent and received per rank for every kind of exchange.

    Parameters
    ----------
    batch
        Coded with the same `ranks_per_domain`.
    ranks_per_domain
        Ranks of one NVLink domain; all where None.

    Returns
    -------
    dict
        Fields of each exchange are (n_segments, n_layers, n_ranks), added up over nested batches.
        ``two_level`` is absent where the last domain is not full.
    """
    n = batch.n_ranks
    per_domain = min(ranks_per_domain or n, n)
    kind = _classes(n, per_domain)
    destination = np.tile(np.arange(n), 2)[None, :]
    received = _binned(batch, batch.ranks, destination * _N_CLASSES + kind, n * _N_CLASSES)
    received = received.reshape(*received.shape[:2], n, _N_CLASSES)
    source = np.arange(n)[:, None]
    sent = _binned(batch, batch.ranks, source * _N_CLASSES + kind, n * _N_CLASSES)
    sent = sent.reshape(*sent.shape[:2], n, _N_CLASSES)
    found: dict[ExchangeKind, Exchange] = {}
    if n % per_domain == 0:
        found["two_level"] = _two_level(batch, kind, received, per_domain)
    near, far = [_NEAR], [_FAR_ENTRY, _FAR_FORWARDED]
    for name, more in (("per_rank", False), ("per_assignment", True)):
        close = near + [_NEAR_REPEAT] * more
        distant = far + [_FAR_REPEAT] * more
        found[name] = Exchange(  # type: ignore[index]
            sent[..., close].sum(-1),
            received[..., close].sum(-1),
            sent[..., distant].sum(-1),
            received[..., distant].sum(-1),
        )
    return found


def _classes(n: int, per_domain: int) -> NDArray[np.int64]:
    """Class of a copy from source (row) to coded destination (column): (n, 2 n)."""
    source, destination = np.arange(n)[:, None], np.arange(n)[None, :]
    near = source // per_domain == destination // per_domain
    entry = source % per_domain == destination % per_domain
    first = np.where(near, _NEAR, np.where(entry, _FAR_ENTRY, _FAR_FORWARDED))
    repeat = np.where(near, _NEAR_REPEAT, _FAR_REPEAT)
    own = source == destination
    return np.concatenate([np.where(own, _OWN, first), np.where(own, _OWN, repeat)], axis=1)


def _two_level(
    batch: CodedBatch, kind: NDArray[np.int64], received: NDArray[np.float64], per_domain: int
) -> Exchange:
    n, n_domains = batch.n_ranks, batch.n_domains
    source = np.arange(n)[:, None]
    entry = (np.tile(np.arange(n), 2)[None, :] // per_domain) * per_domain + source % per_domain
    forwards = np.where((kind == _NEAR) | (kind == _FAR_FORWARDED), entry, n)
    sent_nvlink = _binned(batch, batch.ranks, forwards, n + 1)[..., :n]
    domain = np.tile(np.arange(n_domains), 2)[None, :]
    leaves = (np.arange(2 * n_domains)[None, :] < n_domains) & (domain != source // per_domain)
    arrives = np.where(leaves, domain * per_domain + source % per_domain, n)
    received_nic = _binned(batch, batch.domains, arrives, n + 1)[..., :n]
    sent_nic = _binned(batch, batch.domains, np.where(leaves, source, n), n + 1)[..., :n]
    return Exchange(sent_nvlink, received[..., [_NEAR, _FAR_FORWARDED]].sum(-1), sent_nic, received_nic)


def _binned(
    batch: CodedBatch, codes: NDArray[np.unsignedinteger], table: NDArray[np.int64], n_bins: int
) -> NDArray[np.float64]:
    """Look each (source, code) up in `table` (n_ranks, n_codes) and count by row: (segments, layers, n_bins)."""
    width = n_bins + batch.has_gaps
    if batch.has_gaps:  # what has no copy goes to a bin of its own, which is left out
        table = np.append(table, np.full((len(table), 1), n_bins), axis=1)
    first = (np.arange(batch.n_ranks, dtype=np.int32) * table.shape[1])[None, None, :, None]
    values = np.take(table.ravel().astype(np.int32), codes + first, mode="clip")
    counts = bin_count(values, batch.layer_row, width, batch.n_rows)
    counts = counts.reshape(batch.n_segments, -1, width)[..., :n_bins]
    return np.cumsum(counts, axis=0).astype(np.float64)


def all_exchanges(batch: CodedBatch, *, ranks_per_domain: int | None = None) -> dict[ExchangeKind, Exchange]:
    """Every kind of exchange, (n_cuts, n_layers, n_ranks), by whichever way is quicker."""
    n = batch.n_ranks
    if n > _LARGEST_MATRIX:
        return marginal_exchanges(batch, ranks_per_domain=ranks_per_domain)
    traffic = batch.traffic()
    whole = ranks_per_domain is None or ranks_per_domain >= n or n % ranks_per_domain == 0
    found: dict[ExchangeKind, Exchange] = {}
    for kind in EXCHANGE_KINDS:
        if whole or kind != "two_level":
            x = exchange_counts(traffic, kind, ranks_per_domain=ranks_per_domain)
            # Segments are added up here, where they are small, not as matrices.
            found[kind] = Exchange(
                *(
                    np.cumsum(f, axis=0)
                    for f in (x.sent_nvlink, x.received_nvlink, x.sent_nic, x.received_nic)
                )
            )
    return found
