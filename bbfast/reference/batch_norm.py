"""BatchNorm that also hands out the statistics it used."""

from __future__ import annotations

import torch


def batch_norm(
    z: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises [N, C, ...] `z` per channel and returns (out, mean, invstd), statistics as [C].

    With `training` the batch's own biased variance normalises and the running statistics, if any, move towards
    the batch's mean and unbiased variance by `momentum`; otherwise the running statistics normalise. Without
    either there is no normalisation and `z` itself comes back with mean 0 and invstd 1. An empty batch comes back as
    it is and moves nothing.
    """
    if training and z.numel() == 0:
        return z, z.new_zeros(z.shape[1]), z.new_zeros(z.shape[1])
    if training:
        return torch.native_batch_norm(z, weight, bias, running_mean, running_var, True, momentum, eps)
    if running_mean is None:
        return z, z.new_zeros(z.shape[1]), z.new_ones(z.shape[1])
    out = torch.nn.functional.batch_norm(z, running_mean, running_var, weight, bias, False, momentum, eps)
    return out, running_mean, torch.rsqrt(running_var + eps)
