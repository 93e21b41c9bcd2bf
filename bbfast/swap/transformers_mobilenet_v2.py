"""MobileNetV2 of transformers."""

from __future__ import annotations

import torch
from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import MobileNetV2ConvLayer, MobileNetV2InvertedResidual

from bbfast.swap._fast import Fast, register
from bbfast.swap.transformers_layers import (
    TensorFlowConvLayer,
    conv_layer_lender,
    padding_objections,
    tensorflow_conv,
)

PADDING = ("transformers.models.mobilenet_v2.modeling_mobilenet_v2.apply_tf_padding",)


@register
class FastMobileNetV2ConvLayer(TensorFlowConvLayer, MobileNetV2ConvLayer):
    """Padding, convolution, BatchNorm and activation as one op."""

    relies_on = PADDING


@register
class FastMobileNetV2InvertedResidual(Fast, MobileNetV2InvertedResidual):
    """The last convolution takes the sum along; the others are ops of their own."""

    lends = ("reduce_1x1",)

    @classmethod
    def concerns(cls, block):
        return block.use_residual

    @classmethod
    def objections(cls, block):
        return [f"reduce_1x1 {reason}" for reason in padding_objections(block.reduce_1x1)]

    def fused_forward(self, features: torch.Tensor) -> torch.Tensor:
        return tensorflow_conv(self.reduce_1x1, self.conv_3x3(self.expand_1x1(features)), residual=features)


conv_layer_lender(MobileNetV2ConvLayer, FastMobileNetV2ConvLayer, relies_on=PADDING)
