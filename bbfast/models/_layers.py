"""What the blocks of several families are made of: activations by name, convolutions, channel arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bbfast.nn import (
    BatchNormAct2d,
    apply_conv_bn_act,
    apply_depthwise_conv_bn_act,
    apply_gate,
    squeeze_excite_gate,
)
from bbfast.reference.activation import activation

# timm's names of activations, and the names that ops know.
ACT_NAMES = {
    "identity": "identity",
    "relu": "relu",
    "relu6": "relu6",
    "hard_swish": "hardswish",
    "hardswish": "hardswish",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
}


def resolve_act(act_layer: str) -> str:
    """The ops' name of the activation that timm calls `act_layer`.

    Raises:
        TypeError, ValueError: it is no string, or no known name.
    """
    if not isinstance(act_layer, str):
        raise TypeError(f"act_layer must be a string, got {act_layer!r}")
    if act_layer not in ACT_NAMES:
        raise ValueError(f"act_layer={act_layer!r} is not known; allowed: {', '.join(ACT_NAMES)}")
    return ACT_NAMES[act_layer]


class Activation(nn.Module):
    """An activation by the ops' name, for the places where a model shows one as a module of its own."""

    def __init__(self, act: str):
        super().__init__()
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return activation(x, self.act)

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


def make_divisible(value: float, divisor: int = 8, minimum: int | None = None, round_limit: float = 0.9) -> int:
    """`value` as a multiple of `divisor`, at least `minimum` (None: divisor) and round_limit * value."""
    rounded = max(minimum or divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < round_limit * value else rounded


def round_channels(channels: float, multiplier: float = 1.0, divisor: int = 8) -> int:
    """A layer's channels when the network is made `multiplier` times as wide."""
    return make_divisible(channels * multiplier, divisor)


# ---- convolutions ----------------------------------------------------------------------------------------


class Conv2dSame(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: ceil(size / stride) outputs, odd pixels last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sides = []
        for size, kernel, stride, dilation in zip(
            reversed(x.shape[2:]), reversed(self.kernel_size), reversed(self.stride), reversed(self.dilation)
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            sides += [total // 2, total - total // 2]
        return super().forward(F.pad(x, sides))


def create_conv2d(
    in_chs: int,
    out_chs: int,
    kernel_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    pad_type: str = "",
    bias: bool = False,
    device=None,
    dtype=None,
) -> nn.Conv2d:
    """A convolution padded by `pad_type`: `""` symmetrically, `"same"` as TensorFlow, `"valid"` not."""
    if pad_type not in ("", "same", "valid"):
        raise ValueError(f"pad_type={pad_type!r} is not known; allowed: '', 'same', 'valid'")
    extent = dilation * (kernel_size - 1)
    # At stride 1 with an odd extent the two rules agree, and a plain convolution can say so.
    dynamic = pad_type == "same" and (stride > 1 or extent % 2 == 1)
    padding = 0 if dynamic or pad_type == "valid" else (stride - 1 + extent) // 2
    conv = Conv2dSame if dynamic else nn.Conv2d
    return conv(in_chs, out_chs, kernel_size, stride, padding, dilation, groups, bias=bias, device=device, dtype=dtype)


def conv_bn_act(conv: nn.Conv2d, bn: BatchNormAct2d, x: torch.Tensor, residual=None, gate=None) -> torch.Tensor:
    """`act(bn(conv(x * gate)) + residual)` as one op."""
    return apply_conv_bn_act(conv, bn, x, act=bn.act, padding=_padding(conv), residual=residual, gate=gate)


def depthwise_conv_bn_act(conv: nn.Conv2d, bn: BatchNormAct2d, x: torch.Tensor, squeeze: bool = False):
    """`act(bn(conv(x)))` as one op; with squeeze also its spatial means `[N, C]`."""
    return apply_depthwise_conv_bn_act(conv, bn, x, act=bn.act, padding=_padding(conv), squeeze=squeeze)


def _padding(conv: nn.Conv2d) -> str | None:
    return "same" if isinstance(conv, Conv2dSame) else None


# ---- pooling ---------------------------------------------------------------------------------------------


class AvgPool2dSame(nn.Module):
    """Means of each pixel, its right, lower and lower right neighbours; outside of the map there are zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, 1)


# ---- squeeze-and-excite ----------------------------------------------------------------------------------


class SEModule(nn.Module):
    """Squeeze-and-excite under the names `fc1` and `fc2`: `x * sigmoid(fc2(act(fc1(mean(x)))))`.

    Args:
        channels: channels of x.
        rd_channels: channels between the two convolutions.
        act: the activation between them, by the ops' name.
    """

    def __init__(self, channels: int, rd_channels: int, *, act: str = "relu", device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, rd_channels, 1, device=device, dtype=dtype)
        self.fc2 = nn.Conv2d(rd_channels, channels, 1, device=device, dtype=dtype)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to the same; without autograd x is overwritten."""
        return apply_gate(x, self.factors(x), inplace=True)

    def factors(self, x: torch.Tensor) -> torch.Tensor:
        """What x is multiplied by, `[N, C]`."""
        return squeeze_excite_gate(x.mean((2, 3)), self.fc1, self.fc2, act=self.act, gate="sigmoid")

    def extra_repr(self) -> str:
        return f"act={self.act!r}"
