"""Synthetic routing: a generator whose few parameters are fitted to what real routers did.

Three things decide a layout, and each has its parameter: how unequal the experts of a layer are
(`log_sigma`, over layers with `log_sigma_spread`), how much one request prefers its own experts
(`request_sigma`), and how much a token keeps of its predecessor's (`token_step`). Load is exact at the
margin: averaged over requests each expert gets precisely its popularity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.routing.imbalance import collapsed_inclusion, skewed_inclusion
from moesim.routing.sampling import group_limited_draw, inclusion_probabilities, systematic_draw

__all__ = ["RoutingShape", "SyntheticRouting", "decode_bank", "popularity", "prefill_bank"]

FloatArray = NDArray[np.float64]
IdArray = NDArray[np.uint16]

_DECODE_CHUNK = 64  # tokens that share one order of the experts; their starts are stratified
_GROUP_CHUNK = 16  # the same where tokens of a chunk also share their expert groups
_GROUP_STRATA = 32  # chunks whose groups are drawn together
_LARGEST_SKEW = 0.3


@dataclass(frozen=True)
class RoutingShape:
    """What a router of a model draws.

    Parameters
    ----------
    n_layers
        MoE layers.
    n_experts, top_k
        Routed experts per layer, and how many each token gets.
    n_groups, n_top_groups
        Group-limited routing: groups of consecutive experts, and how many of them one token may use;
        1 and 1 where there is none.
    """

    n_layers: int
    n_experts: int
    top_k: int
    n_groups: int = 1
    n_top_groups: int = 1

    def __post_init__(self) -> None:
        if min(self.n_layers, self.n_experts, self.top_k) < 1 or self.top_k > self.n_experts:
            sizes = (self.n_layers, self.n_experts, self.top_k)
            raise TraceError("layers, experts and top_k are at least 1, top_k at most n_experts", value=sizes)
        if not 1 <= self.n_top_groups <= self.n_groups or self.n_experts % self.n_groups:
            groups = (self.n_groups, self.n_top_groups)
            raise TraceError(
                f"groups divide {self.n_experts} experts, top groups at most groups", value=groups
            )
        if self.n_experts // self.n_groups * self.n_top_groups < self.top_k:
            raise TraceError("the top groups hold at least top_k experts", value=self.n_top_groups)


@dataclass(frozen=True)
class SyntheticRouting:
    """Parameters of generated routing.

    Parameters
    ----------
    name
        Catalog name, or ``uniform`` or ``zipf``.
    kind
        ``fitted``: log-normal popularity per layer; ``zipf``: popularity of rank r as r**-`zipf_exponent`,
        in random order per layer; ``uniform``: every expert the same and tokens independent; ``skew``: as uneven
        as `skew` says in every layer; ``collapsed``: as :func:`moesim.routing.imbalance.collapsed_inclusion`.
    phase
        Phase that the figures were fitted on; ``mixed`` for either.
    log_sigma, log_sigma_spread
        Standard deviation of an expert's log popularity in a layer: median over layers, and the standard
        deviation over layers of its logarithm.
    log_skew
        Weight of a quadratic term in log popularity, in -0.3..0.3: above 0 the busiest experts stand out
        more than log-normal ones, below 0 less.
    request_sigma
        Standard deviation of the log preference of one request for an expert.
    request_skew
        The same quadratic term for a request's preferences.
    token_step
        Scale of the random step between consecutive tokens of a request, in mean inclusions (top_k /
        n_experts): 0 keeps all experts of the predecessor, infinity none but by chance.
    layer_link
        Share of tokens whose choices in all layers hang together: where one expert in a layer tells
        much about the next layer's.
    zipf_exponent
        Exponent of ``zipf``.
    skew
        Unevenness of ``skew``: Gini coefficient over the largest that distinct experts allow, below 1.
    seed
        Seed of the popularity and of the bank of tokens.
    provenance
        What the figures come from.
    """

    name: str
    kind: Literal["fitted", "uniform", "zipf", "skew", "collapsed"] = "fitted"
    phase: str = "mixed"
    log_sigma: float = 0.6
    log_sigma_spread: float = 0.15
    log_skew: float = 0.0
    request_sigma: float = 0.6
    request_skew: float = 0.0
    token_step: float = 1.0
    layer_link: float = 0.0
    zipf_exponent: float = 1.0
    skew: float = 0.0
    seed: int = 0
    provenance: str = "asked for by the user"

    def __post_init__(self) -> None:
        if self.kind not in ("fitted", "uniform", "zipf", "skew", "collapsed"):
            fix = "one of fitted, uniform, zipf, skew, collapsed"
            raise TraceError(
                "unknown kind of synthetic routing", value=self.kind, fix=fix, place="routing.kind"
            )
        for name in (
            "log_sigma",
            "log_sigma_spread",
            "request_sigma",
            "token_step",
            "layer_link",
            "zipf_exponent",
            "skew",
        ):
            value = getattr(self, name)
            if not value >= 0 or (np.isinf(value) and name != "token_step"):
                raise TraceError("is a finite number, 0 or more", value=value, place=f"routing.{name}")

        for name in ("log_skew", "request_skew"):
            if not abs(getattr(self, name)) <= _LARGEST_SKEW:
                rule = f"lies within -{_LARGEST_SKEW}..{_LARGEST_SKEW}"
                raise TraceError(rule, value=getattr(self, name), place=f"routing.{name}")

        if self.skew >= 1:
            raise TraceError("is below 1", value=self.skew, place="routing.skew")
        if self.layer_link > 1:
            raise TraceError("is a share, at most 1", value=self.layer_link, place="routing.layer_link")

    @classmethod
    def uniform(cls) -> SyntheticRouting:
        """Every expert equally popular, tokens independent: the best case that no router reaches."""
        return cls(name="uniform", kind="uniform", request_sigma=0.0, token_step=np.inf)

    @classmethod
    def zipf(cls, exponent: float = 1.0) -> SyntheticRouting:
        """Zipf popularity without locality, as simpler simulators assume it."""
        return cls(name="zipf", kind="zipf", zipf_exponent=exponent, request_sigma=0.0, token_step=np.inf)


def popularity(source: SyntheticRouting, shape: RoutingShape) -> FloatArray:
    """Inclusion probability of each expert: (n_layers, n_experts), each row adding up to top_k.

    Parameters
    ----------
    source
        Generator.
    shape
        Model; any number of layers and experts.

    Notes
    -----
    Layers are independent; a layer's popularity does not change when layers are added behind it.
    """
    size = (shape.n_layers, shape.n_experts)
    rng = np.random.default_rng([source.seed, shape.n_experts, shape.top_k, 1])
    sizes = {"n_layers": shape.n_layers, "n_experts": shape.n_experts, "top_k": shape.top_k}
    if source.kind == "skew":
        return skewed_inclusion(source.skew, **sizes, rng=rng)
    if source.kind == "collapsed":
        groups = {"n_groups": shape.n_groups, "n_top_groups": shape.n_top_groups}
        return collapsed_inclusion(**sizes, **groups, rng=rng)
    if source.kind == "uniform":
        weights: FloatArray = np.ones(size)
    elif source.kind == "zipf":
        order = np.argsort(rng.random(size), axis=-1)
        weights = np.asarray((order + 1.0) ** -source.zipf_exponent, dtype=np.float64)
    else:
        noise = rng.standard_normal((shape.n_layers, shape.n_experts + 1))
        sigma = source.log_sigma * np.exp(source.log_sigma_spread * noise[:, :1])
        weights = np.asarray(np.exp(sigma * _shaped(noise[:, 1:], source.log_skew)))
    return inclusion_probabilities(weights, shape.top_k)


def _shaped(noise: FloatArray, skew: float) -> FloatArray:
    """Standard normal noise made lopsided, still with mean 0 and variance 1."""
    return np.asarray((noise + skew * (noise * noise - 1.0)) / np.sqrt(1.0 + 2.0 * skew * skew))


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
        As :func:`popularity` gives it.
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
    chunk = _GROUP_CHUNK if shape.n_groups > 1 else _DECODE_CHUNK
    n_chunks = -(-n_tokens // chunk)
    rows = np.repeat(inclusion, n_chunks, axis=0)
    u = (np.arange(chunk) + rng.random((n_chunks, chunk))) / chunk
    ids = _draw(rows, u, shape, source, rng, n_alike=_GROUP_STRATA if n_chunks % _GROUP_STRATA == 0 else 1)
    return _planes(ids, shape.n_layers)


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
        Gives `request_sigma` and `token_step`.
    rng
        Source of randomness.
    n_sequences, sequence_length
        Requests, and tokens of each (a multiple of the chunk, 16 or 32).
    """
    chunk = _GROUP_CHUNK if shape.n_groups > 1 else _DECODE_CHUNK // 2
    n_chunks = sequence_length // chunk
    by_request = _request_inclusion(inclusion, shape.top_k, source, n_sequences, rng)
    size = (n_sequences, sequence_length)
    if np.isinf(source.token_step):
        u = rng.random(size)
    else:
        # A walk around the circle: the share of experts kept falls with the root of the distance.
        steps = rng.laplace(0.0, 1.0, size) * (source.token_step * shape.top_k / shape.n_experts)
        steps[:, 0] = rng.random(n_sequences)
        u = np.mod(np.cumsum(steps, axis=-1), 1.0)
        u[u >= 1.0] = 0.0
    rows = np.repeat(by_request.reshape(-1, shape.n_experts), n_chunks, axis=0)
    ids = _draw(rows, u.reshape(-1, chunk), shape, source, rng, n_alike=n_chunks)
    return _planes(ids, shape.n_layers)


def _draw(
    rows: FloatArray,
    u: FloatArray,
    shape: RoutingShape,
    source: SyntheticRouting,
    rng: np.random.Generator,
    *,
    n_alike: int,
) -> IdArray:
    """Draw the rows of all layers, layer after layer; `u` (n_chunks, chunk) serves every layer.

    Chunks of linked layers keep one order of the experts per layer, the others get a new one each time:
    then a common `u` says nothing about the next layer.
    """
    n_chunks = u.shape[0]
    keys = rng.random((shape.n_layers, n_chunks, shape.n_experts), dtype=np.float32)
    linked = rng.random(n_chunks) < source.layer_link
    keys[:, linked] = rng.random((shape.n_layers, 1, shape.n_experts), dtype=np.float32)
    keys = keys.reshape(-1, shape.n_experts)
    starts = np.tile(u, (shape.n_layers, 1))
    if shape.n_groups == 1 or shape.n_groups == shape.n_top_groups:
        return systematic_draw(rows, starts, shape.top_k, rng, keys)
    return group_limited_draw(
        rows, starts, shape.top_k, shape.n_groups, shape.n_top_groups, rng, n_alike=n_alike, keys=keys
    )


def _planes(ids: IdArray, n_layers: int) -> IdArray:
    top_k = ids.shape[-1]
    return np.ascontiguousarray(np.moveaxis(ids.reshape(n_layers, -1, top_k), -1, 0))


def _request_inclusion(
    inclusion: FloatArray, top_k: int, source: SyntheticRouting, n_sequences: int, rng: np.random.Generator
) -> FloatArray:
    """Popularity within each request, (n_layers, n_sequences, n_experts), whose mean is `inclusion`.

    Log-normal preferences, then rows (a request adds up to top_k) and columns (an expert's mean is its
    popularity) scaled in turn, as in iterative proportional fitting.
    """
    n_layers, n_experts = inclusion.shape
    if source.request_sigma == 0:
        return np.repeat(inclusion[:, None, :], n_sequences, axis=1)
    noise = _shaped(rng.standard_normal((n_layers, n_sequences, n_experts)), source.request_skew)
    p = inclusion[:, None, :] * np.exp(source.request_sigma * noise)
    for _ in range(8):
        p *= top_k / p.sum(-1, keepdims=True)
        np.minimum(p, 1.0, out=p)
        p *= (inclusion / np.maximum(p.mean(1), 1e-300))[:, None, :]
    return inclusion_probabilities(p, top_k)


@lru_cache(maxsize=32)
def cached_popularity(source: SyntheticRouting, shape: RoutingShape) -> FloatArray:
    """As :func:`popularity`, kept read-only for callers that ask again."""
    values = popularity(source, shape)
    values.flags.writeable = False
    return values
