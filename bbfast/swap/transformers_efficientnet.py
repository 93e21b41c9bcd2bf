"""EfficientNet of transformers."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.efficientnet.modeling_efficientnet import (
    EfficientNetBlock,
    EfficientNetDepthwiseConv2d,
    EfficientNetDepthwiseLayer,
    EfficientNetExpansionLayer,
    EfficientNetFinalBlockLayer,
    EfficientNetSqueezeExciteLayer,
)

from bbfast.swap._blocks import (
    CONVS,
    SQUEEZE_EXCITES,
    activation_name,
    conv_norm_act,
    conv_norm_act_squeeze_excite,
    lent_activation,
    lent_squeeze_excite,
    product,
)
from bbfast.swap._fast import Fast, register
from bbfast.swap._lending import lender
from bbfast.swap.torch_nn import conv_objections

# ---- what its layers lend ------------------------------------------------------------------------------------

lender(EfficientNetDepthwiseConv2d, objections=conv_objections)
CONVS[EfficientNetDepthwiseConv2d] = lambda conv: None
lender(nn.ZeroPad2d)
lender(nn.AdaptiveAvgPool2d)
lender(nn.Sigmoid)


def _inner_of_depthwise(layer: EfficientNetDepthwiseLayer):
    names = ("depthwise_conv_pad", "depthwise_conv", "depthwise_norm")
    act = lent_activation("depthwise_act", layer.depthwise_act)
    return [*((name, getattr(layer, name)) for name in names), *act]


def _depthwise_objections(layer: EfficientNetDepthwiseLayer) -> list[str]:
    return [] if _padding(layer) != "unknown" else ["pads in a way of its own which no op knows"]


def _padding(layer: EfficientNetDepthwiseLayer):
    """What the op has to pad, in its own words; None for what the convolution says."""
    if layer.stride != 2:
        return None
    left, right, top, bottom = layer.depthwise_conv_pad.padding
    plain = layer.depthwise_conv.padding == "valid" and min(left, right, top, bottom) >= 0
    return (top, bottom, left, right) if plain else "unknown"


def _inner_of_squeeze_excite(layer: EfficientNetSqueezeExciteLayer):
    return [(name, getattr(layer, name)) for name in ("squeeze", "reduce", "act_reduce", "expand", "act_expand")]


lender(EfficientNetDepthwiseLayer, objections=_depthwise_objections, inner=_inner_of_depthwise)
lender(EfficientNetSqueezeExciteLayer, inner=_inner_of_squeeze_excite)


def _read_squeeze_excite(layer: EfficientNetSqueezeExciteLayer):
    plain = type(layer.act_expand) is nn.Sigmoid and layer.squeeze.output_size in (1, (1, 1))
    return layer.reduce, activation_name(layer.act_reduce), layer.expand, "sigmoid" if plain else None


SQUEEZE_EXCITES[EfficientNetSqueezeExciteLayer] = _read_squeeze_excite

# ---- blocks ----------------------------------------------------------------------------------------------------


@register
class FastEfficientNetExpansionLayer(Fast, EfficientNetExpansionLayer):
    """Convolution, BatchNorm and activation as one op."""

    lends = ("expand_conv", "expand_bn")

    @classmethod
    def lent(cls, block):
        return [*super().lent(block), *lent_activation("expand_act", block.expand_act)]

    def fused_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return conv_norm_act(hidden_states, self.expand_conv, self.expand_bn, self.expand_act)


@register
class FastEfficientNetFinalBlockLayer(Fast, EfficientNetFinalBlockLayer):
    """Convolution, BatchNorm and, where no features are dropped, the sum as one op."""

    lends = ("project_conv", "project_bn", "dropout")

    def fused_forward(self, embeddings: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.apply_dropout:
            return conv_norm_act(hidden_states, self.project_conv, self.project_bn)
        if type(self.dropout) is nn.Dropout and not (self.dropout.training and self.dropout.p):
            return conv_norm_act(hidden_states, self.project_conv, self.project_bn, residual=embeddings)
        return self.dropout(conv_norm_act(hidden_states, self.project_conv, self.project_bn)) + embeddings


@register
class FastEfficientNetBlock(Fast, EfficientNetBlock):
    """Padding and depthwise convolution are one op, which also gives the means that squeeze-and-excite needs."""

    @classmethod
    def lent(cls, block):
        squeeze_excite = lent_squeeze_excite("squeeze_excite", block.squeeze_excite)
        return [("depthwise_conv", block.depthwise_conv), *squeeze_excite]

    def fused_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        layer = self.depthwise_conv
        y = self.expansion(hidden_states) if self.expand_ratio != 1 else hidden_states
        y = conv_norm_act_squeeze_excite(
            y,
            layer.depthwise_conv,
            layer.depthwise_norm,
            layer.depthwise_act,
            self.squeeze_excite,
            padding=_padding(layer),
        )
        return self.projection(hidden_states, product(y))
