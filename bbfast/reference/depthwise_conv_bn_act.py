"""Depthwise convolution, BatchNorm and activation, one after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bbfast.reference.activation import activation, activation_backward
from bbfast.reference.batch_norm import batch_norm
from bbfast.reference.conv_bn_act import padded_conv


def depthwise_conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    training: bool,
    momentum: float,
    eps: float,
    act: str,
    squeeze: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """`act(batch_norm(conv2d(x)))`, with `squeeze` its mean over H and W, and the statistics used.

    x [N, C, H, W]; weight [C * multiplier, 1, kh, kw]; padding (top, bottom, left, right). Running statistics
    are updated in place when `training`. Without training and running statistics there is no normalisation.

    Returns:
        y [N, C, H', W']; squeeze means [N, C] or None; mean [C] and invstd [C] that normalised.
    """
    z = padded_conv(x, weight, bias, stride, padding, dilation, x.shape[1])
    normalised, mean, invstd = batch_norm(z, bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    y = activation(normalised, act)
    return y, y.mean((2, 3)) if squeeze else None, mean, invstd


def depthwise_conv_bn_act_backward(
    grad_y: torch.Tensor,
    grad_squeeze: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    training: bool,
    eps: float,
    act: str,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weight, bias, bn_weight and bn_bias (None where there is no such input).

    Recomputes the convolution and its statistics where they matter (not to a convolution alone), then calls the
    backward functions that torch's autograd calls.
    """
    if grad_squeeze is not None:
        grad_y = grad_y + (grad_squeeze / (grad_y.shape[2] * grad_y.shape[3]))[:, :, None, None]
    grad_z = grad_y.to(x.dtype)
    grad_bn_weight = grad_bn_bias = None
    normalises = training or running_mean is not None
    if normalises or act != "identity":
        z = padded_conv(x, weight, bias, stride, padding, dilation, x.shape[1])
        statistics = (None, None) if training else (running_mean, running_var)
        normalised, mean, invstd = batch_norm(z, bn_weight, bn_bias, *statistics, training, 0.0, eps)
        grad_z = activation_backward(grad_z, normalised, act)
    if normalises:
        mask = [True, bn_weight is not None, bn_bias is not None]
        grad_z, grad_bn_weight, grad_bn_bias = torch.ops.aten.native_batch_norm_backward(
            grad_z, z, bn_weight, *statistics, mean, invstd, training, eps, mask
        )

    top, bottom, left, right = padding
    padded = F.pad(x, (left, right, top, bottom))
    grad_padded, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_z,
        padded,
        weight,
        None if bias is None else [weight.shape[0]],
        stride,
        (0, 0),
        dilation,
        False,
        (0, 0),
        x.shape[1],
        [True, True, bias is not None],
    )
    grad_x = grad_padded[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return grad_x, grad_weight, grad_bias, grad_bn_weight, grad_bn_bias
