import torch.nn.functional as F
from torch import nn

from bbfast.ops._common import resolve_padding
from bbfast.reference.activation import activation


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, num_features, eps=1e-5, momentum=0.1, act="relu", device=None, dtype=None):
        super().__init__(num_features, eps, momentum, device=device, dtype=dtype)
        self.act = act

    def forward(self, x, residual=None):
        x = super().forward(x)
        return activation(x if residual is None else x + residual, self.act)


def apply_conv_bn_act(conv, bn, x, *, act, padding=None, residual=None):
    p = resolve_padding(
        conv.padding if padding is None else padding,
        x.shape[2:],
        conv.kernel_size,
        conv.stride,
        conv.dilation,
    )
    x = F.pad(x, (p[2], p[3], p[0], p[1]))
    x = F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
    x = nn.BatchNorm2d.forward(bn, x)
    return activation(x if residual is None else x + residual, act)


class DropPathAdd(nn.Module):
    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        if keep > 0 and self.scale_by_keep:
            mask.div_(keep)
        return x * mask

    def drop_path_add(self, residual, branch):
        return residual + self(branch)
