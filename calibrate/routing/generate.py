"""Run prompts through a transformers model and record its routing: what `moesim trace capture` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from calibrate.routing.capture import capture_routing
from moesim.errors import TraceError

__all__ = ["Generation", "capture_prompts", "read_prompts"]


@dataclass(frozen=True)
class Generation:
    """How prompts are run.

    Parameters
    ----------
    n_new
        Tokens that each prompt is continued by, the likeliest each time [count]; fewer where the model ends sooner.
    batch
        Prompts in one batch [count].
    n_prompt
        Tokens that a prompt is cut to [count].
    random_weights, seed
        Weights drawn at random in place of trained ones, from which seed.
    phases
        Passes that are recorded.
    """

    n_new: int = 64
    batch: int = 8
    n_prompt: int = 2048
    random_weights: bool = False
    seed: int = 0
    phases: tuple[str, ...] = ("prefill", "decode")


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line; empty lines are left out.

    Raises
    ------
    TraceError
        If there is no such file, or no prompt in it.
    """
    if not path.is_file():
        raise TraceError("there is no such file", value=str(path), place="--prompts")
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise TraceError("is UTF-8 text, one prompt a line", place=str(path)) from None
    if not prompts:
        raise TraceError("holds at least one prompt, one a line", place=str(path))
    return prompts


def capture_prompts(model: str, prompts: list[str], output: Path, how: Generation) -> tuple[str, ...]:
    """Generate for every prompt, and write which experts were chosen.

    Parameters
    ----------
    model
        Name or folder of a transformers model; with random weights its `config.json` is enough.
    prompts
        Texts.
    output
        Trace to write.
    how
        Lengths, batches, weights.

    Returns
    -------
    tuple of str
        What a reader should know: weights or a tokenizer that were not the model's.

    Raises
    ------
    TraceError
        If the model cannot be loaded, or is no MoE model.
    """
    network, notes = _model(model, how)
    rows, more = _encoded(model, prompts, int(network.config.get_text_config().vocab_size), how.n_prompt)
    with torch.inference_mode(), capture_routing(network, output, name=model, phases=how.phases) as capture:
        capture.notes += [*notes, *more]
        for at in range(0, len(rows), how.batch):
            ids, mask = _padded(rows[at : at + how.batch])
            network.generate(
                ids.to(network.device),
                attention_mask=mask.to(network.device),
                max_new_tokens=how.n_new,
                do_sample=False,
                pad_token_id=0,
            )
    return tuple(capture.notes)


def _model(name: str, how: Generation) -> tuple[Any, list[str]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if not how.random_weights:
            return AutoModelForCausalLM.from_pretrained(name, dtype="auto").to(device).eval(), []
        torch.manual_seed(how.seed)
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        rule = "is not a causal language model that transformers can load"
        raise TraceError(
            rule, value=said, place=name, fix="give a folder or name with its config.json"
        ) from None
    return network.to(device).eval(), [
        f"warning: weights are random (seed {how.seed}), so this routing is no model's"
    ]


def _encoded(
    model: str, prompts: list[str], n_vocabulary: int, n_prompt: int
) -> tuple[list[list[int]], list[str]]:
    """Tokens of each prompt; without a tokenizer their UTF-8 bytes stand for tokens."""
    folder = Path(model)
    here = folder if folder.is_dir() else folder.parent
    local = folder.exists()
    if local and not any(
        (here / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        rows = [[byte % n_vocabulary for byte in prompt.encode()][:n_prompt] for prompt in prompts]
        return rows, ["warning: the model has no tokenizer, so bytes of UTF-8 stand for its tokens"]
    tokenizer = AutoTokenizer.from_pretrained(here if local else model)
    return [list(tokenizer(prompt)["input_ids"])[:n_prompt] for prompt in prompts], []


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows filled up on the left to one length, and where they are real."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
