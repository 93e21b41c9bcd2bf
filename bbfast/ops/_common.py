"""What every op file shares: the torch.library handle, argument checks, autocast, output layout."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from bbfast import dispatch, env
from bbfast.reference.activation import ACTIVATIONS
from bbfast.triton_kernels import replay
from bbfast.triton_kernels.layout import is_channels_last, new_output

LIBRARY = torch.library.Library("bbfast", "DEF")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Kernels compute in fp32, so these are the element types they load and store.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def define(schema: str, implementation: Callable, fake: Callable):
    """Registers `bbfast::<schema>` with one implementation for CPU and CUDA and returns the op.

    The implementation chooses its backend; the fake gives shapes, dtypes and strides for tracing.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"bbfast::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.bbfast, name).default
    replay.INSIDE[op] = implementation
    return op


def overridable(function: Callable) -> Callable:
    """Decorator of a function whose first argument is a tensor: lets what only stands for one take the call.

    That is torch's protocol for its own functions (`__torch_function__`). `torch.fx.symbolic_trace` so records one call
    and does not look inside, where sizes are asked that it does not know.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        if args and has_torch_function_unary(args[0]):
            return handle_torch_function(call, args[:1], *args, **kwargs)
        return function(*args, **kwargs)

    return call


def once_differentiable(op: str) -> Callable:
    """Decorator of the backward of `op`'s autograd.Function: gradients of gradients raise an error that says why.

    torch's own decorator ties gradients to nothing: who asks for the gradients of certain tensors only never gets to
    its error, and goes on with gradients that lack a term.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx, *grad_outputs):
            with torch.no_grad():
                grads = backward(ctx, *grad_outputs)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return grads
            return _OnceDifferentiable.apply(op, grads, *grad_outputs, *ctx.saved_tensors)

        return wrapper

    return decorate


class _OnceDifferentiable(torch.autograd.Function):
    """Hands on gradients, tied to the tensors that they were made from."""

    @staticmethod
    def forward(ctx, op, grads, *made_from):
        ctx.op = op
        return tuple(None if grad is None else grad.detach() for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"bbfast.ops.{ctx.op} is once_differentiable: its gradients come from kernels and have none themselves. "
            "For gradients of gradients run the forward pass in `with bbfast.exportable():`, in plain torch"
        )


def check_tensor(name: str, value, *, rank: int | None = None, layout: str = "") -> None:
    """Raises TypeError or ValueError unless `value` is a dense floating-point tensor of the given rank."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed: float32, float16, bfloat16, float64")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; only dense (torch.strided) tensors are taken")
    if rank is not None and value.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(value.shape)}")


def check_channel_vectors(values: dict, channels: int, like: torch.Tensor) -> None:
    """Raises unless each of `values` (by name) is None or a [channels] tensor on `like`'s device."""
    shape, device = (channels,), like.device
    for name, value in values.items():
        if value is None:
            continue
        check_tensor(name, value)
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, one value per channel, got {tuple(value.shape)}")
        if value.device != device:
            check_same_device(name, value, like)


def check_same_device(name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but x is on {like.device}; move them to one device")


def check_act(act) -> None:
    if not isinstance(act, str):
        raise TypeError(f"act must be a string, got {type(act).__name__}")
    if act not in ACTIVATIONS:
        raise ValueError(f"act={act!r} is not known; allowed: {', '.join(ACTIVATIONS)}")


def check_batch_norm(
    channels: int,
    like: torch.Tensor,
    bn_weight,
    bn_bias,
    running_mean,
    running_var,
    training,
    momentum,
    eps,
    names,
) -> None:
    """Checks the BatchNorm arguments that several ops take; `names` are what the op calls weight and bias."""
    vectors = {names[0]: bn_weight, names[1]: bn_bias, "running_mean": running_mean, "running_var": running_var}
    check_channel_vectors(vectors, channels, like)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be tensors or both be None")
    if running_mean is None and training is False and (bn_weight is not None or bn_bias is not None):
        raise ValueError(f"training=False with {names[0]} or {names[1]} needs running_mean and running_var")
    if not isinstance(training, bool):
        raise TypeError(f"training must be a bool, got {type(training).__name__}")
    if momentum is None:
        raise TypeError(
            "momentum=None (cumulative average) needs a batch count, which only a layer keeps: "
            "use bbfast.nn, or pass momentum=1/num_batches_tracked"
        )
    for name, value in (("momentum", momentum), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float, got {type(value).__name__}")
        if not 0 <= value < math.inf:  # NaN fails too
            raise ValueError(f"{name}={value} is not allowed; it must be finite and not negative")


def check_batch_statistics(values_per_channel: int, shape: Sequence[int]) -> None:
    """Raises where the variance of a batch is undefined, as torch does."""
    if values_per_channel == 1:
        raise ValueError(
            f"training=True needs more than 1 value per channel to estimate a variance, got shape {tuple(shape)}"
        )


def pair(name: str, value, minimum: int) -> tuple[int, int]:
    """An int or two ints as (height, width), each at least `minimum`."""
    if type(value) is tuple and len(value) == 2:  # as convolution modules hold it: no more than a look
        height, width = value
        if type(height) is int and type(width) is int and height >= minimum and width >= minimum:
            return value
    values = (value, value) if isinstance(value, int) else value
    if isinstance(value, bool) or not isinstance(values, (tuple, list)) or not all(_is_int(v) for v in values):
        raise TypeError(f"{name} must be an int or two ints (height, width), got {value!r}")
    if len(values) != 2:
        raise ValueError(f"{name} must be an int or two ints (height, width), got {len(values)} values: {value!r}")
    if min(values) < minimum:
        raise ValueError(f"{name}={value!r} is not allowed; it must be at least {minimum}")
    return tuple(values)


def _is_int(value) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def resolve_padding(padding, size, kernel_size, stride, dilation) -> tuple[int, int, int, int]:
    """Padding as (top, bottom, left, right).

    Args:
        padding: an int; (height, width), each used on both sides; (top, bottom, left, right); `"same"`, which is
            TensorFlow's rule: the output has ceil(size / stride) rows and an odd pixel goes to the bottom or right;
            or `"valid"`, no padding.
        size: (H, W) of the input; kernel_size, stride, dilation: (height, width) each.
    """
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        sides = []
        if torch.jit.is_tracing():  # sizes are tensors there, and a trace is for one size anyway
            size, kernel_size = [int(length) for length in size], [int(k) for k in kernel_size]
        for length, k, s, d in zip(size, kernel_size, stride, dilation):
            total = max((-(-length // s) - 1) * s + (k - 1) * d + 1 - length, 0)
            sides += [total // 2, total - total // 2]
        return tuple(sides)
    if isinstance(padding, str):
        raise ValueError(f"padding={padding!r} is not known; allowed strings: 'same', 'valid'")
    if isinstance(padding, (tuple, list)) and len(padding) == 4:
        if not all(_is_int(p) for p in padding):
            raise TypeError(f"padding must hold ints, got {padding!r}")
        if min(padding) < 0:
            raise ValueError(f"padding={padding!r} is not allowed; it must not be negative")
        return tuple(padding)
    top, left = pair("padding", padding, 0)
    return (top, top, left, left)


def conv_output_size(size, kernel_size, stride, padding, dilation) -> tuple[int, int]:
    """(H_out, W_out) of a convolution with padding (top, bottom, left, right).

    Raises:
        ValueError: the dilated kernel is larger than the padded input.
    """
    top, bottom, left, right = padding
    return (
        _output_length("H", size[0] + top + bottom, kernel_size[0], stride[0], dilation[0]),
        _output_length("W", size[1] + left + right, kernel_size[1], stride[1], dilation[1]),
    )


def _output_length(axis: str, padded: int, kernel_size: int, stride: int, dilation: int) -> int:
    extent = (kernel_size - 1) * dilation + 1
    if padded < extent:
        raise ValueError(
            f"the kernel spans {extent} pixels along {axis} (kernel_size {kernel_size}, dilation {dilation}) but the "
            f"padded input has only {padded}"
        )
    return (padded - extent) // stride + 1


def to_autocast_dtype(*tensors):
    """Casts to the autocast dtype where autocast is on for the first tensor's device, as torch's conv2d does."""
    dtype = autocast_dtype(tensors[0].device.type if isinstance(tensors[0], torch.Tensor) else "cpu")
    return tensors if dtype is None else tuple(t.to(dtype) if _is_castable(t) else t for t in tensors)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on such devices; None where it is off."""
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    return torch.get_autocast_dtype(device_type) if available and torch.is_autocast_enabled(device_type) else None


def _is_castable(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def needs_grad(*tensors) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors)


def compiler_fuses(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether torch.compile traces inference, where Inductor fuses an elementwise op with its neighbours.

    Such an op should then run its reference in the open: the fused kernel moves no more than the op's own would, and
    less where two of them meet, as in the sum of ResNet's branch and shortcut; on a CPU the op has no kernel at all. A
    graph without gradients only, since compiled gradients would keep more than those of the op. Triton's interpreter
    is there to run kernels.
    """
    return torch.compiler.is_compiling() and not env.TRITON_INTERPRET and not needs_grad(x, *others)


_NO_KERNEL_ON_CPU = dispatch.Choice("torch", (f"triton: {dispatch.TRITON_ON_CPU}",))


def left_to_torch(op: str, x: torch.Tensor) -> bool:
    """Whether `op`, which has no kernel for the CPU, is called there, and with nothing but the reference to choose.

    The reference should then run in the open: with gradients autograd keeps what torch's operators need for their
    backward, where the op's own would compute it again; torch.compile fuses them; and nothing is dispatched twice.
    """
    if not x.is_cpu or env.TRITON_INTERPRET:
        return False
    if torch.compiler.is_compiling():
        return True
    wanted = env.backend()
    if wanted not in ("auto", "torch") or env.strict():  # who asks for a kernel hears why there is none
        return False
    dispatch.record(op, _NO_KERNEL_ON_CPU if wanted == "auto" else dispatch.AS_ASKED)
    return True


def as_output(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`y` with the strides that `new_output(x, y.shape)` has, copied only where they differ."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return y if y.is_contiguous(memory_format=layout) else new_output(x, y.shape).copy_(y)


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """What means and variances of `x` are kept in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
