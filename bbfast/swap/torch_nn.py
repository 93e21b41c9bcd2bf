"""torch's own layers: what they lend, and runs of convolution, BatchNorm and activation in nn.Sequential."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bbfast import ops
from bbfast.nn import FoldedBatchNorm2d
from bbfast.nn._batch_norm import batch_norm_arguments
from bbfast.swap._blocks import ACTIVATIONS, CONVS, NORMS, activation_name, conv_norm_act, lent_activation
from bbfast.swap._fast import Fast, register
from bbfast.swap._lending import lender


def conv_objections(conv: nn.Conv2d) -> list[str]:
    """Why this convolution cannot run in an op."""
    if conv.padding_mode != "zeros":
        return [f"has padding_mode={conv.padding_mode!r}; ops pad with zeros only"]
    return []


lender(nn.Conv2d, objections=conv_objections)
CONVS[nn.Conv2d] = lambda conv: None

for cls in (nn.BatchNorm2d, nn.SyncBatchNorm):
    lender(cls)
    NORMS[cls] = lambda bn: (bn, None)

lender(nn.Identity)
NORMS[nn.Identity] = lambda norm: (None, None)


def _read_folded(norm: FoldedBatchNorm2d) -> tuple[None, nn.Module | str]:
    norm.check_inference()
    return None, None if norm.act == "identity" else norm.act


lender(FoldedBatchNorm2d, inner=lambda norm: lent_activation("act", norm._modules.get("act")))
NORMS[FoldedBatchNorm2d] = _read_folded

for cls, name in (
    (nn.Identity, "identity"),
    (nn.ReLU, "relu"),
    (nn.ReLU6, "relu6"),
    (nn.Hardswish, "hardswish"),
    (nn.SiLU, "silu"),
):
    lender(cls)
    ACTIVATIONS[cls] = lambda act, name=name: name

lender(nn.GELU)
ACTIVATIONS[nn.GELU] = lambda act: "gelu" if act.approximate == "none" else None

lender(nn.Linear)
lender(nn.LayerNorm)
lender(nn.Dropout)  # to who looks whether it would drop anything
lender(nn.Sequential)  # its layers are asked one by one


# ---- runs ------------------------------------------------------------------------------------------------


Run = tuple[nn.Module | None, nn.Module | None, nn.Module | None]


def runs(layers: nn.Sequential) -> list[Run]:
    """The layers as (convolution, norm, activation) where such follow each other, others as (None, None, layer)."""
    return runs_in(layers._modules.values())


def runs_in(layers: Iterable[nn.Module]) -> list[Run]:
    """`runs` of layers that need not be in one module."""
    layers = [*layers, None, None]  # so that every layer has two behind it
    found, at = [], 0
    while at < len(layers) - 2:
        conv, norm, act = run = _run_at_start_of(*layers[at : at + 3])
        found.append(run)
        at += (conv is not None) + (norm is not None) + (act is not None)
    return found


def _run_at_start_of(first: nn.Module, second: nn.Module | None, third: nn.Module | None) -> Run:
    """(convolution or None, norm, activation or None) that fuse, or (None, None, first) if it stands alone."""
    conv, norm, act = (first, second, third) if type(first) in CONVS else (None, first, second)
    if type(norm) not in NORMS or type(norm) is nn.Identity:
        return None, None, first
    bn, own_act = NORMS[type(norm)](norm)
    if own_act is not None or type(act) not in ACTIVATIONS or activation_name(act) is None:
        act = None
    if conv is None and (bn is None or act is None or own_act is not None):  # nothing to fuse with
        return None, None, first
    return conv, norm, act


class FusedRuns(Fast):
    """Fast base of nn.Sequential and its subclasses that leave forward alone: each run is one op."""

    leaf = False  # it may hold whole stages, whose outputs are asked for

    @classmethod
    def concerns(cls, block: nn.Sequential) -> bool:
        return any(norm is not None for _, norm, _ in runs(block))

    @classmethod
    def lent(cls, block: nn.Sequential):
        names = {id(layer): name for name, layer in block._modules.items()}
        fused = [run for run in runs(block) if run[1] is not None]
        return [(names[id(layer)], layer) for run in fused for layer in run if layer is not None]

    def fused_forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm, act in runs(self):
            if norm is None:
                x = act(x)
            elif conv is None:
                x = norm_act(x, norm, act)
            else:
                x = conv_norm_act(x, conv, norm, act)
        return x


def norm_act(x: torch.Tensor, norm: nn.Module, act: nn.Module) -> torch.Tensor:
    """`act(norm(x))`, as one op where both are known and norm has no activation of its own."""
    bn, own_act = NORMS[type(norm)](norm)
    known = bn is not None and activation_name(own_act) == "identity" and activation_name(act) is not None
    if not known or (isinstance(bn, nn.SyncBatchNorm) and bn.training):
        return act(norm(x))
    statistics, settings = batch_norm_arguments(bn)
    return ops.batch_norm_act(x, *statistics, act=activation_name(act), **settings)


@register
class FastSequential(FusedRuns, nn.Sequential):
    """nn.Sequential whose runs of convolution, BatchNorm and activation are one op each."""
