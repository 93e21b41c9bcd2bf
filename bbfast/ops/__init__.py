"""The ops: tensors in, tensors out, each with kernels, a reference, autograd and torch.library registration."""

from bbfast.ops.depthwise_conv_bn_act import depthwise_conv_bn_act

__all__ = ["depthwise_conv_bn_act"]
