"""ConvNeXt of transformers."""

from transformers.models.convnext import modeling_convnext
from transformers.models.convnext.modeling_convnext import ConvNextLayer

from bbfast.swap._fast import register
from bbfast.swap.transformers_layers import ConvNextBlock, drop_path_lender

drop_path_lender(modeling_convnext, "ConvNextDropPath")


@register
class FastConvNextLayer(ConvNextBlock, ConvNextLayer):
    """The depthwise convolution as one op; layer scale, stochastic depth and sum as another."""
