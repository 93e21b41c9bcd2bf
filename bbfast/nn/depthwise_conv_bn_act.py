"""Depthwise convolution + BatchNorm + activation as a layer, and for modules that a model keeps apart."""

from __future__ import annotations

import torch
from torch import nn

from bbfast import ops
from bbfast.nn._batch_norm import batch_norm_arguments
from bbfast.nn.conv_bn_act import apply_conv_bn_act
from bbfast.nn.folded_batch_norm import without_folded


def apply_depthwise_conv_bn_act(
    conv: nn.Conv2d, bn: nn.BatchNorm2d | None, x: torch.Tensor, *, act: str, squeeze: bool = False, padding=None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Runs `conv`, `bn` and `act` as one op; the modules only lend their parameters and state.

    Args:
        conv: depthwise (groups == in_channels), zero padding.
        bn: a BatchNorm2d, in train or eval mode, or None. In train mode a SyncBatchNorm runs unfused; one that was
            folded counts as None.
        x: `[N, C, H, W]`.
        act: see `bbfast.ops.depthwise_conv_bn_act`.
        squeeze: also return the spatial means `[N, C]`.
        padding: overrides `conv.padding`, e.g. `"same"` for TensorFlow's rule.

    Raises:
        ValueError: `conv.padding_mode` is not zeros, or conv is not depthwise.
    """
    if conv.padding_mode != "zeros":
        raise ValueError(f"conv has padding_mode={conv.padding_mode!r}; only 'zeros' is supported")
    if conv.groups != conv.in_channels:
        raise ValueError(f"conv has groups={conv.groups} for {conv.in_channels} channels; it must have one per channel")
    bn = without_folded(bn)
    if isinstance(bn, nn.SyncBatchNorm) and (bn.training or bn.running_mean is None):
        y = apply_conv_bn_act(conv, bn, x, act=act, padding=padding)
        return (y, y.mean((2, 3))) if squeeze else y
    statistics, keywords = ((None, None, None, None), {}) if bn is None else batch_norm_arguments(bn)
    return ops.depthwise_conv_bn_act(
        x,
        conv.weight,
        *statistics,
        bias=conv.bias,
        stride=conv.stride,
        padding=conv.padding if padding is None else padding,
        dilation=conv.dilation,
        act=act,
        squeeze=squeeze,
        **keywords,
    )


class DepthwiseConvBNAct(nn.Module):
    """`act(bn(conv(x)))` with children `conv` and `bn`.

    Args:
        channels: C, in and out.
        kernel_size, stride, dilation: an int or (height, width).
        padding: as in `bbfast.ops.depthwise_conv_bn_act`; None means dilation * (kernel_size - 1) // 2 on all sides.
        bias: whether the convolution has a bias.
        eps, momentum: BatchNorm's.
        act: identity, relu, relu6, hardswish, silu or gelu.
        squeeze: also return the output's spatial means `[N, C]`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        stride: int | tuple[int, int] = 1,
        padding=None,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: str = "relu",
        squeeze: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            channels, channels, kernel_size, stride, 0, dilation, groups=channels, bias=bias, **factory
        )
        self.bn = nn.BatchNorm2d(channels, eps=eps, momentum=momentum, **factory)
        if padding is None:
            padding = tuple(d * (k - 1) // 2 for k, d in zip(self.conv.kernel_size, self.conv.dilation))
        self.padding = padding
        self.act = act
        self.squeeze = squeeze

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return apply_depthwise_conv_bn_act(
            self.conv, self.bn, x, act=self.act, squeeze=self.squeeze, padding=self.padding
        )

    def extra_repr(self) -> str:
        return f"act={self.act!r}, padding={self.padding!r}, squeeze={self.squeeze}"
