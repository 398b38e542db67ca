"""Tokens of a generator: many requests at once, or requests token by token.

A layer's inclusion probabilities lie end to end around a circle, in an order of the experts, and a token reads
its experts off at its start and at equal distances from there. Starts are shared by all layers. So where layers keep
one order, one layer tells of the next; where a request's starts stay near one another, it has experts of its own.
Starts are uniform over all requests, whatever they do within one, so that each expert keeps its popularity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.routing.sampling import group_limited_draw, systematic_draw
from moesim.routing.synthetic import RoutingShape, SyntheticRouting

__all__ = ["Requests", "decode_bank", "prefill_bank"]

FloatArray = NDArray[np.float64]
IdArray = NDArray[np.uint16]
IndexArray = NDArray[np.int64]
_BELOW_ONE = 1.0 - 2.0**-53

_DECODE_CHUNK = 64
"""Decode tokens that share one order of the experts; their starts are stratified."""
RUN = 16
"""Tokens that also share their expert groups, where there are any: in decode, a chunk; of a request, every so many
pieces of its tokens."""
_PIECE = 4
"""Tokens in a row of a request that share their expert groups; the next piece has others."""
_GROUP_STRATA = 32
"""Chunks that share an order of the groups."""
_REQUESTS_PER_ORDER = 16
"""Requests that share an order of the experts which no others have; their centres are stratified."""


def decode_bank(
    inclusion: FloatArray,
    shape: RoutingShape,
    source: SyntheticRouting,
    rng: np.random.Generator,
    *,
    n_tokens: int,
) -> IdArray:
    """Tokens of as many different requests: (top_k, n_layers, n_tokens), contiguous per choice.

    Parameters
    ----------
    inclusion : (n_layers, n_experts)
        As :func:`moesim.routing.popularity` gives it.
    shape
        Model.
    source
        Gives `layer_link`.
    rng
        Source of randomness.
    n_tokens
        Tokens wanted; rounded up to whole chunks.

    Notes
    -----
    Starts are stratified within a chunk, so that the bank's own counts stay close to `inclusion`.
    """
    chunk = RUN if _grouped(shape) else _DECODE_CHUNK
    n_chunks = -(-n_tokens // chunk)
    u = (np.arange(chunk) + rng.random((n_chunks, chunk))) / chunk
    linked = rng.random(n_chunks) < source.layer_link
    order_of = np.where(linked, 0, np.arange(1, n_chunks + 1))
    # The order of the groups serves several chunks, so that together they use each group its share of times.
    group_order_of = np.where(linked, 0, 1 + np.arange(n_chunks) // _GROUP_STRATA)
    group_u = _evened(rng.random(n_chunks), group_order_of, rng)
    keys = _keys(shape, n_chunks + 1, rng)
    rows = np.repeat(inclusion, n_chunks, axis=0)
    return _drawn(rows, u, group_u, keys, order_of, group_order_of, shape, rng)


def prefill_bank(
    inclusion: FloatArray,
    shape: RoutingShape,
    source: SyntheticRouting,
    rng: np.random.Generator,
    *,
    n_sequences: int,
    sequence_length: int,
) -> IdArray:
    """Tokens of whole requests, one behind the other: (top_k, n_layers, n_sequences * sequence_length).

    Parameters
    ----------
    inclusion : (n_layers, n_experts)
        Popularity over all requests.
    shape
        Model.
    source
        Gives what requests and tokens keep.
    rng
        Source of randomness.
    n_sequences, sequence_length
        Requests, and tokens of each (a multiple of `RUN`).
    """
    requests = Requests.dealt(shape, source, n_sequences, sequence_length, rng)
    return requests.tokens(inclusion, shape, slice(None), rng)


@dataclass(frozen=True, eq=False)
class Requests:
    """Where the tokens of requests start, in the order they run.

    Parameters
    ----------
    order_of : (n_requests,)
        Which order of the experts each request reads; 0 is the one of all linked requests.
    u, group_u : (n_requests, length) and (n_requests, n_runs)
        Starts of its tokens, and of its draws of expert groups; evenly spread over the requests of an order.
    keys, group_keys : (n_layers, n_orders, n_experts) and (n_layers, n_orders, n_groups)
        Sort keys of the orders.
    """

    order_of: IndexArray
    u: FloatArray
    group_u: FloatArray
    keys: NDArray[np.float32]
    group_keys: NDArray[np.float32]

    @classmethod
    def dealt(
        cls,
        shape: RoutingShape,
        source: SyntheticRouting,
        n_requests: int,
        length: int,
        rng: np.random.Generator,
    ) -> Requests:
        """Deal `n_requests` requests of `length` tokens (a multiple of `RUN`) their orders and starts.

        Drift is that linked requests near in time are near on the circle: the experts in favour change slowly.
        """
        place = rng.permutation(n_requests)
        n_linked = round(source.layer_link * n_requests)
        order_of = np.where(place < n_linked, 0, 1 + (place - n_linked) // _REQUESTS_PER_ORDER)
        n_runs = length // RUN if _grouped(shape) else 1
        about = _walks(source, shape, (n_requests, length), rng), _around(source, (n_requests, n_runs), rng)
        starts = []
        for offset in about:
            course = np.where(order_of == 0, _course(source, n_requests, rng), rng.random(n_requests))
            centre = _evened(course, order_of, rng)[:, None]
            starts.append(_evened(np.mod(centre + offset, 1.0), order_of[:, None], rng))
        return cls(order_of, starts[0], starts[1], *_keys(shape, int(order_of.max()) + 1, rng))

    def cut(self, span: int) -> Requests:
        """The same tokens as shorter requests of `span` tokens (a multiple of `RUN` that divides the length)."""
        n_spans = self.u.shape[1] // span
        group_u = self.group_u
        if group_u.shape[1] == 1:
            group_u = np.repeat(group_u, n_spans, axis=1)
        return Requests(
            np.repeat(self.order_of, n_spans),
            self.u.reshape(-1, span),
            group_u.reshape(len(self.u) * n_spans, -1),
            self.keys,
            self.group_keys,
        )

    def tokens(
        self, inclusion: FloatArray, shape: RoutingShape, which: slice, rng: np.random.Generator
    ) -> IdArray:
        """Tokens of some of the requests: (top_k, n_layers, n_which * length).

        Parameters
        ----------
        inclusion : (n_layers, n_experts)
            Popularity over all requests.
        shape
            Model.
        which
            Requests wanted.
        rng
            Source of randomness.
        """
        u, group_u = self.u[which], self.group_u[which]
        n_runs = group_u.shape[1]
        order_of = np.repeat(self.order_of[which], n_runs)
        rows = np.repeat(inclusion, group_u.size, axis=0)
        # The runs of a request are interleaved piece by piece.
        by_run = np.swapaxes(u.reshape(len(u), -1, n_runs, _PIECE if n_runs > 1 else 1), 1, 2)
        ids = _drawn(
            rows, by_run.reshape(group_u.size, -1), group_u.ravel(), (self.keys, self.group_keys), order_of, order_of,
            shape, rng,
        )  # fmt: skip
        ids = ids.reshape(*ids.shape[:2], *by_run.shape)
        return np.ascontiguousarray(np.swapaxes(ids, 3, 4)).reshape(*ids.shape[:2], -1)


def _course(source: SyntheticRouting, n: int, rng: np.random.Generator) -> FloatArray:
    """Normal values of which the share `drift_share` changes slowly along the row."""
    noise = rng.standard_normal((2, n))
    if source.drift_share == 0:
        return np.asarray(noise[0])
    kept = float(np.exp(-1.0 / max(source.drift_sequences, 1e-9)))
    slow = noise[1] * np.sqrt(1.0 - kept**2)
    slow[0] = noise[1, 0]
    for at in range(1, n):
        slow[at] += kept * slow[at - 1]
    return np.asarray(np.sqrt(1.0 - source.drift_share) * noise[0] + np.sqrt(source.drift_share) * slow)


def _around(source: SyntheticRouting, size: tuple[int, int], rng: np.random.Generator) -> FloatArray:
    """Starts about a request's centre, strays anywhere."""
    if np.isinf(source.request_spread):
        return rng.random(size)
    near = rng.normal(0.0, source.request_spread, size)
    return np.where(rng.random(size) < source.request_stray, rng.random(size), near)


def _walks(
    source: SyntheticRouting, shape: RoutingShape, size: tuple[int, int], rng: np.random.Generator
) -> FloatArray:
    """Starts of tokens in a row, about the centre: (n_requests, length).

    What tokens d apart share beyond what the request shares falls as ``token_keep ** d``.
    """
    starts = _around(source, size, rng)
    afresh = rng.random(size) >= source.token_keep
    afresh[:, 0] = True
    last = np.maximum.accumulate(np.where(afresh, np.arange(size[1]), 0), axis=1)
    step = source.token_step * shape.top_k / shape.n_experts
    return np.asarray(np.take_along_axis(starts, last, axis=1) + rng.laplace(0.0, step, size))


def _evened(values: FloatArray, order_of: IndexArray, rng: np.random.Generator) -> FloatArray:
    """Values in their order, one in each n-th part of [0, 1) for the n of each order of the experts."""
    order_of = np.broadcast_to(order_of, values.shape)
    even = np.empty(values.shape)
    for order in np.unique(order_of):
        here = order_of == order
        n = int(here.sum())
        even[here] = (np.argsort(np.argsort(values[here])) + rng.random(n)) / n
    return np.minimum(even, _BELOW_ONE)


def _grouped(shape: RoutingShape) -> bool:
    return shape.n_groups > shape.n_top_groups


def _keys(
    shape: RoutingShape, n_orders: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Sort keys of orders of experts and of groups."""
    keys = rng.random((shape.n_layers, n_orders, shape.n_experts), dtype=np.float32)
    return keys, rng.random((shape.n_layers, n_orders, shape.n_groups), dtype=np.float32)


def _drawn(
    rows: FloatArray,
    u: FloatArray,
    group_u: FloatArray,
    keys: tuple[NDArray[np.float32], NDArray[np.float32]],
    order_of: IndexArray,
    group_order_of: IndexArray,
    shape: RoutingShape,
    rng: np.random.Generator,
) -> IdArray:
    """Draw the rows of all layers, layer after layer; `u` (n_chunks, chunk) and `group_u` serve every layer."""
    of_experts = keys[0][:, order_of].reshape(-1, shape.n_experts)
    starts = np.tile(u, (shape.n_layers, 1))
    if _grouped(shape):
        of_groups = keys[1][:, group_order_of].reshape(-1, shape.n_groups)
        ids = group_limited_draw(
            rows, starts, shape.top_k, shape.n_groups, shape.n_top_groups, rng,
            group_u=np.tile(group_u, shape.n_layers), group_keys=of_groups, keys=of_experts,
        )  # fmt: skip
    else:
        ids = systematic_draw(rows, starts, shape.top_k, rng, of_experts)
    return np.ascontiguousarray(np.moveaxis(ids.reshape(shape.n_layers, -1, shape.top_k), -1, 0))
