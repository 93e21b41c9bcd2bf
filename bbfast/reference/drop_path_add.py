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
    if layer_scale is not None:
        layer_scale = layer_scale.view(-1, *trailing)
    if multiplier is None:
        return residual + branch if layer_scale is None else torch.addcmul(residual, branch, layer_scale)
    multiplier = multiplier.view(-1, 1, *trailing)
    kept = multiplier != 0
    if layer_scale is not None:
        branch = torch.where(kept, branch, 0) * layer_scale  # nor may such a branch reach the gradient of layer_scale
    return torch.where(kept, torch.addcmul(residual, branch, multiplier), residual)
