"""Convolution, BatchNorm, residual and activation, one after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bbfast.reference.activation import activation
from bbfast.reference.batch_norm import batch_norm


def padded_conv(x, weight, bias, stride, padding, dilation, groups) -> torch.Tensor:
    """`conv2d` whose padding is (top, bottom, left, right); sides that differ are padded beforehand."""
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        x = F.pad(x, (left, right, top, bottom))
        top = left = 0
    return F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)


def multiply(x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """x [N, C, H, W] times gate [N, C], None for 1."""
    return x if gate is None else x * gate[:, :, None, None]


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    residual: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """`act(batch_norm(conv2d(x * gate)) + residual)`.

    x [N, C, H, W]; weight [O, C / groups, kh, kw]; residual [N, O, H', W'] or None; gate [N, C] or None; padding (top,
    bottom, left, right). Running statistics are updated in place when `training`. Without training and running
    statistics there is no normalisation.

    Returns:
        y [N, O, H', W'].
    """
    z = padded_conv(multiply(x, gate), weight, bias, stride, padding, dilation, groups)
    y, _, _ = batch_norm(z, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    return activation(y if residual is None else y + residual, act)
