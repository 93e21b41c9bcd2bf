"""`window_partition` and `window_reverse`: pad, shift and cut a map into windows in one copy, and the inverse.

Each is the other's gradient. They have no layer in `bbfast.nn`: there are no parameters and no modes to keep.
Reads top-down: checks, backends, torch.library, autograd, public functions.
"""

from __future__ import annotations

import torch

from bbfast import dispatch, extension
from bbfast.ops import _common, _windows
from bbfast.reference.window_partition import count_windows
from bbfast.reference.window_partition import window_partition as reference_partition
from bbfast.reference.window_partition import window_reverse as reference_reverse

PARTITION = "window_partition"
REVERSE = "window_reverse"
PAD_ORDERS = ("shift_then_pad", "pad_then_shift")
MAX_SIZE = 2**31 - 1  # of windows, shifts and images, in pixels a side


# ---- checks ----------------------------------------------------------------------------------------------


def _check_tensor(name, value, rank, layout):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}; only dense (torch.strided) tensors are taken")
    if value.is_quantized:
        raise TypeError(f"{name} has dtype {value.dtype}; quantized tensors are not taken, pass their int_repr()")
    if value.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(value.shape)}")


def _pair(name, value, minimum) -> tuple[int, int]:
    if type(value) is int and minimum <= value <= MAX_SIZE:  # as most calls have it: no more than a look
        return value, value
    values = _common.pair(name, value, minimum)
    if max(values) > MAX_SIZE:
        raise ValueError(f"{name}={value!r} is not allowed; it must be at most {MAX_SIZE}")
    return values


def _check_pad_order(pad_order):
    if not isinstance(pad_order, str):
        raise TypeError(f"pad_order must be a string, got {type(pad_order).__name__}")
    if pad_order not in PAD_ORDERS:
        raise ValueError(f"pad_order={pad_order!r} is not known; allowed: {', '.join(PAD_ORDERS)}")


# ---- backends --------------------------------------------------------------------------------------------


def _run_partition(x, window_size, shift_size, pad_order):
    return extension.load().window_partition(x, window_size, shift_size, pad_order == "pad_then_shift")


def _run_reverse(windows, window_size, image_size, shift_size, pad_order):
    pad_first = pad_order == "pad_then_shift"
    return extension.load().window_reverse(windows, window_size, image_size, shift_size, pad_first)


_PARTITION_KERNELS = (
    dispatch.Backend("cuda", _windows.cuda_unsupported_reasons, _run_partition),
    dispatch.Backend("cpp", _windows.cpp_unsupported_reasons, _run_partition),
)
_REVERSE_KERNELS = (
    dispatch.Backend("cuda", _windows.cuda_unsupported_reasons, _run_reverse),
    dispatch.Backend("cpp", _windows.cpp_unsupported_reasons, _run_reverse),
)


# ---- torch.library ---------------------------------------------------------------------------------------


def _partition_impl(*args):
    return dispatch.select(PARTITION, _PARTITION_KERNELS, reference_partition, *args)(*args)


def _reverse_impl(*args):
    return dispatch.select(REVERSE, _REVERSE_KERNELS, reference_reverse, *args)(*args)


def _partition_fake(x, window_size, shift_size, pad_order):
    batch, height, width, channels = x.shape
    down, across = count_windows((height, width), window_size)
    return x.new_empty((batch * down * across, window_size[0] * window_size[1], channels))


def _reverse_fake(windows, window_size, image_size, shift_size, pad_order):
    down, across = count_windows(image_size, window_size)
    return windows.new_empty((windows.shape[0] // (down * across), *image_size, windows.shape[2]))


_partition_op = _common.define(
    f"{PARTITION}(Tensor x, SymInt[2] window_size, SymInt[2] shift_size, str pad_order) -> Tensor",
    _partition_impl,
    _partition_fake,
)
_reverse_op = _common.define(
    f"{REVERSE}(Tensor windows, SymInt[2] window_size, SymInt[2] image_size, SymInt[2] shift_size, str pad_order)"
    " -> Tensor",
    _reverse_impl,
    _reverse_fake,
)


# ---- autograd: each direction is the adjoint of the other, so gradients of gradients come by themselves ------


def _partition(x, window_size, shift_size, pad_order):
    args = (x, window_size, shift_size, pad_order)
    return _WindowPartition.apply(*args) if _common.needs_grad(x) else _partition_op(*args)


def _reverse(windows, window_size, image_size, shift_size, pad_order):
    args = (windows, window_size, image_size, shift_size, pad_order)
    return _WindowReverse.apply(*args) if _common.needs_grad(windows) else _reverse_op(*args)


class _WindowPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, window_size, shift_size, pad_order):
        ctx.config = window_size, (x.shape[1], x.shape[2]), shift_size, pad_order
        return _partition_op(x, window_size, shift_size, pad_order)

    @staticmethod
    def backward(ctx, grad_windows):
        return _reverse(grad_windows, *ctx.config), None, None, None


class _WindowReverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, windows, window_size, image_size, shift_size, pad_order):
        ctx.config = window_size, shift_size, pad_order
        return _reverse_op(windows, window_size, image_size, shift_size, pad_order)

    @staticmethod
    def backward(ctx, grad_x):
        return _partition(grad_x, *ctx.config), None, None, None, None


# ---- public functions --------------------------------------------------------------------------------------


@_common.overridable
def window_partition(
    x: torch.Tensor,
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int] = 0,
    *,
    pad_order: str = "shift_then_pad",
) -> torch.Tensor:
    """Pads, cyclically shifts and partitions a map into windows, in one copy.

    Args:
        x: map `[B, H, W, C]` of any dtype, H and W at least 1. Batch, rows and columns may have any strides (slices,
            expanded or transposed maps); where channels do not lie side by side in memory (a permuted NCHW map), x is
            made contiguous first, which is a second copy.
        window_size: an int or (height, width) of a window, in pixels; may exceed the map, which is then padded.
        shift_size: an int or (height, width), in pixels: how far the map is rolled up and to the left. Any number
            that is not negative, used as it is: a model that drops the shift where one window holds the whole map
            does so itself.
        pad_order: what happens first on sizes that the window does not divide. `"shift_then_pad"` (timm) rolls the
            H x W map and pads the result with zeros at the bottom and right; `"pad_then_shift"` (torchvision,
            transformers) pads and rolls the padded map.

    Returns:
        Windows `[B * n, window height * window width, C]`, contiguous, in x's dtype; the n = ceil(H / height) *
        ceil(W / width) windows of an image follow each other in reading order, as do the pixels of a window.

    Raises:
        TypeError: an argument of the wrong type; x sparse or quantized.
        ValueError: a wrong rank, an empty map, sizes out of range, an unknown pad_order; named in the message.

    Numerics:
        Elements are moved bit by bit, NaN payloads and negative zeros included. The gradient is `window_reverse`
        with the same arguments: gradients of padding are dropped. Differentiable any number of times.
    """
    _check_tensor("x", x, 4, "[B, H, W, C]")
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"x has an empty map: shape {tuple(x.shape)}")
    window_size = _pair("window_size", window_size, 1)
    shift_size = _pair("shift_size", shift_size, 0)
    _check_pad_order(pad_order)
    if dispatch.wants_plain_torch():
        return reference_partition(x, window_size, shift_size, pad_order)
    return _partition(x, window_size, shift_size, pad_order)


@_common.overridable
def window_reverse(
    windows: torch.Tensor,
    window_size: int | tuple[int, int],
    image_size: int | tuple[int, int],
    shift_size: int | tuple[int, int] = 0,
    *,
    pad_order: str = "shift_then_pad",
) -> torch.Tensor:
    """Puts the map together that `window_partition` cut, shifted back and cropped, in one copy.

    Args:
        windows: `[B * n, window height * window width, C]` of any dtype, n as in `window_partition`. Windows and
            tokens may have any strides; where channels do not lie side by side in memory, windows are made contiguous
            first, which is a second copy.
        window_size, shift_size, pad_order: as given to `window_partition`.
        image_size: an int or (H, W) of the map, in pixels.

    Returns:
        The map `[B, H, W, C]`, contiguous, in windows' dtype. What stands in padded positions is dropped.

    Raises:
        TypeError: an argument of the wrong type; windows sparse or quantized.
        ValueError: a wrong rank or shape, sizes out of range, an unknown pad_order; named in the message.

    Numerics:
        Elements are moved bit by bit. The gradient is `window_partition` with the same arguments: padded positions get
        zeros. Differentiable any number of times.
    """
    _check_tensor("windows", windows, 3, "[B * n, window height * window width, C]")
    window_size = _pair("window_size", window_size, 1)
    image_size = _pair("image_size", image_size, 1)
    shift_size = _pair("shift_size", shift_size, 0)
    _check_pad_order(pad_order)
    down, across = count_windows(image_size, window_size)
    pixels = window_size[0] * window_size[1]
    if windows.shape[0] % (down * across) != 0 or windows.shape[1] != pixels:
        raise ValueError(
            f"windows must have shape [B * {down * across}, {pixels}, C] for window_size={window_size} and "
            f"image_size={image_size}, got {tuple(windows.shape)}"
        )
    if dispatch.wants_plain_torch():
        return reference_reverse(windows, window_size, image_size, shift_size, pad_order)
    return _reverse(windows, window_size, image_size, shift_size, pad_order)
