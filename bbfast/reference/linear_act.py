"""Linear layer, activation, layer scale and residual, one after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bbfast.reference.activation import activation


def linear_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    act: str,
) -> torch.Tensor:
    """`residual + layer_scale * act(x @ weight.T + bias)`.

    x [..., K]; weight [N, K]; bias, layer_scale [N] or None; residual [..., N] or None.

    Returns:
        y [..., N], in the dtype that torch's promotion gives the expression.
    """
    y = activation(F.linear(x, weight, bias), act)
    y = y if layer_scale is None else y * layer_scale
    return y if residual is None else residual + y
