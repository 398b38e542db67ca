"""Seconds of kernels bound by memory: norms, rotary embedding, activations, residuals, optimiser."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moesim.hardware.gpu import Gpu
from moesim.work.ops import Elementwise, FloatArray

__all__ = ["elementwise_s"]


def elementwise_s(op: Elementwise, *, gpu: Gpu, params: Mapping[str, float]) -> FloatArray:
    """Time of `op.n_kernels` kernels that move `op.moved_bytes` in all.

    Parameters
    ----------
    op
        Bytes [P, L, R] over all kernels.
    gpu
        Memory rate that ``hbm_fraction`` refers to.
    params
        Values of a family ``elementwise``: ``launch_s`` per kernel, ``hbm_fraction``.

    Returns
    -------
    FloatArray
        [P, L, R] seconds; 0 where nothing is moved.

    Notes
    -----
    ``t = n_kernels launch_s + bytes / (hbm_fraction B)``. Tensors that stay in the level-2 cache between two
    kernels move faster than this; the launch dominates them.
    """
    moved = np.asarray(op.moved_bytes, dtype=np.float64)
    total = op.n_kernels * params["launch_s"] + moved / (params["hbm_fraction"] * gpu.hbm_bytes_per_s)
    return np.where(moved > 0, total, 0.0)
