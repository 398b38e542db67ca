"""Models: shapes from a Hugging Face configuration or the catalog, and their parameter counts."""

from moesim.model.catalog import ModelRow, list_models, load_model
from moesim.model.hf import from_hf_config, supported_architectures
from moesim.model.params import ParameterCount, Weight, count_parameters, layer_weights, model_weights
from moesim.model.spec import AttentionSpec, LayerSpec, ModelSpec, MoeSpec, Published

__all__ = [
    "AttentionSpec",
    "LayerSpec",
    "ModelRow",
    "ModelSpec",
    "MoeSpec",
    "ParameterCount",
    "Published",
    "Weight",
    "count_parameters",
    "from_hf_config",
    "layer_weights",
    "list_models",
    "load_model",
    "model_weights",
    "supported_architectures",
]
