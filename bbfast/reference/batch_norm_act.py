"""BatchNorm, residual addition and activation, one after the other."""

from __future__ import annotations

import torch

from bbfast.reference.activation import activation
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
