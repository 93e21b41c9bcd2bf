"""Ops in inference on a GPU that do at once what a like call did before; see bbfast/triton_kernels/replay.py.

What an op does between arguments and kernels (checks, torch's dispatcher, the choice of a backend, the launcher)
depends on few things: `_key` names them all. Where somebody looks on or takes part, each call runs as it is written:
gradients, torch.compile and other tracers, modes of torch's dispatcher, transforms, profilers (which name ops).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

from bbfast import dispatch
from bbfast.ops import _common
from bbfast.triton_kernels import replay

# Dispatch keys that a thread includes where nobody looks on; torch.inference_mode takes one of them away.
_ORDINARY = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
).raw_repr()


def remembers_inference(function: Callable) -> Callable:
    """Decorates the public function of an op, whose first argument is a tensor."""
    memory = replay.Memory(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        # Dynamo, which traces this, goes no further than the first question.
        if torch.compiler.is_compiling() or not args or not replay.may_remember(args[0]):
            return function(*args, **kwargs)
        key = _key(args, kwargs)
        return function(*args, **kwargs) if key is None else memory.call(key, args, kwargs)

    call.plans = memory.plans
    return call


def _key(args: tuple, kwargs: dict) -> tuple | None:
    """All that what an op does may depend on, but the values in tensors; None where it should run as it is written."""
    if _is_watched() or dispatch.wants_plain_torch():
        return None
    values = (*args, *kwargs.values())
    if torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
        return None
    if (parts := replay.key_of(values)) is None:
        return None
    parts += (*kwargs, os.environ.get("BBFAST_BACKEND"), _common.autocast_dtype(args[0].device.type))
    return tuple(parts)


def _is_watched() -> bool:
    """Whether calls of torch's operators are traced, transformed or counted in this thread."""
    included = torch._C._dispatch_tls_local_include_set().raw_repr()
    return bool(included & ~_ORDINARY) or torch.autograd._profiler_enabled()
