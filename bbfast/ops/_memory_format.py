"""Outputs of [N, C, H, W] ops in their input's memory format, in any dtype."""

from __future__ import annotations

import torch

from bbfast import dispatch
from bbfast.ops import _common


def new_dense(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor of x's shape and memory format (NHWC stays NHWC)."""
    return _common.new_output(x, x.shape, dtype)


def in_format_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`y` in x's memory format; differentiable, and in torch.func's transforms, where nobody may ask, as it is."""
    return y if dispatch.is_transforming() else dense_like(x, y)


def dense_like(x: torch.Tensor, y: torch.Tensor, *, shared_with: tuple = ()) -> torch.Tensor:
    """`y` in x's memory format; copied only where it has another one or is one of the tensors `shared_with`."""
    layout = torch.channels_last if _common.is_channels_last(x) else torch.contiguous_format
    if y.is_contiguous(memory_format=layout) and not any(y is other for other in shared_with):
        return y
    return y.clone(memory_format=layout)
