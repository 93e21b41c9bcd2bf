"""residual + layer_scale * act(x @ weight.T + bias) in inference, for [rows, K]; see pointwise.py for the kernel."""

from __future__ import annotations

import torch

from . import pointwise
from .replay import remembers


@remembers
def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    layer_scale: torch.Tensor | None,
    residual: torch.Tensor | None,
    act: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y `[..., N]`, contiguous, for x `[..., K]` with at least one element.

    Args:
        x: fp16 or bf16; copied where its rows do not follow each other at one distance.
        weight: `[N, K]`, dtype of x; K and N are multiples of UNIT.
        residual: `[..., N]`, any dtype; copied as x is.
        dtype: of y.
    """
    y = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=dtype)
    count = x.numel() // x.shape[-1]
    x, stride = pointwise.unit_rows(x)
    residual, residual_stride = (None, 0) if residual is None else pointwise.unit_rows(residual)
    pointwise.launch(
        x,
        pointwise.Rows(count, count, count, (0, 0, stride)),
        weight.contiguous(),
        y,
        act=act,
        act_first=True,
        bias=bias,
        layer_scale=layer_scale,
        residual=residual,
        residual_stride=residual_stride,
    )
    return y
