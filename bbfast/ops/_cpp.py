"""The extension's CPU kernels: which maps they take, calls of them, and the short way to them."""

from __future__ import annotations

import torch

from bbfast import dispatch, env, extension
from bbfast.ops import _common


def unsupported_reasons(x: torch.Tensor) -> list[str]:
    """Why no CPU kernel of the extension can run on `x` (empty: it may).

    Raises:
        BrokenExtensionError: the extension is there but cannot be used.
    """
    if not x.is_cpu:
        return [f"x is on {x.device}; the extension's kernels run on the CPU"]
    reasons = []
    if x.dtype != torch.float32:
        reasons.append(f"x has dtype {x.dtype}; the extension's kernels take float32")
    if not _common.is_channels_last(x):
        reasons.append("x is not channels_last")
    if unavailable := extension.unavailable_reason():
        reasons.append(unavailable)
    return reasons


def has_even_pixels(x: torch.Tensor) -> bool:
    """Whether the pixels of all samples of channels_last `x` follow each other at one distance (no slice)."""
    n, _, h, w = x.shape
    row = w * x.stride(3)
    return (h == 1 or x.stride(2) == row) and (n == 1 or x.stride(0) == h * row)


def pointwise_conv_bn_act(
    x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, stride, eps, act
) -> torch.Tensor:
    """`act(batch_norm(conv1x1(x)) + residual)`; x channels_last, slices included."""
    if residual is not None and not (_common.is_channels_last(residual) and has_even_pixels(residual)):
        residual = residual.contiguous(memory_format=torch.channels_last)
    return extension.load().pointwise_conv_bn_act(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, stride, eps, act
    )


def takes_few_pixels(x, weight, *geometry) -> bool:
    """Whether the product of gathered patches and the weight as it lies is quickest; never where `BBFAST_BACKEND=cpp`.

    geometry: stride, padding, dilation, groups.
    """
    pays = extension.load() is not None and extension.load().im2col_pays(x, weight, *geometry)
    return pays and env.backend() != "cpp"


def im2col_conv_bn_act(x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, *args) -> torch.Tensor:
    """`act(batch_norm(conv(x)) + residual)` for outputs of few pixels; x channels_last, slices included.

    args: stride, padding, dilation, eps, act.
    """
    return extension.load().im2col_conv_bn_act(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, *args
    )


def grouped_unsupported_reasons(weight, dilation, groups) -> list[str]:
    """Why the extension should not run a convolution of several groups (empty: it should)."""
    if extension.load() is None or extension.load().grouped_pays(weight, dilation, groups):
        return []
    return ["the grouped convolution is not 3x3 without dilation, with 2 to 256 channels per group"]


def grouped_conv_bn_act(
    x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, *args
) -> torch.Tensor:
    """`act(batch_norm(conv(x)) + residual)` with several groups; x channels_last, slices included.

    args: stride, padding, groups, eps, act.
    """
    if residual is not None and not _common.is_channels_last(residual):
        residual = residual.contiguous(memory_format=torch.channels_last)
    return extension.load().grouped_conv_bn_act(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, *args
    )


def winograd_unsupported_reasons(x, weight, stride, padding, dilation, groups) -> list[str]:
    """Why a 3x3 convolution should not go through Winograd's transform (empty: it should).

    Where `BBFAST_BACKEND=cpp` leaves no other kernel, it may be slower than oneDNN.
    """
    if tuple(stride) != (1, 1) or tuple(dilation) != (1, 1) or groups != 1 or max(padding) > 2:
        return ["the 3x3 convolution does not have stride 1, dilation 1, groups 1 and a padding of at most 2"]
    if env.backend() == "cpp" or extension.load() is None:
        return []
    if not extension.load().winograd_pays(x, weight, stride, padding, dilation, groups):
        return ["the 3x3 convolution has too few channels or pixels to gain from Winograd's transform"]
    return []


def winograd_conv_bn_act(
    x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, padding, eps, act
) -> torch.Tensor:
    """`act(batch_norm(conv3x3(x)) + residual)` at stride 1; x channels_last, slices included."""
    if residual is not None and not _common.is_channels_last(residual):
        residual = residual.contiguous(memory_format=torch.channels_last)
    return extension.load().winograd_conv_bn_act(
        x, weight, bias, bn_weight, bn_bias, running_mean, running_var, residual, padding, eps, act
    )


def depthwise_conv_bn_act(x, *args) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y, squeeze means or None) of `act(batch_norm(conv(x)))`; x channels_last, slices included.

    args: weight, bias, bn_weight, bn_bias, running_mean, running_var, stride, padding, dilation, eps, act, squeeze.
    """
    y, squeezed = extension.load().depthwise_conv_bn_act(x, *args)
    return y, squeezed if args[-1] else None


# ---- the short way ---------------------------------------------------------------------------------------
#
# Checks, torch's dispatcher and the choice of a backend cost more than the kernel of a small layer. For the plainest
# calls (float32, channels_last, inference, nobody tracing or watching) the extension answers at once, and with None
# where it is not sure that the long way would lead to the same kernel. Arguments need no checks: a wrong one is None.

_AT_ONCE = dispatch.Choice("cpp", (f"triton: {dispatch.TRITON_ON_CPU}",))


def try_pointwise_conv_bn_act(op: str, x, *args) -> torch.Tensor | None:
    """`op`'s result, or None where the long way must be taken. args: as the public function's, in its order."""
    if not _may_take_short_way(x):
        return None
    y = extension.load().try_pointwise_conv_bn_act(x, *args)
    if y is not None:
        dispatch.record(op, _AT_ONCE)
    return y


def try_depthwise_conv_bn_act(op: str, x, *args) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`op`'s (y, squeeze means or empty), or None where the long way must be taken."""
    if not _may_take_short_way(x):
        return None
    outputs = extension.load().try_depthwise_conv_bn_act(x, *args)
    if outputs is not None:
        dispatch.record(op, _AT_ONCE)
    return outputs


def _may_take_short_way(x) -> bool:
    if env.TRITON_INTERPRET:  # Triton's kernels come first, on the CPU, too
        return False
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or not x.is_cpu or dispatch.wants_plain_torch():
        return False
    return env.backend() == "auto" and extension.load() is not None
