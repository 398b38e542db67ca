"""One colour for each kind of work, in every figure.

The hues are Paul Tol's "muted" scheme, which stays apart under the usual colour-vision deficiencies
(SRON/EPS/TN/09-002, issue 3.2, 2021, figure 4). Memory takes the colour of the work that it serves.
"""

from __future__ import annotations

import zlib

__all__ = ["ACCENT", "GREY", "INK", "PALE", "SCALE", "SERIES", "color", "is_exposed", "label"]

INK = "#26323d"
GREY = "#b9c0c7"
PALE = "#e4e8eb"
ACCENT = "#2c5f8a"

SERIES = ("#332288", "#cc6677", "#117733", "#88ccee", "#aa4499", "#999933")
"""For series that are no kind of work, such as clusters."""

SCALE = ((0.0, "#f6f8fa"), (0.15, "#d5e3ef"), (0.35, "#9fc3dd"), (0.6, "#4f8fbf"), (1.0, "#123f66"))
"""Pale to dark, for maps."""

EXPOSED = "exposed "

KINDS: dict[str, tuple[str, str]] = {
    "attention": ("attention", "#332288"),
    "attention_gemm": ("attention projections", "#88ccee"),
    "expert_ffn": ("routed experts", "#ddcc77"),
    "dense_ffn": ("dense and shared FFN", "#999933"),
    "shared_expert": ("shared experts", "#999933"),
    "router": ("router", "#44aa99"),
    "elementwise": ("norms and elementwise", "#a5bdb8"),
    "head": ("LM head", "#117733"),
    "dispatch": ("dispatch", "#cc6677"),
    "combine": ("combine", "#882255"),
    "all_reduce": ("all-reduce", "#aa4499"),
    "reduce_scatter": ("reduce-scatter", "#c98bbf"),
    "all_gather": ("all-gather", "#7a3b73"),
    "gradients": ("gradient exchange", "#aa4499"),
    "pipeline": ("pipeline send", "#6b4f3a"),
    "optimizer": ("optimiser", "#117733"),
    "host": ("host and launch", "#7d8790"),
    "wait": ("waiting", PALE),
    "weights_experts": ("expert weights", "#ddcc77"),
    "weights_dense": ("other weights", "#999933"),
    "weights": ("weights", "#999933"),
    "kv_cache": ("KV cache", "#332288"),
    "activations": ("activations", "#88ccee"),
    "exchange_buffers": ("exchange buffers", "#cc6677"),
    "runtime": ("runtime", "#7d8790"),
}
"""Label and colour by kind; kinds not here get a colour from `SERIES` by their name."""


def is_exposed(kind: str) -> bool:
    """Tell whether a part of a step is communication that no computation hides."""
    return kind.startswith(EXPOSED)


def label(kind: str) -> str:
    """Name of a kind of work or memory for people."""
    bare = kind.removeprefix(EXPOSED)
    known = KINDS[bare][0] if bare in KINDS else bare.replace("_", " ")
    return f"{EXPOSED}{known}" if is_exposed(kind) else known


def color(kind: str) -> str:
    """Colour of a kind of work or memory; exposed communication has the colour of what is exposed."""
    bare = kind.removeprefix(EXPOSED)
    if bare in KINDS:
        return KINDS[bare][1]
    return SERIES[zlib.crc32(bare.encode()) % len(SERIES)]
