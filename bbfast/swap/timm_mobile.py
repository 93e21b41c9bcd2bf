"""timm's MobileNetV2, MobileNetV3 and EfficientNet blocks."""

from __future__ import annotations

import torch
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
)
from torch import nn

from bbfast.swap._blocks import (
    SQUEEZE_EXCITES,
    activation_name,
    add_branch,
    conv_norm_act,
    conv_norm_act_squeeze_excite,
    conv_norm_add,
    lent_squeeze_excite,
)
from bbfast.swap._fast import Fast, register, unsupported
from bbfast.swap._lending import lender
from bbfast.swap.timm_layers import GATES

lender(
    SqueezeExcite,
    inner=lambda se: [(name, se._modules[name]) for name in ("conv_reduce", "act1", "conv_expand", "gate")],
)
SQUEEZE_EXCITES[SqueezeExcite] = lambda se: (
    se.conv_reduce,
    activation_name(se.act1),
    se.conv_expand,
    GATES.get(type(se.gate)),
)

# ---- blocks ------------------------------------------------------------------------------------------------


@register
class FastConvBnAct(Fast, ConvBnAct):
    """The convolution with all that follows it is one op."""

    lends = ("conv", "bn1", "drop_path")

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.has_skip and type(self.aa) is nn.Identity:
            return conv_norm_add(x, self.conv, self.bn1, x, self.drop_path)
        y = self.aa(conv_norm_act(x, self.conv, self.bn1))
        return add_branch(x, y, self.drop_path) if self.has_skip else y


class _WithSqueezeExcite(Fast):
    """What the blocks with a depthwise convolution share."""

    @classmethod
    def lent(cls, block):
        return [*super().lent(block), *lent_squeeze_excite("se", block.se)]

    def _space_to_depth(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.conv_s2d is None else conv_norm_act(x, self.conv_s2d, self.bn_s2d)

    def _middle(self, x: torch.Tensor, conv: nn.Module, norm: nn.Module) -> torch.Tensor:
        """`se(aa(norm(conv(x))))`"""
        if type(self.aa) is nn.Identity:
            return conv_norm_act_squeeze_excite(x, conv, norm, None, self.se)
        return self.se(self.aa(conv_norm_act(x, conv, norm)))

    def _finish(self, x: torch.Tensor, conv: nn.Module, norm: nn.Module, shortcut: torch.Tensor) -> torch.Tensor:
        if not self.has_skip:
            return conv_norm_act(x, conv, norm)
        return conv_norm_add(x, conv, norm, shortcut, self.drop_path)


@register
class FastDepthwiseSeparableConv(_WithSqueezeExcite, DepthwiseSeparableConv):
    """One op for each convolution; the depthwise one also gives the means that squeeze-and-excite needs."""

    lends = ("conv_s2d", "bn_s2d", "conv_dw", "bn1", "conv_pw", "bn2", "drop_path")

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._middle(self._space_to_depth(x), self.conv_dw, self.bn1)
        return self._finish(y, self.conv_pw, self.bn2, x)


@register
class FastInvertedResidual(_WithSqueezeExcite, InvertedResidual):
    """One op for each convolution; the depthwise one also gives the means that squeeze-and-excite needs."""

    lends = ("conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3", "drop_path")

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = conv_norm_act(self._space_to_depth(x), self.conv_pw, self.bn1)
        y = self._middle(y, self.conv_dw, self.bn2)
        return self._finish(y, self.conv_pwl, self.bn3, x)


@register
class FastEdgeResidual(_WithSqueezeExcite, EdgeResidual):
    """One op for each convolution."""

    lends = ("conv_exp", "bn1", "conv_pwl", "bn2", "drop_path")

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._middle(x, self.conv_exp, self.bn1)
        return self._finish(y, self.conv_pwl, self.bn2, x)


unsupported(
    "timm.models._efficientnet_blocks.CondConvResidual", "its convolutions mix their weights anew for each sample"
)
