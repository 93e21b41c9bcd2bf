"""Global pooling by name, with timm's names."""

from __future__ import annotations

import torch
from torch import nn

# Each pools the axes `hw` of a map and keeps them with one pixel; catavgmax has both channels' worth along axis `c`.
_POOLS = {
    "avg": lambda x, hw, c: x.mean(hw, keepdim=True),
    "max": lambda x, hw, c: x.amax(hw, keepdim=True),
    "avgmax": lambda x, hw, c: 0.5 * (x.mean(hw, keepdim=True) + x.amax(hw, keepdim=True)),
    "catavgmax": lambda x, hw, c: torch.cat((x.mean(hw, keepdim=True), x.amax(hw, keepdim=True)), c),
}
_ALIASES = {"fast": "avg", **{f"fast{name}": name for name in _POOLS}}


class GlobalPool2d(nn.Module):
    """Pools H and W away.

    Args:
        pool_type: avg, max, avgmax (their mean), catavgmax (both, 2C channels), timm's `fast` names for the
            same, or `""` for no pooling.
        flatten: return `[N, C]` instead of a map of one pixel (not where pool_type is empty).
        channels_last: maps are `[N, H, W, C]` instead of `[N, C, H, W]`.
    """

    def __init__(self, pool_type: str = "avg", flatten: bool = False, channels_last: bool = False):
        super().__init__()
        if not isinstance(pool_type, str):
            raise TypeError(f"global_pool must be a string, got {type(pool_type).__name__}")
        name = _ALIASES.get(pool_type.lower(), pool_type.lower())
        if name and name not in _POOLS:
            allowed = ", ".join(map(repr, (*_POOLS, *_ALIASES, "")))
            raise ValueError(f"global_pool={pool_type!r} is not known; allowed: {allowed}")
        self.pool_type = pool_type
        self.flatten = flatten
        self.channels_last = channels_last
        self._pool = name

    def feat_mult(self) -> int:
        """How many output channels there are per input channel."""
        return 2 if self._pool == "catavgmax" else 1

    def check_classifier(self, num_classes: int) -> None:
        """Raises ValueError where nothing pools a map `[N, C, H, W]` that a linear classifier is to take."""
        if num_classes and not self._pool and not self.channels_last:
            raise ValueError(
                "global_pool='' leaves a map, which no linear classifier takes; it goes with num_classes=0, got "
                f"{num_classes}"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._pool:
            return x
        x = _POOLS[self._pool](x, *(((1, 2), 3) if self.channels_last else ((2, 3), 1)))
        return x.flatten(1) if self.flatten else x

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}, flatten={self.flatten}"
