"""Swaps of slots between packs that take load off the fullest one.

A greedy packing leaves the last, lightest items where there is room; exchanging two slots of the fullest and
another pack comes much closer to an even split, and can never be worse.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["evened_by_swaps"]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

MOST_SWAPS = 200
"""Swaps of one row; real counts take 20 to 80."""
GOOD_ENOUGH = 1e-3
"""Load of the fullest pack over the mean, less 1, at which a row is left alone: far below a batch's own noise."""


def evened_by_swaps(
    expert: IndexArray, load: FloatArray, n_packs: int, *, most_swaps: int = MOST_SWAPS
) -> IndexArray:
    """Swap slots between the fullest pack and others as long as that lowers it.

    Parameters
    ----------
    expert : (n_rows, n_slots)
        Item in each slot, pack after pack; rows are independent. A pack that lacks an item is not given it twice.
    load : (n_rows, n_items)
        Load that one slot with the item adds.
    n_packs
        Packs of equal size.
    most_swaps
        Swaps of one row.

    Returns
    -------
    (n_rows, n_slots)
        Items in each slot; the fullest pack of a row is never fuller than before.
    """
    n_rows, n_slots = expert.shape
    packed = expert.reshape(n_rows, n_packs, -1).copy()
    mean = np.take_along_axis(load, expert, -1).sum(axis=-1) / n_packs
    held = np.zeros((n_rows, n_packs, load.shape[1]), dtype=bool)
    np.put_along_axis(held, packed, True, -1)
    active = np.arange(n_rows)
    for _ in range(most_swaps):
        if not active.size:
            break
        weight = np.take_along_axis(load[active], packed[active].reshape(active.size, -1), -1)
        weight = weight.reshape(active.size, n_packs, -1)
        total = weight.sum(axis=-1)
        uneven = total.max(axis=-1) > mean[active] * (1 + GOOD_ENOUGH)
        active = active[uneven]
        if active.size:
            active = active[_swap_once(active, packed, held, weight[uneven], total[uneven])]
    return packed.reshape(n_rows, n_slots)


def _swap_once(
    rows: IndexArray, packed: IndexArray, held: NDArray[np.bool_], weight: FloatArray, total: FloatArray
) -> NDArray[np.bool_]:
    """Make the best swap of each row's fullest pack, in place; tell where there was one that helps."""
    n = np.arange(rows.size)
    full = total.argmax(axis=-1)
    own, own_weight = packed[rows, full], weight[n, full]
    top = total[n, full][:, None, None, None]
    moved = own_weight[:, :, None, None] - weight[:, None, :, :]
    after = np.maximum(top - moved, total[:, None, :, None] + moved)
    # not onto a pack that has the item already
    after[held[rows][:, :, :][n[:, None], :, own]] = np.inf
    back = np.take_along_axis(held[rows, full], packed[rows].reshape(rows.size, -1), -1)
    after = np.where(back.reshape(weight.shape)[:, None], np.inf, after)
    at = after.reshape(rows.size, -1).argmin(axis=-1)
    best = after.reshape(rows.size, -1)[n, at]
    better = best < total[n, full] * (1 - 1e-9)
    i, other, j = np.unravel_index(at, after.shape[1:])
    rows, full, i, other, j = (one[better] for one in (rows, full, i, other, j))
    gone, come = packed[rows, full, i], packed[rows, other, j]
    packed[rows, full, i], packed[rows, other, j] = come, gone
    for pack, out, new in ((full, gone, come), (other, come, gone)):
        held[rows, pack, new] = True
        held[rows, pack, out] = (packed[rows, pack] == out[:, None]).any(axis=-1)
    return np.asarray(better)
