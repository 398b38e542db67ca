"""From a workload to an outcome: prefill, decode, serving and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from moesim.hardware.cluster import Cluster
from moesim.metrics.band import relative_band, step_band
from moesim.plan.context import Choice, Context
from moesim.plan.outcome import Outcome, model_flops
from moesim.plan.steps import Pass, run_pass
from moesim.work.case import Case, Layout
from moesim.work.memory import inference_memory
from moesim.work.ops import FloatArray, Pause
from moesim.work.step import Batch

__all__ = ["Sizes", "decode_outcome", "memory_of", "prefill_outcome", "serve_outcome"]

Sizes = Mapping[str, FloatArray]

HOW_MIXED = (
    "tpot = decode steps, some with a piece of a prompt; ttft = host's request_s, wait, a prompt's steps"
)
HOW_APART = "tpot = decode steps and the prompts run between them; ttft = host's request_s, wait, prefill"


def memory_of(kind: str, case: Case, sizes: Sizes, busiest: float) -> dict[str, FloatArray]:
    """Memory of the fullest rank at each size, by item [bytes]: cheap, so it is asked first.

    `busiest` is the rows of the busiest expert rank over the mean.
    """
    if kind == "decode":
        sequences, tokens = _axes(sizes, "batch_per_rank", "context")
        return inference_memory(case, sequences, tokens, sequences, busiest)
    if kind == "prefill":
        tokens, prompt = _axes(sizes, "tokens_per_rank", "prompt")
        return inference_memory(case, np.ceil(tokens / prompt), prompt, tokens, busiest)
    prompt, answer, sequences = _axes(sizes, "input", "output", "batch_per_rank")
    chunk = np.minimum(sizes.get("chunk", prompt), prompt)
    # a step may hold one chunk of each prompt that starts together, and every running sequence besides
    step_tokens = chunk * np.maximum(1.0, sequences / answer) + sequences
    return inference_memory(case, sequences, prompt + answer, step_tokens, busiest)


def decode_outcome(
    context: Context, cluster: Cluster, layout: Layout, choice: Choice, sizes: Sizes
) -> Outcome:
    """Generation alone; sizes ``batch_per_rank`` and ``context``, (n_points,) each."""
    case = context.case(cluster, layout, choice, "decode")
    sequences, tokens = _axes(sizes, "batch_per_rank", "context")
    one = run_pass(context, case, Batch.of("decode", sequences, 1, tokens))
    flops = model_flops(context.model, sequences * layout.dp, tokens, "decode")
    outcome = _outcome(context, one, "decode", sizes, sequences, flops, one.period_s)
    return replace(outcome, tpot_s=one.period_s, how="tpot = step = one decode pass of every sequence")


def prefill_outcome(
    context: Context, cluster: Cluster, layout: Layout, choice: Choice, sizes: Sizes
) -> Outcome:
    """Prompts alone; sizes ``tokens_per_rank`` and ``prompt``, (n_points,) each."""
    case = context.case(cluster, layout, choice, "prefill")
    tokens, prompt = _axes(sizes, "tokens_per_rank", "prompt")
    one = run_pass(context, case, _prompts(tokens, prompt))
    flops = model_flops(context.model, tokens * layout.dp, prompt / 2, "prefill")
    outcome = _outcome(context, one, "prefill", sizes, tokens, flops, one.latency_s)
    how = "ttft = step = one prefill pass; tokens per second from the time between passes"
    return replace(outcome, ttft_s=one.latency_s, how=how)


def _outcome(
    context: Context,
    one: Pass,
    kind: str,
    sizes: Sizes,
    replica_tokens: FloatArray,
    flops: FloatArray,
    step_s: FloatArray,
) -> Outcome:
    """What a workload of a single kind of step comes to; `replica_tokens` are one attention replica's."""
    case = one.case
    return Outcome(
        case,
        dict(sizes),
        memory_of(kind, case, sizes, context.busiest(case)),
        step_s=step_s,
        tokens_per_s=replica_tokens * case.layout.dp / one.period_s,
        mfu=_mfu(case, flops, one.period_s),
        band_fraction=step_band(_band(one, step_s)),
        imbalance=one.rank_imbalance,
        loss=one.loss,
        category_s=one.category_s(),
        calibrated=_calibrated(one),
        passes={kind: one},
        play=one.play,
    )


def serve_outcome(
    context: Context, cluster: Cluster, layout: Layout, choice: Choice, sizes: Sizes
) -> Outcome:
    """Requests of one length, as many running as the batch holds, a new one for each that ends.

    Sizes ``input``, ``output``, ``batch_per_rank`` and, where prompts are cut, ``chunk``.

    Notes
    -----
    Steady state of a closed loop whose requests are out of step with one another. A replica that decodes
    ``B = batch_per_rank`` sequences starts ``r = B / output`` prompts a step, one for each answer that ends,
    ``g = max(1, r)`` of them together. Where the engine mixes prompts into its decode steps (TensorRT-LLM,
    vLLM) a share ``f = r / g * input / chunk`` of the steps carries one chunk of each, and weights are read
    once for both; SGLang stops decoding for them:

        tpot = (1 - f) decode_s + f mixed_s          mixed, f at most 1
        tpot = decode_s + f prefill_s                apart
        ttft = request_s + wait + input / chunk * (mixed_s or prefill_s)

    Where prompts are mixed in and would need more steps than there are (f above 1), requests queue: one replica
    ends ``g chunk / input / mixed_s`` a second, and Little's law gives the time to first token.

    The wait is half a token's time for the step in progress, and apart from that the queue for the prefill
    (M/D/1 at the share of time spent in it). Replicas of one expert group prefill at the same time, as their
    exchanges tie them together.
    """
    prompt, answer, sequences = _axes(sizes, "input", "output", "batch_per_rank")
    chunk = np.minimum(sizes.get("chunk", prompt), prompt)
    decode_case = context.case(cluster, layout, choice, "decode")
    prefill_case = context.case(cluster, layout, choice, "prefill")
    held = prompt + answer / 2
    decode = run_pass(context, decode_case, Batch.of("decode", sequences, 1, held))
    together = np.maximum(1.0, sequences / answer)
    riding = sequences if context.backend.mixes_prefill else np.zeros_like(sequences)
    prefill, rows = _prefill_once(context, prefill_case, prompt, chunk, together, riding, held)
    running = sizes.get("concurrency", sequences * layout.dp) / layout.dp
    host = context.pricer(decode_case, "decode").families(Pause("host", sequences))[0].values()
    loop = _Loop(
        answer,
        sequences,
        running,
        prompt / chunk,
        together,
        decode.period_s,
        prefill.latency_s[rows.of],
        context.backend.mixes_prefill,
        host.get("request_s", 0.0) + np.zeros_like(prompt),
    )
    n_per_s = loop.requests_per_s * layout.dp
    flops = model_flops(context.model, answer * n_per_s, held, "decode")
    flops = flops + model_flops(context.model, prompt * n_per_s, prompt / 2, "prefill")
    kernels = np.hypot(
        _band(decode, loop.decode_s) * loop.decode_s / loop.tpot_s,
        _band(prefill, prefill.latency_s)[rows.of] * (loop.tpot_s - loop.decode_s) / loop.tpot_s,
    )
    return Outcome(
        decode_case,
        dict(sizes),
        memory_of("serve", decode_case, sizes, context.busiest(decode_case)),
        step_s=loop.decode_s,
        tokens_per_s=answer * n_per_s,
        mfu=_mfu(decode_case, flops, np.ones_like(answer)),
        band_fraction=step_band(kernels),
        ttft_s=loop.ttft_s,
        tpot_s=loop.tpot_s,
        imbalance=decode.rank_imbalance,
        loss=decode.loss,
        category_s=_served_categories(decode, prefill, rows, loop),
        calibrated=_calibrated(decode),
        passes={"decode": decode, "prefill": prefill},
        how=HOW_MIXED if context.backend.mixes_prefill else HOW_APART,
        play=decode.play,
    )


@dataclass(frozen=True, eq=False)
class _Loop:
    """Steady state of one replica; the equations are `serve_outcome`'s. Arrays are (n_points,)."""

    answer: FloatArray
    sequences: FloatArray
    running: FloatArray
    """Requests under way, below `sequences` where some replicas have none."""
    n_chunks: FloatArray
    together: FloatArray
    decode_s: FloatArray
    chunk_s: FloatArray
    """A step with one chunk of a prompt, decoding included where mixed."""
    mixed: bool
    asked_s: FloatArray
    """What a request costs before its first step."""

    @property
    def busy(self) -> FloatArray:
        """Steps with a chunk over steps, or over decode steps where apart."""
        wanted = self.sequences / self.answer / self.together * self.n_chunks
        return np.minimum(wanted, 1.0) if self.mixed else wanted

    @property
    def tpot_s(self) -> FloatArray:
        """Time per output token."""
        more_s = self.chunk_s - self.decode_s if self.mixed else self.chunk_s
        return self.decode_s + self.busy * more_s

    @property
    def _unbound_ttft_s(self) -> FloatArray:
        own_s = self.n_chunks * self.chunk_s
        wait_s = self.tpot_s / 2
        if not self.mixed:
            rho = np.minimum(self.busy * self.chunk_s / self.tpot_s, 0.95)
            wait_s = wait_s + own_s * rho / (2 * (1 - rho))
        return self.asked_s + wait_s + own_s

    @property
    def requests_per_s(self) -> FloatArray:
        """Requests that one replica ends; where prompts are mixed in, no more than its steps have room for."""
        request_s = self._unbound_ttft_s + np.maximum(self.answer - 1, 0) * self.tpot_s
        rate = self.running / request_s
        return np.minimum(rate, self.together / (self.n_chunks * self.chunk_s)) if self.mixed else rate

    @property
    def ttft_s(self) -> FloatArray:
        """Time to first token: by Little's law where requests queue for room in the steps."""
        queued_s = self.running / self.requests_per_s - np.maximum(self.answer - 1, 0) * self.tpot_s
        return np.maximum(self._unbound_ttft_s, queued_s)


def _served_categories(decode: Pass, prefill: Pass, rows: _Rows, loop: _Loop) -> dict[str, FloatArray]:
    """Kernel time per output token by category, what prompts add under ``prefill ...``."""
    parts = decode.category_s()
    for name, seconds in prefill.category_s().items():
        whole = np.broadcast_to(seconds, prefill.stage_s.shape[1:])[rows.of]
        if loop.mixed:
            whole = np.maximum(whole - parts.get(name, np.zeros(1)), 0.0)
        parts[f"prefill {name}"] = whole * loop.busy
    return parts


class _Rows:
    """Distinct prefill steps among the points, so that each is priced once."""

    def __init__(self, *axes: FloatArray) -> None:
        stacked = np.stack(np.broadcast_arrays(*axes), axis=1)
        self.steps, self.first, self.of = np.unique(stacked, axis=0, return_index=True, return_inverse=True)
        self.of = self.of.reshape(-1)


def _prefill_once(
    context: Context,
    case: Case,
    prompt: FloatArray,
    chunk: FloatArray,
    together: FloatArray,
    riding: FloatArray,
    held: FloatArray,
) -> tuple[Pass, _Rows]:
    rows = _Rows(prompt, chunk, together, riding, np.where(riding > 0, held, 1.0))
    whole, part, n_prompts, n_riding, context_length = rows.steps.T
    # a chunk sees, in the mean, half of the prompt before it
    seen = (whole + part) / 2
    batch = Batch.of("prefill", n_prompts, part, seen, n_riding, context_length)
    return replace(run_pass(context, case, batch), row_of=rows.of), rows


def _prompts(tokens: FloatArray, prompt: FloatArray) -> Batch:
    """Whole prompts; a piece of one where a step holds fewer tokens than a prompt has."""
    query = np.minimum(tokens, prompt)
    return Batch.of("prefill", tokens / query, query, query)


def _axes(sizes: Sizes, *names: str) -> list[FloatArray]:
    return [np.asarray(axis, dtype=float) for axis in np.broadcast_arrays(*(sizes[name] for name in names))]


def _mfu(case: Case, flops: FloatArray, time_s: FloatArray) -> FloatArray:
    peak = case.cluster.gpu.peak_flops_per_s(case.weight_dtype) * case.layout.n_ranks
    return np.asarray(flops / (time_s * peak))


def _calibrated(one: Pass) -> bool:
    return one.timed.pricer.profile.carried_from is None


def _band(one: Pass, total_s: FloatArray) -> FloatArray:
    return relative_band(one.family_s().values(), total_s, carried=not _calibrated(one))
