"""The activations that ops can fuse, by name, as torch defines them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
}


def activation(x: torch.Tensor, act: str) -> torch.Tensor:
    """Applies the activation called `act` (gelu is the exact erf form)."""
    return ACTIVATIONS[act](x)
