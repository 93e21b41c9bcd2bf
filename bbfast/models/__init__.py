"""Backbones with timm's names and state_dict keys, and the registry that makes them."""

from bbfast.models import efficientnet, mobilenetv3, swin_transformer
from bbfast.models._factory import create_model
from bbfast.models._features import FeatureDictNet, FeatureInfo, FeatureListNet
from bbfast.models._pretrained import PretrainedCfg, load_checkpoint
from bbfast.models._registry import (
    get_pretrained_cfg,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)

__all__ = [
    "FeatureDictNet",
    "FeatureInfo",
    "FeatureListNet",
    "PretrainedCfg",
    "create_model",
    "efficientnet",
    "get_pretrained_cfg",
    "is_model",
    "list_models",
    "load_checkpoint",
    "mobilenetv3",
    "model_entrypoint",
    "register_model",
    "split_model_name_tag",
    "swin_transformer",
]
