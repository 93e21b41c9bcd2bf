"""BatchNorm with running statistics as one multiplication and one addition per channel."""

from __future__ import annotations

import torch


def scale_and_shift(bias, bn_weight, bn_bias, running_mean, running_var, eps) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (scale, shift) with `batch_norm(z + bias) = z * scale + shift`; all arguments `[C]` or None.

    running_mean must be there. A few microseconds per call, so that nobody needs to remember the result.
    """
    scale = running_var.float().add(eps).rsqrt_()
    if bn_weight is not None:
        scale.mul_(bn_weight)
    offset = running_mean.float() if bias is None else running_mean.float() - bias
    if bn_bias is None:
        return scale, (offset * scale).neg_()
    return scale, torch.addcmul(bn_bias.float(), offset, scale, value=-1)
