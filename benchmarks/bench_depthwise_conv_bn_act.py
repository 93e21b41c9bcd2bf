"""`depthwise_conv_bn_act` on the depthwise layers of MobileNetV3-Large, EfficientNet-B0 and ConvNeXt-T, channels_last.

Forward is inference with running statistics, with the mean over the map where squeeze-and-excite follows; with backward
the statistics are the batch's, as in training. ConvNeXt's 7x7 layers have a bias and neither BatchNorm nor activation.
Eager is F.conv2d, F.batch_norm, the activation and the mean. On a CPU "bbfast onednn" is the kernel that the
extension's own took over from.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bbfast.benchmarks.op_case import BACKWARD, BATCH, DTYPE, Case, rand, randn
from bbfast.benchmarks.op_suite import Suite, cases
from bbfast.benchmarks.op_timing import Work
from bbfast.ops import depthwise_conv_bn_act
from bbfast.reference.activation import ACTIVATIONS

OP = "depthwise_conv_bn_act"


@dataclass(frozen=True)
class Shape:
    """A map [N, C, H, W]; without channels_last in plain NCHW."""

    model: str
    channels: int
    size: int
    kernel: int
    stride: int = 1
    act: str = "relu"
    squeeze: bool = False
    channels_last: bool = True

    @property
    def normalised(self) -> bool:
        return self.model != "convnext_tiny"

    @property
    def out_size(self) -> int:
        return (self.size - 1) // self.stride + 1


MOBILENET = {
    "mobilenet-16": Shape("mobilenetv3_large", 16, 112, 3),
    "mobilenet-64": Shape("mobilenetv3_large", 64, 112, 3, 2),
    "mobilenet-72": Shape("mobilenetv3_large", 72, 56, 3),
    "mobilenet-72-5x5": Shape("mobilenetv3_large", 72, 56, 5, 2, squeeze=True),
    "mobilenet-120": Shape("mobilenetv3_large", 120, 28, 5, squeeze=True),
    "mobilenet-240": Shape("mobilenetv3_large", 240, 28, 3, 2, "hardswish"),
    "mobilenet-200": Shape("mobilenetv3_large", 200, 14, 3, act="hardswish"),
    "mobilenet-184": Shape("mobilenetv3_large", 184, 14, 3, act="hardswish"),
    "mobilenet-480": Shape("mobilenetv3_large", 480, 14, 3, act="hardswish", squeeze=True),
    "mobilenet-672": Shape("mobilenetv3_large", 672, 14, 3, act="hardswish", squeeze=True),
    "mobilenet-672-5x5": Shape("mobilenetv3_large", 672, 14, 5, 2, "hardswish", squeeze=True),
    "mobilenet-960": Shape("mobilenetv3_large", 960, 7, 5, act="hardswish", squeeze=True),
}
EFFICIENTNET = {
    "efficientnet-32": Shape("efficientnet_b0", 32, 112, 3, act="silu", squeeze=True),
    "efficientnet-96": Shape("efficientnet_b0", 96, 112, 3, 2, "silu", squeeze=True),
    "efficientnet-144": Shape("efficientnet_b0", 144, 56, 3, act="silu", squeeze=True),
    "efficientnet-240": Shape("efficientnet_b0", 240, 28, 5, act="silu", squeeze=True),
    "efficientnet-480": Shape("efficientnet_b0", 480, 14, 5, act="silu", squeeze=True),
    "efficientnet-1152": Shape("efficientnet_b0", 1152, 7, 5, act="silu", squeeze=True),
}
CONVNEXT = {
    "convnext-1": Shape("convnext_tiny", 96, 56, 7, act="identity"),
    "convnext-2": Shape("convnext_tiny", 192, 28, 7, act="identity"),
    "convnext-3": Shape("convnext_tiny", 384, 14, 7, act="identity"),
    "convnext-4": Shape("convnext_tiny", 768, 7, 7, act="identity"),
}
NCHW = {"mobilenet-120-NCHW": Shape("mobilenetv3_large", 120, 28, 5, squeeze=True, channels_last=False)}
SHAPES = {**MOBILENET, **EFFICIENTNET, **CONVNEXT, **NCHW}
GPU = ("mobilenet-16", "efficientnet-96", "mobilenet-120", "mobilenet-672", "mobilenet-960", "convnext-1")
CPU = ("mobilenet-16", "mobilenet-72-5x5", "mobilenet-120", "mobilenet-672")


def work_of(shape: Shape, direction: str, batch: int, dtype: torch.dtype) -> Work:
    """Forward: x, weight, y, means. Backward: x, the weight and y's gradient in, x's and the weight's out."""
    x, y = (batch * shape.channels * size**2 for size in (shape.size, shape.out_size))
    weight, means = shape.channels * shape.kernel**2, batch * shape.channels * shape.squeeze
    moved, flops = x + weight + y + means, 2 * shape.kernel**2 * y
    if direction == BACKWARD:
        moved += x + weight + y + means + x + weight
        flops *= 3
    return Work(moved * dtype.itemsize, flops)


def make_case(shape: Shape, direction: str) -> Case:
    size = (BATCH, shape.channels, shape.size, shape.size)
    training = direction == BACKWARD and shape.normalised
    geometry = {"stride": shape.stride, "padding": shape.kernel // 2}
    activation = ACTIVATIONS[shape.act]

    def inputs():
        weight = randn(shape.channels, 1, shape.kernel, shape.kernel) / shape.kernel
        vectors = [rand(shape.channels) for _ in range(4)] if shape.normalised else [randn(shape.channels)]
        return randn(*size, channels_last=shape.channels_last), weight, *vectors

    def eager(x, weight, *vectors):
        if shape.normalised:
            bn_weight, bn_bias, mean, var = vectors
            z = F.conv2d(x, weight, None, **geometry, groups=shape.channels)
            y = activation(F.batch_norm(z, mean, var, bn_weight, bn_bias, training))
        else:
            y = F.conv2d(x, weight, vectors[0], **geometry, groups=shape.channels)
        return (y, y.mean((2, 3))) if shape.squeeze else y

    def bbfast(x, weight, *vectors):
        if not shape.normalised:
            none = (None,) * 4
            return depthwise_conv_bn_act(x, weight, *none, bias=vectors[0], **geometry, act="identity")
        config = {"training": training, "act": shape.act, "squeeze": shape.squeeze}
        return depthwise_conv_bn_act(x, weight, *vectors, **geometry, **config)

    details = f" k{shape.kernel} s{shape.stride} {shape.act}" + (" squeeze" if shape.squeeze else "")
    return Case(
        op=OP,
        shape=f"{shape.model} {'x'.join(map(str, size))}{details}{'' if shape.channels_last else ' NCHW'}",
        direction=direction,
        inputs=inputs,
        leaves=(0, 1, 2, 3) if shape.normalised else (0, 1, 2),
        eager=eager,
        bbfast=bbfast,
        others={"bbfast onednn": bbfast},
        work=work_of(shape, direction, BATCH, DTYPE),
    )


@cases(SHAPES, gpu=GPU, cpu=CPU, others=("bbfast onednn",))
def test_depthwise_conv_bn_act(suite: Suite, shape, direction, provider):
    suite.measure(make_case(shape, direction), provider)
