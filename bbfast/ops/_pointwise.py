"""What 1x1 convolutions and linear layers ask before they go to the kernel of triton_kernels/pointwise.py."""

from __future__ import annotations

import torch

from bbfast.triton_kernels.pointwise_sizes import MOST_ROWS, UNIT, pays


def unsupported_reasons(x: torch.Tensor, weight: torch.Tensor, gated: bool = False) -> list[str]:
    """Why a product of `x` and `weight` [N, K, ...] should not go to the kernel, in any layout (empty: it should)."""
    reasons = []
    if x.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"x has dtype {x.dtype}; the kernel's tensor cores take float16 and bfloat16")
    if x.is_cpu and x.dtype == torch.bfloat16:
        reasons.append("Triton's interpreter cannot multiply matrices of bfloat16")
    columns, summed = weight.shape[:2]
    if columns % UNIT or summed % UNIT:
        reasons.append(f"{summed} to {columns} channels; the kernel takes multiples of {UNIT}")
    elif not pays(summed, columns, gated):
        reasons.append(f"{summed} to {columns} channels are limited by arithmetic, which cuBLAS and cuDNN do better")
    return reasons


def row_reasons(rows: int) -> list[str]:
    return [] if rows <= MOST_ROWS else [f"{rows} rows; the kernel takes up to {MOST_ROWS}"]
