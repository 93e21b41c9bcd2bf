"""Functions that remember: tensors like those of an earlier call get the same kernels launched at once.

Between its tensors and its kernels a launcher computes strides, keys, tiles and grids, and Triton binds and
specialises up to forty arguments per kernel; an op around it checks what it is given and chooses a backend. All of it
depends on shapes, strides, dtypes and alignment alone, and takes longer than many of these kernels run. So the second
call of a kind is recorded: what it allocates, what it launches with which tensors, and what it returns. From the third
one on, that is repeated and nothing else.

A function that did more than allocate, view and launch (a copy of a tensor in other strides, a sum by torch) is not
remembered for such tensors, and runs as it is written. So are calls under `tuned.intercepting`, those on tensors
that are not plain CUDA tensors, and all in Triton's interpreter.

Launchers are decorated with `remembers`. Who calls them through torch.library, and does more besides, may keep a
`Memory` of that whole: it says in a key what a call may depend on, and in `INSIDE` what an operator stands for.
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
# What runs inside an operator of torch.library, by the operator: recording looks in there.
INSIDE: dict[torch._ops.OpOverload, Callable] = {}
_state = threading.local()
_recording = threading.Lock()


def launch_kernel(kernel, grid: tuple[int, ...], *args, **kwargs) -> None:
    """`kernel[grid](*args, **kwargs)`, as all launchers should say it, so that it can be recorded."""
    compiled = kernel[grid](*args, **kwargs)
    if (recorder := getattr(_state, "recorder", None)) is not None:
        recorder.launches.append((kernel, compiled, grid, args, kwargs))


def repeat_too(effect: Callable, *args) -> None:
    """Has `effect(*args)` called in each repetition of the call that is being recorded in this thread, if one is."""
    if (recorder := getattr(_state, "recorder", None)) is not None:
        recorder.effects.append((effect, args))


def run_as_written() -> None:
    """Keeps the call that is being recorded in this thread, if one is, from being repeated: not all of it was seen."""
    if (recorder := getattr(_state, "recorder", None)) is not None:
        recorder.repeatable = False


def remembers(launcher: Callable) -> Callable:
    """Decorates a launcher, a function of positional tensors and constants, that may be repeated as above."""
    memory = Memory(launcher)

    @functools.wraps(launcher)
    def call(*args, **kwargs):
        key = None if kwargs else _key(args)
        return launcher(*args, **kwargs) if key is None else memory.call(key, args)

    call.plans = memory.plans
    return call


class Memory:
    """What `function` did in earlier calls, by a key that holds all it may depend on but the values in tensors.

    Attributes:
        plans: for each key how to repeat such a call, "seen" (once, yet to be recorded) or "as written".
    """

    def __init__(self, function: Callable):
        self._function = function
        self.plans: dict[tuple, _Plan | str] = {}

    def call(self, key: tuple, args: tuple, kwargs: dict | None = None):
        """`function(*args, **kwargs)`; the order of kwargs belongs into the key."""
        plan = self.plans.get(key)
        if isinstance(plan, _Plan):
            return plan((*args, *kwargs.values()) if kwargs else args)
        if plan == "seen" and _recording.acquire(blocking=False):
            try:
                result, plan = _record(self._function, args, kwargs or {})
            finally:
                _recording.release()
            self.plans[key] = plan or "as written"
            return result
        if plan is None:  # may yet compile, and may be the only one of its kind
            if len(self.plans) >= MOST_PLANS:
                self.plans.clear()
            self.plans[key] = "seen"
        return self._function(*args, **(kwargs or {}))


def may_remember(x: object) -> bool:
    """Whether calls on `x` are remembered at all now; torch.compile is not asked here."""
    return _is_eligible(x) and enabled and getattr(_state, "recorder", None) is None and not tuned.is_intercepting()


def _is_eligible(x: object) -> bool:
    return type(x) in TENSORS and x.is_cuda


def _key(args: tuple) -> tuple | None:
    """All that what a launcher does may depend on; None where it should run as it is written."""
    if not may_remember(args[0]):
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
        self.effects: list[tuple] = []
        self.repeatable = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (inside := INSIDE.get(func)) is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATIONS:
            self.buffers.append(result)
        elif not func.is_view and not (isinstance(result, CONSTANTS) and not _holds_tensors(args)):
            self.repeatable = False  # it computes, or asks what is in a tensor
        return result


def _holds_tensors(values) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)


def _record(function: Callable, args: tuple, kwargs: dict) -> tuple[object, _Plan | None]:
    """The function's result, and how to get the next one like it, if it can be repeated."""
    recorder = _Recorder()
    _state.recorder = recorder
    try:
        with recorder:
            result = function(*args, **kwargs)
    finally:
        _state.recorder = None
    values = (*args, *kwargs.values())
    return result, _plan_of(recorder, values, result) if recorder.repeatable else None


@dataclass
class _Buffer:
    """An allocation as it is handed out: a view of it, where that is what a launcher returns."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _plan_of(recorder: _Recorder, values: tuple, result: object) -> _Plan | None:
    sources: dict[int, int] = {}  # of each address: the place of its tensor among arguments and buffers
    for place, value in enumerate((*values, *recorder.buffers)):
        if type(value) in TENSORS and value.data_ptr() != 0:
            sources.setdefault(value.data_ptr(), place)
    buffers = [_Buffer(buffer.shape, buffer.stride(), buffer.dtype) for buffer in recorder.buffers]

    outputs: list[int | None] = []
    for output in result if isinstance(result, tuple) else (result,):
        if output is None:
            outputs.append(None)
            continue
        if (handed := next((place for place, value in enumerate(values) if value is output), None)) is not None:
            outputs.append(handed)
            continue
        place = sources.get(output.data_ptr(), -1)
        if place < len(values) or place in outputs:  # a view of an argument, or a second one of a buffer
            return None
        buffer, allocated = buffers[place - len(values)], recorder.buffers[place - len(values)]
        if output.numel() != allocated.numel() or output.dtype != allocated.dtype:
            return None
        buffer.shape, buffer.stride = output.shape, output.stride()
        outputs.append(place)

    launches = [_launch_of(*launched, sources) for launched in recorder.launches]
    if None in launches:
        return None
    return _Plan(values[0].device, buffers, launches, recorder.effects, outputs, isinstance(result, tuple))


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
    effects: Sequence[tuple]
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
        for effect, arguments in self.effects:
            effect(*arguments)
        results = tuple(None if place is None else tensors[place] for place in self.outputs)
        return results if self.several else results[0]
