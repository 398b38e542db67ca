"""A step with its times: from operators to a program that the engine and the recurrence run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.cost.price import Pricer
from moesim.engine.program import Program, Task
from moesim.work.ops import (
    AllGather,
    AllReduce,
    Exchange,
    FloatArray,
    Op,
    ReduceScatter,
)
from moesim.work.step import Block, Node, Step

__all__ = ["TimedStep", "time_step"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TimedStep:
    """A step and the seconds of each of its nodes."""

    step: Step
    pricer: Pricer
    seconds: tuple[tuple[FloatArray, ...], ...]
    """By block and node: broadcastable to (n_points, n_layers, n_ranks)."""

    def program(self, *, fused: bool = False) -> Program:
        """Unroll the step's layers into tasks.

        Parameters
        ----------
        fused
            Join kernels that follow one another on one rank into one task. The times stay the same; a
            planner evaluates a tenth of the tasks.
        """
        return _Unroller(self, fused).run()


def time_step(step: Step, pricer: Pricer) -> TimedStep:
    """Price every node of a step once, all its layers together."""
    seconds = tuple(
        tuple(_three_axes(pricer.seconds(node.op)) for node in block.nodes) for block in step.blocks
    )
    return TimedStep(step, pricer, seconds)


def _three_axes(seconds: FloatArray) -> FloatArray:
    array = np.asarray(seconds, dtype=float)
    return array.reshape((1,) * (3 - array.ndim) + array.shape)


class _Unroller:
    """Builds the task list; keeps where each micro-batch's chain stands."""

    def __init__(self, timed: TimedStep, fused: bool) -> None:
        self.timed = timed
        self.fused = fused
        self.tasks: list[Task] = []
        self.chain: dict[int, int] = {}
        self.named: dict[str, int] = {}
        self.open: tuple[int, str] | None = None
        self.groups: dict[str, IntArray] = {}

    def run(self) -> Program:
        step = self.timed.step
        for block_index, repeat in step.order:
            block = step.blocks[block_index]
            self.named = {}
            for node, seconds in zip(block.nodes, self.timed.seconds[block_index], strict=True):
                self._add(block, node, repeat, _of_repeat(seconds, repeat))
        return Program(step.n_ranks, tuple(self.tasks), step.n_points)

    def _add(self, block: Block, node: Node, repeat: int, duration_s: FloatArray) -> None:
        group = self._group(node.op)
        after = self._after(node)
        joins = (
            self.fused
            and group is None
            and self.open == (node.micro, node.stream)
            and after == (len(self.tasks) - 1,)
        )
        if joins:
            last = self.tasks[-1]
            self.tasks[-1] = Task(
                last.name, last.stream, last.duration_s + duration_s, last.after, None, "fused"
            )
        else:
            layer = block.layers[repeat]
            name = f"{block.name}.{layer}.{node.name}" if 0 <= layer else f"{block.name}.{node.name}"
            link = self._link(node.op)
            self.tasks.append(Task(name, node.stream, duration_s, after, group, node.category, link))
        self.open = (node.micro, node.stream) if group is None else None
        self.chain[node.micro] = self.named[node.name] = len(self.tasks) - 1

    def _after(self, node: Node) -> tuple[int, ...]:
        if node.after is None:
            previous = self.chain.get(node.micro)
            return () if previous is None else (previous,)
        return tuple(self.named[name] for name in node.after)

    def _group(self, op: Op) -> IntArray | None:
        name = _group_name(op)
        if name is None or self.timed.pricer.group(name).n_ranks == 1:
            return None
        if name not in self.groups:
            self.groups[name] = _membership(self.timed, name)
        return self.groups[name]

    def _link(self, op: Op) -> str | None:
        name = _group_name(op)
        if name is None:
            return None
        return "nic" if self.timed.pricer.group(name).crosses_domains else "nvlink"


def _group_name(op: Op) -> str | None:
    return op.group if isinstance(op, AllReduce | AllGather | ReduceScatter | Exchange) else None


def _membership(timed: TimedStep, name: str) -> IntArray:
    """Group of each simulated rank: `tp` innermost, an expert's shards innermost of an expert group."""
    layout, ranks = timed.pricer.case.layout, np.arange(timed.step.n_ranks)
    if name == "tp":
        return ranks // layout.tp
    if name == "etp":
        return ranks // layout.etp
    if name == "ep":
        return ranks // (layout.ep * layout.etp) * layout.etp + ranks % layout.etp
    return np.zeros_like(ranks)


def _of_repeat(seconds: FloatArray, repeat: int) -> FloatArray:
    """(n_points or 1, n_ranks or 1) of one layer."""
    return seconds[:, repeat if seconds.shape[1] > 1 else 0]
