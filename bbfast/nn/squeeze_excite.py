"""Squeeze-and-excite, given the squeezed means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bbfast.ops._common import overridable
from bbfast.reference.activation import ACTIVATIONS, activation

GATES = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}


def squeeze_excite_gate(
    squeezed: torch.Tensor, conv_reduce: nn.Conv2d, conv_expand: nn.Conv2d, *, act: str, gate: str
) -> torch.Tensor:
    """`gate(conv_expand(act(conv_reduce(squeezed))))`, a factor per sample and channel, `[N, C]`.

    The 1x1 convolutions of a 1x1 map run as matrix products: on the CPU a convolution spends most of its time
    reordering the weight.

    Args:
        squeezed: means of a map over H and W, `[N, C]`.
        conv_reduce, conv_expand: 1x1 convolutions C to R and R to C, no groups.
        act: the activation between them, as in `bbfast.ops`.
        gate: sigmoid or hard_sigmoid.

    Raises:
        ValueError: a convolution that is not 1x1, shapes that do not fit, or an unknown act or gate.
    """
    for name, conv in (("conv_reduce", conv_reduce), ("conv_expand", conv_expand)):
        if conv.kernel_size != (1, 1) or conv.groups != 1:
            raise ValueError(f"{name} must be a 1x1 convolution without groups, got {conv}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is not known; allowed: {', '.join(ACTIVATIONS)}")
    if gate not in GATES:
        raise ValueError(f"gate={gate!r} is not known; allowed: {', '.join(GATES)}")
    reduce, expand = (conv_reduce.weight, conv_reduce.bias), (conv_expand.weight, conv_expand.bias)
    return _gate(squeezed, reduce, expand, act, gate)


def apply_squeeze_excite(
    x: torch.Tensor,
    squeezed: torch.Tensor,
    conv_reduce: nn.Conv2d,
    conv_expand: nn.Conv2d,
    *,
    act: str,
    gate: str,
    inplace: bool = False,
) -> torch.Tensor:
    """`x` [N, C, H, W] times the `squeeze_excite_gate` of `squeezed`, its means over H and W, `[N, C]`.

    Args:
        inplace: overwrite x where no gradients are recorded.

    Raises:
        ValueError: as for `squeeze_excite_gate`.
    """
    return apply_gate(x, squeeze_excite_gate(squeezed, conv_reduce, conv_expand, act=act, gate=gate), inplace)


@overridable
def apply_gate(x: torch.Tensor, gate: torch.Tensor, inplace: bool = False) -> torch.Tensor:
    """`x` [N, C, H, W] times `gate` [N, C]; x is overwritten where `inplace` and no gradients are recorded."""
    if gate.shape != x.shape[:2]:
        shape = tuple(x.shape[:2])
        raise ValueError(f"gate and squeezed must have shape {shape}, [N, C] of x, got {tuple(gate.shape)}")
    factor = gate[:, :, None, None]
    if inplace and not torch.is_grad_enabled() and factor.dtype == x.dtype:
        return x.mul_(factor)
    return x * factor


@overridable
def _gate(squeezed, reduce, expand, act, gate) -> torch.Tensor:
    """The same with each convolution as its (weight, bias)."""
    hidden = activation(_linear("conv_reduce", *reduce, squeezed), act)
    return GATES[gate](_linear("conv_expand", *expand, hidden))


def _linear(name: str, weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """What the 1x1 convolution called `name` does to a 1x1 map whose channels are `x` [N, C]."""
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"{name} takes {weight.shape[1]} channels, got {x.shape[1]}")
    return F.linear(x, weight.flatten(1), bias)
