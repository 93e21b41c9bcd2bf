"""timm's ResNets: both blocks, and the stem of the model."""

from __future__ import annotations

import torch
from timm.layers.drop import DropBlock2d
from timm.models._manipulate import checkpoint_seq
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from bbfast import ops
from bbfast.swap._blocks import (
    CONVS,
    conv_norm_act,
    conv_norm_act_squeeze_excite,
    draw_mask,
    draws,
    inner,
    lent_activation,
    lent_squeeze_excite,
    product,
)
from bbfast.swap._fast import Fast, register
from bbfast.swap._lending import lender
from bbfast.swap.torch_nn import norm_act

lender(DropBlock2d)

# ---- blocks ------------------------------------------------------------------------------------------------


class _Residual(Fast):
    """What both blocks share: the strided convolution with its pooling, and the end of the branch."""

    @classmethod
    def lent(cls, block):
        lent = list(super().lent(block))
        for name in ("act1", "act2", "act3"):
            lent += lent_activation(name, inner(block, name))
        drop_block = inner(block, "drop_block")
        if type(drop_block) in (nn.Identity, DropBlock2d):
            lent.append(("drop_block", drop_block))
        return [*lent, *lent_squeeze_excite("se", inner(block, "se"))]

    def _middle(self, x: torch.Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module) -> torch.Tensor:
        """`aa(act(drop_block(norm(conv(x)))))`"""
        if _does_nothing(self.drop_block):
            return self.aa(conv_norm_act(x, conv, norm, act))
        return self.aa(act(self.drop_block(conv_norm_act(x, conv, norm))))

    def _finish(
        self, x: torch.Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module, shortcut: torch.Tensor
    ) -> torch.Tensor:
        """`act(drop_path(se(norm(conv(x)))) + downsample(shortcut))`"""
        if self.se is None and not draws(self.drop_path):
            return conv_norm_act(x, conv, norm, act, residual=self._shortcut(shortcut), in_place=True)
        branch = product(conv_norm_act_squeeze_excite(x, conv, norm, None, self.se))
        mask = draw_mask(self.drop_path, branch)
        return act(_add(branch, self._shortcut(shortcut), mask))

    def _shortcut(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.downsample is None else self.downsample(x)


def _does_nothing(drop_block: nn.Module) -> bool:
    if type(drop_block) is DropBlock2d:
        return not (drop_block.training and drop_block.drop_prob)
    return type(drop_block) is nn.Identity


def _add(branch: torch.Tensor, shortcut: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`branch * mask + shortcut` in the dtype of branch, to which timm adds in place."""
    if mask is None and not torch.is_grad_enabled():
        return branch.add_(shortcut)
    return ops.drop_path_add(shortcut, branch, mask=mask).to(branch.dtype)


@register
class FastBasicBlock(_Residual, BasicBlock):
    """One op for each convolution; the second takes the shortcut along, too."""

    lends = ("conv1", "bn1", "conv2", "bn2")
    drops = ("drop_path",)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._middle(x, self.conv1, self.bn1, self.act1)
        return self._finish(y, self.conv2, self.bn2, self.act2, x)


@register
class FastBottleneck(_Residual, Bottleneck):
    """One op for each convolution; the last takes the shortcut along, too."""

    lends = ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
    drops = ("drop_path",)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = conv_norm_act(x, self.conv1, self.bn1, self.act1)
        y = self._middle(y, self.conv2, self.bn2, self.act2)
        return self._finish(y, self.conv3, self.bn3, self.act3, x)


# ---- the model ---------------------------------------------------------------------------------------------


@register
class FastResNet(Fast, ResNet):
    """In forward the stem's convolution, BatchNorm and activation are one op; other methods are timm's.

    A deep stem runs itself up to its last convolution, whose BatchNorm and activation are one op.
    """

    relies_on = ("timm.models.resnet.ResNet.forward_features",)

    @classmethod
    def lent(cls, block):
        conv, norm, act = (inner(block, name) for name in ("conv1", "bn1", "act1"))
        lent_conv = [("conv1", conv)] if type(conv) in CONVS else []
        return [*lent_conv, ("bn1", norm), *lent_activation("act1", act)]

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self._features(self._stem(x)))

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.conv1) in CONVS:
            return conv_norm_act(x, self.conv1, self.bn1, self.act1)
        return norm_act(self.conv1(x), self.bn1, self.act1)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(x)
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.grad_checkpointing:
            return checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x
