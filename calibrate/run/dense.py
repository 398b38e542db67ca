"""Dense products and attention as torch runs them, and our attention on a latent cache."""

from __future__ import annotations

import math
from typing import Any

from calibrate.run.device import Device
from calibrate.run.points import Point
from calibrate.run.protocol import Cache, Case, check_close, n_sets_for

__all__ = ["AttentionCase", "GemmCase", "LatentCase", "attention_case"]

_CHECKED_ROWS = 64
_LATENT, _ROTARY, _HEAD = 512, 64, 128
"""DeepSeek-V3: rank and rotary part of the cache, width of a head (report, section 4.2)."""
_BF16_TOLERANCE = 0.02
_FP8_TOLERANCE = 0.03
"""Against the product of the rounded operands, so the operands' own rounding is not in it."""


class GemmCase:
    """``y[m, n] = x[m, k] w[n, k]^T`` by ``torch.matmul``, or in fp8 a cast of `x` and ``torch._scaled_mm``.

    Engines hold activations in bfloat16, so the cast is part of what a layer pays; one scale a tensor.
    """

    n_units = 1
    repeats = True
    capturable = True
    caches: tuple[Cache, ...] = ("cold", "warm")

    def __init__(self, point: Point, device: Device) -> None:
        import torch

        self._torch: Any = torch
        m, n, k = (int(point.columns[name]) for name in ("m", "n", "k"))
        self._fp8 = point.columns["dtype"] == "fp8"
        self.n_kernels = 2 if self._fp8 else 1
        set_bytes = 2 * m * k + (1 if self._fp8 else 2) * n * k + 2 * m * n
        self.n_sets = n_sets_for(set_bytes, device, shared_bytes=m * k + 2 * n * k)
        where: dict[str, Any] = {"device": device.torch_name, "dtype": torch.bfloat16}
        self._one = torch.ones((), device=device.torch_name)
        self._x = [torch.randn(m, k, **where) for _ in range(self.n_sets)]
        self._w = [self._weight(torch.randn(n, k, **where) / math.sqrt(k)) for _ in range(self.n_sets)]
        self._y = [torch.empty(m, n, **where) for _ in range(self.n_sets)]
        self._cast = torch.empty_like(self._x[0], dtype=torch.float8_e4m3fn) if self._fp8 else None

    def refresh(self, index: int, sample: int) -> None:
        """New activations; weights stay, another set each call."""
        self._x[index].normal_()

    def call(self, index: int) -> None:
        """One product."""
        x, w = self._x[index], self._w[index]
        if self._cast is not None:
            self._cast.copy_(x)
            how = {"scale_a": self._one, "scale_b": self._one, "use_fast_accum": True}
            self._torch._scaled_mm(
                self._cast, w.t(), out_dtype=self._torch.bfloat16, out=self._y[index], **how
            )
        else:
            self._torch.matmul(x, w.t(), out=self._y[index])

    def check(self) -> None:
        """First rows against the same product in float32."""
        self._y[0].fill_(math.nan)
        self.call(0)
        x = self._x[0] if self._cast is None else self._cast
        expected = x[:_CHECKED_ROWS].float() @ self._w[0].float().T
        tolerance = _FP8_TOLERANCE if self._fp8 else _BF16_TOLERANCE
        check_close(self._y[0][:_CHECKED_ROWS], expected, tolerance=tolerance)

    def _weight(self, values: Any) -> Any:
        return values.to(self._torch.float8_e4m3fn) if self._fp8 else values


class AttentionCase:
    """``scaled_dot_product_attention`` on contiguous keys and values: causal over a prompt, or one query each."""

    n_kernels = 1
    n_units = 1
    repeats = True
    capturable = True
    caches: tuple[Cache, ...] = ("cold", "warm")

    def __init__(self, point: Point, device: Device) -> None:
        import torch

        self._torch: Any = torch
        names = ("batch", "n_query", "n_context", "n_heads", "n_kv_heads", "head_dim")
        batch, self._n_query, n_context, heads, kv_heads, dim = (int(point.columns[name]) for name in names)
        self._causal = self._n_query > 1
        self._group = heads // kv_heads
        elements = 2 * batch * heads * self._n_query * dim + 2 * batch * kv_heads * n_context * dim
        self.n_sets = n_sets_for(2 * elements, device)
        where: dict[str, Any] = {"device": device.torch_name, "dtype": torch.bfloat16}
        self._q = [torch.randn(batch, heads, self._n_query, dim, **where) for _ in range(self.n_sets)]
        self._k = [torch.randn(batch, kv_heads, n_context, dim, **where) for _ in range(self.n_sets)]
        self._v = [torch.randn(batch, kv_heads, n_context, dim, **where) for _ in range(self.n_sets)]

    def refresh(self, index: int, sample: int) -> None:
        """New queries; the cache stays, another set each call."""
        self._q[index].normal_()

    def call(self, index: int) -> None:
        """One kernel, or two where it splits the keys."""
        self._attend(index)

    def check(self) -> None:
        """Last queries of the last sequence's last head against softmax(q k^T / sqrt(d)) v in float32."""
        n = min(self._n_query, 16)
        found = self._attend(0)[-1, -1, -n:]
        q, k, v = (one[0][-1, -1].float() for one in (self._q, self._k, self._v))
        scores = q[-n:] @ k.T / math.sqrt(q.shape[1])
        if self._causal:
            last = self._torch.arange(self._n_query - n, self._n_query, device=q.device)
            seen = self._torch.arange(k.shape[0], device=q.device)[None, :] <= last[:, None]
            scores = scores.masked_fill(~seen, -math.inf)
        check_close(found, scores.softmax(dim=-1) @ v, tolerance=_BF16_TOLERANCE)

    def _attend(self, index: int) -> Any:
        return self._torch.nn.functional.scaled_dot_product_attention(
            self._q[index], self._k[index], self._v[index], is_causal=self._causal, enable_gqa=self._group > 1
        )  # fmt: skip


class LatentCase:
    """Our kernel on a cached latent: one query a sequence, all heads on the same keys."""

    n_units = 1
    repeats = True
    capturable = True
    caches: tuple[Cache, ...] = ("cold", "warm")

    def __init__(self, point: Point, device: Device) -> None:
        import torch

        from calibrate.kernels.latent import latent_decode
        from calibrate.kernels.latent_parts import parts_for

        batch, n_context, n_heads = (int(point.columns[name]) for name in ("batch", "n_context", "n_heads"))
        width = _LATENT + _ROTARY
        cut = parts_for(batch, n_heads, n_context, device.n_sms)
        self.n_kernels = 1 if cut.n_parts == 1 else 2
        sums_bytes = 4 * batch * n_heads * cut.n_parts * (_LATENT + 1)
        self.n_sets = n_sets_for(2 * batch * (n_heads + n_context) * width, device, shared_bytes=sums_bytes)
        dtype = torch.float16 if point.columns["dtype"] == "float16" else torch.bfloat16
        where: dict[str, Any] = {"device": device.torch_name, "dtype": dtype}
        self._how = {"scale": (_HEAD + _ROTARY) ** -0.5, "latent": _LATENT}
        self._n_sms, self._decode = device.n_sms, latent_decode
        self._q = [torch.randn(batch, n_heads, width, **where) for _ in range(self.n_sets)]
        self._cache = [torch.randn(batch, n_context, width, **where) for _ in range(self.n_sets)]
        self._out = torch.empty(batch, n_heads, _LATENT, **where)

    def refresh(self, index: int, sample: int) -> None:
        """New queries; the cache stays, another set each call."""
        self._q[index].normal_()

    def call(self, index: int) -> None:
        """One kernel, or two where it cuts the keys."""
        self._decode(self._q[index], self._cache[index], n_sms=self._n_sms, out=self._out, **self._how)

    def check(self) -> None:
        """The last sequence against the reference."""
        from calibrate.kernels import reference

        self._out.fill_(math.nan)
        self.call(0)
        expected = reference.latent_decode(self._q[0][-1:], self._cache[0][-1:], **self._how)
        check_close(self._out[-1:], expected, tolerance=_BF16_TOLERANCE)


def attention_case(point: Point, device: Device) -> Case:
    """Make the attention that a point asks for."""
    return (LatentCase if point.columns["kind"] == "mla" else AttentionCase)(point, device)
