"""Folds BatchNorms into the convolutions before them, for inference."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from bbfast.nn import FoldedBatchNorm2d
from bbfast.swap import _fast, _fingerprint, _lending
from bbfast.swap._blocks import CONVS, NORMS
from bbfast.swap._engine import SwapError
from bbfast.swap._report import SwapReport, SwapRow


@dataclass(frozen=True)
class _Pair:
    """A norm that takes the result of a convolution and of nothing else."""

    path: str  # of the norm in the model
    parent: nn.Module  # of the norm
    name: str  # of the norm in its parent
    conv: nn.Module
    norm: nn.Module


@dataclass(frozen=True)
class _Foldable:
    pairs: Callable[[nn.Module], Iterable[tuple[str, str]]]
    relies_on: tuple[str, ...]


_foldable: dict[type[nn.Module], _Foldable] = {}


def foldable(
    cls: type[nn.Module],
    pairs: Callable[[nn.Module], Iterable[tuple[str, str]]],
    *,
    relies_on: tuple[str, ...] = (),
) -> None:
    """Says where blocks of exactly this class have a norm right behind a convolution.

    Fast classes need not be entered: their `lends` tells it.

    Args:
        pairs: takes a block, returns (convolution, norm) by their paths in it.
        relies_on: qualified names of the foreign functions that were read to know it, forward aside.
    """
    _foldable[cls] = _Foldable(pairs, relies_on)


def code_read() -> list[tuple[type[nn.Module], tuple[str, ...]]]:
    """For each class that was entered: itself, and the further functions."""
    return [(cls, entry.relies_on) for cls, entry in _foldable.items()]


def fold_bn_(model: nn.Module) -> SwapReport:
    """Puts the statistics of BatchNorms into the weights of the convolutions before them, in place; inference only.

    For bbfast's own models and for those whose blocks `bbfast.plan` knows, swapped or not. Each folded norm becomes a
    `bbfast.nn.FoldedBatchNorm2d`, which keeps its activation; its parameters and buffers leave the state_dict, and a
    convolution without bias gets one. That is not to be undone: to train again, or to restore the weights, build the
    model anew and load its checkpoint. bbfast's CPU kernels fold in each call as it is, so there this saves next to
    nothing; on a GPU it saves a pass over each map. A convolution then gives what its norm gave: who reads the maps
    between the two, by a hook or by calling the layers of a Sequential one by one, gets other values.

    Args:
        model: in eval mode, its BatchNorms too.

    Returns:
        A row for each BatchNorm2d in the model: folded, or skipped with the reason.

    Raises:
        TypeError: `model` is not a module.
        SwapError: the model or a BatchNorm of it is in train mode. Whatever is raised, the model is as it was.

    Numerics:
        Weights are scaled in float64 and rounded once to their dtype: outputs equal the unfolded model's within
        rounding, not to the bit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    training = [path for path, module in model.named_modules() if module.training and _is_batch_norm(module)]
    if model.training or training:
        culprit = "the model" if model.training else training[0]
        raise SwapError(f"fold_bn_ is for inference, and {culprit} is in train mode: call model.eval() first")
    notes = _fast.load_adapters()
    pairs, reasons = _survey(model)
    folded = [(pair, *_folded_weights(pair)) for pair in pairs]  # whatever fails, fails before the first change
    for pair, weight, bias in folded:
        _fold(pair, weight, bias)
    rows = [SwapRow(pair.path, _name(pair.norm), _name(pair.parent._modules[pair.name]), "folded") for pair in pairs]
    rows += [SwapRow(path, _name(model.get_submodule(path)), "", "skipped", reason) for path, reason in reasons.items()]
    return SwapReport(tuple(rows), notes=notes)


# ---- survey ----------------------------------------------------------------------------------------------


def _survey(model: nn.Module) -> tuple[list[_Pair], dict[str, str]]:
    """What can be folded; and for every other BatchNorm, by its path, why it cannot."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    weights = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    found: dict[int, _Pair] = {}
    reasons: dict[int, str] = {}
    for path, block in model.named_modules():
        for pair, objections in _pairs_in(path, block):
            if id(pair.norm) in found or id(pair.norm) in reasons:  # two blocks that know it agree on it
                continue
            if not objections and max(uses[id(pair.norm)], uses[id(pair.conv)], weights[id(pair.conv.weight)]) > 1:
                objections = ["the convolution, its weight or the norm is used at several places"]
            if objections:
                reasons[id(pair.norm)] = "; ".join(objections)
            else:
                found[id(pair.norm)] = pair
    skipped = {
        path: reasons.get(id(module), "no convolution is known whose result it takes")
        for path, module in model.named_modules()
        if _is_batch_norm(module) and id(module) not in found
    }
    return list(found.values()), skipped


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _pairs_in(path: str, block: nn.Module) -> Iterator[tuple[_Pair, list[str]]]:
    """The pairs of one block, each with what stands against folding it."""
    names, objections = _names_in(block)
    for conv_name, norm_name in names:
        conv, norm = block.get_submodule(conv_name), block.get_submodule(norm_name)
        if type(norm) is FoldedBatchNorm2d:
            continue
        parent, _, name = norm_name.rpartition(".")
        pair = _Pair(f"{path}.{norm_name}".lstrip("."), block.get_submodule(parent), name, conv, norm)
        yield pair, objections or _objections(conv_name, norm_name, pair)


def _names_in(block: nn.Module) -> tuple[list[tuple[str, str]], list[str]]:
    """(convolution, norm) by their paths in the block, and why the block's class is not to be trusted."""
    cls = type(block)
    if cls in _foldable:
        entry = _foldable[cls]
        replaced = _fingerprint.replaced_methods(block, ("forward", "forward_features"))
        reasons = [f"its block {reason}" for reason in replaced]
        return list(entry.pairs(block)), reasons or _fingerprint.objections_to_code(cls, entry.relies_on)
    fast = cls if _fast.is_fast(cls) else _fast.fast_class(cls)
    if fast is None or not fast.concerns(block):
        return [], []
    lent = [(name, module) for name, module in fast.lent(block) if module is not None]
    names = [
        (conv_name, norm_name)
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(lent)
        if type(conv) in CONVS and type(norm) in NORMS and type(norm) is not nn.Identity
    ]
    if replaced := _fingerprint.replaced_methods(block, ("forward", *fast.methods_read)):
        return names, [f"its block {reason}" for reason in replaced]
    return names, _fingerprint.objections_to_code(_fast.foreign_class(fast), fast.relies_on)


def _objections(conv_name: str, norm_name: str, pair: _Pair) -> list[str]:
    reasons = _lending.objections_to(conv_name, pair.conv) + _lending.objections_to(norm_name, pair.norm)
    if reasons:
        return reasons
    if type(pair.conv) not in CONVS or type(pair.norm) not in NORMS:
        return [f"{conv_name} and {norm_name} are not a convolution and a BatchNorm"]
    if pair.norm.running_mean is None:
        return [f"{norm_name} keeps no running statistics"]
    return []


# ---- folding ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _folded_weights(pair: _Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution's weight and bias with the norm in them."""
    conv, norm = pair.conv, pair.norm
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    mean = norm.running_mean.double() if conv.bias is None else norm.running_mean.double() - conv.bias.double()
    bias = -mean * scale if norm.bias is None else norm.bias.double() - mean * scale
    weight = conv.weight.double() * scale.view(-1, 1, 1, 1)
    return weight.to(conv.weight), bias.to(conv.weight)


def _fold(pair: _Pair, weight: torch.Tensor, bias: torch.Tensor) -> None:
    learns = pair.conv.weight.requires_grad
    pair.conv.weight = nn.Parameter(weight, requires_grad=learns)
    pair.conv.bias = nn.Parameter(bias, requires_grad=learns)
    _, act = NORMS[type(pair.norm)](pair.norm)
    folded = FoldedBatchNorm2d(pair.norm.num_features, "identity" if act is None else act)
    setattr(pair.parent, pair.name, folded.eval())


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
