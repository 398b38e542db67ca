"""Router logits that Hugging Face transformers returns with ``output_router_logits=True``, saved as tensors.

Layout: ``MoeModelOutputWithPast`` of transformers 5: one tensor a sparse layer, (batch * sequence, n_experts) before
any softmax; encoder-decoder models document (batch, sequence, n_experts). What a router does with its logits is not
in them: it is taken from the model (:class:`moesim.model.MoeSpec`), and softmax where none is named.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.model import MoeSpec
from moesim.routing.importers.files import (
    Bfloat16,
    LazyRows,
    NpyStream,
    Rows,
    map_npy,
    map_safetensors,
    reading,
    rows_at_once,
)
from moesim.routing.importers.incoming import Block, Incoming, Told, refuse

__all__ = ["choose", "from_tensors", "incoming", "named"]

_LARGEST_WHOLE_BYTES = 2**28

_RULE = "holds router logits: one tensor a sparse layer, (tokens, n_experts) or (batch, sequence, n_experts)"
_FIX = "save outputs.router_logits, as router_logits.0, router_logits.1, ..."


def incoming(files: list[Path], told: Told) -> Incoming:
    """Read one .safetensors, .npz or .npy (layers stacked).

    Raises
    ------
    TraceError
        If there are several files, or the file holds no router logits.
    """
    if len(files) != 1:
        raise refuse(files[0].parent, "one file of logits at a time", value=len(files), fix="name one file")
    file = files[0]
    suffix = file.suffix.lower()
    if suffix == ".npy":
        return from_tensors(file, {"router_logits": map_npy(file)}, told)
    if suffix == ".npz":
        return from_tensors(file, _mapped_zip(file), told)
    return from_tensors(file, map_safetensors(file), told)


class _Compressed(LazyRows):
    """Rows of a compressed member, taken in ascending order only."""

    def __init__(self, stream: NpyStream, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, stream.dtype
        self._stream, self._next = stream, 0

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        if rows.start != self._next:
            raise ValueError("a compressed array is read from front to back")
        self._next = rows.stop
        return self._stream.take(rows.stop - rows.start, self.shape[1:])

    def reshape(self, *shape: int) -> _Compressed:
        n = int(np.prod(self.shape, dtype=np.int64)) // int(np.prod(shape[1:], dtype=np.int64))
        return _Compressed(self._stream, (n, *shape[1:]))


def _mapped_zip(file: Path) -> dict[str, Rows]:
    """Map the members of an .npz that `numpy.savez` left uncompressed, and stream compressed ones."""
    arrays: dict[str, Rows] = {}
    with reading(file, "is an .npz of plain arrays (nothing is unpickled)"):
        archive = zipfile.ZipFile(file)
        members = [one for one in archive.infolist() if one.filename.endswith(".npy")]
        for member in members:
            name = member.filename.removesuffix(".npy")
            stream = archive.open(member)
            head = NpyStream(stream, f"{file}: {name}")
            n_bytes = int(np.prod(head.shape, dtype=object)) * head.dtype.itemsize
            begin = _data_at(file, member) + stream.tell()
            if member.compress_type == zipfile.ZIP_STORED and head.shape and n_bytes:
                if begin + n_bytes > file.stat().st_size:
                    raise refuse(f"{file}: {name}", "is truncated", value=n_bytes)
                arrays[name] = np.memmap(file, head.dtype, "r", begin, head.shape)
            elif len(members) > 1 and len(head.shape) > 1 and name != "attention_mask":
                arrays[name] = _Compressed(head, head.shape)
            elif n_bytes > _LARGEST_WHOLE_BYTES:
                fix = "save it with numpy.savez, or one array a layer"
                raise refuse(
                    f"{file}: {name}", "is too large to be decompressed whole", value=n_bytes, fix=fix
                )
            else:
                arrays[name] = head.take(head.shape[0] if head.shape else 1)
    return arrays


def _data_at(file: Path, member: zipfile.ZipInfo) -> int:
    with file.open("rb") as stream:
        stream.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
    return member.header_offset + 30 + name + extra


def from_tensors(file: Path, tensors: Mapping[str, Rows], told: Told) -> Incoming:
    """Take named tensors: logits in the order of the last number in their names.

    Parameters
    ----------
    file
        For messages.
    tensors
        Logits of each layer, or one stack of all; `attention_mask` (batch, sequence), 0 where padded; tensors with
        `bias` in their names, (n_experts,), steer the choice of the layer that their last number names.
    told
        What the user says of the model.

    Raises
    ------
    TraceError
        If there are no logits, shapes do not agree, or top_k is unknown.
    """
    layers = _layers(file, {k: v for k, v in tensors.items() if "bias" not in k and k != "attention_mask"})
    shape = layers[0].shape
    for number, one in enumerate(layers):
        if one.shape != shape or one.dtype.kind != "f" or one.ndim not in (2, 3) or 0 in shape:
            rule = f"is logits of the first layer's shape {shape}, (tokens, n_experts) or (batch, sequence, n_experts)"
            raise refuse(f"{file}: layer {number}", rule, value=(one.shape, str(one.dtype)), fix=_FIX)
    router = told.router
    top_k = told.top_k or (router.top_k if router else None)
    if top_k is None:
        raise refuse(file, "logits do not say top_k", fix="add --model or --top-k")
    if told.n_experts is not None and shape[-1] != told.n_experts:
        raise refuse(
            file, f"the model has {told.n_experts} experts", value=shape[-1], fix="name the model of the file"
        )
    if not 1 <= top_k <= shape[-1]:
        raise refuse(f"{file}: top_k", f"lies in 1..{shape[-1]} (n_experts)", value=top_k)
    bias = _biases(file, tensors, len(layers), shape[-1])
    mask = _mask(file, tensors, shape)
    notes = []
    if router is not None and router.correction_bias and bias is None:
        notes.append(
            "warning: the model steers its choice by a bias per expert, which the file lacks; logits decide alone"
        )
    if mask is None and len(shape) == 2:
        notes.append("logits are of batch * sequence tokens: all stand in one sequence")
    ids = (
        told.layer_ids if told.layer_ids and len(told.layer_ids) == len(layers) else tuple(range(len(layers)))
    )
    return Incoming(
        place=str(file),
        source=f"{file.name} (Hugging Face router logits)",
        layer_ids=ids,
        top_k=top_k,
        n_experts=int(shape[-1]),
        tokens=_blocks(file, layers, bias, mask, router, top_k),
        notes=notes,
    )


def named(file: Path, content: Any) -> dict[str, Rows]:
    """Name the tensors of a .pt: a tuple over layers, one stacked tensor, or a dictionary of these.

    Raises
    ------
    TraceError
        If it holds anything else.
    """
    parts = content if isinstance(content, dict) else {"router_logits": content}
    tensors: dict[str, Rows] = {}
    for name, part in parts.items():
        if isinstance(part, list | tuple):
            tensors |= {f"{name}.{number}": one for number, one in enumerate(part)}
        elif part is not None:
            tensors[str(name)] = part
    for name, one in tensors.items():
        if not isinstance(one, np.ndarray | LazyRows):
            raise refuse(f"{file}: {name}", _RULE, value=type(one).__name__, fix=_FIX)
    return tensors


def _layers(file: Path, logits: Mapping[str, Rows]) -> list[Rows]:
    if not logits:
        raise refuse(file, _RULE, fix=_FIX)
    numbered = sorted((_number(name), name) for name in logits)
    if len(logits) > 1 or numbered[0][0] >= 0:
        if len({number for number, _ in numbered}) < len(numbered) or numbered[0][0] < 0:
            raise refuse(file, _RULE, value=[name for _, name in numbered], fix=_FIX)
        return [logits[name] for _, name in numbered]
    stack = next(iter(logits.values()))
    if stack.ndim not in (3, 4):
        raise refuse(
            file, "a single tensor stacks layers: (layers, tokens, n_experts)", value=stack.shape, fix=_FIX
        )
    if isinstance(stack, Bfloat16):
        return [Bfloat16(one) for one in stack.bits]
    return [stack[n] for n in range(len(stack))] if isinstance(stack, np.ndarray) else []


def _number(name: str) -> int:
    found = re.findall(r"\d{1,9}", name)
    return int(found[-1]) if found else -1


def _biases(
    file: Path, tensors: Mapping[str, Rows], n_layers: int, n_experts: int
) -> NDArray[np.float32] | None:
    named = {_number(name): rows for name, rows in tensors.items() if "bias" in name}
    if not named:
        return None
    if set(named) == {-1} and named[-1].shape == (n_layers, n_experts):
        return np.asarray(named[-1][:], dtype=np.float32)
    if len(named) != n_layers or any(one.shape != (n_experts,) for one in named.values()):
        rule = f"are one of {n_experts} experts for each of the {n_layers} layers"
        raise refuse(f"{file}: bias", rule, value={k: v.shape for k, v in named.items()})
    return np.stack([np.asarray(named[key][:], dtype=np.float32) for key in sorted(named)])


def _mask(file: Path, tensors: Mapping[str, Rows], shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    """True where a token is real: (batch, sequence); None where all are, in sequences unknown."""
    if "attention_mask" in tensors:
        mask: NDArray[np.bool_] = np.asarray(tensors["attention_mask"][:]) != 0
        if mask.ndim != 2 or mask.size != int(np.prod(shape[:-1], dtype=np.int64)):
            rule = f"is (batch, sequence) for logits of {shape[:-1]} tokens"
            raise refuse(f"{file}: attention_mask", rule, value=mask.shape)
        return mask
    return np.ones(shape[:2], dtype=np.bool_) if len(shape) == 3 else None


def _blocks(
    file: Path,
    layers: list[Rows],
    bias: NDArray[np.float32] | None,
    mask: NDArray[np.bool_] | None,
    router: MoeSpec | None,
    top_k: int,
) -> Iterator[Block]:
    n_experts = layers[0].shape[-1]
    flat = [one.reshape(-1, n_experts) for one in layers]
    n_tokens = flat[0].shape[0]
    n_rows = n_tokens if mask is None else mask.shape[1]
    step = rows_at_once(n_experts * len(flat))
    for begin in range(0, n_tokens, n_rows):  # one sequence after the other
        real = None if mask is None else mask[begin // n_rows]
        for at in range(0, n_rows, step):
            rows = slice(begin + at, begin + min(at + step, n_rows))
            chosen = [
                choose(
                    _finite(file, n, rows.start, one[rows]), top_k, router, None if bias is None else bias[n]
                )
                for n, one in enumerate(flat)
            ]
            ids = np.stack([one for one, _ in chosen], axis=1).astype(np.int32)
            weights = np.stack([one for _, one in chosen], axis=1)
            if real is not None:
                ids[~real[at : at + step]] = -1
            last = at + step >= n_rows
            ends = (len(ids),) if last and mask is not None else ()
            yield Block(ids, weights, ends, whole=last and at == 0 and mask is not None)


def _finite(file: Path, layer: int, start: int, logits: NDArray[Any]) -> NDArray[np.float32]:
    wide = np.asarray(logits, dtype=np.float32)
    bad = np.isnan(wide) | (wide == np.inf)
    if bad.any():
        token, expert = (int(v) for v in np.argwhere(bad)[0])
        place = f"{file}: layer {layer}, token {start + token}, expert {expert}"
        raise refuse(
            place, "logits are finite", value=str(wide[token, expert]), fix="leave the broken pass out"
        )
    return wide


def choose(
    logits: NDArray[np.float32],
    top_k: int,
    router: MoeSpec | None = None,
    bias: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Choose experts from logits as the model's router does.

    Parameters
    ----------
    logits : (n_tokens, n_experts)
        Before any softmax.
    top_k
        Experts per token.
    router
        Scoring, groups and weights; softmax over all experts, weights summing to 1, where None.
    bias : (n_experts,)
        Added to the scores for the choice only (DeepSeek-V3).

    Returns
    -------
    ids, weights : (n_tokens, top_k)
        In falling order of preference.

    Notes
    -----
    Among groups, those with the largest sum of their two best scores are open where the model has a correction bias
    (DeepSeek-V3), else those with the largest single score (DeepSeek-V2). Equal scores go to the lower id.

    References
    ----------
    ``modeling_deepseek_v3.py`` and ``modeling_deepseek_v2.py`` of transformers 5.
    """
    if router is not None and router.scoring == "sigmoid":
        scores = 1 / (1 + np.exp(-np.maximum(logits, -80)))  # exp(80) is within float32
    else:
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
    wanted = scores if bias is None else scores + bias
    if router is not None and router.top_groups < router.n_groups:
        best = 2 if router.correction_bias else 1
        groups = wanted.reshape(len(wanted), router.n_groups, -1)
        worth = np.sort(groups, axis=-1)[..., -best:].sum(-1)
        shut = np.argsort(-worth, axis=-1, kind="stable")[:, router.top_groups :]
        groups = groups.copy()
        np.put_along_axis(groups, shut[..., None], -np.inf, axis=1)
        wanted = groups.reshape(wanted.shape)
    ids = np.argsort(-wanted, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, axis=-1)
    if router is None or router.normalise:
        weights = weights / np.maximum(weights.sum(1, keepdims=True), 1e-20)
    return ids, (weights * (1 if router is None else router.scaling)).astype(np.float32)
