"""Ranks that are exact copies, simulated once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from moesim.engine.program import IntArray, Program, Task

__all__ = ["Folding", "fold"]


@dataclass(frozen=True, eq=False)
class Folding:
    """A program over classes of ranks that cannot be told apart."""

    program: Program
    """One rank a class, one point."""
    class_of: IntArray
    """(n_ranks,) class of each rank of the program that was folded: its rank in `program`."""


def fold(program: Program, point: int) -> Folding:
    """Merge ranks whose times are equal whatever happens, at one point.

    Parameters
    ----------
    program
        Over all ranks.
    point
        Workload size to keep.

    Returns
    -------
    Folding
        The coarsest classes such that ranks of one class have the same duration in every task they
        take part in, need the same of their GPU's memory, and meet the same *set* of classes in every collective.

    Notes
    -----
    A collective starts with its last member and advances at the pace of its slowest link, and both are
    extremes over its members: how many members a class has does not matter, only which classes there
    are. So a collective of many copies folds into one member, and results are exact, not approximate.
    This is the coarsest equitable partition of colour refinement, with sets in place of multisets.
    """
    groups = _distinct_groups(program.tasks)
    class_of = _same_columns(program, point)
    while True:
        meets = [_classes_met(group, class_of) for group in groups.values()]
        refined = _number(zip(class_of.tolist(), *meets, strict=True))
        if refined.max() == class_of.max():  # refinement only splits: as many classes, the same ones
            break
        class_of = refined
    one_of_each = np.unique(class_of, return_index=True)[1]
    folded_groups = {key: _number_sets(met, one_of_each) for key, met in zip(groups, meets, strict=True)}
    tasks = tuple(
        replace(
            task,
            duration_s=program.duration_at_s(task, point)[one_of_each],
            group=None if task.group is None else folded_groups[task.group.tobytes()],
            draw=task.draw and replace(task.draw, memory=program.memory_at(task, point)[one_of_each]),
        )
        for task in program.tasks
    )
    return Folding(Program(one_of_each.size, tasks, sharing=program.sharing), class_of)


def _distinct_groups(tasks: Iterable[Task]) -> dict[bytes, IntArray]:
    return {task.group.tobytes(): task.group for task in tasks if task.group is not None}


def _same_columns(program: Program, point: int) -> IntArray:
    """(n_ranks,) class by duration and memory in every task; where a rank takes no part, neither counts."""
    drawn = [task for task in program.tasks if task.draw is not None] if program.sharing else []
    columns = np.zeros((len(program.tasks) + len(drawn) + 1, program.n_ranks))
    for row, task in zip(columns, program.tasks, strict=False):
        row[:] = program.duration_at_s(task, point)
        if task.group is not None:
            row[task.group < 0] = -1.0
    for row, task in zip(columns[len(program.tasks) :], drawn, strict=False):
        row[:] = program.memory_at(task, point)
        if task.group is not None:
            row[task.group < 0] = -1.0
    return _number(column.tobytes() for column in columns.T)


def _classes_met(group: IntArray, class_of: IntArray) -> list[frozenset[int] | None]:
    """For each rank the classes in its collective; None where it takes no part."""
    met: dict[int, set[int]] = {}
    ids = group.tolist()
    for one, colour in zip(ids, class_of.tolist(), strict=True):
        met.setdefault(one, set()).add(colour)
    frozen = {one: frozenset(colours) if one >= 0 else None for one, colours in met.items()}
    return [frozen[one] for one in ids]


def _number_sets(met: list[frozenset[int] | None], ranks: IntArray) -> IntArray:
    """(n_classes,) collective of each class: classes with one set of partners are one collective."""
    kept = [met[rank] for rank in ranks.tolist()]
    numbers = _number(kept)
    numbers[[one is None for one in kept]] = -1
    return numbers


def _number(keys: Iterable[Hashable]) -> IntArray:
    """Equal keys to equal numbers, counted in order of first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)
