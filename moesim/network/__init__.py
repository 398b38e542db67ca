"""Traffic to seconds: collectives, token exchanges and their bounds."""

from moesim.network.collectives import (
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    reduce_scatter_s,
    send_recv_s,
)
from moesim.network.exchange import bounding_link, combine_s, dispatch_s
from moesim.network.fluid import FluidNetwork, solve_flows
from moesim.network.params import CUSTOM_ALL_REDUCE, NetworkParams
from moesim.network.topology import Topology
from moesim.network.traffic import port_bound_s

__all__ = [
    "CUSTOM_ALL_REDUCE", "FluidNetwork", "NetworkParams", "Topology", "all_gather_s", "all_reduce_s", "all_to_all_s",
    "bounding_link", "combine_s", "dispatch_s", "port_bound_s", "reduce_scatter_s", "send_recv_s", "solve_flows",
]  # fmt: skip
