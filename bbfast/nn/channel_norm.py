"""Norms over the channels of each pixel: of maps `[N, H, W, C]`, and under a name with `2d` of maps `[N, C, H, W]`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bbfast.ops import add_layer_norm
from bbfast.ops._common import overridable
from bbfast.ops.add_layer_norm import takes_layer_norm


@overridable
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    # Under autocast the weight is wider than x, which torch's fused kernels do not take.
    return F.rms_norm(x.to(torch.promote_types(x.dtype, weight.dtype)), weight.shape, weight, eps)


@overridable
def _simple_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    # Half precision could not hold a small variance plus eps.
    variance = x.var(-1, keepdim=True).to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(variance + eps).to(x.dtype) * weight


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis with the eps of ConvNeXt."""

    def __init__(self, channels: int, eps: float = 1e-6, *, device=None, dtype=None):
        super().__init__(channels, eps=eps, device=device, dtype=dtype)


class RmsNorm(nn.RMSNorm):
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last axis."""

    def __init__(self, channels: int, eps: float = 1e-6, *, device=None, dtype=None):
        super().__init__(channels, eps=eps, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _rms_norm(x, self.weight, self.eps)


class SimpleNorm(nn.Module):
    """`x / sqrt(var(x) + eps) * weight` over the last axis: scaled by the unbiased variance, but not centred."""

    def __init__(self, channels: int, eps: float = 1e-6, *, device=None, dtype=None):
        super().__init__()
        self.normalized_shape = (channels,)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _simple_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


class _OfNchw:
    """Lets a norm over the last axis run over the channels of `[N, C, H, W]`.

    Channels_last maps are normalised where they lie; of others, too, the result is channels_last.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm2d(_OfNchw, LayerNorm):
    """`LayerNorm` over the channels of `[N, C, H, W]`; the result is channels_last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1)
        if takes_layer_norm(x, self.normalized_shape[0]) and not torch.compiler.is_compiling():
            return add_layer_norm(x, None, self.weight, self.bias, eps=self.eps)[1].permute(0, 3, 1, 2)
        return nn.LayerNorm.forward(self, x).permute(0, 3, 1, 2)


class RmsNorm2d(_OfNchw, RmsNorm):
    """`RmsNorm` over the channels of `[N, C, H, W]`; the result is channels_last."""


class SimpleNorm2d(_OfNchw, SimpleNorm):
    """`SimpleNorm` over the channels of `[N, C, H, W]`; the result is channels_last."""
