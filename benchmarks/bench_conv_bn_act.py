"""`conv_bn_act` on the dense and grouped layers of ResNets, RegNetY, MobileNetV3 and EfficientNet, channels_last.

Forward is inference with running statistics; with backward the statistics are the batch's, as in training. Eager is the
product with the gate of squeeze-and-excite where there is one, F.conv2d, F.batch_norm, the sum where there is a
residual, and the activation. On a GPU inference of pointwise layers is one kernel where memory limits them; elsewhere
the op leaves the convolution to cuDNN and fuses what follows, so that `backend` names batch_norm_act's. On a CPU
inference is one kernel after the gate: pointwise layers, 3x3 ones (by Winograd's transform) and grouped ones have their
own in the extension, and "bbfast onednn" is the one that the others take.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bbfast.benchmarks.op_case import BACKWARD, BATCH, DTYPE, Case, rand, randn
from bbfast.benchmarks.op_suite import Suite, cases
from bbfast.benchmarks.op_timing import Work
from bbfast.ops import conv_bn_act
from bbfast.reference.activation import ACTIVATIONS

OP = "conv_bn_act"


@dataclass(frozen=True)
class Shape:
    model: str
    channels: int
    out_channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    act: str = "relu"
    residual: bool = False
    gated: bool = False

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1


# MobileNetV3-Large's: channels, channels out, size, activation
POINTWISE = (
    (16, 16, 112, "identity"),
    (16, 64, 112, "relu"),
    (64, 24, 56, "identity"),
    (24, 72, 56, "relu"),
    (72, 24, 56, "identity"),
    (72, 40, 28, "identity"),
    (40, 120, 28, "relu"),
    (120, 40, 28, "identity"),
    (40, 240, 28, "hardswish"),
    (240, 80, 14, "identity"),
    (80, 200, 14, "hardswish"),
    (200, 80, 14, "identity"),
    (80, 184, 14, "hardswish"),
    (184, 80, 14, "identity"),
    (80, 480, 14, "hardswish"),
    (480, 112, 14, "identity"),
    (112, 672, 14, "hardswish"),
    (672, 112, 14, "identity"),
    (672, 160, 7, "identity"),
    (160, 960, 7, "hardswish"),
    (960, 160, 7, "identity"),
)
# Projections after squeeze-and-excite: model, channels, channels out, size, whether there is a residual
GATED = (
    ("mobilenetv3_large", 72, 40, 28, False),
    ("mobilenetv3_large", 120, 40, 28, True),
    ("mobilenetv3_large", 672, 112, 14, True),
    ("mobilenetv3_large", 960, 160, 7, True),
    ("efficientnet_b0", 96, 24, 56, False),
    ("efficientnet_b0", 144, 24, 56, True),
    ("efficientnet_b0", 480, 80, 14, True),
    ("efficientnet_b0", 1152, 192, 7, True),
)
SHAPES = {
    "resnet50-1-in": Shape("resnet50", 256, 64, 56),
    "resnet50-2-in": Shape("resnet50", 512, 128, 28),
    "resnet50-3-in": Shape("resnet50", 1024, 256, 14),
    "resnet50-4-in": Shape("resnet50", 2048, 512, 7),
    "resnet50-1-3x3": Shape("resnet50", 64, 64, 56, 3),
    "resnet50-1-out": Shape("resnet50", 64, 256, 56, residual=True),
    "resnet50-2-3x3": Shape("resnet50", 128, 128, 28, 3),
    "resnet50-2-out": Shape("resnet50", 128, 512, 28, residual=True),
    "resnet50-3-3x3": Shape("resnet50", 256, 256, 14, 3),
    "resnet50-3-out": Shape("resnet50", 256, 1024, 14, residual=True),
    "resnet50-4-3x3": Shape("resnet50", 512, 512, 7, 3),
    "resnet50-4-out": Shape("resnet50", 512, 2048, 7, residual=True),
    "resnet50-2-shortcut": Shape("resnet50", 256, 512, 56, stride=2, act="identity"),
    "resnext50-1-3x3": Shape("resnext50_32x4d", 128, 128, 56, 3, groups=32),
    "resnext50-3-3x3": Shape("resnext50_32x4d", 512, 512, 14, 3, groups=32),
    "regnety-2-3x3": Shape("regnety_016", 120, 120, 28, 3, groups=5),
    "regnety-3-3x3": Shape("regnety_016", 336, 336, 14, 3, groups=14),
    "regnety-3-out": Shape("regnety_016", 336, 336, 14, residual=True),
    **{
        f"mobilenetv3-{channels}-{out}": Shape("mobilenetv3_large", channels, out, size, act=act)
        for channels, out, size, act in POINTWISE
    },
    **{
        f"{model.split('_')[0]}-{channels}-{out}-gate": Shape(
            model, channels, out, size, act="identity", residual=residual, gated=True
        )
        for model, channels, out, size, residual in GATED
    },
}
GPU = (
    *("resnet50-1-in", "resnet50-1-out", "resnet50-2-3x3", "resnext50-3-3x3"),
    *("mobilenetv3-160-960", "mobilenetv3-120-40-gate", "efficientnet-144-24-gate"),
)
CPU = (
    *("mobilenetv3-24-72", "mobilenetv3-480-112", "mobilenetv3-672-112-gate"),
    *("resnet50-3-3x3", "regnety-3-3x3", "resnet50-3-out"),
)


def work_of(shape: Shape, direction: str, batch: int, dtype: torch.dtype) -> Work:
    """Forward: x, gate, weight, residual, y. Backward: the first three and y's gradient in, those of all inputs out."""
    x, y = batch * shape.channels * shape.size**2, batch * shape.out_channels * shape.out_size**2
    taps = shape.channels // shape.groups * shape.kernel**2
    weight, residual = shape.out_channels * taps, y * shape.residual
    gate = batch * shape.channels * shape.gated
    moved, flops = x + gate + weight + residual + y, 2 * taps * y
    if direction == BACKWARD:
        moved += x + gate + weight + y + x + gate + weight + residual
        flops *= 3
    return Work(moved * dtype.itemsize, flops, on_tensor_cores=True)


def make_case(shape: Shape, direction: str) -> Case:
    size = (BATCH, shape.channels, shape.size, shape.size)
    training = direction == BACKWARD
    geometry = {"stride": shape.stride, "padding": shape.kernel // 2, "groups": shape.groups}
    activation = ACTIVATIONS[shape.act]

    def inputs():
        taps = (shape.channels // shape.groups, shape.kernel, shape.kernel)
        weight = randn(shape.out_channels, *taps, channels_last=True) / (taps[0] ** 0.5 * shape.kernel)
        out = (BATCH, shape.out_channels, shape.out_size, shape.out_size)
        residual = (randn(*out, channels_last=True),) if shape.residual else ()
        gate = (rand(*size[:2]).to(DTYPE),) if shape.gated else ()
        statistics = (rand(shape.out_channels) for _ in range(4))
        return randn(*size, channels_last=True), weight, *statistics, *residual, *gate

    def split(others):
        """Residual and gate, of which either may be left out."""
        return others[0] if shape.residual else None, others[-1] if shape.gated else None

    def eager(x, weight, bn_weight, bn_bias, mean, var, *others):
        residual, gate = split(others)
        x = x if gate is None else x * gate[:, :, None, None]
        y = F.batch_norm(F.conv2d(x, weight, None, **geometry), mean, var, bn_weight, bn_bias, training)
        return activation(y if residual is None else y + residual)

    def bbfast(*tensors):
        residual, gate = split(tensors[6:])
        return conv_bn_act(*tensors[:6], residual=residual, gate=gate, **geometry, training=training, act=shape.act)

    details = f" to {shape.out_channels} k{shape.kernel} s{shape.stride} {shape.act}"
    details += f" groups {shape.groups}" * (shape.groups > 1) + " residual" * shape.residual + " gate" * shape.gated
    return Case(
        op=OP,
        shape=f"{shape.model} {'x'.join(map(str, size))}{details}",
        direction=direction,
        inputs=inputs,
        leaves=(0, 1, 2, 3, *range(6, 6 + shape.residual + shape.gated)),
        eager=eager,
        bbfast=bbfast,
        others={"bbfast onednn": bbfast},
        work=work_of(shape, direction, BATCH, DTYPE),
    )


@cases(SHAPES, gpu=GPU, cpu=CPU, others=("bbfast onednn",))
def test_conv_bn_act(suite: Suite, shape, direction, provider):
    suite.measure(make_case(shape, direction), provider)
