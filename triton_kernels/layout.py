"""Memory formats of [N, C, H, W] tensors, as the kernels and the ops see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether `x` has its channels side by side in memory (NHWC), slices of such tensors included."""
    return bool(x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1)


def new_output(x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised tensor of `shape` with x's device and memory format (NHWC stays NHWC); dtype None is x's."""
    if is_channels_last(x):
        n, c, h, w = shape
        return x.new_empty((n, h, w, c), dtype=dtype).permute(0, 3, 1, 2)
    return x.new_empty(shape, dtype=dtype)
