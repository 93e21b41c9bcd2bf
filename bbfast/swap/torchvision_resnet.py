"""torchvision's ResNet, DenseNet, GoogLeNet and Inception, and the sequences in its segmentation heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import densenet, inception, resnet
from torchvision.models.googlenet import BasicConv2d  # torchvision.models.googlenet also is a function
from torchvision.models.segmentation import deeplabv3, fcn

from bbfast.swap._blocks import activation_name, conv_norm_act, inner, lent_activation
from bbfast.swap._fast import Fast, register
from bbfast.swap.torch_nn import FusedRuns, norm_act
from bbfast.swap.torchvision_layers import misplaced

# ---- ResNet ------------------------------------------------------------------------------------------------


class _WithRelu(Fast):
    """What ResNet and its blocks share: `lends` are convolutions, each with its norm behind it.

    `relu` runs itself where somebody put in one that ops do not know.
    """

    @classmethod
    def lent(cls, block):
        return [*super().lent(block), *lent_activation("relu", inner(block, "relu"))]

    @classmethod
    def objections(cls, block):
        return misplaced(block, convs=cls.lends[::2], norms=cls.lends[1::2])


@register
class FastBasicBlock(_WithRelu, resnet.BasicBlock):
    """One op for each convolution; the last one also adds and activates."""

    lends = ("conv1", "bn1", "conv2", "bn2")

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = conv_norm_act(x, self.conv1, self.bn1, self.relu)
        shortcut = x if self.downsample is None else self.downsample(x)
        return conv_norm_act(y, self.conv2, self.bn2, self.relu, residual=shortcut, in_place=True)


@register
class FastBottleneck(_WithRelu, resnet.Bottleneck):
    """One op for each convolution; the last one also adds and activates."""

    lends = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = conv_norm_act(x, self.conv1, self.bn1, self.relu)
        y = conv_norm_act(y, self.conv2, self.bn2, self.relu)
        shortcut = x if self.downsample is None else self.downsample(x)
        return conv_norm_act(y, self.conv3, self.bn3, self.relu, residual=shortcut, in_place=True)


@register
class FastResNet(_WithRelu, resnet.ResNet):
    """The stem as one op; the stages are blocks of their own."""

    lends = ("conv1", "bn1")
    relies_on = ("torchvision.models.resnet.ResNet._forward_impl",)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(conv_norm_act(x, self.conv1, self.bn1, self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


# ---- DenseNet ----------------------------------------------------------------------------------------------


@register
class FastDenseLayer(Fast, densenet._DenseLayer):
    """BatchNorm and activation as one op, then the first convolution with BatchNorm and activation as another."""

    lends = ("norm1", "relu1", "conv1", "norm2", "relu2")
    relies_on = tuple(
        f"torchvision.models.densenet._DenseLayer.{name}" for name in ("bn_function", "any_requires_grad")
    )

    @classmethod
    def objections(cls, block):
        unknown = [name for name in ("relu1", "relu2") if activation_name(inner(block, name)) is None]
        reasons = [f"{name} is a {type(getattr(block, name)).__name__}, which no op knows" for name in unknown]
        reasons += misplaced(block, convs=("conv1",), norms=("norm1", "norm2"))
        if type(inner(block, "norm1")) is nn.Identity:
            reasons.append("norm1 is an Identity, so that there is nothing to fuse with relu1")
        return reasons

    def fused_forward(self, input: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
        features = [input] if isinstance(input, torch.Tensor) else input
        if self.memory_efficient and self.any_requires_grad(features):  # under activation checkpointing
            return densenet._DenseLayer.forward(self, input)
        x = norm_act(torch.cat(features, 1), self.norm1, self.relu1)
        x = self.conv2(conv_norm_act(x, self.conv1, self.norm2, self.relu2))
        return F.dropout(x, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else x


@register
class FastTransition(FusedRuns, densenet._Transition):
    """BatchNorm and activation as one op."""


# ---- GoogLeNet, Inception ----------------------------------------------------------------------------------

_RELU = nn.ReLU()


class _ConvNormRelu(Fast):
    lends = ("conv", "bn")

    @classmethod
    def objections(cls, block):
        return misplaced(block, convs=("conv",), norms=("bn",))

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv_norm_act(x, self.conv, self.bn, _RELU)


@register
class FastGoogLeNetConv2d(_ConvNormRelu, BasicConv2d):
    """Convolution, BatchNorm and activation as one op."""


@register
class FastInceptionConv2d(_ConvNormRelu, inception.BasicConv2d):
    """Convolution, BatchNorm and activation as one op."""


# ---- segmentation ------------------------------------------------------------------------------------------


@register
class FastAsppConv(FusedRuns, deeplabv3.ASPPConv):
    """Convolution, BatchNorm and activation as one op."""


@register
class FastDeepLabHead(FusedRuns, deeplabv3.DeepLabHead):
    """The convolution with all that follows it is one op."""


@register
class FastFcnHead(FusedRuns, fcn.FCNHead):
    """The first convolution with all that follows it is one op."""
