"""Synthetic routing: a generator whose few parameters are fitted to what real routers did.

Three things decide a layout, and each has its parameter: how unequal the experts of a layer are, and where they
stand (`curves`, or a log-normal's `log_sigma`), how much one request prefers its own experts (`request_spread`),
and how much a token keeps of its predecessor's (`token_keep`). Load is exact at the margin: averaged over
requests each expert gets precisely its popularity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.routing.imbalance import collapsed_inclusion, skewed_inclusion
from moesim.routing.load_curves import LoadCurve, arranged, between_rows, table
from moesim.routing.sampling import inclusion_probabilities

__all__ = ["RoutingShape", "SyntheticRouting", "popularity"]

FloatArray = NDArray[np.float64]

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
        ``fitted``: popularity by `curves`, or log-normal where there are none; ``zipf``: popularity of rank r as
        r**-`zipf_exponent`, in random order per layer; ``uniform``: all the same and tokens independent; ``skew``:
        as uneven as `skew` says in every layer; ``collapsed``: as
        :func:`moesim.routing.imbalance.collapsed_inclusion`.
    phase
        Phase that the figures were fitted on; ``mixed`` for either.
    curves
        Popularity of layers as curves, each from the idlest to the busiest expert.
    curve_order
        ``skew``: the curves stand for any layers, from the least to the most uneven, and a model's layers are
        dealt shares of that range; ``depth``: one curve per layer, the first first. A shallower model then
        takes evenly spaced ones, a deeper one cycles.
    curve_experts
        Experts per layer that the curves were fitted on; only for that many do their block peaks hold.
    keep_index
        Whether experts stand where the curves' trend over the index puts them; else in random order.
    log_sigma, log_sigma_spread
        Without curves: standard deviation of an expert's log popularity in a layer: median over layers, and
        the standard deviation over layers of its logarithm.
    log_skew
        Weight of a quadratic term in log popularity, in -0.3..0.3: above 0 the busiest experts stand out
        more than log-normal ones, below 0 less.
    request_spread
        Standard deviation of where a request's tokens start on the circle from which experts are read off, in
        turns of it: near 0 a request has few experts to itself, infinity makes its tokens independent.
    request_stray
        Share of a request's tokens that start anywhere.
    token_keep
        Share of tokens that start where their predecessor did, but for the step.
    token_step
        Scale of a token's own random step, in mean inclusions (top_k / n_experts): 0 lets a token that keeps
        its start keep all experts.
    layer_link
        Share of requests (in decode, of tokens) that read all layers off the same circles, so that one expert
        in a layer tells much about the next layer's.
    drift_share
        Share of the variance of where linked requests stand on the circle that changes slowly from one to the
        next, so that the experts in favour drift: only :func:`moesim.routing.generate_trace` has a course of time.
    drift_sequences
        Sequences after which that slow part has lost all but 1/e of what it was.
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
    request_spread: float = 0.1
    request_stray: float = 0.1
    token_keep: float = 0.5
    token_step: float = 0.5
    layer_link: float = 0.0
    drift_share: float = 0.0
    drift_sequences: float = 16.0
    zipf_exponent: float = 1.0
    skew: float = 0.0
    seed: int = 0
    curves: tuple[LoadCurve, ...] = ()
    curve_order: Literal["skew", "depth"] = "skew"
    curve_experts: int = 0
    keep_index: bool = True
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
            "request_spread",
            "request_stray",
            "token_keep",
            "token_step",
            "layer_link",
            "drift_share",
            "drift_sequences",
            "zipf_exponent",
            "skew",
        ):
            value = getattr(self, name)
            if not value >= 0 or (np.isinf(value) and name != "request_spread"):
                raise TraceError("is a finite number, 0 or more", value=value, place=f"routing.{name}")

        if not abs(self.log_skew) <= _LARGEST_SKEW:
            rule = f"lies within -{_LARGEST_SKEW}..{_LARGEST_SKEW}"
            raise TraceError(rule, value=self.log_skew, place="routing.log_skew")
        for name in ("request_stray", "token_keep", "layer_link", "drift_share"):
            if getattr(self, name) > 1:
                raise TraceError("is a share, at most 1", value=getattr(self, name), place=f"routing.{name}")
        if self.curve_order not in ("skew", "depth"):
            fix = "one of skew, depth"
            raise TraceError(
                "unknown order of curves", value=self.curve_order, fix=fix, place="routing.curve_order"
            )

        if self.skew >= 1:
            raise TraceError("is below 1", value=self.skew, place="routing.skew")
        if len({len(curve.block_peaks) for curve in self.curves}) > 1:
            numbers = [len(curve.block_peaks) for curve in self.curves]
            rule = "all curves give as many, or none"
            raise TraceError(rule, value=numbers, place="routing.curves.block_peaks")

    @property
    def is_independent(self) -> bool:
        """Whether tokens of one request have no more in common than any two."""
        return bool(np.isinf(self.request_spread)) and self.token_keep == 0

    @classmethod
    def uniform(cls) -> SyntheticRouting:
        """Every expert equally popular, tokens independent: the best case that no router reaches."""
        return cls(name="uniform", kind="uniform", request_spread=np.inf, token_keep=0.0)

    @classmethod
    def zipf(cls, exponent: float = 1.0) -> SyntheticRouting:
        """Zipf popularity without locality, as simpler simulators assume it."""
        return cls(name="zipf", kind="zipf", zipf_exponent=exponent, request_spread=np.inf, token_keep=0.0)


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
    Of `curves`, expert i of E has the load at share (i + 1/2) / E, whatever E they were fitted on; loads are
    scaled to top_k and capped at 1.
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
    elif source.curves:
        weights = _by_curves(source, shape, rng)
    else:
        noise = rng.standard_normal((shape.n_layers, shape.n_experts + 1))
        sigma = source.log_sigma * np.exp(source.log_sigma_spread * noise[:, :1])
        weights = np.asarray(np.exp(sigma * _shaped(noise[:, 1:], source.log_skew)))
    return inclusion_probabilities(weights, shape.top_k)


def _by_curves(source: SyntheticRouting, shape: RoutingShape, rng: np.random.Generator) -> FloatArray:
    n_rows = len(source.curves)
    if source.curve_order == "depth":
        rows = table(source.curves)[spread_layers(n_rows, shape.n_layers)]
    else:
        dealt = (rng.permutation(shape.n_layers) + 0.5) / shape.n_layers
        rows = between_rows(source.curves, dealt)
    if not source.keep_index:
        return rng.permuted(arranged(rows, shape.n_experts, blocks=False, rng=rng), axis=-1)
    return arranged(rows, shape.n_experts, blocks=shape.n_experts == source.curve_experts, rng=rng)


def spread_layers(n_have: int, n_wanted: int) -> NDArray[np.int64]:
    """Which of the layers at hand stands in for each wanted one: evenly spaced, or cycled for a deeper model."""
    if n_wanted <= n_have:
        return (np.arange(n_wanted) * n_have) // n_wanted
    return np.arange(n_wanted) % n_have


def _shaped(noise: FloatArray, skew: float) -> FloatArray:
    """Standard normal noise made lopsided, still with mean 0 and variance 1."""
    return np.asarray((noise + skew * (noise * noise - 1.0)) / np.sqrt(1.0 + 2.0 * skew * skew))


@lru_cache(maxsize=32)
def cached_popularity(source: SyntheticRouting, shape: RoutingShape) -> FloatArray:
    """As :func:`popularity`, kept read-only for callers that ask again."""
    values = popularity(source, shape)
    values.flags.writeable = False
    return values
