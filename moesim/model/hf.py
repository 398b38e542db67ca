"""Turn a Hugging Face ``config.json`` into a `ModelSpec`.

One function per family gives its layers; what all share is read once. Keys that only tune training or
sampling are ignored. A key that has a default in every release of its architecture may be absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from moesim.errors import ModelError
from moesim.model.hf_families import CLASSES, FAMILIES
from moesim.model.hf_reader import ConfigReader
from moesim.model.spec import ModelSpec

__all__ = ["from_hf_config", "supported_architectures"]

_COMPRESSED = {"float-quantized": "fp8", "nvfp4-pack-quantized": "nvfp4"}
"""Format names of compressed-tensors."""
_MAX_LAYERS = 10_000
"""More layers than any model has; a larger count is a typing error that would fill the memory."""


def from_hf_config(config: Mapping[str, Any], name: str, source: str = "") -> ModelSpec:
    """Read a model from its Hugging Face configuration.

    Parameters
    ----------
    config
        Content of ``config.json``.
    name
        Name that the spec gets.
    source
        Where the configuration is from.

    Returns
    -------
    ModelSpec
        Text model only: a vision tower is left out.

    Raises
    ------
    ModelError
        Unknown architecture; a key that is missing, of the wrong type or out of range; values that
        contradict each other.
    """
    try:
        return _read(config, name, source)
    except ModelError as error:
        raise (error if error.place else error.at(name)) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}", value=first["input"], place=name
        ) from None


def supported_architectures() -> tuple[str, ...]:
    """Every `model_type` that can be read."""
    return tuple(sorted(FAMILIES))


def _read(config: Mapping[str, Any], name: str, source: str) -> ModelSpec:
    architecture = _architecture(config)
    outer = ConfigReader(config, architecture)
    c = outer.inner("text_config")
    if c.count("num_hidden_layers", "num_layers") > _MAX_LAYERS:
        raise ModelError(f"a model has at most {_MAX_LAYERS} layers", value=c.raw("num_hidden_layers"))
    body = FAMILIES[architecture](c)
    weight_dtype, expert_dtype = _weight_dtypes(outer if outer.has("quantization_config") else c)
    tie_at = outer if outer.has("tie_word_embeddings") else c
    return ModelSpec(
        name=name,
        architecture=architecture,
        hidden=c.count("hidden_size", "d_model"),
        vocab=c.count("vocab_size"),
        tied_embeddings=tie_at.flag("tie_word_embeddings", architecture == "switch_transformers"),
        layers=body.layers,
        weight_dtype=weight_dtype,
        expert_dtype=expert_dtype,
        max_context=c.count("max_position_embeddings", default=0, minimum=0),
        n_mtp_layers=c.count("num_nextn_predict_layers", "mtp_num_hidden_layers", default=0, minimum=0),
        n_position_weights=body.n_position_weights,
        source=source,
    )


def _architecture(config: object) -> str:
    """`model_type`, or what the class names under `architectures` belong to."""
    c = ConfigReader(config, "model")
    model_type = c.text("model_type")
    if model_type in FAMILIES:
        return model_type
    classes = c.raw("architectures")
    classes = [k for k in classes if isinstance(k, str)] if isinstance(classes, list) else []
    for class_name in classes:
        if class_name in CLASSES:
            return CLASSES[class_name]
    known = ", ".join(supported_architectures())
    if not model_type and not classes:
        raise ModelError(f"model_type is missing; supported are {known}")
    raise ModelError("unknown architecture", value=model_type or classes[0], fix=f"supported are {known}")


def _weight_dtypes(c: ConfigReader) -> tuple[str, str]:
    """Native format of dense matrices and of routed experts."""
    if not c.has("quantization_config"):
        return "bfloat16", "bfloat16"
    q = c.inner("quantization_config")
    method = q.text("quant_method").lower()
    # modelopt names what it did under quant_algo, compressed-tensors under format.
    algorithm = q.text("quant_algo").lower() or _COMPRESSED.get(q.text("format").lower(), "")
    if method == "mxfp4":
        return "bfloat16", "w4a16_mxfp4"
    if method == "fp8" or algorithm == "fp8":
        dtype = "fp8_block" if q.raw("weight_block_size") == [128, 128] else "fp8"
        return dtype, dtype
    if algorithm == "nvfp4":
        return "bfloat16", "nvfp4"
    raise ModelError(
        f"{q.prefix}quant_method is not supported; supported are fp8, mxfp4, and FP8 or NVFP4 by modelopt "
        "or compressed-tensors",
        value=algorithm or method or None,
        fix="remove quantization_config to take the weights as bfloat16",
    )
