"""The clock: programs of timed tasks on in-order streams, run by SimPy or by a recurrence."""

from moesim.engine.program import STREAMS, Flows, Network, Program, Task
from moesim.engine.recurrence import Schedule, evaluate, makespan
from moesim.engine.simulate import simulate
from moesim.engine.timeline import Span, Timeline

__all__ = [
    "STREAMS",
    "Flows",
    "Network",
    "Program",
    "Schedule",
    "Span",
    "Task",
    "Timeline",
    "evaluate",
    "makespan",
    "simulate",
]
