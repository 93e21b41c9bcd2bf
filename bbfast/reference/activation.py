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

# The same, overwriting x.
IN_PLACE_ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": torch.relu_,
    "relu6": lambda x: x.clamp_(0, 6),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": torch.ops.aten.gelu_,
}


def activation(x: torch.Tensor, act: str) -> torch.Tensor:
    """Applies the activation called `act` (gelu is the exact erf form)."""
    return ACTIVATIONS[act](x)


aten = torch.ops.aten
_GRADIENTS = {
    "identity": lambda grad, x: grad,
    "relu": lambda grad, x: aten.threshold_backward(grad, x, 0),
    "relu6": lambda grad, x: aten.hardtanh_backward(grad, x, 0.0, 6.0),
    "hardswish": aten.hardswish_backward,
    "silu": aten.silu_backward,
    "gelu": aten.gelu_backward,
}


def activation_backward(grad: torch.Tensor, x: torch.Tensor, act: str) -> torch.Tensor:
    """`grad` times the derivative of the activation at `x`, by the formulas of torch's own autograd."""
    return _GRADIENTS[act](grad, x)
