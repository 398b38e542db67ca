"""What the model is asked to do: prefill, decode, serve or train."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from moesim.scenario.choices import Choices, counts, refuse

__all__ = ["DecodeWorkload", "PrefillWorkload", "ServeWorkload", "TrainWorkload", "Workload"]

Counts = Annotated[Choices[int], *counts(1)]


class _Workload(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class DecodeWorkload(_Workload):
    """Generation alone: one new token for every running sequence."""

    kind: Literal["decode"]
    """Which workload this is."""
    batch_per_rank: Counts
    """Running sequences of one attention replica (DP rank) [sequences]."""
    context: Counts
    """Tokens already in the KV cache of a sequence, in the mean [tokens]."""


class PrefillWorkload(_Workload):
    """Prompts alone: one step over a batch of them."""

    kind: Literal["prefill"]
    """Which workload this is."""
    tokens_per_rank: Counts
    """Prompt tokens in one step of an attention replica (DP rank) [tokens]."""
    prompt: Counts
    """Length of one prompt [tokens]."""


class ServeWorkload(_Workload):
    """Requests with a prompt and an answer, as many running as the batch holds."""

    kind: Literal["serve"]
    """Which workload this is."""
    input: Counts
    """Length of a prompt [tokens]."""
    output: Counts
    """Length of an answer [tokens]."""
    batch_per_rank: Counts | None = None
    """Running sequences of one attention replica (DP rank) [sequences]; this or `concurrency`."""
    concurrency: Counts | None = None
    """Running sequences of the whole cluster [sequences]; this or `batch_per_rank`."""
    chunk: Counts | None = None
    """Prompt tokens that one step of a DP rank takes at most [tokens]; whole prompts where left out."""

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        given = sum(size is not None for size in (self.batch_per_rank, self.concurrency))
        if given != 1:
            how = "both are" if given else "neither is"
            raise refuse(
                f"batch_per_rank or concurrency says how many requests run, and {how} given",
                "keep one of the two" if given else "write batch_per_rank: 64",
            )
        return self


class TrainWorkload(_Workload):
    """One optimiser step."""

    kind: Literal["train"]
    """Which workload this is."""
    global_batch: Counts
    """Sequences of one optimiser step, all ranks together [sequences]."""
    micro_batch: Counts = Choices((1,))
    """Sequences that one DP rank runs forward and backward at once [sequences]."""
    sequence: Counts
    """Length of a sequence [tokens]."""
    zero: Annotated[int, Field(ge=0, le=3)] = 1
    """What data-parallel ranks share: 0 nothing, 1 optimiser state, 2 gradients too, 3 weights too."""
    recompute: Literal["none", "selective", "full"] = "selective"
    """Activations computed again in the backward pass: none, attention's inside, or whole layers."""
    optimiser: Literal["adam"] = "adam"
    """Update rule; adam keeps float32 weights and two float32 moments."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """Format in which gradients are summed and exchanged."""
    tokens: PositiveInt | None = None
    """Tokens of the whole run, for its days and dollars [tokens]."""


Workload = Annotated[
    DecodeWorkload | PrefillWorkload | ServeWorkload | TrainWorkload, Field(discriminator="kind")
]
"""Any workload, told apart by its `kind`."""
