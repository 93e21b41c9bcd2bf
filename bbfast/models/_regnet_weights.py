"""RegNet weights of classy-vision, VISSL and torchvision under this package's keys."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

# A block's parts, by their names there. classy-vision's last convolution has its norm beside it (`f.c`, `f.final_bn`),
# torchvision's within (`f.c.0`, `f.c.1`), and so with the shortcut.
_PARTS = {
    "f.a.0": "conv1.conv",
    "f.a.1": "conv1.bn",
    "f.b.0": "conv2.conv",
    "f.b.1": "conv2.bn",
    "f.se.excitation.0": "se.fc1",
    "f.se.excitation.2": "se.fc2",
    "f.se.fc1": "se.fc1",
    "f.se.fc2": "se.fc2",
    "f.c": "conv3.conv",
    "f.final_bn": "conv3.bn",
    "f.c.0": "conv3.conv",
    "f.c.1": "conv3.bn",
    "proj": "downsample.conv",
    "bn": "downsample.bn",
    "proj.0": "downsample.conv",
    "proj.1": "downsample.bn",
}
_OTHERS = {
    "stem.0": "stem.conv",
    "stem.1": "stem.bn",
    "_feature_blocks.conv1.stem.0": "stem.conv",
    "_feature_blocks.conv1.stem.1": "stem.bn",
    "0.clf.0": "head.fc",
    "fc": "head.fc",
}
_BLOCK = re.compile(r"(?:trunk_output\.block\d+|_feature_blocks\.res\d+)\.block(\d+)-(\d+)\.(.+)")
_UNUSED = ("projection_head", "prototypes")  # of self-supervised training


def adapt_state_dict(state_dict: Mapping) -> dict[str, torch.Tensor]:
    """`state_dict` with this package's keys, if it is classy-vision's, VISSL's or torchvision's.

    Args:
        state_dict: tensors by name, or the nested dict of a classy-vision or VISSL checkpoint.
    """
    state_dict = state_dict.get("model", state_dict)
    if "classy_state_dict" in state_dict:
        parts = state_dict["classy_state_dict"]["base_model"]["model"]
        state_dict = {**parts["trunk"], **parts["heads"]}
    if not {"stem.0.weight", "_feature_blocks.conv1.stem.0.weight"} & state_dict.keys():
        return dict(state_dict)
    return {_own_key(key): value for key, value in state_dict.items() if not any(unused in key for unused in _UNUSED)}


def _own_key(key: str) -> str:
    module, _, leaf = key.rpartition(".")
    if match := _BLOCK.fullmatch(module):
        stage, block, part = match.groups()
        return f"s{int(stage)}.b{int(block) + 1}.{_PARTS.get(part, part)}.{leaf}"
    return f"{_OTHERS.get(module, module)}.{leaf}"
