"""timm's RegNet blocks, whose norms stand behind their convolutions or before them."""

from __future__ import annotations

import torch
from timm.models.regnet import Bottleneck, PreBottleneck
from torch import nn

from bbfast import ops
from bbfast.swap._blocks import (
    conv_norm_act,
    conv_norm_act_squeeze_excite,
    draw_mask,
    draws,
    inner,
    lent_activation,
    lent_identity,
    lent_squeeze_excite,
    product,
)
from bbfast.swap._fast import Fast, register
from bbfast.swap.timm_layers import lent_conv_norm_act, run_conv_norm_act, run_conv_norm_act_squeeze_excite


@register
class FastBottleneck(Fast, Bottleneck):
    """One op for each convolution; the last takes the shortcut and the activation behind it along."""

    drops = ("drop_path",)

    @classmethod
    def lent(cls, block):
        conv2, conv3, se, act = (inner(block, name) for name in ("conv2", "conv3", "se", "act3"))
        layers = [*lent_conv_norm_act("conv2", conv2), *lent_conv_norm_act("conv3", conv3)]
        return [*super().lent(block), *layers, *lent_squeeze_excite("se", se), *lent_activation("act3", act)]

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = run_conv_norm_act_squeeze_excite(self.conv1(x), self.conv2, self.se)
        if self.downsample is None:
            return run_conv_norm_act(y, self.conv3, self.act3)
        if not draws(self.drop_path):
            return run_conv_norm_act(y, self.conv3, self.act3, residual=self.downsample(x))
        branch = run_conv_norm_act(y, self.conv3)
        return self.act3(_add_dropped(branch, self.drop_path, self.downsample, x))


@register
class FastPreBottleneck(Fast, PreBottleneck):
    """Each convolution takes along the norm of the next one, and the last the shortcut."""

    lends = ("conv1", "norm2", "conv2")
    drops = ("drop_path",)

    @classmethod
    def lent(cls, block):
        # Squeeze-and-excite stands between the second convolution and the norm, which then runs itself.
        se, norm, conv = (inner(block, name) for name in ("se", "norm3", "conv3"))
        plain = lent_identity("se", se)
        lent_norm = [("norm3", norm)] if plain else []
        return [*super().lent(block), *lent_norm, *plain, *lent_squeeze_excite("se", se), ("conv3", conv)]

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(x)
        y = conv_norm_act(x, self.conv1, self.norm2)
        if type(self.se) is nn.Identity:
            y = conv_norm_act(y, self.conv2, self.norm3)
        else:
            y = self.norm3(product(conv_norm_act_squeeze_excite(y, self.conv2, None, None, self.se)))
        if self.downsample is None:
            return conv_norm_act(y, self.conv3)
        if not draws(self.drop_path):
            return conv_norm_act(y, self.conv3, residual=self.downsample(x))
        return _add_dropped(conv_norm_act(y, self.conv3), self.drop_path, self.downsample, x)


def _add_dropped(branch: torch.Tensor, drop_path: nn.Module, downsample: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`drop_path(branch) + downsample(x)` as one op; what is dropped is drawn before downsample runs, as timm does."""
    mask = draw_mask(drop_path, branch)
    return ops.drop_path_add(downsample(x), branch, mask=mask)
