"""One case of the per-op suite: an op at one shape in one direction, how it is called, and what is right.

Every provider is compared with eager torch in the next wider dtype, before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from bbfast.benchmarks import op_timing
from bbfast.benchmarks.op_timing import ON_GPU, Work

FORWARD, BACKWARD = "forward", "with backward"
BATCH = 128 if ON_GPU else 2
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
WIDER = torch.float32 if ON_GPU else torch.float64
EPSILONS = 4  # of the dtype, by which an output may be off beside twice eager's own error
GRADIENT_TOLERANCE = 1e-2

Tensors = tuple[torch.Tensor, ...]


class WrongResult(AssertionError):
    """A provider computes something else than eager torch."""


@dataclass(frozen=True)
class Case:
    """One op at one shape in one direction.

    Attributes:
        op: the op's name.
        shape: the layer that it is taken from and its sizes, such as "swin_tiny stage 1 128x56x56x96".
        direction: FORWARD or BACKWARD, which is forward and backward.
        inputs: makes new random inputs, on the device and in the suite's dtype.
        leaves: which of the inputs get gradients.
        eager, bbfast: take the inputs and return a tensor or several.
        work: what has to be moved and computed at least.
        others: further providers, by name.
        epsilons: the tolerance of outputs; 0 where they must be eager's bit by bit.
    """

    op: str
    shape: str
    direction: str
    inputs: Callable[[], Tensors]
    leaves: Sequence[int]
    eager: Callable
    bbfast: Callable
    work: Work
    others: Mapping[str, Callable] = field(default_factory=dict)
    epsilons: float = EPSILONS

    @property
    def group(self) -> str:
        return f"{self.op} {self.shape} {self.direction}"


@dataclass(frozen=True)
class InputSet:
    """Inputs, of which leaves require gradients where the case wants them, and gradients of the outputs."""

    inputs: Tensors
    grads: Tensors

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.grads))


@dataclass(frozen=True)
class Expected:
    """One input set and what eager makes of it in the wider dtype.

    Attributes:
        results: outputs, then gradients of the leaves.
        errors: eager's own errors in the suite's dtype, in the measure of `error_of`.
        outputs: how many of the results are outputs.
    """

    first: InputSet
    results: Tensors
    errors: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    outputs: int


def randn(*shape: int, channels_last: bool = False) -> torch.Tensor:
    """Random numbers on the device, in the suite's dtype; with `channels_last` a map [N, C, H, W] in that format."""
    x = torch.randn(shape, device=op_timing.DEVICE, dtype=DTYPE)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def rand(*shape: int) -> torch.Tensor:
    """fp32 numbers between 0.5 and 1.5 on the device, as BatchNorm's vectors."""
    return torch.rand(shape, device=op_timing.DEVICE) + 0.5


# ---- calling, and comparing with eager -----------------------------------------------------------------------


def call(case: Case, function: Callable, chosen: InputSet) -> Tensors:
    """Outputs, followed by the gradients of the leaves where the direction is BACKWARD."""
    if case.direction == FORWARD:
        with torch.no_grad():
            return _as_tuple(function(*chosen.inputs))
    outputs = _as_tuple(function(*chosen.inputs))
    gradients = torch.autograd.grad(outputs, [chosen.inputs[leaf] for leaf in case.leaves], chosen.grads)
    return *(output.detach() for output in outputs), *gradients


def make_set(case: Case) -> InputSet:
    """New inputs; for BACKWARD with random gradients of the outputs."""
    inputs = case.inputs()
    if case.direction == FORWARD:
        return InputSet(inputs, ())
    with torch.no_grad():
        grads = tuple(torch.randn_like(output) for output in _as_tuple(case.eager(*inputs)))
    return _with_leaves(case, inputs, grads)


def expect(case: Case) -> Expected:
    """Eager's results in the wider dtype, without TF32, and its own errors in the suite's dtype."""
    torch.manual_seed(0)
    first = make_set(case)
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        results = call(case, case.eager, _widened(case, first))
    finally:
        torch.backends.cudnn.allow_tf32 = allow_tf32
    outputs = len(results) - (len(case.leaves) if case.direction == BACKWARD else 0)
    ours = call(case, case.eager, first)
    errors = tuple(error_of(r, exact, i >= outputs) for i, (r, exact) in enumerate(zip(ours, results)))
    return Expected(first, results, errors, tuple(r.dtype for r in ours), outputs)


def check(case: Case, function: Callable, expected: Expected) -> tuple[float, float | None]:
    """The largest error of an output, and of a gradient, in the measure of `error_of`.

    An output may err by twice eager's own error and some units of its dtype. A gradient may err by twice eager's own
    and one percent, or the same units if they are more: where rounding decides the sign before a relu, a gradient that
    is right may differ in single elements.

    Raises:
        WrongResult: a shape or dtype is not eager's, a value is not finite, or an error is too large.
    """
    results = call(case, function, expected.first)
    if len(results) != len(expected.results):
        raise WrongResult(f"{case.group}: {len(results)} results, eager has {len(expected.results)}")
    errors: tuple[list[float], list[float]] = ([], [])
    for index, (result, exact, own, dtype) in enumerate(
        zip(results, expected.results, expected.errors, expected.dtypes)
    ):
        is_gradient = index >= expected.outputs
        name = f"gradient {index - expected.outputs}" if is_gradient else f"output {index}"
        if result.shape != exact.shape or result.dtype != dtype:
            found = f"{result.dtype} {tuple(result.shape)}"
            raise WrongResult(f"{case.group}: {name} is {found}, eager's {dtype} {tuple(exact.shape)}")
        if not result.isfinite().all():
            raise WrongResult(f"{case.group}: {name} holds NaN or infinity")
        error = error_of(result, exact, is_gradient)
        rounding = case.epsilons * torch.finfo(dtype).eps
        allowed = 2 * own + (max(rounding, GRADIENT_TOLERANCE) if is_gradient else rounding)
        if not error <= allowed:
            raise WrongResult(f"{case.group}: error of {name} is {error:.3g}, allowed is {allowed:.3g}")
        errors[is_gradient].append(error)
    return max(errors[0]), max(errors[1], default=None)


def error_of(result: torch.Tensor, exact: torch.Tensor, is_gradient: bool) -> float:
    """The largest difference over the largest value; for gradients the norm of the difference over the norm."""
    if exact.numel() == 0:
        return 0.0
    difference = result.to(exact.dtype) - exact
    if is_gradient:
        error, size = difference.norm(), exact.norm()
    else:
        error, size = difference.abs().max(), exact.abs().max()
    return (error / size.clamp_min(torch.finfo(exact.dtype).tiny)).item()


def _widened(case: Case, chosen: InputSet) -> InputSet:
    inputs, grads = (
        tuple(t.detach().to(WIDER, copy=True) if t.is_floating_point() else t for t in tensors)
        for tensors in (chosen.inputs, chosen.grads)
    )
    return _with_leaves(case, inputs, grads) if case.direction == BACKWARD else InputSet(inputs, grads)


def _with_leaves(case: Case, inputs: Tensors, grads: Tensors) -> InputSet:
    for leaf in case.leaves:
        inputs[leaf].requires_grad_()
    return InputSet(inputs, grads)


def _as_tuple(outputs: torch.Tensor | Tensors) -> Tensors:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
