"""Global response normalisation, which lets the channels of a map compete.

`ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders`, https://arxiv.org/abs/2301.00808.
"""

from __future__ import annotations

import torch
from torch import nn

from bbfast.ops._common import overridable


@overridable
def _global_response_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide)
    share = norm / (norm.mean(-1, keepdim=True) + eps)
    scale = 1 + weight.to(wide) * share
    return torch.addcmul(bias.to(x.dtype), x, scale.to(x.dtype))


class GlobalResponseNorm(nn.Module):
    """`x + bias + weight * x * n` on maps `[N, H, W, C]`, n a channel's norm over H and W by their mean over channels.

    Norms and their quotients are float32 at least, since half precision could not hold them. x is read for the norms,
    and once more for the result.

    Args:
        channels: C.
        eps: added to the mean.
    """

    def __init__(self, channels: int, eps: float = 1e-6, *, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes `[N, H, W, C]` and returns the same shape and dtype."""
        return _global_response_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
