"""Columns of measured tables: one schema a kind, the only place that says what a measurement file may hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from moesim.errors import MeasurementError

__all__ = ["KEY_OPTIONAL", "OPTIONAL", "SCHEMAS", "Column", "Schema", "Value", "kind_of", "schema"]

Type = Literal["text", "integer", "number"]
Value = str | int | float
EXACT = 2**53
"""Greatest whole number up to which a float holds every one."""


@dataclass(frozen=True)
class Column:
    """What the cells of one column may be."""

    name: str
    type: Type
    unit: str = ""
    minimum: float | None = None
    """Least value allowed; None where any is."""
    maximum: float | None = None
    """Greatest value allowed."""
    above_zero: bool = False
    """Zero is refused too, as for times."""
    choices: tuple[str, ...] = ()
    """Words allowed; any where empty."""
    pattern: str = ""
    """Regular expression of the words allowed; any where empty."""
    may_be_blank: bool = False

    @property
    def rule(self) -> str:
        """What a cell must be, in words."""
        if self.choices:
            return f"{self.name} must be one of {', '.join(self.choices)}"
        if self.pattern:
            return f"{self.name} must be like {_IN_WORDS.get(self.pattern, self.pattern)}"
        if self.type == "text":
            return f"{self.name} must be a name"
        what = "a whole number" if self.type == "integer" else "a finite number"
        unit = f" [{self.unit}]" if self.unit else ""
        if self.above_zero:
            return f"{self.name} must be {what} above 0{unit}"
        if self.maximum is not None:
            return f"{self.name} must be {self.minimum:g} or {self.maximum:g}"
        least = f" of at least {self.minimum:g}" if self.minimum is not None else ""
        return f"{self.name} must be {what}{least}{unit}"

    def parse(self, value: object) -> Value | None:
        """Return one cell's value in its type, None where blank; ValueError where it breaks the rule."""
        if value is None or (isinstance(value, str) and not value.strip()) or value != value:
            if self.may_be_blank:
                return None
            raise ValueError(self.rule)
        if self.type == "text":
            return self._word(value)
        number = float(value)  # type: ignore[arg-type]  # whatever is no number raises
        if number != number or abs(number) == float("inf"):
            raise ValueError(self.rule)
        if self.type == "integer" and (number != int(number) or abs(number) > EXACT):
            raise ValueError(self.rule)
        low = self.minimum is not None and number < self.minimum
        if (self.above_zero and number <= 0) or low or (self.maximum is not None and number > self.maximum):
            raise ValueError(self.rule)
        return int(number) if self.type == "integer" else number

    def _word(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(self.rule)
        if self.choices and value not in self.choices:
            raise ValueError(self.rule)
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise ValueError(self.rule)
        return value


@dataclass(frozen=True)
class Schema:
    """Columns of one kind of table."""

    kind: str
    ops: tuple[str, ...]
    """Words of its `op` column; they and the columns say which kind a file is."""
    required: tuple[Column, ...]
    recorded: tuple[str, ...]
    """Optional columns that our own measurements fill in."""
    about: str

    @property
    def optional(self) -> tuple[Column, ...]:
        """Columns that may be there as well."""
        names = {column.name for column in self.required}
        return tuple(column for column in OPTIONAL if column.name not in names)

    @property
    def columns(self) -> dict[str, Column]:
        """Every column allowed, by name."""
        return {column.name: column for column in (*self.required, *self.optional)}

    @property
    def key(self) -> tuple[str, ...]:
        """Columns that tell one measured point from another."""
        names = [column.name for column in self.required if column.name != "latency_s"]
        return (*names, *(name for name in KEY_OPTIONAL if name not in names))


LOADS = r"balanced|uniform|power_law_\d+(\.\d+)?|trace(:\S+)?"
_IN_WORDS = {LOADS: "balanced, uniform, power_law_1.2 or trace:NAME"}

DTYPES = (
    "bfloat16", "fp16", "float16", "float32", "fp8", "fp8_block", "fp8_static", "fp8_ootb", "mxfp8", "int8", "uint8",
    "int4_wo", "int8_wo", "sq", "w4afp8", "w4a16_mxfp4", "w4a8_mxfp4_mxfp8", "nvfp4", "any",
)  # fmt: skip
"""Formats of weights and payloads; `any` where the measurement has none, as of a launch."""

KV_DTYPES = ("bfloat16", "fp16", "float16", "fp8", "int8")


def _text(name: str, *choices: str) -> Column:
    return Column(name, "text", choices=choices)


def _count(name: str, unit: str = "", *, minimum: float = 1) -> Column:
    return Column(name, "integer", unit, minimum=minimum)


def _flag(name: str) -> Column:
    return Column(name, "integer", minimum=0, maximum=1)


LATENCY = Column("latency_s", "number", "s", above_zero=True)
DTYPE = _text("dtype", *DTYPES)


def _seconds(name: str) -> Column:
    return Column(name, "number", "s", above_zero=True, may_be_blank=True)


def _blank(column: Column) -> Column:
    return Column(**{**vars(column), "may_be_blank": True})


OPTIONAL = (
    _seconds("latency_p10_s"),
    _seconds("latency_p90_s"),
    _seconds("latency_low_s"),
    _seconds("latency_high_s"),
    _blank(_count("n_samples")),
    _blank(_text("cache", "cold", "warm")),
    _blank(_flag("graph")),
    Column("sm_clock_hz", "number", "Hz", above_zero=True, may_be_blank=True),
    Column("memory_clock_hz", "number", "Hz", above_zero=True, may_be_blank=True),
    Column("temperature_c", "number", "degree Celsius", may_be_blank=True),
    _blank(_text("date")),
    _blank(_count("seed", minimum=0)),
    _blank(_flag("held_out")),
    _blank(_count("n_nodes")),
    _blank(_text("split", "equal", "trace")),
    Column("start_skew_s", "number", "s", minimum=0, may_be_blank=True),
    _blank(_text("host")),
    _blank(_count("repeat", minimum=0)),
)
"""Columns that any table may have besides its kind's own; the first four are the 10th and 90th percentile of the
samples and the 95% interval of their median, `split` says how an exchange parted its payload."""

KEY_OPTIONAL = ("cache", "graph", "split", "n_nodes")
"""Optional columns that are part of what was measured, not of how it came out."""

_RUN = (
    "latency_p10_s", "latency_p90_s", "latency_low_s", "latency_high_s", "n_samples", "cache", "graph",
    "sm_clock_hz", "memory_clock_hz", "temperature_c", "date", "seed", "held_out", "host", "repeat",
)  # fmt: skip
_RUN_LINKS = (*_RUN, "n_nodes", "split", "start_skew_s")

_EXPERTS = (
    _count("n_tokens"),
    _count("hidden"),
    _count("intermediate"),
    _count("top_k"),
    _count("n_experts"),
    _count("tp"),
    _count("ep"),
    Column("load", "text", pattern=LOADS),
)


def _schema(
    kind: str, ops: Iterable[str], *columns: Column, about: str, dtype: bool = True, links: bool = False
) -> Schema:
    ops = tuple(ops)
    head = [_text("op", *ops), _text("device"), _text("implementation"), _text("software")]
    if dtype:
        head.append(DTYPE)
    required = (*head, *columns, LATENCY)
    names = {column.name for column in required}
    recorded = tuple(name for name in (_RUN_LINKS if links else _RUN) if name not in names)
    return Schema(kind, ops, required, recorded, about)


_ALL = (
    _schema("moe_ffn", ["moe_ffn"], *_EXPERTS, about="fused expert feed-forward of one rank"),
    _schema(
        "moe_step",
        ["moe_permute", "moe_up", "moe_down", "moe_combine"],
        *_EXPERTS,
        about="one kernel of the expert feed-forward",
    ),
    _schema("gemm", ["gemm"], _count("m"), _count("n"), _count("k"), about="dense matrix product"),
    Schema(
        "attention",
        ("attention_prefill", "attention_decode"),
        (
            _text("op", "attention_prefill", "attention_decode"),
            _text("device"),
            _text("implementation"),
            _text("software"),
            _text("kind", "gqa", "mla"),
            DTYPE,
            _text("kv_dtype", *KV_DTYPES),
            _count("batch"),
            _count("n_query"),
            _count("n_context"),
            _count("n_heads"),
            _blank(_count("n_kv_heads")),
            _blank(_count("head_dim")),
            _count("window", minimum=0),
            LATENCY,
        ),
        _RUN,
        "attention kernel; heads are those of one rank; n_kv_heads and head_dim may be blank for mla",
    ),
    Schema(
        "mla_block",
        ("mla_block_prefill", "mla_block_decode"),
        (
            _text("op", "mla_block_prefill", "mla_block_decode"),
            _text("device"),
            _text("implementation"),
            _text("software"),
            _text("model"),
            DTYPE,
            _text("kv_dtype", *KV_DTYPES),
            _count("batch"),
            _count("n_context"),
            _count("n_heads"),
            LATENCY,
        ),
        _RUN,
        "latent attention with its projections",
    ),
    _schema(
        "collective",
        ["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "send_recv", "broadcast"],
        Column("n_ranks", "integer", minimum=2),
        _count("message_elements"),
        _count("message_bytes", "bytes"),
        about="NCCL or gloo; sizes as nccl-tests counts them",
        links=True,
    ),
    _schema(
        "all_reduce",
        ["all_reduce"],
        Column("n_ranks", "integer", minimum=2),
        _count("message_elements"),
        about="a framework's own one-shot or two-shot all-reduce",
        links=True,
    ),
    _schema(
        "deepep",
        ["ep_dispatch", "ep_combine"],
        _count("n_nodes"),
        _count("n_ranks"),
        _count("n_tokens"),
        _count("hidden"),
        _count("top_k"),
        _count("n_experts"),
        _blank(_count("n_sms")),
        about="DeepEP dispatch and combine; n_tokens a rank; n_sms blank where the kernel has no such setting",
        dtype=False,
        links=True,
    ),
    _schema(
        "router",
        ["router"],
        _count("n_tokens"),
        _count("n_experts"),
        _count("top_k"),
        _count("hidden"),
        _text("scoring", "softmax", "sigmoid"),
        about="logits, scores and choice of experts",
    ),
    _schema(
        "transfer",
        ["h2d", "d2h", "d2d"],
        _count("n_bytes", "bytes"),
        _flag("pinned"),
        _count("n_streams"),
        _flag("busy"),
        about="copies between host and device memory",
    ),
    _schema("memory", ["hbm_read", "hbm_copy"], _count("n_bytes", "bytes"), about="device memory"),
    _schema(
        "launch",
        ["launch"],
        _text("mode", "eager", "graph"),
        _count("n_kernels"),
        about="an empty kernel; latency_s is of one of n_kernels",
    ),
)

SCHEMAS: Mapping[str, Schema] = {one.kind: one for one in _ALL}
"""Kinds of tables, by name."""


def schema(kind: str) -> Schema:
    """Columns of a kind.

    Raises
    ------
    MeasurementError
        If there is no such kind.
    """
    if kind not in SCHEMAS:
        raise MeasurementError(
            "is no kind of measurement", value=kind, fix=f"use one of {', '.join(SCHEMAS)}"
        )
    return SCHEMAS[kind]


def kind_of(ops: Iterable[str], columns: Iterable[str], implementations: Iterable[str]) -> Schema | None:
    """Kind of the table that holds some operations; None where no kind has the first of them that is known."""
    wanted = list(ops)
    known = [one for op in wanted for one in SCHEMAS.values() if op in one.ops]
    if not known:
        return None
    if all(op == "all_reduce" for op in wanted):
        # a library's, with message_bytes, or a framework's own kernel, without
        library = "message_bytes" in set(columns) or not {"nccl", "gloo"}.isdisjoint(implementations)
        return SCHEMAS["collective" if library else "all_reduce"]
    return known[0]
