"""Residual addition of a branch with layer scale and stochastic depth."""

from __future__ import annotations

import torch


def drop_path_add(
    residual: torch.Tensor,
    branch: torch.Tensor,
    multiplier: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
) -> torch.Tensor:
    """`residual + branch * layer_scale * multiplier`, where a multiplier of 0 leaves the residual whatever branch is.

    residual, branch [B, C, ...] of any float dtypes (torch's promotion rules); multiplier [B]; layer_scale [C].
    """
    trailing = (1,) * (branch.dim() - 2)
    if multiplier is not None:
        multiplier = multiplier.view(-1, 1, *trailing)
        branch = torch.where(multiplier != 0, branch, 0)
    if layer_scale is not None:
        branch = branch * layer_scale.view(-1, *trailing)
    if multiplier is not None:
        branch = branch * multiplier
    return residual + branch
