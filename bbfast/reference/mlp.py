"""LayerNorm, a perceptron, layer scale and residual, one after the other."""

from __future__ import annotations

import torch

from bbfast.reference.add_layer_norm import add_layer_norm
from bbfast.reference.linear_act import linear_act


def mlp(
    x: torch.Tensor,
    fc1_weight: torch.Tensor,
    fc1_bias: torch.Tensor | None,
    fc2_weight: torch.Tensor,
    fc2_bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_eps: float | None,
    act: str,
) -> torch.Tensor:
    """`residual + layer_scale * fc2(act(fc1(layer_norm(x))))`, without the norm where norm_eps is None.

    x [..., C]; fc1_weight [hidden, C]; fc2_weight [C, hidden]; fc1_bias [hidden] or None; residual [..., C] or None;
    all other vectors [C] or None. What fc1 takes is rounded to its weight's dtype.

    Returns:
        y [..., C], in the dtype that torch's promotion gives the expression.
    """
    if norm_eps is not None:
        x = add_layer_norm(x, None, None, None, norm_weight, norm_bias, norm_eps, fc1_weight.dtype)[1]
    hidden = linear_act(x, fc1_weight, fc1_bias, None, None, act)
    return linear_act(hidden, fc2_weight, fc2_bias, layer_scale, residual, "identity")
