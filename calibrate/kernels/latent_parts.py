"""How attention on a cached latent is cut over multiprocessors: plain numbers, which planning needs without torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HEADS", "KEYS", "PROGRAMS", "STAGES", "WARPS", "Parts", "parts_for"]

HEADS = (16, 64)
"""Heads of one program: few, or the rows of Hopper's matrix instruction."""
KEYS = {16: 64, 64: 32}
"""Keys of one step, by heads."""
WARPS, STAGES, PROGRAMS = {16: 4, 64: 8}, {16: 2, 64: 3}, {16: 2, 64: 1}
"""Warps of a program, steps in flight, programs that an SM holds."""
_PART_STEPS = 4
"""What a part costs beside its own steps, in steps: loading queries, storing and adding up sums (assumed)."""
_MOST_PARTS = 64


@dataclass(frozen=True)
class Parts:
    """How one call is cut."""

    block_h: int
    """Heads of a program."""
    n_parts: int
    """Parts of a sequence."""
    part_keys: int
    """Keys of a part."""


def parts_for(batch: int, n_heads: int, n_context: int, n_sms: int) -> Parts:
    """Cut keys so that the waves of programs, each of its steps and what a part costs, are the shortest.

    Examples
    --------
    >>> [parts_for(b, 128, 4096, 132).n_parts for b in (1, 32, 100, 264)]
    [64, 2, 3, 1]
    """
    block_h = HEADS[1] if n_heads > HEADS[0] else HEADS[0]
    step = KEYS[block_h]
    steps = -(-n_context // step)
    programs, resident = batch * -(-n_heads // block_h), PROGRAMS[block_h] * n_sms

    def waves_of_steps(n_parts: int) -> int:
        return -(-programs * n_parts // resident) * (-(-steps // n_parts) + _PART_STEPS)

    steps_a_part = -(-steps // min(range(1, min(steps, _MOST_PARTS) + 1), key=waves_of_steps))
    return Parts(block_h, -(-steps // steps_a_part), steps_a_part * step)
