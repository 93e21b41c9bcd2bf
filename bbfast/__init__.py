"""bbfast: the fastest vision backbones in PyTorch."""

from bbfast import data, design_space, models, nn, ops
from bbfast.models import (
    create_model,
    get_pretrained_cfg,
    is_model,
    list_models,
    list_modules,
    list_pretrained,
    model_entrypoint,
    register_model,
)

__version__ = "0.1.0"
__all__ = [
    "create_model",
    "data",
    "design_space",
    "get_pretrained_cfg",
    "is_model",
    "list_models",
    "list_modules",
    "list_pretrained",
    "model_entrypoint",
    "models",
    "nn",
    "ops",
    "register_model",
]
