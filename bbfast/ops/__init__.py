"""The ops: tensors in, tensors out, each with kernels, a reference, autograd and torch.library registration."""

from bbfast.ops.batch_norm_act import batch_norm_act
from bbfast.ops.conv_bn_act import conv_bn_act
from bbfast.ops.depthwise_conv_bn_act import depthwise_conv_bn_act
from bbfast.ops.drop_path_add import drop_path_add, drop_path_mask
from bbfast.ops.window_attention import window_attention

__all__ = [
    "batch_norm_act",
    "conv_bn_act",
    "depthwise_conv_bn_act",
    "drop_path_add",
    "drop_path_mask",
    "window_attention",
]
