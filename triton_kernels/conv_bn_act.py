"""act(batch_norm(conv1x1(x * gate)) + residual) in inference, NHWC; see pointwise.py for the kernel."""

from __future__ import annotations

import torch

from . import pointwise
from .integers import cdiv
from .layout import is_channels_last, new_output
from .pointwise_sizes import UNIT
from .replay import remembers


@remembers
def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bn_weight: torch.Tensor | None,
    bn_bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: torch.Tensor | None,
    stride: tuple[int, int],
    eps: float,
    act: str,
) -> torch.Tensor:
    """y `[B, O, H', W']` for channels_last x `[B, C, H, W]` with at least one element.

    Args:
        x: fp16 or bf16, slices included; C and O are multiples of UNIT, as are x's other strides.
        weight: `[O, C, 1, 1]`, dtype of x.
        residual: `[B, O, H', W']`, dtype of x; copied where its pixels do not follow each other at one distance.
        gate: `[B, C]`, dtype of x, or None for 1.
    """
    batch, _, height, width = x.shape
    out_channels = weight.shape[0]
    size = (cdiv(height, stride[0]), cdiv(width, stride[1]))
    y = new_output(x, (batch, out_channels, *size))
    strides = (x.stride(0), x.stride(2) * stride[0], x.stride(3) * stride[1])
    pixels = size[0] * size[1]
    if residual is not None and not _has_rows(residual):
        residual = residual.contiguous(memory_format=torch.channels_last)
    pointwise.launch(
        x,
        pointwise.Rows(batch * pixels, pixels, size[1], strides),
        weight if weight.stride(0) == weight.shape[1] and weight.stride(1) == 1 else weight.contiguous(),
        y,
        act=act,
        act_first=False,
        bias=bias,
        batch_norm=(bn_weight, bn_bias, running_mean, running_var),
        eps=eps,
        gate=None if gate is None else gate.contiguous(),
        residual=residual,
        residual_stride=0 if residual is None else residual.stride(3),
    )
    return y


def _has_rows(x: torch.Tensor) -> bool:
    """Whether x's pixels follow each other at one distance, a multiple of UNIT, channels side by side."""
    batch, _, height, width = x.shape
    strides = (x.stride(0), x.stride(2), x.stride(3))
    even = pointwise.Rows(batch * height * width, height * width, width, strides).even
    return is_channels_last(x) and even and x.stride(3) % UNIT == 0
