"""Inner modules that lend parameters and settings to a fused op instead of running themselves.

A module can lend if its class is one whose forward was read (exactly that class: a subclass may do anything), and if
nothing hangs on its call: no hook, no forward of its own, no parametrization. An adapter tells what its library's
modules mean in the words of the ops: `conv`, `norm`, `activation`, `drop_path`, `squeeze_excite`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from bbfast.swap import _fingerprint


@dataclass(frozen=True)
class Lender:
    """A class of modules that can lend.

    Attributes:
        objections: takes such a module, returns why this one cannot lend all the same; None for a class without any.
        asked_once: whether objections are asked before a swap only, since it takes long, and not in each call.
        inner: takes such a module, returns (name, module) of its own inner modules that do not run either; None for
            a class that has none.
        read_as: the class whose forward was read.
        relies_on: qualified names of further foreign functions that were read beside it.
        ready: takes such a module, returns whether it can lend in this call, whatever a plan says; None: always.
        methods_read: names of the module's methods among relies_on.
    """

    objections: Callable[[nn.Module], list[str]] | None
    asked_once: bool
    inner: Callable[[nn.Module], Sequence[tuple[str, nn.Module | None]]] | None
    read_as: type[nn.Module]
    relies_on: tuple[str, ...]
    ready: Callable[[nn.Module], bool] | None
    methods_read: tuple[str, ...]


_lenders: dict[type[nn.Module], Lender] = {}


def lender(
    cls: type[nn.Module],
    *,
    objections: Callable[[nn.Module], list[str]] | None = None,
    asked_once: bool = False,
    inner: Callable[[nn.Module], Sequence[tuple[str, nn.Module | None]]] | None = None,
    read_as: type[nn.Module] | None = None,
    relies_on: tuple[str, ...] = (),
    ready: Callable[[nn.Module], bool] | None = None,
) -> None:
    """Says that modules of exactly this class can lend; see `Lender`."""
    methods = _fingerprint.methods_read(cls, relies_on)
    _lenders[cls] = Lender(objections, asked_once, inner, read_as or cls, relies_on, ready, methods)
    if cls.__module__.startswith("torch."):
        _fingerprint.remember_torch_forward(cls)


def code_read() -> list[tuple[type[nn.Module], tuple[str, ...]]]:
    """For each class that can lend: the one whose forward was read, and the further functions."""
    return [(entry.read_as, entry.relies_on) for entry in _lenders.values()]


# ---- in each call ----------------------------------------------------------------------------------------


def can_lend(modules: Iterable[nn.Module | None]) -> bool:
    """Whether all of them may still be bypassed: what can change after a swap, asked in each call."""
    return not _has_global_hooks() and all(module is None or _can_lend(module) for module in modules)


def _can_lend(module: nn.Module) -> bool:
    entry = _lenders.get(type(module))
    if entry is None or has_own_call(module) or _fingerprint.replaced_methods(module, entry.methods_read):
        return False
    if not (entry.ready is None or entry.ready(module)):
        return False
    if entry.objections is not None and not entry.asked_once and entry.objections(module):
        return False
    return entry.inner is None or all(inner is None or _can_lend(inner) for _, inner in entry.inner(module))


def has_own_call(module: nn.Module) -> bool:
    """Whether something of this one module's, beside its class's forward, runs when it is called."""
    return has_hooks(module) or "forward" in module.__dict__


def has_hooks(module: nn.Module) -> bool:
    """Whether anything hangs on the call of `module`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _has_global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


# ---- before a swap ---------------------------------------------------------------------------------------


def objections_to(path: str, module: nn.Module | None) -> list[str]:
    """Why `module`, which its block knows as `path`, must run itself; empty if it can lend."""
    if module is None:
        return []
    if parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)
        return [f"{path} has a parametrized {names}, which is computed when {path} runs"]
    if has_hooks(module):
        return [f"{path} has {_describe_hooks(module)}, which the fused op would not run"]
    if "forward" in module.__dict__:
        return [f"{path} has a forward of its own (somebody replaced it on the instance)"]
    entry = _lenders.get(type(module))
    if entry is None:
        return [_describe_stranger(path, module)]
    reasons = [f"{path} {reason}" for reason in _fingerprint.replaced_methods(module, entry.methods_read)]
    reasons += _fingerprint.objections_to_code(entry.read_as, entry.relies_on)
    reasons += [] if entry.objections is None else [f"{path} {reason}" for reason in entry.objections(module)]
    reasons += [f"{path}.{reason}" for reason in tensor_objections(module)]
    for name, inner in () if entry.inner is None else entry.inner(module):
        reasons += objections_to(f"{path}.{name}", inner)
    return reasons


def tensor_objections(module: nn.Module) -> list[str]:
    """Why a module's own parameters cannot be given to an op."""
    reasons = []
    for name, value in module.named_parameters(recurse=False):
        if value.is_meta:
            reasons.append(f"{name} is on the meta device, without values")
        elif type(value) not in (nn.Parameter, torch.Tensor):
            reasons.append(f"{name} is a {type(value).__name__}, not a plain tensor")
        elif not value.is_floating_point():
            reasons.append(f"{name} has dtype {value.dtype}, which is not a floating-point type")
    return reasons


def _describe_hooks(module: nn.Module) -> str:
    pre_hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
    if "WeightNorm" in pre_hooks:
        return "weight_norm (a forward pre-hook)"
    if "SpectralNorm" in pre_hooks:
        return "spectral_norm (a forward pre-hook)"
    kinds = {
        "forward hooks": module._forward_hooks,
        "forward pre-hooks": module._forward_pre_hooks,
        "backward hooks": module._backward_hooks,
        "backward pre-hooks": module._backward_pre_hooks,
    }
    return " and ".join(kind for kind, hooks in kinds.items() if hooks)


def _describe_stranger(path: str, module: nn.Module) -> str:
    cls = type(module)
    origin = cls.__module__
    if ".lora" in origin or origin.startswith("peft."):
        return f"{path} is wrapped by an adapter of weights ({origin}.{cls.__name__})"
    if "quant" in origin:
        return f"{path} is quantised ({origin}.{cls.__name__})"
    known = [base for base in cls.__mro__[1:] if base in _lenders]
    if known:
        return f"{path} is a {cls.__name__}, a subclass of {known[0].__name__}; only exact classes are known"
    return f"{path} is a {origin}.{cls.__name__}, which no fused op knows"
