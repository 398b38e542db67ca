"""What a person asks: scenarios read from YAML, checked, with every error at its place in the file."""

from moesim.scenario.choices import Choices
from moesim.scenario.layout import LayoutSizes, ModelFacts, check_layout
from moesim.scenario.ranges import SweptKey, split_sets
from moesim.scenario.read import (
    DEFAULT_SCENARIO,
    ScenarioFile,
    load_scenario,
    load_variants,
    parse_scenario,
    read_scenario,
)
from moesim.scenario.schema import (
    ClusterChoice,
    LayoutChoice,
    Policy,
    RoutingChoice,
    Scenario,
    Targets,
    json_schema,
)
from moesim.scenario.workload import DecodeWorkload, PrefillWorkload, ServeWorkload, TrainWorkload, Workload

__all__ = [
    "DEFAULT_SCENARIO",
    "Choices",
    "ClusterChoice",
    "DecodeWorkload",
    "LayoutChoice",
    "LayoutSizes",
    "ModelFacts",
    "Policy",
    "PrefillWorkload",
    "RoutingChoice",
    "Scenario",
    "ScenarioFile",
    "ServeWorkload",
    "SweptKey",
    "Targets",
    "TrainWorkload",
    "Workload",
    "check_layout",
    "json_schema",
    "load_scenario",
    "load_variants",
    "parse_scenario",
    "read_scenario",
    "split_sets",
]
