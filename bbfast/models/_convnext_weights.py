"""ConvNeXt weights of other sources, made to fit a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

_OPEN_CLIP = "visual.trunk."

# Where OpenCLIP keeps what bbfast has in the head: a projection, or a perceptron whose last layer has no bias.
_OPEN_CLIP_HEAD = {
    "visual.head.proj.weight": "head.fc.weight",
    "visual.head.mlp.fc1.weight": "head.pre_logits.fc.weight",
    "visual.head.mlp.fc1.bias": "head.pre_logits.fc.bias",
    "visual.head.mlp.fc2.weight": "head.fc.weight",
}

# The authors' names, as patterns, in the order in which they are replaced.
_AUTHORS = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.(\d+)", r"stages.\1.downsample.\2"),
    (r"^stages\.(\d+)\.(\d+)", r"stages.\1.blocks.\2"),
    (r"\bdwconv\b", "conv_dw"),
    (r"\bpwconv([12])\b", r"mlp.fc\1"),
    (r"\bgrn\.gamma$", "mlp.grn.weight"),
    (r"\bgrn\.beta$", "mlp.grn.bias"),
    (r"^head\.", "head.fc."),
    (r"^norm\.", "head.norm."),
)
# Of distillation, which no model takes along.
_AUTHORS_EXTRA = ("projectors.", "norms.")


def adapt_state_dict(
    state_dict: Mapping[str, torch.Tensor], *, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """`state_dict` with this package's keys, and weights of layers in the model's form, 1x1 convolutions or linear.

    Takes the files of ConvNeXt's authors (V1, V2 and what was distilled with their code), and the image towers of
    OpenCLIP. What was trained without a head has no norm for it either, and gets a fresh one.

    Args:
        shapes: by the model's keys, the shapes that it wants.
    """
    if f"{_OPEN_CLIP}stem.0.weight" in state_dict:
        adapted = _from_open_clip(state_dict)
    elif any(key.startswith("downsample_layers.") for key in state_dict):
        adapted = _from_authors(state_dict)
    else:
        adapted = dict(state_dict)
    if not any(key.startswith(("head.", "norm_pre.")) for key in adapted):
        adapted |= _fresh_norms(shapes)
    return {key: _in_form(value, shapes.get(key)) for key, value in adapted.items()}


def _from_open_clip(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    adapted = {key.removeprefix(_OPEN_CLIP): value for key, value in state_dict.items() if key.startswith(_OPEN_CLIP)}
    adapted |= {own: state_dict[key] for key, own in _OPEN_CLIP_HEAD.items() if key in state_dict}
    if "head.fc.weight" in adapted:
        adapted["head.fc.bias"] = torch.zeros(len(adapted["head.fc.weight"]))
    return adapted


def _from_authors(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    adapted = {}
    for key, value in state_dict.items():
        if key.startswith(_AUTHORS_EXTRA):
            continue
        for pattern, own in _AUTHORS:
            key = re.sub(pattern, own, key)
        adapted[key] = value.flatten() if ".grn." in key else value
    return adapted


def _fresh_norms(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """What the norm in or before the head is made with: weight 1, bias 0."""
    return {
        key: torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
        for key, shape in shapes.items()
        if key.startswith(("head.norm.", "norm_pre."))
    }


def _in_form(value: torch.Tensor, shape: tuple[int, ...] | None) -> torch.Tensor:
    """`value` `[O, I]` as `[O, I, 1, 1]`, or the other way round, where the model wants that."""
    other_form = shape is not None and {value.dim(), len(shape)} == {2, 4}
    return value.reshape(shape) if other_form and value.numel() == math.prod(shape) else value
