"""Records what launchers launch, on fake tensors and a stand-in for a GPU: nothing runs and no GPU is needed."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bbfast.triton_kernels import (
    add_layer_norm,
    batch_norm_act,
    batch_statistics,
    depthwise_conv_bn_act,
    drop_path_add,
    mlp,
    pointwise,
    window_attention,
)

MODULES = (
    *(add_layer_norm, batch_norm_act, batch_statistics, depthwise_conv_bn_act),
    *(drop_path_add, mlp, pointwise, window_attention),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRITON_TYPES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int32: "i32", torch.int64: "i64"}

COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg")

# An H100's. Launchers ask how many there are when they share out the work.
MULTIPROCESSORS = 132
# What the stand-in is called unless told otherwise: no launch configurations are tuned for it.
NO_NAME = "stand-in for a GPU"


@dataclass(frozen=True)
class Argument:
    """What a launch knows of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Launch:
    """One kernel launch as a launcher asked for it. Equal launches are equal values; another process can take one.

    Attributes:
        module, name: where the kernel is found.
        programs: of the whole grid.
        arguments: (name, value) of each parameter, tensors as Argument.
        options: (name, value) of the compiler's options.
    """

    module: str
    name: str
    programs: int
    arguments: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]

    @cached_property
    def values(self) -> dict:
        return dict(self.arguments)

    @property
    def tensors(self) -> dict[str, Argument]:
        return {name: value for name, value in self.arguments if isinstance(value, Argument)}

    @cached_property
    def compilation(self) -> str:
        """Equal for launches that compile to the same code."""
        return repr((self.module, self.name, self._specialised(), self.options))

    def source(self) -> ASTSource:
        """What Triton compiles for these arguments."""
        return ASTSource(getattr(importlib.import_module(self.module), self.name), *self._specialised())

    def _specialised(self) -> tuple[dict, dict, dict]:
        """Signature, constants and attributes by Triton's own rules: 1, multiples of 16 and None are special."""
        constants, attributes = {}, {}

        def kind(value, path, specialised=True):
            if isinstance(value, Argument):
                attributes[path] = [["tt.divisibility", 16]]  # allocations are aligned
                return "*" + TRITON_TYPES[value.dtype]
            if isinstance(value, tuple):
                return tuple(kind(item, (*path, i)) for i, item in enumerate(value))
            if value is None or (type(value) is int and value == 1 and specialised):
                constants[path] = value
                return "constexpr"
            if type(value) is int:
                if value % 16 == 0 and specialised:
                    attributes[path] = [["tt.divisibility", 16]]
                return "i32" if -(2**31) <= value < 2**31 else "i64"
            return "fp32"

        signature = {}
        kernel = getattr(importlib.import_module(self.module), self.name)
        for index, parameter in enumerate(kernel.params):
            value = self.values[parameter.name]
            if parameter.is_constexpr:
                constants[(index,)] = value
                signature[parameter.name] = "constexpr"
            else:
                signature[parameter.name] = kind(value, (index,), not parameter.do_not_specialize)
        return signature, constants, attributes


# Takes a kernel's function, the programs of the grid, the parameters' values and the compiler's options, by name.
OnLaunch = Callable[[Callable, int, dict[str, object], dict[str, int]], None]


class _Recorder:
    """Stands in for a kernel and tells of its launches."""

    def __init__(self, kernel: JITFunction, on_launch: OnLaunch):
        self.kernel, self.on_launch = kernel, on_launch

    def __getitem__(self, grid):
        def record(*args, **kwargs):
            options = {name: kwargs.pop(name) for name in COMPILER_OPTIONS if name in kwargs}
            values = {p.name: p.default for p in self.kernel.params}
            values |= dict(zip(values, args)) | kwargs
            programs = math.prod(grid(values) if callable(grid) else grid)
            self.on_launch(self.kernel.fn, programs, values, options)

        return record


@contextlib.contextmanager
def told_launches(on_launch: OnLaunch) -> Iterator[None]:
    """Inside, no kernel is launched: `on_launch` is told instead."""
    with contextlib.ExitStack() as stack:
        for module in MODULES:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction) and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(module, name, _Recorder(value, on_launch)))
        yield


def _noted(value):
    if isinstance(value, torch.Tensor):
        return Argument(tuple(value.shape), tuple(value.stride()), value.dtype)
    return value


@contextlib.contextmanager
def stand_in_gpu(arch: int, gpu: str = NO_NAME) -> Iterator[None]:
    """Inside, `cuda` is a GPU of compute capability `arch` with fake tensors, whose operators give shapes alone.

    Args:
        gpu: its name, by which launch configurations that were tuned for one are found.
    """
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS, name=gpu)
    answers = {
        "get_device_capability": lambda device=None: divmod(arch, 10),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: gpu,
        "device": lambda device: contextlib.nullcontext(),
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(FakeTensorMode())
        yield


def recorded_launches(run: Callable[[], None], arch: int, gpu: str = NO_NAME) -> list[Launch]:
    """What `run`, which may use `cuda` as if there were one, launches on a GPU of compute capability `arch`."""
    launches: list[Launch] = []

    def note(function, programs, values, options):
        arguments = tuple((name, _noted(value)) for name, value in values.items())
        launches.append(Launch(function.__module__, function.__name__, programs, arguments, tuple(options.items())))

    with told_launches(note), stand_in_gpu(arch, gpu):
        run()
    return launches
