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
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)


@triton.jit
def _sigmoid(x, DTYPE: tl.constexpr):
    """Where 16 bits are stored, the square of a square root's reciprocal: one instruction where a division is ten."""
    if DTYPE.primitive_bitwidth == 16:
        root = tl.rsqrt(1.0 + tl.exp2(x * -LOG2_E))
        return root * root
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activation(x, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """act(x) for an fp32 tile that will be stored as DTYPE."""
    if ACT == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu6":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "hardswish":
        gate = x * (1.0 / 6.0) + 0.5
        x = x * tl.minimum(tl.maximum(gate, 0.0), 1.0)
    elif ACT == "silu":
        x = x * _sigmoid(x, DTYPE)
    elif ACT == "gelu":
        x = x * (0.5 + 0.5 * tl.erf(x * SQRT_HALF))
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
    return x


@triton.jit
def activation_for(x, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """`activation`, and for 16 bits gelu in fewer instructions."""
    if ACT == "gelu" and DTYPE.primitive_bitwidth == 16:
        return _gelu_for_half(x)
    else:
        return activation(x, ACT, DTYPE)


@triton.jit
def _gelu_for_half(x):
    """gelu(x) in a third of the instructions that erf takes.

    gelu(x) = max(x, 0) - z * F(-z) with z = |x| and F the normal distribution; log2 F(-z) is nearly a parabola. With
    this polynomial z * F(-z) is right to 1.5e-4 of itself for z <= 3, 6e-4 for z <= 5, and 2.2e-5 absolutely.
    """
    z = tl.minimum(tl.abs(x), 1.0e4, propagate_nan=tl.PropagateNan.ALL)
    exponent = -2.67872974e-4 * z + 5.29414280e-3
    exponent = exponent * z - 4.63765345e-2
    exponent = exponent * z - 4.66728011e-1
    exponent = exponent * z - 1.14792072
    exponent = exponent * z - 1.00021538
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - z * tl.exp2(exponent)


@triton.jit
def activation_grad(x, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """d act(x) / dx for an fp32 tile, a factor of what will be stored as DTYPE."""
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
        sigmoid = _sigmoid(x, DTYPE)
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACT == "gelu":
        slope = 0.5 + 0.5 * tl.erf(x * SQRT_HALF) + x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope
