"""Activations and their derivatives on fp32 tiles in registers, picked by name at compile time.

NaN passes through each of them, and the derivatives at the kinks are torch's: 0 at both ends of relu and relu6,
0 at -3 and 1 at +3 for hardswish in the torch versions where that is so, the slope of the parabola in the others.
"""

import torch
import triton
import triton.language as tl


def _hardswish_kinks_belong_to_the_lines() -> bool:
    """Whether the installed torch gives hardswish the derivatives 0 and 1 at -3 and +3 (versions differ)."""
    # Not through autograd: the first kernel call, which imports this, may be in inference mode.
    x = torch.tensor([-3.0, 3.0], device="cpu")
    grad = torch.ops.aten.hardswish_backward(torch.ones_like(x), x)
    return grad.tolist() == [0.0, 1.0]


HARDSWISH_CLOSED: tl.constexpr = tl.constexpr(_hardswish_kinks_belong_to_the_lines())
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def activation(x, ACT: tl.constexpr):
    """act(x) for an fp32 tile."""
    if ACT == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu6":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "hardswish":
        gate = x * (1.0 / 6.0) + 0.5
        x = x * tl.minimum(tl.maximum(gate, 0.0), 1.0)
    elif ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        x = x * (0.5 + 0.5 * tl.erf(x * SQRT_HALF))
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
    return x


@triton.jit
def activation_grad(x, ACT: tl.constexpr):
    """d act(x) / dx for an fp32 tile."""
    if ACT == "relu":
        slope = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACT == "relu6":
        slope = tl.where((x <= 0.0) | (x >= 6.0), 0.0, 1.0)
    elif ACT == "hardswish":
        middle = x * (1.0 / 3.0) + 0.5
        if HARDSWISH_CLOSED:
            slope = tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, middle, 1.0))
        else:
            slope = tl.where(x < -3.0, 0.0, tl.where(x <= 3.0, middle, 1.0))
    elif ACT == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACT == "gelu":
        slope = 0.5 + 0.5 * tl.erf(x * SQRT_HALF) + x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope
