"""Routing: which experts tokens choose, where those experts are, and what that loads.

Traces of real routers or generators fitted to them (`open_trace`, `catalog_routing`, `default_routing`)
give batches (`draw_batch`); a `Placement` turns them into tokens per slot and traffic (`count_batch`,
`load_points`).
"""

from moesim.routing.batches import Phase, RoutingSource, draw_batch, inclusion, some_tokens
from moesim.routing.capacity import Assigned, CapacityLoss, CapacityPolicy, apply_capacity, expert_capacity
from moesim.routing.catalog import catalog_names, catalog_routing, default_routing
from moesim.routing.describe import describe
from moesim.routing.importers import open_trace, read_npz, read_sglang_counts
from moesim.routing.load import (
    EXCHANGE_KINDS,
    BatchCount,
    Exchange,
    ExchangeKind,
    Traffic,
    count_batch,
    exchange_counts,
)
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
from moesim.routing.trace import RoutingTrace, read_trace, write_trace

__all__ = [
    "EXCHANGE_KINDS",
    "Assigned",
    "BatchCount",
    "BatchLoad",
    "CapacityLoss",
    "CapacityPolicy",
    "Exchange",
    "ExchangeKind",
    "Moved",
    "Phase",
    "Placement",
    "RoutingShape",
    "RoutingSource",
    "RoutingTrace",
    "SyntheticRouting",
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
    "eplb",
    "exchange_counts",
    "expert_capacity",
    "inclusion",
    "load_points",
    "load_traffic",
    "moved_experts",
    "open_trace",
    "popularity",
    "read_npz",
    "read_placement",
    "read_sglang_counts",
    "read_trace",
    "rebalanced",
    "round_robin",
    "some_tokens",
    "write_trace",
]
