"""Stochastic depth as layers: alone, and fused with the residual addition."""

from __future__ import annotations

import torch
from torch import nn

from bbfast import ops


class DropPath(nn.Module):
    """Drops whole samples of a branch in training, as timm's DropPath does under the same seed.

    Args:
        drop_prob: chance of each sample to be dropped, between 0 and 1.
        scale_by_keep: divide what is kept by `1 - drop_prob`.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Takes `[N, ...]` and returns the same shape."""
        if not self.training or self.drop_prob == 0:
            return branch
        mask = ops.drop_path_mask(branch, self.drop_prob, self.scale_by_keep)
        return branch * mask.view(-1, *(1,) * (branch.dim() - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={round(self.drop_prob, 3):0.3f}, scale_by_keep={self.scale_by_keep}"


class DropPathAdd(nn.Module):
    """`residual + DropPath(branch * layer_scale)` as one op.

    Args:
        drop_prob: chance of each sample's branch to be dropped, between 0 and 1.
        scale_by_keep: divide what is kept by `1 - drop_prob`.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(
        self,
        residual: torch.Tensor,
        branch: torch.Tensor,
        layer_scale: torch.Tensor | None = None,
        channel_dim: int = 1,
    ) -> torch.Tensor:
        """Arguments and result are those of `bbfast.ops.drop_path_add`."""
        return ops.drop_path_add(
            residual,
            branch,
            drop_prob=self.drop_prob,
            training=self.training,
            scale_by_keep=self.scale_by_keep,
            layer_scale=layer_scale,
            channel_dim=channel_dim,
        )

    def extra_repr(self) -> str:
        return f"drop_prob={round(self.drop_prob, 3):0.3f}, scale_by_keep={self.scale_by_keep}"
