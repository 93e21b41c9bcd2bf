"""timm's MobileNetV2, MobileNetV3 and EfficientNet blocks, and the layers that many timm models share."""

from __future__ import annotations

import torch
from timm.layers import activations as timm_activations
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.drop import DropPath
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from timm.models._efficientnet_blocks import (
    ConvBnAct,
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    SqueezeExcite,
)
from torch import nn

from bbfast import ops
from bbfast.nn._batch_norm import batch_norm_arguments
from bbfast.swap._blocks import (
    ACTIVATIONS,
    CONVS,
    DROP_PATHS,
    NORMS,
    SQUEEZE_EXCITES,
    activation_name,
    add_branch,
    conv_norm_act,
    conv_norm_act_squeeze_excite,
    conv_norm_add,
    lent_activation,
    lent_squeeze_excite,
)
from bbfast.swap._fast import Fast, register, unsupported
from bbfast.swap._lending import lender
from bbfast.swap.torch_nn import conv_objections

# ---- what timm's layers lend -------------------------------------------------------------------------------

lender(
    Conv2dSame,
    objections=conv_objections,
    relies_on=(
        "timm.layers.conv2d_same.conv2d_same",
        "timm.layers.padding.pad_same",
        "timm.layers.padding.get_same_padding",
    ),
)
CONVS[Conv2dSame] = lambda conv: "same"

for cls, name in (
    (timm_activations.Swish, "silu"),
    (timm_activations.HardSwish, "hardswish"),
    (timm_activations.GELU, "gelu"),
):
    lender(cls)
    ACTIVATIONS[cls] = lambda act, name=name: name


def _norm_objections(norm: BatchNormAct2d) -> list[str]:
    drop = getattr(norm, "drop", None)
    if type(drop) not in (nn.Identity, type(None)):
        return [f"drops values between norm and activation ({type(drop).__name__})"]
    return []


def _lent_by_norm(norm: BatchNormAct2d) -> list[tuple[str, nn.Module]]:
    return lent_activation("act", getattr(norm, "act", None))


for cls in (BatchNormAct2d, SyncBatchNormAct):
    lender(cls, objections=_norm_objections, inner=_lent_by_norm)
    NORMS[cls] = lambda norm: (norm, getattr(norm, "act", None))


def _mask(drop_path: DropPath, branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    if not drop_path.drop_prob:
        return None
    return ops.drop_path_mask(branch, drop_path.drop_prob, drop_path.scale_by_keep, dtype)


lender(DropPath, relies_on=("timm.layers.drop.drop_path",))
DROP_PATHS[DropPath] = _mask

_GATES = {
    timm_activations.Sigmoid: "sigmoid",
    nn.Sigmoid: "sigmoid",
    timm_activations.HardSigmoid: "hard_sigmoid",
    nn.Hardsigmoid: "hard_sigmoid",
}
for cls in _GATES:
    lender(cls)

lender(
    SqueezeExcite,
    inner=lambda se: [(name, getattr(se, name)) for name in ("conv_reduce", "act1", "conv_expand", "gate")],
)
SQUEEZE_EXCITES[SqueezeExcite] = lambda se: (
    se.conv_reduce,
    activation_name(se.act1),
    se.conv_expand,
    _GATES.get(type(se.gate)),
)

# ---- layers ------------------------------------------------------------------------------------------------


@register
class FastBatchNormAct2d(Fast, BatchNormAct2d):
    """BatchNorm and activation as one op."""

    lends = ("drop",)

    @classmethod
    def lent(cls, block):
        return [*super().lent(block), *_lent_by_norm(block)]

    @classmethod
    def objections(cls, block):
        if activation_name(block.act) is None:
            return [f"its activation, {type(block.act).__name__}, is none that ops know"]
        return _norm_objections(block)

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        statistics, settings = batch_norm_arguments(self)
        return ops.batch_norm_act(x, *statistics, act=activation_name(self.act), **settings)


lender(FastBatchNormAct2d, objections=_norm_objections, inner=_lent_by_norm, read_as=BatchNormAct2d)
NORMS[FastBatchNormAct2d] = NORMS[BatchNormAct2d]


@register
class FastConvNormAct(Fast, ConvNormAct):
    """Convolution, BatchNorm and activation as one op."""

    lends = ("conv", "bn")

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        x = conv_norm_act(x, self.conv, self.bn)
        return x if self.aa is None else self.aa(x)


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
