"""The extension's CPU kernels: which maps they take, and calls of them."""

from __future__ import annotations

import torch

from bbfast import extension
from bbfast.ops import _common


def unsupported_reasons(x: torch.Tensor) -> list[str]:
    """Why no CPU kernel of the extension can run on `x` (empty: it may).

    Raises:
        BrokenExtensionError: the extension is there but cannot be used.
    """
    if not x.is_cpu:
        return [f"x is on {x.device}; the extension's kernels run on the CPU"]
    reasons = []
    if x.dtype != torch.float32:
        reasons.append(f"x has dtype {x.dtype}; the extension's kernels take float32")
    if not _common.is_channels_last(x):
        reasons.append("x is not channels_last")
    if unavailable := extension.unavailable_reason():
        reasons.append(unavailable)
    return reasons


def has_even_pixels(x: torch.Tensor) -> bool:
    """Whether the pixels of all samples of channels_last `x` follow each other at one distance (no slice)."""
    n, _, h, w = x.shape
    row = w * x.stride(3)
    return (h == 1 or x.stride(2) == row) and (n == 1 or x.stride(0) == h * row)


def pointwise_conv_bn_act(
    x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, eps, act
) -> torch.Tensor:
    """`act(batch_norm(conv1x1(x)) + residual)` at stride 1; x channels_last with even pixels."""
    if residual is not None and not (_common.is_channels_last(residual) and has_even_pixels(residual)):
        residual = residual.contiguous(memory_format=torch.channels_last)
    return extension.load().pointwise_conv_bn_act(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, eps, act
    )


def depthwise_conv_bn_act(x, *args) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, squeeze means or None) of `act(batch_norm(conv(x)))`; x channels_last, slices included.

    args: weight, bias, bn_weight, bn_bias, running_mean, running_var, stride, padding, dilation, eps, act, squeeze.
    """
    y, squeezed = extension.load().depthwise_conv_bn_act(x, *args)
    return y, squeezed if args[-1] else None
