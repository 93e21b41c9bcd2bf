"""ResNet of transformers."""

from transformers.models.resnet.modeling_resnet import (
    ResNetBasicLayer,
    ResNetBottleNeckLayer,
    ResNetConvLayer,
    ResNetShortCut,
)

from bbfast.swap._fast import register
from bbfast.swap.transformers_layers import ConvLayer, ResidualLayer, conv_layer_lender


@register
class FastResNetConvLayer(ConvLayer, ResNetConvLayer):
    """Convolution, BatchNorm and activation as one op."""


@register
class FastResNetShortCut(ConvLayer, ResNetShortCut):
    """Convolution and BatchNorm as one op."""


@register
class FastResNetBasicLayer(ResidualLayer, ResNetBasicLayer):
    """One op for each convolution; the last takes sum and activation along."""


@register
class FastResNetBottleNeckLayer(ResidualLayer, ResNetBottleNeckLayer):
    """One op for each convolution; the last takes sum and activation along."""


conv_layer_lender(ResNetConvLayer, FastResNetConvLayer)
