"""torchvision's ConvNeXt block."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.convnext import CNBlock

from bbfast.swap._blocks import CONVS, add_branch, conv_norm_act
from bbfast.swap._fast import Fast, register
from bbfast.swap.torchvision_layers import SEQUENCES


@register
class FastCNBlock(Fast, CNBlock):
    """The convolution is one op, and layer scale, stochastic depth and the sum are another.

    In between, its layers run on `[N, H, W, C]`, as they do without it.
    """

    drops = ("stochastic_depth",)

    @classmethod
    def lent(cls, block):
        layers = [("block", block.block)]
        if type(block.block) in SEQUENCES:
            layers += [(f"block.{name}", layer) for name, layer in list(block.block._modules.items())[:1]]
        return [*super().lent(block), *layers]

    @classmethod
    def objections(cls, block):
        if type(block.block) is not nn.Sequential or type(block.block[0]) not in CONVS:
            return ["its branch does not start with a convolution"]
        if block.layer_scale.shape != (block.block[0].out_channels, 1, 1):
            return [f"layer_scale has shape {tuple(block.layer_scale.shape)}, which is not one value per channel"]
        return []

    def fused_forward(self, input: torch.Tensor) -> torch.Tensor:
        conv, *layers = self.block._modules.values()
        branch = conv_norm_act(input, conv)
        for layer in layers:
            branch = layer(branch)
        return add_branch(input, branch, self.stochastic_depth, self.layer_scale.flatten())
