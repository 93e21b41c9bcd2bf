"""bbfast: the fastest vision backbones in PyTorch."""

from bbfast import data, design_space, models, nn, ops
from bbfast.dispatch import exportable
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
from bbfast.swap import (  # the function `swap` hides its package
    SwapError,
    SwapReport,
    fold_bn_,
    plan,
    restore,
    swap,
    swapped,
)

__version__ = "0.1.0"
__all__ = [
    "SwapError",
    "SwapReport",
    "create_model",
    "data",
    "design_space",
    "exportable",
    "fold_bn_",
    "get_pretrained_cfg",
    "is_model",
    "list_models",
    "list_modules",
    "list_pretrained",
    "model_entrypoint",
    "models",
    "nn",
    "ops",
    "plan",
    "register_model",
    "restore",
    "swap",
    "swapped",
]
