"""Backbones with timm's names and state_dict keys, and the registry that makes them."""

from bbfast.models import convnext, efficientnet, mobilenetv3, regnet, resnet, swin_transformer
from bbfast.models._checkpoint import load_checkpoint
from bbfast.models._factory import create_model
from bbfast.models._features import FeatureDictNet, FeatureInfo, FeatureListNet
from bbfast.models._names import parse_model_name, safe_model_name, split_model_name_tag
from bbfast.models._pretrained import DefaultCfg, PretrainedCfg
from bbfast.models._registry import (
    UnknownModelError,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    get_pretrained_cfg,
    get_pretrained_cfg_value,
    is_model,
    is_model_in_modules,
    is_model_pretrained,
    list_models,
    list_modules,
    list_pretrained,
    model_entrypoint,
    register_model,
    register_model_deprecations,
)
from bbfast.models._save_for_hf import save_for_hf
from bbfast.models._weights import load_pretrained

__all__ = [
    "DefaultCfg",
    "FeatureDictNet",
    "FeatureInfo",
    "FeatureListNet",
    "PretrainedCfg",
    "UnknownModelError",
    "convnext",
    "create_model",
    "efficientnet",
    "generate_default_cfgs",
    "get_arch_pretrained_cfgs",
    "get_deprecated_models",
    "get_pretrained_cfg",
    "get_pretrained_cfg_value",
    "is_model",
    "is_model_in_modules",
    "is_model_pretrained",
    "list_models",
    "list_modules",
    "list_pretrained",
    "load_checkpoint",
    "load_pretrained",
    "mobilenetv3",
    "model_entrypoint",
    "parse_model_name",
    "register_model",
    "register_model_deprecations",
    "regnet",
    "resnet",
    "safe_model_name",
    "save_for_hf",
    "split_model_name_tag",
    "swin_transformer",
]
