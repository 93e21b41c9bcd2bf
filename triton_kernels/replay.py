"""Launchers that remember: tensors like those of an earlier call get the same kernels launched at once.

Between its tensors and its kernels a launcher computes strides, keys, tiles and grids, and Triton binds and
specialises up to forty arguments per kernel. All of it depends on shapes, strides, dtypes and alignment alone, and
takes longer than many of these kernels run. So the second call of a kind is recorded: what it allocates, what it
launches with which tensors, and what it returns. From the third one on, that is repeated and nothing else.

A launcher that did more than allocate, view and launch (a copy of a tensor in other strides, a sum by torch) is not
remembered for such tensors, and runs as it is written. So are calls under `tuned.intercepting`, those on tensors
that are not plain CUDA tensors, and all in Triton's interpreter.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import tuned

ALLOCATIONS = (
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
)
TENSORS = (torch.Tensor, torch.nn.Parameter)
CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.Size)
# Addresses that are multiples of it are specialised by Triton.
ALIGNMENT = 16
# Beyond so many kinds of calls of one launcher (sizes that change from call to call) all are forgotten.
MOST_PLANS = 1024

# Whether anything is remembered at all. Who uses this package may say no.
enabled = True
_state = threading.local()
_recording = threading.Lock()


def launch_kernel(kernel, grid: tuple[int, ...], *args, **kwargs) -> None:
    """`kernel[grid](*args, **kwargs)`, as all launchers should say it, so that it can be recorded."""
    compiled = kernel[grid](*args, **kwargs)
    if (recorder := getattr(_state, "recorder", None)) is not None:
        recorder.launches.append((kernel, compiled, grid, args, kwargs))


def remembers(launcher: Callable) -> Callable:
    """Decorates a launcher, a function of positional tensors and constants, that may be repeated as above."""
    plans: dict[tuple, _Plan | str] = {}

    @functools.wraps(launcher)
    def call(*args, **kwargs):
        key = None if kwargs or getattr(_state, "recorder", None) is not None else _key(args)
        if key is None:
            return launcher(*args, **kwargs)
        plan = plans.get(key)
        if isinstance(plan, _Plan):
            return plan(args)
        if plan == "seen" and _recording.acquire(blocking=False):
            try:
                result, plan = _record(launcher, args)
            finally:
                _recording.release()
            plans[key] = plan or "as written"
            return result
        if plan is None:  # may yet compile, and may be the only one of its kind
            if len(plans) >= MOST_PLANS:
                plans.clear()
            plans[key] = "seen"
        return launcher(*args)

    call.plans = plans
    return call


def _is_eligible(x: object) -> bool:
    return type(x) in TENSORS and x.is_cuda


def _key(args: tuple) -> tuple | None:
    """All that what a launcher does may depend on; None where it should run as it is written."""
    if not enabled or not _is_eligible(args[0]) or tuned.is_intercepting():
        return None
    parts: list = [args[0].device.index, tuned.generation()]
    places: dict[int, int] = {}
    for value in args:
        kind = type(value)
        if kind in TENSORS:
            address = value.data_ptr()
            if address == 0:
                return None
            # Which tensors are one and the same counts, because launches tell tensors by their addresses.
            place = places.setdefault(address, len(places))
            parts.append((value.shape, value.stride(), value.dtype, address % ALIGNMENT, place))
        elif kind in CONSTANTS:
            parts += (kind, value)
        elif kind in (tuple, list) and all(type(item) in CONSTANTS for item in value):
            parts.append(tuple(value))
        else:
            return None
    return tuple(parts)


# ---- recording -------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Sees what torch does inside a launcher, and is told its launches.

    One at a time: entering a mode sets flags of the whole process, which threads would restore in the wrong order.
    """

    # The flags that torch.compile asks stay as they are for other threads.
    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    # Else the first call imports torch._dynamo, for a second, and the traceback of that keeps the tensors alive.
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __init__(self):
        super().__init__()
        self.buffers: list[torch.Tensor] = []  # kept, so that no two have the same address
        self.launches: list[tuple] = []
        self.repeatable = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.buffers.append(result)
        elif not func.is_view and not (isinstance(result, CONSTANTS) and not _holds_tensors(args)):
            self.repeatable = False  # it computes, or asks what is in a tensor
        return result


def _holds_tensors(values) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)


def _record(launcher: Callable, args: tuple) -> tuple[object, _Plan | None]:
    """The launcher's result, and how to get the next one like it, if it can be repeated."""
    recorder = _Recorder()
    _state.recorder = recorder
    try:
        with recorder:
            result = launcher(*args)
    finally:
        _state.recorder = None
    return result, _plan_of(recorder, args, result) if recorder.repeatable else None


@dataclass
class _Buffer:
    """An allocation as it is handed out: a view of it, where that is what a launcher returns."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _plan_of(recorder: _Recorder, args: tuple, result: object) -> _Plan | None:
    sources: dict[int, int] = {}  # of each address: the place of its tensor among arguments and buffers
    for place, value in enumerate((*args, *recorder.buffers)):
        if type(value) in TENSORS and value.data_ptr() != 0:
            sources.setdefault(value.data_ptr(), place)
    buffers = [_Buffer(buffer.shape, buffer.stride(), buffer.dtype) for buffer in recorder.buffers]

    outputs = []
    for output in result if isinstance(result, tuple) else (result,):
        place = None if output is None else sources.get(output.data_ptr(), -1)
        if place is not None and place < len(args):  # an argument handed through, which may have any shape by now
            return None
        if place is not None:
            buffer, allocated = buffers[place - len(args)], recorder.buffers[place - len(args)]
            if place in outputs or output.numel() != allocated.numel() or output.dtype != allocated.dtype:
                return None
            buffer.shape, buffer.stride = output.shape, output.stride()
        outputs.append(place)

    launches = [_launch_of(*launched, sources) for launched in recorder.launches]
    if None in launches:
        return None
    return _Plan(args[0].device, buffers, launches, outputs, isinstance(result, tuple))


def _launch_of(kernel, compiled, grid, args, kwargs, sources: dict[int, int]) -> tuple | None:
    """(what launches, its arguments, (index, source) of those that are tensors)."""
    if compiled is None:  # a hook of Triton's took the launch over
        return None
    names = [parameter.name for parameter in kernel.params]
    bound = dict(zip(names, args)) | kwargs
    values = [bound.get(parameter.name, parameter.default) for parameter in kernel.params]
    tensors = []
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            if value.data_ptr() not in sources:
                return None
            tensors.append((index, sources[value.data_ptr()]))
            values[index] = None
        elif isinstance(value, tuple) and _holds_tensors(value):
            return None
    return compiled[(*grid, 1, 1)[:3]], values, tensors


# ---- repeating -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What a recorded call did.

    Attributes:
        outputs: for each result the place of its tensor among arguments and buffers, or None.
        several: whether results come as a tuple.
    """

    device: torch.device
    buffers: Sequence[_Buffer]
    launches: Sequence[tuple]
    outputs: Sequence[int | None]
    several: bool

    def __call__(self, args: tuple):
        if torch.cuda.current_device() == self.device.index:
            return self.run(args)
        with torch.cuda.device(self.device):
            return self.run(args)

    def run(self, args: tuple):
        tensors = [*args]
        for buffer in self.buffers:
            tensors.append(torch.empty_strided(buffer.shape, buffer.stride, dtype=buffer.dtype, device=self.device))
        for run, arguments, places in self.launches:
            arguments = arguments.copy()
            for index, source in places:
                arguments[index] = tensors[source]
            run(*arguments)
        results = tuple(None if place is None else tensors[place] for place in self.outputs)
        return results if self.several else results[0]
