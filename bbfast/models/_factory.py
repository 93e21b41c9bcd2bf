"""From a name to a model with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from bbfast.models import _registry
from bbfast.models._pretrained import PretrainedCfg, load_checkpoint, load_pretrained


def create_model(
    model_name: str,
    pretrained: bool = False,
    *,
    checkpoint_path: str | Path | None = None,
    **model_arguments,
) -> nn.Module:
    """Makes the model called `model_name`, in train mode as any new module.

    Args:
        model_name: an architecture, e.g. `"mobilenetv3_large_100"`, or `"architecture.tag"`, e.g.
            `"efficientnet_b0.ra_in1k"`; `list_models` lists them. The tag also sets the defaults of
            num_classes and in_chans.
        pretrained: load the tag's weights (the default tag's where none is named) from the Hugging Face hub.
        checkpoint_path: load this file last, strictly; see `bbfast.models.load_checkpoint`.
        **model_arguments: the model's own, e.g. num_classes, in_chans, drop_rate, drop_path_rate,
            global_pool, device, dtype. None means the default.

    Raises:
        RuntimeError: the name or tag is unknown, or the pretrained weights cannot be had.
        ValueError: the name is malformed, an argument's value is not allowed, or a checkpoint does not fit.
        TypeError: an argument is unknown to the model, or of the wrong type.
        FileNotFoundError: checkpoint_path does not exist.

    Example:
        >>> model = bbfast.create_model("mobilenetv3_large_100", num_classes=10).eval()
    """
    if not isinstance(pretrained, bool):
        raise TypeError(f"pretrained must be a bool, got {type(pretrained).__name__}")
    entrypoint = _registry.model_entrypoint(model_name)
    cfg = _registry.get_pretrained_cfg(model_name)
    arguments = {name: value for name, value in model_arguments.items() if value is not None}
    if cfg is not None:
        arguments["pretrained_cfg"] = cfg
    model = entrypoint(pretrained=pretrained, **arguments)
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path)
    return model


def register_variants(
    build: Callable[..., nn.Module], cfgs: Mapping[str, PretrainedCfg], variants: Mapping[str, dict]
) -> None:
    """Registers several models that one function builds.

    Args:
        build: makes a model from a variant's arguments and the user's.
        cfgs: by `architecture.tag`, the default tag of each architecture first; others are ignored.
        variants: by name, the arguments that make this variant; the user's win over them.
    """
    grouped = _registry.group_by_architecture(cfgs)
    for name, arguments in variants.items():
        entrypoint = _make_entrypoint(name, build, arguments)
        _registry.register_model(entrypoint, pretrained_cfgs=grouped.get(name))


def _make_entrypoint(name: str, build: Callable[..., nn.Module], variant: dict) -> Callable[..., nn.Module]:
    def entrypoint(
        pretrained: bool = False, *, pretrained_cfg: PretrainedCfg | None = None, **model_arguments
    ) -> nn.Module:
        cfg = pretrained_cfg or _registry.get_pretrained_cfg(name) or PretrainedCfg(architecture=name)
        defaults = {"num_classes": cfg.num_classes, "in_chans": cfg.input_size[0]}
        if cfg.fixed_input_size:
            defaults["img_size"] = cfg.input_size[1:]
        model = build(**{**defaults, **variant, **model_arguments})
        model.pretrained_cfg = model.default_cfg = cfg.to_dict()
        if pretrained:
            load_pretrained(model, cfg)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = build.__module__
    entrypoint.__doc__ = f"Makes {name}: {build.__name__}({', '.join(f'{k}={v!r}' for k, v in variant.items())})."
    return entrypoint
