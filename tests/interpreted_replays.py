"""Repeats calls on the CPU too: kernels that Triton interprets are recorded, and interpreted again when repeated."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter

from bbfast.triton_kernels import replay


class Interpreted:
    """Stands for a compiled kernel."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        names = list(inspect.signature(self.kernel.fn).parameters)
        return lambda *values: self.kernel[grid](**dict(zip(names, values)))


def repeat_interpreted(monkeypatch) -> None:
    """What `replay` does with tensors on a GPU it does with those on the CPU from now on."""
    launch_of = replay._launch_of

    def interpreted_launch_of(kernel, compiled, *args):
        assert compiled is None, "Triton does not interpret here"
        parameters = inspect.signature(kernel.fn).parameters.values()
        described = [SimpleNamespace(name=p.name, default=p.default) for p in parameters]
        return launch_of(SimpleNamespace(params=described), Interpreted(kernel), *args)

    run = interpreter.GridExecutor.__call__

    def run_unseen(*args, **kwargs):  # the interpreter calls torch, which a GPU's kernel does not
        with _disable_current_modes():
            return run(*args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run_unseen)
    monkeypatch.setattr(replay, "_launch_of", interpreted_launch_of)
    monkeypatch.setattr(replay, "_is_eligible", lambda x: type(x) in replay.TENSORS and x.is_cpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # as a CPU tensor's device has no index
