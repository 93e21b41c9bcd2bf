"""`linear_act` on the perceptrons of Swin's and ConvNeXt's blocks, NHWC: K to 4K with gelu, and back onto the residual.

Inference only: with gradients the op is torch's own operators. Swin and ConvNeXt have the same first layers; in the
second one Swin adds the residual to the product and ConvNeXt to the product times its layer scale. Eager is F.linear
and what follows it, operator by operator. The layers of stage 4, and the second ones of stage 3, are limited by
arithmetic: on a GPU the op leaves them to torch, and `backend` is torch, or drop_path_add's where there is a layer
scale.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bbfast.benchmarks.op_case import BATCH, DTYPE, FORWARD, Case, randn
from bbfast.benchmarks.op_suite import Suite, cases
from bbfast.benchmarks.op_timing import Work
from bbfast.ops import linear_act
from bbfast.reference.activation import ACTIVATIONS

OP = "linear_act"
STAGES = ((56, 96), (28, 192), (14, 384), (7, 768))  # height and width of the map, channels


@dataclass(frozen=True)
class Shape:
    """A linear layer from `channels` to `out_channels` on a map of `size` by `size`."""

    layer: str
    size: int
    channels: int
    out_channels: int
    act: str = "identity"
    residual: bool = False
    scaled: bool = False


def _shapes(stage: int, size: int, channels: int) -> dict[str, Shape]:
    hidden = 4 * channels
    swin, convnext = f"swin_tiny stage {stage}", f"convnext_tiny stage {stage}"
    return {
        f"swin_tiny-{stage}-fc1": Shape(swin, size, channels, hidden, "gelu"),
        f"swin_tiny-{stage}-fc2": Shape(swin, size, hidden, channels, residual=True),
        f"convnext_tiny-{stage}-fc2": Shape(convnext, size, hidden, channels, residual=True, scaled=True),
    }


SHAPES = {name: shape for number, stage in enumerate(STAGES, 1) for name, shape in _shapes(number, *stage).items()}
GPU = (
    *("swin_tiny-1-fc1", "swin_tiny-1-fc2", "convnext_tiny-1-fc2"),
    *("swin_tiny-2-fc1", "convnext_tiny-2-fc2", "swin_tiny-3-fc1"),
)
CPU = ("swin_tiny-3-fc1", "swin_tiny-3-fc2", "convnext_tiny-3-fc2")


def work_of(shape: Shape, batch: int, dtype: torch.dtype) -> Work:
    """x, weight, bias, layer scale and residual in, y out."""
    rows, vectors = batch * shape.size**2, 1 + shape.scaled
    x, y = rows * shape.channels, rows * shape.out_channels
    weight = shape.channels * shape.out_channels
    moved = x + weight + vectors * shape.out_channels + y * shape.residual + y
    return Work(moved * dtype.itemsize, 2 * shape.channels * y, on_tensor_cores=True)


def make_case(shape: Shape, direction: str) -> Case:
    size = (BATCH, shape.size, shape.size, shape.channels)
    activation = ACTIVATIONS[shape.act]

    def inputs():
        weight = randn(shape.out_channels, shape.channels) / shape.channels**0.5
        residual = (randn(*size[:-1], shape.out_channels),) if shape.residual else ()
        scale = (randn(shape.out_channels),) if shape.scaled else ()
        return randn(*size), weight, randn(shape.out_channels), *residual, *scale

    def eager(x, weight, bias, residual=None, layer_scale=None):
        y = activation(F.linear(x, weight, bias))
        y = y if layer_scale is None else y * layer_scale
        return y if residual is None else residual + y

    def bbfast(x, weight, bias, residual=None, layer_scale=None):
        return linear_act(x, weight, bias, act=shape.act, residual=residual, layer_scale=layer_scale)

    details = f" to {shape.out_channels} {shape.act}" + " layer scale" * shape.scaled + " residual" * shape.residual
    return Case(
        op=OP,
        shape=f"{shape.layer} {'x'.join(map(str, size))}{details}",
        direction=direction,
        inputs=inputs,
        leaves=(),
        eager=eager,
        bbfast=bbfast,
        work=work_of(shape, BATCH, DTYPE),
    )


@cases(SHAPES, gpu=GPU, cpu=CPU, directions=(FORWARD,))
def test_linear_act(suite: Suite, shape, direction, provider):
    suite.measure(make_case(shape, direction), provider)
