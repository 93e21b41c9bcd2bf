"""What ResNets are made of besides convolutions: norms by name, attention, anti-aliasing, dropped squares."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bbfast.models._layers import SEModule, make_divisible
from bbfast.nn import BATCH_NORMS, apply_conv_bn_act
from bbfast.ops._common import overridable
from bbfast.reference.activation import activation

# ---- convolution, norm, activation -----------------------------------------------------------------------


def conv_norm_act(
    conv: nn.Conv2d, norm: nn.Module, x: torch.Tensor, act: str, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`act(norm(conv(x)) + residual)`: one op where norm is a BatchNorm, one after the other where it is not."""
    if isinstance(norm, BATCH_NORMS):
        return apply_conv_bn_act(conv, norm, x, act=act, residual=residual)
    x = norm(apply_conv_bn_act(conv, None, x, act="identity"))
    return activation(x if residual is None else x + residual, act)


def group_norm(channels: int, device=None, dtype=None) -> nn.GroupNorm:
    """GroupNorm of 32 groups."""
    return nn.GroupNorm(32, channels, device=device, dtype=dtype)


NORM_LAYERS = {"batchnorm": nn.BatchNorm2d, "batchnorm2d": nn.BatchNorm2d, "groupnorm": group_norm}


def resolve_norm(norm_layer: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """What makes the norm that timm calls `norm_layer`, or norm_layer itself if it is a function or class.

    Raises:
        TypeError, ValueError: it is neither, or no known name.
    """
    if not isinstance(norm_layer, str):
        if not callable(norm_layer):
            raise TypeError(f"norm_layer must be a string or a function, got {type(norm_layer).__name__}")
        return norm_layer
    if norm_layer not in NORM_LAYERS:
        raise ValueError(f"norm_layer={norm_layer!r} is not known; allowed: {', '.join(NORM_LAYERS)}")
    return NORM_LAYERS[norm_layer]


# ---- attention over channels -----------------------------------------------------------------------------


def squeeze_excite(channels: int, rd_ratio: float = 1 / 16, device=None, dtype=None) -> SEModule:
    """Squeeze-and-excite whose hidden layer has rd_ratio * channels, rounded to a multiple of 8."""
    return SEModule(channels, make_divisible(channels * rd_ratio, round_limit=0.0), device=device, dtype=dtype)


class EcaModule(nn.Module):
    """Efficient channel attention, https://arxiv.org/abs/1910.03151: each channel's gate sees its neighbours' means.

    Args:
        channels: of x; the more there are, the wider the convolution along them.
    """

    def __init__(self, channels: int, device=None, dtype=None):
        super().__init__()
        width = int(abs(math.log(channels, 2) + 1) / 2)
        width = max(width if width % 2 else width + 1, 3)
        self.conv = nn.Conv1d(1, 1, width, padding=width // 2, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to the same; without autograd x is overwritten."""
        gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)[:, :, None, None]
        if not torch.is_grad_enabled() and gate.dtype == x.dtype:
            return x.mul_(gate)
        return x * gate


ATTENTION_LAYERS = {"se": squeeze_excite, "eca": EcaModule}


def resolve_attention(attn_layer: str | Callable[..., nn.Module] | None) -> Callable[..., nn.Module] | None:
    """What makes the attention that timm calls `attn_layer`, or attn_layer itself if it is a function, class or None.

    Raises:
        TypeError, ValueError: it is something else, or no known name.
    """
    if attn_layer is None or (callable(attn_layer) and not isinstance(attn_layer, str)):
        return attn_layer
    if not isinstance(attn_layer, str):
        raise TypeError(f"attn_layer must be a string, a function or None, got {type(attn_layer).__name__}")
    if attn_layer not in ATTENTION_LAYERS:
        raise ValueError(f"attn_layer={attn_layer!r} is not known; allowed: {', '.join(ATTENTION_LAYERS)}")
    return ATTENTION_LAYERS[attn_layer]


# ---- pooling ---------------------------------------------------------------------------------------------


class BlurPool2d(nn.Module):
    """Takes every stride-th pixel of the blurred map, https://arxiv.org/abs/1904.11486.

    The filter is the binomial [1, 2, 1] along both axes; it is no part of the state_dict.

    Args:
        stride: in pixels.
    """

    def __init__(self, stride: int = 2, device=None, dtype=None):
        super().__init__()
        self.stride = stride
        self.register_buffer("filt", torch.empty((1, 1, 3, 3), device=device, dtype=dtype), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Fills the filter, as after `to_empty`."""
        line = torch.tensor([0.25, 0.5, 0.25])
        self.filt.copy_(line[:, None] * line)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]`, at least 2 x 2 pixels, to `[N, C, ceil(H / stride), ceil(W / stride)]`."""
        return _blur(x, self.filt, self.stride)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


@overridable
def _blur(x: torch.Tensor, filt: torch.Tensor, stride: int) -> torch.Tensor:
    channels = x.shape[1]
    x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(x, filt.expand(channels, -1, -1, -1), stride=stride, groups=channels)


ANTI_ALIASING = {"avg": nn.AvgPool2d, "blur": BlurPool2d}


def check_aa_layer(aa_layer: str | None) -> str | None:
    """`aa_layer`, if it is a known name or None."""
    if aa_layer is not None and not isinstance(aa_layer, str):
        raise TypeError(f"aa_layer must be a string or None, got {aa_layer!r}")
    if aa_layer is not None and aa_layer not in ANTI_ALIASING:
        raise ValueError(f"aa_layer={aa_layer!r} is not known; allowed: {', '.join(ANTI_ALIASING)} and None")
    return aa_layer


def create_aa(aa_layer: str, stride: int, device=None, dtype=None) -> nn.Module:
    """The pooling called `aa_layer`, which divides a map's sides by stride."""
    if aa_layer == "avg":
        return nn.AvgPool2d(stride)
    return BlurPool2d(stride, device=device, dtype=dtype)


# ---- DropBlock -------------------------------------------------------------------------------------------


class DropBlock2d(nn.Module):
    """Drops squares of a map in training, https://arxiv.org/abs/1810.12890, as timm's does under the same seed.

    Args:
        drop_prob: expected share of the map that is dropped, before gamma_scale and overlaps.
        block_size: pixels along a square's sides; at most the map's.
        gamma_scale: factor of drop_prob.
    """

    def __init__(self, drop_prob: float, block_size: int, gamma_scale: float = 1.0):
        super().__init__()
        self.drop_prob = drop_prob
        self.block_size = block_size
        self.gamma_scale = gamma_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to the same. All channels lose the same squares; what is left grows to keep the sum."""
        if not self.training or self.drop_prob == 0:
            return x
        keep = self._keep_mask(x)
        scale = keep.numel() / keep.float().sum().add(1e-7)
        return x * (keep * scale.to(x.dtype))

    def _keep_mask(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, 1, H, W]` of x's dtype: 0 within a square, else 1."""
        height, width = x.shape[2:]
        sides = min(self.block_size, height), min(self.block_size, width)
        places = (height - sides[0] + 1) * (width - sides[1] + 1)
        chance = self.gamma_scale * self.drop_prob * height * width / (sides[0] * sides[1]) / places
        centres = torch.empty((x.shape[0], 1, height, width), dtype=x.dtype, device=x.device).bernoulli_(chance)
        squares = F.max_pool2d(centres, sides, 1, (sides[0] // 2, sides[1] // 2))
        # Padding on both sides gives squares of even sides one row or column too many.
        return 1 - squares[..., 1 - sides[0] % 2 :, 1 - sides[1] % 2 :]

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, block_size={self.block_size}, gamma_scale={self.gamma_scale}"
