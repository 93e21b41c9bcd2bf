"""From a name to a model with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from bbfast.models import _registry
from bbfast.models._features import FeatureDictNet, resolve_feature_cls
from bbfast.models._pretrained import PretrainedCfg, load_checkpoint, load_pretrained


def create_model(
    model_name: str,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | None = None,
    features_only: bool = False,
    out_indices: int | Sequence[int] | None = None,
    feature_cls: str | type[FeatureDictNet] | None = None,
    output_fmt: str | None = None,
    **model_arguments,
) -> nn.Module:
    """Makes the model called `model_name`, in train mode as any new module.

    Args:
        model_name: an architecture, e.g. `"mobilenetv3_large_100"`, or `"architecture.tag"`, e.g.
            `"efficientnet_b0.ra_in1k"`; `list_models` lists them. The tag also sets the defaults of
            num_classes and in_chans.
        pretrained: load the tag's weights (the default tag's where none is named) from the Hugging Face hub.
        checkpoint_path: load this file last, strictly; see `bbfast.models.load_checkpoint`.
        features_only: make a feature extractor, which returns the maps of several stages and has no classifier.
            pretrained and checkpoint_path then take the whole model's weights, checkpoint_path the extractor's too.
        out_indices: with features_only, which maps: indices, negative ones from the end, or an int for the last so
            many; None for one of each size. Maps come in the network's order, `feature_info` speaks in this one.
        feature_cls: with features_only, "list" (None too) or "dict" of maps, or a class derived from
            `bbfast.models.FeatureDictNet`.
        output_fmt: with features_only, "NCHW" or "NHWC"; None is the family's own: NHWC for Swin, else NCHW.
        **model_arguments: the model's own, e.g. num_classes, in_chans, drop_rate, drop_path_rate,
            global_pool, device, dtype. None means the default.

    Raises:
        RuntimeError: the name or tag is unknown, or the pretrained weights cannot be had.
        ValueError: the name is malformed, an argument's value is not allowed, or a checkpoint does not fit.
        TypeError: an argument is unknown to the model, or of the wrong type.
        FileNotFoundError: checkpoint_path does not exist.

    Example:
        >>> model = bbfast.create_model("mobilenetv3_large_100", num_classes=10).eval()
        >>> backbone = bbfast.create_model("mobilenetv3_large_100", features_only=True, out_indices=(1, 2, 4))
        >>> backbone.feature_info.channels()
        [24, 40, 960]
    """
    for name, value in (("pretrained", pretrained), ("features_only", features_only)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    entrypoint = _registry.model_entrypoint(model_name)
    cfg = _registry.get_pretrained_cfg(model_name)
    arguments = {
        **model_arguments,
        "features_only": features_only or None,
        "out_indices": out_indices,
        "feature_cls": feature_cls,
        "output_fmt": output_fmt,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if cfg is not None:
        arguments["pretrained_cfg"] = cfg
    model = entrypoint(pretrained=pretrained, **arguments)
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


def register_variants(
    build: Callable[..., nn.Module],
    cfgs: Mapping[str, PretrainedCfg],
    variants: Mapping[str, dict],
    feature_cfg: Mapping | None = None,
) -> None:
    """Registers several models that one function builds.

    Args:
        build: makes a model from a variant's arguments and the user's.
        cfgs: by `architecture.tag`, the default tag of each architecture first; others are ignored.
        variants: by name, the arguments that make this variant; the user's win over them.
        feature_cfg: how the family becomes a feature extractor: flatten_sequential and fused of `FeatureDictNet`.
    """
    grouped = _registry.group_by_architecture(cfgs)
    for name, arguments in variants.items():
        entrypoint = _make_entrypoint(name, build, arguments, feature_cfg or {})
        _registry.register_model(entrypoint, pretrained_cfgs=grouped.get(name))


def _make_entrypoint(
    name: str, build: Callable[..., nn.Module], variant: dict, feature_cfg: Mapping
) -> Callable[..., nn.Module]:
    def entrypoint(
        pretrained: bool = False,
        *,
        pretrained_cfg: PretrainedCfg | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        feature_cls: str | type[FeatureDictNet] | None = None,
        output_fmt: str | None = None,
        **model_arguments,
    ) -> nn.Module:
        extractor_cls = resolve_feature_cls("list" if feature_cls is None else feature_cls)
        if not features_only:
            _check_not_given(out_indices=out_indices, feature_cls=feature_cls, output_fmt=output_fmt)
        cfg = pretrained_cfg or _registry.get_pretrained_cfg(name) or PretrainedCfg(architecture=name)
        defaults = {"num_classes": 0 if features_only else cfg.num_classes, "in_chans": cfg.input_size[0]}
        if cfg.fixed_input_size:
            defaults["img_size"] = cfg.input_size[1:]
        whole = build(**{**defaults, **variant, **model_arguments})
        whole.pretrained_cfg = whole.default_cfg = cfg.to_dict()
        model = extractor_cls(whole, out_indices, output_fmt, **feature_cfg) if features_only else whole
        if pretrained:  # an extractor shares its parameters with the whole model
            load_pretrained(whole, cfg)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = build.__module__
    entrypoint.__doc__ = f"Makes {name}: {build.__name__}({', '.join(f'{k}={v!r}' for k, v in variant.items())})."
    return entrypoint


def _check_not_given(**feature_arguments) -> None:
    if given := [name for name, value in feature_arguments.items() if value is not None]:
        raise TypeError(f"{' and '.join(given)} can only be given with features_only=True")
