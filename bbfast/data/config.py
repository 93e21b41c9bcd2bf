"""What preprocessing a model was trained for, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bbfast.nn._arguments import check_bool, check_int, check_ints, check_positive

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_DEFAULTS = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "crop_pct": 0.875,
    "crop_mode": "center",
}
_SIZE_FIELDS = ("input_size", "img_size", "in_chans", "chans")
_ARGS = (*_SIZE_FIELDS, *(name for name in _DEFAULTS if name != "input_size"))


def resolve_model_data_config(
    model: Any,
    args: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    use_test_size: bool = False,
) -> dict[str, Any]:
    """The arguments of `create_transform` for a model.

    Each field comes from `args`, else from the model itself, else from its pretrained config, else it is ImageNet's
    default. The model itself says `in_chans`, and the image size that it was made for where it has one
    (`patch_embed.img_size`): a model for 6 channels or 256 pixels gets an input that it can take.

    Where timm's function of this name differs: it knows the pretrained config only, so that such a model is promised an
    input it refuses, and passes over `in_chans` in args where the config has an input_size. It ignores fields of args
    that it does not know; here they are errors, for a typo would go unnoticed.

    Args:
        model: one of bbfast's or timm's, or any object with a `pretrained_cfg` or without; one in DataParallel or
            DistributedDataParallel is unwrapped.
        args: fields that override, as from a command line; None values are ignored. `input_size` (channels, height,
            width); `img_size` an int or (height, width); `in_chans` or `chans`; `mean` and `std` a number or one per
            channel, one value standing for all channels; `interpolation`, `crop_pct`, `crop_mode`. input_size comes
            before img_size and in_chans.
        pretrained_cfg: a dict or a `PretrainedCfg`, used instead of the model's own.
        use_test_size: take `test_input_size` and `test_crop_pct` where the config has them. A model that takes one size
            only keeps that one.

    Returns:
        input_size (channels, height, width), interpolation, mean, std, crop_pct, crop_mode. mean and std have one value
        per channel; where the config's have another length, each channel gets their average.

    Raises:
        TypeError: an argument of a wrong type, such as a model's name instead of a model.
        ValueError: args holds a field that is not known, a size below 1, or a mean or std of a wrong length; or there
            is neither model nor args nor config.
    """
    return resolve_data_config(args, pretrained_cfg, model, use_test_size)


def resolve_data_config(
    args: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
    model: Any = None,
    use_test_size: bool = False,
) -> dict[str, Any]:
    """`resolve_model_data_config` with its arguments in the order of timm's function of this name."""
    check_bool("use_test_size", use_test_size)
    model = _unwrapped(model)
    trained = _as_dict(pretrained_cfg) or _as_dict(getattr(model, "pretrained_cfg", None))
    if model is None and not args and not trained:
        raise ValueError("a model, args or a pretrained_cfg is needed to resolve a data config; all are empty")
    args = _given(args)

    input_size = _input_size(args, trained, model, use_test_size)
    test_crop_pct = trained.get("test_crop_pct") if use_test_size else None
    return {
        "input_size": input_size,
        "interpolation": _first(args, trained, "interpolation"),
        "mean": _per_channel("mean", args, trained, input_size[0]),
        "std": _per_channel("std", args, trained, input_size[0]),
        "crop_pct": args.get("crop_pct") or test_crop_pct or _first({}, trained, "crop_pct"),
        "crop_mode": _first(args, trained, "crop_mode"),
    }


def _given(args: Mapping[str, Any] | None) -> dict[str, Any]:
    """What args say, checked as far as the fields' names and types go."""
    if args is not None and not isinstance(args, Mapping):
        raise TypeError(f"args must be a dict (of an argparse.Namespace: vars(args)), got {type(args).__name__}")
    args = {name: value for name, value in (args or {}).items() if value is not None}
    if unknown := sorted(set(args) - set(_ARGS)):
        raise ValueError(f"args holds unknown fields: {', '.join(unknown)}; allowed: {', '.join(_ARGS)}")
    if "crop_pct" in args:
        check_positive("crop_pct", args["crop_pct"])
    return args


def _unwrapped(model: Any) -> Any:
    if isinstance(model, str):
        raise TypeError(f"model must be a model, as from bbfast.create_model({model!r}), got its name")
    return model.module if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else model


def _as_dict(cfg: Any) -> dict[str, Any]:
    if hasattr(cfg, "to_dict"):
        cfg = cfg.to_dict()
    if cfg is not None and not isinstance(cfg, Mapping):
        raise TypeError(f"pretrained_cfg must be a dict or a PretrainedCfg, got {type(cfg).__name__}")
    return dict(cfg or {})


def _first(args: Mapping, trained: Mapping, name: str) -> Any:
    # An empty field of a config means "not said".
    return args.get(name) or trained.get(name) or _DEFAULTS[name]


# ---- sizes -----------------------------------------------------------------------------------------------


def _input_size(args: Mapping, trained: Mapping, model: Any, use_test_size: bool) -> tuple[int, int, int]:
    if "input_size" in args:
        size = check_ints("input_size", args["input_size"], minimum=1)
        if len(size) != 3:
            raise ValueError(f"input_size must be (channels, height, width), got {size}")
        return size
    trained_size = tuple(trained.get("input_size") or _DEFAULTS["input_size"])
    channels = _asked_channels(args) or _own_channels(model) or trained_size[0]
    test_size = trained.get("test_input_size") if use_test_size else None
    own_size, takes_no_other = _own_size(model)
    if "img_size" in args:
        height_width = _height_width(args["img_size"])
    elif own_size and (takes_no_other or not test_size):
        height_width = own_size
    else:
        height_width = tuple(test_size or trained_size)[-2:]
    return (channels, *height_width)


def _asked_channels(args: Mapping) -> int | None:
    for name in ("in_chans", "chans"):
        if name in args:
            return check_int(name, args[name], minimum=1)
    return None


def _own_channels(model: Any) -> int | None:
    channels = getattr(model, "in_chans", None)
    return channels if isinstance(channels, int) else None


def _own_size(model: Any) -> tuple[tuple[int, int] | None, bool]:
    """The (height, width) that a model was made for, if any, and whether it refuses all others."""
    patch_embed = getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None)
    return (tuple(size) if size else None), bool(getattr(patch_embed, "strict_img_size", False))


def _height_width(img_size: int | Sequence[int]) -> tuple[int, int]:
    if not isinstance(img_size, (tuple, list)):
        img_size = (img_size, img_size)
    size = check_ints("img_size", img_size, minimum=1)
    if len(size) != 2:
        raise ValueError(f"img_size must be an int or (height, width), got {size}")
    return size


# ---- mean and std ----------------------------------------------------------------------------------------


def _per_channel(name: str, args: Mapping, trained: Mapping, channels: int) -> tuple[float, ...]:
    if name in args:
        values = _as_tuple(args[name])
        if len(values) not in (1, channels):
            raise ValueError(f"{name} must hold 1 or {channels} values, got {len(values)}: {values}")
    else:
        values = _as_tuple(_first({}, trained, name))
        if len(values) not in (1, channels):
            values = (sum(values) / len(values),)
    return values * channels if len(values) == 1 else values


def _as_tuple(values: float | Sequence[float]) -> tuple[float, ...]:
    return (values,) if isinstance(values, (int, float)) else tuple(values)
