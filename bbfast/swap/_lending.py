"""Inner modules that lend parameters and settings to a fused op instead of running themselves.

A module can lend if its class is one whose forward was read (exactly that class: a subclass may do anything), and if
nothing hangs on its call: no hook, no forward of its own, no parametrization. An adapter tells what its library's
modules mean in the words of the ops: `conv`, `norm`, `activation`, `drop_path`, `squeeze_excite`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from bbfast.nn.linear_act import has_global_hooks
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

    @property
    def is_asked_nothing(self) -> bool:
        """Whether a module of the class can lend in every call unless something hangs on its own."""
        asked_objections = None if self.asked_once else self.objections
        return not (asked_objections or self.inner or self.ready or self.methods_read)

    def can_lend_now(self, module: nn.Module) -> bool:
        """Whether a module of the class can, its inner modules aside."""
        if self.methods_read and _fingerprint.replaced_methods(module, self.methods_read):
            return False
        if self.ready is not None and not self.ready(module):
            return False
        return self.objections is None or self.asked_once or not self.objections(module)


_lenders: dict[type[nn.Module], Lender] = {}
_asked_nothing: set[type[nn.Module]] = set()  # those of them that are


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
    entry = Lender(objections, asked_once, inner, read_as or cls, relies_on, ready, methods)
    _lenders[cls] = entry
    (_asked_nothing.add if entry.is_asked_nothing else _asked_nothing.discard)(cls)
    if cls.__module__.startswith("torch."):
        _fingerprint.remember_torch_forward(cls)


def code_read() -> list[tuple[type[nn.Module], tuple[str, ...]]]:
    """For each class that can lend: the one whose forward was read, and the further functions."""
    return [(entry.read_as, entry.relies_on) for entry in _lenders.values()]


# ---- in each call ----------------------------------------------------------------------------------------

# This is most of what a swapped block costs beside its ops. So it reads `module.__dict__`, as attributes take twice as
# long where modules are of many classes, and calls nothing where there is nothing to ask.


def can_lend(modules: Iterable[nn.Module | None]) -> bool:
    """Whether all of them may still be bypassed: what can change after a swap, asked in each call."""
    if has_global_hooks():
        return False
    waiting = [module for module in modules if module is not None]
    for module in waiting:  # grows by their inner modules
        cls = type(module)
        if cls in _asked_nothing:
            continue
        entry = _lenders.get(cls)
        if entry is None or not entry.can_lend_now(module):
            return False
        if entry.inner is not None:
            waiting += [inner for _, inner in entry.inner(module) if inner is not None]
    return not have_own_call(waiting)


def have_own_call(modules: Iterable[nn.Module]) -> bool:
    """Whether for one of these modules itself something beside its class's forward runs when it is called."""
    for module in modules:
        state = module.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            return True
        if state["_backward_hooks"] or state["_backward_pre_hooks"]:
            return True
    return torch.compiler.is_compiling() and any(_forward_is_replaced(module) for module in modules)


def _forward_is_replaced(module: nn.Module) -> bool:
    """For dynamo, which makes no guard of `"forward" in module.__dict__` and would miss one that comes later."""
    return not inspect.ismethod(module.forward)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything hangs on the call of `module`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
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
