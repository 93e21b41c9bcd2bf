"""Swin weights of other sources and sizes, made to fit a model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from bbfast.nn._relative_position import resize_relative_position_bias_table

# Buffers that older code saved; they follow from the window and the map.
_DERIVED = ("relative_position_index", "attn_mask")


def adapt_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    *,
    patch_size: tuple[int, int],
    window_sizes: Mapping[str, tuple[int, int]],
) -> dict[str, torch.Tensor]:
    """`state_dict` with this package's keys, filters of patch_size and tables of window_sizes.

    The files of Swin's authors end a stage with patch merging, where timm and bbfast begin the next one with it, and
    call the classifier `head`.

    Args:
        patch_size: (height, width) that `patch_embed.proj.weight` shall have.
        window_sizes: (height, width) by the key of each relative position bias table.
    """
    merging_ends_stages = "layers.0.downsample.reduction.weight" in state_dict
    adapted = {}
    for key, value in state_dict.items():
        if key.endswith(_DERIVED):
            continue
        if merging_ends_stages:
            key = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
            key = re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", key)
        if key == "patch_embed.proj.weight" and value.dim() == 4:
            value = resample_patch_embed(value, patch_size)
        if key in window_sizes and value.dim() == 2:
            value = _resize_table(key, value, window_sizes[key])
        adapted[key] = value
    return adapted


def _resize_table(key: str, table: torch.Tensor, window_size: tuple[int, int]) -> torch.Tensor:
    """For a table whose own window is not known: the model's where it fits, else a square one."""
    height, width = (2 * side - 1 for side in window_size)
    if len(table) == height * width:
        return table
    side = math.isqrt(len(table))
    if side * side != len(table) or side % 2 == 0:
        raise ValueError(f"{key} has {len(table)} rows, which is no square window's; the model's has {height * width}")
    return resize_relative_position_bias_table(table, (side // 2 + 1, side // 2 + 1), window_size)


def resample_patch_embed(weight: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Filters `[O, C, h, w]` for patches of another size, that give resized patches the same features.

    The pseudo-inverse of resizing a patch (bicubic, antialiased), as FlexiViT has it: https://arxiv.org/abs/2212.08013.
    """
    old_size = tuple(weight.shape[2:])
    if old_size == tuple(patch_size):
        return weight
    pixels = math.prod(old_size)
    basis = torch.eye(pixels, device=weight.device).view(pixels, 1, *old_size)
    resized = F.interpolate(basis, size=tuple(patch_size), mode="bicubic", antialias=True, align_corners=False)
    inverse = torch.linalg.pinv(resized.flatten(1).T)  # [pixels, new pixels]
    return (weight.detach().flatten(2).float() @ inverse).unflatten(2, tuple(patch_size)).to(weight.dtype)
