"""What the backbones of transformers share: activations, stochastic depth, and kinds of blocks under many names.

Their modules are copies of each other under other names, so an adapter says which class is of which kind.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn
from transformers import activations

from bbfast.swap._blocks import (
    ACTIVATIONS,
    DROP_PATHS,
    activation_name,
    add_branch,
    conv_norm_act,
    draws,
    lent_activation,
    two_layers,
)
from bbfast.swap._fast import Fast, unsupported
from bbfast.swap._fingerprint import of_other_releases
from bbfast.swap._lending import lender

# ---- activations -------------------------------------------------------------------------------------------

lender(activations.GELUActivation)
ACTIVATIONS[activations.GELUActivation] = lambda act: "gelu" if act.act is nn.functional.gelu else None

lender(activations.LinearActivation)
ACTIVATIONS[activations.LinearActivation] = lambda act: "identity"

if hasattr(activations, "SiLUActivation"):  # before, it was torch's own
    lender(activations.SiLUActivation)
    ACTIVATIONS[activations.SiLUActivation] = lambda act: "silu"

# ---- stochastic depth --------------------------------------------------------------------------------------


def drop_path_lender(module: ModuleType, *names: str) -> None:
    """Says that a module's class of the first of these names that it has is a copy of transformers' DropPath."""
    of_other_releases(*(f"{module.__name__}.{name}.forward" for name in names))
    cls = next(getattr(module, name) for name in names if hasattr(module, name))
    lender(cls, relies_on=(f"{module.__name__}.drop_path",))  # where older copies draw
    DROP_PATHS[cls] = _mask


def _mask(drop_path: nn.Module, branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Draws as they all do: a uniform value per sample, rounded down after the chance to be kept is added."""
    if drop_path.drop_prob == 0:
        return None
    keep_prob = 1 - drop_path.drop_prob
    shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
    drawn = torch.rand(shape, dtype=dtype, device=branch.device)
    return (drawn + keep_prob).floor_().div_(keep_prob).view(-1)


# ---- ResNet and RegNet -------------------------------------------------------------------------------------


class ConvLayer(Fast):
    """Kind of block: convolution, normalization and, if there is one, activation are one op."""

    lends = ("convolution", "normalization")

    @classmethod
    def lent(cls, block):
        return [*super().lent(block), *lent_activation("activation", getattr(block, "activation", None))]

    def fused_forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        act = getattr(self, "activation", None)
        return conv_norm_act(hidden_state, self.convolution, self.normalization, act)


def conv_layer_lender(cls: type[nn.Module], *classes: type[nn.Module], relies_on: tuple[str, ...] = ()) -> None:
    """Says that such a layer, `cls` and what it has become, can lend what it holds to the block that it is part of."""
    for each in (cls, *classes):
        lender(each, objections=_conv_layer_objections, inner=_inner_of_conv_layer, read_as=cls, relies_on=relies_on)


def _inner_of_conv_layer(layer: nn.Module):
    return [(name, getattr(layer, name, None)) for name in ("convolution", "normalization", "activation")]


def _conv_layer_objections(layer: nn.Module) -> list[str]:
    if activation_name(getattr(layer, "activation", None)) != "identity":
        return ["has an activation, and what is added to its result comes after that"]
    return []


class ResidualLayer(Fast):
    """Kind of block: `activation(layer(x) + shortcut(x))`, whose last convolution takes sum and activation along."""

    @classmethod
    def lent(cls, block):
        layers = list(block.layer._modules.items())
        last = [(f"layer.{name}", layer) for name, layer in layers[-1:]]
        return [("layer", block.layer), *last, *lent_activation("activation", block.activation)]

    def fused_forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        *first, last = self.layer._modules.values()
        y = hidden_state
        for layer in first:
            y = layer(y)
        shortcut = self.shortcut(hidden_state)
        return conv_norm_act(y, last.convolution, last.normalization, self.activation, residual=shortcut, in_place=True)


# ---- ConvNeXt ----------------------------------------------------------------------------------------------


class ConvNextBlock(Fast):
    """Kind of block: the depthwise convolution is one op; layer scale and sum are part of another."""

    lends = ("dwconv",)
    drops = ("drop_path",)

    def fused_forward(self, features: torch.Tensor) -> torch.Tensor:
        y = self.layernorm(conv_norm_act(features, self.dwconv).permute(0, 2, 3, 1))
        grn = getattr(self, "grn", None)
        scale = getattr(self, "layer_scale_parameter", None)
        if grn is None and not draws(self.drop_path):
            layers = self.pwconv1, self.act, self.pwconv2
            return two_layers(y, *layers, features.permute(0, 2, 3, 1), scale).permute(0, 3, 1, 2)
        y = self.act(self.pwconv1(y))
        y = self.pwconv2(y if grn is None else grn(y))
        return add_branch(features, y.permute(0, 3, 1, 2), self.drop_path, scale)


# ---- MobileNet ---------------------------------------------------------------------------------------------


class TensorFlowConvLayer(ConvLayer):
    """Kind of block: a `ConvLayer` that may pad by TensorFlow's rule, which the op does on the way."""

    @classmethod
    def objections(cls, block):
        return padding_objections(block)

    def fused_forward(self, features: torch.Tensor) -> torch.Tensor:
        return tensorflow_conv(self, features)


def padding_objections(layer: nn.Module) -> list[str]:
    """Why `apply_tf_padding`, where it would run, is not the rule that the ops know."""
    conv = layer.convolution
    # For a dilated kernel it spreads the padding of one that is not.
    plain = all(d == 1 or (s == 1 and k % 2) for k, s, d in zip(conv.kernel_size, conv.stride, conv.dilation))
    if layer.config.tf_padding and not (plain and conv.padding == (0, 0)):
        return ["pads in a way of its own (config.tf_padding) which no op knows"]
    return []


def tensorflow_conv(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`layer(x) + residual` as one op; the layer's activation comes last."""
    padding = "same" if layer.config.tf_padding else None
    return conv_norm_act(
        x, layer.convolution, layer.normalization, layer.activation, residual=residual, padding=padding
    )


# ---- not supported -----------------------------------------------------------------------------------------

for name in ("swinv2.modeling_swinv2.Swinv2Layer", "swin2sr.modeling_swin2sr.Swin2SRLayer"):
    unsupported(
        f"transformers.models.{name}",
        "attends by cosines, with a scale per head and a bias from a perceptron, which the op does not know",
    )
