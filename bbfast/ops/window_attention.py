"""`window_attention`: (shifted) windowed attention straight from the packed qkv of an un-partitioned map.

Reads top-down: checks, backends, torch.library, autograd, public function.
"""

from __future__ import annotations

import math

import torch

from bbfast import dispatch, extension
from bbfast.ops import _common, _windows
from bbfast.ops._repeated import remembers_inference
from bbfast.reference.window_attention import window_attention as reference
from bbfast.reference.window_attention import window_attention_backward as reference_backward

OP = "window_attention"
PAD_ORDERS = ("shift_then_pad", "pad_then_shift")
# What the kernels' tiles hold.
MOST_TOKENS = 256
MOST_HEAD_DIM = 128


# ---- checks ----------------------------------------------------------------------------------------------


def _check_tensors(qkv, table, qkv_bias, num_heads, window_size):
    _common.check_tensor("qkv", qkv, rank=4, layout="[B, H, W, 3C]")
    if isinstance(num_heads, bool) or not isinstance(num_heads, (int, torch.SymInt)):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} is not allowed; it must be at least 1")
    channels = qkv.shape[3]
    if channels == 0 or channels % (3 * num_heads):
        raise ValueError(f"qkv's last axis must hold (3, num_heads={num_heads}, head_dim) channels, got {channels}")

    rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
    vectors = {"relative_position_bias_table": (table, (rows, num_heads))}
    if qkv_bias is not None:
        vectors["qkv_bias"] = (qkv_bias, (channels,))
    for name, (value, shape) in vectors.items():
        _common.check_tensor(name, value)
        if value.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)} for window_size={window_size}, num_heads={num_heads} and "
                f"{channels} channels of qkv, got {tuple(value.shape)}"
            )
        if value.device != qkv.device:
            raise ValueError(f"{name} is on {value.device} but qkv is on {qkv.device}; move them to one device")


def _check_config(window_size, shift_size, scale, pad_order, mask_value):
    if shift_size[0] >= window_size[0] or shift_size[1] >= window_size[1]:
        raise ValueError(f"shift_size={shift_size} must be smaller than window_size={window_size} along each axis")
    for name, value in (("scale", 0.0 if scale is None else scale), ("mask_value", mask_value)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if scale is not None and not -math.inf < scale < math.inf:  # NaN fails too
        raise ValueError(f"scale={scale} is not allowed; it must be finite")
    if not mask_value < math.inf:  # NaN fails too; -inf forbids masked keys altogether
        raise ValueError(f"mask_value={mask_value} is not allowed; it must be a number below infinity")
    if pad_order not in PAD_ORDERS:
        raise ValueError(f"pad_order={pad_order!r} is not known; allowed: {', '.join(map(repr, PAD_ORDERS))}")


# ---- backends --------------------------------------------------------------------------------------------


def _triton_unsupported_reasons(qkv, table, qkv_bias, num_heads, window_size, *_) -> list[str]:
    reasons = dispatch.triton_unavailable_reasons(qkv)
    for name, tensor in (("qkv", qkv), ("relative_position_bias_table", table), ("qkv_bias", qkv_bias)):
        if tensor is not None and tensor.dtype not in _common.KERNEL_DTYPES:
            reasons.append(f"{name} has dtype {tensor.dtype}; kernels take float32, float16 and bfloat16")
    tokens, head_dim = window_size[0] * window_size[1], qkv.shape[3] // (3 * num_heads)
    if tokens > MOST_TOKENS:
        reasons.append(f"a window of {tokens} tokens; kernels take up to {MOST_TOKENS}")
    if head_dim > MOST_HEAD_DIM:
        reasons.append(f"head_dim is {head_dim}; kernels take up to {MOST_HEAD_DIM}")
    return reasons


def _triton_backward_unsupported_reasons(grad_y, *args) -> list[str]:
    return _triton_unsupported_reasons(*args)


def _forward_triton(*args):
    from bbfast.triton_kernels import window_attention as kernels

    return kernels.forward(*args)


def _backward_triton(*args):
    from bbfast.triton_kernels import window_attention as kernels

    return kernels.backward(*args)


def _forward_cpp(qkv, table, qkv_bias, *config):
    parameters = [table] if qkv_bias is None else [table, qkv_bias]
    one_precision = qkv.dtype == torch.float32 and all(t.dtype != torch.float64 for t in parameters)
    if not one_precision or qkv.stride(3) != 1:
        return _forward_copied(qkv, table, qkv_bias, *config)
    *config, pad_order, mask_value = config
    return extension.load().window_attention(qkv, table, qkv_bias, *config, pad_order == "pad_then_shift", mask_value)


def _forward_copied(*args):
    return reference(*args, windows_type=_windows.CopiedWindows)


def _backward_copied(*args):
    return _backward_reference(*args, windows_type=_windows.CopiedWindows)


def _backward_reference(*args, **windows_type):
    *args, needs_table_grad, needs_bias_grad = args
    grad_qkv, grad_table, grad_bias = reference_backward(*args, **windows_type)
    return grad_qkv, grad_table if needs_table_grad else None, grad_bias if needs_bias_grad else None


# "cuda" and "cpp" attend the old way, but the extension cuts the windows and puts them together, in one copy each. Only
# float32 in the forward pass has a fused C++ kernel.
_FORWARD_KERNELS = (
    dispatch.Backend("triton", _triton_unsupported_reasons, _forward_triton),
    dispatch.Backend("cuda", _windows.cuda_unsupported_reasons, _forward_copied),
    dispatch.Backend("cpp", _windows.cpp_unsupported_reasons, _forward_cpp),
)
_BACKWARD_KERNELS = (
    dispatch.Backend("triton", _triton_backward_unsupported_reasons, _backward_triton),
    dispatch.Backend("cuda", _windows.cuda_unsupported_reasons, _backward_copied),
    dispatch.Backend("cpp", _windows.cpp_unsupported_reasons, _backward_copied),
)


def explain_plain_attention(x: torch.Tensor, *, attn_drop: float, foreign_mask: bool) -> None:
    """For layers that attend in plain torch, since the op knows neither dropout of weights nor foreign masks.

    Raises:
        BackendUnavailableError: `BBFAST_STRICT=1`.
    """
    if torch.compiler.is_compiling():  # a graph has no side effects
        return
    reasons = []
    if attn_drop > 0:
        reasons.append(f"attn_drop={attn_drop} in training; no backend drops attention weights")
    if foreign_mask:
        reasons.append("a mask was given; backends know the shift's own mask only")
    dispatch.fall_back(OP, x, reasons)


# ---- torch.library -----------------------------------------------------------------------------------------

_CONFIG = "int num_heads, int[2] window_size, int[2] shift_size, float? scale, str pad_order, float mask_value"


def _with_scale(qkv, table, qkv_bias, num_heads, window_size, shift_size, scale, *rest):
    """The arguments with a number for scale; None until here, as a number would tie a traced graph to its channels."""
    if scale is None:
        scale = (qkv.shape[3] // (3 * num_heads)) ** -0.5
    return (qkv, table, qkv_bias, num_heads, window_size, shift_size, scale, *rest)


def _forward_impl(*args):
    if args[0].numel() == 0:
        return _forward_fake(*args)
    args = _with_scale(*args)
    return dispatch.select(OP, _FORWARD_KERNELS, reference, *args)(*args)


def _backward_impl(*args):
    if args[0].numel() == 0:
        return tuple(output.zero_() for output in _backward_fake(*args))
    args = (args[0], *_with_scale(*args[1:]))
    run = dispatch.select(f"{OP}_backward", _BACKWARD_KERNELS, _backward_reference, *args)
    grad_qkv, grad_table, grad_bias = run(*args)
    table, qkv_bias = args[2:4]
    return (
        grad_qkv,
        grad_qkv.new_empty(0) if grad_table is None else grad_table.to(table.dtype).contiguous(),
        grad_qkv.new_empty(0) if grad_bias is None else grad_bias.to(qkv_bias.dtype),
    )


def _forward_fake(qkv, *_):
    batch, height, width, channels = qkv.shape
    return qkv.new_empty((batch, height, width, channels // 3))


def _backward_fake(grad_y, qkv, table, qkv_bias, *config):
    *_, needs_table_grad, needs_bias_grad = config
    return (
        qkv.new_empty(qkv.shape),
        table.new_empty(table.shape) if needs_table_grad else qkv.new_empty(0),
        qkv_bias.new_empty(qkv_bias.shape) if needs_bias_grad else qkv.new_empty(0),
    )


_forward_op = _common.define(
    f"{OP}(Tensor qkv, Tensor relative_position_bias_table, Tensor? qkv_bias, {_CONFIG}) -> Tensor",
    _forward_impl,
    _forward_fake,
)
_backward_op = _common.define(
    f"{OP}_backward(Tensor grad_y, Tensor qkv, Tensor relative_position_bias_table, Tensor? qkv_bias, {_CONFIG},"
    " bool needs_table_grad, bool needs_bias_grad) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


# ---- autograd --------------------------------------------------------------------------------------------


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, table, qkv_bias, *config):
        # Neither probabilities nor their sums are kept: the backward kernels make them again from qkv on the chip.
        ctx.save_for_backward(qkv, table, qkv_bias)
        ctx.config = config
        return _forward_op(qkv, table, qkv_bias, *config)

    @staticmethod
    @_common.once_differentiable(OP)
    def backward(ctx, grad_y):
        needed = ctx.needs_input_grad[:3]
        grads = _backward_op(grad_y, *ctx.saved_tensors, *ctx.config, needed[1], needed[2])
        grads = (grad if need else None for grad, need in zip(grads, needed))
        return (*grads, *(None for _ in ctx.config))


# ---- public function ---------------------------------------------------------------------------------------


@_common.overridable
@remembers_inference
def window_attention(
    qkv: torch.Tensor,
    relative_position_bias_table: torch.Tensor,
    *,
    num_heads: int,
    window_size: int | tuple[int, int],
    shift_size: int | tuple[int, int] = 0,
    scale: float | None = None,
    qkv_bias: torch.Tensor | None = None,
    pad_order: str = "shift_then_pad",
    mask_value: float = -100.0,
) -> torch.Tensor:
    """Multi-head attention inside (shifted) windows of a map: roll, pad, partition, attend, reverse, crop, roll back.

    The map is never rearranged: windows are gathered by index arithmetic, and the shift's mask follows from where a
    window lies. The windows and the shift are taken as given; whether a small map gets a smaller window or no shift
    is the caller's choice (timm and torchvision choose differently).

    Args:
        qkv: `[B, H, W, 3C]`, float32, float16, bfloat16 (or float64, on the reference), any strides; channels in the
            order (3, num_heads, head_dim), as a linear layer with its bias added gives them.
        relative_position_bias_table: `[(2 wh - 1)(2 ww - 1), num_heads]`, of any float dtype; row
            (dy + wh - 1)(2 ww - 1) + dx + ww - 1 is added to the scores of a query dy below and dx right of its key.
        num_heads: how many heads share the channels.
        window_size: tokens of a window, one int or (height, width).
        shift_size: by how much the map is rolled up and left first, one int or (height, width), smaller than
            the window.
        scale: what q k^T is multiplied by; None is head_dim ** -0.5.
        qkv_bias: `[3C]`, what padded tokens take as q, k and v (they were zeros before the linear layer); None
            for zeros. Its gradient is that of the padding alone.
        pad_order: which comes first where windows do not divide the map: "shift_then_pad" (timm) or
            "pad_then_shift" (torchvision, transformers). Padding is at the bottom and right and is attended to.
        mask_value: added to the scores of pairs that only rolling brought together; -inf separates them altogether.

    Returns:
        `[B, H, W, C]`, contiguous, in qkv's dtype, channels in the order (num_heads, head_dim). Under autocast qkv
        takes its dtype first, as for torch's matrix products.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes that do not fit, a shift as large as its window, devices that differ; named in the message.

    Numerics:
        Scores, softmax and its gradient are float32 (float64 for float64); probabilities are rounded to qkv's dtype
        before they meet v, as on tensor cores. float32 products are not rounded to TF32 by the kernels. All gradients
        are deterministic and once differentiable.

    Source:
        Liu et al., Swin Transformer, 2021 (https://arxiv.org/abs/2103.14030).
    """
    window_size = _common.pair("window_size", window_size, 1)
    shift_size = _common.pair("shift_size", shift_size, 0)
    _check_tensors(qkv, relative_position_bias_table, qkv_bias, num_heads, window_size)
    _check_config(window_size, shift_size, scale, pad_order, mask_value)
    (qkv,) = _common.to_autocast_dtype(qkv)
    tensors = (qkv, relative_position_bias_table, qkv_bias)
    config = (num_heads, window_size, shift_size, scale, pad_order, float(mask_value))
    if dispatch.wants_plain_torch():
        return reference(*_with_scale(*tensors, *config))
    if _common.needs_grad(*tensors):
        return _WindowAttention.apply(*tensors, *config)
    return _forward_op(*tensors, *config)
