"""Record which experts a transformers model chooses while it runs, as a trace."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibrate.routing.routers import Router, chosen, find_routers
from moesim.errors import TraceError
from moesim.routing import TraceHeader, TraceWriter

__all__ = ["Capture", "capture_routing"]

_PHASES = ("prefill", "decode")
_CACHES = ("cache", "past_key_values")
"""Names of the cache among a forward pass's arguments, in transformers from 5.24 and before."""


@dataclass(frozen=True)
class _Pass:
    """One forward pass in the spool: where it begins, its shape, which of its tokens are real."""

    at: int
    n_rows: int
    n_columns: int
    real: NDArray[np.bool_]


class Capture:
    """What is being recorded; made by :func:`capture_routing`.

    A pass goes to a nameless temporary file as it ends. When the next batch begins, or at the end, the sequences
    of a batch are written one after the other: what is held is one pass, whatever the model generates.

    Attributes
    ----------
    n_tokens, n_passes
        Recorded so far, by phase.
    """

    def __init__(
        self,
        routers: list[Router],
        writer: TraceWriter,
        phases: tuple[str, ...],
        eos: list[int],
        folder: Path,
    ) -> None:
        self.n_tokens = dict.fromkeys(_PHASES, 0)
        self.n_passes = dict.fromkeys(_PHASES, 0)
        self.notes: list[str] = []
        self.has_weights: bool | None = None
        self.top_k = 0
        self._routers, self._writer, self._phases = routers, writer, phases
        self._eos, self._ended = eos, np.zeros(0, dtype=np.bool_)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".capture.")  # noqa: SIM115 (closed by `close`)
        self._passes: list[_Pass] = []
        self._open: dict[int, tuple[NDArray[Any], NDArray[np.float16] | None] | None] | None = None
        self._about: tuple[int, int, NDArray[np.bool_], str] = (0, 0, np.zeros((0, 0), bool), "prefill")

    def begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note batch, padding and phase of a pass that starts."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        if tokens is None:
            raise TraceError("a pass has input_ids or inputs_embeds", place="capture")
        n_rows, n_columns = int(tokens.shape[0]), int(tokens.shape[1])
        past = _past(kwargs)
        if past == 0 or len(self._ended) != n_rows:
            self.end_batch()
            self._ended = np.zeros(n_rows, dtype=np.bool_)
        real = _real(kwargs.get("attention_mask"), n_rows, n_columns, self.notes)
        phase = "decode" if past and n_columns == 1 else "prefill"
        if phase == "decode" and tokens.ndim == 2:
            self._ended |= np.isin(tokens[:, 0].detach().cpu().numpy(), self._eos)
            real = real & ~self._ended[:, None]
        self._about = (n_rows, n_columns, real, phase)
        self._open = {}

    def router(self, router: Router) -> Callable[[torch.nn.Module, Any, Any], None]:
        """Make the hook of one router."""

        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            if self._open is not None:  # not while a backward pass computes activations again
                self._open[router.layer] = chosen(router, output)

        return hook

    def experts(self, router: Router) -> Callable[[torch.nn.Module, Any, dict[str, Any]], None]:
        """Make the hook of a router's experts, for blocks that choose by themselves from its logits."""

        def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self._open is not None and (router.linear or self._open.get(router.layer) is None):
                given = chosen(replace(router, linear=False), (*args, *kwargs.values()))
                self._open[router.layer] = given or self._open.get(router.layer)

        return hook

    def end(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Move a pass that is over to the file."""
        found, self._open = self._open or {}, None
        n_rows, n_columns, real, phase = self._about
        if phase not in self._phases:
            return
        planes = [one for router in self._routers if (one := found.get(router.layer)) is not None]
        if len(planes) < len(self._routers):
            missing = [router.name for router in self._routers if found.get(router.layer) is None]
            raise TraceError("told no ids of experts in a pass", value=missing, place="capture")
        shapes = {ids.shape for ids, _ in planes}
        if len(shapes) > 1 or next(iter(shapes))[0] != n_rows * n_columns:
            rule = f"every router chooses as many experts for each of the {n_rows} x {n_columns} tokens"
            raise TraceError(rule, value=sorted(shapes), place="capture")
        self.top_k = next(iter(shapes))[1]
        weighted = all(weights is not None for _, weights in planes)
        self.has_weights = weighted and self.has_weights is not False
        at = self._file.seek(0, 2)
        self._file.write(np.stack([ids for ids, _ in planes], axis=1).astype("<u2").tobytes())
        if weighted:
            self._file.write(
                np.stack([w for _, w in planes if w is not None], axis=1).astype("<f2").tobytes()
            )
        self._passes.append(_Pass(at, n_rows, n_columns, real))
        self.n_passes[phase] += 1
        self.n_tokens[phase] += int(real.sum())

    def end_batch(self) -> None:
        """Write the sequences of the batch that is over, row by row, and empty the file."""
        for row in range(self._passes[0].n_rows if self._passes else 0):
            for one in self._passes:
                ids, weights = self._row(one, row)
                self._writer.tokens(ids, weights)
            self._writer.tokens(np.empty((0, len(self._routers), self.top_k), "<u2"), ends=(0,))
        self._passes.clear()
        self._file.seek(0)
        self._file.truncate()

    def _row(self, one: _Pass, row: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Ids and weights of the real tokens of one row of a pass."""
        shape = (one.n_columns, len(self._routers), self.top_k)
        n_bytes = 2 * int(np.prod(shape))
        arrays = []
        for number in range(2 if self.has_weights else 1):
            self._file.seek(one.at + (number * one.n_rows + row) * n_bytes)
            raw = np.frombuffer(self._file.read(n_bytes), "<f2" if number else "<u2")
            arrays.append(raw.reshape(shape)[one.real[row]])
        return arrays[0], arrays[1] if self.has_weights else None

    def close(self) -> None:
        """Give the temporary file back."""
        self._file.close()

    def told(self) -> tuple[str, ...]:
        """What was recorded, in a sentence a phase."""
        passes = [
            f"{phase}: {self.n_tokens[phase]} tokens in {self.n_passes[phase]} passes"
            for phase in self._phases
        ]
        return (*passes, *dict.fromkeys(self.notes))


def _past(kwargs: dict[str, Any]) -> int:
    """Tokens that the cache holds before a pass."""
    for name in _CACHES:
        cache: Any = kwargs.get(name)
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        if cache:
            return int(cache[0][0].shape[-2])
    return 0


def _real(mask: Any, n_rows: int, n_columns: int, notes: list[str]) -> NDArray[np.bool_]:
    """True where a token is not padding: (n_rows, n_columns)."""
    if mask is None:
        return np.ones((n_rows, n_columns), dtype=np.bool_)
    if not torch.is_tensor(mask) or mask.ndim != 2 or mask.shape[0] != n_rows or mask.shape[1] < n_columns:
        notes.append(
            "warning: padding could not be told from an attention mask of another kind; it is recorded too"
        )
        return np.ones((n_rows, n_columns), dtype=np.bool_)
    real: NDArray[np.bool_] = mask[:, -n_columns:].detach().cpu().numpy() != 0
    return real


@contextmanager
def capture_routing(
    model: torch.nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    phases: tuple[str, ...] = _PHASES,
) -> Iterator[Capture]:
    """Record the experts that every router of a model chooses while the body runs, and write them as a trace.

    Parameters
    ----------
    model
        A MoE model of transformers, as it is called: `model(...)` or `model.generate(...)`.
    path
        Trace to write (.safetensors), when the body ends without an error; nothing is written otherwise.
    name
        Name of the model for the trace; that of its configuration where None.
    phases
        Passes that are recorded: ``prefill``, ``decode`` (one token a row on a filled cache), or both.

    Yields
    ------
    Capture
        With counts of what was recorded so far.

    Raises
    ------
    TraceError
        If the model has no known router, or nothing ran.

    Notes
    -----
    A row of a batch is a sequence: it begins with an empty cache and goes on while the cache is filled. Without a cache
    each pass starts sequences of its own. In decode a row ends where the model's end token is fed to it: that token
    and the padding behind it are left out. Beam search reorders rows, which is not followed. Hooks do not fire inside
    replayed CUDA graphs, nor where `torch.compile` took the whole model.
    """
    if not phases or set(phases) - set(_PHASES):
        raise TraceError("phases are prefill, decode or both", value=phases)
    routers = find_routers(model)
    n_experts = {router.n_experts for router in routers}
    if len(n_experts) > 1 or None in n_experts:
        raise TraceError("all layers have one number of experts", value=sorted(map(str, n_experts)))
    with ExitStack() as stack:
        writer = stack.enter_context(TraceWriter(path, n_experts=routers[0].n_experts))
        wanted = tuple(phase for phase in _PHASES if phase in phases)
        capture = Capture(routers, writer, wanted, _eos(model), Path(path).parent)
        stack.callback(capture.close)
        hooks = ExitStack()
        stack.push(hooks)
        hooks.callback(model.register_forward_pre_hook(capture.begin, with_kwargs=True).remove)
        hooks.callback(model.register_forward_hook(capture.end).remove)
        for router in routers:
            hooks.callback(router.module.register_forward_hook(capture.router(router)).remove)
            given = capture.experts(router)
            hooks.callback(router.experts.register_forward_pre_hook(given, with_kwargs=True).remove)
        yield capture
        hooks.close()
        capture.end_batch()
        if not writer.n_tokens:
            raise TraceError(
                "ran at least one pass", value=0, place="capture", fix="call the model in the body"
            )
        writer.finish(
            TraceHeader(
                n_experts=int(routers[0].n_experts or 0),
                top_k=capture.top_k,
                layer_ids=tuple(router.layer for router in routers),
                model=name or _name(model),
                phase=phases[0] if len(phases) == 1 else _phase(capture),
                source=f"captured from {type(model).__name__}",
                notes=capture.told(),
            )
        )


def _name(model: torch.nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "name_or_path", "") or getattr(config, "model_type", "") or "unknown")


def _eos(model: torch.nn.Module) -> list[int]:
    """Tokens that end a sequence; a batch goes on feeding ended rows, which no server would."""
    told = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if told is None else [int(one) for one in np.atleast_1d(told)]


def _phase(capture: Capture) -> str:
    found = [phase for phase in _PHASES if capture.n_tokens[phase]]
    return found[0] if len(found) == 1 else "mixed"
