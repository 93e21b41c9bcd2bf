"""Ops in inference on a GPU that do at once what a like call did before; see bbfast/triton_kernels/replay.py.

What an op does between arguments and kernels (checks, torch's dispatcher, the choice of a backend, the launcher)
depends on few things: csrc/call_key.cpp names them all. Where somebody looks on or takes part, each call runs as it
is written: gradients, torch.compile and other tracers, modes of torch's dispatcher, transforms, profilers (which
name ops).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bbfast import dispatch, extension
from bbfast.triton_kernels import replay, tuned


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
    """All that what an op does may depend on, but the values in tensors; None where it should run as it is written.

    None, too, where the extension was not built: in Python it would take as long as half of what it saves.
    """
    if dispatch.wants_plain_torch() or (module := extension.load()) is None:
        return None
    return module.call_key(args, kwargs, tuned.generation())
