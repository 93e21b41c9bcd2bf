"""From a name to a model with weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bbfast.models import _registry
from bbfast.models._checkpoint import load_checkpoint
from bbfast.models._features import FeatureDictNet, resolve_feature_cls
from bbfast.models._hub_folder import load_model_config
from bbfast.models._keywords import check_keywords
from bbfast.models._names import parse_model_name, split_model_name_tag
from bbfast.models._pretrained import LOCATIONS, PretrainedCfg, check_fields
from bbfast.models._weights import check_loadable, load_pretrained


def create_model(
    model_name: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    feature_cls: str | type[FeatureDictNet] | None = None,
    output_fmt: str | None = None,
    scriptable: bool | None = None,
    exportable: bool | None = None,
    no_jit: bool | None = None,
    **model_arguments,
) -> nn.Module:
    """Makes the model called `model_name`, in train mode as any new module.

    Args:
        model_name: an architecture, e.g. `"mobilenetv3_large_100"`, or `"architecture.tag"`, e.g.
            `"efficientnet_b0.ra_in1k"`; `list_models` lists them. Or `"hf-hub:owner/repository"`, perhaps `@revision`,
            or `"local-dir:/a/folder"`: what `save_for_hf` of bbfast or timm wrote.
        pretrained: load the tag's weights (the default tag's where none is named): from the Hugging Face hub, unless
            pretrained_cfg or model_name says where they are.
        pretrained_cfg: a tag, which wins over that of model_name, or all about the weights: a `PretrainedCfg` or its
            fields. It also sets the defaults of num_classes, in_chans and, where the model is made for one, img_size.
        pretrained_cfg_overlay: fields that replace those of pretrained_cfg, e.g. `{"file": "weights.safetensors"}`.
        checkpoint_path: load this file last, strictly; see `bbfast.models.load_checkpoint`.
        cache_dir: where to keep what is downloaded, instead of the hub's own cache.
        features_only: make a feature extractor, which returns the maps of several stages and has no classifier.
            pretrained and checkpoint_path then take the whole model's weights, checkpoint_path the extractor's too.
        out_indices: with features_only, which maps: indices, negative ones from the end, or an int for the last so
            many; None for one of each size. Maps come in the network's order, `feature_info` speaks in this one.
        feature_cls: with features_only, "list" (None too) or "dict" of maps, or a class derived from
            `bbfast.models.FeatureDictNet`.
        output_fmt: with features_only, "NCHW" or "NHWC"; None is the family's own: NHWC for Swin, else NCHW.
        scriptable, exportable, no_jit: timm's, for its scripts: the first two cannot be had, the last always is.
        **model_arguments: the model's own, e.g. num_classes, in_chans, drop_rate, drop_path_rate,
            global_pool, device, dtype. None means the default.

    Raises:
        RuntimeError: the name or tag is unknown, or the pretrained weights cannot be had.
        ValueError: the name is malformed, an argument's value is not allowed, or weights do not fit.
        TypeError: an argument is unknown to the model, or of the wrong type.
        FileNotFoundError: a file or folder does not exist.

    Example:
        >>> model = bbfast.create_model("mobilenetv3_large_100", num_classes=10).eval()
        >>> backbone = bbfast.create_model("mobilenetv3_large_100", features_only=True, out_indices=(1, 2, 4))
        >>> backbone.feature_info.channels()
        [24, 40, 960]
    """
    for name, value in (("pretrained", pretrained), ("features_only", features_only)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    for name, value in (("scriptable", scriptable), ("exportable", exportable)):
        if value:
            raise ValueError(f"{name}=True is not allowed: bbfast's models have no layers for TorchScript or ONNX")
    arguments = {
        **model_arguments,
        "features_only": features_only or None,
        "out_indices": out_indices,
        "feature_cls": feature_cls,
        "output_fmt": output_fmt,
        "cache_dir": cache_dir,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}

    source, identifier = parse_model_name(model_name)
    if source is not None:
        if pretrained_cfg:
            raise ValueError(
                f"pretrained_cfg cannot be given with {model_name}, which has its own; change it with "
                "pretrained_cfg_overlay="
            )
        config = load_model_config(source, identifier, cache_dir)
        identifier, pretrained_cfg = config.architecture, config.pretrained_cfg
        arguments = {**config.model_args, **arguments}
    architecture, tag = split_model_name_tag(_registry.current_name(identifier))
    entrypoint = _registry.model_entrypoint(architecture)
    cfg = resolve_pretrained_cfg(architecture, pretrained_cfg or tag, pretrained_cfg_overlay)
    if cfg is not None:
        arguments["pretrained_cfg"] = cfg
    model = entrypoint(pretrained=pretrained, **arguments)
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


def resolve_pretrained_cfg(
    architecture: str,
    pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
) -> PretrainedCfg | None:
    """All about the weights, from a tag (empty: the default one) or from fields, and with other values laid over.

    Returns:
        None where nothing is known and nothing given.

    Raises:
        RuntimeError: the architecture has no such tag.
        TypeError: pretrained_cfg is something else, or a field is unknown.
    """
    if isinstance(pretrained_cfg, Mapping) and pretrained_cfg:
        check_fields(pretrained_cfg, "pretrained_cfg")
        cfg = PretrainedCfg(**pretrained_cfg)
    elif isinstance(pretrained_cfg, PretrainedCfg):
        cfg = pretrained_cfg
    elif not pretrained_cfg or isinstance(pretrained_cfg, str):
        cfg = _registry.get_pretrained_cfg(f"{architecture}.{pretrained_cfg}" if pretrained_cfg else architecture)
    else:
        kind = type(pretrained_cfg).__name__
        raise TypeError(f"pretrained_cfg must be a tag, a PretrainedCfg or a dict of its fields, got {kind}")
    if not isinstance(pretrained_cfg_overlay or {}, Mapping):
        raise TypeError(f"pretrained_cfg_overlay must be a dict, got {type(pretrained_cfg_overlay).__name__}")
    overlay = dict(pretrained_cfg_overlay or {})
    if cfg is None and not overlay:
        return None
    cfg = cfg or PretrainedCfg()
    if any(overlay.get(name) for name in (*LOCATIONS, "hf_hub_filename")):  # other weights, of their own kind
        overlay = {"custom_load": False, "source": None, **overlay}
    return cfg.replace(**{"architecture": cfg.architecture or architecture, **overlay})


# ---- families of models ----------------------------------------------------------------------------------


def register_variants(
    build: Callable[..., nn.Module],
    cfgs: Mapping[str, PretrainedCfg],
    variants: Mapping[str, dict],
    feature_cfg: Mapping | None = None,
) -> None:
    """Registers several models that one function builds.

    Args:
        build: makes a model from a variant's arguments and the user's. A function that passes `**arguments` on says
            what it returns, so that its class tells which there are.
        cfgs: by `architecture.tag`; the default is the first with weights, see `generate_default_cfgs`. Those of other
            architectures are ignored.
        variants: by name, the arguments that make this variant; the user's win over them.
        feature_cfg: how the family becomes a feature extractor: flatten_sequential and fused of `FeatureDictNet`.
    """
    grouped = _registry.generate_default_cfgs(cfgs)
    for name, arguments in variants.items():
        entrypoint = _make_entrypoint(name, build, arguments, feature_cfg or {})
        _registry.register_model(entrypoint, pretrained_cfgs=grouped.get(name, {}))


def _make_entrypoint(
    name: str, build: Callable[..., nn.Module], variant: dict, feature_cfg: Mapping
) -> Callable[..., nn.Module]:
    def entrypoint(
        pretrained: bool = False,
        *,
        pretrained_cfg: str | Mapping[str, Any] | PretrainedCfg | None = None,
        pretrained_cfg_overlay: Mapping[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        feature_cls: str | type[FeatureDictNet] | None = None,
        output_fmt: str | None = None,
        **model_arguments,
    ) -> nn.Module:
        check_keywords(name, model_arguments, build, _OWN_KEYWORDS)
        extractor_cls = resolve_feature_cls("list" if feature_cls is None else feature_cls)
        if not features_only:
            _check_not_given(out_indices=out_indices, feature_cls=feature_cls, output_fmt=output_fmt)
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay) or PretrainedCfg(architecture=name)
        if pretrained:
            check_loadable(cfg)  # before a large model is made
        whole = build(**{**_defaults(cfg, features_only), **variant, **model_arguments})
        whole.pretrained_cfg = whole.default_cfg = cfg.replace(state_dict=None).to_dict()
        _remember(whole, model_arguments)
        model = extractor_cls(whole, out_indices, output_fmt, **feature_cfg) if features_only else whole
        if pretrained:  # an extractor shares its parameters with the whole model
            load_pretrained(whole, cfg, cache_dir)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = build.__module__
    entrypoint.__doc__ = f"Makes {name}: {build.__name__}({', '.join(f'{k}={v!r}' for k, v in variant.items())})."
    return entrypoint


_OWN_KEYWORDS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
    "out_indices",
    "feature_cls",
    "output_fmt",
)


def _defaults(cfg: PretrainedCfg, features_only: bool) -> dict:
    """What the weights say of the model."""
    defaults = {"in_chans": cfg.input_size[0]}
    if features_only or cfg.num_classes >= 0:
        defaults["num_classes"] = 0 if features_only else cfg.num_classes
    if cfg.fixed_input_size:
        defaults["img_size"] = cfg.input_size[1:]
    return defaults


def _remember(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Keeps the arguments that made the model, for `save_for_hf`; of those that JSON cannot express, the names."""
    model._model_args, unsaved = {}, []
    for name, value in arguments.items():
        if name in ("device", "dtype") or ("drop" in name and name.endswith("_rate")):
            continue
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            unsaved.append(name)
        else:
            model._model_args[name] = value
    model._unsaved_args = tuple(unsaved)


def _check_not_given(**feature_arguments) -> None:
    if given := [name for name, value in feature_arguments.items() if value is not None]:
        raise TypeError(f"{' and '.join(given)} can only be given with features_only=True")
