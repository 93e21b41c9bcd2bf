"""The blocks of MobileNetV2, MobileNetV3 and EfficientNet.

Every block runs as fused ops: a convolution, its BatchNorm, its activation and, in the last one, the skip
connection are one call; the depthwise convolution also hands out the spatial means that squeeze-and-excite
needs. The modules have timm's names, so that state_dicts are exchangeable, but they only lend their
parameters and state: hooks on modules inside a block do not run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from bbfast.models._layers import conv_bn_act, create_conv2d, depthwise_conv_bn_act, make_divisible
from bbfast.nn import BatchNormAct2d, DropPathAdd, apply_gate, squeeze_excite_gate

# ---- squeeze-and-excite ----------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    """Scales channels by a gate computed from their means: `x * gate(expand(act(reduce(mean(x)))))`.

    Args:
        in_chs: channels of x.
        rd_ratio: reduced channels per channel.
        rd_round_fn: rounds the number of reduced channels.
        act: the containing block's activation; force_act overrides it.
        gate: sigmoid or hard_sigmoid.
    """

    def __init__(
        self,
        in_chs: int,
        rd_ratio: float = 0.25,
        *,
        act: str = "relu",
        force_act: str | None = None,
        gate: str = "sigmoid",
        rd_round_fn: Callable[[float], int] = round,
        device=None,
        dtype=None,
    ):
        super().__init__()
        rd_channels = rd_round_fn(in_chs * rd_ratio)
        self.conv_reduce = nn.Conv2d(in_chs, rd_channels, 1, device=device, dtype=dtype)
        self.conv_expand = nn.Conv2d(rd_channels, in_chs, 1, device=device, dtype=dtype)
        self.act = force_act or act
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, C, H, W]` to the same."""
        return apply_gate(x, self.factors(x.mean((2, 3))))

    def factors(self, squeezed: torch.Tensor) -> torch.Tensor:
        """What x, whose means over H and W `squeezed` holds, is multiplied by: `[N, C]`."""
        return squeeze_excite_gate(squeezed, self.conv_reduce, self.conv_expand, act=self.act, gate=self.gate)

    def extra_repr(self) -> str:
        return f"act={self.act!r}, gate={self.gate!r}"


# ---- blocks ----------------------------------------------------------------------------------------------


class _SkipBlock(nn.Module):
    """What the blocks share: a last convolution whose output the input is added to."""

    has_skip: bool
    drop_path: nn.Module

    def _finish(
        self,
        conv: nn.Conv2d,
        bn: BatchNormAct2d,
        x: torch.Tensor,
        shortcut: torch.Tensor,
        gate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.has_skip:
            return conv_bn_act(conv, bn, x, gate=gate)
        if self.training and isinstance(self.drop_path, DropPathAdd):
            return self.drop_path(shortcut, conv_bn_act(conv, bn, x, gate=gate))
        if bn.act == "identity":
            return conv_bn_act(conv, bn, x, residual=shortcut, gate=gate)
        return conv_bn_act(conv, bn, x, gate=gate) + shortcut


def _drop_path(rate: float) -> nn.Module:
    return DropPathAdd(rate) if rate else nn.Identity()


class ConvBnAct(_SkipBlock):
    """Convolution, BatchNorm, activation; the input is added where `skip` asks for it and shapes allow it."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        pad_type: str = "",
        skip: bool = False,
        act: str = "relu",
        bn: dict,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.has_skip = skip and stride == 1 and in_chs == out_chs
        self.conv = create_conv2d(
            in_chs, out_chs, kernel_size, stride=stride, dilation=dilation, pad_type=pad_type, **factory
        )
        self.bn1 = BatchNormAct2d(out_chs, act=act, **bn, **factory)
        self.drop_path = _drop_path(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._finish(self.conv, self.bn1, x, x)


class DepthwiseSeparableConv(_SkipBlock):
    """Depthwise convolution, squeeze-and-excite, linear pointwise convolution, skip."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        pad_type: str = "",
        skip: bool = True,
        act: str = "relu",
        bn: dict,
        se_layer: Callable[..., SqueezeExcite] | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.has_skip = skip and stride == 1 and in_chs == out_chs
        self.conv_dw = create_conv2d(
            in_chs,
            in_chs,
            kernel_size,
            stride=stride,
            dilation=dilation,
            groups=in_chs,
            pad_type=pad_type,
            **factory,
        )
        self.bn1 = BatchNormAct2d(in_chs, act=act, **bn, **factory)
        self.se = se_layer(in_chs, act=act, **factory) if se_layer else nn.Identity()
        self.conv_pw = create_conv2d(in_chs, out_chs, 1, pad_type=pad_type, **factory)
        self.bn2 = BatchNormAct2d(out_chs, act="identity", **bn, **factory)
        self.drop_path = _drop_path(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, gate = _depthwise_and_gate(self.conv_dw, self.bn1, self.se, x)
        return self._finish(self.conv_pw, self.bn2, y, x, gate)


class InvertedResidual(_SkipBlock):
    """Pointwise expansion, depthwise convolution, squeeze-and-excite, linear pointwise projection, skip."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        kernel_size: int = 3,
        *,
        expansion: float = 1.0,
        stride: int = 1,
        dilation: int = 1,
        pad_type: str = "",
        skip: bool = True,
        act: str = "relu",
        bn: dict,
        se_layer: Callable[..., SqueezeExcite] | None = None,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        mid_chs = make_divisible(in_chs * expansion)
        self.has_skip = skip and stride == 1 and in_chs == out_chs
        self.conv_pw = create_conv2d(in_chs, mid_chs, 1, pad_type=pad_type, **factory)
        self.bn1 = BatchNormAct2d(mid_chs, act=act, **bn, **factory)
        self.conv_dw = create_conv2d(
            mid_chs,
            mid_chs,
            kernel_size,
            stride=stride,
            dilation=dilation,
            groups=mid_chs,
            pad_type=pad_type,
            **factory,
        )
        self.bn2 = BatchNormAct2d(mid_chs, act=act, **bn, **factory)
        self.se = se_layer(mid_chs, act=act, **factory) if se_layer else nn.Identity()
        self.conv_pwl = create_conv2d(mid_chs, out_chs, 1, pad_type=pad_type, **factory)
        self.bn3 = BatchNormAct2d(out_chs, act="identity", **bn, **factory)
        self.drop_path = _drop_path(drop_path_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = conv_bn_act(self.conv_pw, self.bn1, x)
        y, gate = _depthwise_and_gate(self.conv_dw, self.bn2, self.se, y)
        return self._finish(self.conv_pwl, self.bn3, y, x, gate)


def _depthwise_and_gate(conv: nn.Conv2d, bn: BatchNormAct2d, se: nn.Module, x: torch.Tensor):
    """The depthwise convolution's output, and what squeeze-and-excite multiplies it by, None for 1."""
    if not isinstance(se, SqueezeExcite):
        return depthwise_conv_bn_act(conv, bn, x), None
    y, means = depthwise_conv_bn_act(conv, bn, x, squeeze=True)
    return y, se.factors(means)
