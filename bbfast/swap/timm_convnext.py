"""timm's ConvNeXt block."""

from __future__ import annotations

import torch
from timm.layers.norm import LayerNorm2d
from timm.models.convnext import ConvNeXtBlock

from bbfast.swap._blocks import add_branch, add_perceptron, conv_norm_act
from bbfast.swap._fast import Fast, register
from bbfast.triton_kernels.layout import is_channels_last


@register
class FastConvNeXtBlock(Fast, ConvNeXtBlock):
    """The depthwise convolution is one op, the perceptron with layer scale and sum two, stochastic depth another."""

    lends = ("conv_dw",)
    drops = ("drop_path",)
    relies_on = ("timm.layers.mlp.Mlp.forward",)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.use_conv_mlp or type(self.norm) is LayerNorm2d:
            # The norm makes it channels_last anyway. Done before the convolution, all that follows has one format.
            x = _as_channels_last(x)
        branch = conv_norm_act(x, self.conv_dw)
        if not self.use_conv_mlp and is_channels_last(x):
            shortcut = _as_channels_last(self.shortcut(x)).permute(0, 2, 3, 1)
            pixels = branch.permute(0, 2, 3, 1)
            y = add_perceptron(shortcut, pixels, self.mlp, self.drop_path, self.gamma, self.norm)
            return y.permute(0, 3, 1, 2)
        if self.use_conv_mlp:
            branch = self.mlp(self.norm(branch))
        else:
            branch = self.mlp(self.norm(branch.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        # In timm's sum the branch comes first, and gives it its memory format.
        shortcut = self.shortcut(x)
        shortcut = _as_channels_last(shortcut) if is_channels_last(branch) else shortcut.contiguous()
        return add_branch(shortcut, branch, self.drop_path, self.gamma)


def _as_channels_last(x: torch.Tensor) -> torch.Tensor:
    return x if is_channels_last(x) else x.contiguous(memory_format=torch.channels_last)
