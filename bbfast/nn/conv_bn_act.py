"""Convolution + BatchNorm + activation as a layer, and for modules that a model keeps apart."""

from __future__ import annotations

import torch
from torch import nn

from bbfast import dispatch, ops
from bbfast.nn._batch_norm import batch_norm_arguments
from bbfast.nn.folded_batch_norm import without_folded
from bbfast.nn.squeeze_excite import apply_gate
from bbfast.ops._common import overridable
from bbfast.ops.conv_bn_act import is_for_kernel
from bbfast.reference.activation import activation


def apply_conv_bn_act(
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d | None,
    x: torch.Tensor,
    *,
    act: str,
    padding=None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs `act(bn(conv(x * gate)) + residual)` as one op; the modules only lend their parameters and state.

    Args:
        conv: any groups, zero padding.
        bn: a BatchNorm2d, in train or eval mode, or None. In train mode a SyncBatchNorm runs unfused; one that was
            folded counts as None.
        x: `[N, C, H, W]`.
        act: see `bbfast.ops.conv_bn_act`.
        padding: overrides `conv.padding`, e.g. `"same"` for TensorFlow's rule.
        residual: `[N, O, H', W']`, added before the activation.
        gate: `[N, C]`, or None for 1. Where the op does not take it along, and no gradients are recorded, x is
            overwritten with the product.

    Raises:
        ValueError: `conv.padding_mode` is not zeros.
    """
    if conv.padding_mode != "zeros":
        raise ValueError(f"conv has padding_mode={conv.padding_mode!r}; only 'zeros' is supported")
    bn = without_folded(bn)
    if gate is not None and not takes_gate(conv, bn, x):
        x, gate = apply_gate(x, gate, inplace=True), None
    if isinstance(bn, nn.SyncBatchNorm) and (bn.training or bn.running_mean is None):
        # Its statistics come from other processes. A subclass that activates must not do so twice.
        y = nn.SyncBatchNorm.forward(bn, apply_conv_bn_act(conv, None, x, act="identity", padding=padding))
        return activation(y if residual is None else y + residual, act)
    statistics, settings = ((None, None, None, None), {}) if bn is None else batch_norm_arguments(bn)
    return ops.conv_bn_act(
        x,
        conv.weight,
        *statistics,
        bias=conv.bias,
        stride=conv.stride,
        padding=conv.padding if padding is None else padding,
        dilation=conv.dilation,
        groups=conv.groups,
        act=act,
        residual=residual,
        gate=gate,
        **settings,
    )


def takes_gate(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, x: torch.Tensor) -> bool:
    """Whether the kernel of `act(bn(conv(x * gate)))` multiplies by the gate itself."""
    if torch.is_grad_enabled() or (bn is not None and (bn.training or bn.running_mean is None)):
        return False
    if not isinstance(x, torch.Tensor):  # symbolic tracing knows no layouts
        return False
    return is_for_kernel(x, conv.weight, conv.groups, conv.padding, gated=True)


@overridable
def to_inference_layout(x: torch.Tensor) -> torch.Tensor:
    """`x` in the memory format that a model of these layers runs fastest in; values are the same.

    On the CPU without gradients that is channels_last: pointwise and depthwise convolutions read channels
    side by side, and take twice as long on NCHW. A model calls this once, on its input. Elsewhere x comes
    back as it is.

    Args:
        x: `[N, C, H, W]`.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or dispatch.is_transforming():
        return x
    return x.contiguous(memory_format=torch.channels_last)


class ConvBNAct(nn.Module):
    """`act(bn(conv(x)) + residual)` with children `conv` and `bn`.

    Args:
        in_channels, out_channels: C and O.
        kernel_size, stride, dilation: an int or (height, width).
        padding: as in `bbfast.ops.conv_bn_act`; None means dilation * (kernel_size - 1) // 2 on all sides.
        groups: as in `nn.Conv2d`.
        bias: whether the convolution has a bias.
        eps, momentum: BatchNorm's.
        act: identity, relu, relu6, hardswish, silu or gelu.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        *,
        stride: int | tuple[int, int] = 1,
        padding=None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        act: str = "relu",
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, 0, dilation, groups=groups, bias=bias, **factory
        )
        self.bn = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum, **factory)
        if padding is None:
            padding = tuple(d * (k - 1) // 2 for k, d in zip(self.conv.kernel_size, self.conv.dilation))
        self.padding = padding
        self.act = act

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return apply_conv_bn_act(self.conv, self.bn, x, act=self.act, padding=self.padding, residual=residual)

    def extra_repr(self) -> str:
        return f"act={self.act!r}, padding={self.padding!r}"
