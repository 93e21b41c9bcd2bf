"""`batch_norm_act` on the maps of ResNet-50, with the block's residual and relu, and of MobileNetV3, with hardswish.

Forward is inference with running statistics; with backward the statistics are the batch's, as in training. Eager is
F.batch_norm, the sum and the activation.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bbfast.benchmarks.op_case import BACKWARD, BATCH, DTYPE, Case, rand, randn
from bbfast.benchmarks.op_suite import Suite, cases
from bbfast.benchmarks.op_timing import Work
from bbfast.ops import batch_norm_act
from bbfast.reference.activation import ACTIVATIONS

OP = "batch_norm_act"


@dataclass(frozen=True)
class Shape:
    """A map [N, C, H, W]; without channels_last in plain NCHW."""

    layer: str
    channels: int
    size: int
    act: str = "relu"
    residual: bool = True
    channels_last: bool = True


SHAPES = {
    "resnet50-1": Shape("resnet50 stage 1", 256, 56),
    "resnet50-3": Shape("resnet50 stage 3", 1024, 14),
    "resnet50-4": Shape("resnet50 stage 4", 2048, 7),
    "mobilenetv3_large": Shape("mobilenetv3_large expansion", 240, 28, "hardswish", residual=False),
    "resnet50-stem": Shape("resnet50 stem", 64, 112, residual=False),
    "resnet50-2": Shape("resnet50 stage 2", 512, 28),
    "resnet50-2-NCHW": Shape("resnet50 stage 2", 512, 28, channels_last=False),
    "resnet50-2-inner": Shape("resnet50 stage 2 inner", 128, 28, residual=False),
    "efficientnet_b0": Shape("efficientnet_b0 expansion", 144, 56, "silu", residual=False),
    "regnety_016-3": Shape("regnety_016 stage 3", 336, 14),
}
GPU = ("resnet50-1", "resnet50-3", "resnet50-4", "mobilenetv3_large")
CPU = ("resnet50-3", "mobilenetv3_large")


def work_of(shape: Shape, direction: str, batch: int, dtype: torch.dtype) -> Work:
    """Forward: x, residual, y. Backward: x, residual and the gradient in; one gradient out, or two with a residual."""
    numel = batch * shape.channels * shape.size**2
    moved, flops = 2 + shape.residual, 3 + shape.residual
    if direction == BACKWARD:
        moved += 3 + 2 * shape.residual
        flops += 3 + 10
    return Work(moved * numel * dtype.itemsize, flops * numel)


def make_case(shape: Shape, direction: str) -> Case:
    size = (BATCH, shape.channels, shape.size, shape.size)
    training = direction == BACKWARD
    activation = ACTIVATIONS[shape.act]

    def inputs():
        maps = tuple(randn(*size, channels_last=shape.channels_last) for _ in range(1 + shape.residual))
        return (maps[0], *(rand(shape.channels) for _ in range(4)), *maps[1:])

    def eager(x, weight, bias, mean, var, residual=None):
        y = F.batch_norm(x, mean, var, weight, bias, training)
        return activation(y if residual is None else y + residual)

    def bbfast(x, weight, bias, mean, var, residual=None):
        return batch_norm_act(x, weight, bias, mean, var, residual=residual, training=training, act=shape.act)

    details = (" residual" if shape.residual else "") + f" {shape.act}" + ("" if shape.channels_last else " NCHW")
    return Case(
        op=OP,
        shape=f"{shape.layer} {'x'.join(map(str, size))}{details}",
        direction=direction,
        inputs=inputs,
        leaves=(0, 1, 2, 5) if shape.residual else (0, 1, 2),
        eager=eager,
        bbfast=bbfast,
        work=work_of(shape, direction, BATCH, DTYPE),
    )


@cases(SHAPES, gpu=GPU, cpu=CPU)
def test_batch_norm_act(suite: Suite, shape, direction, provider):
    suite.measure(make_case(shape, direction), provider)
