"""What preprocessing a model was trained for."""

from __future__ import annotations

from typing import Any

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
_TEST_FIELDS = {"input_size": "test_input_size", "crop_pct": "test_crop_pct"}


def resolve_model_data_config(
    model: Any,
    args: dict[str, Any] | None = None,
    pretrained_cfg: dict[str, Any] | None = None,
    use_test_size: bool = False,
) -> dict[str, Any]:
    """The arguments of `create_transform` for a model.

    `args` come before the model's pretrained config, which comes before ImageNet's defaults.

    Args:
        model: anything with a `pretrained_cfg` dict (None or absent: the defaults).
        args: fields that override, as from a command line; None values are ignored. A `mean` or `std` of
            one value is repeated for each channel.
        pretrained_cfg: used instead of the model's own.
        use_test_size: take `test_input_size` and `test_crop_pct` where the config has them.

    Returns:
        input_size (C, H, W), interpolation, mean, std, crop_pct, crop_mode.

    Raises:
        ValueError: `args` holds a field that is not known, or a mean or std of a wrong length.
    """
    args = {name: value for name, value in (args or {}).items() if value is not None}
    unknown = sorted(set(args) - set(_DEFAULTS))
    if unknown:
        raise ValueError(f"args holds unknown fields: {', '.join(unknown)}; allowed: {', '.join(_DEFAULTS)}")
    trained = pretrained_cfg or getattr(model, "pretrained_cfg", None) or {}

    config = {}
    for name, default in _DEFAULTS.items():
        at_test_size = trained.get(_TEST_FIELDS.get(name)) if use_test_size else None
        # An empty field of a config means "not said".
        config[name] = args.get(name) or at_test_size or trained.get(name) or default
    for name in {"mean", "std"} & set(args):
        config[name] = _per_channel(name, config[name], config["input_size"][0])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


def _per_channel(name: str, values, channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise ValueError(f"{name} must hold 1 or {channels} values, got {len(values)}: {values}")
    return tuple(values) * (channels if len(values) == 1 else 1)
