"""torchvision's MobileNetV2, MobileNetV3, EfficientNet, MNASNet and RegNet blocks."""

from __future__ import annotations

import torch
from torchvision.models import efficientnet, mnasnet, mobilenetv2, mobilenetv3, regnet

from bbfast.swap._blocks import inner, lent_activation
from bbfast.swap._fast import register
from bbfast.swap.torch_nn import FusedRuns
from bbfast.swap.torchvision_layers import AroundSequence, run_sequence, sequence


@register
class FastInvertedResidualV2(AroundSequence, mobilenetv2.InvertedResidual):
    """MobileNetV2: one op for each convolution."""

    sequence = "conv"

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_sequence(x, self.conv, shortcut=x if self.use_res_connect else None)


@register
class FastInvertedResidualV3(AroundSequence, mobilenetv3.InvertedResidual):
    """MobileNetV3: one op for each convolution; the depthwise one gives the means that squeeze-and-excite needs."""

    sequence = "block"

    def fused_forward(self, input: torch.Tensor) -> torch.Tensor:
        return run_sequence(input, self.block, shortcut=input if self.use_res_connect else None, in_place=True)


@register
class FastMnasNetInvertedResidual(AroundSequence, mnasnet._InvertedResidual):
    """MNASNet: one op for each convolution."""

    sequence = "layers"

    def fused_forward(self, input: torch.Tensor) -> torch.Tensor:
        return run_sequence(input, self.layers, shortcut=input if self.apply_residual else None)


class _Dropped(AroundSequence):
    """What EfficientNet's blocks share: a branch that stochastic depth may leave out."""

    drops = ("stochastic_depth",)
    sequence = "block"

    def fused_forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.use_res_connect:
            return run_sequence(input, self.block)
        return run_sequence(input, self.block, shortcut=input, drop_path=self.stochastic_depth, in_place=True)


@register
class FastMBConv(_Dropped, efficientnet.MBConv):
    """One op for each convolution; the depthwise one gives the means that squeeze-and-excite needs."""


@register
class FastFusedMBConv(_Dropped, efficientnet.FusedMBConv):
    """One op for each convolution."""


# ---- RegNet ------------------------------------------------------------------------------------------------


@register
class FastSimpleStemIN(FusedRuns, regnet.SimpleStemIN):
    """The stem as one op."""


sequence(regnet.BottleneckTransform)


@register
class FastResBottleneckBlock(AroundSequence, regnet.ResBottleneckBlock):
    """One op for each convolution; the last one also adds and activates."""

    sequence = "f"

    @classmethod
    def lent(cls, block):
        return [*super().lent(block), *lent_activation("activation", inner(block, "activation"))]

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return run_sequence(x, self.f, shortcut=shortcut, act=self.activation)
