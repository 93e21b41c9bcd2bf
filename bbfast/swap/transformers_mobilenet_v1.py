"""MobileNetV1 of transformers."""

from transformers.models.mobilenet_v1.modeling_mobilenet_v1 import MobileNetV1ConvLayer

from bbfast.swap._fast import register
from bbfast.swap.transformers_layers import TensorFlowConvLayer


@register
class FastMobileNetV1ConvLayer(TensorFlowConvLayer, MobileNetV1ConvLayer):
    """Padding, convolution, BatchNorm and activation as one op."""

    relies_on = ("transformers.models.mobilenet_v1.modeling_mobilenet_v1.apply_tf_padding",)
