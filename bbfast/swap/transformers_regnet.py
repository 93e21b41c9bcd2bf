"""RegNet of transformers."""

from transformers.models.regnet.modeling_regnet import RegNetConvLayer, RegNetShortCut, RegNetXLayer, RegNetYLayer

from bbfast.swap._fast import register
from bbfast.swap.transformers_layers import ConvLayer, ResidualLayer, conv_layer_lender


@register
class FastRegNetConvLayer(ConvLayer, RegNetConvLayer):
    """Convolution, BatchNorm and activation as one op."""


@register
class FastRegNetShortCut(ConvLayer, RegNetShortCut):
    """Convolution and BatchNorm as one op."""


@register
class FastRegNetXLayer(ResidualLayer, RegNetXLayer):
    """One op for each convolution; the last takes sum and activation along."""


@register
class FastRegNetYLayer(ResidualLayer, RegNetYLayer):
    """One op for each convolution, the last with sum and activation; squeeze-and-excite runs itself."""


conv_layer_lender(RegNetConvLayer, FastRegNetConvLayer)
