"""Small recordings in every format that moesim imports, each with what it says.

Written by the real library where it can be installed (torch, safetensors, numpy, gguf), else field by field from the
library's source, as docs/import.md cites it.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

N_EXPERTS, N_LAYERS, TOP_K = 16, 3, 2


def some_ids(n_tokens: int, seed: int = 0, n_layers: int = N_LAYERS) -> np.ndarray:
    """Distinct experts for tokens: (n_tokens, n_layers, TOP_K)."""
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((n_tokens, n_layers, N_EXPERTS)), axis=-1)[..., :TOP_K].astype(np.int32)


def counts_of(ids: np.ndarray) -> np.ndarray:
    """Tokens per (layer, expert)."""
    return np.stack(
        [np.bincount(ids[:, layer].ravel(), minlength=N_EXPERTS) for layer in range(ids.shape[1])]
    )


@dataclass(frozen=True)
class Recording:
    """A file or folder, its format, and either the tokens or the counts that it holds."""

    path: Path
    format: str
    ids: np.ndarray | None = None
    counts: np.ndarray | None = None
    options: tuple[str, ...] = ()


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(folder: Path) -> Recording:
    ids = some_ids(40)
    np.savez(folder / "t.npz", expert_ids=ids, sequence_offsets=[0, 10, 40], n_experts=N_EXPERTS)
    return Recording(folder / "t.npz", "npz", ids)


def vllm_npy(folder: Path) -> Recording:
    ids = some_ids(40)
    np.save(folder / "routed.npy", ids.astype(np.uint8))
    return Recording(folder / "routed.npy", "vllm", ids)


def vllm_jsonl(folder: Path) -> Recording:
    ids = some_ids(40)
    lines = []
    for at in (0, 20):
        one = base64.b64encode(npy_bytes(ids[at : at + 20].astype(np.int16))).decode()
        lines.append(
            json.dumps({"id": f"cmpl-{at}", "choices": [{"index": 0, "text": "x", "routed_experts": one}]})
        )
    (folder / "responses.jsonl").write_text("\n".join(lines) + "\n")
    return Recording(folder / "responses.jsonl", "vllm", ids)


def vllm_json(folder: Path) -> Recording:
    ids = some_ids(40)
    prompt, answer = (base64.b64encode(npy_bytes(part)).decode() for part in (ids[:30], ids[30:]))
    response = {"prompt_routed_experts": prompt, "choices": [{"routed_experts": answer}]}
    (folder / "response.json").write_text(json.dumps(response))
    return Recording(folder / "response.json", "vllm", ids)


def trtllm_counts(folder: Path) -> Recording:
    from safetensors.numpy import save_file

    ids = some_ids(80)
    (folder / "meta_info.json").write_text(
        json.dumps({"num_experts": N_EXPERTS, "num_experts_per_token": TOP_K})
    )
    total = np.zeros((2, N_LAYERS, N_EXPERTS), dtype=np.int64)
    for rank in range(2):
        tensors = {}
        for step in range(2):
            at = 40 * rank + 20 * step
            counts = counts_of(ids[at : at + 20])
            total[step] += counts
            tensors |= {f"{100 + step}_{3 + layer}": counts[layer] for layer in range(N_LAYERS)}
        save_file(tensors, folder / f"rank{rank}.safetensors")
    return Recording(folder, "trtllm", counts=total)


def trtllm_raw(folder: Path) -> Recording:
    from safetensors.numpy import save_file

    ids = some_ids(80)
    (folder / "meta_info.json").write_text(
        json.dumps({"num_experts": N_EXPERTS, "num_experts_per_token": TOP_K})
    )
    for rank in range(2):
        tensors = {}
        for step in range(2):
            at = 40 * step + 20 * rank  # the order of the trace: iteration, then rank
            tensors |= {
                f"{7 + step}_{layer}": np.ascontiguousarray(ids[at : at + 20, layer])
                for layer in range(N_LAYERS)
            }
        save_file(tensors, folder / f"rank{rank}_raw.safetensors")
    return Recording(folder, "trtllm", ids)


def megatron_line(step: int, layer: int, rows: np.ndarray, rank: int = 0, **more: object) -> str:
    record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": rank}
    sizes = {"num_tokens": len(rows), "topk": rows.shape[1], "top_indices": rows.tolist()}
    return json.dumps({**record, **sizes, **more})


def megatron(folder: Path) -> Recording:
    ids = some_ids(40)
    lines = [
        megatron_line(step, layer, ids[20 * step : 20 * step + 20, layer])
        for step in range(2)
        for layer in range(N_LAYERS)
    ]
    (folder / "router_trace_rank0.jsonl").write_text("\n".join(lines) + "\n")
    return Recording(folder / "router_trace_rank0.jsonl", "megatron", ids)


def some_logits(n_tokens: int = 40) -> np.ndarray:
    """Router logits (N_LAYERS, n_tokens, N_EXPERTS)."""
    return np.random.default_rng(1).normal(0, 2, (N_LAYERS, n_tokens, N_EXPERTS)).astype(np.float32)


def hf_safetensors(folder: Path) -> Recording:
    from safetensors.numpy import save_file

    logits = some_logits()
    save_file({f"router_logits.{n}": one for n, one in enumerate(logits)}, folder / "logits.safetensors")
    ids = np.argsort(-logits, axis=-1)[..., :TOP_K].transpose(1, 0, 2)
    return Recording(folder / "logits.safetensors", "hf", ids, options=("--top-k", str(TOP_K)))


def hf_npz(folder: Path) -> Recording:
    logits = some_logits()
    np.savez(folder / "logits.npz", *logits)
    ids = np.argsort(-logits, axis=-1)[..., :TOP_K].transpose(1, 0, 2)
    return Recording(folder / "logits.npz", "hf", ids, options=("--top-k", str(TOP_K)))


def hf_pt(folder: Path) -> Recording:
    import torch

    logits = torch.tensor(some_logits())
    torch.save(tuple(logits.to(torch.bfloat16)), folder / "logits.pt")
    exact = logits.to(torch.bfloat16).float().numpy()
    ids = np.argsort(-exact, axis=-1, kind="stable")[..., :TOP_K].transpose(1, 0, 2)
    return Recording(folder / "logits.pt", "hf", ids, options=("--top-k", str(TOP_K)))


def imatrix(folder: Path) -> Recording:
    import gguf

    counts = counts_of(some_ids(40))
    writer = gguf.GGUFWriter(folder / "imatrix.gguf", arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    writer.add_uint32("imatrix.chunk_size", 512)
    for layer in range(N_LAYERS):
        for part in ("up", "gate", "down"):
            name = f"blk.{layer + 1}.ffn_{part}_exps.weight"
            writer.add_tensor(f"{name}.in_sum2", np.ones((N_EXPERTS, 32), np.float32))
            writer.add_tensor(
                f"{name}.counts", (counts[layer] + (part != "down")).astype(np.float32)[:, None]
            )
        writer.add_tensor(f"blk.{layer + 1}.attn_q.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Recording(folder / "imatrix.gguf", "imatrix", counts=counts[None])


def sglang_json(folder: Path) -> Recording:
    counts = counts_of(some_ids(40))
    (folder / "counts.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    return Recording(folder / "counts.json", "sglang", counts=counts[None])


def sglang_stat(folder: Path) -> Recording:
    import torch

    counts = np.stack([counts_of(some_ids(40, seed)) for seed in range(3)])
    padded = np.concatenate([counts, np.zeros_like(counts[:1])])  # a step of the buffer that was never filled
    content = {
        "rank": 0,
        "logical_count": torch.tensor(padded, dtype=torch.int32),
        "average_utilization_rate_over_window": None,
    }
    torch.save(content, folder / "expert_distribution_recorder_1.5.pt")
    return Recording(folder / "expert_distribution_recorder_1.5.pt", "sglang", counts=counts)


def physical_map() -> np.ndarray:
    """Logical expert of each of 20 slots, (N_LAYERS + 1, 20): renamed, four of them replicas; layer 0 is dense."""
    rng = np.random.default_rng(5)
    return np.stack([np.concatenate([rng.permutation(N_EXPERTS), [0, 3, 5, 7]]) for _ in range(N_LAYERS + 1)])


def to_physical(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """Slots of logical ids, any replica: (n_tokens, N_LAYERS, TOP_K)."""
    rng, mapped = np.random.default_rng(seed), physical_map()
    slots = np.empty_like(ids)
    for layer in range(ids.shape[1]):
        for expert in range(N_EXPERTS):
            where = ids[:, layer] == expert
            slots[:, layer][where] = rng.choice(np.flatnonzero(mapped[layer + 1] == expert), int(where.sum()))
    return slots


def sglang_record(ids: np.ndarray, forward_pass: int, rank: int, **more: object) -> dict[str, object]:
    """One record of `per_token` as SGLang makes it: dense layer 0, width 8, -1 where unset."""
    import torch

    slots = to_physical(ids)
    top = np.full((N_LAYERS + 1, len(ids), 8), -1, dtype=np.int32)
    top[1:, :, :TOP_K] = slots.transpose(1, 0, 2)
    counts = np.zeros((N_LAYERS + 1, 20), dtype=np.int32)
    for layer in range(N_LAYERS):
        counts[layer + 1] = np.bincount(slots[:, layer].ravel(), minlength=20)
    record = {
        "forward_pass_id": forward_pass, "rank": rank, "gatherer_key": "primary",
        "input_ids": list(range(len(ids))), "positions": list(range(len(ids))),
        "extend_seq_lens": [len(ids)], "forward_mode": 1,
        "topk_ids_of_layer": torch.tensor(top), "misc_objects": [],
        "global_physical_count": torch.tensor(counts),
    }  # fmt: skip
    return {**record, **more}


def save_ranks(folder: Path, records: dict[int, list[dict[str, object]]]) -> Path:
    import torch

    for rank, of_rank in records.items():
        content = {"records": of_rank, "last_physical_to_logical_map": torch.tensor(physical_map())}
        torch.save(content, folder / f"expert_distribution_recorder_17.{rank}_{rank}.pt")
    return folder


def sglang_per_token(folder: Path) -> Recording:
    ids = some_ids(60)
    records = {
        0: [
            sglang_record(ids[:20], 1, 0),
            sglang_record(ids[30:45], 2, 0, forward_mode=2, extend_seq_lens=None),
        ],
        1: [
            sglang_record(ids[20:30], 1, 1),
            sglang_record(ids[45:], 2, 1, forward_mode=2, extend_seq_lens=None),
        ],
    }
    return Recording(save_ranks(folder, records), "sglang", ids)


def sglang_per_pass(folder: Path) -> Recording:
    ids = some_ids(60)
    records = {
        rank: [sglang_record(ids[30 * step + 15 * rank :][:15], 5 + step, rank) for step in range(2)]
        for rank in range(2)
    }
    keep = ("forward_pass_id", "rank", "gatherer_key", "global_physical_count")
    lean = {rank: [{key: one[key] for key in keep} for one in of_rank] for rank, of_rank in records.items()}
    counts = np.stack([counts_of(ids[:30]), counts_of(ids[30:])])
    return Recording(save_ranks(folder, lean), "sglang", counts=counts)


MAKERS = {
    one.__name__: one
    for one in (
        npz, vllm_npy, vllm_jsonl, vllm_json, trtllm_counts, trtllm_raw, megatron, hf_safetensors, hf_npz, hf_pt,
        imatrix, sglang_json, sglang_stat, sglang_per_token, sglang_per_pass,
    )
}  # fmt: skip
