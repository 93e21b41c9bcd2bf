"""Layers: parameters and train/eval behaviour around the ops."""

from bbfast.nn.batch_norm_act import BatchNormAct2d, SyncBatchNormAct2d, convert_sync_batchnorm
from bbfast.nn.depthwise_conv_bn_act import DepthwiseConvBNAct, apply_depthwise_conv_bn_act

__all__ = [
    "BatchNormAct2d",
    "DepthwiseConvBNAct",
    "SyncBatchNormAct2d",
    "apply_depthwise_conv_bn_act",
    "convert_sync_batchnorm",
]
