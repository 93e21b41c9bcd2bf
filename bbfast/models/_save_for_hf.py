"""A model as a folder that the hub, timm and bbfast take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bbfast.models._factory import create_model
from bbfast.models._hub_folder import CONFIG_FILE, WEIGHTS_FILE
from bbfast.models._pretrained import FIELDS, PretrainedCfg


def save_for_hf(
    model: nn.Module,
    save_directory: str | Path,
    *,
    model_args: Mapping[str, Any] | None = None,
    **config,
) -> None:
    """Writes a folder that `create_model("local-dir:...")` of bbfast and of timm take, as does the hub.

    Args:
        model: one that `create_model` made, as it is now: with the classifier that it has.
        save_directory: made if it is not there.
        model_args: arguments that make this model from its architecture, beside those given to `create_model`, which
            are known; for a model that was changed since.
        **config: what else `config.json` shall say, e.g. label_names; a dict pretrained_cfg is laid over the model's.

    Raises:
        ValueError: the model was not made by `create_model`, is a feature extractor, or its arguments would make one of
            other shapes.

    Example:
        >>> model = bbfast.create_model("mobilenetv3_small_050", num_classes=10)
        >>> bbfast.models.save_for_hf(model, "my-model", label_names=[str(digit) for digit in range(10)])
        >>> model = bbfast.create_model("local-dir:my-model", pretrained=True)
    """
    from safetensors.torch import save_file

    about = dict(getattr(model, "pretrained_cfg", None) or {})
    architecture = about.get("architecture")
    if architecture is None or not hasattr(model, "num_classes"):
        raise ValueError(
            f"save_for_hf takes a whole model made by create_model, got {type(model).__name__} "
            "without num_classes or without an architecture in its pretrained_cfg"
        )
    if unknown := set(getattr(model, "_unsaved_args", ())) - set(model_args or {}):
        raise ValueError(f"JSON cannot express the argument {min(unknown)} of this model; replace it in model_args")
    model_args = {**getattr(model, "_model_args", {}), **_current_args(model, about), **(model_args or {})}
    _check_args(model, architecture, model_args)
    folder = Path(save_directory).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.detach().contiguous() for key, value in model.state_dict().items()},
        folder / WEIGHTS_FILE,
        metadata={"format": "pt"},
    )
    content = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": getattr(model, "num_features", None),
        "model_args": model_args,
        **config,
        "pretrained_cfg": {**_about_weights(model, about, model_args), **config.get("pretrained_cfg", {})},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _current_args(model: nn.Module, about: Mapping) -> dict:
    """What may have changed since the model was made."""
    args = {"num_classes": model.num_classes, "in_chans": model.in_chans}
    pool = getattr(getattr(model, "head", None), "global_pool", None) or getattr(model, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    if isinstance(pool, str):
        args["global_pool"] = pool
    if about.get("fixed_input_size") and hasattr(model, "patch_embed"):
        args["img_size"] = tuple(model.patch_embed.img_size)
    return args


def _check_args(model: nn.Module, architecture: str, model_args: Mapping) -> None:
    again = create_model(architecture, device="meta", **model_args).state_dict()
    own = model.state_dict()
    shapes = {key: tuple(value.shape) for key, value in again.items()}
    differing = [key for key in {**own, **shapes} if key not in own or shapes.get(key) != tuple(own[key].shape)]
    if differing:
        raise ValueError(
            f"{architecture} with {dict(model_args)} has other shapes than this model, e.g. of {differing[0]}; give "
            "the arguments that make this model as model_args"
        )


def _about_weights(model: nn.Module, about: Mapping, model_args: Mapping) -> dict:
    cfg = PretrainedCfg(**{name: value for name, value in about.items() if name in FIELDS})
    other_classes = model.num_classes != cfg.num_classes
    size = model_args.get("img_size", cfg.input_size[1:])
    if tuple(size) != cfg.input_size[1:]:
        cfg = cfg.replace(pool_size=None, test_input_size=None)
    cfg = cfg.replace(
        input_size=(model.in_chans, *size),
        mean=_per_channel(cfg.mean, model.in_chans),
        std=_per_channel(cfg.std, model.in_chans),
        num_classes=model.num_classes,
        label_offset=None,  # it was applied when the weights were loaded
        label_names=None if other_classes else cfg.label_names,
        label_descriptions=None if other_classes else cfg.label_descriptions,
        custom_load=False,
    )
    about = cfg.to_dict(remove_source=True)
    about.pop("architecture")
    return about


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Their mean for each, where there are more or fewer channels than values, as timm has it."""
    return values if len(values) == channels else (sum(values) / len(values),) * channels
