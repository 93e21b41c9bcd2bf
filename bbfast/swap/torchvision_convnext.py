"""torchvision's ConvNeXt block."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.ops.misc import Permute

from bbfast.swap._blocks import CONVS, add_branch, conv_norm_act, draws, two_layers
from bbfast.swap._fast import Fast, register
from bbfast.swap._lending import have_own_call
from bbfast.swap.torchvision_layers import SEQUENCES


@register
class FastCNBlock(Fast, CNBlock):
    """The convolution is one op, the perceptron with layer scale and sum two, stochastic depth another."""

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
        if _is_perceptron(layers) and not draws(self.stochastic_depth):
            _, norm, first, act, second, _ = layers
            pixels, shortcut = (maps.permute(0, 2, 3, 1) for maps in (branch, input))
            scale = self.layer_scale.flatten()
            return two_layers(pixels, first, act, second, shortcut, scale, norm).permute(0, 3, 1, 2)
        for layer in layers:
            branch = layer(branch)
        return add_branch(input, branch, self.stochastic_depth, self.layer_scale.flatten())


def _is_perceptron(layers: list[nn.Module]) -> bool:
    """Whether they are what torchvision makes: a norm and two layers on `[N, H, W, C]`."""
    if len(layers) != 6 or not all(type(layer) is Permute for layer in (layers[0], layers[-1])):
        return False
    there, back = layers[0], layers[-1]
    return there.dims == [0, 2, 3, 1] and back.dims == [0, 3, 1, 2] and not have_own_call([there, back])
