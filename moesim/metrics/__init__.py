"""Timelines to figures: where a step's time goes, how busy its streams are, traces to look at."""

from moesim.metrics.perfetto import write_perfetto
from moesim.metrics.timeline import (
    WAIT,
    breakdown_s,
    busy_s,
    check_timeline,
    critical_rank,
    exposed_communication_s,
    idle_s,
    imbalance,
    lower_bound_s,
    utilisation,
    waiting_s,
)

__all__ = [
    "WAIT",
    "breakdown_s",
    "busy_s",
    "check_timeline",
    "critical_rank",
    "exposed_communication_s",
    "idle_s",
    "imbalance",
    "lower_bound_s",
    "utilisation",
    "waiting_s",
    "write_perfetto",
]
