"""A perceptron over the last axis as a layer, and for modules that a model keeps apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bbfast import ops
from bbfast.nn._arguments import check_probability
from bbfast.nn.add_layer_norm import apply_layer_norm, is_plain_layer_norm
from bbfast.nn.linear_act import activation_name, apply_linear_act, lent_weight
from bbfast.ops.mlp import is_one_kernel


class Mlp(nn.Module):
    """`fc2(gelu(fc1(x)))` over the last axis, dropout after each.

    Args:
        dim, hidden_dim: channels of input and output, and between the layers.
        drop: chance of each value to be dropped in training.
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden_dim, **factory)
        self.fc2 = nn.Linear(hidden_dim, dim, **factory)
        self.drop = check_probability("drop", drop)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, norm: nn.Module | None = None
    ) -> torch.Tensor:
        """`[..., dim]` to the same; what `residual` is added to. A `norm` is what x goes through first."""
        if not (self.drop and self.training):
            return apply_mlp(norm, self.fc1, "gelu", self.fc2, x, residual=residual)
        x = x if norm is None else norm(x)
        x = F.dropout(apply_linear_act(self.fc1, x, act="gelu"), self.drop, self.training)
        x = F.dropout(self.fc2(x), self.drop, self.training)
        return x if residual is None else residual + x

    def extra_repr(self) -> str:
        return f"drop={self.drop}"


def apply_mlp(
    norm: nn.Module | None,
    fc1: Callable[[torch.Tensor], torch.Tensor],
    act: nn.Module | str,
    fc2: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual + layer_scale * fc2(act(fc1(norm(x))))` as one op where that is one kernel, else as several.

    Args:
        norm: any module, or None. A plain nn.LayerNorm over the last axis only lends its parameters to the one kernel.
        fc1, act, fc2: as `apply_linear_act` takes them.
        x, residual, layer_scale: as `bbfast.ops.mlp` takes them.
    """
    if norm is not None and not is_plain_layer_norm(norm):
        norm, x = None, norm(x)
    if mlp_is_one_kernel(norm, fc1, act, fc2, x, residual, layer_scale):
        vectors = {} if norm is None else {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
        return ops.mlp(
            x,
            lent_weight(fc1),
            fc1.bias,
            lent_weight(fc2),
            fc2.bias,
            act=activation_name(act),
            layer_scale=layer_scale,
            residual=residual,
            **vectors,
        )
    hidden = apply_linear_act(fc1, x if norm is None else apply_layer_norm(norm, x), act=act)
    return apply_linear_act(fc2, hidden, residual=residual, layer_scale=layer_scale)


def mlp_is_one_kernel(
    norm: nn.Module | None,
    fc1: Callable[[torch.Tensor], torch.Tensor],
    act: nn.Module | str,
    fc2: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    layer_scale: torch.Tensor | None = None,
) -> bool:
    """Whether `apply_mlp` of these is one kernel, norm included; torch.compile traces this."""
    if not isinstance(x, torch.Tensor) or x.dim() < 2:  # torch.fx traces symbols
        return False
    if activation_name(act) is None:
        return False
    if norm is not None and not (is_plain_layer_norm(norm) and norm.normalized_shape[0] == x.shape[-1]):
        return False
    first, second = lent_weight(fc1), lent_weight(fc2)
    if first is None or second is None or second.shape != first.shape[::-1]:
        return False
    others = () if norm is None else (norm.weight, norm.bias)
    return is_one_kernel(x, first, second, fc1.bias, fc2.bias, *others, residual, layer_scale)
