"""Which backend of an op runs, and why the others did not.

An op hands `select` its ladder of kernel backends and its arguments. The first rung without an objection runs;
when every rung objects, the reference (`torch`) runs. The choice is remembered for `bbfast info` and the demo.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.autograd import forward_ad

from bbfast import env
from bbfast.triton_kernels import replay


class FallbackWarning(UserWarning):
    """An op ran on its reference although a kernel backend was expected to run."""


class BackendUnavailableError(RuntimeError):
    """`BBFAST_STRICT=1` and no kernel backend could take a call."""


@dataclass(frozen=True)
class Choice:
    """What the last call of an op ran on; `reasons` are those of the backends that were passed over."""

    backend: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Attributes:
        name: one of `env.BACKENDS`, but not `auto`.
        unsupported_reasons: takes the op's arguments, returns why this backend cannot run them (empty: it can).
        run: takes the op's arguments.
    """

    name: str
    unsupported_reasons: Callable[..., list[str]]
    run: Callable

    @cached_property
    def chosen_at_once(self) -> Choice:
        """The choice of this backend where none was passed over; most calls of small layers end here."""
        return Choice(self.name, ())


AS_ASKED = Choice("torch", ("BBFAST_BACKEND=torch",))
TRITON_ON_CPU = "x is on the CPU (kernels need a CUDA tensor, or TRITON_INTERPRET=1)"

_choices: dict[str, Choice] = {}
_warned: set[tuple[str, str]] = set()


def select(op: str, kernels: Sequence[Backend], reference: Callable, *args) -> Callable:
    """Returns the function that should run `op` on `args`.

    Args:
        op: the op's name, for messages.
        kernels: kernel backends, best first.
        reference: plain torch, takes anything.
        *args: the op's arguments; the first one is a tensor, whose device decides whether a fallback is news.

    Raises:
        BackendUnavailableError: `BBFAST_STRICT=1` and only the reference is left.
        ValueError: an environment variable holds an unknown value.
    """
    wanted = env.backend()
    if wanted == "torch":
        record(op, AS_ASKED)
        return reference

    reasons = []
    for kernel in kernels:
        if wanted not in ("auto", kernel.name):
            continue
        objections = kernel.unsupported_reasons(*args)
        if not objections:
            record(op, Choice(kernel.name, tuple(reasons)) if reasons else kernel.chosen_at_once)
            return kernel.run
        reasons += [f"{kernel.name}: {reason}" for reason in objections]
    if not reasons:
        reasons = [f"{wanted}: {op} has no such backend (it has: {', '.join(k.name for k in kernels) or 'none'})"]

    fall_back(op, args[0], reasons)
    return reference


def fall_back(op: str, x: torch.Tensor, reasons: Sequence[str]) -> None:
    """Says that `op` runs in plain torch on `x`, and why.

    Raises:
        BackendUnavailableError: `BBFAST_STRICT=1`.
        ValueError: an environment variable holds an unknown value.
    """
    wanted = env.backend()
    if env.strict() and wanted != "torch":
        raise BackendUnavailableError(
            f"{op}: no kernel backend takes this call and BBFAST_STRICT=1 forbids the reference; " + "; ".join(reasons)
        )
    # On a CPU the reference is the plan, not a fallback; on a GPU, or when a backend was asked for, it is news.
    if wanted != "torch" and (x.device.type != "cpu" or wanted != "auto"):
        _warn_once(op, reasons)
    record(op, Choice("torch", tuple(reasons)))


def record(op: str, choice: Choice) -> None:
    """Notes what `op` runs on, for `last_choices`; select does so by itself."""
    _choices[op] = choice
    if choice.backend == "triton":
        replay.repeat_too(_choices.__setitem__, op, choice)
    else:  # the extension's calls are not seen
        replay.run_as_written()


def last_choices() -> dict[str, Choice]:
    """For each op that ran in this process: the backend of its last call, and why others were passed over."""
    return dict(_choices)


def forget_choices() -> None:
    """Clears what `last_choices` returns and lets every fallback warn again."""
    _choices.clear()
    _warned.clear()


# ---- plain torch on demand ---------------------------------------------------------------------------------

_exportable_depth = 0
# Whether a transform of torch.func is at work. torch.compile knows its answer, too.
is_transforming = torch._C._are_functorch_transforms_active


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Inside a `with` block every op and every swapped block runs as the plain torch operators it stands for.

    For exporters that know torch's operators only (`torch.onnx.export`, `torch.jit.trace`), and for who wants to see
    inside (`torch.fx`, profilers by operator). Values are those of the reference; gradients flow, twice if need be
    (torch itself has no second derivative of hard_sigmoid, the gate of MobileNetV3). Holds for all threads of the
    process. Nests.
    """
    global _exportable_depth
    _exportable_depth += 1
    try:
        yield
    finally:
        _exportable_depth -= 1


def wants_plain_torch() -> bool:
    """Whether an op should run its reference in the open, where others can trace and transform it.

    That is inside `exportable`, under the transforms of torch.func (vmap, grad, jvp, ...) and in forward-mode
    differentiation, of which kernels know nothing.
    """
    return _exportable_depth > 0 or is_transforming() or forward_ad._current_level >= 0


def _warn_once(op: str, reasons: Sequence[str]) -> None:
    new = [reason for reason in reasons if (op, reason) not in _warned]
    if new:
        _warned.update((op, reason) for reason in new)
        warnings.warn(f"{op} falls back to the torch reference: {'; '.join(new)}", FallbackWarning, stacklevel=4)


def triton_unavailable_reasons(x: torch.Tensor) -> list[str]:
    """Why Triton kernels cannot run on `x`'s device at all (empty: they can)."""
    if x.is_cpu and not env.TRITON_INTERPRET:  # first, for this is asked in every layer on a CPU
        return [TRITON_ON_CPU]
    return list(_triton_unavailable_reasons(x.device))


@functools.cache  # none of it changes while a process runs, and every op asks
def _triton_unavailable_reasons(device: torch.device) -> tuple[str, ...]:
    try:
        import triton
    except ModuleNotFoundError:
        return ("the package triton is not installed",)
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return (f"triton {triton.__version__} is older than 3.6, which the kernels need",)
    if device.type == "cpu":
        return ()
    if device.type != "cuda":
        return (f"x is on device {device.type!r}; kernels need CUDA",)
    if torch.version.hip is not None:
        return ("this torch is built for ROCm; kernels are tuned for NVIDIA GPUs only",)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return (f"{torch.cuda.get_device_name(device)} is older than Ampere (compute capability 8.0)",)
    return ()
