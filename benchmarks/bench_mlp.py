"""`mlp` on the blocks of Swin and ConvNeXt with few channels, NHWC: norm, C to 4C with gelu, back onto the residual.

Inference only: with gradients the op is `add_layer_norm` and `linear_act`. Swin normalises and adds the same map;
ConvNeXt normalises what its convolution made, and scales before the sum. Eager is torch's operators in a row.
On the CPU, and at the second stage's 192 channels, the op is those others, too.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bbfast.benchmarks.op_case import BATCH, DTYPE, FORWARD, Case, randn
from bbfast.benchmarks.op_suite import Suite, cases
from bbfast.benchmarks.op_timing import Work
from bbfast.ops import mlp

OP = "mlp"
EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """A perceptron of a map of `size` by `size`."""

    block: str
    size: int
    channels: int
    scaled: bool = False

    @property
    def hidden(self) -> int:
        return 4 * self.channels


SHAPES = {
    "swin_tiny-1": Shape("swin_tiny stage 1", 56, 96),
    "convnext_tiny-1": Shape("convnext_tiny stage 1", 56, 96, scaled=True),
    "swin_base-1": Shape("swin_base stage 1", 56, 128),
    "convnext_base-1": Shape("convnext_base stage 1", 56, 128, scaled=True),
    "swin_tiny-2": Shape("swin_tiny stage 2", 28, 192),
}
GPU = ("swin_tiny-1", "convnext_tiny-1", "swin_base-1", "swin_tiny-2")
CPU = ("swin_tiny-2",)


def work_of(shape: Shape, batch: int, dtype: torch.dtype) -> Work:
    """x and, where it is another map, residual in, y out; the weights and vectors."""
    rows, maps = batch * shape.size**2, 3 if shape.scaled else 2
    weights = 2 * shape.channels * shape.hidden
    vectors = shape.hidden + (4 if shape.scaled else 3) * shape.channels
    moved = maps * rows * shape.channels + weights + vectors
    return Work(moved * dtype.itemsize, 2 * rows * weights, on_tensor_cores=True)


def make_case(shape: Shape, direction: str) -> Case:
    size, channels = (BATCH, shape.size, shape.size, shape.channels), shape.channels

    def inputs():
        fc1 = randn(shape.hidden, channels) / channels**0.5, randn(shape.hidden)
        fc2 = randn(channels, shape.hidden) / shape.hidden**0.5, randn(channels)
        more = (randn(channels), randn(*size)) if shape.scaled else ()
        return randn(*size), *fc1, *fc2, randn(channels), randn(channels), *more

    def eager(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, layer_scale=None, residual=None):
        y = F.layer_norm(x, (channels,), norm_weight, norm_bias, EPS)
        y = F.linear(F.gelu(F.linear(y, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        return x + y if residual is None else residual + y * layer_scale

    def bbfast(x, *tensors):
        *layers, norm_weight, norm_bias = tensors[:6]
        layer_scale, residual = tensors[6:] if shape.scaled else (None, x)
        norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": EPS}
        return mlp(x, *layers, **norm, layer_scale=layer_scale, residual=residual)

    return Case(
        op=OP,
        shape=f"{shape.block} {'x'.join(map(str, size))} to {shape.hidden}" + " layer scale" * shape.scaled,
        direction=direction,
        inputs=inputs,
        leaves=(),
        eager=eager,
        bbfast=bbfast,
        work=work_of(shape, BATCH, DTYPE),
    )


@cases(SHAPES, gpu=GPU, cpu=CPU, directions=(FORWARD,))
def test_mlp(suite: Suite, shape, direction, provider):
    suite.measure(make_case(shape, direction), provider)
