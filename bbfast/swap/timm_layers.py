"""timm's layers: what they lend, and those that are fused on their own."""

from __future__ import annotations

import torch
from timm.layers import activations as timm_activations
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.conv_bn_act import ConvNormAct
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct
from timm.layers.squeeze_excite import SEModule
from torch import nn

from bbfast import ops
from bbfast.nn._batch_norm import batch_norm_arguments
from bbfast.swap._blocks import (
    ACTIVATIONS,
    CONVS,
    DROP_PATHS,
    NORMS,
    PERCEPTRONS,
    SQUEEZE_EXCITES,
    Gated,
    activation_name,
    conv_norm_act,
    conv_norm_act_squeeze_excite,
    inner,
    lent_activation,
    product,
)
from bbfast.swap._fast import Fast, register
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
    drop = norm._modules.get("drop")
    if type(drop) is not nn.Identity and drop is not None:
        return [f"drops values between norm and activation ({type(drop).__name__})"]
    return []


def _lent_by_norm(norm: BatchNormAct2d) -> list[tuple[str, nn.Module | None]]:
    inside = norm._modules
    return [("drop", inside.get("drop")), *lent_activation("act", inside.get("act"))]


for cls in (BatchNormAct2d, SyncBatchNormAct):
    lender(cls, objections=_norm_objections, inner=_lent_by_norm)
    NORMS[cls] = lambda norm: (norm, inner(norm, "act"))


def _mask(drop_path: DropPath, branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    if not drop_path.drop_prob:
        return None
    return ops.drop_path_mask(branch, drop_path.drop_prob, drop_path.scale_by_keep, dtype)


lender(DropPath, relies_on=("timm.layers.drop.drop_path",))
DROP_PATHS[DropPath] = _mask

GATES = {
    timm_activations.Sigmoid: "sigmoid",
    nn.Sigmoid: "sigmoid",
    timm_activations.HardSigmoid: "hard_sigmoid",
    nn.Hardsigmoid: "hard_sigmoid",
}
for cls in GATES:
    lender(cls)

# ---- layers ------------------------------------------------------------------------------------------------


@register
class FastBatchNormAct2d(Fast, BatchNormAct2d):
    """BatchNorm and activation as one op."""

    @classmethod
    def concerns(cls, block):
        return activation_name(block.act) != "identity"

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
        return run_conv_norm_act(x, self)


for cls in (ConvNormAct, FastConvNormAct):
    lender(cls, read_as=ConvNormAct)


def lent_conv_norm_act(name: str, layer: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """What a fast class has to say that it lends if it gives `layer` to `run_conv_norm_act`."""
    if not _is_conv_norm_act(layer):
        return []
    return [(name, layer), (f"{name}.conv", inner(layer, "conv")), (f"{name}.bn", inner(layer, "bn"))]


def run_conv_norm_act(
    x: torch.Tensor | Gated, layer: nn.Module, act: nn.Module | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`act(layer(x) + residual)`, as one op if layer is a ConvNormAct; any other runs itself."""
    if _is_conv_norm_act(layer) and layer.aa is None:
        return conv_norm_act(x, layer.conv, layer.bn, act, residual=residual)
    y = layer.aa(conv_norm_act(x, layer.conv, layer.bn)) if _is_conv_norm_act(layer) else layer(product(x))
    y = y if residual is None else y + residual
    return y if act is None else act(y)


def run_conv_norm_act_squeeze_excite(
    x: torch.Tensor, layer: nn.Module, squeeze_excite: nn.Module
) -> torch.Tensor | Gated:
    """`squeeze_excite(layer(x))`, likewise; for another `run_conv_norm_act`."""
    if _is_conv_norm_act(layer) and layer.aa is None:
        return conv_norm_act_squeeze_excite(x, layer.conv, layer.bn, None, squeeze_excite)
    return squeeze_excite(run_conv_norm_act(x, layer))


def _is_conv_norm_act(layer: nn.Module | None) -> bool:
    return type(layer) in (ConvNormAct, FastConvNormAct)


# ---- squeeze-and-excite ------------------------------------------------------------------------------------


def _parts_of_squeeze_excite(se: SEModule):
    if se.add_maxpool or type(inner(se, "bn")) is not nn.Identity:
        return None
    act, gate = inner(se, "act"), inner(se, "gate")
    return inner(se, "fc1"), activation_name(act), inner(se, "fc2"), GATES.get(type(gate))


lender(SEModule, inner=lambda se: [(name, inner(se, name)) for name in ("fc1", "bn", "act", "fc2", "gate")])
SQUEEZE_EXCITES[SEModule] = _parts_of_squeeze_excite


# ---- perceptrons -------------------------------------------------------------------------------------------

lender(Mlp)
PERCEPTRONS[Mlp] = lambda mlp: (
    inner(mlp, "fc1"),
    inner(mlp, "act"),
    inner(mlp, "fc2"),
    [inner(mlp, name) for name in ("drop1", "norm", "drop2")],
)
