"""ConvNeXt V2 of transformers."""

from transformers.models.convnextv2 import modeling_convnextv2
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer

from bbfast.swap._fast import register
from bbfast.swap.transformers_layers import ConvNextBlock, drop_path_lender

drop_path_lender(modeling_convnextv2, "ConvNextV2DropPath")


@register
class FastConvNextV2Layer(ConvNextBlock, ConvNextV2Layer):
    """The depthwise convolution as one op; stochastic depth and sum as another."""
