"""timm's MobileNetV2, MobileNetV3 and EfficientNet: their blocks, and the stems of the models."""

from __future__ import annotations

import torch
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    LayerScale2d,
    SqueezeExcite,
    UniversalInvertedResidual,
)
from timm.models._manipulate import checkpoint_seq
from timm.models.efficientnet import EfficientNet, EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3, MobileNetV3Features
from torch import nn

from bbfast.swap._blocks import (
    SQUEEZE_EXCITES,
    Gated,
    activation_name,
    add_branch,
    conv_norm_act,
    conv_norm_act_squeeze_excite,
    conv_norm_add,
    draws,
    inner,
    lent_identity,
    lent_squeeze_excite,
)
from bbfast.swap._fast import Fast, register, unsupported
from bbfast.swap._fingerprint import of_other_releases
from bbfast.swap._fold import foldable
from bbfast.swap._lending import lender
from bbfast.swap.timm_layers import GATES, lent_conv_norm_act, run_conv_norm_act

lender(
    SqueezeExcite,
    inner=lambda se: [(name, se._modules[name]) for name in ("conv_reduce", "act1", "conv_expand", "gate")],
)
SQUEEZE_EXCITES[SqueezeExcite] = lambda se: (
    inner(se, "conv_reduce"),
    activation_name(inner(se, "act1")),
    inner(se, "conv_expand"),
    GATES.get(type(inner(se, "gate"))),
)

# ---- blocks ------------------------------------------------------------------------------------------------


@register
class FastConvBnAct(Fast, ConvBnAct):
    """The convolution with all that follows it is one op."""

    lends = ("conv", "bn1")
    drops = ("drop_path",)

    @classmethod
    def lent(cls, block):
        return [*super().lent(block), *lent_identity("aa", inner(block, "aa"))]

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.has_skip and type(self.aa) is nn.Identity:
            return conv_norm_add(x, self.conv, self.bn1, x, self.drop_path)
        y = self.aa(conv_norm_act(x, self.conv, self.bn1))
        return add_branch(x, y, self.drop_path) if self.has_skip else y


class _WithSqueezeExcite(Fast):
    """What the blocks with a depthwise convolution share."""

    @classmethod
    def lent(cls, block):
        aa, squeeze_excite = inner(block, "aa"), inner(block, "se")
        return [*super().lent(block), *lent_identity("aa", aa), *lent_squeeze_excite("se", squeeze_excite)]

    def _space_to_depth(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.conv_s2d is None else conv_norm_act(x, self.conv_s2d, self.bn_s2d)

    def _middle(self, x: torch.Tensor, conv: nn.Module, norm: nn.Module) -> torch.Tensor | Gated:
        """`se(aa(norm(conv(x))))`"""
        if type(self.aa) is nn.Identity:
            return conv_norm_act_squeeze_excite(x, conv, norm, None, self.se)
        return self.se(self.aa(conv_norm_act(x, conv, norm)))

    def _finish(
        self, x: torch.Tensor | Gated, conv: nn.Module, norm: nn.Module, shortcut: torch.Tensor
    ) -> torch.Tensor:
        if not self.has_skip:
            return conv_norm_act(x, conv, norm)
        return conv_norm_add(x, conv, norm, shortcut, self.drop_path)


@register
class FastDepthwiseSeparableConv(_WithSqueezeExcite, DepthwiseSeparableConv):
    """One op for each convolution; the depthwise one also gives the means that squeeze-and-excite needs."""

    lends = ("conv_s2d", "bn_s2d", "conv_dw", "bn1", "conv_pw", "bn2")
    drops = ("drop_path",)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._middle(self._space_to_depth(x), self.conv_dw, self.bn1)
        return self._finish(y, self.conv_pw, self.bn2, x)


@register
class FastInvertedResidual(_WithSqueezeExcite, InvertedResidual):
    """One op for each convolution; the depthwise one also gives the means that squeeze-and-excite needs."""

    lends = ("conv_s2d", "bn_s2d", "conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
    drops = ("drop_path",)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = conv_norm_act(self._space_to_depth(x), self.conv_pw, self.bn1)
        y = self._middle(y, self.conv_dw, self.bn2)
        return self._finish(y, self.conv_pwl, self.bn3, x)


@register
class FastEdgeResidual(_WithSqueezeExcite, EdgeResidual):
    """One op for each convolution."""

    lends = ("conv_exp", "bn1", "conv_pwl", "bn2")
    drops = ("drop_path",)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self._middle(x, self.conv_exp, self.bn1)
        return self._finish(y, self.conv_pwl, self.bn2, x)


lender(LayerScale2d)


@register
class FastUniversalInvertedResidual(Fast, UniversalInvertedResidual):
    """The last convolution takes the shortcut along, or one op scales, drops and adds; the others run themselves."""

    lends = ("layer_scale",)
    drops = ("drop_path",)

    @classmethod
    def lent(cls, block):
        last = "pw_proj" if type(block.dw_end) is nn.Identity else "dw_end"
        lent_last = lent_conv_norm_act(last, getattr(block, last))
        return [*super().lent(block), *lent_identity("dw_end", block.dw_end), *lent_last]

    @classmethod
    def objections(cls, block):
        if type(block.layer_scale) not in (nn.Identity, LayerScale2d):
            return [f"layer_scale is a {type(block.layer_scale).__name__}"]
        return []

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.se(self.dw_mid(self.pw_exp(self.dw_start(x))))
        last = self.pw_proj
        if type(self.dw_end) is not nn.Identity:
            y, last = self.pw_proj(y), self.dw_end
        gamma = getattr(self.layer_scale, "gamma", None)
        if not self.has_skip:
            return self.layer_scale(run_conv_norm_act(y, last))
        if gamma is None and not draws(self.drop_path):
            return run_conv_norm_act(y, last, residual=x)
        return add_branch(x, run_conv_norm_act(y, last), self.drop_path, gamma)


unsupported(
    "timm.models._efficientnet_blocks.CondConvResidual", "its convolutions mix their weights anew for each sample"
)
unsupported(
    "timm.models._efficientnet_blocks.MobileAttention",
    "no op does its attention of maps; layers inside it that fuse are swapped on their own",
)

# Before 1.0.12 or so it stood there.
of_other_releases("timm.models._efficientnet_blocks.LayerScale2d.forward")

# ---- the models --------------------------------------------------------------------------------------------


class _WithStem(Fast):
    """What both models share: in forward, what stands before and behind the blocks; other methods are timm's."""

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        x = conv_norm_act(x, self.conv_stem, self.bn1)
        return checkpoint_seq(self.blocks, x, flatten=True) if self.grad_checkpointing else self.blocks(x)


@register
class FastMobileNetV3(_WithStem, MobileNetV3):
    """In forward the stem's convolution, BatchNorm and activation are one op."""

    lends = ("conv_stem", "bn1")
    relies_on = ("timm.models.mobilenetv3.MobileNetV3.forward_features",)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self._features(x))


@register
class FastEfficientNet(_WithStem, EfficientNet):
    """In forward the stem's convolution, BatchNorm and activation are one op, and so are the head's."""

    lends = ("conv_stem", "bn1", "conv_head", "bn2")
    relies_on = ("timm.models.efficientnet.EfficientNet.forward_features",)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(conv_norm_act(self._features(x), self.conv_head, self.bn2))


for cls in (EfficientNetFeatures, MobileNetV3Features):
    foldable(cls, lambda model: (("conv_stem", "bn1"),))
