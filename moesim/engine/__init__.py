"""The clock: programs of timed tasks on in-order streams, run by SimPy or by a recurrence."""

from moesim.engine.program import STREAMS, Draw, Flows, Network, Program, Sharing, Task
from moesim.engine.recurrence import Schedule, evaluate, makespan
from moesim.engine.simulate import simulate
from moesim.engine.timeline import Span, Timeline

__all__ = [
    "STREAMS",
    "Draw",
    "Flows",
    "Network",
    "Program",
    "Schedule",
    "Sharing",
    "Span",
    "Task",
    "Timeline",
    "evaluate",
    "makespan",
    "simulate",
]
