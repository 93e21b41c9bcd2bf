"""BatchNorm, residual addition and activation, one after the other."""

from __future__ import annotations

import torch

from bbfast.reference.activation import activation, activation_backward
from bbfast.reference.batch_norm import batch_norm


def batch_norm_act(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    act: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`act(batch_norm(x) + residual)` and the statistics that normalised.

    x [N, C, ...] of any float dtype; residual of x's shape. Running statistics are updated in place when
    `training`. Without training and running statistics there is no normalisation.

    Returns:
        y in the wider dtype of x and residual; mean [C] and invstd [C].
    """
    z, mean, invstd = batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    if residual is not None:
        z = z + residual
    return activation(z, act), mean, invstd


def batch_norm_act_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    eps: float,
    act: str,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x, weight, bias and residual (None where there is no such input).

    Normalises again, then calls the backward functions that torch's autograd calls.
    """
    statistics = (None, None) if training else (running_mean, running_var)
    z, mean, invstd = batch_norm(x, weight, bias, *statistics, training, 0.0, eps)
    if residual is not None:
        z = z + residual
    grad_z = activation_backward(grad_y, z, act)
    grad_residual = None if residual is None else grad_z.to(residual.dtype)
    grad_x, grad_weight, grad_bias = grad_z.to(x.dtype), None, None
    if training or running_mean is not None:
        mask = [True, weight is not None, bias is not None]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_x, x, weight, *statistics, mean, invstd, training, eps, mask
        )
    return grad_x, grad_weight, grad_bias, grad_residual
