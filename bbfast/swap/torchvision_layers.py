"""torchvision's layers: what they lend, and sequences of them that run as few ops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation, FrozenBatchNorm2d, SqueezeExcitation
from torchvision.ops.stochastic_depth import StochasticDepth

from bbfast import ops
from bbfast.swap._blocks import (
    CONVS,
    DROP_PATHS,
    NORMS,
    SQUEEZE_EXCITES,
    Gated,
    activation_name,
    add_branch,
    conv_norm_act,
    conv_norm_act_squeeze_excite,
    draws,
    inner,
    is_depthwise,
    lent_squeeze_excite,
    product,
)
from bbfast.swap._fast import Fast, register
from bbfast.swap._lending import lender
from bbfast.swap.torch_nn import FastSequential, FusedRuns, norm_act, runs_in

# ---- what torchvision's layers lend ------------------------------------------------------------------------


def _drop_objections(drop: StochasticDepth) -> list[str]:
    if drop.mode not in ("row", "batch") or not 0 <= drop.p <= 1:
        return [f"has mode={drop.mode!r} and p={drop.p}, with which it raises"]
    return []


def _mask(drop: StochasticDepth, branch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    if drop.p == 0:
        return None
    if drop.mode == "row":
        return ops.drop_path_mask(branch, drop.p, dtype=dtype)
    return ops.drop_path_mask(branch[:1], drop.p, dtype=dtype).repeat(len(branch))  # one draw for the whole batch


lender(StochasticDepth, objections=_drop_objections, relies_on=("torchvision.ops.stochastic_depth.stochastic_depth",))
DROP_PATHS[StochasticDepth] = _mask


class _FrozenStatistics(NamedTuple):
    """A FrozenBatchNorm2d in the words of a BatchNorm that is in eval mode for good."""

    weight: torch.Tensor
    bias: torch.Tensor
    running_mean: torch.Tensor
    running_var: torch.Tensor
    eps: float
    training: bool = False
    momentum: float = 0.0


def _frozen_objections(norm: FrozenBatchNorm2d) -> list[str]:
    return [f"has a {name} that requires gradients" for name, value in norm.named_buffers() if value.requires_grad]


# Under autocast its float32 factors make the result float32, where a BatchNorm's keeps the convolution's dtype.
lender(
    FrozenBatchNorm2d,
    objections=_frozen_objections,
    asked_once=True,
    ready=lambda norm: not torch.is_autocast_enabled(norm.weight.device.type),
)
NORMS[FrozenBatchNorm2d] = lambda norm: (
    _FrozenStatistics(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps),
    None,
)

GATES = {nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hard_sigmoid"}
for cls in (*GATES, nn.AdaptiveAvgPool2d):
    lender(cls)


def _read_squeeze_excite(block: SqueezeExcitation):
    """A module that is not what torchvision makes it has no name, so the block runs itself."""
    pool = inner(block, "avgpool")
    mean = type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))
    act = activation_name(inner(block, "activation")) if mean else None
    return inner(block, "fc1"), act, inner(block, "fc2"), GATES.get(type(inner(block, "scale_activation")))


lender(
    SqueezeExcitation,
    inner=lambda block: list(block._modules.items()),
    relies_on=("torchvision.ops.misc.SqueezeExcitation._scale",),
)
SQUEEZE_EXCITES[SqueezeExcitation] = _read_squeeze_excite


@register
class FastConv2dNormActivation(FusedRuns, Conv2dNormActivation):
    """Convolution, BatchNorm and activation as one op."""


# ---- sequences of layers -----------------------------------------------------------------------------------

# Classes, exactly, of modules that only run one layer after the other; blocks look into them.
SEQUENCES: set[type[nn.Module]] = set()


def sequence(cls: type[nn.Sequential], *, read_as: type[nn.Module] | None = None) -> None:
    """Says that blocks may run the layers in modules of this class without calling the module."""
    lender(cls, read_as=read_as)
    SEQUENCES.add(cls)


sequence(nn.Sequential)
sequence(FastSequential, read_as=nn.Sequential)
sequence(Conv2dNormActivation)
sequence(FastConv2dNormActivation, read_as=Conv2dNormActivation)


class Step(NamedTuple):
    """Layers that run as one op, or, without a norm, one layer that runs itself: then it is `act`."""

    conv: nn.Module | None
    norm: nn.Module | None
    act: nn.Module | None
    squeeze_excite: nn.Module | None = None


def steps_of(layers: nn.Module) -> list[Step]:
    """What `layers` does, in order."""
    return _steps_of(_opened("", layers))


def _steps_of(opened: list[tuple[str, nn.Module]]) -> list[Step]:
    steps: list[Step] = []
    for conv, norm, act in runs_in([layer for _, layer in opened if type(layer) not in SEQUENCES]):
        if norm is None and steps and _gives_means(steps[-1]) and lent_squeeze_excite("", act):
            steps[-1] = steps[-1]._replace(squeeze_excite=act)
        else:
            steps.append(Step(conv, norm, act))
    return steps


def lent_by_sequence(path: str, layers: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of what does not run when the steps of `layers` do: it, those inside it, and what ops read."""
    opened = _opened(path, layers)
    fused = {id(layer) for step in _steps_of(opened) if step.norm is not None for layer in step}
    return [(name, layer) for name, layer in opened if type(layer) in SEQUENCES or id(layer) in fused]


def _opened(path: str, layers: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of `layers` and everything in it, down to what is not a sequence."""
    found = [(path, layers)]
    if type(layers) in SEQUENCES:
        for name, layer in layers._modules.items():
            inside = f"{path}.{name}"
            found += _opened(inside, layer) if type(layer) in SEQUENCES else [(inside, layer)]
    return found


def _gives_means(step: Step) -> bool:
    return step.conv is not None and step.squeeze_excite is None and is_depthwise(step.conv)


def run_sequence(
    x: torch.Tensor,
    layers: nn.Module,
    *,
    shortcut: torch.Tensor | None = None,
    drop_path: nn.Module | None = None,
    act: nn.Module | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """`layers(x)`, or with a shortcut `act(shortcut + drop_path(layers(x)))`; `in_place` as in `conv_norm_act`."""
    *steps, last = steps_of(layers)
    for step in steps:
        x = _run(x, step)
    if shortcut is None:
        return product(_run(x, last))
    if _can_add(last) and not draws(drop_path):
        return conv_norm_act(x, last.conv, last.norm, act, residual=shortcut, in_place=in_place)
    branch = product(_run(x, last))
    y = add_branch(shortcut, branch, drop_path)
    y = y.to(branch.dtype) if in_place else y
    return y if act is None else act(y)


def _run(x: torch.Tensor | Gated, step: Step) -> torch.Tensor | Gated:
    if step.norm is None:
        return step.act(product(x))
    if step.conv is None:
        return norm_act(product(x), step.norm, step.act)
    return conv_norm_act_squeeze_excite(x, *step)


def _can_add(step: Step) -> bool:
    """Whether nothing comes between the norm and the sum."""
    if step.conv is None or step.act is not None or step.squeeze_excite is not None:
        return False
    _, own_act = NORMS[type(step.norm)](step.norm)
    return own_act is None


class AroundSequence(Fast):
    """Fast base of blocks whose branch is a sequence.

    Attributes:
        sequence: its name.
    """

    sequence: str

    @classmethod
    def concerns(cls, block: nn.Module) -> bool:
        return any(step.norm is not None for step in steps_of(inner(block, cls.sequence)))

    @classmethod
    def lent(cls, block: nn.Module):
        return [*super().lent(block), *lent_by_sequence(cls.sequence, inner(block, cls.sequence))]


def misplaced(block: nn.Module, convs: tuple[str, ...], norms: tuple[str, ...]) -> list[str]:
    """Objections to modules under these names that are known, but not as what they stand for here."""
    found = []
    for names, kind, known in ((convs, "convolution", CONVS), (norms, "norm", NORMS)):
        for name in names:
            if type(inner(block, name)) not in known:
                found.append(f"{name} holds {type(inner(block, name)).__name__}, not a {kind}")
    return found
