"""Finding the routers of a transformers model, and reading what one chose from what it returned.

Every layout is told by structure. transformers 5: a router module returns (logits, weights, ids), or its block hands
ids and weights to its experts. transformers 4 and models that bring their own code: (ids, weights), or scores over all
experts with or without ids, or the router is a bare linear layer beside a list of experts and its block scores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.routing.importers.huggingface import choose

__all__ = ["Router", "chosen", "find_routers"]

_NAMES = ("gate", "router", "wg")
_CLASS = re.compile(r"Router$|TopK\w*$|Gate$|Gating$")
_N_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts", "out_features")
_TOP_K = ("top_k", "num_experts_per_tok", "topk", "k")


@dataclass(frozen=True)
class Router:
    """One router of a model.

    Parameters
    ----------
    name
        Its path in the model.
    layer
        Index of its layer.
    module, experts
        What is hooked: what it returns, else what its experts are given.
    n_experts, top_k
        As the module or the block around it says; None where neither does.
    linear
        It returns logits alone, and the block around it scores them.
    """

    name: str
    layer: int
    module: torch.nn.Module
    experts: torch.nn.Module
    n_experts: int | None
    top_k: int | None
    linear: bool


def find_routers(model: torch.nn.Module) -> list[Router]:
    """Find every router beside a set of experts, in the order of layers.

    Raises
    ------
    TraceError
        If there is none, or two routers belong to one layer.
    """
    found = list(_routers(model))
    if not found:
        rule = "has no router beside experts that is known"
        raise TraceError(rule, value=type(model).__name__, fix="give a MoE model of transformers")
    layers = [router.layer for router in found]
    if len(set(layers)) < len(layers):
        names = ", ".join(router.name for router in found if layers.count(router.layer) > 1)
        rule = "has several routers in one layer"
        raise TraceError(rule, value=names, fix="give its text model alone")
    return sorted(found, key=lambda router: router.layer)


def _routers(model: torch.nn.Module) -> Iterator[Router]:
    for path, block in model.named_modules():
        children = dict(block.named_children())
        experts = children.get("experts")
        for name, child in children.items():
            classed = _CLASS.search(type(child).__name__) is not None
            if experts is None or name == "experts" or not (name in _NAMES or classed):
                continue
            linear = isinstance(child, torch.nn.Linear) and not classed
            if linear and child.out_features < 2:  # the gate of a shared expert
                continue
            config = getattr(block, "config", None)
            yield Router(
                name=f"{path}.{name}" if path else name,
                layer=_layer(path),
                module=child,
                experts=experts,
                n_experts=_first(_N_EXPERTS, child, experts, block, config),
                top_k=_first(_TOP_K, child, block, config),
                linear=linear,
            )


def _layer(path: str) -> int:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[0]) if numbers else 0


def _first(names: tuple[str, ...], *holders: object) -> int | None:
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def chosen(router: Router, output: Any) -> tuple[NDArray[Any], NDArray[np.float16] | None] | None:
    """Read ids and weights, (tokens, top_k), from what a router returned, or its experts were given.

    Parameters
    ----------
    router
        The router.
    output
        One tensor or several.

    Returns
    -------
    ids, weights : (n_tokens, top_k)
        Weights are None where they are not among the tensors; all is None where ids are not.
    """
    parts = [
        one for one in (output if isinstance(output, tuple | list) else (output,)) if torch.is_tensor(one)
    ]
    flat = [one.detach().reshape(-1, one.shape[-1]) for one in parts if one.ndim >= 2]
    ids = next((one for one in flat if not one.dtype.is_floating_point and one.dtype != torch.bool), None)
    if ids is None:
        return _scored(router, flat)
    floats = [one for one in flat if one.dtype.is_floating_point and len(one) == len(ids)]
    weights = next((one for one in floats if one.shape == ids.shape), None)
    if weights is None and floats and floats[0].shape[1] == router.n_experts:
        weights = floats[0].gather(1, ids)  # scores over all experts, zero where not chosen
    stored = None if weights is None else weights.to("cpu", torch.float32).numpy().astype(np.float16)
    return ids.to("cpu", torch.int64).numpy(), stored


def _scored(router: Router, flat: list[torch.Tensor]) -> tuple[NDArray[Any], NDArray[np.float16]] | None:
    sparse = [one for one in flat if router.top_k and bool(((one != 0).sum(-1) == router.top_k).all())]
    if sparse and router.top_k:  # scores over all experts, zero where not chosen, and no ids (Llama 4)
        best = sparse[0].topk(router.top_k)
        return best.indices.cpu().numpy(), best.values.to("cpu", torch.float32).numpy().astype(np.float16)
    if not router.linear or len(flat) != 1 or router.top_k is None:
        return None
    ids, weights = choose(flat[0].to("cpu", torch.float32).numpy(), router.top_k)
    return ids, weights.astype(np.float16)
