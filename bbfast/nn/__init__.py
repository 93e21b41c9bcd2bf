"""Layers: parameters and train/eval behaviour around the ops."""

from bbfast.nn.depthwise_conv_bn_act import DepthwiseConvBNAct, apply_depthwise_conv_bn_act

__all__ = ["DepthwiseConvBNAct", "apply_depthwise_conv_bn_act"]
