"""Memory formats of [N, C, H, W] tensors, as the kernels and the ops see them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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


def spaced_rows(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x`, or a copy of it, whose rows of side-by-side channels lie a fixed distance apart; and that distance."""
    channels = x.shape[-1]
    axes = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1]) if size > 1]
    even = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(axes))
    if even and (channels == 1 or x.stride(-1) == 1):
        return x, axes[-1][1] if axes else channels
    return x.contiguous(), channels


def dense(vector: torch.Tensor | None) -> torch.Tensor | None:
    """`vector`, or a copy of it, with its elements side by side."""
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()
