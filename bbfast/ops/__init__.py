"""The ops: tensors in, tensors out, each with kernels, a reference, autograd and torch.library registration."""

from bbfast.ops._drop_path import drop_path_mask
from bbfast.ops.add_layer_norm import add_layer_norm
from bbfast.ops.batch_norm_act import batch_norm_act
from bbfast.ops.conv_bn_act import conv_bn_act
from bbfast.ops.depthwise_conv_bn_act import depthwise_conv_bn_act
from bbfast.ops.drop_path_add import drop_path_add
from bbfast.ops.linear_act import linear_act
from bbfast.ops.mlp import mlp
from bbfast.ops.window_attention import window_attention
from bbfast.ops.window_partition import window_partition, window_reverse

__all__ = [
    "add_layer_norm",
    "batch_norm_act",
    "conv_bn_act",
    "depthwise_conv_bn_act",
    "drop_path_add",
    "drop_path_mask",
    "linear_act",
    "mlp",
    "window_attention",
    "window_partition",
    "window_reverse",
]
