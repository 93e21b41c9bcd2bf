"""Residual addition of a branch under stochastic depth, and LayerNorm of the sum."""

from __future__ import annotations

import torch

from bbfast.reference.drop_path_add import drop_path_add


def add_layer_norm(
    residual: torch.Tensor,
    branch: torch.Tensor | None,
    multiplier: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    norm_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`total = residual + branch * layer_scale * multiplier` and LayerNorm of total, as it was rounded, over C.

    residual, branch [B, ..., C] of any float dtypes (torch's promotion rules), branch None for 0; multiplier [B], 0
    drops a sample; layer_scale, weight, bias [C]. Returns total (residual itself without a branch), the normalised
    values in norm_dtype, and the mean and 1 / sqrt(variance + eps) of each row, [B, ...], in fp32 (fp64 for fp64).
    """
    total = residual
    if branch is not None and multiplier is None and layer_scale is None:
        total = residual + branch
    elif branch is not None:
        total = drop_path_add(residual.movedim(-1, 1), branch.movedim(-1, 1), multiplier, layer_scale).movedim(1, -1)
    x, weight, bias = as_statistics(total, weight, bias)
    normalised, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return total, normalised.to(norm_dtype), mean.squeeze(-1), rstd.squeeze(-1)


def layer_norm_backward(
    grad_norm: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    affine_grads: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of total, weight and bias in fp32 (fp64 for fp64); the latter two None unless `affine_grads`."""
    wanted = [True, affine_grads and weight is not None, affine_grads and bias is not None]
    x, grad_norm, weight, bias = as_statistics(total, grad_norm, weight, bias)
    statistics = (mean.unsqueeze(-1), rstd.unsqueeze(-1))
    return torch.ops.aten.native_layer_norm_backward(grad_norm, x, x.shape[-1:], *statistics, weight, bias, wanted)


def as_statistics(total: torch.Tensor, *others: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The tensors in the dtype that statistics of `total` are computed in."""
    dtype = torch.float64 if total.dtype == torch.float64 else torch.float32
    return [None if tensor is None else tensor.to(dtype) for tensor in (total, *others)]
