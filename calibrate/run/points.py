"""Which points can be measured: real models' shapes, cut as deployments cut them, and which shapes are held out."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from calibrate.schema import Value
from moesim.model.catalog import list_models, load_model
from moesim.model.spec import ModelSpec

__all__ = ["FAMILIES", "HELD_OUT_SHARE", "Plan", "Point", "Scope", "candidates"]

HELD_OUT_SHARE = 0.2
_SHAPES: Mapping[str, tuple[str, ...]] = {
    "moe_ffn": ("hidden", "intermediate", "top_k", "n_experts"),
    "moe_step": ("hidden", "intermediate", "top_k", "n_experts"),
    "router": ("n_experts", "top_k", "hidden"),
    "gemm": ("n", "k"),
    "attention": ("kind", "n_heads", "n_kv_heads", "head_dim", "window"),
    "transfer": ("n_bytes",),
    "memory": ("n_bytes",),
    "launch": (),
}
"""Columns that make a shape: rows that agree in them are fitted together or held out together."""
_EXPERT_KINDS = ("moe_ffn", "moe_step")
_SALT = "moesim held-out shapes 106"
"""Chosen, before anything was measured, so that about a fifth of the shapes of every kind falls out. Changing it
would hold others out, and let a fit see what an older profile was judged on."""

_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
_LOADS = ("balanced", "power_law_1.2", "trace:default")
_CUTS = ((1, 1), (1, 4), (1, 8), (4, 1), (8, 1), (32, 1))
"""(ep, tp) of one layer's experts."""
_LARGEST_WEIGHTS_BYTES = 30e9
_LARGEST_CACHE_BYTES = 8e9
_LATENT_WIDTH = 576
"""DeepSeek-V3's cached latent (512) with its rotary part (64), report, section 4.2."""


@dataclass(frozen=True, eq=False)
class Point:
    """One thing to measure: a row of a table before its time is known."""

    kind: str
    """Kind of table."""
    family: str
    """Which plan it belongs to."""
    columns: Mapping[str, Value]
    """The table's columns but device, software and what comes of measuring."""

    @cached_property
    def held_out(self) -> bool:
        """Whether its shape is kept from the fit: by a hash, so the same on every machine and in every run."""
        names = _SHAPES[self.kind]
        kind = _EXPERT_KINDS[0] if self.kind in _EXPERT_KINDS else self.kind
        text = f"{_SALT}:{kind}:" + ",".join(str(self.columns[name]) for name in names)
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        return bool(names) and share < HELD_OUT_SHARE

    def __str__(self) -> str:
        hidden = ("op", "implementation", "dtype")
        rest = " ".join(f"{name}={value}" for name, value in self.columns.items() if name not in hidden)
        return " ".join([*(str(self.columns[name]) for name in hidden), rest])


@dataclass(frozen=True)
class Scope:
    """What a machine can be asked."""

    memory_bytes: float
    """Device memory."""
    fp8: bool
    """Whether it multiplies in fp8."""
    cpu: bool = False
    """A processor: a few small points of the families that need no GPU."""


@dataclass(frozen=True)
class Plan:
    """One family of points."""

    name: str
    group: str
    """Subcommand that measures it: ``kernels`` or ``transfers``."""
    kind: str
    quota: int
    """Points measured where time allows."""
    share: float
    """Part of the time that it is given."""
    fixed: Mapping[str, Value]
    """Columns that are the same in all its rows."""
    grid: Callable[[Scope], Iterator[dict[str, Value]]]
    """Other columns of every candidate."""
    needs_fp8: bool = False
    on_cpu: bool = False


def candidates(plan: Plan, scope: Scope) -> list[Point]:
    """Every point of a family that fits the machine; the design picks among them."""
    if (plan.needs_fp8 and not scope.fp8) or (scope.cpu and not plan.on_cpu):
        return []
    rows = [{**plan.fixed, **row} for row in plan.grid(scope)]
    distinct = {tuple(row.items()): row for row in rows}  # models share shapes
    return [Point(plan.kind, plan.name, row) for row in distinct.values()]


# ---------------------------------------------------------------- experts


@dataclass(frozen=True)
class _Experts:
    hidden: int
    intermediate: int
    top_k: int
    n_experts: int
    scoring: str

    def columns(self) -> dict[str, Value]:
        return {key: value for key, value in vars(self).items() if key != "scoring"}


_TINY = tuple(_Experts(*shape, "softmax") for shape in ((128, 128, 2, 8), (256, 64, 4, 16), (128, 256, 2, 4)))


def _models() -> list[ModelSpec]:
    return [load_model(row.name) for row in list_models()]


def _experts(scope: Scope) -> list[_Experts]:
    if scope.cpu:
        return list(_TINY)
    found = [(model.hidden, model.moe) for model in _models() if model.is_moe]
    shapes = [
        _Experts(hidden, moe.intermediate, moe.top_k, moe.n_experts, moe.scoring)
        for hidden, moe in found
        if moe is not None and moe.gated
    ]
    return list(dict.fromkeys(shapes))


def _moe_grid(scope: Scope, tokens: tuple[int, ...] = _TOKENS, loads: tuple[str, ...] = _LOADS,
              multiple: int = 16) -> Iterator[dict[str, Value]]:  # fmt: skip
    """Shapes x cuts x tokens x loads that fit the memory; `multiple` divides the cut width of an expert."""
    tokens = (1, 8, 32) if scope.cpu else tokens
    for shape, (ep, tp), n_tokens, load in itertools.product(_experts(scope), _CUTS, tokens, loads):
        if shape.n_experts % ep or shape.intermediate % (tp * multiple) or shape.hidden % multiple:
            continue
        elements = 3 * shape.hidden * shape.intermediate * shape.n_experts / (ep * tp)
        rows_bytes = n_tokens * shape.top_k * (shape.hidden + shape.intermediate / tp) * 2.0
        if 2 * elements + 3 * rows_bytes > min(_LARGEST_WEIGHTS_BYTES, 0.4 * scope.memory_bytes):
            continue
        yield {"n_tokens": n_tokens, **shape.columns(), "tp": tp, "ep": ep, "load": load}


def _fp8_moe_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    return _moe_grid(scope, multiple=128)


def _step_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    return _moe_grid(scope, loads=("balanced", "trace:default"))


def _padded_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    return _moe_grid(scope, tokens=(64, 256, 1024, 4096), loads=("balanced", "trace:default"))


def _naive_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    return _moe_grid(scope, tokens=(16, 256, 4096), loads=("balanced",))


def _router_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    for shape, n_tokens in itertools.product(_experts(scope), (1, 8, 32) if scope.cpu else (*_TOKENS, 65536)):
        yield {
            "n_tokens": n_tokens, "n_experts": shape.n_experts, "top_k": shape.top_k, "hidden": shape.hidden,
            "scoring": shape.scoring,
        }  # fmt: skip


# ---------------------------------------------------------------- dense products and attention


def _gemm_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    """Projections of the catalog's models, whole and cut over 4 and 8 ranks."""
    if scope.cpu:
        for m, (n, k) in itertools.product((1, 16, 64), ((128, 256), (256, 128), (512, 512))):
            yield {"m": m, "n": n, "k": k}
        return
    for n, k in sorted({pair for model in _models() for pair in _projections(model)}):
        for m in (*_TOKENS, 96, 2048):
            yield {"m": m, "n": n, "k": k}


def _projections(model: ModelSpec) -> Iterator[tuple[int, int]]:
    """(n, k) of one layer's dense products: columns cut where they fan out, rows where they come together."""
    for layer, tp in itertools.product(model.kinds, (1, 4, 8)):
        attention = layer.attention
        if attention.kind == "gqa":
            wide = attention.q_width + attention.k_width + attention.v_width
            yield from _cut(wide, model.hidden, attention.out_width, tp)
        if layer.dense_intermediate:
            yield from _cut(2 * layer.dense_intermediate, model.hidden, layer.dense_intermediate, tp)
        if layer.moe is not None and layer.moe.shared_intermediate:
            yield from _cut(
                2 * layer.moe.shared_intermediate, model.hidden, layer.moe.shared_intermediate, tp
            )


def _cut(fan_out: int, hidden: int, fan_in: int, tp: int) -> Iterator[tuple[int, int]]:
    for n, k in ((fan_out / tp, hidden), (hidden, fan_in / tp)):
        if n % 16 == 0 and k % 16 == 0:  # what fp8 products need, and what is deployed
            yield int(n), int(k)


def _heads(scope: Scope) -> list[tuple[int, int, int]]:
    """(heads, key-value heads, width) of one rank."""
    if scope.cpu:
        return [(4, 2, 32), (4, 4, 64)]
    layouts = {
        (spec.n_heads // tp, max(spec.n_kv_heads // tp, 1), spec.head_dim)
        for model in _models()
        for spec in (layer.attention for layer in model.kinds)
        if spec.kind == "gqa" and not spec.window and spec.head_dim == spec.v_head_dim
        for tp in (1, 4, 8)
        if spec.n_heads % tp == 0 and spec.n_heads // tp >= 1
    }
    return sorted(layout for layout in layouts if layout[0] % layout[1] == 0)


def _prefill_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    lengths = (16, 64) if scope.cpu else (128, 512, 2048, 8192, 32768)
    for heads, batch, length in itertools.product(_heads(scope), (1, 4, 16, 64), lengths):
        if batch * length <= 65536:
            yield _attention(heads, batch, length, length)


def _decode_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    contexts = (64, 256) if scope.cpu else (512, 2048, 8192, 32768, 131072)
    batches = (1, 4) if scope.cpu else (1, 8, 32, 128, 256)
    for heads, batch, context in itertools.product(_heads(scope), batches, contexts):
        if 4.0 * batch * context * heads[1] * heads[2] <= min(_LARGEST_CACHE_BYTES, 0.2 * scope.memory_bytes):
            yield _attention(heads, batch, 1, context)


def _latent_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    """Decode on a latent cache: DeepSeek-V3's, whose heads are cut over 1 to 16 ranks."""
    for heads, batch, context in itertools.product(
        _latent_heads(), (1, 8, 32, 128, 256), (512, 2048, 8192, 32768, 131072)
    ):
        if 2.0 * batch * context * _LATENT_WIDTH <= min(_LARGEST_CACHE_BYTES, 0.2 * scope.memory_bytes):
            yield _attention((heads, 1, _LATENT_WIDTH), batch, 1, context)


def _latent_heads() -> list[int]:
    """Heads of one rank of the catalog's models with this latent."""
    specs = (layer.attention for model in _models() for layer in model.kinds)
    whole = {
        spec.n_heads
        for spec in specs
        if spec.kind == "mla" and spec.kv_lora_rank + spec.qk_rope_head_dim == _LATENT_WIDTH
    }
    return sorted({heads // tp for heads in whole for tp in (1, 2, 4, 8, 16) if heads % tp == 0})


def _attention(heads: tuple[int, int, int], batch: int, n_query: int, n_context: int) -> dict[str, Value]:
    n_heads, n_kv_heads, head_dim = heads
    return {
        "batch": batch, "n_query": n_query, "n_context": n_context, "n_heads": n_heads, "n_kv_heads": n_kv_heads,
        "head_dim": head_dim, "window": 0,
    }  # fmt: skip


# ---------------------------------------------------------------- copies and launches


def _transfer_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    sizes = [2**power for power in range(12, 29, 2)]
    for op, n_bytes, pinned, n_streams, busy in itertools.product(
        ("h2d", "d2h"), sizes, (1, 0), (1, 2, 4, 8), (0, 1)
    ):  # fmt: skip
        yield {"op": op, "n_bytes": n_bytes, "pinned": pinned, "n_streams": n_streams, "busy": busy}
    for n_bytes, n_streams, busy in itertools.product(sizes, (1, 2, 4, 8), (0, 1)):
        yield {"op": "d2d", "n_bytes": n_bytes, "pinned": 0, "n_streams": n_streams, "busy": busy}


def _memory_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    powers = range(12, 21, 2) if scope.cpu else range(16, 33)
    for op, power in itertools.product(("hbm_read", "hbm_copy"), powers):
        yield {"op": op, "n_bytes": 2**power}


def _launch_grid(scope: Scope) -> Iterator[dict[str, Value]]:
    for mode, n_kernels in itertools.product(("eager",) if scope.cpu else ("eager", "graph"), (1, 10, 100)):
        yield {"mode": mode, "n_kernels": n_kernels}


def _fixed(op: str, implementation: str, dtype: str, **more: Value) -> dict[str, Value]:
    return {"op": op, "implementation": implementation, "dtype": dtype, **more}


_SDPA = {"kind": "gqa", "kv_dtype": "bfloat16"}
_LATENT = {"kind": "mla", "kv_dtype": "bfloat16"}

FAMILIES: tuple[Plan, ...] = (
    Plan("moe_ffn bfloat16", "kernels", "moe_ffn", 150, 0.24,
         _fixed("moe_ffn", "moesim-triton", "bfloat16"), _moe_grid),
    Plan("moe_ffn fp8_block", "kernels", "moe_ffn", 60, 0.10,
         _fixed("moe_ffn", "moesim-triton", "fp8_block"), _fp8_moe_grid, needs_fp8=True),
    Plan("moe_ffn padded", "kernels", "moe_ffn", 25, 0.04,
         _fixed("moe_ffn", "moesim-padded", "bfloat16"), _padded_grid),
    Plan("moe_ffn naive", "kernels", "moe_ffn", 15, 0.03,
         _fixed("moe_ffn", "moesim-naive", "bfloat16"), _naive_grid, on_cpu=True),
    Plan("moe_permute", "kernels", "moe_step", 25, 0.03,
         _fixed("moe_permute", "moesim-triton", "bfloat16"), _step_grid),
    Plan("moe_up", "kernels", "moe_step", 30, 0.04,
         _fixed("moe_up", "moesim-triton", "bfloat16"), _step_grid),
    Plan("moe_down", "kernels", "moe_step", 30, 0.04,
         _fixed("moe_down", "moesim-triton", "bfloat16"), _step_grid),
    Plan("moe_combine", "kernels", "moe_step", 15, 0.02,
         _fixed("moe_combine", "moesim-triton", "bfloat16"), _step_grid),
    Plan("router", "kernels", "router", 40, 0.05,
         _fixed("router", "moesim-triton", "bfloat16"), _router_grid),
    Plan("gemm bfloat16", "kernels", "gemm", 40, 0.08,
         _fixed("gemm", "torch:linear", "bfloat16"), _gemm_grid, on_cpu=True),
    Plan("gemm fp8", "kernels", "gemm", 20, 0.04,
         _fixed("gemm", "torch:scaled_mm", "fp8"), _gemm_grid, needs_fp8=True),
    Plan("attention prefill", "kernels", "attention", 25, 0.05,
         _fixed("attention_prefill", "torch:sdpa", "bfloat16", **_SDPA), _prefill_grid, on_cpu=True),
    Plan("attention decode", "kernels", "attention", 25, 0.05,
         _fixed("attention_decode", "torch:sdpa", "bfloat16", **_SDPA), _decode_grid, on_cpu=True),
    Plan("attention latent", "kernels", "attention", 20, 0.06,
         _fixed("attention_decode", "moesim-triton", "bfloat16", **_LATENT), _latent_grid),
    Plan("transfers", "transfers", "transfer", 48, 0.08,
         {"implementation": "torch:copy", "dtype": "any"}, _transfer_grid),
    Plan("memory", "transfers", "memory", 16, 0.03,
         {"implementation": "torch", "dtype": "any"}, _memory_grid, on_cpu=True),
    Plan("launch", "transfers", "launch", 6, 0.02,
         _fixed("launch", "torch", "any"), _launch_grid, on_cpu=True),
)  # fmt: skip
"""What a full run measures. Shares follow how much of a model's step each family decides."""
