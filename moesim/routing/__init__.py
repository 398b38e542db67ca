"""Routing: which experts tokens choose, where those experts are, and what that loads.

Traces of real routers or generators fitted to them (`open_trace`, `fit_generator`, `default_routing`)
give batches (`draw_batch`); a `Placement` turns them into tokens per slot and traffic (`count_batch`,
`load_points`).
"""

from moesim.routing.balance import PLACEMENTS
from moesim.routing.batches import Phase, RoutingSource, draw_batch, inclusion, some_tokens
from moesim.routing.capacity import Assigned, CapacityLoss, CapacityPolicy, apply_capacity, expert_capacity
from moesim.routing.catalog import (
    catalog_names,
    catalog_routing,
    default_routing,
    read_generator,
    write_generator,
)
from moesim.routing.describe import describe
from moesim.routing.drawn import draw_trace
from moesim.routing.fit_generator import fit_generator
from moesim.routing.generate import generate_trace
from moesim.routing.importers import open_trace, read_npz, read_sglang_counts
from moesim.routing.known import known_models
from moesim.routing.load import (
    EXCHANGE_KINDS,
    BatchCount,
    Exchange,
    ExchangeKind,
    Traffic,
    count_batch,
    exchange_counts,
)
from moesim.routing.load_curves import LoadCurve
from moesim.routing.placement import (
    Placement,
    balanced,
    coactivation,
    contiguous,
    eplb,
    read_placement,
    round_robin,
)
from moesim.routing.points import BatchLoad, load_points, load_traffic
from moesim.routing.rebalance import Moved, aligned, moved_experts, rebalanced
from moesim.routing.synthetic import RoutingShape, SyntheticRouting, popularity
from moesim.routing.trace import RoutingTrace, read_trace
from moesim.routing.writing import TraceHeader, TraceWriter, write_trace

__all__ = [
    "EXCHANGE_KINDS",
    "PLACEMENTS",
    "Assigned",
    "BatchCount",
    "BatchLoad",
    "CapacityLoss",
    "CapacityPolicy",
    "Exchange",
    "ExchangeKind",
    "LoadCurve",
    "Moved",
    "Phase",
    "Placement",
    "RoutingShape",
    "RoutingSource",
    "RoutingTrace",
    "SyntheticRouting",
    "TraceHeader",
    "TraceWriter",
    "Traffic",
    "aligned",
    "apply_capacity",
    "balanced",
    "catalog_names",
    "catalog_routing",
    "coactivation",
    "contiguous",
    "count_batch",
    "default_routing",
    "describe",
    "draw_batch",
    "draw_trace",
    "eplb",
    "exchange_counts",
    "expert_capacity",
    "fit_generator",
    "generate_trace",
    "inclusion",
    "known_models",
    "load_points",
    "load_traffic",
    "moved_experts",
    "open_trace",
    "popularity",
    "read_generator",
    "read_npz",
    "read_placement",
    "read_sglang_counts",
    "read_trace",
    "rebalanced",
    "round_robin",
    "some_tokens",
    "write_generator",
    "write_trace",
]
