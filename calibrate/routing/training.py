"""Training loop: deterministic, resumable, with the balance of the routers at every step."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from calibrate.routing.corpus import Corpus
from calibrate.routing.model import ModelConfig, MoeModel, config_from_dict
from moesim.errors import ModelError, TraceError
from moesim.routing.whole import whole_file

__all__ = [
    "Evaluation",
    "Recipe",
    "Step",
    "Trained",
    "evaluate",
    "load_checkpoint",
    "save_checkpoint",
    "train",
]

_FORMAT = "moesim-router-training-1"
_BITS = 1 / math.log(2)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Parameters
    ----------
    steps, batch, context
        Optimiser steps, sequences per step, bytes per sequence.
    learning_rate, warmup
        Peak of a schedule that rises over `warmup` steps and falls by a half cosine to a tenth.
    weight_decay, clip
        Of AdamW (betas 0.9, 0.95), on matrices only; the norm that gradients are cut to.
    dtype
        Of the matrix products, ``float32`` or ``bfloat16`` (autocast; weights stay float32).
    seed
        Of the weights, the batches and the jitter.
    """

    steps: int = 500
    batch: int = 16
    context: int = 128
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("context", 2), ("warmup", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ModelError(f"is at least {least}", value=getattr(self, name), place=name)
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ModelError("is positive", value=getattr(self, name), place=name)
        if not 0 <= self.weight_decay < math.inf:
            raise ModelError("is 0 or more", value=self.weight_decay, place="weight_decay")
        if self.dtype not in ("float32", "bfloat16"):
            raise ModelError("is float32 or bfloat16", value=self.dtype, place="dtype")

    def rate(self, step: int) -> float:
        """Learning rate of one step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True, eq=False)
class Step:
    """What one step showed: loss in bits per byte, shares of choices dropped, chosen (layers, experts)."""

    step: int
    bits_per_byte: float
    dropped_fraction: float
    chosen: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Held-out loss and balance.

    Parameters
    ----------
    bits_per_byte
        Mean over held-out bytes.
    by_domain
        The same for each domain.
    dropped_fraction
        Share of choices beyond capacity.
    chosen : (n_layers, n_experts)
        Tokens that chose each expert.
    """

    bits_per_byte: float
    by_domain: dict[str, float]
    dropped_fraction: float
    chosen: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Trained:
    """A model with its recipe, the steps done, and what is needed to go on."""

    model: MoeModel
    recipe: Recipe
    optimiser: torch.optim.AdamW
    done: int


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if recipe.dtype == "bfloat16" else nullcontext()


def start(config: ModelConfig, recipe: Recipe) -> Trained:
    """Untrained model of a seed, and its optimiser."""
    torch.manual_seed(recipe.seed)
    model = MoeModel(config).to(_device())
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    return Trained(model, recipe, optimiser, 0)


def train(
    config: ModelConfig,
    recipe: Recipe,
    corpus: Corpus,
    *,
    resume: Trained | None = None,
    after: Callable[[Step, Trained], bool] | None = None,
) -> Trained:
    """Train a model, or go on with one.

    Parameters
    ----------
    config, recipe, corpus
        What, how, on what.
    resume
        Where to go on from: the batches are those that an uninterrupted run would have seen.
    after
        Called after every step; True stops there.

    Returns
    -------
    Trained
        The model in evaluation mode.
    """
    at = resume or start(config, recipe)
    _check_length(corpus, recipe.context)
    at.model.train()
    for index in range(at.done, recipe.steps):
        step = _one_step(at.model, at.optimiser, recipe, corpus, index)
        at = replace(at, done=index + 1)
        if after is not None and after(step, at):
            break
    at.model.eval()
    return at


def _check_length(corpus: Corpus, context: int) -> None:
    for domain in corpus.domains:
        shortest = min(domain.train.size, domain.held_out.size)
        if shortest <= context:
            raise TraceError(
                f"has more than {context} bytes (the context) to train on and to hold out",
                value=shortest,
                place=f"text {domain.name}",
                fix="give more text or a shorter context",
            )


def _one_step(
    model: MoeModel, optimiser: torch.optim.AdamW, recipe: Recipe, corpus: Corpus, index: int
) -> Step:
    device = next(model.parameters()).device
    rng = np.random.default_rng((recipe.seed, index))
    torch.manual_seed(recipe.seed * 1_000_003 + index)  # jitter, the same after a resume
    windows = torch.from_numpy(corpus.draw(rng, recipe.batch, recipe.context + 1)).to(device)
    for group in optimiser.param_groups:
        group["lr"] = recipe.rate(index)
    with _precision(recipe, device):
        logits, routed = model(windows[:, :-1])
    loss = functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
    router = model.config.router
    whole = loss + router.aux_weight * routed.balance + router.z_weight * routed.z
    if not torch.isfinite(whole):
        raise ModelError(
            "the loss is finite",
            value=float(whole.detach()),
            place=f"step {index}",
            fix="lower the learning rate",
        )
    optimiser.zero_grad(set_to_none=True)
    whole.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimiser.step()
    model.update_biases(routed)
    chosen, kept = _counts(
        [one.chosen for one in routed.assignments], [one.kept for one in routed.assignments]
    )
    return Step(index, float(loss.detach()) * _BITS, 1 - kept / max(1, int(chosen.sum())), chosen)


def _counts(chosen: list[Tensor], kept: list[Tensor]) -> tuple[NDArray[np.int64], int]:
    if not chosen:
        return np.zeros((0, 0), dtype=np.int64), 0
    return torch.stack(chosen).cpu().numpy().astype(np.int64), int(torch.stack(kept).sum())


@torch.no_grad()
def evaluate(
    model: MoeModel,
    corpus: Corpus,
    *,
    context: int,
    n_sequences: int = 128,
    batch: int = 16,
    dtype: str = "float32",
) -> Evaluation:
    """Loss and balance on held-out text; capacity, if any, is that of batches of `batch` sequences."""
    _check_length(corpus, context)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    windows, of = corpus.held_out(n_sequences, context + 1)
    losses, n_kept = [], 0
    chosen = np.zeros(
        (model.config.n_layers if model.config.n_experts else 0, model.config.n_experts), dtype=np.int64
    )
    for begin in range(0, len(windows), batch):
        part = torch.from_numpy(windows[begin : begin + batch]).to(device)
        with _precision(Recipe(dtype=dtype), device):
            logits, routed = model(part[:, :-1])
        each = functional.cross_entropy(logits.float().transpose(1, 2), part[:, 1:], reduction="none")
        losses.append(each.mean(1).cpu().numpy())
        if routed.assignments:
            more, kept = _counts([a.chosen for a in routed.assignments], [a.kept for a in routed.assignments])
            chosen, n_kept = chosen + more, n_kept + kept
    model.train(was_training)
    bits = np.concatenate(losses).astype(float) * _BITS
    by_domain = {name: float(bits[of == i].mean()) for i, name in enumerate(corpus.names)}
    return Evaluation(float(bits.mean()), by_domain, 1 - n_kept / max(1, int(chosen.sum())), chosen)


def save_checkpoint(at: Trained, path: str | Path) -> Path:
    """Write weights, optimiser and recipe to one safetensors file, whole or not at all."""
    target = Path(path)
    tensors = {f"model.{name}": value.contiguous() for name, value in at.model.state_dict().items()}
    for index, state in at.optimiser.state_dict()["state"].items():
        tensors |= {
            f"optimiser.{index}.{name}": torch.as_tensor(value).contiguous() for name, value in state.items()
        }
    header = {
        "format": _FORMAT,
        "config": json.dumps(at.model.config.to_dict()),
        "recipe": json.dumps(asdict(at.recipe)),
        "done": str(at.done),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary:
        save_file(tensors, temporary, metadata=header)
    return target


def load_checkpoint(path: str | Path) -> Trained:
    """Open what :func:`save_checkpoint` wrote.

    Raises
    ------
    ModelError
        If the file is absent, damaged, or something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ModelError(
            "no such checkpoint", value=str(file), fix="train one with python -m calibrate.routing.train"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != _FORMAT:
                raise ModelError("is not a checkpoint of calibrate.routing.train", place=str(file))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        at = start(config_from_dict(json.loads(header["config"])), Recipe(**json.loads(header["recipe"])))
        at.model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
        _load_optimiser(at.optimiser, tensors)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ModelError("is damaged or of another version", value=first, place=str(file)) from None
    at.model.eval()
    return replace(at, done=int(header["done"]))


def _load_optimiser(optimiser: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    whole = optimiser.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
