"""bbfast: the fastest vision backbones in PyTorch."""

from bbfast import data, models, nn, ops
from bbfast.models import create_model, is_model, list_models, register_model

__version__ = "0.1.0"
__all__ = ["create_model", "data", "is_model", "list_models", "models", "nn", "ops", "register_model"]
