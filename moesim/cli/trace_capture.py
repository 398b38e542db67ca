"""What `moesim trace capture` runs and tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesim.cli.trace_import import facts, trace_file
from moesim.errors import TraceError

__all__ = ["PHASES", "captured"]

PHASES = {"both": ("prefill", "decode"), "prefill": ("prefill",), "decode": ("decode",)}
"""What `--phase` takes."""


def captured(model: str, prompts: Path, output: Path, *, phase: str, **how: Any) -> dict[str, Any]:
    """Generate for prompts with a transformers model and write its routing.

    Raises
    ------
    TraceError
        If PyTorch or transformers are absent, or a file or the model is refused; nothing is written then.
    """
    trace_file(output)
    if phase not in PHASES:
        raise TraceError("is no phase", value=phase, place="--phase", fix=", ".join(PHASES))
    try:
        from calibrate.routing.generate import Generation, capture_prompts, read_prompts
    except ImportError as error:
        fix = "pip install 'moesim[capture]'"
        rule = "capture needs PyTorch and transformers, which are not installed"
        raise TraceError(rule, value=error.name, fix=fix) from None
    capture_prompts(model, read_prompts(prompts), output, Generation(phases=PHASES[phase], **how))
    return facts(output)
